"""Tests; the folders mirror ``lightning_nna/`` and ``recipes/``."""
