"""Where a run comes from: the code, the job and the data, as MLflow is told."""

import contextlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass

from pipelines.data.filesystems import parse
from pipelines.data.manifest import Manifest

CODE_VARIABLE = "RAYSSL_GIT_COMMIT"
"""Set by who submits a job, whose copy of the working directory has no .git, to what GIT prints."""
GIT = ("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray tells the command of a job that was submitted."""
DIGEST_CHARACTERS = 32  # MLflow takes 36


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data of a run, as an input that MLflow knows."""

    name: str
    digest: str
    source_type: str
    """`local` or the scheme of a URI."""
    source: str
    """JSON of the URI; MLflow's own words for a folder or a bucket."""
    profile: str
    """JSON of what the manifest counts."""


def dataset_of(manifest: Manifest) -> Dataset:
    """Return the data of a manifest, named by its folder, with its fingerprint as digest."""
    place = parse(manifest.root)
    scheme, _, host = place.head.partition("://")
    ledger = {fate: asdict(entry) for fate, entry in manifest.ledger.items()}
    return Dataset(
        name=place.path.rpartition("/")[2] or host or "/",
        digest=manifest.fingerprint[:DIGEST_CHARACTERS],
        source_type=scheme or "local",
        source=json.dumps({"uri": manifest.root}),
        profile=json.dumps({"shards": len(manifest.shards), "records": ledger}),
    )


def code_version() -> dict[str, str]:
    """Return `git_commit` of the working directory, or `unknown`, and whether it is `git_dirty`.

    RAYSSL_GIT_COMMIT wins, for a job whose working directory is a copy.
    """
    told = os.environ.get(CODE_VARIABLE, "").strip()
    if not told:
        with contextlib.suppress(OSError):  # a machine without git
            told = subprocess.run(GIT, capture_output=True, text=True, check=False).stdout.strip()
    commit, _, dirty = told.partition("-")
    return {"git_commit": commit or "unknown", "git_dirty": str(bool(dirty)).lower()}


def submission_id() -> str:
    """Return the id under which Ray's job server runs this command; empty if it does not."""
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    return str((job.get("metadata") or {}).get("job_submission_id", ""))
