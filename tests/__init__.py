"""Tests; the folders mirror ``lightning_nna/`` and ``recipes/``."""

from tests.shapes import check_shapes

__all__ = ["check_shapes"]
