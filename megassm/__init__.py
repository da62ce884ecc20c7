"""MegaSSM: distributed pretraining of elastic spectral state-space models (arXiv 2601.22488)."""

__version__ = "0.1.0"
