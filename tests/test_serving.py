"""`mlflow models serve` answers with our embeddings, or says in one line what was wrong."""

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import validate_serving_input

from pipelines.data.vocabulary import Vocabulary
from pipelines.training.mlflow_client import open_client
from pipelines.use.registry import load_encoder, register, resolve
from tests.bundles import image_bundle, text_bundle
from tests.pictures import make_picture
from tests.serving import ask, served

COLUMNS = {"text": "text", "images": "image"}
ITEMS: dict[str, list[Any]] = {
    "text": ["The captain anchors near the island.", "", "a literal [MASK]", "storm " * 60],
    "images": [make_picture(number) for number in range(3)],
}
BROKEN: dict[str, Any] = {"text": None, "images": b"<html>"}
SAID = {
    "text": "text 0 of 1 is no string: None",
    "images": "picture 0 of 1: quarantined:not-an-image; leave it out; in JSON, base64 is read in ",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> str:
    """Return a registry of both kinds of encoder, whose champion is not the newest version."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = open_client(uri)
    experiment = client.create_experiment("tests", artifact_location=(folder / "a").as_uri())
    run_id = client.create_run(experiment).info.run_id
    for version, alias in enumerate(("champion", "candidate"), 1):
        bundles = {
            "text": text_bundle(folder / f"text-{version}", vocabulary, seed=version),
            "images": image_bundle(folder / f"images-{version}", seed=version),
        }
        for name, bundle in bundles.items():
            tags = {"rayssl.run_key": f"{name}-{version}"}
            register(bundle, tracking_uri=uri, run_id=run_id, name=name, alias=alias, tags=tags)
    return uri


def body(modality: str, items: list[Any], column: str = "") -> str:
    """Return a request, in which the bytes of pictures are base64."""
    data = [
        [base64.b64encode(item).decode() if isinstance(item, bytes) else item] for item in items
    ]
    return json.dumps({"dataframe_split": {"columns": [column or COLUMNS[modality]], "data": data}})


@pytest.mark.parametrize("modality", COLUMNS)
def test_mlflow_finds_the_example_fit_to_be_served(store: str, modality: str) -> None:
    root = resolve(f"models:/{modality}@champion", store).parent
    encoder = load_encoder(f"models:/{modality}@champion", store)
    example = (root / "serving_input_example.json").read_text()
    assert validate_serving_input(str(root), example).shape == (1, encoder.dimension)
    served = validate_serving_input(str(root), body(modality, ITEMS[modality]))
    np.testing.assert_array_equal(served, encoder.encode(ITEMS[modality]))


@pytest.mark.parametrize("modality", COLUMNS)
def test_what_cannot_be_embedded_is_the_fault_of_who_asked(store: str, modality: str) -> None:
    model = mlflow.pyfunc.load_model(str(resolve(f"models:/{modality}@champion", store).parent))
    with pytest.raises(MlflowException) as refused:
        model.predict({COLUMNS[modality]: [BROKEN[modality]]})
    assert refused.value.get_http_status_code() == 400
    assert SAID[modality] in refused.value.message


@pytest.fixture
def addresses(store: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Serve the champions of both models, and return their addresses."""
    with ExitStack() as stack:
        yield {
            modality: stack.enter_context(
                served(f"models:/{modality}@champion", store, tmp_path / modality)
            )
            for modality in COLUMNS
        }


@pytest.mark.slow
def test_the_champions_are_served(store: str, addresses: dict[str, str]) -> None:
    for modality, address in addresses.items():
        items = ITEMS[modality]
        expected = load_encoder(f"models:/{modality}/1", store).encode(items)
        answer = ask(address, body(modality, items))
        assert answer.status == 200
        found = np.array(answer.body["predictions"], dtype=np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

        wrong = {
            "Model is missing inputs": body(modality, items, column="other"),
            SAID[modality]: body(modality, [BROKEN[modality]]),
            "must be a JSON dictionary": "[]",
            "valid JSON": "nothing",
        }
        for said, request in wrong.items():
            status, told = ask(address, request)
            assert status == 400
            assert said in told["message"]
            assert "stack_trace" not in told
