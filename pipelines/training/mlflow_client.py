"""How every part opens MLflow: quiet, quick to fail, and never on a half-made database."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.data.filesystems import holds_secret
from pipelines.errors import TrackingError, UserError, brief

MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own 7 retries block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # also for alembic
    "MLFLOW_UV_AUTO_DETECT": "false",  # else uv.lock of the working directory joins every model
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
SQLITE_PREFIX = "sqlite:///"
SECRET_IN_URI = (
    "a tracking URI with a password would be recorded with the run: leave it out there, and set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (PGPASSWORD for a database)"
)


def open_client(tracking_uri: str) -> Any:
    """Return an `MlflowClient` of this store; what the environment sets wins over our defaults.

    mlflow is imported here, not at the top: that takes seconds.

    Raises:
        UserError: If the URI holds a password.
    """
    if holds_secret(tracking_uri):
        raise UserError(SECRET_IN_URI)
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    level = os.environ["MLFLOW_LOGGING_LEVEL"].upper()
    logging.getLogger("mlflow").setLevel(level)  # in case it was imported before
    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        _create_sqlite(path)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextlib.contextmanager
def answered(tracking_uri: str, advice: str) -> Iterator[Any]:
    """Give an `MlflowClient`, and say in one line where MLflow, or its store of artifacts, fails.

    Raises:
        TrackingError: If anything but an error of ours is raised: stores raise of all kinds.
    """
    try:
        yield open_client(tracking_uri)
    except UserError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {tracking_uri}: {type(error).__name__}: {brief(error)}; {advice}"
        ) from error


def sqlite_path(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite store, None for a server."""
    if not tracking_uri.startswith(SQLITE_PREFIX):
        return None
    return Path(tracking_uri.removeprefix(SQLITE_PREFIX).partition("?")[0])


def _create_sqlite(path: Path) -> None:
    """Make the tables under another name first.

    A process that dies within the seconds of MLflow's migrations leaves a file that MLflow can
    never open again ("duplicate column name"). No connection knows the file that stays.
    """
    from mlflow import MlflowClient

    complete = path.with_name(f".{path.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder:
        growing = Path(folder, "growing.db")
        MlflowClient(tracking_uri=f"{SQLITE_PREFIX}{growing}").search_experiments()
        shutil.copyfile(growing, complete)
    with contextlib.suppress(FileExistsError):  # another process was first: use its file
        os.link(complete, path)
    complete.unlink()
