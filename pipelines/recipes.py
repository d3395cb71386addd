"""Named runs: functions that return a whole RunConfig. Flags change fields, nothing else.

Those on text are here, those on pictures in recipes_images.py.
"""

from collections.abc import Callable
from dataclasses import replace

from pipelines.config import RunConfig
from pipelines.data.plan import OrderConfig
from pipelines.data.shards import SourceConfig
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.errors import UserError, nearest
from pipelines.recipes_images import (
    fashion_triplet,
    image_tiny,
    image_tiny_autoencoder,
    imagenet_triplet,
    imagenet_vit,
    mnist_autoencoder,
    mnist_nt_xent,
    mnist_triplet,
    photos_triplet,
)
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


def newsgroups_mini() -> RunConfig:
    """Masked words alone, on rows of 128 tokens: for text without sentences, minutes of CPU.

    On 20 Newsgroups it comes to a held-out loss of 5.19 nats, where word frequencies give 7.27 (one
    seed). A fifth of its steps, on one layer, left it at a loss where fine-tuning did not pay.
    """
    return RunConfig(
        recipe="newsgroups-mini",
        register="rayssl-newsgroups",
        steps=5000,
        workers=2,
        checkpoint_every=1000,
        log_every=20,
        source=SourceConfig(heldout_ratio=0.05),
        vocabulary=VocabularyConfig(size=8192),
        text=TextConfig(notnext_ratio=0.0, mask_ratio=0.2),
        order=OrderConfig(rows_per_step=32, slots=4, steps_per_block=8, blocks_per_order=8),
        objective=MaskedLanguageConfig(
            encoder=BertConfig(
                vocab_size=8192,
                max_length=128,
                hidden_size=128,
                num_layers=2,
                num_heads=2,
                intermediate_size=512,
                initializer_range=0.06,
            ),
            nsp_coefficient=0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, beta2=0.98),
    )


def text_base() -> RunConfig:
    """BERT-base uncased, 110 M parameters, on rows of 128 tokens: 0.9 M steps, GPUs.

    The numbers of Devlin et al. 2019, appendix A.2: 256 rows a step, and 90 % of the steps on short
    rows; `text-base-512` makes the rest. Together their learning rates follow one line to 0 as
    there. Beside the paper: whole words are masked, pairs are honest, Adam's bias is corrected.

    Needs gigabytes of text. 30 G tokens at 6 x 86 M FLOP are 1.5e19 FLOP: near two days of one
    A100 at a third of its peak, by arithmetic and not by measurement. We had no GPU to run it at
    full length, so no score is promised; its one step in the tests is a step of the true size.
    """
    sizes = BertConfig(
        vocab_size=30522,
        max_length=512,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        dropout=0.1,
    )
    return RunConfig(
        recipe="text-base",
        register="rayssl-text-base",
        steps=900_000,
        workers=8,
        checkpoint_every=2000,
        log_every=50,
        source=SourceConfig(heldout_ratio=0.0005),
        vocabulary=VocabularyConfig(size=30522, alphabet=1000),
        text=TextConfig(max_length=128),
        order=OrderConfig(rows_per_step=256, slots=16, steps_per_block=64, blocks_per_order=8),
        objective=MaskedLanguageConfig(encoder=sizes),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_ratio=1 / 90, min_ratio=0.1),
    )


def text_base_512() -> RunConfig:
    """The last 0.1 M steps of BERT-base, on rows of 512 tokens, from what text-base registered.

    13 G tokens: near a day of one A100, by arithmetic and not by measurement.
    """
    return _on_long_rows(text_base())


def text_large() -> RunConfig:
    """BERT-large uncased, 336 M parameters, on rows of 128 tokens: 0.9 M steps, GPUs.

    As `text-base`, with slots of 8 rows, for up to 32 workers. 5.4e19 FLOP: near 17 hours of eight
    A100 at a third of their peak, by arithmetic and not by measurement.
    """
    base = text_base()
    sizes = replace(
        base.masked_language.encoder,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=4096,
    )
    return replace(
        base,
        recipe="text-large",
        register="rayssl-text-large",
        order=replace(base.order, slots=32),
        objective=replace(base.masked_language, encoder=sizes),
    )


def text_large_512() -> RunConfig:
    """The last 0.1 M steps of BERT-large, on rows of 512 tokens, from what text-large registered.

    13 G tokens: near 8 hours of eight A100, by arithmetic and not by measurement.
    """
    return _on_long_rows(text_large())


def _on_long_rows(first: RunConfig) -> RunConfig:
    """Return the second phase of a run: where its learning rate ended, to 0, on rows of 512."""
    optimizer = first.optimizer
    return replace(
        first,
        recipe=f"{first.recipe}-512",
        init_from=f"models:/{first.register}@candidate",
        register=f"{first.register}-512",
        steps=first.steps // 9,
        text=replace(first.text, max_length=512),
        order=replace(first.order, steps_per_block=32),
        optimizer=replace(
            optimizer,
            learning_rate=optimizer.learning_rate * optimizer.min_ratio,
            warmup_ratio=0.01,  # Adam starts anew
            min_ratio=0.0,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "text-tiny": text_tiny,
    "text-mini": text_mini,
    "newsgroups-mini": newsgroups_mini,
    "text-base": text_base,
    "text-base-512": text_base_512,
    "text-large": text_large,
    "text-large-512": text_large_512,
    "image-tiny": image_tiny,
    "image-tiny-autoencoder": image_tiny_autoencoder,
    "mnist-triplet": mnist_triplet,
    "mnist-nt-xent": mnist_nt_xent,
    "mnist-autoencoder": mnist_autoencoder,
    "fashion-triplet": fashion_triplet,
    "photos-triplet": photos_triplet,
    "imagenet-triplet": imagenet_triplet,
    "imagenet-vit": imagenet_vit,
}


def recipe(name: str) -> RunConfig:
    """Return the config of a named run.

    Raises:
        UserError: If there is no recipe of that name; the nearest one is named.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}.{nearest(name, RECIPES)}")
    return RECIPES[name]()
