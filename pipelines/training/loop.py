"""The training loop: one function, for every objective and any number of workers."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config import RunConfig, Schedule
from pipelines.data.batches import (
    ArrayBatch,
    Rank,
    RowSource,
    chain,
    slot_digest,
    steps,
)
from pipelines.data.plan import Cursor
from pipelines.data.randomness import key
from pipelines.errors import TrainingError, UserError
from pipelines.run import Run
from pipelines.training.checkpoint import START_DIGEST, Attempt, Commit, CommitLog, Saver, restore
from pipelines.training.feed import Feed
from pipelines.training.node_metrics import NodeMeter
from pipelines.training.spool import SpoolWriter
from pipelines.training.start import draw
from ssl_models import build_objective
from ssl_models.objective import DIAGNOSIS, WATCHED, Batch, Objective, StepOutput, joint_loss
from ssl_models.optim import FlatGradients, build_optimizer, learning_rate

Part = TypeVar("Part")
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Job:
    """What every worker of a run is told."""

    config: RunConfig
    run_dir: Path
    source_ref: "ray.ObjectRef[RowSource]"


@dataclass(frozen=True, eq=False)
class Learner:
    """What a worker trains, and with what."""

    config: Schedule
    device: torch.device
    objective: Objective
    optimizer: torch.optim.Optimizer
    gradients: FlatGradients


@dataclass
class Position:
    """Where a run stands, as the next commit will tell it."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    digest: str = START_DIGEST
    fates: dict[str, int] = field(default_factory=dict)
    parent: str = ""


class Consumed(NamedTuple):
    """What one rank gave to the model since the last commit."""

    digests: list[dict[int, bytes]]
    """For each step, the digest of each of its slots."""
    fates: Any


def train_worker(job: Job) -> None:
    """Train from the newest commit to the last step; runs in every Ray Train worker.

    An attempt for which too few rows were planned ends earlier; all that it made is committed.

    Raises:
        TrainingError: If a gradient is not finite, of which step nothing is kept, or if the encoder
            has collapsed for `stop_on_collapse` logged steps.
    """
    config = job.config
    context = ray.train.get_context()
    rank = context.get_world_rank()
    feed: Feed = ray.train.get_dataset_shard("train")
    source = ray.get(job.source_ref)
    learner = build_learner(config, ray.train.torch.get_device())
    log = CommitLog(job.run_dir)
    position = resume(log, feed.attempt, learner)
    saver = Saver(log)
    node = NodeMeter(job.run_dir) if context.get_local_rank() == 0 else None
    spool = job.run_dir / "spool" / f"{feed.attempt.number:06d}.jsonl"
    meter = Meter(learner, SpoolWriter(spool) if rank == 0 else None, node)
    consumed = Consumed([], np.zeros(len(source.maker.fates), dtype=np.int64))

    def save() -> None:
        if consumed.digests:  # something was trained since the last commit
            commit = advance(position, consumed, feed.attempt, source.maker.fates)
            if rank == 0:
                saver.save(commit, learner.objective, learner.optimizer)

    members = Rank(
        rank=rank,
        size=dist.get_world_size(),
        gather=_gather,
        first_block=config.order.first_block(position.step),
    )
    stream = steps(feed.blocks(), source, config.order, position.cursor, members)
    for step in meter.waits(stream):
        metrics = train_step(learner, step.slots, position.step)
        position.step, position.cursor = position.step + 1, step.cursor
        consumed.digests.append({s: slot_digest(batch) for s, batch in step.slots.items()})
        consumed.fates[:] += step.fates
        meter.add(metrics)
        if position.step % config.log_every == 0:
            meter.log(position.step)
        if position.step % config.checkpoint_every == 0:
            save()
        if position.step == config.steps:
            break
    meter.log(position.step)
    save()
    saver.wait()


def build_learner(config: RunConfig, device: torch.device) -> Learner:
    """Return a learner with freshly drawn weights, the same on every rank."""
    torch.set_num_threads(config.threads_per_worker)
    objective = draw(config).to(device)
    if config.compile:
        objective.compile(dynamic=False)  # in place: checkpoints keep their names
    return Learner(
        config,
        device,
        objective,
        build_optimizer(objective, config.optimizer),
        FlatGradients(objective),
    )


def load_objective(run: Run) -> Objective:
    """Return the objective of a run's newest whole commit, on the CPU.

    Raises:
        UserError: If the run has no commit yet.
        DataError: If no checkpoint is what was committed.
    """
    commit, _ = run.log.newest_whole()
    if commit is None:
        raise UserError(f"run {run.dir.name!r} has no commit yet")
    objective = build_objective(run.config.objective)
    objective.load_state_dict(run.log.load(commit)[0])
    return objective


def resume(log: CommitLog, attempt: Attempt, learner: Learner) -> Position:
    """Load the commit that an attempt goes on from, and return where it stands."""
    if not attempt.commit:
        return Position()
    commit = log.commit(attempt.commit)
    restore(log.load(commit), learner.objective, learner.optimizer)
    return Position(commit.step, commit.cursor, commit.digest, dict(commit.fates), commit.name)


def train_step(learner: Learner, slots: dict[int, ArrayBatch], step: int) -> dict[str, Tensor]:
    """Make one optimizer step on this rank's slots; return (sum, weight) of each metric.

    Weights are added over all slots of all ranks before the backward pass, so the summed
    gradient is that of the whole batch, and clipping sees its true norm.
    """
    objective, config = learner.objective, learner.config
    batches = {slot: _to_device(batch, learner.device) for slot, batch in slots.items()}
    totals = _sum_over_ranks([objective.weights(batch) for batch in batches.values()])
    learner.gradients.zero()
    metrics: dict[str, Any] = {}
    for num_slots, output in _outputs(learner, batches, step):
        loss = joint_loss(output.terms, objective.coefficients, totals)
        torch.autograd.backward(loss)
        # The slots' shares of the loss add up to it, so each weighs a slot's share of a step.
        share = torch.tensor(num_slots / config.order.slots, device=learner.device)
        for name, pair in {**output.metrics, "loss": (loss.detach(), share)}.items():
            metrics[name] = metrics.get(name, 0) + torch.stack(pair)
    dist.all_reduce(learner.gradients.vector)
    norm = learner.gradients.clip(config.optimizer.clip_norm)
    if not torch.isfinite(norm):
        raise TrainingError(
            f"the gradient of step {step} has norm {norm.item()}, and would again: the batches are "
            "the same; start a run of another name with a lower learning rate"
        )
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, step, config.steps)
    learner.optimizer.step()
    one = torch.ones((), device=learner.device)
    metrics["gradient_norm"] = torch.stack([norm, one])
    if (step + 1) % config.log_every == 0:
        with _autocast(learner.device):
            figures = objective.watch([batches[slot] for slot in sorted(batches)])
        metrics |= {name: torch.stack([value * one, one]) for name, value in figures.items()}
    return metrics


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, device.type == "cuda")


def _outputs(
    learner: Learner, batches: dict[int, Batch], step: int
) -> Iterator[tuple[int, StepOutput]]:
    """Yield (1, its output) for each slot, or (how many, what they give) of all slots joined."""
    objective, seed = learner.objective, learner.config.seed

    def in_slot(forward: Callable[[Batch], Any], slot: int) -> Any:
        # Dropout depends on the slot, not on who computes it.
        torch.manual_seed(key(seed, step, slot, "dropout") >> 1)
        with _autocast(learner.device):
            return forward(batches[slot])

    if objective.joins_slots:
        embedded = [in_slot(objective.embed, slot) for slot in sorted(batches)]
        yield len(batches), objective.join(embedded, [batches[slot] for slot in sorted(batches)])
    else:
        for slot in sorted(batches):
            yield 1, in_slot(objective, slot)


def advance(
    position: Position, consumed: Consumed, attempt: Attempt, fates: Sequence[str]
) -> Commit:
    """Gather what all ranks consumed, empty `consumed`, and return the commit of this position.

    The chained digest takes the slots in slot order, whoever held them.
    """
    gathered = _gather(consumed)
    digests: list[str] = []
    for parts in zip(*(part.digests for part in gathered), strict=True):
        slots = {slot: digest for part in parts for slot, digest in part.items()}
        position.digest = chain(position.digest, [slots[slot] for slot in sorted(slots)])
        digests.append(position.digest)
    for name, count in zip(fates, sum(part.fates for part in gathered).tolist(), strict=True):
        position.fates[name] = position.fates.get(name, 0) + count
    consumed.digests.clear()
    consumed.fates[:] = 0
    commit = Commit(
        step=position.step,
        attempt=attempt.number,
        parent=position.parent,
        cursor=position.cursor,
        digests=tuple(digests),
        fates=dict(position.fates),
        workers=attempt.workers,
        manifest_sha256="",
    )
    position.parent = commit.name
    return commit


class Meter:
    """Adds up metrics between two logged steps; rank 0, which has the spool, writes them.

    One rank of each node has the meter of that node. What the objective finds wrong after the
    warm-up is a metric too: `diagnosis/NAME`, for how many logged steps of this attempt on end.
    """

    def __init__(self, learner: Learner, spool: SpoolWriter | None, node: NodeMeter | None) -> None:
        self._config, self._objective = learner.config, learner.objective
        self._ill = 0
        self._spool = spool
        self._node = node
        self.reset()

    def waits(self, stream: Iterable[Item]) -> Iterator[Item]:
        """Yield the steps of a stream, and measure how long each was waited for."""
        asked = time.perf_counter()
        for step in stream:
            self._waited += time.perf_counter() - asked
            yield step
            asked = time.perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add this rank's (sum, weight) of each metric of a step."""
        self._steps += 1
        for name, pair in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + pair

    def log(self, step: int) -> None:
        """Log the means over all ranks since the last call, if any; called by all of them.

        Raises:
            TrainingError: If the encoder has collapsed for too long; on all ranks.
        """
        if not self._steps:
            return
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(table)
        means = {
            name: total / weight
            for name, (total, weight) in zip(names, table.tolist(), strict=True)
            if weight > 0
        }
        is_warm = step > self._config.optimizer.warmup_ratio * self._config.steps
        name = self._objective.diagnose(means) if is_warm else ""
        self._ill = self._ill + 1 if name else 0
        diagnosis = {f"{DIAGNOSIS}{name}": float(self._ill)} if name else {}
        seconds = time.perf_counter() - self._since
        rows_per_second = self._steps * self._config.order.rows_per_step / seconds
        rates = {
            f"{name.removesuffix('_per_row')}_per_second": mean * rows_per_second
            for name, mean in means.items()
            if name.endswith("_per_row")
        }
        others = {
            "rows_per_second": rows_per_second,
            "data_wait_ratio": self._waited / seconds,
            "learning_rate": learning_rate(self._config.optimizer, step - 1, self._config.steps),
        }
        for sample in _gather(self._node.sample() if self._node else {}):
            others |= sample
        if self._spool is not None:
            self._spool.append(step, means | rates | others | diagnosis)
        self.reset()
        if 0 < self._config.stop_on_collapse <= self._ill:
            figures = (
                f"{figure.removeprefix(WATCHED)} {mean:.3g}"
                for figure, mean in means.items()
                if figure.startswith(WATCHED)
            )
            raise TrainingError(
                f"{name} at step {step}, for {self._ill} logged steps on end "
                f"({', '.join(figures)}): start a run of another name with {self._objective.remedy}"
                "; --stop-on-collapse 0 lets this one go on"
            )

    def reset(self) -> None:
        """Begin to measure anew."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._sums: dict[str, Any] = {}


def _sum_over_ranks(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = sorted(parts[0])
    sums = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in names])
    dist.all_reduce(sums)
    return dict(zip(names, sums, strict=True))


def _gather(part: Part) -> list[Part]:
    """Return what every rank gives, in order of rank."""
    gathered = [part] * dist.get_world_size()
    dist.all_gather_object(gathered, part)
    return gathered


def _to_device(batch: ArrayBatch, device: torch.device) -> Batch:
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
