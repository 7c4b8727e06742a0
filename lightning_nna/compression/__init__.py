"""Weights of few bits: which tensors, how many bits each, and the values that they may take."""

from lightning_nna.compression.allocation import BitAllocation, allocate_bits
from lightning_nna.compression.codebook import Codebook
from lightning_nna.compression.selection import BitWidths

__all__ = ["BitAllocation", "BitWidths", "Codebook", "allocate_bits"]
