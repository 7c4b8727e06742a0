"""Lightning callbacks: thin shells that say when, on what, what is logged and what is saved."""

from lightning_nna.callbacks.compression_report import CompressionReport
from lightning_nna.callbacks.general_quantizer import GeneralQuantizer
from lightning_nna.callbacks.hard_compression import HardCompression
from lightning_nna.callbacks.mracos_regularization import MRACosRegularization
from lightning_nna.callbacks.nna_emulation import NNAEmulation

__all__ = [
    "CompressionReport",
    "GeneralQuantizer",
    "HardCompression",
    "MRACosRegularization",
    "NNAEmulation",
]
