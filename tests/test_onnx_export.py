"""The ONNX graph gives the encoder's embeddings to those who have its folder alone."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer
from torch import nn

from pipelines.cli import main
from pipelines.data.images import ImageConfig, ImageRows
from pipelines.data.views import ViewConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, UserError
from pipelines.use.encoder import Encoder
from pipelines.use.onnx_export import Parity, export, parity
from ssl_models import build_objective
from ssl_models.autoencoder import AutoencoderConfig
from ssl_models.bert import BertConfig
from ssl_models.classification import ClassificationConfig
from ssl_models.contrastive import ContrastiveConfig
from ssl_models.image_encoder import ImageEncoderConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.resnet import ResNetConfig
from ssl_models.vit import ViTConfig
from tests.bundles import text_bundle

SIZE, LONGEST_ROW = 32, 24
SHA256 = "1a" * 32
TEXTS = [
    "The captain anchors near the island.",
    "a literal [MASK] and [SEP], Naïve CAFÉ",
    "",
    "storm " * 60,
    "the reef",
]


class Exported(NamedTuple):
    """An encoder and what was written of it."""

    encoder: Encoder
    folder: Path
    found: Parity


def bert(vocabulary: Vocabulary) -> Encoder:
    """Return an encoder with more positions than its rows have tokens, and weights far from 0."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_length": 40}
    config = MaskedLanguageConfig(encoder=BertConfig(vocab_size=vocabulary.size, **sizes))
    torch.manual_seed(0)
    objective = build_objective(config).eval()
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.3)
    described = {"objective": asdict(config), "text": {"max_length": LONGEST_ROW}}
    return Encoder(described, vocabulary, objective)


def of_images(encoder: ImageEncoderConfig, *, drawn: bool = False) -> Encoder:
    config: AutoencoderConfig | ContrastiveConfig = (
        AutoencoderConfig(encoder=encoder, image_size=SIZE, decoder_width=8)
        if drawn
        else ContrastiveConfig(encoder=encoder)
    )
    images = ImageConfig(views=ViewConfig(size=SIZE), channels=1 if encoder.channels == 1 else 3)
    torch.manual_seed(0)
    described = {"objective": asdict(config), "images": asdict(images)}
    objective = build_objective(config).eval()
    for parameter in objective.parameters():
        if parameter.dim() == 1:  # a fresh ResNet multiplies its residuals by 0
            nn.init.normal_(parameter, std=0.3)
    return Encoder(described, None, objective)


def resnet(vocabulary: Vocabulary) -> Encoder:
    del vocabulary
    statistics: dict[str, Any] = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3)}
    return of_images(ResNetConfig(width=4, **statistics))


def deep_resnet(vocabulary: Vocabulary) -> Encoder:
    del vocabulary
    return of_images(ResNetConfig(depth=50, stem="large", width=4, channels=1))


def vit(vocabulary: Vocabulary) -> Encoder:
    del vocabulary
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    return of_images(ViTConfig(patch_size=8, num_layers=2, **sizes), drawn=True)


@pytest.fixture(
    scope="module",
    params=[bert, *(pytest.param(f, marks=pytest.mark.slow) for f in (resnet, deep_resnet, vit))],
)
def exported(
    request: pytest.FixtureRequest, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    make: Callable[[Vocabulary], Encoder] = request.param
    encoder, folder = make(vocabulary), tmp_path_factory.mktemp("onnx") / "graph"
    return Exported(encoder, folder, export(encoder, SHA256, folder))


def inputs(made: Exported, items: list[Any]) -> dict[str, NDArray[Any]]:
    """Return what the graph takes, from texts or from pixels."""
    if made.encoder.modality == "images":
        return {"image": np.stack(items)}
    tokenizer = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    encodings = tokenizer.encode_batch(items)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], dtype=np.int64),
    }


@torch.no_grad()
def test_the_graph_gives_our_embeddings_of_any_number_and_length_of_rows(
    exported: Exported,
) -> None:
    encoder, folder, found = exported
    session = InferenceSession(folder / "model.onnx")
    shapes: dict[str, list[Any]]
    if encoder.modality == "text":
        items, expected = TEXTS, encoder.encode(TEXTS)
        shapes = {name: ["rows", "length"] for name in ("input_ids", "attention_mask")}
    else:
        shape = encoder.image_config.channels, SIZE, SIZE
        items = [*np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)]
        expected = encoder.objective.encode({"image": torch.from_numpy(np.stack(items))}).numpy()
        shapes = {"image": ["rows", *shape]}
    assert {given.name: given.shape for given in session.get_inputs()} == shapes
    assert np.abs(expected).max() > 0.1
    for start, end in ((0, 1), (2, 3), (3, 5), (0, 5)):
        (embeddings,) = session.run(["embeddings"], inputs(exported, items[start:end]))
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected[start:end], rtol=1e-4, atol=1e-5)
    assert found.items == 12
    assert found.max_error < 1e-5 * found.largest


def test_the_graph_tells_of_the_model_and_not_of_the_machine(exported: Exported) -> None:
    encoder, folder, _ = exported
    graph = onnx.load(folder / "model.onnx")
    told = {entry.key: entry.value for entry in graph.metadata_props}
    preprocess = json.loads(told.pop("rayssl.preprocess"))
    assert told == {
        "rayssl.model_sha256": SHA256,
        "rayssl.modality": encoder.modality,
        "rayssl.dimension": str(encoder.dimension),
    }
    names = {path.name for path in folder.iterdir()}
    if encoder.modality == "text":
        assert preprocess == {"tokenizer": "tokenizer.json", "max_tokens": LONGEST_ROW}
        assert names == {"model.onnx", "tokenizer.json"}
    else:
        assert (preprocess["resize"], names) == ([SIZE, SIZE], {"model.onnx"})
        channels = encoder.image_config.channels
        assert preprocess["channels"] == {1: "grey, ITU-R 601", 3: "RGB"}[channels]
    weights = {weight.name for weight in graph.graph.initializer}
    assert not [name for name in weights if "head" in name or "proj" in name or "decoder" in name]
    assert b".py" not in (folder / "model.onnx").read_bytes()


def as_told(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """Do what the metadata of a graph says of a picture (height, width, 3)."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    made = pixels[top : top + side, left : left + side].astype(np.float64)
    while len(made) >= 2 * size:
        half = len(made) // 2
        made = made[: 2 * half, : 2 * half].reshape(half, 2, half, 2, 3).mean(axis=(1, 3))
        made = np.floor(made + 0.5)
    places = ((np.arange(size) + 0.5) * len(made) / size - 0.5).clip(0, len(made) - 1)
    low = np.floor(places).astype(int)
    high, share = np.minimum(low + 1, len(made) - 1), places - low
    made = made[low] * (1 - share)[:, None, None] + made[high] * share[:, None, None]
    seen: NDArray[np.float64] = made[:, low] * (1 - share)[:, None]
    seen += made[:, high] * share[:, None]
    return seen


@pytest.mark.parametrize("size", [28, 64, 96, 224])
def test_who_follows_the_metadata_sees_what_the_encoder_sees(size: int) -> None:
    photo = load_sample_images().images[0]
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "PNG")
    seen = ImageRows(ImageConfig(views=ViewConfig(size=size))).plain(png.getvalue())
    assert isinstance(seen, np.ndarray)
    told = as_told(photo, size).transpose(2, 0, 1)
    assert np.abs(told - seen).max() <= 1


def test_an_altered_graph_or_tokenizer_is_no_parity(exported: Exported) -> None:
    encoder, folder, found = exported
    assert parity(encoder, folder) == found
    written = {path: path.read_bytes() for path in folder.iterdir()}
    graph = onnx.load(folder / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(weight)), weight.name))
    altered = {folder / "model.onnx": graph.SerializeToString()}
    if encoder.modality == "text":
        path = folder / "tokenizer.json"
        altered[path] = written[path].replace(b'"lowercase": true', b'"lowercase": false')
    for path, data in altered.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"embeddings differ from the encoder's by .* allowed"):
            parity(encoder, folder)
        path.write_bytes(written[path])


@pytest.mark.slow
def test_what_is_not_the_encoder_is_not_written(vocabulary: Vocabulary, tmp_path: Path) -> None:
    encoder = bert(vocabulary)
    assert isinstance(encoder.objective, MaskedLanguage)
    encoder.objective.encoder.embedding_norm.register_forward_hook(
        lambda *call: call[-1] + torch.rand_like(call[-1])  # no graph can give it again
    )
    with pytest.raises(DataError, match="embeddings differ"):
        export(encoder, SHA256, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_it_and_says_how_near_it_is(
    vocabulary: Vocabulary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = text_bundle(tmp_path / "bundle", vocabulary), tmp_path / "graph"
    words = ["export", str(bundle), "--out", str(out), "--format", "onnx", "--json"]
    assert main(words) == 0
    said, told = capsys.readouterr().out.splitlines()
    assert f'InferenceSession("{out}/model.onnx")' in said
    record = json.loads(told)
    assert (record["format"], record["items"], record["dimension"]) == ("onnx", 12, 32)
    assert 0 < record["max_error"] < 1e-5
    assert main(words) == 2
    assert "exists: name a folder that does not" in capsys.readouterr().err


def test_a_classifier_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    sizes = BertConfig(vocab_size=vocabulary.size, hidden_size=8, num_heads=1)
    objective = build_objective(ClassificationConfig(encoder=sizes, num_classes=2))
    with pytest.raises(UserError, match="the model is a classifier"):
        export(Encoder({}, vocabulary, objective), SHA256, tmp_path / "graph")


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra(
    package: str, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'rayssl\[onnx\]'"):
        export(bert(vocabulary), SHA256, tmp_path / "graph")
    assert not list(tmp_path.iterdir())
