"""Ways to train a network: in float, on the chip, and with the quantizers of other libraries.

The others come with the extra ``bench``. Each is asked for 8-bit weights and activations of every
layer that it knows, by its own call for a whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna import emulate
from recipes import require_extra
from recipes.benchmark.works import Work

Step = Callable[[], None]


class NotPossibleError(RuntimeError):
    """A library cannot train this network; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        title: Name in tables.
        prepare: Takes a network and its batch; gives back what is trained.
        scope: Entered for every step, given the network.
    """

    title: str
    prepare: Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]
    scope: Callable[[nn.Module], AbstractContextManager[Any]] = lambda module: nullcontext()

    def step(self, work: Work, device: torch.device) -> Step:
        """A function that does one training step of ``work``.

        Raises:
            NotPossibleError: If the library cannot train it.
        """
        torch.manual_seed(0)
        module = work.module().train().to(device)
        batch = tuple(x.to(device) for x in work.batch())
        try:
            module = self.prepare(module, batch)
            optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, foreach=False)
            step = partial(_step, self, work, module, batch, optimizer)
            for _ in range(3):
                step()
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            first, *_ = str(error).splitlines() or [""]
            raise NotPossibleError(f"{type(error).__name__}: {first}") from error
        return step


def _step(
    variant: Variant,
    work: Work,
    module: nn.Module,
    batch: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
) -> None:
    with variant.scope(module):
        optimizer.zero_grad()
        work.loss(module(*batch), batch).backward()
        optimizer.step()


def _calibrated(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    with emulate(module) as chip, chip.observing():
        module(*batch)
    return module


def _brevitas(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "brevitas")
    from brevitas.graph.quantize import layerwise_quantize

    quantized: nn.Module = layerwise_quantize(module)
    return quantized.train()


def _torchao(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if not any(isinstance(child, nn.Linear) for child in module.modules()):
        raise NotPossibleError("it quantizes linear layers alone, and there are none")
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantize_(module, config)
    return module


def _modelopt(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "modelopt")
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    quantized: nn.Module = mtq.quantize(module, config, lambda network: network(*batch))
    return quantized.train()


#: By the name that rows and the command line use; ``float`` is what the others are compared with.
VARIANTS: dict[str, Variant] = {
    "float": Variant("float", lambda module, batch: module),
    "exact": Variant("ours, exact", _calibrated, partial(emulate, fidelity="exact")),
    "fast": Variant("ours, fast", _calibrated, partial(emulate, fidelity="fast")),
    "brevitas": Variant("Brevitas", _brevitas),
    "torchao": Variant("torchao", _torchao),
    "modelopt": Variant("ModelOpt", _modelopt),
}
