"""To the layout of transformers and back: the same logits, features and ids on both sides."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
)
from transformers import BertConfig as PeerConfig

from pipelines.cli import main
from pipelines.data.vocabulary import Vocabulary, VocabularyConfig
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.errors import StorageError, UserError
from pipelines.storage import inventory
from pipelines.use.bundle import BundleError, write_bundle
from pipelines.use.encoder import Encoder
from pipelines.use.fill_mask import fill_mask
from pipelines.use.hf_export import export
from pipelines.use.registry import load_encoder, open_model
from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.objective import Batch
from tests.corpus import make_documents

MAX_LENGTH, LONGEST_ROW = 40, 24
TEXTS = [
    "The captain anchors near the island.",
    "Naïve CAFÉ owners, don't!  e-mail\tme \u00ad in 1999... #x",
    "",
    "東京 and \u2028 odd \ufffd\x00 things",
    "storm " * 60,
    *(document.text[:150] for document in make_documents(12, seed=5)),
]


def peer_config(vocabulary: Vocabulary, **changes: Any) -> PeerConfig:
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return PeerConfig(**sizes | changes)


def save_peer(peer: Any, folder: Path, vocabulary: Vocabulary) -> Path:
    """Save a model of transformers with weights far from 0, and our vocabulary beside it."""
    torch.manual_seed(2)
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    peer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(vocabulary.json)
    return folder


@pytest.fixture(scope="module")
def bundle(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose encoder has more positions than its rows had tokens."""
    config = MaskedLanguageConfig(
        encoder=BertConfig(
            vocab_size=vocabulary.size,
            max_length=MAX_LENGTH,
            hidden_size=16,
            intermediate_size=24,
            dropout=0.1,
        )
    )
    torch.manual_seed(0)
    objective = MaskedLanguage(config)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("hf") / "bundle"
    write_bundle(
        directory,
        config={"objective": asdict(config), "text": {"max_length": LONGEST_ROW}},
        state=objective.state_dict(),
        tokenizer_json=vocabulary.json,
        lineage={},
        card="",
    )
    return directory


@pytest.fixture(scope="module")
def exported(bundle: Path) -> Path:
    folder = bundle.parent / "exported"
    assert main(["export", str(bundle), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def foreign(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that transformers wrote."""
    peer = BertForPreTraining(peer_config(vocabulary))
    return save_peer(peer, tmp_path_factory.mktemp("foreign"), vocabulary)


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder to change."""
    return Path(shutil.copytree(foreign, tmp_path / "copy"))


def batch_of(vocabulary: Vocabulary) -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LONGEST_ROW) < torch.tensor([[24], [9], [17]])
    ids = torch.randint(5, vocabulary.size, mask.shape, generator=generator)
    return {
        "input_ids": ids * mask,
        "token_type_ids": (torch.arange(LONGEST_ROW) >= 6).long() * mask,
        "attention_mask": mask,
    }


@torch.no_grad()
def assert_same(encoder: Encoder, folder: Path) -> None:
    """Compare hidden states and the logits of both heads with those of transformers."""
    peer: Any = BertForPreTraining.from_pretrained(folder, attn_implementation="eager")
    peer.eval()
    assert isinstance(encoder.objective, MaskedLanguage)
    batch = batch_of(encoder.vocabulary)
    outputs = peer(**batch, output_hidden_states=True)
    real = batch["attention_mask"]
    rows, columns = real.shape
    everywhere = {"masked_positions": torch.arange(columns).expand(rows, columns)}
    hidden, _ = encoder.objective.encoder(batch)
    pairs: list[tuple[Tensor, Tensor]] = [
        (hidden[real], outputs.hidden_states[-1][real]),
        (encoder.objective.mask_logits(batch | everywhere)[real], outputs.prediction_logits[real]),
        (encoder.objective.nsp_logits(batch), outputs.seq_relationship_logits),
    ]
    for ours, theirs in pairs:
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_exported_weights_give_transformers_our_logits(bundle: Path, exported: Path) -> None:
    assert_same(load_encoder(str(bundle)), exported)


def test_weights_of_transformers_give_us_its_logits(foreign: Path) -> None:
    encoder = load_encoder(str(foreign))
    assert encoder.fresh == ()
    assert_same(encoder, foreign)


def test_transformers_finds_every_tensor_and_ties_the_decoder(exported: Path) -> None:
    loaded: Any = BertForPreTraining.from_pretrained(exported, output_loading_info=True)
    peer, info = loaded
    bias = load_file(exported / "model.safetensors")["cls.predictions.bias"]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = peer.cls.predictions.decoder
    assert decoder.weight.data_ptr() == peer.bert.embeddings.word_embeddings.weight.data_ptr()
    assert torch.equal(decoder.bias, bias)
    assert peer.config.max_position_embeddings == MAX_LENGTH


@pytest.mark.parametrize("make", [AutoTokenizer, BertTokenizer])
def test_its_tokenizer_gives_our_ids_and_knows_control_tokens(
    bundle: Path, exported: Path, make: Any
) -> None:
    tokenizer = make.from_pretrained(exported)
    vocabulary = load_encoder(str(bundle)).vocabulary
    for text, ids in zip(TEXTS, vocabulary.encode(TEXTS), strict=True):
        expected = [vocabulary.cls, *ids.tolist()[: LONGEST_ROW - 2], vocabulary.sep]
        assert tokenizer(text, truncation=True)["input_ids"] == expected, text
    pair = tokenizer("the captain", "a [MASK]")
    pieces = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert pieces == ["[CLS]", "the", "captain", "[SEP]", "a", "[MASK]", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.mask_token_id == vocabulary.mask
    assert tokenizer.pad_token_id == vocabulary.pad
    assert tokenizer.model_max_length == LONGEST_ROW


def test_those_who_read_its_files_alone_get_the_same_ids(bundle: Path, exported: Path) -> None:
    vocabulary = load_encoder(str(bundle)).vocabulary
    read = Tokenizer.from_file(str(exported / "tokenizer.json"))
    for text, ids in zip(TEXTS, vocabulary.encode(TEXTS), strict=True):
        assert read.encode(text).ids == [vocabulary.cls, *ids.tolist(), vocabulary.sep]
    pair = read.encode("the captain", "a [MASK]")
    assert pair.tokens == ["[CLS]", "the", "captain", "[SEP]", "a", "[MASK]", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert read.decode(pair.ids) == "the captain a"
    pieces = (exported / "vocab.txt").read_text().splitlines()
    assert {piece: number for number, piece in enumerate(pieces)} == read.get_vocab()


def test_a_model_of_transformers_is_told_from_every_other(foreign: Path, tmp_path: Path) -> None:
    """By what stands in the files that are embedded with it."""
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    uri, sha256, _ = open_model(str(foreign), "")
    assert uri == str(foreign)
    assert open_model(str(folder), "")[1] == sha256
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    assert open_model(str(folder), "")[1] != sha256


def test_a_cased_vocabulary_keeps_its_case(tmp_path: Path, foreign: Path) -> None:
    config = VocabularyConfig(size=300, lowercase=False, min_frequency=1)
    cased = train_vocabulary(TEXTS, config)
    encoder = load_encoder(str(foreign))
    export(Encoder(encoder.config, cased, encoder.objective), tmp_path / "cased")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cased")
    assert tokenizer.convert_ids_to_tokens(tokenizer("The")["input_ids"])[1].startswith("T")
    for text, ids in zip(TEXTS, cased.encode(TEXTS), strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()


@torch.no_grad()
def test_its_mean_over_real_tokens_is_our_embedding(bundle: Path, exported: Path) -> None:
    """What sentence-transformers does with the folder: AutoModel, then mean pooling."""
    modules = json.loads((exported / "modules.json").read_text())
    assert [(module["path"], module["type"].rpartition(".")[2]) for module in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
    ]
    pooling = json.loads((exported / "1_Pooling" / "config.json").read_text())
    assert pooling.pop("word_embedding_dimension") == 16
    assert [mode for mode, on in pooling.items() if on] == ["pooling_mode_mean_tokens"]
    limits = json.loads((exported / "sentence_bert_config.json").read_text())
    assert limits == {"max_seq_length": LONGEST_ROW, "do_lower_case": False}

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModel.from_pretrained(exported)
    inputs = tokenizer(
        TEXTS,
        truncation=True,
        max_length=limits["max_seq_length"],
        padding=True,
        return_tensors="pt",
    )
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    ours = load_encoder(str(bundle)).encode(TEXTS)
    np.testing.assert_allclose(ours, means.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_gives_our_embeddings(bundle: Path, exported: Path) -> None:
    from sentence_transformers import SentenceTransformer  # seconds

    model = SentenceTransformer(str(exported), device="cpu")
    ours = load_encoder(str(bundle)).encode(TEXTS)
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), ours, rtol=0, atol=1e-5)
    assert (model.max_seq_length, model.get_embedding_dimension()) == (LONGEST_ROW, 16)


def test_export_import_and_export_again_give_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    export(load_encoder(str(exported)), tmp_path / "again")
    names = sorted(str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file())
    assert "1_Pooling/config.json" in names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def test_an_imported_model_fills_masks_and_is_cut_where_it_was_trained(exported: Path) -> None:
    encoder = load_encoder(str(exported))
    assert encoder.max_tokens == LONGEST_ROW
    assert encoder.config["text"]["max_length"] == LONGEST_ROW
    (guesses,) = fill_mask(encoder, "the [MASK] sails", top=3)
    assert len(guesses) == 3
    with pytest.raises(UserError, match="the encoder takes 24: shorten it"):
        fill_mask(encoder, "[MASK] " + "the " * LONGEST_ROW, top=3)


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (BertModel, {"mlm_head", "nsp_head"}),
        (BertForMaskedLM, {"encoder", "nsp_head"}),
    ],
)
def test_heads_that_are_not_there_are_named_and_drawn(
    make: Any, fresh: set[str], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    folder = save_peer(make(peer_config(vocabulary)), tmp_path / "model", vocabulary)
    encoder = load_encoder(str(folder))
    assert {name.partition(".")[0] for name in encoder.fresh} == fresh
    assert not {*encoder.fresh} & encoder.state.keys()
    peer = AutoModel.from_pretrained(folder).eval()
    batch = batch_of(vocabulary)
    with torch.no_grad():
        hidden = peer(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        expected = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(encoder.objective.encode(batch), expected, rtol=1e-4, atol=1e-5)
    again = load_encoder(str(folder)).objective.state_dict()
    for name, tensor in encoder.objective.state_dict().items():
        assert torch.equal(tensor, again[name])
    with pytest.raises(UserError, match="came without"):
        export(encoder, tmp_path / "exported")
    if make is BertModel:
        with pytest.raises(UserError, match="without a head for masked tokens"):
            fill_mask(encoder, "a [MASK]", top=1)


def test_names_of_old_checkpoints_are_known(copy: Path, foreign: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    words = weights["bert.embeddings.word_embeddings.weight"]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(MAX_LENGTH)[None]
    old["cls.predictions.decoder.weight"] = words.clone()
    save_file(old, copy / "model.safetensors")
    expected = load_encoder(str(foreign)).state
    found = load_encoder(str(copy)).state
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', only 'bert' is known here"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', only 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"type_vocab_size": 1}, "type_vocab_size is 1"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"attention_probs_dropout_prob": 0.2}, "is not hidden_dropout_prob 0.1"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not divisible by num_heads 3"),
        ({"hidden_size": "16"}, "config.json in "),
        ({"vocab_size": 100}, "they do not belong together"),
        ({"intermediate_size": 12}, "model.safetensors does not fit config.json"),
    ],
)
def test_what_is_not_this_bert_is_refused_by_name(
    copy: Path, changes: dict[str, Any], said: str
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BundleError) as refused:
        load_encoder(str(copy))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def with_tensors(**changed: Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name, tensor in changed.items():
            weights[name.replace("__", ".")] = tensor
        save_file(weights, folder / "model.safetensors")

    return change


def lack_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_weights, "convert to safetensors with BertForPreTraining"),
        (without_tokenizer, "no tokenizer.json in "),
        (cut_weights, "model.safetensors cannot be read"),
        (lack_a_layer, "lacks bert.encoder.layer.1.output.dense.bias"),
        (with_tensors(classifier__weight=torch.zeros(2, 16)), "holds classifier.weight"),
        (
            with_tensors(cls__predictions__decoder__bias=torch.ones(3)),
            "cls.predictions.decoder.bias is not cls.predictions.bias",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_way_out(
    copy: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(copy)
    with pytest.raises(BundleError) as refused:
        load_encoder(str(copy))
    assert said in str(refused.value)


def test_nothing_is_exported_over_what_is_there(
    bundle: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inventory(exported / "1_Pooling")
    assert main(["export", str(bundle), "--out", str(exported)]) == 2
    assert "exists: name a folder that does not" in capsys.readouterr().err
    with pytest.raises(StorageError, match="cannot write"):
        export(load_encoder(str(bundle)), exported)
    assert inventory(exported / "1_Pooling") == before


def test_a_vocabulary_that_bert_tokenizer_would_read_otherwise_is_not_exported(
    foreign: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    record = json.loads(vocabulary.json)
    record["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    other = Vocabulary(json.dumps(record))
    encoder = load_encoder(str(foreign))
    with pytest.raises(UserError, match="BertTokenizer would split text otherwise"):
        export(Encoder(encoder.config, other, encoder.objective), tmp_path / "x")
    assert not list(tmp_path.iterdir())
