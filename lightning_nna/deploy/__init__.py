"""What leaves training: packed weights."""

from lightning_nna.deploy.packed import PackedReport, load_packed, save_packed

__all__ = ["PackedReport", "load_packed", "save_packed"]
