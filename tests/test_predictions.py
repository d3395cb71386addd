"""A table of what is told of masked tokens: true to the model, and of the same tokens each time."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.data.indexing import build
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import recipe
from pipelines.run import Run
from pipelines.use.predictions import COLUMNS, ROWS, write_predictions
from ssl_models import build_objective
from ssl_models.masked_language import MaskedLanguage
from tests.corpus import serial_map, write_corpus


@pytest.fixture(params=[0.2, 0.0], ids=["held-out", "nothing-held-out"])
def run(request: pytest.FixtureRequest, tmp_path: Path, vocabulary: Vocabulary) -> Run:
    write_corpus(tmp_path / "corpus", num_documents=30)
    source = SourceConfig(heldout_ratio=request.param)
    manifest = build(find_shards([str(tmp_path / "corpus")]), source, serial_map)
    config = replace(recipe("text-tiny"), source=source)
    encoder = replace(config.masked_language.encoder, vocab_size=vocabulary.size)
    config = replace(config, objective=replace(config.masked_language, encoder=encoder))
    return Run(tmp_path / "run", "key", config, manifest, vocabulary)


def drawn(run: Run, seed: int) -> MaskedLanguage:
    torch.manual_seed(seed)
    objective = build_objective(run.config.objective).eval()
    assert isinstance(objective, MaskedLanguage)
    return objective


def read(paths: list[Path]) -> list[dict[str, str]]:
    (path,) = paths
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert table.fieldnames == [*COLUMNS]
    return rows


def documents_of(rows: list[dict[str, str]], run: Run) -> set[int]:
    """Return the records whose words make up the first segments, masked ones left out."""
    found = set()
    for split in ("training", "heldout"):
        for number in run.manifest.blocks_of(split):
            for document in run.manifest.read(number, split):
                ids = run.vocabulary.encode([document.text])[0].tolist()
                tokens = " ".join(str(run.vocabulary.tokenizer.id_to_token(i)) for i in ids)
                for row in rows:
                    words = row["text"].partition(" [SEP]")[0].removeprefix("[CLS] ")
                    pattern = re.escape(words).replace(re.escape("[MASK]"), r"\S+")
                    if re.search(pattern, tokens):
                        found.add(document.record)
    return found


def test_the_table_tells_what_the_model_does(run: Run, tmp_path: Path) -> None:
    objective = drawn(run, 0)
    rows = read(write_predictions(objective, run, tmp_path / "a"))
    assert len({row["row"] for row in rows}) == ROWS
    assert len(documents_of(rows, run)) > 2
    for row in rows[:5]:
        tokens = row["text"].split()
        ids = [run.vocabulary.tokenizer.token_to_id(token) for token in tokens]
        assert None not in ids
        input_ids = torch.tensor([ids])
        first_end = tokens.index("[SEP]") + 1
        batch = {
            "input_ids": input_ids,
            "token_type_ids": (torch.arange(len(ids)) >= first_end).long()[None],
            "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
            "masked_positions": torch.arange(len(ids))[None],
        }
        with torch.no_grad():
            told = objective.mask_logits(batch)[0].softmax(dim=-1)
        told = told[int(row["place"])]
        truth = run.vocabulary.tokenizer.token_to_id(row["token"])
        assert float(row["probability"]) == pytest.approx(float(told[truth]), abs=1e-4)
        assert float(row["entropy"]) == pytest.approx(float(-(told * told.log()).sum()), abs=1e-2)
        best = told.topk(3)
        for n, (piece, share) in enumerate(zip(best.indices, best.values, strict=True), 1):
            assert row[f"guess {n}"] == run.vocabulary.tokenizer.id_to_token(int(piece))
            assert float(row[f"probability {n}"]) == pytest.approx(float(share), abs=1e-4)


def test_two_models_are_asked_for_the_same_tokens(run: Run, tmp_path: Path) -> None:
    tables = [read(write_predictions(drawn(run, s), run, tmp_path / str(s))) for s in (0, 1)]
    asked = [[(row["text"], row["token"]) for row in table] for table in tables]
    assert asked[0] == asked[1]
    assert tables[0] != tables[1]
