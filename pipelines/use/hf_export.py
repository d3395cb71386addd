"""Encoders for those who know nothing of us: a folder that transformers and others load.

config.json, model.safetensors              BertForPreTraining, without its tied decoder
tokenizer.json, tokenizer_config.json,      BertTokenizer, which adds [CLS] and [SEP] and knows
special_tokens_map.json, vocab.txt          control tokens in a text
modules.json, sentence_bert_config.json,    sentence-transformers: the mean over real tokens, as
1_Pooling/config.json                       `Objective.encode`
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from pipelines.data.vocabulary import CONTROL_TOKENS, Vocabulary
from pipelines.errors import UserError
from pipelines.storage import write_folder
from pipelines.use.encoder import Encoder
from pipelines.use.hf_layout import FIXED, SIZES, hf_name
from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguage


def export(encoder: Encoder, directory: Path) -> None:
    """Write a folder that transformers and sentence-transformers load; it appears complete.

    Raises:
        UserError: If the encoder is no BERT or has a head that was not trained, or BertTokenizer
            would split text otherwise than its vocabulary does.
        StorageError: If it cannot be written, or is there already.
    """
    encoder.refuse_classifier()
    objective, vocabulary = encoder.objective, encoder.vocabulary
    if encoder.fresh:
        raise UserError(f"the model came without {encoder.fresh[0]}: there is nothing to export")
    if not isinstance(objective, MaskedLanguage):
        raise UserError(f"{type(objective).__name__} is no BERT: use --format onnx")
    bert = objective.encoder.config
    tokenizer_config = _tokenizer_config(vocabulary, encoder.max_tokens)
    weights = {hf_name(name): tensor.contiguous() for name, tensor in encoder.state.items()}
    records = {
        "config.json": _hf_config(bert, vocabulary.pad),
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": _special_tokens(),
        "sentence_bert_config.json": {"max_seq_length": encoder.max_tokens, "do_lower_case": False},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": _sbert("Transformer")},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": _sbert("Pooling")},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": bert.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }

    def fill(aside: Path) -> None:
        (aside / "1_Pooling").mkdir()
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "model.safetensors").chmod(0o644)  # as the other files: it is for others to load
        for name, record in records.items():
            (aside / name).write_text(json.dumps(record, indent=2) + "\n")
        (aside / "tokenizer.json").write_text(_hf_tokenizer(vocabulary).to_str(pretty=True))
        (aside / "vocab.txt").write_text("".join(f"{piece}\n" for piece in _pieces(vocabulary)))

    write_folder(directory, fill)


def _hf_config(encoder: BertConfig, pad: int) -> dict[str, Any]:
    sizes = {key: getattr(encoder, field) for field, key in SIZES.items()}
    return {
        "architectures": ["BertForPreTraining"],
        **FIXED,
        **sizes,
        "attention_probs_dropout_prob": encoder.dropout,
        "pad_token_id": pad,
    }


def _tokenizer_config(vocabulary: Vocabulary, max_tokens: int) -> dict[str, Any]:
    """Return what BertTokenizer makes itself anew from: it does not read tokenizer.json whole."""
    made = json.loads(vocabulary.json)
    normalizer = made["normalizer"] or {}
    lowercase = normalizer.get("lowercase", True)
    accents = normalizer.get("strip_accents")
    chinese = normalizer.get("handle_chinese_chars", True)
    rebuilt = Tokenizer(WordPiece(made["model"]["vocab"], unk_token="[UNK]"))
    rebuilt.normalizer = BertNormalizer(
        handle_chinese_chars=chinese, strip_accents=accents, lowercase=lowercase
    )
    rebuilt.pre_tokenizer = BertPreTokenizer()
    if rebuilt.to_str() != vocabulary.json:
        raise UserError(
            "transformers' BertTokenizer would split text otherwise than this vocabulary does: "
            "only vocabularies like those of rayssl vocab can be exported"
        )
    return {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": max_tokens,
        "do_lower_case": lowercase,
        "strip_accents": accents,
        "tokenize_chinese_chars": chinese,
        **_special_tokens(),
    }


def _special_tokens() -> dict[str, str]:
    return {f"{token.strip('[]').lower()}_token": token for token in CONTROL_TOKENS}


def _hf_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Return a tokenizer that adds [CLS] and [SEP] and knows control tokens in a text."""
    tokenizer = Tokenizer.from_str(vocabulary.json)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary.cls), ("[SEP]", vocabulary.sep)],
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _pieces(vocabulary: Vocabulary) -> list[str]:
    """Return the pieces by id."""
    return [str(vocabulary.tokenizer.id_to_token(i)) for i in range(vocabulary.size)]


def _sbert(kind: str) -> str:
    return f"sentence_transformers.models.{kind}"
