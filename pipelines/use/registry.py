"""Handover of an encoder through the MLflow model registry, and back.

The artifact holds a bundle (`bundle.py`) and no code, and nothing of it is unpickled:

    MLmodel, requirements.txt ...   flavours `rayssl` and `python_function`, signature, example
    encoder/                        the bundle, as it was written
    version tag                     rayssl.manifest_sha256: what `resolve` compares the bundle with
"""

import atexit
import importlib.metadata
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import Discriminator, TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from pipelines import VERSION
from pipelines.config import MODEL_NAME
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import brief, nearest
from pipelines.training.mlflow_client import answered, open_client, sqlite_path
from pipelines.training.tracking import RUN_KEY_TAG
from pipelines.use.bundle import ADVICE, FORMAT_VERSION, BundleError, manifest_sha256, verify_bundle
from pipelines.use.classifier import Classifier
from pipelines.use.encoder import Encoder
from pipelines.use.hf_layout import hf_sha256, is_hf_layout, read_hf_layout
from pipelines.use.serving import EXAMPLES, ServedClassifier, ServedEncoder
from ssl_models import ModelConfig, build_objective

MANIFEST_TAG = "rayssl.manifest_sha256"
RECIPE_TAG = "rayssl.recipe"
FLAVOR = "rayssl"
LOADER_MODULE = "pipelines.use.registry"
BUNDLE_FOLDER = "encoder"
REQUIREMENTS = ("rayssl", "mlflow", "numpy", "pydantic", "safetensors", "torch")
READERS = {
    "text": ("tokenizers",),
    "images": ("opencv-python-headless", "pillow", "simplejpeg"),
}
"""Packages that an encoder of a modality needs beside."""
LOCAL_SCHEMES = ("", "file")
"""Of artifacts that are read where they are; others are downloaded."""
CLASSES = "classes"
"""The key in the config of a bundle that only a classifier has."""

MODEL_URI = re.compile(rf"models:/({MODEL_NAME.pattern})(?:@([\w.\-]+)|/(\d+))")


class Registered(NamedTuple):
    """A version of a registered model."""

    version: int
    model_uri: str
    """`models:/NAME/VERSION`, which always means the same bytes."""


def load_encoder(uri: str, tracking_uri: str = "sqlite:///mlflow.db") -> Encoder:
    """Return the encoder of `open_model`."""
    return open_model(uri, tracking_uri)[2]


def load_classifier(uri: str, tracking_uri: str = "sqlite:///mlflow.db") -> Classifier:
    """Return the classifier of `open_model`.

    Raises:
        UserError: If it is an encoder without classes.
    """
    return Classifier(load_encoder(uri, tracking_uri))


def open_model(uri: str, tracking_uri: str) -> tuple[str, str, Encoder]:
    """Return URI, SHA-256 and encoder of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder.

    The URI has a version instead of an alias; the hash stands for the whole model.
    The folder is a bundle, a finished run, or a model as transformers saves it (`hf_layout.py`).

    Raises:
        BundleError: If there is none, if it is not byte for byte what was registered, or if it is
            a model of transformers that is not the BERT of this package.
    """
    if is_hf_layout(folder := Path(uri)):
        encoder = _build(*read_hf_layout(folder), is_whole=False)
        return uri, hf_sha256(folder), encoder
    pinned = pin(uri, tracking_uri)
    directory = resolve(pinned, tracking_uri)
    return pinned, manifest_sha256(directory), _read_encoder(directory)


def _read_encoder(directory: Path) -> Encoder:
    """Read a verified bundle."""
    config = json.loads((directory / "config.json").read_text())
    if config.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"config.json has format version {config.get('format_version')}, this rayssl reads "
            f"{FORMAT_VERSION}: use the rayssl that wrote it"
        )
    state: dict[str, Tensor] = load_file(directory / "model.safetensors")
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.exists() and "images" not in config:
        raise BundleError(f"tokenizer.json is missing in {directory}: {ADVICE}")
    vocabulary = Vocabulary(tokenizer.read_text()) if tokenizer.exists() else None
    return _build(config, state, vocabulary, is_whole=True)


def _build(
    config: dict[str, Any],
    state: dict[str, Tensor],
    vocabulary: Vocabulary | None,
    *,
    is_whole: bool,
) -> Encoder:
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(Annotated[ModelConfig, Discriminator("kind")])
    try:
        objective_config = adapter.validate_python(config.get("objective"), extra="forbid")
        with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
            torch.manual_seed(0)
            objective = build_objective(objective_config)
        drawn = objective.state_dict()
        left = {k: drawn[k] for k in drawn if k.startswith(objective.pretraining_only)}
        found = objective.load_state_dict(left | state, strict=is_whole).missing_keys
        fresh = [*found, *(name for name in left if name not in state)]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("objective", *first["loc"][1:]))
        raise BundleError(f"config.json: {where}: {first['msg']}") from error
    except RuntimeError as error:
        what = " ".join(str(error).split())  # torch lists every tensor on a line of its own
        said = brief(what, 200)
        raise BundleError(f"model.safetensors does not fit config.json: {said}") from error
    return Encoder(config, vocabulary, objective.eval(), tuple(fresh))


def pin(uri: str, tracking_uri: str) -> str:
    """Return `models:/NAME/VERSION` for what an alias names now; a folder as it is.

    Raises:
        BundleError: If there is no such model.
    """
    if not uri.startswith("models:"):
        return uri
    version = _find_version(uri, tracking_uri)
    return f"models:/{version.name}/{version.version}"


def resolve(uri: str, tracking_uri: str) -> Path:
    """Return a verified local bundle directory; an alias is looked up once.

    What lies on a server is downloaded into a folder that goes with the process.

    Raises:
        BundleError: If there is none, if it holds code, or if it is not what was registered.
    """
    if not uri.startswith("models:"):
        path = Path(uri)
        directory = path / "bundle" if (path / "run.json").exists() else path
        verify_bundle(directory)
        return directory
    version = _find_version(uri, tracking_uri)
    root = _download(version.name, version.version, tracking_uri)
    _refuse_code(root, uri)
    verify_bundle(root / BUNDLE_FOLDER)
    if manifest_sha256(root / BUNDLE_FOLDER) != version.tags.get(MANIFEST_TAG):
        raise BundleError(
            f"manifest.json of {uri} is not what was registered: SHA-256 differs; register it anew"
        )
    return root / BUNDLE_FOLDER


def open_registry(tracking_uri: str, wanted: str) -> Any:
    """Return an `MlflowClient` of a registry that is there, to read from.

    Raises:
        BundleError: If there is none, where what is `wanted` could be.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        raise BundleError(f"{wanted}: there is no registry at {tracking_uri}; name one that exists")
    return open_client(tracking_uri)


def _find_version(uri: str, tracking_uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise BundleError(f"{uri} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
    client = open_registry(tracking_uri, uri)
    name, alias, number = match.groups()
    try:
        if alias is None:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BundleError(f"{uri}: MLflow did not answer: {brief(error)}") from error
    names = {model.name: model for model in client.search_registered_models(max_results=1000)}
    if not names:
        raise BundleError(f"{uri}: no model is registered yet; register one")
    if name not in names:
        raise BundleError(f"{uri}: no model {name!r} is registered.{nearest(name, names)}")
    if alias is None:
        raise BundleError(f"{uri}: {name!r} has no version {number}")
    aliases = names[name].aliases
    hint = nearest(alias, aliases) if aliases else " It has none."
    raise BundleError(f"{uri}: {name!r} has no alias {alias!r}.{hint}")


def _download(name: str, version: str, tracking_uri: str) -> Path:
    """Return a local directory of the artifacts.

    Not by their models:/ URI, which MLflow would look up in its global tracking store.
    """
    from mlflow.artifacts import download_artifacts

    with answered(tracking_uri, "try again once it gives the model") as client:
        uri = client.get_model_version_download_uri(name, version)
        folder = None
        if urlsplit(uri).scheme not in LOCAL_SCHEMES:
            folder = tempfile.mkdtemp(prefix="rayssl-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        found = download_artifacts(artifact_uri=uri, tracking_uri=tracking_uri, dst_path=folder)
    return Path(found)


def _refuse_code(root: Path, uri: str) -> None:
    from mlflow.models import Model

    flavors = Model.load(str(root)).flavors
    if FLAVOR not in flavors:
        raise BundleError(f"{uri} is no rayssl encoder: its flavours are {', '.join(flavors)}")
    for name, flavor in flavors.items():
        if flavor.get("code") or flavor.get("model_code_path"):
            raise BundleError(f"{uri} carries code in its flavour {name}: refused")


def register(
    bundle_dir: Path,
    *,
    tracking_uri: str,
    run_id: str,
    name: str,
    alias: str = "candidate",
    tags: dict[str, str],
) -> Registered:
    """Register a bundle as a version of `name` and point `alias` at it.

    The same bundle of the same run is registered once, however often this is called. `tags` are
    those of the version, `rayssl.run_key` among them.

    Raises:
        BundleError: If the bundle was altered since it was written.
        ValueError: If the name cannot be one, or the run key is missing.
    """
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"model name {name!r}: use letters, digits, space and _ . -")
    if RUN_KEY_TAG not in tags:
        raise ValueError(f"tags must hold {RUN_KEY_TAG}, got {sorted(tags)}")
    verify_bundle(bundle_dir)
    client = open_client(tracking_uri)
    version_tags = {**tags, MANIFEST_TAG: manifest_sha256(bundle_dir)}
    version = _registered_before(client, name, version_tags)
    if version is None:
        version = _register_anew(client, bundle_dir, run_id, name, version_tags)
    client.set_registered_model_alias(name, alias, str(version))
    return Registered(version, f"models:/{name}/{version}")


def _registered_before(client: Any, name: str, tags: dict[str, str]) -> int | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if all(version.tags.get(key) == tags[key] for key in (RUN_KEY_TAG, MANIFEST_TAG)):
            return int(version.version)
    return None


def _register_anew(
    client: Any, bundle_dir: Path, run_id: str, name: str, tags: dict[str, str]
) -> int:
    """Log the bundle and make it a version.

    `mlflow.models.Model.log` would do it in one call, but through the global tracking URI.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    experiment_id = client.get_run(run_id).info.experiment_id
    encoder = load_encoder(str(bundle_dir))
    kind = "classifier" if CLASSES in encoder.config else "encoder"
    logged = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, tags=tags, model_type=kind
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        _save_model(Path(folder, "model"), bundle_dir, encoder, model)
        client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not models:/MODEL_ID, which a SQLite store would look up in the global tracking store.
    source = logged.artifact_location
    card = (bundle_dir / "MODEL_CARD.md").read_text()
    version = client.create_model_version(
        name,
        source,
        run_id=run_id,
        tags=tags,
        description="\n\n".join(card.split("\n\n")[:2]).strip(),  # its title and first paragraph
        model_id=logged.model_id,
    )
    link = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
    return int(version.version)


def _save_model(path: Path, bundle_dir: Path, encoder: Encoder, model: Any) -> None:
    """Write the MLflow model directory around a copy of the bundle."""
    import mlflow.pyfunc
    import pandas  # comes with mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    kind, column, example = EXAMPLES[encoder.modality]
    columns = [column, "text_pair"] if encoder.config.get("pairs") else [column]
    outputs = [TensorSpec(np.dtype(np.float32), (-1, encoder.dimension))]
    if CLASSES in encoder.config:
        outputs = [
            ColSpec(DataType.string, "label"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    model.add_flavor(FLAVOR, format_version=FORMAT_VERSION, bundle=BUNDLE_FOLDER)
    requirements = sorted(REQUIREMENTS + READERS[encoder.modality])
    mlflow.pyfunc.save_model(
        str(path),
        loader_module=LOADER_MODULE,
        mlflow_model=model,
        signature=ModelSignature(
            inputs=Schema([ColSpec(kind, name) for name in columns]), outputs=Schema(outputs)
        ),
        # Not a dict, which would be served as `inputs`: of those MLflow decodes no base64.
        input_example=pandas.DataFrame({name: [example] for name in columns}),
        pip_requirements=[_pin(requirement) for requirement in requirements],
    )
    shutil.copytree(bundle_dir, path / BUNDLE_FOLDER)


def _pin(requirement: str) -> str:
    """Return NAME==VERSION without a local part such as +cpu, which no index has."""
    if requirement == "rayssl":  # a copy of the code, as a job gets it, tells no metadata
        return f"{requirement}=={VERSION}"
    return f"{requirement}=={importlib.metadata.version(requirement).partition('+')[0]}"


def _load_pyfunc(path: str) -> ServedEncoder | ServedClassifier:
    """Load for `mlflow.pyfunc.load_model`, which cannot compare with the version's tag."""
    encoder = load_encoder(str(Path(path, BUNDLE_FOLDER)))
    if CLASSES in encoder.config:
        return ServedClassifier(Classifier(encoder))
    return ServedEncoder(encoder)
