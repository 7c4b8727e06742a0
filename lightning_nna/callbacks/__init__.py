"""Lightning callbacks, and the bases of callbacks of one's own.

``WeightMethod`` and ``PruningMethod`` are the bases for plugins; ``Schedule`` is a value over the
run, as the callbacks take it.
"""

from lightning_nna.distillation.callback import Distillation
from lightning_nna.drift.monitor import DriftMonitor
from lightning_nna.emulation.callback import NNAEmulation
from lightning_nna.pruning.compressed_sensing_pruning import CompressedSensingPruning
from lightning_nna.pruning.l1_pruning import L1Pruning
from lightning_nna.pruning.lottery_ticket_pruning import LotteryTicketPruning
from lightning_nna.pruning.magnitude_pruning import MagnitudePruning, RandomPruning
from lightning_nna.pruning.pruning_method import PruningMethod
from lightning_nna.quantization.general_quantizer import GeneralQuantizer
from lightning_nna.quantization.hard_compression import HardCompression
from lightning_nna.quantization.mracos_regularization import MRACosRegularization
from lightning_nna.schedule import Schedule
from lightning_nna.weights.compression_report import CompressionReport
from lightning_nna.weights.method import WeightMethod

__all__ = [
    "CompressedSensingPruning",
    "CompressionReport",
    "Distillation",
    "DriftMonitor",
    "GeneralQuantizer",
    "HardCompression",
    "L1Pruning",
    "LotteryTicketPruning",
    "MRACosRegularization",
    "MagnitudePruning",
    "NNAEmulation",
    "PruningMethod",
    "RandomPruning",
    "Schedule",
    "WeightMethod",
]
