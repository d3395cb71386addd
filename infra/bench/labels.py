"""The table of label fractions: an encoder, the same net from scratch, and a linear model.

    python -m infra.bench.labels newsgroups models:/rayssl-newsgroups@candidate \
        'samples/newsgroups/newsgroups-train-*.jsonl' \
        --test 'samples/newsgroups/newsgroups-test-*.jsonl' --labels label

After the name of the result it takes what `rayssl label-table` takes, and adds where it was made
and the CPU seconds of all processes.
"""

import sys

import tyro

from infra.bench.measure import Watch, keep
from pipelines.verbs_finetune import LabelTable


def main(arguments: list[str]) -> None:
    """Make a table and keep it as labels_NAME."""
    name, *given = arguments
    verb = tyro.cli(LabelTable, args=given, prog=f"infra.bench.labels {name}")
    with Watch() as watch:
        made = verb.run()
    seconds = round(watch.cpu_seconds("driver", "workers", "ray"))
    keep(f"labels_{name}", {"cpu_seconds": seconds, **made})


if __name__ == "__main__":
    main(sys.argv[1:])
