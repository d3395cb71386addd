"""What an encoder puts in the place of [MASK]: the right row, the right places, probabilities."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.use.encoder import Encoder
from pipelines.use.fill_mask import fill_mask
from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.objective import Batch

MAX_LENGTH = 16


class Echo(MaskedLanguage):
    """Bets on the piece to the left of each mask, three to one; remembers the batch."""

    seen: Batch

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return logits of 0.75 for the piece to the left and of 0.25 for piece 7."""
        self.seen = batch
        left = batch["input_ids"].gather(1, batch["masked_positions"] - 1)
        weights = torch.full((*left.shape, self.encoder.config.vocab_size), 1e-9)
        weights.scatter_(2, left[:, :, None], 3.0)
        weights[:, :, 7] = 1.0
        return weights.log()


@pytest.fixture(scope="module")
def encoder(vocabulary: Vocabulary) -> Encoder:
    config = MaskedLanguageConfig(
        encoder=BertConfig(
            vocab_size=vocabulary.size, max_length=MAX_LENGTH, hidden_size=8, intermediate_size=8
        )
    )
    record: dict[str, Any] = {"objective": dataclasses.asdict(config)}
    return Encoder(record, vocabulary, Echo(config).eval())


def test_each_mask_is_guessed_from_its_own_place(encoder: Encoder, vocabulary: Vocabulary) -> None:
    first, second = fill_mask(encoder, "the [MASK] and captain [MASK].", top=2)

    assert (first[0].piece, second[0].piece) == ("the", "captain")
    assert first[0].probability == pytest.approx(0.75, abs=1e-4)
    assert first[1].piece == vocabulary.tokenizer.id_to_token(7)
    assert first[1].probability == pytest.approx(0.25, abs=1e-4)
    assert isinstance(encoder.objective, Echo)
    batch = encoder.objective.seen
    pieces = [vocabulary.tokenizer.id_to_token(i) for i in batch["input_ids"][0].tolist()]
    assert pieces == ["[CLS]", "the", "[MASK]", "and", "captain", "[MASK]", ".", "[SEP]"]
    assert batch["attention_mask"].all()
    assert not batch["token_type_ids"].any()


def test_no_more_pieces_are_shown_than_there_are(encoder: Encoder, vocabulary: Vocabulary) -> None:
    (guesses,) = fill_mask(encoder, "a [MASK]", top=10**6)

    assert len(guesses) == vocabulary.size
    assert sum(guess.probability for guess in guesses) == pytest.approx(1.0, abs=1e-4)
    assert sorted(guesses, key=lambda guess: -guess.probability) == guesses


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing to guess", "no [MASK] in 'nothing to guess'"),
        ("", "no [MASK] in ''"),
        ("a [mask] in lower case", "put one where a word is to be guessed"),
        ("[MASK] " + "the " * MAX_LENGTH, f"has {MAX_LENGTH + 3} tokens, the encoder takes 16"),
    ],
)
def test_what_cannot_be_filled_is_refused(encoder: Encoder, text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        fill_mask(encoder, text, top=5)

    assert said in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("top", [0, -1])
def test_fewer_than_one_guess_is_refused(encoder: Encoder, top: int) -> None:
    with pytest.raises(UserError, match=f"top must be at least 1, got {top}"):
        fill_mask(encoder, "a [MASK]", top)
