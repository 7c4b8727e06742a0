"""Export programs for the accelerator's tool chain, and pack weights."""

# First: without the extra nothing below can be imported.
from lightning_nna.deploy import _extra as _extra
from lightning_nna.deploy.activations import ActivationMetrics, Activations, activation_metrics
from lightning_nna.deploy.decode import CompressedTensor
from lightning_nna.deploy.deployment import (
    Deployment,
    DeviceTotals,
    ExportedProgram,
    Metric,
    RuntimeCheck,
    Timing,
)
from lightning_nna.deploy.graph import CaptureError
from lightning_nna.deploy.measure import check_runtimes, measure_deployment
from lightning_nna.deploy.micro import export_micro
from lightning_nna.deploy.micro_export import MicroExport
from lightning_nna.deploy.origin import Origin
from lightning_nna.deploy.price import VelaPrice
from lightning_nna.deploy.program import Program, run_tflite
from lightning_nna.deploy.report import layer_figures, write_report
from lightning_nna.deploy.runtimes import (
    MissingRuntimeError,
    Runtime,
    UnsupportedProgramError,
    runtime_of,
)
from lightning_nna.deploy.tflite import TFLiteModel, export_tflite
from lightning_nna.deploy.tosa import export_tosa
from lightning_nna.deploy.vela import (
    SlowedOperator,
    VelaError,
    VelaOperator,
    VelaProgram,
    VelaReport,
    vela_report,
)
from lightning_nna.deploy.verification import Agreement, verify
from lightning_nna.weights.packed import PackedReport, load_packed, save_packed

__all__ = [
    "ActivationMetrics",
    "Activations",
    "Agreement",
    "CaptureError",
    "CompressedTensor",
    "Deployment",
    "DeviceTotals",
    "ExportedProgram",
    "Metric",
    "MicroExport",
    "MissingRuntimeError",
    "Origin",
    "PackedReport",
    "Program",
    "Runtime",
    "RuntimeCheck",
    "SlowedOperator",
    "TFLiteModel",
    "Timing",
    "UnsupportedProgramError",
    "VelaError",
    "VelaOperator",
    "VelaPrice",
    "VelaProgram",
    "VelaReport",
    "activation_metrics",
    "check_runtimes",
    "export_micro",
    "export_tflite",
    "export_tosa",
    "layer_figures",
    "load_packed",
    "measure_deployment",
    "run_tflite",
    "runtime_of",
    "save_packed",
    "vela_report",
    "verify",
    "write_report",
]
