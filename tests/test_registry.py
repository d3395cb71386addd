"""Handover: a bundle comes back byte for byte or not at all; with a real MLflow on SQLite."""

import atexit
import importlib.metadata
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from pipelines.data.vocabulary import Vocabulary, VocabularyConfig
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.errors import StorageError
from pipelines.training.mlflow_client import open_client
from pipelines.use import registry
from pipelines.use.bundle import BundleError, manifest_sha256, verify_bundle, write_bundle
from pipelines.use.registry import Registered, load_encoder, register, resolve
from ssl_models import ObjectiveConfig, build_objective
from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguageConfig
from ssl_models.objective import Objective

TEXTS = ["Apollo was a god of music.", "a literal [MASK] and [SEP]", "", "light " * 40]
MAX_LENGTH = 16
TAGS = {"rayssl.run_key": "wikipedia-1"}


class Made(NamedTuple):
    """A bundle, and the objective whose weights it holds."""

    directory: Path
    objective: Objective
    vocabulary: Vocabulary


class Store(NamedTuple):
    """A registry with one version of `encoder`."""

    uri: str
    run_id: str
    registered: Registered


def bundle_of(
    directory: Path, objective: Objective, config: ObjectiveConfig, tokenizer: str
) -> None:
    write_bundle(
        directory,
        config={"objective": TypeAdapter(ObjectiveConfig).dump_python(config, mode="json")},
        state=objective.state_dict(),
        tokenizer_json=tokenizer,
        lineage={"fingerprint": "abc", "seed": 7},
        card="# An encoder\n",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    vocabulary = train_vocabulary(TEXTS, VocabularyConfig(size=300, min_frequency=1))
    encoder = BertConfig(
        vocab_size=vocabulary.size,
        max_length=MAX_LENGTH,
        hidden_size=8,
        intermediate_size=16,
        dropout=0.1,
    )
    config = MaskedLanguageConfig(encoder=encoder)
    torch.manual_seed(1)
    objective = build_objective(config).eval()
    directory = tmp_path_factory.mktemp("made") / "bundle"
    bundle_of(directory, objective, config, vocabulary.json)
    return Made(directory, objective, vocabulary)


@pytest.fixture(scope="module")
def store(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = open_client(uri)
    experiment = client.create_experiment("tests", artifact_location=(folder / "a").as_uri())
    run_id = client.create_run(experiment).info.run_id
    registered = register(
        made.directory, tracking_uri=uri, run_id=run_id, name="encoder", tags=TAGS
    )
    return Store(uri, run_id, registered)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """Return a copy of the bundle to spoil."""
    return Path(shutil.copytree(made.directory, tmp_path / "bundle"))


def direct_embeddings(made: Made) -> np.ndarray[Any, Any]:
    """Embed text by text, without padding."""
    features = []
    for ids in made.vocabulary.encode(TEXTS):
        row = [made.vocabulary.cls, *ids.tolist()[: MAX_LENGTH - 2], made.vocabulary.sep]
        input_ids = torch.tensor([row])
        batch = {
            "input_ids": input_ids,
            "token_type_ids": torch.zeros_like(input_ids),
            "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
        }
        with torch.no_grad():
            features.append(made.objective.encode(batch).numpy())
    return np.concatenate(features)


def test_a_bundle_comes_back(made: Made) -> None:
    manifest = verify_bundle(made.directory)

    names = {"config.json", "model.safetensors", "tokenizer.json", "lineage.json", "MODEL_CARD.md"}
    assert manifest.keys() == names
    assert {path.name for path in made.directory.iterdir()} == names | {"manifest.json"}
    assert json.loads((made.directory / "config.json").read_text())["format_version"] == 1
    state = load_encoder(str(made.directory)).state
    assert state.keys() == made.objective.state_dict().keys()
    for name, tensor in made.objective.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_bundle(
        tmp_path / "bundle",
        config={},
        state={"a": weight, "b": weight, "c": weight.T},
        tokenizer_json="{}",
        lineage={},
        card="",
    )
    assert verify_bundle(tmp_path / "bundle")["model.safetensors"]["bytes"] > 3 * 24


def test_a_bundle_is_not_overwritten(copy: Path) -> None:
    before = manifest_sha256(copy)
    with pytest.raises(StorageError, match=r"cannot write .*/bundle: Directory not empty"):
        write_bundle(copy, config={}, state={}, tokenizer_json="{}", lineage={}, card="new")

    verify_bundle(copy)
    assert manifest_sha256(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_every_flipped_byte_is_refused(copy: Path) -> None:
    files = sorted(copy.iterdir())
    draw = random.Random(7)
    for number in range(60):
        file = files[number % len(files)]
        data = file.read_bytes()
        position = draw.randrange(len(data))
        flipped = bytes([data[position] ^ 1 << draw.randrange(8)])
        file.write_bytes(data[:position] + flipped + data[position + 1 :])
        with pytest.raises(BundleError) as error:
            load_encoder(str(copy))
        assert "\n" not in str(error.value)
        file.write_bytes(data)
    verify_bundle(copy)


def test_every_flipped_bit_of_the_manifest_is_refused(copy: Path) -> None:
    """It has no hash of its own outside a registry, so a change must show in its spelling."""
    manifest = copy / "manifest.json"
    data = manifest.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(spoiled)
        with pytest.raises(BundleError):
            verify_bundle(copy)
    manifest.write_bytes(data.replace(b"\n", b" "))  # the same JSON
    with pytest.raises(BundleError, match="not as written"):
        verify_bundle(copy)


def test_the_message_names_the_file_and_what_to_do(copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(BundleError) as error:
        verify_bundle(copy)

    assert str(error.value) == (
        "model.safetensors is not what was registered: SHA-256 differs; "
        "download it again or register it anew"
    )


@pytest.mark.parametrize("name", ["extra.py", "__pycache__", ".hidden"])
def test_what_is_not_in_the_manifest_is_refused(copy: Path, name: str) -> None:
    (copy / name).mkdir()
    with pytest.raises(BundleError, match=f"{name} in .* is not in its manifest.json"):
        verify_bundle(copy)


def test_a_missing_file_and_a_missing_bundle_are_named(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer.json is missing"):
        verify_bundle(copy)
    with pytest.raises(BundleError, match="no bundle at"):
        verify_bundle(tmp_path / "nowhere")


def test_a_link_out_of_the_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "MODEL_CARD.md").rename(tmp_path / "card")
    (copy / "MODEL_CARD.md").symlink_to(tmp_path / "card")
    with pytest.raises(BundleError, match=r"MODEL_CARD.md .* not a plain file"):
        verify_bundle(copy)


def rewritten(copy: Path, made: Made, **changes: Any) -> str:
    """Return a bundle that verifies, but whose config was changed by its writer."""
    config = json.loads((made.directory / "config.json").read_text()) | changes
    state = made.objective.state_dict()
    shutil.rmtree(copy)
    write_bundle(
        copy, config=config, state=state, tokenizer_json=made.vocabulary.json, lineage={}, card=""
    )
    return str(copy)


def test_an_unknown_key_in_the_config_is_refused(copy: Path, made: Made) -> None:
    objective = json.loads((copy / "config.json").read_text())["objective"]
    objective["encoder"]["hiden_size"] = 8
    with pytest.raises(BundleError, match=r"objective\.encoder\.hiden_size: Unexpected keyword"):
        load_encoder(rewritten(copy, made, objective=objective))


def test_an_objective_that_this_rayssl_does_not_know_is_refused(copy: Path, made: Made) -> None:
    objective = json.loads((copy / "config.json").read_text())["objective"]
    with pytest.raises(BundleError, match=r"config\.json: objective: .*'mystery'.*'contrastive'"):
        load_encoder(rewritten(copy, made, objective=objective | {"kind": "mystery"}))


def test_weights_of_another_shape_are_refused(copy: Path, made: Made) -> None:
    objective = json.loads((copy / "config.json").read_text())["objective"]
    objective["encoder"]["hidden_size"] = 4
    with pytest.raises(BundleError, match=r"does not fit config\.json") as error:
        load_encoder(rewritten(copy, made, objective=objective))
    assert "\n" not in str(error.value)


def test_a_later_format_is_refused(copy: Path, made: Made) -> None:
    with pytest.raises(BundleError, match="format version 2, this rayssl reads 1"):
        load_encoder(rewritten(copy, made, format_version=2))


def test_the_encoder_embeds_as_the_objective_does(made: Made) -> None:
    encoder = load_encoder(str(made.directory))

    embeddings = encoder.encode(TEXTS)

    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, direct_embeddings(made), rtol=1e-5, atol=1e-6)
    assert encoder.encode([]).shape == (0, 8)
    many = encoder.encode(TEXTS * 40)
    np.testing.assert_allclose(many, np.tile(embeddings, (40, 1)), rtol=1e-5, atol=1e-6)


def test_control_tokens_in_a_text_are_plain_characters(made: Made) -> None:
    encoder = load_encoder(str(made.directory))
    control = {encoder.tokenizer.token_to_id(token) for token in ("[MASK]", "[SEP]")}
    assert not control & set(encoder.tokenizer.encode(TEXTS[1]).ids)


def test_a_loaded_encoder_can_be_trained(made: Made) -> None:
    encoder = load_encoder(str(made.directory))
    before = encoder.encode(TEXTS)
    parameters = list(encoder.objective.parameters())
    assert all(parameter.requires_grad for parameter in parameters)

    encoder.objective.train()
    ids = torch.tensor([[encoder.vocabulary.cls, 9, encoder.vocabulary.sep]])
    batch = {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }
    loss = encoder.objective.encode(batch).square().sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.optim.SGD(parameters, lr=1.0).step()

    assert np.abs(encoder.encode(TEXTS) - before).max() > 1e-3
    assert encoder.objective.training
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS))


def test_loading_leaves_the_random_numbers_of_the_caller_alone(made: Made) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_encoder(str(made.directory))
    assert torch.equal(torch.rand(2), expected)


def test_an_alias_and_a_number_lead_to_the_same_bytes(made: Made, store: Store) -> None:
    assert store.registered == (1, "models:/encoder/1")
    for uri in ("models:/encoder@candidate", "models:/encoder/1"):
        assert manifest_sha256(resolve(uri, store.uri)) == manifest_sha256(made.directory)
        np.testing.assert_allclose(
            load_encoder(uri, store.uri).encode(TEXTS),
            direct_embeddings(made),
            rtol=1e-5,
            atol=1e-6,
        )


def test_registering_again_makes_no_new_version(made: Made, store: Store) -> None:
    again = register(
        made.directory,
        tracking_uri=store.uri,
        run_id=store.run_id,
        name="encoder",
        alias="second",
        tags=TAGS,
    )
    client = open_client(store.uri)
    assert again == store.registered
    assert len(client.search_model_versions("name = 'encoder'")) == 1
    for alias in ("candidate", "second"):
        assert int(client.get_model_version_by_alias("encoder", alias).version) == 1


def test_the_version_tells_where_it_comes_from(made: Made, store: Store) -> None:
    client = open_client(store.uri)
    version = client.get_model_version("encoder", "1")
    assert version.tags == TAGS | {"rayssl.manifest_sha256": manifest_sha256(made.directory)}
    assert version.run_id == store.run_id
    (output,) = client.get_run(store.run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert version.source == logged.artifact_location
    assert logged.status == "READY"
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "encoder", "version": 1}]


def test_the_artifact_holds_no_code_and_no_pickle(store: Store) -> None:
    root = resolve("models:/encoder/1", store.uri).parent
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert "encoder/model.safetensors" in files
    suffixes = {Path(name).suffix for name in files}
    assert suffixes == {"", ".json", ".yaml", ".txt", ".md", ".safetensors"}
    requirements = (root / "requirements.txt").read_text().split()
    assert f"rayssl=={importlib.metadata.version('rayssl')}" in requirements
    assert not [line for line in requirements if "+" in line]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/encoder@champion", "'encoder' has no alias 'champion'. Known: candidate"),
        ("models:/encoder@candidat", "'encoder' has no alias 'candidat'. Did you mean 'candidate'"),
        ("models:/encoder/9", "'encoder' has no version 9"),
        ("models:/encodr@candidate", "no model 'encodr' is registered. Did you mean 'encoder'?"),
        ("models:/encoder", "is neither models:/NAME@ALIAS nor models:/NAME/VERSION"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(store: Store, uri: str, message: str) -> None:
    with pytest.raises(BundleError) as error:
        load_encoder(uri, store.uri)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_asking_where_there_is_no_registry_makes_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no registry at"):
        load_encoder("models:/encoder/1", f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_mlflow_itself_can_load_and_serve_it(
    made: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow.pyfunc
    from mlflow.models import validate_serving_input
    from mlflow.types import DataType

    root = str(resolve("models:/encoder/1", store.uri).parent)
    model = mlflow.pyfunc.load_model(root)

    (column,) = model.metadata.signature.inputs
    assert (column.name, column.type) == ("text", DataType.string)
    (output,) = model.metadata.signature.outputs
    assert (output.type, output.shape) == (np.dtype(np.float32), (-1, 8))
    expected = direct_embeddings(made)
    frame = pytest.importorskip("pandas").DataFrame({"text": TEXTS})  # comes with mlflow
    np.testing.assert_allclose(model.predict(frame), expected, rtol=1e-5, atol=1e-6)
    served = validate_serving_input(
        root,
        json.dumps({"dataframe_split": {"columns": ["text"], "data": [[text] for text in TEXTS]}}),
    )
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
    example = (Path(root) / "serving_input_example.json").read_text()
    assert validate_serving_input(root, example).shape == (1, 8)


def test_what_is_downloaded_goes_with_the_process(
    made: Made, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"tracking_uri": store.uri, "run_id": store.run_id}
    uri = register(made.directory, **where, name="far", tags=TAGS).model_uri
    monkeypatch.setattr(registry, "LOCAL_SCHEMES", ())  # as if they were on a server
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *call, **named: at_exit.append((call, named)))
    load_encoder(uri, store.uri)
    assert list(tmp_path.rglob("model.safetensors"))
    for (function, *arguments), named in at_exit:
        function(*arguments, **named)
    assert not list(tmp_path.iterdir())


def test_an_altered_artifact_is_refused_even_with_a_fitting_manifest(
    made: Made, store: Store
) -> None:
    registered = register(
        made.directory,
        tracking_uri=store.uri,
        run_id=store.run_id,
        name="forged",
        tags=TAGS,
    )
    directory = resolve(registered.model_uri, store.uri)
    rewritten(directory, made, note="forged")
    verify_bundle(directory)

    with pytest.raises(BundleError, match=r"manifest.json of models:/forged/1 is not what was"):
        load_encoder(registered.model_uri, store.uri)


def test_a_flipped_byte_of_what_the_registry_keeps_is_refused_by_us_and_by_mlflow(
    made: Made, store: Store
) -> None:
    import mlflow.pyfunc

    registered = register(
        made.directory, tracking_uri=store.uri, run_id=store.run_id, name="flipped", tags=TAGS
    )
    weights = resolve(registered.model_uri, store.uri) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    said = r"model\.safetensors is not what was registered: SHA-256 differs"
    with pytest.raises(BundleError, match=said):
        load_encoder(registered.model_uri, store.uri)
    with pytest.raises(BundleError, match=said):
        mlflow.pyfunc.load_model(str(weights.parent.parent))


def test_an_encoder_is_loaded_where_mlflow_may_neither_unpickle_nor_run_code_of_models(
    made: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second switch came with MLflow 3.18, which then refuses every `python_function`."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_ALLOW_MODEL_CODE_EXECUTION", "false")

    encoder = load_encoder("models:/encoder@candidate", store.uri)

    found = encoder.encode(TEXTS)
    np.testing.assert_allclose(found, direct_embeddings(made), rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad for parameter in encoder.objective.parameters())


def test_an_artifact_with_code_is_refused(made: Made, store: Store) -> None:
    registered = register(
        made.directory, tracking_uri=store.uri, run_id=store.run_id, name="coded", tags=TAGS
    )
    mlmodel = resolve(registered.model_uri, store.uri).parent / "MLmodel"
    text = mlmodel.read_text()
    assert "code: null" in text
    mlmodel.write_text(text.replace("code: null", "code: code"))

    with pytest.raises(BundleError, match="carries code in its flavour python_function"):
        load_encoder(registered.model_uri, store.uri)


def test_the_name_and_the_run_key_are_checked(made: Made, store: Store) -> None:
    for name, tags in (("a/b", TAGS), ("it's", TAGS), ("encoder", {"rayssl.other": "1"})):
        with pytest.raises(ValueError, match=r"model name|tags must hold"):
            register(
                made.directory, tracking_uri=store.uri, run_id=store.run_id, name=name, tags=tags
            )
