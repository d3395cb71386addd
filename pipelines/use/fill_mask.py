"""What a registered encoder puts in the place of [MASK]."""

from typing import NamedTuple

import torch

from pipelines.errors import UserError
from pipelines.use.encoder import Encoder
from ssl_models.masked_language import NO_LABEL, MaskedLanguage

MASK = "[MASK]"


class Guess(NamedTuple):
    """One piece for one mask, and its probability."""

    piece: str
    probability: float


def fill_mask(encoder: Encoder, text: str, top: int) -> list[list[Guess]]:
    """Return the `top` most probable pieces for each [MASK] of a text, in its order.

    Raises:
        UserError: If the text has no [MASK], or is longer than the encoder's rows, if `top` is
            not at least 1, or if the model came without a head for masked tokens.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    objective, vocabulary = encoder.objective, encoder.vocabulary
    if encoder.came_without("mlm_head.") or not isinstance(objective, MaskedLanguage):
        raise UserError("the model came without a head for masked tokens: it cannot fill any")
    first, *others = (ids.tolist() for ids in vocabulary.encode(text.split(MASK)))
    if not others:
        raise UserError(f"no {MASK} in {text!r}: put one where a word is to be guessed")
    row = [vocabulary.cls, *first]
    positions = []
    for part in others:
        positions.append(len(row))
        row += [vocabulary.mask, *part]
    row.append(vocabulary.sep)
    if len(row) > encoder.max_tokens:
        raise UserError(
            f"the text has {len(row)} tokens, the encoder takes {encoder.max_tokens}: shorten it"
        )
    batch = {
        "input_ids": torch.tensor([row]),
        "token_type_ids": torch.zeros(1, len(row), dtype=torch.int64),
        "attention_mask": torch.ones(1, len(row), dtype=torch.bool),
        "masked_positions": torch.tensor([positions]),
        "masked_ids": torch.full((1, len(positions)), NO_LABEL),
    }
    with torch.no_grad():
        probabilities = objective.mask_logits(batch)[0].softmax(dim=-1)
    best = probabilities.topk(min(top, vocabulary.size))
    return [
        [
            Guess(str(vocabulary.tokenizer.id_to_token(piece)), probability)
            for piece, probability in zip(pieces, values, strict=True)
        ]
        for pieces, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
