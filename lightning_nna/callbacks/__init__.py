"""Lightning callbacks: thin shells that say when, on what, what is logged and what is saved."""

from lightning_nna.callbacks.nna_emulation import NNAEmulation

__all__ = ["NNAEmulation"]
