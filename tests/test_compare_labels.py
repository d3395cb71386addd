"""A probe of labels in the gate: who tells them worse does not become champion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.cli import main
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.errors import UserError
from pipelines.training.mlflow_client import open_client
from pipelines.use.compare_labels import compare_labels
from pipelines.use.comparison import judge
from pipelines.use.encoder import Encoder
from pipelines.use.registry import load_encoder, register
from tests.bundles import image_bundle
from tests.corpus import serial_map
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
        comparison = compare_labels(*pair, data, "cls")
        assert 100 < comparison.num_items < 200
        (found,) = judge([comparison], [0.0])
        verdicts[name] = found.passed
    assert verdicts == {"worse": False, "better": True, "first": True}
    same = compare_labels(good, good, data, "cls")
    assert np.array_equal(same.candidate, same.reference)


def labelled(path: Path, labels: list[tuple[int, int]]) -> Manifest:
    """Write pictures by their number, each with a label."""
    members = [
        member
        for place, (picture, label) in enumerate(labels)
        for member in ((f"{place}.png", make_picture(picture)), (f"{place}.cls", b"%d" % label))
    ]
    path.write_bytes(make_tar(members))
    return manifest_of(path)


def test_copies_of_what_was_learned_are_not_asked_for(tmp_path: Path) -> None:
    data = labelled(tmp_path / "copies.tar", [(i % 20, i % 2) for i in range(400)])
    found = compare_labels(seeing(tmp_path), None, data, "cls")
    assert 0 < found.num_items < 400
    assert found.num_items % 20 == 0  # of each picture all copies, or none


def test_too_few_labels_are_refused(tmp_path: Path) -> None:
    data = labelled(tmp_path / "few.tar", [(i, i) for i in range(60)])
    with pytest.raises(UserError, match="items with a 'cls', of 60 classes, are too few to learn"):
        compare_labels(seeing(tmp_path), None, data, "cls")


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
    assert names[1:] == ["accuracy of a linear probe of 'cls'"]
    assert report["gate"]["labels"] == "cls"
