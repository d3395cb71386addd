"""What a user can cause, said in one line: what went wrong, the value, what to do."""

import textwrap
from collections.abc import Iterable

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class UserError(Exception):
    """A mistake in a command: the command line shows the message alone and exits with 2."""

    exit_code = 2


class DataError(UserError):
    """Raw data, a checkpoint or a bundle that cannot be trusted: exit code 65."""

    exit_code = 65


class TrainingError(UserError):
    """Training failed for good, for a reason that lies in what the worker computes: exit code 1."""

    exit_code = 1


class StorageError(UserError):
    """A file of ours cannot be written; exit code 75: try again once it can."""

    exit_code = 75


class TrackingError(UserError):
    """MLflow did not answer where an answer was needed; exit code 75: try again later."""

    exit_code = 75


class OutageError(StorageError):
    """Raw data cannot be read for now; exit code 75, and training is tried again by itself."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ` Did you mean 'pretrain'?`, or the list of what is known."""
    import difflib  # only where something went wrong: what starts the command imports this module

    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(choices)}."


def brief(error: object, width: int = 120) -> str:
    """Return the first line of what an error says, cut at a word where it is too wide."""
    first_line = str(error).strip().partition("\n")[0]
    return textwrap.shorten(first_line, width, placeholder=" ...")
