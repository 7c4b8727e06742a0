"""Zeros in weights: compressed-sensing pruning and its baselines."""
