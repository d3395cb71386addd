"""From raw shards to an answer over HTTP by the commands alone, on real text and pictures."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import webdataset

from pipelines.cli import main
from pipelines.training.mlflow_client import open_client
from pipelines.use.registry import load_classifier, load_encoder
from tests.serving import ask, served


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What differs between the modalities."""

    samples: tuple[str, ...]
    recipe: str
    steps: int
    settings: tuple[str, ...]
    training: str
    """Raw shards to pretrain on."""
    judged: str
    """Raw shards for the gate, which the pretraining has not seen."""
    labelled: str
    labels: str
    column: str
    """Of a request to the served classifier."""


JOURNEYS = {
    "text": Journey(
        samples=("wikipedia", "newsgroups"),
        recipe="text-tiny",
        steps=500,
        settings=("--order.rows-per-step", "64", "--order.steps-per-block", "8"),
        training="samples/wikipedia/wikipedia-0[0-3].jsonl",
        judged="samples/wikipedia/wikipedia-0[4-7].jsonl",
        labelled="samples/newsgroups/newsgroups-train-00.jsonl",
        labels="label",
        column="text",
    ),
    "images": Journey(
        samples=("mnist",),
        recipe="image-tiny",
        steps=60,
        settings=("--images.channels", "1", "--objective.encoder.channels", "1"),
        training="samples/mnist/mnist-train-0[0-1].tar",
        judged="samples/mnist/mnist-test-00.tar",
        labelled="samples/mnist/mnist-test-07.tar",
        labels="cls",
        column="image",
    ),
}


def some_items(journey: Journey) -> list[Any]:
    """Return three of the labelled items, read without rayssl."""
    path = journey.labelled
    if path.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()[:3]]
    return [
        sample["png"]
        for sample, _ in zip(
            webdataset.WebDataset(path, shardshuffle=False), range(3), strict=False
        )
    ]


def sent(item: Any) -> str:
    """Return an item as JSON carries it."""
    return base64.b64encode(item).decode() if isinstance(item, bytes) else item


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("modality", JOURNEYS)
def test_raw_shards_become_a_champion_and_a_served_classifier(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journey = JOURNEYS[modality]
    for sample in journey.samples:
        assert main(["samples", sample]) == 0

    store = f"sqlite:///{tmp_path}/mlflow.db"  # absolute: MLflow keeps a store open by its URI

    def done(*words: str) -> bool:
        return main([*words, "--tracking-uri", store]) == 0

    pretrain = ["pretrain", journey.recipe, "--data", journey.training, *journey.settings]
    assert done(
        *pretrain, "--steps", str(journey.steps), "--name", "first", "--register", "encoder"
    )
    assert done("promote", "encoder", "--data", journey.judged)
    assert int(open_client(store).get_model_version_by_alias("encoder", "champion").version) == 1
    champion = "models:/encoder@champion"

    assert done("embed", champion, journey.labelled, "--out", "embeddings")
    items = some_items(journey)
    expected = load_encoder(champion, store).encode(items)
    table = ds.dataset("embeddings", format="parquet").to_table().sort_by("record")
    found = np.array(table["embedding"].slice(0, 3).to_pylist())
    np.testing.assert_allclose(found, expected, atol=1e-5)

    finetune = ["finetune", champion, journey.labelled, "--labels", journey.labels]
    finetune += ["--name", "labels", "--register", "classifier", "--training.epochs", "1"]
    assert done(*finetune, "--training.least-steps", "60")
    told = load_classifier("models:/classifier@candidate", store).predict(items)

    with served("models:/classifier@candidate", store, tmp_path / "server") as address:
        data = [[sent(item)] for item in items]
        request = {"dataframe_split": {"columns": [journey.column], "data": data}}
        status, answer = ask(address, json.dumps(request))
    assert status == 200
    assert [row["label"] for row in answer["predictions"]] == list(told.labels)
    probabilities = [row["probabilities"] for row in answer["predictions"]]
    np.testing.assert_allclose(probabilities, told.probabilities, atol=1e-5)
