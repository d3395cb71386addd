"""The weights a run starts with: freshly drawn, or those of an encoder that is there already.

Weights that were given become the commit of step 0. From then on every rank and every attempt
finds them as it finds any commit, and nothing asks again where they came from.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Discriminator, TypeAdapter
from torch import Tensor

from pipelines.config import RunConfig, with_vocab_size
from pipelines.console import say
from pipelines.data.plan import Cursor
from pipelines.data.randomness import key
from pipelines.data.vocabulary import Vocabulary, load_vocabulary
from pipelines.errors import UserError
from pipelines.training.checkpoint import Commit, CommitLog
from pipelines.use.encoder import Encoder
from pipelines.use.registry import open_model
from ssl_models import ModelConfig, build_objective
from ssl_models.objective import Objective

_TRAINING = frozenset({"dropout", "initializer_range"})
"""Fields of an encoder that say how it is trained, and not what it computes."""


class Start(NamedTuple):
    """An encoder that a run starts from."""

    source: str
    """models:/NAME/VERSION, or a folder."""
    weights: dict[str, Tensor]
    """All of the run's, heads included."""
    vocabulary: Vocabulary
    vocab_size: int
    """Token embeddings; some models of transformers have a few more than pieces."""


def draw(config: RunConfig) -> Objective:
    """Return the objective with freshly drawn weights, the same wherever it is called."""
    return _draw(config.objective, config.seed)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """Return an encoder as a run of the same objective and this seed starts with it."""
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(Annotated[ModelConfig, Discriminator("kind")])
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
        objective = _draw(adapter.validate_python(encoder.config["objective"]), seed)
    return replace(encoder, objective=objective.eval())


def _draw(config: ModelConfig, seed: int) -> Objective:
    torch.manual_seed(key(seed, "weights") >> 1)
    return build_objective(config)


def given_vocabulary(config: RunConfig, source: Encoder | None) -> Vocabulary | None:
    """Return the vocabulary of the encoder that a run starts from, else of its file, else None.

    Raises:
        UserError: If there is no such file, or it is another vocabulary than the encoder's.
        DataError: If the file is no vocabulary.
    """
    path = config.vocabulary_file
    given = load_vocabulary(Path(path), lowercase=config.vocabulary.lowercase) if path else None
    if source is None:
        return given
    if given and given.json != source.vocabulary.json:
        raise UserError(
            f"{path} is not the vocabulary of {config.init_from}: leave --vocabulary-file out"
        )
    return source.vocabulary


def load_start(config: RunConfig) -> Start:
    """Return what a run that is to be `init_from` an encoder starts with.

    Heads that the encoder came without are drawn, and said to be; those of another objective that
    it came with are left.

    Raises:
        UserError: If `vocabulary_file` is another vocabulary than the encoder's, or the encoders
            or heads do not fit; the first misfit is named.
        BundleError: If there is no such encoder, or it cannot be trusted.
    """
    uri, _, source = open_model(config.init_from, config.tracking_uri)
    given_vocabulary(config, source)
    there = source.config["objective"]["encoder"]
    settled = with_vocab_size(config, there["vocab_size"])
    for name, here in asdict(settled.objective.encoder).items():
        if name not in _TRAINING and there.get(name) != here:
            raise UserError(
                f"{name} of {uri} is {there.get(name)}, of this run {here}: set "
                f"--objective.encoder.{name.replace('_', '-')} {there.get(name)}"
            )
    weights: dict[str, Tensor] = draw(settled).state_dict()
    given = source.state
    drawn = [name for name in weights if name not in given]
    for name in [name for name in weights if name in given]:
        if weights[name].shape != given[name].shape:
            raise UserError(
                f"{name} of {uri} has the shape {tuple(given[name].shape)}, of this run "
                f"{tuple(weights[name].shape)}: start from a model of the same objective"
            )
        weights[name] = given[name]
    say(f"starts from {uri}" + (f"; drawn anew: {', '.join(drawn)}" if drawn else ""))
    return Start(uri, weights, source.vocabulary, there["vocab_size"])


def commit_start(log: CommitLog, weights: dict[str, Tensor]) -> Commit:
    """Commit weights as step 0 of a run that has not begun."""
    start = Commit(
        step=0,
        attempt=0,
        parent="",
        cursor=Cursor(),
        digests=(),
        fates={},
        workers=0,
        manifest_sha256="",
    )
    return log.save(start, weights, {})
