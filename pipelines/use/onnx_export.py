"""Encoders for runtimes without Python: a folder with one ONNX graph, checked when it is written.

model.onnx       text: `input_ids` and `attention_mask`, int64 (rows, length), to `embeddings`,
                 float32 (rows, width); pictures: `image`, uint8 (rows, channels, height, width),
                 whose scaling, mean and std are in the graph. Its metadata tells the model.
tokenizer.json   text: cuts, pads, and adds [CLS] and [SEP]; knows no control tokens in a text
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.export import Dim

from pipelines.data.images import ImageRows
from pipelines.errors import DataError, UserError
from pipelines.storage import write_folder
from pipelines.use.encoder import Encoder
from ssl_models.objective import Objective

PACKAGES = ("onnxruntime", "onnxscript")
GRAPH_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
TOLERANCE = 1e-4
"""Largest difference between the graph's embeddings and the encoder's, as a share of the largest
number in them; kernels that add in another order differ by less than a hundredth of it."""
SAMPLE_BATCHES = (1, 3, 8)


class Parity(NamedTuple):
    """How far the graph's embeddings are from the encoder's."""

    items: int
    """Texts or pictures that were compared, in batches of different sizes."""
    max_error: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute value of the encoder's embeddings."""


class _TextGraph(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch = {
            "input_ids": input_ids,
            "token_type_ids": torch.zeros_like(input_ids),
            "attention_mask": attention_mask.bool(),
        }
        return self.objective.encode(batch)


class _ImageGraph(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, image: Tensor) -> Tensor:
        return self.objective.encode({"image": image})


def export(encoder: Encoder, sha256: str, directory: Path) -> Parity:
    """Write a folder with the graph, of any number of rows, and of any length; it appears complete.

    `sha256` is that of the model, as `open_model` gives it.

    Raises:
        UserError: If the packages of the extra `onnx` are not there, or it is a classifier.
        DataError: If the graph's embeddings of real texts or pictures are not the encoder's; the
            folder does not appear.
        StorageError: If it cannot be written, or is there already.
    """
    encoder.refuse_classifier()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"ONNX needs {package}: pip install 'rayssl[onnx]'")
    found: list[Parity] = []

    def fill(aside: Path) -> None:
        _write_graph(encoder, sha256, aside / GRAPH_NAME)
        if encoder.pieces:
            (aside / TOKENIZER_NAME).write_text(_tokenizer(encoder).to_str(pretty=True))
        found.append(parity(encoder, aside))

    write_folder(directory, fill)
    return found[0]


def parity(encoder: Encoder, directory: Path) -> Parity:
    """Compare the files of a folder with the encoder, from raw text or pictures to embeddings.

    Raises:
        DataError: If they differ by more than `TOLERANCE`.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(directory / GRAPH_NAME, providers=["CPUExecutionProvider"])
    items = _samples(encoder)
    errors, sizes = [], []
    for batch in np.split(np.array(items, dtype=object), np.cumsum(SAMPLE_BATCHES)[:-1]):
        (embeddings,) = session.run(None, _inputs(encoder, directory, batch.tolist()))
        expected = encoder.encode(batch.tolist())
        errors.append(np.abs(embeddings - expected).max())
        sizes.append(np.abs(expected).max())
    found = Parity(len(items), float(max(errors)), float(max(sizes)))
    if not found.max_error <= TOLERANCE * found.largest:  # NaN is no parity
        raise DataError(
            f"the graph's embeddings differ from the encoder's by {found.max_error:.2g}, where "
            f"{TOLERANCE * found.largest:.2g} is allowed: try another version of torch"
        )
    return found


def _write_graph(encoder: Encoder, sha256: str, path: Path) -> None:
    shape = {0: Dim("rows")}
    graph: nn.Module
    if encoder.pieces:
        graph, names = _TextGraph(encoder.objective), ["input_ids", "attention_mask"]
        example = torch.ones((2, encoder.max_tokens), dtype=torch.int64)
        shape[1] = Dim("length", max=encoder.max_tokens)
    else:
        graph, names = _ImageGraph(encoder.objective), ["image"]
        size = ImageRows(encoder.image_config).shape
        example = torch.zeros((2, *size), dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            tuple(example.clone() for _ in names),  # one tensor would be taken for one input
            dynamo=True,
            input_names=names,
            output_names=["embeddings"],
            dynamic_shapes=(shape,) * len(names),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they tell the paths of the source files
    program.model.metadata_props.update(_metadata(encoder, sha256))
    program.save(path)


def _metadata(encoder: Encoder, sha256: str) -> dict[str, str]:
    """Return what the graph tells of itself; ONNX has strings alone."""
    if encoder.pieces:
        preprocess: dict[str, Any] = {"tokenizer": TOKENIZER_NAME, "max_tokens": encoder.max_tokens}
    else:
        channels, size, _ = ImageRows(encoder.image_config).shape
        preprocess = {
            "channels": "RGB" if channels == 3 else "grey, ITU-R 601",
            "crop": "largest square of the middle",
            "resize": [size, size],
            "interpolation": "while the side is at least twice that, means of 2 x 2 pixels, halves "
            "rounded up, an odd last row and column left out; then bilinear, half-pixel centres, "
            "no antialiasing",
            "jpeg": "decoded at 1/2, 1/4 or 1/8 of its size where the side stays at least that",
        }
    return {
        "rayssl.model_sha256": sha256,
        "rayssl.modality": encoder.modality,
        "rayssl.dimension": str(encoder.dimension),
        "rayssl.preprocess": json.dumps(preprocess),
    }


def _tokenizer(encoder: Encoder) -> Tokenizer:
    vocabulary = encoder.vocabulary
    tokenizer = Tokenizer.from_str(vocabulary.json)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary.cls), ("[SEP]", vocabulary.sep)],
    )
    tokenizer.enable_truncation(encoder.max_tokens)
    tokenizer.enable_padding(pad_id=vocabulary.pad, pad_token="[PAD]")
    return tokenizer


def _inputs(encoder: Encoder, directory: Path, items: list[Any]) -> dict[str, NDArray[Any]]:
    """Return what the graph takes: texts by the tokenizer of the folder, pictures by our decoder.

    Others make pictures by the words in `_metadata`, which a test follows.
    """
    if not encoder.pieces:
        maker = ImageRows(encoder.image_config)
        return {"image": np.stack([np.asarray(maker.plain(item)) for item in items])}
    encodings = Tokenizer.from_file(str(directory / TOKENIZER_NAME)).encode_batch(items)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings]),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
    }


def _samples(encoder: Encoder) -> list[Any]:
    """Return real texts or pictures: what scikit-learn, which comes with MLflow, brings along."""
    from sklearn.datasets import load_sample_images, load_wine

    count = sum(SAMPLE_BATCHES)
    if encoder.pieces:
        words = [piece for piece in encoder.vocabulary.tokenizer.get_vocab() if piece.isalpha()]
        in_its_language = " ".join(sorted(words)[:: 1 + len(words) // (2 * encoder.max_tokens)])
        return ["", in_its_language, *load_wine().DESCR.split("\n\n")][:count]
    photos = load_sample_images().images
    return [_png(photos[i % 2][20 * i :, 40 * i :][:200, :160]) for i in range(count)]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of itself, such as that there is no torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
