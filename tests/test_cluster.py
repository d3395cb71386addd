"""Clusters: what is joined, what is refused, and a job on two nodes that a token guards."""

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines import cluster
from pipelines.cluster import ClusterError, greet, parallel_map
from pipelines.errors import UserError
from pipelines.run import load_run
from pipelines.training.mlflow_client import open_client
from pipelines.use.verify import verify
from tests.command import Command, process
from tests.corpus import write_corpus

ROOT = Path(__file__).parent.parent
START = str(ROOT / "infra" / "cluster" / "start.sh")
WORKERS = 3
CPUS_PER_NODE = 2
TOKEN = "0123456789abcdef" * 4
PORTS_PER_NODE = 200


@pytest.mark.usefixtures("ray_session")
def test_who_waits_for_many_tasks_is_told_how_many_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_up(number: int) -> int:
        give_up = time.monotonic() + 60
        while number and not (tmp_path / "go").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        return number

    def tell(count: int) -> None:
        told.append(count)
        if count:
            (tmp_path / "go").touch()

    told: list[int] = []
    monkeypatch.setattr(cluster, "TELL_EVERY_SECONDS", 0.05)
    assert parallel_map(held_up, range(3), tell) == [0, 1, 2]
    assert told == sorted(told)
    assert 1 in told
    assert told[-1] == 3


@pytest.mark.parametrize(
    "address", ["garbage", "127.0.0.1", "http://127.0.0.1:8265", "ray://127.0.0.1:10001", ":6379"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"is no address of a Ray cluster: .* HOST:6379"):
        greet(address)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address}: .*refused") as refused:
        greet(address)
    assert refused.value.exit_code == 75


def test_what_listens_there_has_to_be_a_ray_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with ThreadPoolExecutor() as pool:
            greeted = pool.submit(greet, address)
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            with pytest.raises(UserError, match=f"what listens at {address} is no Ray head"):
                greeted.result(30)
            connection.close()


def test_where_no_cluster_runs_none_is_joined(tmp_path: Path) -> None:
    """In a process of its own, which is kept from seeing a Ray of the other tests."""
    code = (
        "import functools, ray; from pipelines.cli import main; "
        "ray._private.services.find_gcs_addresses = functools.cache(set); "
        "exit(main(['index', 'a']))"
    )
    alone = {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "auto", "PYTHONPATH": str(ROOT)}
    with process(tmp_path, sys.executable, "-c", code, **alone) as refused:
        assert refused.wait() == 75
        (line,) = refused.err
    assert line.startswith("rayssl: no Ray cluster runs on this machine, where 'auto' looks")


def test_a_local_ray_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)  # its sockets have room for 107 bytes
    folder.mkdir()
    settings = {"RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    (tmp_path / "a.txt").write_text("Words.")
    rayssl = (sys.executable, "-m", "pipelines")
    with process(tmp_path, *rayssl, "index", "a.txt", **settings) as refused:
        assert refused.wait() == 75
        (line,) = refused.err
    assert line.startswith("rayssl: a local Ray does not start: ")
    assert line.endswith("; mend that, or try again")


# Two nodes on this machine


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes that are started as on two machines."""

    head: Command
    node: Command
    first_port: int
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """Return where the head listens."""
        return f"127.0.0.1:{self.first_port}"

    @property
    def job_server(self) -> str:
        """Return where jobs are submitted."""
        return f"http://127.0.0.1:{self.first_port + 1}"


def free_ports(count: int) -> int:
    """Return the first of many ports below those that a system gives away by itself."""
    for first in range(10_000 + os.getpid() % 100, 32_000 - count, count):
        with ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("", port)))
            return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    environment = {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",  # what runs is what the job brings
        "RAY_AUTH_MODE": "token",
    }
    token = folder / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)
    first = free_ports(2 * PORTS_PER_NODE)
    flags = ["--num-cpus", str(CPUS_PER_NODE), "--object-store-memory", "100000000"]
    with (
        # Short, as names of sockets have to be; two, or one node would take the other's files.
        tempfile.TemporaryDirectory(prefix="ray") as temp,
        tempfile.TemporaryDirectory(prefix="ray") as other_temp,
        process(
            folder / "head",
            *(START, "head", *flags, "--temp-dir", temp),
            **environment,
            FIRST_PORT=str(first),
        ) as head,
    ):
        head.wait_until(lambda: is_up(head))
        with process(
            folder / "node",
            *(START, f"127.0.0.1:{first}", *flags, "--temp-dir", other_temp),
            **environment,
            FIRST_PORT=str(first + PORTS_PER_NODE),
        ) as node:
            node.wait_until(lambda: is_up(node))
            yield Nodes(head, node, first, environment)


def is_up(started: Command) -> bool:
    return any("Ray runtime started" in line for line in started.err + started.out)


def submit(nodes: Nodes, *words: str) -> list[str]:
    """Return the words that submit a job which ships the code of this checkout."""
    return ["ray", "job", "submit", "--address", nodes.job_server, *words]


@pytest.fixture(scope="module")
def job(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Submit a run and return where it ran and what it said."""
    folder = tmp_path_factory.mktemp("job")
    for package in ("pipelines", "ssl_models"):
        shutil.copytree(ROOT / package, folder / "code" / package)
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(corpus, num_documents=36, num_shards=12, num_sentences=8)
    run = ["python", "-m", "pipelines", "pretrain", "text-tiny", "--data", str(corpus)]
    run += ["--runs", str(folder / "runs"), "--name", "two-nodes", "--workers", str(WORKERS)]
    run += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    code = ["--working-dir", str(folder / "code"), "--submission-id", "job-of-tests"]
    commit = json.dumps({"env_vars": {"RAYSSL_GIT_COMMIT": "c0ffee-dirty"}})
    words = submit(nodes, *code, "--runtime-env-json", commit, "--", *run)
    with process(folder, *words, **nodes.environment) as submitted:
        submitted.wait_until(
            lambda: all(of.titled("ray::RayTrainWorker") for of in (nodes.head, nodes.node))
        )
        return {
            "code": submitted.wait(),
            "out": submitted.out,
            "run": folder / "runs" / "two-nodes",
        }


@pytest.mark.slow
def test_a_submitted_job_trains_on_both_nodes(job: dict[str, Any]) -> None:
    assert job["code"] == 0, job["out"]
    run = load_run(job["run"])
    verdict = verify(run)
    assert (verdict.status, verdict.steps) == ("PASS", run.config.steps)
    assert [attempt.workers for attempt in run.log.attempts()] == [WORKERS]
    client = open_client(run.config.tracking_uri)
    account = json.loads((run.dir / "account.json").read_text())
    tags = client.get_run(account["mlflow_run"]).data.tags
    told = [tags[f"rayssl.{name}"] for name in ("submission_id", "git_commit", "git_dirty")]
    assert told == ["job-of-tests", "c0ffee", "true"]


@pytest.mark.slow
def test_without_the_token_nobody_gets_in(nodes: Nodes, tmp_path: Path) -> None:
    words = submit(nodes, "--", "echo", "intruder")
    without = nodes.environment | {"HOME": str(tmp_path)}
    with process(tmp_path / "submit", *words, **without) as submitted:
        assert submitted.wait() != 0
        said = "\n".join(submitted.out + submitted.err)
        assert "oken" in said
        assert "succeeded" not in said


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "f" * 64])
def test_a_driver_with_a_wrong_token_or_none_is_told_so(
    nodes: Nodes, tmp_path: Path, token: str
) -> None:
    words = [sys.executable, "-m", "pipelines", "index", str(ROOT), "--address", nodes.address]
    stranger = nodes.environment | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    if token:
        stranger["RAY_AUTH_TOKEN"] = token
    with process(tmp_path / "index", *words, **stranger) as refused:
        assert refused.wait() == 2
        (line,) = refused.err
    assert line.startswith(f"rayssl: the Ray cluster at {nodes.address} does not let us in")
    assert line.endswith("Put it into ~/.ray/auth_token and set RAY_AUTH_MODE=token")


@pytest.mark.slow
def test_a_cluster_without_a_cpu_for_the_data_is_refused_before_anything_waits(
    nodes: Nodes, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "pipelines", "pretrain", "text-tiny", "--data", str(ROOT)]
    words += ["--workers", str(2 * CPUS_PER_NODE)]
    driver = nodes.environment | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": nodes.address}
    with process(tmp_path, *words, **driver) as refused:
        assert refused.wait() == 75
        (line,) = refused.err
    assert f"the Ray cluster at {nodes.address} has 4 CPUs where 5 are needed" in line
