"""Fine-tuning end to end: labelled shards to a registered classifier that predicts."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

from pipelines.data.manifest import content_hash
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, UserError
from pipelines.training.mlflow_client import open_client
from pipelines.use.bundle import manifest_sha256
from pipelines.use.fill_mask import fill_mask
from pipelines.use.finetune import finetune
from pipelines.use.finetune_config import FinetuneConfig
from pipelines.use.registry import load_classifier, load_encoder
from pipelines.verbs_finetune import Finetune
from tests.labelled import topics, write_lines, write_text_encoder

FEW_STEPS = FinetuneConfig(epochs=1, least_steps=40, evaluations=4, rows_per_step=16)


@dataclass(frozen=True)
class Finished:
    """A fine-tuned classifier of topics."""

    asked: Finetune
    account: dict[str, Any]
    said: str

    @property
    def dir(self) -> Path:
        """Return the folder of the run."""
        return Path(self.asked.runs) / self.asked.name


def ask(folder: Path, model: Path, data: Path, **changes: Any) -> Finetune:
    given: dict[str, Any] = {
        "model": str(model),
        "data": (str(data),),
        "labels": "topic",
        "name": "topics",
        "runs": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "training": FEW_STEPS,
    }
    return Finetune(**(given | changes))


def call(asked: Finetune) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        account = finetune(asked)
    return account, out.getvalue()


@pytest.fixture(scope="module")
def finished(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary
) -> Iterator[Finished]:
    del ray_session
    folder = tmp_path_factory.mktemp("finetune")
    model = write_text_encoder(folder / "tiny", vocabulary)
    data = write_lines(folder / "data" / "part.jsonl", topics(240))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where artifacts go
        asked = ask(folder, model, data)
        account, said = call(asked)
        yield Finished(asked, account, said)


def test_topics_are_learned_and_told_with_an_interval(finished: Finished) -> None:
    found = finished.account["evaluation"]
    assert found["test/accuracy"] > 0.8
    assert found["test/accuracy_low"] <= found["test/accuracy"] <= found["test/accuracy_high"]
    assert "95 % interval" in finished.said
    assert "is \\ told to be" in finished.said


def test_what_is_registered_predicts_as_it_was_judged(finished: Finished) -> None:
    uri = finished.account["registered"]
    assert uri == "models:/tiny-topic/1"
    classifier = load_classifier(uri, finished.asked.tracking_uri)
    lines = {line["text"]: line["topic"] for line in topics(240)}
    told = classifier.predict(list(lines))
    assert classifier.classes == ("court", "kitchen", "sea")
    assert np.allclose(told.probabilities.sum(axis=1), 1, atol=1e-5)
    assert told.labels == [classifier.classes[i] for i in told.probabilities.argmax(axis=1)]
    figures = json.loads((finished.dir / "figures.json").read_text())
    num_wrong = sum(sum(row) for row in figures["confusion"]) - sum(
        row[i] for i, row in enumerate(figures["confusion"])
    )
    wrong = [text for text, label in zip(lines, told.labels, strict=True) if lines[text] != label]
    in_test = [t for t in wrong if content_hash(t) < finished.asked.test_ratio * 2**64]
    assert len(in_test) == num_wrong


def test_the_classifier_is_linked_to_its_encoder(finished: Finished) -> None:
    client = open_client(finished.asked.tracking_uri)
    version = client.get_model_version("tiny-topic", "1")
    assert version.tags["rayssl.encoder"] == finished.asked.model
    lineage = json.loads((finished.dir / "bundle" / "lineage.json").read_text())
    assert lineage["encoder"] == finished.asked.model
    assert lineage["encoder_sha256"] == manifest_sha256(Path(finished.asked.model))
    run = client.get_run(finished.account["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] == finished.account["evaluation"]["test/accuracy"]
    history = client.get_metric_history(run.info.run_id, "validation/accuracy")
    assert [point.step for point in history] == [10, 20, 30, 40]
    assert {"confusion.png", "figures.json"} <= {
        Path(found.path).name for found in client.list_artifacts(run.info.run_id, "finetune")
    }


def test_the_picture_of_the_confusion_is_not_blank(finished: Finished) -> None:
    with Image.open(finished.dir / "confusion.png") as picture:
        assert picture.width == picture.height > 300
        assert len(picture.convert("L").getcolors() or []) > 10


def test_mlflow_answers_with_labels_and_probabilities(finished: Finished) -> None:
    served = open_client(finished.asked.tracking_uri).get_model_version("tiny-topic", "1")
    model = mlflow.pyfunc.load_model(served.source)
    texts = [line["text"] for line in topics(3)]
    classifier = load_classifier(finished.account["registered"], finished.asked.tracking_uri)
    labels, probabilities = classifier.predict(texts)
    frame = pytest.importorskip("pandas").DataFrame({"text": texts})  # comes with mlflow
    answers = model.predict(frame)
    assert [answer["label"] for answer in answers] == labels
    assert np.allclose([a["probabilities"] for a in answers], probabilities, atol=1e-6)
    assert [column.name for column in model.metadata.signature.outputs] == [
        "label",
        "probabilities",
    ]


def test_a_classifier_embeds_too_but_fills_no_masks(finished: Finished) -> None:
    encoder = load_encoder(finished.account["registered"], finished.asked.tracking_uri)
    assert encoder.encode(["The sailor returns."]).shape == (1, 32)
    with pytest.raises(UserError, match="without a head for masked tokens"):
        fill_mask(encoder, "The [MASK] sails.", 1)


def test_an_encoder_has_no_classes(finished: Finished) -> None:
    with pytest.raises(UserError, match="finetune it on labels first"):
        load_classifier(finished.asked.model)


def test_the_same_command_trains_once_and_another_question_is_refused(finished: Finished) -> None:
    account, said = call(finished.asked)
    assert account == finished.account
    assert "step" not in said
    with pytest.raises(UserError, match="another training"):
        call(replace(finished.asked, training=replace(FEW_STEPS, seed=1)))


def test_items_of_another_kind_are_refused(finished: Finished) -> None:
    classifier = load_classifier(finished.account["registered"], finished.asked.tracking_uri)
    with pytest.raises(UserError, match="item 1 is tuple: give texts"):
        classifier.predict(["a", ("a", "b")])


@pytest.mark.parametrize(
    ("lines", "changes", "error", "said"),
    [
        (topics(60), {"labels": "nothing"}, UserError, "no record has .* 'nothing'"),
        ([*topics(60), {"text": "no label"}], {}, DataError, "1 of 61 records have no 'topic'"),
        (topics(60, 1), {}, UserError, "every training example is 'sea': one class"),
        (topics(60), {"text_pair_field": "second"}, UserError, "no record has .* 'second'"),
        (topics(60), {"test_ratio": 0.0}, UserError, "no example is left for test"),
    ],
)
def test_data_that_teaches_nothing_is_refused_in_a_line(
    finished: Finished,
    tmp_path: Path,
    lines: list[dict[str, Any]],
    changes: dict[str, Any],
    error: type[UserError],
    said: str,
) -> None:
    data = write_lines(tmp_path / "part.jsonl", lines)
    asked = ask(tmp_path, Path(finished.asked.model), data, **changes)
    with pytest.raises(error, match=said) as raised:
        call(asked)
    assert "\n" not in str(raised.value)


def test_a_class_that_only_the_test_knows_is_refused(finished: Finished, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "train.jsonl", topics(60))
    test = write_lines(tmp_path / "test.jsonl", [{"text": "a stranger", "topic": "law"}])
    asked = ask(tmp_path, Path(finished.asked.model), data, test=(str(test),))
    with pytest.raises(DataError, match="1 test examples are 'law'"):
        call(asked)


@pytest.mark.parametrize("ratios", [(-0.1, 0.1), (0.5, 0.5)])
def test_parts_that_leave_nothing_are_refused(ratios: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="together below 1"):
        Finetune(
            model="m", data=("d",), labels="l", validation_ratio=ratios[0], test_ratio=ratios[1]
        )
