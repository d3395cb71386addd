"""Two and four processes have the loss and gradient of one that holds the joined batch.

The step is that of the loop: weights added up first, gradients after.
"""

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_models.contrastive import Contrastive, ContrastiveConfig
from ssl_models.contrastive_losses import NTXentLossConfig, TripletLossConfig
from ssl_models.gather import gather_rows, own_rows, row_counts
from ssl_models.objective import Batch, StepOutput, joint_loss
from ssl_models.vit import ViTConfig

SLOT_ROWS = (3, 2, 4, 2)
SPLITS = {
    "two": ((0, 2), (1, 3)),
    "two-unequal": ((0, 1, 2), (3,)),
    "four": ((2,), (0,), (3,), (1,)),
}
"""Which rank holds which slots."""
LOSSES: dict[str, TripletLossConfig | NTXentLossConfig] = {
    "random": TripletLossConfig(negatives="random", margin=1.0),
    "semi-hard": TripletLossConfig(negatives="semi-hard", margin=1.0),
    "hard": TripletLossConfig(negatives="hard", distance="l2"),
    "all": TripletLossConfig(negatives="all", margin=1.0),
    "unnormalised": TripletLossConfig(normalize=False, margin=5.0),
    "nt-xent": NTXentLossConfig(),
}
WEIGHTS = {
    "equal": ((1.0,) * 3, (1.0,) * 2, (1.0,) * 4, (1.0,) * 2),
    "unequal": ((1.0, 0.0, 0.5), (2.0, 1.0), (0.0, 1.0, 1.0, 0.25), (0.0, 0.0)),
}


def objective(name: str, negatives_from: Literal["slot", "global"]) -> Contrastive:
    """Return an objective in float64, so that only mistakes differ."""
    torch.manual_seed(0)
    encoder = ViTConfig(
        patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12
    )
    made = Contrastive(
        ContrastiveConfig(
            encoder=encoder,
            loss=LOSSES[name],
            negatives_from=negatives_from,
            projection_hidden_size=8,
            projection_size=4,
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.double()


def slots(weights: str) -> list[Batch]:
    """Return slots of unequal sizes, with duplicates in one slot and in two."""
    dice = torch.Generator().manual_seed(1)
    groups = iter(torch.tensor([10, 11, 12, 11, 14, 15, 15, 17, 18, 10, 20]))
    made = []
    for rows, row_weights in zip(SLOT_ROWS, WEIGHTS[weights], strict=True):
        pixels = torch.randint(0, 256, (2, rows, 3, 8, 8), generator=dice, dtype=torch.uint8)
        made.append(
            {
                "first": pixels[0],
                "second": (pixels[0] // 2 + pixels[1] // 2),
                "negative": torch.arange(rows).roll(1),
                "weight": torch.tensor(row_weights),
                "group": torch.stack([next(groups) for _ in range(rows)]),
            }
        )
    return made


def joined(batches: list[Batch]) -> Batch:
    """Return all slots as one batch, whose random negatives are the rows they were."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    starts = torch.tensor([sum(SLOT_ROWS[:slot]) for slot in range(len(SLOT_ROWS))])
    whole["negative"] += starts.repeat_interleave(torch.tensor(SLOT_ROWS))
    return whole


def gradient(model: Contrastive, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def table(output: StepOutput) -> Tensor:
    return torch.stack([torch.stack(pair) for pair in output.metrics.values()])


def watched(model: Contrastive, batches: list[Batch]) -> Tensor:
    return torch.tensor(list(model.watch(batches).values()), dtype=torch.float64)


def step(model: Contrastive, batches: list[Batch]) -> dict[str, Tensor]:
    """Go backward on some slots as one of the ranks; return the loss and gradient of all."""
    name = model.term
    total = torch.stack([model.weights(batch)[name] for batch in batches]).sum()
    dist.all_reduce(total)
    if model.joins_slots:
        outputs = [model.join([model.embed(batch) for batch in batches], batches)]
    else:
        outputs = [model(batch) for batch in batches]
    shares = [joint_loss(o.terms, model.coefficients, {name: total}) for o in outputs]
    loss = torch.stack(shares).sum()
    found = {
        "loss": loss.detach(),
        "gradient": gradient(model, loss),
        "metrics": torch.stack([table(output) for output in outputs]).sum(dim=0),
        "watched": watched(model, batches) / dist.get_world_size(),
    }
    for tensor in found.values():
        dist.all_reduce(tensor)
    return found


def gather_unequal_rows(rank: int) -> dict[str, Tensor]:
    """Gather rank + 1 rows; the loss of each rank weighs the rows of all by its own numbers."""
    rows = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    counts = row_counts(len(rows), rows.device)
    everyone = gather_rows(rows, counts)
    weights = (rank + 1) * torch.arange(everyone.numel()).reshape(everyone.shape)
    torch.autograd.backward((everyone * weights).sum())
    assert rows.grad is not None
    own = own_rows(counts)
    assert torch.equal(everyone[own], rows)
    ids = gather_rows(torch.arange(own.start, own.stop), counts)
    return {"everyone": everyone.detach(), "gathered": rows.grad, "ids": ids}


def act(rank: int, split: str, folder: Path) -> None:
    """Be a rank of a process group and save what it finds."""
    held = SPLITS[split]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{split}",
        rank=rank,
        world_size=len(held),
        timeout=timedelta(seconds=60),  # a rank that dies must not hang the others
    )
    found = gather_unequal_rows(rank)
    for name in LOSSES:
        for weights in WEIGHTS:
            model = objective(name, "slot" if name == "random" else "global")
            batches = [slots(weights)[slot] for slot in held[rank]]
            parts = step(model, batches)
            found |= {f"{name}-{weights}-{part}": value for part, value in parts.items()}
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    np.savez(folder / f"{split}-{rank}.npz", allow_pickle=False, **arrays)
    dist.destroy_process_group()


def rank_of_four(rank: int, folder: str) -> None:
    """Be one of four ranks, and then perhaps one of two; runs in a process of its own."""
    torch.set_num_threads(1)
    for split, held in SPLITS.items():
        if rank < len(held):
            act(rank, split, Path(folder))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one import for four processes
    processes = [
        context.Process(target=rank_of_four, args=(rank, str(folder))) for rank in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_6_ranks_have_the_loss_and_gradient_of_the_joined_batch(
    ranks: Path, split: str, weights: str, name: str
) -> None:
    model, batch = objective(name, "slot"), joined(slots(weights))
    output = model(batch)
    loss = joint_loss(output.terms, model.coefficients, model.weights(batch))
    vector = gradient(model, loss)
    expected = {"loss": loss.detach(), "gradient": vector, "metrics": table(output)}
    figures = watched(model, [batch])
    assert len(figures) == 6
    assert loss > 0.1
    assert vector.abs().max() > 1e-3
    for rank in range(len(SPLITS[split])):
        found = np.load(ranks / f"{split}-{rank}.npz")
        for part, value in expected.items():
            np.testing.assert_allclose(
                found[f"{name}-{weights}-{part}"], value, rtol=1e-6, atol=1e-9, err_msg=part
            )
        together = found[f"{name}-{weights}-watched"]
        np.testing.assert_allclose(together, figures, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_gathered_in_the_order_of_the_ranks_and_gradients_are_summed(
    ranks: Path, split: str
) -> None:
    size = len(SPLITS[split])
    numbers = [rank for rank in range(size) for _ in range(rank + 1)]
    factor = sum(range(1, size + 1))
    for rank in range(size):
        found = np.load(ranks / f"{split}-{rank}.npz")
        np.testing.assert_array_equal(found["everyone"], [[n, n] for n in numbers])
        np.testing.assert_array_equal(found["ids"], range(len(numbers)))
        rows = [index for index, number in enumerate(numbers) if number == rank]
        np.testing.assert_array_equal(
            found["gathered"], [[factor * 2 * row, factor * (2 * row + 1)] for row in rows]
        )


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "random"])
def test_one_process_joins_its_slots_without_a_process_group(name: str) -> None:
    batches = slots("unequal")
    several, whole = objective(name, "global"), objective(name, "slot")
    found = several.join([several.embed(batch) for batch in batches], batches)
    expected = whole(joined(batches))
    assert found.terms.keys() == expected.terms.keys()
    for term, pair in expected.terms.items():
        torch.testing.assert_close(torch.stack(found.terms[term]), torch.stack(pair))


def test_negatives_of_other_slots_change_the_loss() -> None:
    batches, model = slots("equal"), objective("hard", "slot")
    apart = sum(model(batch).terms["triplet"][0].item() for batch in batches)
    assert apart < model(joined(batches)).terms["triplet"][0].item() - 0.1
