"""Rows of all ranks in one tensor, with exact gradients.

Every rank that calls `gather_rows` on what has a gradient must also go backward through it, in the
same order: the backward pass is a collective too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def row_counts(rows: int, device: torch.device) -> list[int]:
    """Return how many rows each rank has, by rank; only this one's without a process group."""
    if not dist.is_initialized():
        return [rows]
    counts = [
        torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def own_rows(counts: list[int]) -> slice:
    """Return where this rank's rows stand among the gathered ones."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Return the rows of all ranks in the order of the ranks, which may hold unequally many.

    The gradient of this rank's rows is the sum over the ranks of what each computes for them. So
    the sum over ranks of parameter gradients is that of the sum over ranks of the losses.
    """
    if len(counts) == 1:
        return rows
    apply: Callable[[Tensor, list[int]], Tensor] = _GatherRows.apply
    return apply(rows, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.own = own_rows(counts)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.own], None
