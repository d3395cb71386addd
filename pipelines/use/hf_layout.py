"""BERT as Hugging Face's transformers names and saves it; what is read may lack heads.

config.json         `model_type` bert, the sizes under their names there
model.safetensors   bert.*, cls.predictions.*, cls.seq_relationship.*; BertModel: no prefix
tokenizer.json      with control tokens and a template, which are not used here
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary, load_vocabulary
from pipelines.storage import sha256_of
from pipelines.use.bundle import BundleError
from ssl_models.bert import NUM_SEGMENTS, BertConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.transformer import LAYER_NORM_EPSILON

SIZES = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "initializer_range": "initializer_range",
}
"""Fields of BertConfig -> keys of config.json."""
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "type_vocab_size": NUM_SEGMENTS,
    "layer_norm_eps": LAYER_NORM_EPSILON,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Keys that must have these values; where one is absent, transformers takes the same."""
_MODULES = {
    "encoder.token_embeddings": "bert.embeddings.word_embeddings",
    "encoder.position_embeddings": "bert.embeddings.position_embeddings",
    "encoder.segment_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.embedding_norm": "bert.embeddings.LayerNorm",
    "encoder.pooler": "bert.pooler.dense",
    "mlm_head": "cls.predictions",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "nsp_head": "cls.seq_relationship",
}
_LAYERS = "encoder.transformer.layers."
_LAYER_MODULES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_MAY_LACK = ("encoder.pooler.", "mlm_head.", "nsp_head.")
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


def is_hf_layout(directory: Path) -> bool:
    """Return whether a folder holds a model as transformers saves it."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_hf_layout(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], Vocabulary]:
    """Return the config of a folder as a bundle holds it, the weights and the vocabulary.

    The weights are those of BertModel, BertForMaskedLM or BertForPreTraining, in float32.

    Raises:
        BundleError: If a file is absent, or the model is not the BERT of this package.
        DataError: If the tokenizer is not WordPiece with BERT's control tokens.
    """
    for name in ("model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise BundleError(f"no {name} in {directory}: {_remedy(directory, name)}")
    record = json.loads((directory / "config.json").read_text())
    try:
        config = MaskedLanguageConfig(encoder=_bert_config(record))
        text = TextConfig(max_length=_longest_row(directory, config.encoder.max_length))
    except (TypeError, ValueError) as error:
        raise BundleError(f"config.json in {directory}: {error}") from error
    vocabulary = load_vocabulary(directory / "tokenizer.json")
    if vocabulary.size > config.encoder.vocab_size:
        raise BundleError(
            f"{directory}: its tokenizer has {vocabulary.size} pieces, its config.json says "
            f"{config.encoder.vocab_size}: they do not belong together"
        )
    state = _read_weights(directory / "model.safetensors", config)
    described = {"objective": asdict(config), "text": asdict(text), "recipe": ""}
    return described, state, vocabulary


def hf_sha256(directory: Path) -> str:
    """Return a hash of the files that are read, of which the last one may be absent."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    hashes = [sha256_of(directory / name) for name in names if (directory / name).is_file()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def hf_name(name: str) -> str:
    """Return the name that transformers gives one of our tensors."""
    module, _, kind = name.rpartition(".")
    if module.startswith(_LAYERS):
        number, _, part = module.removeprefix(_LAYERS).partition(".")
        return f"bert.encoder.layer.{number}.{_LAYER_MODULES[part]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def _read_weights(path: Path, config: MaskedLanguageConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = list(MaskedLanguage(config).state_dict())
    theirs = {hf_name(name): name for name in ours}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be read: {error}; download it again") from error
    prefix = "" if any(name.startswith("bert.") for name in tensors) else "bert."
    found = {_modern(prefix + name): tensor.float() for name, tensor in tensors.items()}
    for name, original in _TIED.items():
        copied = found.pop(name, None)
        if copied is not None and not torch.equal(copied, found.get(original, torch.empty(0))):
            raise BundleError(f"{path}: {name} is not {original}: only tied ones are known here")
    if unknown := sorted(found.keys() - theirs.keys() - {*_BUFFERS}):
        raise BundleError(
            f"{path} holds {unknown[0]}, which is no part of BertModel, BertForMaskedLM or "
            "BertForPreTraining: save one of these"
        )
    state = {theirs[name]: tensor for name, tensor in found.items() if name in theirs}
    for name in ours:
        if name not in state and not name.startswith(_MAY_LACK):
            raise BundleError(f"{path} lacks {hf_name(name)}: save the model again")
    return state


def _modern(name: str) -> str:
    """Return the name with the words of TensorFlow, which old checkpoints keep, replaced."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _remedy(directory: Path, name: str) -> str:
    if name == "tokenizer.json":
        return "save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    if (directory / "pytorch_model.bin").exists():
        return (
            "pytorch_model.bin would have to be unpickled; convert to safetensors with "
            "BertForPreTraining.from_pretrained(...).save_pretrained(...)"
        )
    return "save the model with save_pretrained(...), in one file"


def _bert_config(record: dict[str, Any]) -> BertConfig:
    for key, value in FIXED.items():
        if record.get(key, value) != value:
            raise ValueError(f"{key} is {record[key]!r}, only {value!r} is known here")
    dropout = record.get("hidden_dropout_prob")
    if record.get("attention_probs_dropout_prob") != dropout:
        raise ValueError(
            f"attention_probs_dropout_prob {record.get('attention_probs_dropout_prob')} is not "
            f"hidden_dropout_prob {dropout}: this BERT has one dropout"
        )
    if missing := [key for key in SIZES.values() if key not in record]:
        raise ValueError(f"lacks {missing[0]}")
    return BertConfig(**{field: record[key] for field, key in SIZES.items()})


def _longest_row(directory: Path, num_positions: int) -> int:
    path = directory / "tokenizer_config.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return min(int(record.get("model_max_length", num_positions)), num_positions)
