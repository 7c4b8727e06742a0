"""Tests; the folders mirror ``lightning_nna/`` and ``recipes/``."""

from tests.shapes import check_packages, check_shapes

__all__ = ["check_packages", "check_shapes"]
