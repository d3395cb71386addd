"""Held-out figures of commits while a run trains: each once, and never in the way."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import RunConfig
from pipelines.data import indexing
from pipelines.data.indexing import build
from pipelines.data.plan import Cursor, Plan
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.pretrain import evaluate_heldout, pretrain
from pipelines.recipes import recipe
from pipelines.run import Run, load_run
from pipelines.training.checkpoint import Commit
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import read_spool
from pipelines.training.start import draw
from pipelines.training.tracking import COMMITS_FILE
from pipelines.use import commit_figures
from pipelines.use.commit_figures import CommitFigures, bounded
from pipelines.use.evaluate_images import evaluate_images
from pipelines.use.heldout import Held
from tests.corpus import serial_map, write_corpus
from tests.pictures import write_pictures


@pytest.fixture
def run(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return an image run that is to be measured every 10 steps and has no commit yet."""
    del ray_session
    monkeypatch.setattr(indexing, "MIN_BLOCK_BYTES", 8000)
    write_pictures(tmp_path / "pictures", num_pictures=120)
    source = SourceConfig(heldout_ratio=0.2)
    config = replace(recipe("image-tiny"), name="run", measure_every=10, source=source)
    manifest = build(find_shards([str(tmp_path / "pictures")]), source, serial_map)
    return Run(tmp_path / "run", "key", config, manifest, None)


def nobody(path: Path, folder: str) -> None:
    """Look at no file."""
    del path, folder


def commit(run: Run, step: int, attempt: int = 1) -> None:
    made = Commit(
        step=step,
        attempt=attempt,
        parent="",
        cursor=Cursor(),
        digests=(),
        fates={},
        workers=1,
        manifest_sha256="",
    )
    weights = draw(replace(run.config, seed=step)).state_dict()
    run.log.save(made, weights, {})


def points(run: Run) -> dict[int, dict[str, float]]:
    found = [r for r in read_spool(run.dir / "spool", {}) if r.attempt == COMMITS_FILE]
    assert len({record.step for record in found}) == len(found), "a step is there twice"
    return {record.step: record.metrics for record in found}


def test_commits_are_measured_once_and_a_resumed_run_goes_on(run: Run) -> None:
    shown: list[tuple[Path, str]] = []
    figures = CommitFigures(run, lambda path, folder: shown.append((path, folder)))
    for step in (5, 10, 15):
        commit(run, step)
        figures.update()
    figures.close()
    assert list(points(run)) == [10]
    place = "pictures/step-000000010"
    drawn = [run.dir / place / name for name in ("triplets.png", "map.png")]
    assert shown == [(path, place) for path in drawn]
    assert all(path.is_file() for path in drawn)
    expected = evaluate_images(draw(replace(run.config, seed=10)), run).losses["triplet"]
    assert points(run)[10]["commit/triplet_loss"] == pytest.approx(expected, rel=1e-5)

    again = CommitFigures(run, nobody)  # of the next attempt, which replays steps
    for step in (10, 15, 23):
        commit(run, step, attempt=2)
        again.update()
    again.close()
    assert list(points(run)) == [10, 23]
    off = CommitFigures(replace(run, config=replace(run.config, measure_every=0)), nobody)
    commit(run, 30, attempt=2)
    off.close()
    assert list(points(run)) == [10, 23]


def test_a_commit_that_is_gone_or_too_slow_costs_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run, 10)
    for path in (run.dir / "checkpoints").glob("*/model.safetensors"):
        path.unlink()
    figures = CommitFigures(run, nobody)
    figures.close()
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("measuring commit 000001-000000010 failed (")
    assert "step-000000010-000001" in said
    assert said.endswith("): the training goes on without it")

    monkeypatch.setattr(commit_figures, "PATIENCE_SECONDS", 0)
    commit(run, 20)
    CommitFigures(run, nobody).close()
    assert "took too long: the training goes on without it" in capsys.readouterr().out
    assert points(run) == {}
    (run.dir / "commits" / "000001-000000020.json").write_text("{")
    CommitFigures(run, nobody).close()
    assert capsys.readouterr().out == ""


def test_figures_are_kept_where_nothing_can_be_drawn(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run, 10)
    (run.dir / "pictures").write_text("a file where a folder is to be")
    CommitFigures(run, nobody).close()
    assert list(points(run)) == [10]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("measuring commit 000001-000000010 shows nothing (")
    assert said.endswith("): the training goes on without it")


def test_a_bounded_manifest_trains_the_same_and_holds_out_less(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bounded(run.manifest) == run.manifest
    monkeypatch.setattr(commit_figures, "MAX_RECORDS", 10)
    less = bounded(run.manifest)
    blocks = less.blocks_of("heldout")
    assert set(blocks) < set(run.manifest.blocks_of("heldout"))
    read = sum(len(less.read(block, "heldout")) for block in blocks)
    assert read == less.records_where("heldout")
    assert 0 < read <= 20 < run.manifest.records_where("heldout")
    plans = [Plan(manifest, 0, 4) for manifest in (run.manifest, less)]
    assert plans[0].orders_per_epoch == plans[1].orders_per_epoch
    assert [plans[0].order(i) for i in range(6)] == [plans[1].order(i) for i in range(6)]


def test_a_single_picture_held_out_is_no_hindrance(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = sorted(picture.content for picture in Held(run.manifest, "heldout", 1000).items())
    source = SourceConfig(heldout_ratio=(contents[0] + contents[1]) / 2**65)
    manifest = build(find_shards([run.manifest.root]), source, serial_map)
    assert manifest.records_where("heldout") == 1
    assert evaluate_heldout(draw(run.config), replace(run, manifest=manifest)) is None
    assert "no picture is held out that can be decoded and told from another" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("name", "loss", "files"),
    [
        ("image-tiny", "triplet_loss", {"pictures/map.png", "pictures/triplets.png"}),
        ("text-tiny", "mlm_loss", {"tables/predictions.csv"}),
    ],
)
def test_a_run_is_measured_and_shown_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loss: str, files: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (write_pictures if name == "image-tiny" else write_corpus)(tmp_path / "data")
    config: RunConfig = replace(
        recipe(name),
        data=(str(tmp_path / "data"),),
        name="measured",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        steps=20,
        checkpoint_every=10,
        measure_every=10,
        source=SourceConfig(heldout_ratio=0.2),
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        account = pretrain(config)
    assert "measuring" not in out.getvalue()
    found = points(load_run(tmp_path / "runs" / "measured"))
    assert 20 in found
    at_end = account["evaluation"][f"heldout/{loss}"]
    assert found[20][f"commit/{loss}"] == pytest.approx(at_end, rel=1e-5)
    client, run_id = open_client(config.tracking_uri), account["mlflow_run"]
    sent = client.get_metric_history(run_id, f"commit/{loss}")
    outputs = client.get_run(run_id).outputs.model_outputs
    assert {output.step for output in outputs} >= set(found)
    assert [point.step for point in sent] == sorted(found)

    folder = min(files).partition("/")[0]
    logged = {file.path for file in client.list_artifacts(run_id, folder)}
    steps = {f"{folder}/step-{step:09d}" for step in found}
    assert logged == files | steps
    for place in steps:
        names = {file.path.rpartition("/")[2] for file in client.list_artifacts(run_id, place)}
        assert names == {file.rpartition("/")[2] for file in files}
