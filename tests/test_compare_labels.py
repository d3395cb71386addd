"""A probe of labels in the gate: who tells them worse does not become champion."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cli import main
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.training.mlflow_client import open_client
from pipelines.use.compare_labels import compare_labels
from pipelines.use.compare_models import compare
from pipelines.use.comparison import judge
from pipelines.use.encoder import Encoder
from pipelines.use.registry import load_encoder, register
from tests.bundles import image_bundle, text_bundle
from tests.corpus import make_documents, serial_map
from tests.pictures import make_picture, make_tar, write_pictures

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "pictures"
    write_pictures(folder, num_pictures=300)
    return folder


def manifest_of(folder: Path) -> Manifest:
    return build(find_shards([str(folder)]), SourceConfig(heldout_ratio=0.0), serial_map)


def seeing(folder: Path) -> Encoder:
    return load_encoder(str(image_bundle(folder / "seeing", seed=1)))


def blind(folder: Path) -> Encoder:
    """Return an encoder to which all pictures are one."""
    encoder = load_encoder(str(image_bundle(folder / "blind", seed=1)))
    with torch.no_grad():
        for parameter in encoder.objective.parameters():
            parameter.zero_()
    return encoder


def test_who_tells_labels_worse_fails_and_who_tells_them_passes(
    folder: Path, tmp_path: Path
) -> None:
    data, good, bad = manifest_of(folder), seeing(tmp_path), blind(tmp_path)
    verdicts = {}
    for name, pair in {"worse": (bad, good), "better": (good, bad), "first": (good, None)}.items():
        (comparison,), notes = compare_labels(*pair, data, "cls")
        assert 100 < comparison.num_items < 200
        assert notes == []
        (found,) = judge([comparison], [0.0])
        verdicts[name] = found.passed
    assert verdicts == {"worse": False, "better": True, "first": True}
    ((same,), _) = compare_labels(good, good, data, "cls")
    assert np.array_equal(same.candidate, same.reference)


def test_features_that_are_not_finite_do_not_pass(folder: Path, tmp_path: Path) -> None:
    broken = load_encoder(str(image_bundle(tmp_path / "broken", seed=1)))
    with torch.no_grad():
        for parameter in broken.objective.parameters():
            parameter.fill_(torch.nan)
    (comparison,), _ = compare_labels(broken, seeing(tmp_path), manifest_of(folder), "cls")
    (found,) = judge([comparison], [-1e9])
    assert not found.passed


def labelled(path: Path, labels: list[tuple[int, int]], *others: tuple[str, bytes]) -> Manifest:
    """Write pictures by their number, each with a label, and other files."""
    members = [
        member
        for place, (picture, label) in enumerate(labels)
        for member in ((f"{place}.png", make_picture(picture)), (f"{place}.cls", b"%d" % label))
    ]
    path.write_bytes(make_tar([*members, *others]))
    return manifest_of(path)


def test_copies_count_once(tmp_path: Path) -> None:
    data = labelled(tmp_path / "copies.tar", [(i % 100, i % 2) for i in range(400)])
    (found,), notes = compare_labels(seeing(tmp_path), None, data, "cls")
    assert 30 <= found.num_items < 70
    assert notes == ["labels: 300 records are copies, left out"]


def test_of_very_many_items_some_are_drawn_and_said_to_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.use.compare_labels.MOST_ITEMS", 120)
    (found,), notes = compare_labels(seeing(tmp_path), None, manifest_of(folder), "cls")
    assert 30 <= found.num_items <= 90
    assert notes == ["labels: 180 records are more than the 120 that a probe takes, left out"]


def test_what_one_encoder_cannot_read_none_is_asked_for(tmp_path: Path) -> None:
    lab = io.BytesIO()
    Image.new("LAB", (40, 40), (120, 90, 60)).save(lab, "TIFF")
    others = [("tiff.tif", lab.getvalue()), ("tiff.cls", b"1"), ("none.png", make_picture(5000))]
    pictures = [(i, i % 2) for i in range(100)]
    data = labelled(tmp_path / "some.tar", pictures, *others)
    colours = seeing(tmp_path)
    grey = load_encoder(str(image_bundle(tmp_path / "grey", name="mnist-triplet")))
    read = [encoder.encode_readable([lab.getvalue()])[1] for encoder in (colours, grey)]
    assert [bool(reasons) for reasons in read] == [False, True]
    (found,), notes = compare_labels(colours, grey, data, "cls")
    assert 30 <= found.num_items <= 70
    assert notes == [
        "labels: 1 records have no 'cls', left out",
        "labels: 1 pictures cannot be decoded, left out",
    ]


@pytest.mark.parametrize("classes", [1, 20, 60])
def test_too_few_labels_are_refused(tmp_path: Path, classes: int) -> None:
    data = labelled(tmp_path / "few.tar", [(i, i % classes) for i in range(60)])
    said = f"60 items with {classes} values of 'cls' are too few: a probe learns"
    with pytest.raises(UserError, match=said):
        compare_labels(seeing(tmp_path), None, data, "cls")


def test_labels_compare_what_was_trained_for_something_else(folder: Path, tmp_path: Path) -> None:
    """A view of a picture is found again best by who was trained to find it."""
    autoencoder = load_encoder(str(image_bundle(tmp_path / "other", name="image-tiny-autoencoder")))
    data, triplets = manifest_of(folder), seeing(tmp_path)
    names = [c.name for c in compare(triplets, triplets, data, "cls").comparisons]
    assert names[0] == "accuracy of a linear probe of 'cls'"
    assert names[1].startswith("reciprocal rank")
    (only,), notes = compare(autoencoder, triplets, data, "cls")
    assert only.name == names[0]
    assert notes == [
        "compared by labels alone: the candidate was trained as autoencoder, the champion as "
        "contrastive"
    ]


def test_labels_compare_models_of_different_tokenizers(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    with (tmp_path / "docs.jsonl").open("w") as file:
        for document in make_documents(200, 4):
            fields = {"text": document.text, "topic": document.record % 2}
            file.write(json.dumps(fields) + "\n")
    found = json.loads(vocabulary.json)
    pieces = found["model"]["vocab"]
    *_, one, another = pieces
    pieces[one], pieces[another] = pieces[another], pieces[one]
    first = load_encoder(str(text_bundle(tmp_path / "text", vocabulary)))
    other = dataclasses.replace(first, pieces=Vocabulary(json.dumps(found)))
    (only,), notes = compare(other, first, manifest_of(tmp_path / "docs.jsonl"), "topic")
    assert only.num_items > 30
    assert notes[-1] == "compared by labels alone: the tokenizers differ"


def test_the_command_reports_the_probe_beside_what_it_always_compares(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_client(store)
    experiment = client.create_experiment("tests", artifact_location=(tmp_path / "a").as_uri())
    run_id = client.create_run(experiment).info.run_id
    bundle = image_bundle(tmp_path / "bundle", seed=1)
    for alias in ("champion", "candidate"):
        tags = {"rayssl.run_key": alias}
        register(bundle, tracking_uri=store, run_id=run_id, name="eye", alias=alias, tags=tags)
    words = ["promote", "eye", "--data", str(folder), "--tracking-uri", store, "--json"]
    assert main([*words, "--labels", "cls"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    names = [finding["name"] for finding in report["findings"]]
    assert names[:1] == ["accuracy of a linear probe of 'cls'"]
    assert len(names) == 2
    assert report["gate"]["labels"] == "cls"
