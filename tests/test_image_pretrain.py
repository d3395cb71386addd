"""One run on pictures, from raw tar shards to the registry, by the loop and pipeline of text."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.types import DataType
from safetensors.torch import load_file

from pipelines.cli import main
from pipelines.config import RunConfig
from pipelines.data import images, indexing
from pipelines.data.batches import Rank, RowSource, Step, local_blocks, slot_digest, steps
from pipelines.data.images import ImageRows
from pipelines.data.plan import Cursor, OrderConfig, Plan
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import DataError, UserError
from pipelines.pretrain import pretrain
from pipelines.recipes import recipe
from pipelines.run import load_run
from pipelines.training.loop import load_objective
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import read_spool
from pipelines.use.evaluate import evaluate
from pipelines.use.fill_mask import fill_mask
from pipelines.use.hf_export import export
from pipelines.use.preview import preview
from pipelines.use.registry import load_encoder
from pipelines.use.verify import verify
from ssl_models.contrastive import ContrastiveConfig
from tests.corpus import serial_map
from tests.pictures import make_picture, write_pictures
from tests.test_batches import by_ranks, join, local


@dataclass(frozen=True)
class Finished:
    """A run on two workers."""

    folder: Path
    config: RunConfig
    account: dict[str, Any]
    said: list[str]

    @property
    def dir(self) -> Path:
        """Return the folder of the run."""
        return self.folder / "runs" / self.config.name


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    write_pictures(folder / "pictures")
    return replace(
        recipe(name),
        data=(str(folder / "pictures"),),
        name="shapes",
        runs=str(folder / "runs"),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        **({"steps": 5, "workers": 2, "checkpoint_every": 3} | changes),
    )


def call(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        account = pretrain(config)
    return account, out.getvalue().splitlines()


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    del ray_session
    folder = tmp_path_factory.mktemp("images")
    config = config_of(folder, "image-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where artifacts go
        account, said = call(config)
        yield Finished(folder, config, account, said)


def test_what_was_trained_is_what_was_planned(finished: Finished) -> None:
    verdict = verify(load_run(finished.dir))
    assert (verdict.status, verdict.digest) == ("PASS", finished.account["digest"])
    assert verdict.steps == finished.config.steps


def losses(run: Path) -> dict[int, float]:
    """Return the loss that was logged of each step."""
    records = read_spool(run / "spool", {})
    return {r.step: r.metrics["loss"] for r in records if "loss" in r.metrics}


def test_pictures_and_what_was_watched_are_in_mlflow(finished: Finished) -> None:
    client = open_client(finished.config.tracking_uri)
    run_id = finished.account["mlflow_run"]
    logged = {file.path for file in client.list_artifacts(run_id, "pictures")}
    assert logged == {"pictures/triplets.png", "pictures/map.png"}
    drawn = sorted(path.name for path in (finished.dir / "pictures").iterdir())
    assert drawn == ["map.png", "triplets.png"]
    watched = client.get_metric_history(run_id, "collapse/uniformity")
    assert [metric.step for metric in watched] == [1, 2, 3, 4, 5]
    assert all(metric.value < 0 for metric in watched)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_trains_on_the_same_batches_with_the_same_losses(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.chdir(finished.folder)
    name = f"workers-{workers}"
    account, _ = call(replace(finished.config, name=name, workers=workers))
    assert account["digest"] == finished.account["digest"]
    found, expected = losses(finished.folder / "runs" / name), losses(finished.dir)
    assert sorted(found) == list(range(1, finished.config.steps + 1))
    assert found == pytest.approx(expected, rel=1e-5)
    heldout, of_two = account["evaluation"], finished.account["evaluation"]
    assert heldout["heldout/triplet_loss"] == pytest.approx(
        of_two["heldout/triplet_loss"], rel=1e-3
    )


def test_the_run_says_what_it_did_in_a_handful_of_lines(finished: Finished) -> None:
    said = "\n".join(finished.said)
    assert "pictures" in said
    assert "held-out pictures: triplet loss" in said
    assert "share of active triplets" in said
    assert "document" not in said
    assert len(finished.said) < 15


def test_every_picture_is_in_the_ledger(finished: Finished) -> None:
    ledger = json.loads((finished.dir / "ledger.json").read_text())
    records = {fate: entry["records"] for fate, entry in ledger["records"].items()}
    assert records["training"] + records["heldout"] == 200
    assert sum(ledger["rows"].values()) == 5 * finished.config.order.rows_per_step


def test_a_registered_encoder_embeds_the_bytes_of_pictures(finished: Finished) -> None:
    uri = finished.account["registered"]
    assert uri == "models:/rayssl-image/1"
    encoder = load_encoder(uri, finished.config.tracking_uri)
    pictures = [make_picture(i, 20 + i) for i in range(70)]
    features = encoder.encode(pictures)
    assert features.dtype == np.float32
    assert features.shape == (70, 32) == (70, encoder.dimension)
    assert np.isfinite(features).all()
    assert np.allclose(encoder.encode(pictures[66:67])[0], features[66], atol=1e-5)
    assert len({row.tobytes() for row in features}) == 70
    trained = load_objective(load_run(finished.dir)).state_dict()
    for name, tensor in encoder.objective.state_dict().items():
        assert name.startswith("projection.") or torch.equal(tensor, trained[name]), name
    with pytest.raises(DataError, match="picture 1 of 2: quarantined:not-an-image"):
        encoder.encode([pictures[0], b"no picture"])


def test_a_bundle_holds_the_encoder_and_what_its_pixels_are(finished: Finished) -> None:
    bundle = finished.dir / "bundle"
    assert not (bundle / "tokenizer.json").exists()
    weights = load_file(bundle / "model.safetensors")
    assert weights
    assert all(name.startswith("encoder.") for name in weights)
    config = json.loads((bundle / "config.json").read_text())
    assert config["images"]["views"]["size"] == 16
    assert config["objective"]["encoder"]["mean"] == [0.5]


def test_the_card_tells_what_is_seen_data_recipe_figures_and_limits(finished: Finished) -> None:
    card = (finished.dir / "bundle" / "MODEL_CARD.md").read_text()
    for told in (
        "An image encoder pretrained without labels by rayssl: recipe image-tiny, 5 steps of 16",
        "Seen is the largest square of the middle, in RGB, at 16 x 16 pixels.",
        "Licence of the data: not given",
        f"pictures; fingerprint {load_run(finished.dir).manifest.fingerprint}",
        "| images.views.size | 16 |",
        "| objective.encoder.width | 4 |",
        " held-out pictures: triplet loss ",
        "Knows the subjects of its data and nothing else",
        f"| mlflow_run | {finished.account['mlflow_run']} |",
    ):
        assert told in card, told
    assert "text." not in card
    assert str(finished.folder) not in card


def test_mlflow_serves_the_encoder_on_a_binary_column(finished: Finished) -> None:
    served = open_client(finished.config.tracking_uri).get_model_version("rayssl-image", "1")
    model = mlflow.pyfunc.load_model(served.source)
    pictures = [make_picture(i) for i in range(3)]
    encoder = load_encoder(finished.account["registered"], finished.config.tracking_uri)
    (column,) = model.metadata.signature.inputs
    assert (column.name, column.type) == ("image", DataType.binary)
    found = model.predict({"image": pictures})
    assert np.array_equal(found, encoder.encode(pictures))


def test_what_is_for_text_says_so_in_one_line(finished: Finished, tmp_path: Path) -> None:
    run = load_run(finished.dir)
    encoder = load_encoder(str(finished.dir))
    for refused in (
        lambda: evaluate(encoder.objective, run),
        lambda: fill_mask(encoder, "a [MASK]", 1),
        lambda: export(encoder, tmp_path / "out"),
        lambda: preview(finished.config),
    ):
        with pytest.raises(UserError, match="of images: this is for text"):
            refused()


def test_a_run_is_measured_on_other_pictures_but_for_those_it_was_trained_on(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order = ["evaluate", "shapes", "--runs", str(finished.folder / "runs"), "--json"]
    assert main(order) == 0
    own = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert own == {
        name: value for name, value in finished.account["evaluation"].items() if name in own
    } | {"heldout/also_trained": 0.0}
    for i in range(60, 240):  # of which 200 were there before
        (tmp_path / f"{i}.png").write_bytes(make_picture(i))
    assert main([*order, "--data", str(tmp_path)]) == 0
    *said, told = capfd.readouterr().out.splitlines()
    found = json.loads(told)
    assert found["heldout/pictures"] + found["heldout/also_trained"] == 180
    assert found["heldout/also_trained"] > 80
    assert found["heldout/pictures"] > 40
    assert found["heldout/triplet_loss"] > 0
    assert f"{found['heldout/also_trained']:.0f} of 180 pictures were also trained on" in said[0]
    uri = finished.account["registered"]
    tracked = ["--tracking-uri", finished.config.tracking_uri]
    assert main(["evaluate", uri, *tracked, "--data", str(tmp_path)]) == 2
    assert "without what trained it: measure it by --labels" in capfd.readouterr().err


def test_a_recipe_of_text_refuses_pictures(finished: Finished, tmp_path: Path) -> None:
    asked = replace(
        recipe("text-tiny"), data=finished.config.data, name="x", runs=str(tmp_path / "runs")
    )
    with pytest.raises(UserError, match=r"part-0\.tar holds no text, which is"):
        pretrain(asked)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_autoencoder_is_resumed_and_leaves_its_decoder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "image-tiny-autoencoder")
    account, said = call(config)
    assert any("reconstruction loss" in line for line in said)
    assert verify(load_run(tmp_path / "runs" / "shapes")).status == "PASS"
    encoder = load_encoder("models:/rayssl-image@candidate", config.tracking_uri)
    assert encoder.encode([make_picture(0)]).shape == (1, 32)
    assert account["registered"] == "models:/rayssl-image/1"
    assert encoder.fresh
    assert all(name.startswith("decoder.") for name in encoder.fresh)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_negatives_of_all_workers_give_the_training_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "image-tiny", workers=3)
    assert isinstance(config.objective, ContrastiveConfig)
    config = replace(config, objective=replace(config.objective, negatives_from="global"))
    weights, accounts = [], []
    for workers in (3, 1):
        accounts.append(call(replace(config, name=f"w{workers}", workers=workers))[0])
        weights.append(load_objective(load_run(tmp_path / "runs" / f"w{workers}")).state_dict())
    assert accounts[0]["digest"] == accounts[1]["digest"]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-3)


ORDER = OrderConfig(rows_per_step=16, slots=8, steps_per_block=4, blocks_per_order=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RowSource:
    folder = tmp_path_factory.mktemp("source")
    write_pictures(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "MIN_BLOCK_BYTES", 8000)
        manifest = indexing.build(find_shards([str(folder)]), SourceConfig(), serial_map)
    return RowSource(Plan(manifest, 5, 3), ImageRows(recipe("image-tiny").images))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_10_workers_give_the_same_bytes_to_the_model_from_the_start_or_from_a_commit_on(
    source: RowSource, workers: int
) -> None:
    whole = local(source, ORDER)
    assert whole[-1].cursor.order > source.plan.orders_per_epoch  # a picture comes twice
    for done in (0, 5):
        start = whole[done - 1].cursor if done else Cursor()
        first = ORDER.first_block(done)
        num_blocks = -(-(start.steps_done + len(whole) - done) // ORDER.steps_per_block)
        blocks = list(islice(local_blocks(source, ORDER, start), num_blocks * ORDER.slots))
        streams: list[list[pa.Table]] = [[] for _ in range(workers)]
        for k, block in enumerate(blocks, start=first):
            streams[k % workers].append(block)
        made = by_ranks(
            streams, source, ORDER, start=start, first_block=first, count=len(whole) - done
        )
        assert join(made) == whole[done:]


def test_partners_are_those_of_the_step_wherever_a_run_goes_on(source: RowSource) -> None:
    order = replace(ORDER, slots=2)

    def made(start: Cursor, first_block: int, count: int) -> list[Step]:
        rank = Rank(first_block=first_block)
        blocks = local_blocks(source, order, start)
        return list(islice(steps(blocks, source, order, start, rank), count))

    def digests(found: list[Step]) -> list[bytes]:
        return [slot_digest(step.slots[slot]) for step in found for slot in sorted(step.slots)]

    whole = made(Cursor(), 0, 11)
    for done in (1, 4, 6):
        rest = made(whole[done - 1].cursor, order.first_block(done), 11 - done)
        assert digests(rest) == digests(whole[done:])
    wrong = made(whole[3].cursor, 0, 2)  # as if these were the first steps
    assert all(
        np.array_equal(a.slots[0]["first"], b.slots[0]["first"])
        for a, b in zip(wrong, whole[4:6], strict=True)
    )
    assert digests(wrong) != digests(whole[4:6])


def test_an_order_made_in_parts_has_the_rows_of_one_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 60)
    manifest = indexing.build(find_shards([str(tmp_path)]), SourceConfig(), serial_map)
    plan, maker = Plan(manifest, 5, 3), ImageRows(recipe("image-tiny").images)
    source, order = RowSource(plan, maker), plan.order(1)
    found = [
        picture._replace(visit=visit)
        for block, visit in order.blocks
        for picture in manifest.read(block, "training")
    ]
    made = maker.rows(found, seed=5, order=1)
    whole = made.take(plan.row_permutation(1, len(found))).combine_chunks()
    assert source.num_rows(order) == whole.num_rows > 8
    monkeypatch.setattr(images, "PART_BYTES", 5 * 2 * 3 * 16 * 16)
    for first_row in (0, 3, 7):
        parts = list(source.tables(order, first_row))
        assert {part.num_rows for part in parts[:-1]} == {5}
        joined = pa.concat_tables(parts)
        assert joined.select(whole.column_names).equals(whole.slice(first_row))
        assert joined["row"].to_pylist() == [*range(first_row, whole.num_rows)]
        assert set(joined["order_rows"].to_pylist()) == {whole.num_rows}
