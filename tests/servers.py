"""Servers as a team runs them, on loopback: S3, Postgres, and MLflow with basic auth upon both."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

USER, PASSWORD = "admin", "correct horse battery staple 9"
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "artifacts"
PATIENCE_SECONDS = 120.0


@contextmanager
def s3() -> Iterator[str]:
    """Run an S3 server; yield its HOST:PORT."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    try:
        yield f"{host}:{port}"
    finally:
        started.stop()


def s3_client(address: str) -> Any:
    """Return a client of an S3 server."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://{address}",
        region_name="us-east-1",
        aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
    )


@contextmanager
def postgres(*databases: str) -> Iterator[dict[str, str]]:
    """Run a Postgres that listens on a socket alone; yield the URI of each database."""
    tools = _postgres_tools()
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        new = [tools / "initdb", "-D", folder / "data", "-U", "rayssl", "-A", "trust", "-E", "UTF8"]
        _run(*new, "--no-sync", user=user)
        settings = ("listen_addresses=", f"unix_socket_directories={folder}", "fsync=off")
        flags = [word for setting in settings for word in ("-c", setting)]
        words = [tools / "postgres", "-D", folder / "data", *flags]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(list(map(str, words)), user=user, stdout=log, stderr=log)
        try:
            _wait(lambda: _run(tools / "pg_isready", "-q", "-h", folder) == 0, server)
            for database in databases:
                _run(tools / "createdb", "-h", folder, "-U", "rayssl", database)
            yield {
                database: f"postgresql+psycopg2://rayssl@/{database}?host={folder}"
                for database in databases
            }
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown
            server.wait(PATIENCE_SECONDS)


def _run(*words: object, user: str | None = None) -> int:
    return subprocess.run(
        list(map(str, words)), user=user, cwd="/", check=False, stdout=subprocess.DEVNULL
    ).returncode


def _postgres_tools() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not (found or on_path):
        pytest.skip("no Postgres here: initdb is neither in /usr/lib/postgresql/*/bin nor on PATH")
    return (found[-1] if found else Path(str(on_path))).parent


class MlflowServer:
    """`mlflow server` on a Postgres store and a bucket, with basic auth; it can be killed."""

    def __init__(self, folder: Path, databases: dict[str, str], s3_address: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        auth = (
            "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            f"database_uri = {databases['auth']}\nadmin_username = {USER}\n"
            "grant_default_workspace_access = false\nauth_cache_ttl_seconds = 60\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self._folder = folder
        (folder / "auth.ini").write_text(auth)
        self._store = databases["store"]
        self._environment = {
            **{name: value for name, value in os.environ.items() if "MLFLOW" not in name},
            **S3_KEYS,
            "MLFLOW_S3_ENDPOINT_URL": f"http://{s3_address}",
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        words += ["--backend-store-uri", self._store]
        words += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        words += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                words,
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(self._answers, self._process)

    def kill(self) -> None:
        """Kill it and its workers, as a machine that loses power does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False


def _wait(happened: Callable[[], bool], server: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert server.poll() is None, f"{server.args!r} ended with {server.returncode}"
        assert time.monotonic() < give_up, f"{server.args!r} does not answer"
        time.sleep(0.1)
