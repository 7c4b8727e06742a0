"""Lightning callbacks: thin shells that say when, on what, what is logged and what is saved."""

from lightning_nna.callbacks.compressed_sensing_pruning import CompressedSensingPruning
from lightning_nna.callbacks.compression_report import CompressionReport
from lightning_nna.callbacks.drift_monitor import DriftMonitor
from lightning_nna.callbacks.general_quantizer import GeneralQuantizer
from lightning_nna.callbacks.hard_compression import HardCompression
from lightning_nna.callbacks.l1_pruning import L1Pruning
from lightning_nna.callbacks.lottery_ticket_pruning import LotteryTicketPruning
from lightning_nna.callbacks.magnitude_pruning import MagnitudePruning, RandomPruning
from lightning_nna.callbacks.mracos_regularization import MRACosRegularization
from lightning_nna.callbacks.nna_emulation import NNAEmulation

__all__ = [
    "CompressedSensingPruning",
    "CompressionReport",
    "DriftMonitor",
    "GeneralQuantizer",
    "HardCompression",
    "L1Pruning",
    "LotteryTicketPruning",
    "MRACosRegularization",
    "MagnitudePruning",
    "NNAEmulation",
    "RandomPruning",
]
