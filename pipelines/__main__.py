"""The process behind `rayssl` and `python -m pipelines`: light, so that it can end at any time.

What follows imports for seconds. Until there is something to end in order, which `cluster.py`
takes care of, Ctrl-C and SIGTERM end the process on the spot, without a traceback.
"""

import os
import signal

from pipelines.errors import INTERRUPTED


def main() -> int:
    """Run the command and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from pipelines.cli import main as run

    return run()


def _leave(*_: object) -> None:
    os.write(2, b"\nrayssl: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
