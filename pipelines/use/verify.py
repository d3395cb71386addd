"""Proof after the fact: does what the model consumed equal what the manifest and recipe give?"""

from dataclasses import dataclass

from pipelines.data.batches import Rank, chain, local_blocks, slot_digest, steps
from pipelines.data.plan import Cursor
from pipelines.errors import UserError
from pipelines.run import Run
from pipelines.training.checkpoint import START_DIGEST


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a recomputation found."""

    status: str
    """PASS or FAIL."""
    steps: int
    """How many committed steps there are."""
    digest: str
    """The recorded digest of all of them."""
    first_different_step: int | None = None
    """The first step, counted from 1, whose batch was not the planned one."""


def verify(run: Run) -> Verdict:
    """Make every committed batch anew, in this process, and compare digests step by step.

    Raises:
        UserError: If the run has no commit yet.
        DataError: If the raw shards are no longer the ones that were indexed.
    """
    newest = run.log.newest()
    if newest is None:
        raise UserError(f"run {run.dir.name!r} has no commit yet: nothing to verify")
    recorded = [digest for commit in run.log.lineage(newest) for digest in commit.digests]
    order, source, start = run.config.order, run.source, Cursor()
    made = steps(local_blocks(source, order, start), source, order, start, Rank())
    digest = START_DIGEST
    # What follows the steps that were made is never asked for.
    for number, (wanted, step) in enumerate(zip(recorded, made, strict=False), 1):
        digest = chain(digest, [slot_digest(step.slots[slot]) for slot in sorted(step.slots)])
        if digest != wanted:
            return Verdict(
                status="FAIL",
                steps=newest.step,
                digest=newest.digest,
                first_different_step=number,
            )
    whole = len(recorded) == newest.step
    return Verdict(
        status="PASS" if whole else "FAIL",
        steps=newest.step,
        digest=newest.digest,
        first_different_step=None if whole else len(recorded) + 1,
    )
