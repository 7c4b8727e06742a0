"""The way to the chip: programs for its tool chain, and packed weights."""

from lightning_nna.deploy.graph import CaptureError
from lightning_nna.deploy.packed import PackedReport, load_packed, save_packed
from lightning_nna.deploy.report import layer_figures, write_report
from lightning_nna.deploy.tflite import (
    LiteRTProgram,
    TFLiteModel,
    export_tflite,
    run_tflite,
    verify,
)
from lightning_nna.deploy.vela import VelaError, VelaOperator, VelaReport, vela_report

__all__ = [
    "CaptureError",
    "LiteRTProgram",
    "PackedReport",
    "TFLiteModel",
    "VelaError",
    "VelaOperator",
    "VelaReport",
    "export_tflite",
    "layer_figures",
    "load_packed",
    "run_tflite",
    "save_packed",
    "vela_report",
    "verify",
    "write_report",
]
