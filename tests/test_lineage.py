"""Where a run comes from: its commit, its job and its data."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.training.lineage import code_version, dataset_of, submission_id
from tests.corpus import serial_map


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of no repository, as one who has submitted nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAYSSL_GIT_COMMIT", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def git(*words: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(
        ["git", *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_commit_is_told_and_whether_something_was_changed_since(here: Path) -> None:
    assert code_version() == {"git_commit": "unknown", "git_dirty": "false"}
    with pytest.MonkeyPatch.context() as without_git:
        without_git.setenv("PATH", str(here))
        assert code_version()["git_commit"] == "unknown"
    git("init", "--quiet")
    (here / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "first")
    git("tag", "--annotate", "v1-rc", "--message", "a name that is not the commit's")
    commit = git("rev-parse", "HEAD")
    (here / "mlflow.db").write_text("not of the code")
    assert code_version() == {"git_commit": commit, "git_dirty": "false"}
    (here / "code.py").write_text("a = 2\n")
    assert code_version() == {"git_commit": commit, "git_dirty": "true"}


@pytest.mark.usefixtures("here")
def test_who_submits_a_copy_tells_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSSL_GIT_COMMIT", "c0ffee-dirty")
    assert code_version() == {"git_commit": "c0ffee", "git_dirty": "true"}


@pytest.mark.usefixtures("here")
def test_a_job_knows_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submission_id() == ""
    told = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    assert submission_id() == "raysubmit_1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": None}))
    assert submission_id() == ""


@pytest.mark.parametrize(
    ("root", "name", "source_type"),
    [
        ("/shards/wikipedia", "wikipedia", "local"),
        ("/", "/", "local"),
        ("s3://bucket/text/sotu?region=us-east-1&scheme=http", "sotu", "s3"),
        ("gs://bucket", "bucket", "gs"),
    ],
)
def test_data_is_named_by_its_folder(
    corpus_dir: Path, root: str, name: str, source_type: str
) -> None:
    manifest = build(find_shards([str(corpus_dir)]), SourceConfig(), serial_map)
    data = dataset_of(replace(manifest, root=root))
    assert (data.name, data.source_type) == (name, source_type)
    assert data.digest == manifest.fingerprint[:32]
    assert json.loads(data.source) == {"uri": root}
    assert json.loads(data.profile)["shards"] == 6
