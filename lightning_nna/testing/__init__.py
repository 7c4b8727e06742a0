"""Tiny modules, and the contract that every callback must pass."""

from lightning_nna.testing.modules import SmallNet, SmallRecurrentModule

__all__ = ["SmallNet", "SmallRecurrentModule"]
