"""Lightning callbacks: thin shells that say when, on what, what is logged and what is saved."""

from lightning_nna.drift.monitor import DriftMonitor
from lightning_nna.emulation.callback import NNAEmulation
from lightning_nna.pruning.compressed_sensing_pruning import CompressedSensingPruning
from lightning_nna.pruning.l1_pruning import L1Pruning
from lightning_nna.pruning.lottery_ticket_pruning import LotteryTicketPruning
from lightning_nna.pruning.magnitude_pruning import MagnitudePruning, RandomPruning
from lightning_nna.quantization.general_quantizer import GeneralQuantizer
from lightning_nna.quantization.hard_compression import HardCompression
from lightning_nna.quantization.mracos_regularization import MRACosRegularization
from lightning_nna.weights.compression_report import CompressionReport

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
