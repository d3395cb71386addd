"""Collapse while it happens: watched at logged steps, named, and the end of a run."""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipelines.config import RunConfig
from pipelines.console import Progress
from pipelines.data.batches import ArrayBatch
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Picture
from pipelines.errors import TrainingError
from pipelines.pretrain import pretrain
from pipelines.recipes import recipe
from pipelines.training.loop import Learner, Meter, build_learner, train_step
from pipelines.training.spool import SpoolRecord, SpoolWriter, read_spool
from ssl_models.contrastive import Contrastive, ContrastiveConfig
from ssl_models.contrastive_losses import TripletLossConfig
from ssl_models.objective import DIAGNOSIS, WATCHED
from tests.pictures import make_picture, write_pictures

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = replace(recipe("image-tiny"), stop_on_collapse=4)
WARM_UP = 2
"""Steps of its warm-up."""


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only rank of a process group."""
    store = tmp_path_factory.mktemp("alone") / "one"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def slots(visit: int = 0) -> dict[int, ArrayBatch]:
    maker = ImageRows(TINY.images)
    pictures = [Picture(i, i, make_picture(i), visit) for i in range(16)]
    rows = maker.rows(pictures, seed=0, order=0)
    return {
        slot: maker.collate(rows.slice(4 * slot, 4), seed=0, step=0, slot=slot) for slot in range(4)
    }


def learner(config: RunConfig, *, is_constant: bool) -> Learner:
    """Return a learner whose embeddings are all one, or those of its fresh weights."""
    made = build_learner(config, torch.device("cpu"))
    assert isinstance(made.objective, Contrastive)
    if is_constant:
        with torch.no_grad():
            last = made.objective.projection[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.fill_(1.0)
    return made


def trained(config: RunConfig, made: Learner, spool: Path) -> list[SpoolRecord]:
    """Train on views of the same pictures, up to an error; return what was logged."""
    meter = Meter(made, SpoolWriter(spool / "0.jsonl"), None)
    with contextlib.suppress(TrainingError):
        for step in range(config.steps):
            meter.add(train_step(made, slots(visit=step), step))
            if (step + 1) % config.log_every == 0:
                meter.log(step + 1)
    return read_spool(spool, {})


def diagnoses(records: list[SpoolRecord]) -> dict[int, tuple[str, float]]:
    return {
        record.step: (name.removeprefix(DIAGNOSIS), value)
        for record in records
        for name, value in record.metrics.items()
        if name.startswith(DIAGNOSIS)
    }


def test_a_constant_encoder_is_named_after_the_warm_up_and_stops_the_run(tmp_path: Path) -> None:
    # So low a rate that it stays one; its weights move, for the biases before it are alive.
    config = replace(TINY, optimizer=replace(TINY.optimizer, learning_rate=1e-9))
    found = trained(config, learner(config, is_constant=True), tmp_path)
    assert diagnoses(found) == {
        WARM_UP + n: ("total collapse", float(n)) for n in range(1, config.stop_on_collapse + 1)
    }
    assert found[-1].step == WARM_UP + config.stop_on_collapse
    last = found[-1].metrics
    assert last["active"] == 1
    for name in ("margin_gap", f"{WATCHED}spread", f"{WATCHED}uniformity", f"{WATCHED}alignment"):
        assert last[name] == pytest.approx(0, abs=1e-3), name


def test_the_error_tells_name_figures_and_what_to_do(tmp_path: Path) -> None:
    config = replace(
        TINY, stop_on_collapse=1, optimizer=replace(TINY.optimizer, learning_rate=1e-9)
    )
    made = learner(config, is_constant=True)
    meter = Meter(made, SpoolWriter(tmp_path / "0.jsonl"), None)
    for step in range(WARM_UP + 1):
        meter.add(train_step(made, slots(), step))
    with pytest.raises(TrainingError) as caught:
        meter.log(WARM_UP + 1)
    said = str(caught.value)
    assert said.startswith("total collapse at step 3, for 1 logged steps on end (alignment ")
    for part in ("uniformity ", "rank 1", "spread ", "a lower learning rate", "nt-xent"):
        assert part in said
    assert "--stop-on-collapse 0 lets this one go on" in said
    assert "\n" not in said


def test_a_run_that_may_collapse_goes_on_and_counts(tmp_path: Path) -> None:
    config = replace(
        TINY, stop_on_collapse=0, steps=10, optimizer=replace(TINY.optimizer, learning_rate=1e-9)
    )
    found = trained(config, learner(config, is_constant=True), tmp_path)
    assert [record.step for record in found] == list(range(1, 11))
    assert diagnoses(found)[10] == ("total collapse", 9.0)


def test_only_steps_on_end_are_counted(tmp_path: Path) -> None:
    config = replace(TINY, stop_on_collapse=3, steps=100)  # a warm-up of 10 steps
    made = learner(config, is_constant=True)
    constant = {name: tensor.clone() for name, tensor in made.objective.state_dict().items()}
    meter = Meter(made, SpoolWriter(tmp_path / "0.jsonl"), None)
    for step in range(10, 16):
        made.objective.load_state_dict(constant)
        metrics = train_step(made, slots(), step)
        if step == 12:  # as if the embeddings were spread
            metrics[f"{WATCHED}spread"] = torch.tensor([0.9, 1.0])
            metrics[f"{WATCHED}centred_rank"] = torch.tensor([9.0, 1.0])
        meter.add(metrics)
        if step < 15:
            meter.log(step + 1)
    with pytest.raises(TrainingError, match="at step 16, for 3 logged steps"):
        meter.log(16)
    counted = {step: count for step, (_, count) in diagnoses(read_spool(tmp_path, {})).items()}
    assert counted == {11: 1, 12: 2, 14: 1, 15: 2, 16: 3}


@pytest.mark.parametrize(("limit", "said_at"), [(25, [8]), (0, [8]), (4, [5, 12])])
def test_a_collapse_is_said_once_and_only_if_it_lasts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int, said_at: list[int]
) -> None:
    config = replace(TINY, stop_on_collapse=limit)
    (tmp_path / "attempts").mkdir()
    progress = Progress(tmp_path, config)
    writer = SpoolWriter(tmp_path / "spool" / "000001.jsonl")
    rates = {"loss": 1.0, "rows_per_second": 1.0, "data_wait_ratio": 0.0}
    for step, ill in enumerate([1, 0, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2], start=1):
        writer.append(step, rates | ({f"{DIAGNOSIS}cone collapse": ill} if ill else {}))
    writer.close()
    progress.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "shows" in line]
    assert [line.partition(":")[0] for line in said] == [f"step {step}" for step in said_at]
    assert all(f"the run stops if it does for {limit} logged" in line for line in said) == (
        limit > 0
    )


def test_a_healthy_run_is_watched_only_where_it_is_logged(tmp_path: Path) -> None:
    optimizer = replace(TINY.optimizer, learning_rate=3e-3)
    config = replace(TINY, log_every=4, stop_on_collapse=1, optimizer=optimizer)
    made = learner(config, is_constant=False)
    assert not any(name.startswith(WATCHED) for name in train_step(made, slots(), 0))
    watched = {name for name in train_step(made, slots(), 3) if name.startswith(WATCHED)}
    assert {name.removeprefix(WATCHED) for name in watched} == {
        *("rank", "centred_rank", "full_rank", "alignment", "uniformity", "spread")
    }
    found = trained(config, learner(config, is_constant=False), tmp_path)
    assert [record.step for record in found] == [4, 8, 12, 16, 20]
    assert diagnoses(found) == {}
    assert all(watched <= record.metrics.keys() for record in found)
    assert found[-1].metrics[f"{WATCHED}full_rank"] == 15
    assert math.isfinite(sum(found[-1].metrics.values()))


def test_watching_changes_no_step() -> None:
    """And no draw of what follows it."""
    losses = []
    for log_every in (1, 100):
        config = replace(TINY, log_every=log_every)
        made = learner(config, is_constant=False)
        steps = [train_step(made, slots(), step) for step in range(3)]
        losses.append(np.array([step["loss"].tolist() for step in steps]))
    np.testing.assert_array_equal(losses[0], losses[1])


# On Ray


def collapsing(folder: Path, **changes: Any) -> RunConfig:
    """Return a run that hard negatives and a far too high rate make collapse."""
    base = recipe("image-tiny")
    assert isinstance(base.objective, ContrastiveConfig)
    return replace(
        base,
        data=(str(folder / "pictures"),),
        runs=str(folder / "runs"),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        steps=60,
        stop_on_collapse=5,
        objective=replace(base.objective, loss=TripletLossConfig(negatives="hard")),
        optimizer=replace(base.optimizer, learning_rate=3e-2, warmup_ratio=0.05),
        **changes,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_collapse_stops_one_worker_and_two_at_the_same_step_and_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    ends, out = [], io.StringIO()
    for workers in (1, 2):
        config = collapsing(tmp_path, name=f"w{workers}", workers=workers)
        with (
            contextlib.redirect_stdout(out),
            pytest.raises(TrainingError, match=r"collapse at step \d+, for 5 logged steps on end"),
        ):
            pretrain(config)
        run_dir = tmp_path / "runs" / config.name
        assert len(list((run_dir / "attempts").glob("*.json"))) == 1  # it is not tried again
        ends.append(read_spool(run_dir / "spool", {})[-1])
    assert ends[0].step == ends[1].step < 60
    assert diagnoses(ends[:1]).keys() == diagnoses(ends[1:]).keys()
    assert out.getvalue().count("; the run stops if it does for 5 logged steps on end") >= 2
