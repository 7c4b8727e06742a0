"""Weights of few bits: which tensors, how many bits each, and the values that they may take."""

from lightning_nna.compression.codebook import Codebook
from lightning_nna.compression.selection import BitWidths

__all__ = ["BitWidths", "Codebook"]
