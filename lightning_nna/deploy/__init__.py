"""The way to the chip: programs for its tool chain, and packed weights."""

from lightning_nna.deploy.capture import CaptureError
from lightning_nna.deploy.packed import PackedReport, load_packed, save_packed
from lightning_nna.deploy.tflite import (
    LiteRTProgram,
    TFLiteModel,
    export_tflite,
    run_tflite,
    verify,
)

__all__ = [
    "CaptureError",
    "LiteRTProgram",
    "PackedReport",
    "TFLiteModel",
    "export_tflite",
    "load_packed",
    "run_tflite",
    "save_packed",
    "verify",
]
