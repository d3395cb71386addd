"""`mlflow models serve` as a process, and how it is asked."""

import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.command import process


class Answer(NamedTuple):
    """What a server answers."""

    status: int
    body: Any


def ask(address: str, request: str) -> Answer:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/invocations", request.encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return Answer(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.load(error))


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@contextmanager
def served(uri: str, tracking_uri: str, folder: Path) -> Iterator[str]:
    """Serve a model, and yield the address where it answers."""
    port = free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    words += ["-m", uri, "-h", "127.0.0.1", "-p", str(port), "--workers", "1"]
    address = f"http://127.0.0.1:{port}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn
    with process(folder, *words, MLFLOW_TRACKING_URI=tracking_uri, PATH=path) as server:
        server.wait_until(partial(is_up, address))
        yield address
