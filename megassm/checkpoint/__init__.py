"""Checkpoints and exported models as folders."""
