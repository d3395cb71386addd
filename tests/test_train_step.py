"""One step: workers that share a batch have the gradient of one that holds all of it.

And that the steps teach: rows seen often enough are known by heart, labels at random are not.
"""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.config import RunConfig
from pipelines.data.batches import ArrayBatch
from pipelines.data.text import PAIRED, TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import TrainingError
from pipelines.recipes import recipe
from pipelines.training.loop import build_learner, train_step
from ssl_models.contrastive import ContrastiveConfig
from ssl_models.masked_language import NO_LABEL
from ssl_models.optim import OptimizerConfig
from tests.corpus import make_documents

CPU = torch.device("cpu")
NUM_SLOTS = 4
PREDICTIONS = ((3, 1, 0, 2), (4, 4, 4, 4), (0, 0, 0, 0), (1, 0, 0, 0))
"""Masked tokens of each row of each slot: the mean of the slots' means is not the mean."""
LABELS = ((0, 1, 1, 0), (NO_LABEL, 1, NO_LABEL, NO_LABEL), (1, 1, 0, 0), (NO_LABEL,) * 4)
SPLITS = (((0, 2), (1, 3)), ((0, 1, 2), (3,)), ((2,), (0, 1, 3)))
"""Which of two ranks holds which slots."""
STEP = 7


def config(**changes: Any) -> RunConfig:
    """Return a tiny config with dropout, whose gradients are not clipped."""
    made = recipe("text-tiny")
    encoder = replace(made.masked_language.encoder, dropout=0.1)
    optimizer = replace(made.optimizer, clip_norm=1e9)
    objective = replace(made.masked_language, encoder=encoder)
    return replace(made, objective=objective, optimizer=optimizer, **changes)


def slots() -> dict[int, ArrayBatch]:
    dice = np.random.default_rng(0)
    return {slot: hand_made(dice, PREDICTIONS[slot], LABELS[slot]) for slot in range(NUM_SLOTS)}


def hand_made(
    dice: np.random.Generator, predictions: tuple[int, ...], labels: tuple[int, ...]
) -> ArrayBatch:
    rows, width = len(predictions), 32
    lengths = dice.integers(12, width, size=rows)
    positions = np.stack([dice.permutation(np.arange(1, 11))[:4] for _ in range(rows)])
    predicted = np.arange(4) < np.array(predictions)[:, None]
    columns = np.arange(width)
    return {
        "input_ids": dice.integers(5, 512, size=(rows, width)),
        "token_type_ids": (columns > lengths[:, None] // 2).astype(np.int64),
        "attention_mask": columns < lengths[:, None],
        "masked_positions": np.where(predicted, positions, 0),
        "masked_ids": np.where(predicted, dice.integers(5, 512, size=(rows, 4)), NO_LABEL),
        "nsp_labels": np.array(labels),
    }


def step_on(held: tuple[int, ...]) -> dict[str, Tensor]:
    """Make one step on some of the slots; return what all ranks have of it together."""
    learner = build_learner(config(), CPU)
    metrics = train_step(learner, {slot: slots()[slot] for slot in held}, STEP)
    for pair in metrics.values():
        dist.all_reduce(pair)
    found = {name: pair[0] / pair[1] for name, pair in metrics.items()}
    parameters = nn.utils.parameters_to_vector(learner.objective.parameters()).detach()
    return found | {"gradient": learner.gradients.vector, "parameters": parameters}


def rank_of_two(rank: int, folder: str) -> None:
    """Make the step of every split as one of two ranks; runs in a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
    found = [step_on(split[rank]) for split in SPLITS]
    for number, tensors in enumerate(found):
        for name, tensor in tensors.items():
            np.save(Path(folder, f"{number}-{rank}-{name}.npy"), tensor.numpy())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only rank of a process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("alone") / "one"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_rank(alone: None) -> dict[str, Tensor]:
    del alone
    return step_on(tuple(range(NUM_SLOTS)))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of_two, args=(rank, str(folder))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("number", range(len(SPLITS)), ids=str)
def test_two_workers_have_the_loss_and_gradient_of_one(
    one_rank: dict[str, Tensor], two_ranks: Path, number: int
) -> None:
    for rank in (0, 1):
        for name, expected in one_rank.items():
            found = np.load(two_ranks / f"{number}-{rank}-{name}.npy")
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_gradient_is_that_of_the_loss_over_the_whole_batch(
    one_rank: dict[str, Tensor],
) -> None:
    """All slots joined into one batch: one mean over its masked tokens, one over its labels."""
    learner = build_learner(config(), CPU)
    learner.objective.eval()  # dropout differs between one forward pass and four
    joined = {
        name: torch.from_numpy(np.concatenate([slots()[s][name] for s in range(NUM_SLOTS)]))
        for name in slots()[0]
    }
    terms = learner.objective(joined).terms
    loss = torch.stack([total / weight for total, weight in terms.values()]).sum()
    torch.autograd.backward(loss)
    expected = learner.gradients.vector.clone()

    again = build_learner(config(), CPU)
    again.objective.eval()
    metrics = train_step(again, slots(), STEP)

    torch.testing.assert_close(again.gradients.vector, expected, rtol=1e-5, atol=1e-7)
    total, weight = metrics["loss"]
    assert float(total / weight) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(weight) == pytest.approx(1.0)
    assert not torch.allclose(one_rank["gradient"], expected, rtol=1e-2)  # dropout was on there


def test_dropout_depends_on_the_seed_the_step_and_nothing_before(alone: None) -> None:
    del alone

    def gradient(step: int, seed: int = 0) -> Tensor:
        learner = build_learner(config(), CPU)
        torch.rand(step + 3)
        learner = replace(learner, config=config(seed=seed))
        train_step(learner, slots(), step)
        return learner.gradients.vector

    assert torch.equal(gradient(3), gradient(3))
    assert not torch.allclose(gradient(3), gradient(4))
    assert not torch.allclose(gradient(3), gradient(3, seed=1))


def compilable(*, dropout: float, compile: bool) -> RunConfig:
    """Return a config of one layer, compiled or not."""
    made = config(compile=compile)
    encoder = replace(made.masked_language.encoder, num_layers=1, dropout=dropout)
    return replace(made, objective=replace(made.masked_language, encoder=encoder))


needs_a_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_model_learns_what_an_eager_one_does(alone: None) -> None:
    del alone
    graph_breaks = torch._dynamo.utils.counters["graph_break"]
    graph_breaks.clear()
    eager = build_learner(compilable(dropout=0.0, compile=False), CPU)
    compiled = build_learner(compilable(dropout=0.0, compile=True), CPU)
    for step in range(3):
        expected = train_step(eager, slots(), step)
        for name, pair in train_step(compiled, slots(), step).items():
            torch.testing.assert_close(pair, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(
        compiled.gradients.vector, eager.gradients.vector, rtol=1e-3, atol=1e-6
    )
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not graph_breaks
    compiled.objective.load_state_dict(eager.objective.state_dict())


@pytest.mark.slow
@needs_a_compiler
def test_a_compiled_model_draws_its_dropout_by_seed_step_and_slot_too(alone: None) -> None:
    del alone

    made = compilable(dropout=0.5, compile=True)
    # A rate that moves no weight: every step starts from the same ones.
    learner = build_learner(replace(made, optimizer=OptimizerConfig(learning_rate=1e-30)), CPU)

    def gradient(step: int) -> Tensor:
        torch.rand(step + 3)
        train_step(learner, slots(), step)
        return learner.gradients.vector.clone()

    first, second, other = gradient(3), gradient(3), gradient(4)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_a_gradient_that_is_not_finite_stops_before_the_step(alone: None) -> None:
    del alone
    learner = build_learner(config(), CPU)
    with torch.no_grad():
        next(learner.objective.parameters())[:] = float("inf")
    before = [parameter.clone() for parameter in learner.objective.parameters()]

    with pytest.raises(TrainingError, match=f"the gradient of step {STEP} has norm"):
        train_step(learner, slots(), STEP)

    for parameter, old in zip(learner.objective.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old, equal_nan=True)


def paired_rows(vocabulary: Vocabulary, first: int, count: int) -> pa.Table:
    """Return paired rows of documents that only these rows are made of."""
    documents = make_documents(first + count)[first:]
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    rows = maker.rows(documents, seed=0, order=0)
    return rows.filter(pa.compute.equal(rows["fate"], PAIRED))


def learn(
    vocabulary: Vocabulary, batches: list[ArrayBatch], *, steps: int, rate: float
) -> nn.Module:
    """Train on the same batches over and over."""
    made = recipe("text-tiny")
    encoder = replace(
        made.masked_language.encoder,
        vocab_size=vocabulary.size,
        hidden_size=64,
        intermediate_size=128,
    )
    made = replace(
        made,
        steps=steps,
        objective=replace(made.masked_language, encoder=encoder),
        optimizer=replace(made.optimizer, learning_rate=rate, weight_decay=0.0),
        order=replace(made.order, slots=1),
    )
    learner = build_learner(made, CPU)
    for step in range(steps):
        train_step(learner, {0: batches[step % len(batches)]}, step)
    return learner.objective.eval()


def measure(objective: nn.Module, batch: ArrayBatch) -> dict[str, float]:
    with torch.no_grad():
        output = objective({name: torch.from_numpy(array) for name, array in batch.items()})
    return {name: float(total / weight) for name, (total, weight) in output.metrics.items()}


def test_t9_rows_seen_often_are_known_by_heart(alone: None, vocabulary: Vocabulary) -> None:
    del alone
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    batch = maker.collate(paired_rows(vocabulary, 0, 20).slice(0, 64))
    assert len(batch["nsp_labels"]) == 64
    assert 0.3 < batch["nsp_labels"].mean() < 0.7

    learned = measure(learn(vocabulary, [batch], steps=250, rate=1e-2), batch)

    assert learned["nsp_accuracy"] > 0.95
    assert learned["mlm_loss"] < 0.1


def test_t9_labels_at_random_teach_nothing_about_other_documents(
    alone: None, vocabulary: Vocabulary
) -> None:
    del alone
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    rows = paired_rows(vocabulary, 0, 60)
    batches = [maker.collate(rows.slice(i, 32)) for i in range(0, rows.num_rows - 31, 32)]
    dice = np.random.default_rng(5)
    for batch in batches:
        batch["nsp_labels"] = dice.permutation(batch["nsp_labels"])
    heldout = maker.collate(paired_rows(vocabulary, 60, 60))

    learned = measure(learn(vocabulary, batches, steps=200, rate=3e-3), heldout)

    error = 0.5 / np.sqrt(len(heldout["nsp_labels"]))
    assert len(heldout["nsp_labels"]) > 200
    assert abs(learned["nsp_accuracy"] - 0.5) < 4 * error


def test_slots_that_are_joined_are_compared_with_each_other(alone: None) -> None:
    """Global negatives: the step on four slots is the step on one slot that holds all rows."""
    del alone
    made = recipe("image-tiny")
    assert isinstance(made.objective, ContrastiveConfig)
    made = replace(made, objective=replace(made.objective, negatives_from="global"))
    dice = np.random.default_rng(0)
    parts: dict[int, ArrayBatch] = {
        slot: {
            "first": dice.integers(0, 256, (4, 3, 16, 16), dtype=np.uint8),
            "second": dice.integers(0, 256, (4, 3, 16, 16), dtype=np.uint8),
            "weight": np.ones(4, dtype=np.float32),
        }
        for slot in range(NUM_SLOTS)
    }
    joined = {name: np.concatenate([part[name] for part in parts.values()]) for name in parts[0]}
    gradients, losses = [], []
    for given in (parts, {0: joined}):
        learner = build_learner(made, CPU)
        metrics = train_step(learner, given, STEP)
        gradients.append(learner.gradients.vector.clone())
        losses.append(metrics["triplet_loss"])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[1])
    assert float(metrics["triplet_loss"][1]) == 16

    apart = build_learner(recipe("image-tiny"), CPU)
    train_step(apart, parts, STEP)
    assert not torch.allclose(apart.gradients.vector, gradients[0], rtol=1e-2)
