"""Which tokens of a row are to be predicted, and what the model sees in their place."""

from typing import NamedTuple

import numpy as np

from pipelines.data.randomness import Words64, draws, key, uniform
from pipelines.data.spans import Ints, Tokens, starts
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary


class Masks(NamedTuple):
    """What is to be predicted in flat rows of tokens."""

    places: Ints
    """Indices of the chosen tokens, ascending."""
    inputs: Tokens
    """What the model sees at these places."""


def num_predictions(num_tokens: Ints, config: TextConfig) -> Ints:
    """Return how many of a row's text tokens are to be predicted: at least one."""
    rounded: Ints = np.maximum(1, np.rint(config.mask_ratio * num_tokens)).astype(np.int64)
    return rounded


def mask(
    flat: Tokens,
    lengths: Ints,
    row_keys: Words64,
    vocabulary: Vocabulary,
    config: TextConfig,
) -> Masks:
    """Choose tokens of flat rows and what the model sees in their place.

    Words (or pieces) of a row are taken in keyed order for as long as they fit into
    `num_predictions`. Control tokens are never chosen and never drawn.
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(flat)) - np.repeat(starts(lengths), lengths)
    is_text = (flat != vocabulary.cls) & (flat != vocabulary.sep)
    places = np.flatnonzero(is_text)
    new_unit = np.ones(len(places), dtype=bool)
    if config.whole_words:
        # The token before the first of a segment is a control token: words never cross it.
        new_unit = ~(vocabulary.continues[flat[places]] & is_text[places - 1])
    quota = num_predictions(np.bincount(row[places], minlength=len(lengths)), config)
    unit = np.cumsum(new_unit) - 1
    # A word of more pieces than a row may lose is chosen piece by piece.
    new_unit |= np.bincount(unit)[unit] > quota[row[places]]
    unit = np.cumsum(new_unit) - 1
    unit_row, unit_length = row[places[new_unit]], np.bincount(unit)
    token_draws = draws(row_keys[row[places]], column[places].astype(np.uint64))

    order = np.lexsort((token_draws[new_unit], unit_row))
    ends = np.cumsum(unit_length[order])
    first_of_row = np.concatenate([[True], np.diff(unit_row[order]) > 0])[: len(order)]
    before_row = np.maximum.accumulate(np.where(first_of_row, ends - unit_length[order], 0))
    taken = np.zeros(len(order), dtype=bool)
    taken[order] = ends - before_row <= quota[unit_row[order]]

    chosen = taken[unit]
    places = places[chosen]
    fate = uniform(draws(key("replace"), token_draws[chosen]))
    random_ids = vocabulary.ordinary[
        draws(key("random piece"), token_draws[chosen]) % np.uint64(len(vocabulary.ordinary))
    ]
    inputs = np.where(
        fate < config.mask_token_ratio,
        vocabulary.dtype.type(vocabulary.mask),
        np.where(
            fate < config.mask_token_ratio + config.random_token_ratio, random_ids, flat[places]
        ),
    )
    return Masks(places, inputs)
