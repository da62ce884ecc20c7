"""MegaSSM: distributed pretraining of elastic spectral state-space models (arXiv 2601.22488).

    from megassm import ModelConfig, SpectralLayer, build_model, generate, open_model, truncate

`docs/python.md` has an example of each. The names are imported when they are first used: `import megassm` costs no
import of torch. Once it is imported, Hugging Face's transformers knows this package's models, also if it is imported
later.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from megassm.hf.on_import import when_imported

if TYPE_CHECKING:
    from megassm.checkpoint.open import open_model, open_tokenizer
    from megassm.config.model import ModelConfig
    from megassm.errors import UserError
    from megassm.eval.drafting import Drafting
    from megassm.eval.generate import generate
    from megassm.eval.policies import FixedBudget, KeepDeadlines, measured_costs
    from megassm.eval.sampling import Sampling
    from megassm.eval.scheduler import Limits, Request, Scheduler
    from megassm.layers.spectral_layer import SpectralLayer
    from megassm.model import LanguageModel, build_model, truncate
    from megassm.ops.bases import spectral_filters

__version__ = "0.1.0"

__all__ = [
    "Drafting",
    "FixedBudget",
    "KeepDeadlines",
    "LanguageModel",
    "Limits",
    "ModelConfig",
    "Request",
    "Sampling",
    "Scheduler",
    "SpectralLayer",
    "UserError",
    "__version__",
    "build_model",
    "generate",
    "measured_costs",
    "open_model",
    "open_tokenizer",
    "spectral_filters",
    "truncate",
]

_PLACES = {
    "LanguageModel": "megassm.model",
    "ModelConfig": "megassm.config.model",
    "Drafting": "megassm.eval.drafting",
    "FixedBudget": "megassm.eval.policies",
    "KeepDeadlines": "megassm.eval.policies",
    "Limits": "megassm.eval.scheduler",
    "Request": "megassm.eval.scheduler",
    "Sampling": "megassm.eval.sampling",
    "Scheduler": "megassm.eval.scheduler",
    "SpectralLayer": "megassm.layers.spectral_layer",
    "UserError": "megassm.errors",
    "build_model": "megassm.model",
    "generate": "megassm.eval.generate",
    "measured_costs": "megassm.eval.policies",
    "open_model": "megassm.checkpoint.open",
    "open_tokenizer": "megassm.checkpoint.open",
    "spectral_filters": "megassm.ops.bases",
    "truncate": "megassm.model",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


def _register(what: str) -> None:
    """Tells transformers of our classes; without ours it is to work as it did."""
    try:
        getattr(importlib.import_module("megassm.hf.register"), f"register_{what}")()
    except ImportError as error:
        warnings.warn(f"transformers cannot open MegaSSM models: {error}", stacklevel=2)


when_imported("transformers.models.auto.configuration_auto", lambda: _register("config"))
when_imported("transformers.models.auto.tokenization_auto", lambda: _register("tokenizer"))
when_imported("megassm.hf.config", lambda: _register("models_later"))
