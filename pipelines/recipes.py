"""Named runs: functions that return a whole RunConfig. Flags change fields, nothing else."""

from collections.abc import Callable

from pipelines.config import RunConfig
from pipelines.data.plan import OrderConfig
from pipelines.data.shards import SourceConfig
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.errors import UserError, nearest
from ssl_models.bert import BertConfig
from ssl_models.masked_language import MaskedLanguageConfig
from ssl_models.optim import OptimizerConfig


def text_tiny() -> RunConfig:
    """A BERT of two layers and 32 features on rows of 32 tokens: for tests, seconds of CPU."""
    return RunConfig(
        recipe="text-tiny",
        steps=20,
        workers=1,
        checkpoint_every=5,
        log_every=1,
        vocabulary=VocabularyConfig(size=512, alphabet=64),
        text=TextConfig(max_length=32),
        order=OrderConfig(rows_per_step=16, slots=4, steps_per_block=2, blocks_per_order=4),
        objective=MaskedLanguageConfig(
            encoder=BertConfig(
                vocab_size=512,
                max_length=32,
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                intermediate_size=64,
            )
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )


def text_mini() -> RunConfig:
    """A BERT of two layers and 128 features on rows of 64 tokens: minutes on two CPU cores."""
    return RunConfig(
        recipe="text-mini",
        steps=3000,
        workers=2,
        checkpoint_every=200,
        log_every=20,
        source=SourceConfig(heldout_ratio=0.2),
        vocabulary=VocabularyConfig(size=4096),
        text=TextConfig(max_length=64),
        order=OrderConfig(rows_per_step=64, slots=4, steps_per_block=8, blocks_per_order=8),
        objective=MaskedLanguageConfig(
            encoder=BertConfig(
                vocab_size=4096,
                max_length=64,
                hidden_size=128,
                num_layers=2,
                num_heads=2,
                intermediate_size=512,
                initializer_range=0.06,
            )
        ),
        # BERT's beta2 of 0.999 remembers the large first gradients for a third of so short a run.
        optimizer=OptimizerConfig(learning_rate=2e-3, beta2=0.98),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "text-tiny": text_tiny,
    "text-mini": text_mini,
}


def recipe(name: str) -> RunConfig:
    """Return the config of a named run.

    Raises:
        UserError: If there is no recipe of that name; the nearest one is named.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}.{nearest(name, RECIPES)}")
    return RECIPES[name]()
