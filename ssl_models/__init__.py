"""The mathematics of rayssl: encoders, and the objectives that train them; torch and numpy only.

An objective (`objective.py`) is a model with its loss. Each lives in one module with its config;
the union of those configs is what a run may choose from. One more learns from labels, afterwards.
"""

from typing import assert_never

from ssl_models.autoencoder import Autoencoder, AutoencoderConfig
from ssl_models.classification import Classification, ClassificationConfig
from ssl_models.contrastive import Contrastive, ContrastiveConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.objective import Objective

ObjectiveConfig = MaskedLanguageConfig | ContrastiveConfig | AutoencoderConfig
ModelConfig = ObjectiveConfig | ClassificationConfig
"""What a bundle may hold."""


def build_objective(config: ModelConfig) -> Objective:
    """Return the objective that a config describes, with freshly drawn weights."""
    match config:
        case MaskedLanguageConfig():
            return MaskedLanguage(config)
        case ContrastiveConfig():
            return Contrastive(config)
        case AutoencoderConfig():
            return Autoencoder(config)
        case ClassificationConfig():
            return Classification(config)
        case _:
            assert_never(config)
