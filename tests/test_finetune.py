"""Fine-tuning end to end: labelled shards to a registered classifier that predicts."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.cli import main
from pipelines.data.manifest import content_hash
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, TrackingError, UserError
from pipelines.training.mlflow_client import open_client
from pipelines.use.bundle import manifest_sha256, verify_bundle
from pipelines.use.compare_models import compare
from pipelines.use.fill_mask import fill_mask
from pipelines.use.finetune import finetune
from pipelines.use.finetune_config import FinetuneConfig, LabelledData
from pipelines.use.labelled import PARTS, read
from pipelines.use.registry import load_classifier, load_encoder
from pipelines.use.versions import list_versions, versions_table
from pipelines.verbs_finetune import Finetune
from tests.corpus import build_manifest
from tests.labelled import (
    pairs,
    topics,
    write_image_encoder,
    write_lines,
    write_loose,
    write_shades,
    write_text_encoder,
)
from tests.pictures import make_picture

FEW_STEPS = FinetuneConfig(
    epochs=1, least_steps=40, evaluations=4, rows_per_step=16, learning_rate=3e-3
)


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
    """Return a question; `changes` are of what is read, or of the verb."""
    read: dict[str, Any] = {"data": (str(data),), "labels": "topic"}
    verb: dict[str, Any] = {
        "name": "topics",
        "runs": str(folder / "runs"),
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "training": FEW_STEPS,
    }
    of_data = {field.name for field in fields(LabelledData)}
    read |= {name: value for name, value in changes.items() if name in of_data}
    verb |= {name: value for name, value in changes.items() if name not in of_data}
    return Finetune(model=str(model), source=LabelledData(**read), **verb)


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
    in_test = [t for t in wrong if content_hash(t) < finished.asked.source.test_ratio * 2**64]
    assert len(in_test) == num_wrong


def test_the_classifier_is_linked_to_its_encoder(finished: Finished) -> None:
    client = open_client(finished.asked.tracking_uri)
    version = client.get_model_version("tiny-topic", "1")
    assert version.tags["rayssl.encoder"] == finished.asked.model
    lineage = json.loads((finished.dir / "bundle" / "lineage.json").read_text())
    assert lineage["encoder"] == finished.asked.model
    assert lineage["encoder_sha256"] == manifest_sha256(Path(finished.asked.model))
    (listed,) = list_versions("tiny-topic", finished.asked.tracking_uri)
    assert listed.figures["accuracy"] == finished.account["evaluation"]["test/accuracy"]
    assert "macro_f1 0." in versions_table([listed])
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


def test_what_is_for_encoders_alone_refuses_a_classifier_in_a_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, asked = finished.account["registered"], finished.asked
    plain, data = load_encoder(asked.model), asked.source.data[0]
    classifier = load_encoder(made, asked.tracking_uri)
    for candidate, champion in ((classifier, plain), (plain, classifier), (classifier, None)):
        with pytest.raises(UserError, match="the model is a classifier"):
            compare(candidate, champion, build_manifest([Path(data)]))
    for words in (
        ["evaluate", made, "--data", data],
        ["evaluate", made, "--data", data, "--labels", "topic", "--num-labelled", "40"],
        ["label-table", made, data, "--labels", "topic"],
        ["promote", "tiny-topic", "--data", data],
        ["export", made, "--out", str(tmp_path / "exported")],
    ):
        assert main([*words, "--tracking-uri", asked.tracking_uri]) == 2, words
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "the model is a classifier" in said[0]


def test_more_than_fits_into_memory_is_refused(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.use.labelled.room_for_examples", lambda: 1000)
    with pytest.raises(UserError, match=r"of labelled data are too much: .* name a part of them"):
        call(replace(finished.asked, name="large"))


def test_an_encoder_has_no_classes(finished: Finished) -> None:
    with pytest.raises(UserError, match="finetune it on labels first"):
        load_classifier(finished.asked.model)


def test_the_same_command_trains_once_and_another_question_is_refused(finished: Finished) -> None:
    account, said = call(finished.asked)
    assert account == finished.account
    assert "step" not in said
    with pytest.raises(UserError, match="another training"):
        call(replace(finished.asked, training=replace(FEW_STEPS, seed=1)))


def test_what_was_registered_elsewhere_is_registered_here_too(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(finished.asked.runs, finished.asked.name, "bundle")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.use.finetune.REGISTRY_TIMEOUT_SECONDS", 0.5)
        with pytest.raises(TrackingError, match="check the tracking URI"):
            call(replace(finished.asked, tracking_uri="http://127.0.0.1:9"))
    verify_bundle(bundle)  # a typo costs nothing

    elsewhere = f"sqlite:///{tmp_path}/other.db"
    account, said = call(replace(finished.asked, tracking_uri=elsewhere))
    assert "steps at most" in said
    assert account["evaluation"] == finished.account["evaluation"]
    assert load_classifier(account["registered"], elsewhere).classes
    assert json.loads((bundle / "lineage.json").read_text())["mlflow_run"] == account["mlflow_run"]
    call(finished.asked)  # as the other tests know it


@pytest.mark.slow
def test_a_run_that_is_made_anew_is_another_run_of_mlflow(
    finished: Finished, tmp_path: Path
) -> None:
    """Its points would stand beside those of the first."""
    kept = finished.dir.rename(tmp_path / "kept")
    account, _ = call(replace(finished.asked, tracking_uri=f"sqlite:///{tmp_path}/other.db"))
    keys = [json.loads((d / "finetune.json").read_text())["key"] for d in (kept, finished.dir)]
    assert keys[0] != keys[1]
    assert account["evaluation"] == finished.account["evaluation"]
    shutil.rmtree(finished.dir)
    kept.rename(finished.dir)


def test_a_name_is_no_path_and_not_that_of_a_pretraining(finished: Finished) -> None:
    with pytest.raises(UserError, match=r"--name '\.\./x': use letters"):
        call(replace(finished.asked, name="../x"))
    pretrained = Path(finished.asked.runs) / "pretrained"
    pretrained.mkdir()
    (pretrained / "run.json").write_text("{}")
    with pytest.raises(UserError, match="run 'pretrained' is a pretraining: choose another"):
        call(replace(finished.asked, name="pretrained"))


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
        (topics(60), {"register": "a/b"}, UserError, "--register 'a/b': use letters"),
        ([*topics(60), {"text": "half", "topic": "\ud800"}], {}, DataError, "1 of 61 records"),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 1.0},
        {"learning_rate": 0.0},
        {"warmup_ratio": -0.1},
        {"weight_decay": -1.0},
        {"least_steps": -1},
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_read(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        FinetuneConfig(**changes)


@pytest.mark.parametrize("ratios", [(-0.1, 0.1), (0.5, 0.5)])
def test_parts_that_leave_nothing_are_refused(ratios: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="together below 1"):
        LabelledData(data=("d",), labels="l", validation_ratio=ratios[0], test_ratio=ratios[1])


def test_the_command_reads_its_flags_and_says_what_it_did(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = finished.asked
    flags = {
        "--labels": "topic",
        "--name": asked.name,
        "--runs": asked.runs,
        "--tracking-uri": asked.tracking_uri,
        "--training.epochs": "1",
        "--training.least-steps": "40",
        "--training.evaluations": "4",
        "--training.rows-per-step": "16",
        "--training.learning-rate": "3e-3",
    }
    words = [word for flag in flags.items() for word in flag]
    assert main(["finetune", asked.model, *asked.source.data, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == finished.account


@pytest.mark.slow
def test_pairs_and_three_workers_go_the_same_way(finished: Finished, tmp_path: Path) -> None:
    model = Path(finished.asked.model)
    data = write_lines(tmp_path / "pairs.jsonl", pairs(400))
    changes = {
        "labels": "label",
        "text_pair_field": "second",
        "training": replace(FEW_STEPS, least_steps=300),
    }
    alone = ask(tmp_path, model, data, **changes)
    account, _ = call(alone)
    assert account["evaluation"]["test/accuracy"] > 0.9
    three, _ = call(replace(alone, name="three", workers=3))
    one, other = (
        load_file(tmp_path / "runs" / name / "fitted" / "model.safetensors")
        for name in ("topics", "three")
    )
    assert account["best_step"] == three["best_step"]
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-3), name
    served = open_client(alone.tracking_uri).get_model_version("tiny-label", "1")
    frame = pytest.importorskip("pandas").DataFrame(
        {"text": ["anchor the 1", "anchor the 2"], "text_pair": ["anchor", "rose"]}
    )
    answers = mlflow.pyfunc.load_model(served.source).predict(frame)
    assert [answer["label"] for answer in answers] == ["same", "other"]


def test_pictures_have_the_same_labels_in_every_form(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del ray_session
    encoder = load_encoder(str(write_image_encoder(tmp_path / "shapes")))
    shades = write_shades(tmp_path / "tar" / "shades.tar", 60)
    write_loose(tmp_path / "loose", shades)
    (tmp_path / "parquet").mkdir()
    pictures = {"photo": list(shades), "shade": list(shades.values())}
    pq.write_table(pa.table(pictures), tmp_path / "parquet" / "shades.parquet")
    for form, label in {"tar": "cls", "loose": "folder", "parquet": "shade"}.items():
        source = LabelledData(data=(str(tmp_path / form),), labels=label, image_field="photo")
        data, _ = read(source, encoder, tmp_path / form)
        found = {e.item: e.label for part in PARTS for e in getattr(data, part)}
        assert found == shades, form
    again = replace(source, validation=source.data, test=source.data)
    with pytest.raises(UserError, match="no example is left for training"):
        read(again, encoder, tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_loose_pictures_are_classified_and_broken_ones_left_out(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del finished  # only its Ray
    model = write_image_encoder(tmp_path / "shapes")
    folder = tmp_path / "pictures"
    shades = write_shades(tmp_path / "shades.tar", 120)
    write_loose(folder, shades)
    (folder / "dark" / "broken.jpeg").write_bytes(make_picture(0)[:-100])
    asked = ask(
        tmp_path,
        model,
        folder,
        labels="folder",
        training=replace(FEW_STEPS, least_steps=40, learning_rate=1e-2),
    )
    words = ["--name", "shades", "--runs", asked.runs, "--tracking-uri", asked.tracking_uri]
    words += ["--training.epochs", "1", "--training.least-steps", "40"]
    words += ["--training.evaluations", "4", "--training.learning-rate", "1e-2", "--json"]
    assert main(["finetune", str(model), str(folder), "--labels", "folder", *words]) == 0
    said = capsys.readouterr().out
    account = json.loads(said.splitlines()[-1])
    assert "1 of 121 pictures cannot be decoded: left out" in said
    assert account["evaluation"]["test/accuracy"] > 0.9
    classifier = load_classifier(account["registered"], asked.tracking_uri)
    with pytest.raises(UserError, match="the model is a classifier"):
        compare(classifier.encoder, load_encoder(str(model)), build_manifest([folder]))
    told = classifier.predict(list(shades))
    right = [a == b for a, b in zip(told.labels, shades.values(), strict=True)]
    assert np.mean(right) > 0.9
    with pytest.raises(DataError, match="picture 0 of 1"):
        classifier.predict([b"no picture"])
    served = open_client(asked.tracking_uri).get_model_version("shapes-folder", "1")
    answers = mlflow.pyfunc.load_model(served.source).predict({"image": [next(iter(shades))]})
    assert answers[0]["label"] == told.labels[0]
