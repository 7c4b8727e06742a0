"""What is not finite is an error that names its site, and the parameter at fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing import SmallNet
from tests.emulation.modules import Function


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[..., 0] > 0).long())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "fully_connected": lambda: nn.Linear(4, 3),
    "convolution": lambda: nn.Conv1d(6, 5, 3),
    "batch_norm": lambda: nn.BatchNorm1d(6),
    "lstm": lambda: nn.LSTM(4, 5, batch_first=True),
    "gru": lambda: nn.GRU(4, 5, batch_first=True),
    "attention": Attention,
    "layer_norm": lambda: nn.LayerNorm(4),
    "rms_norm": lambda: nn.RMSNorm(4),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x.flip(0),
    "sub": lambda x: 1 - x,
    "mul": lambda x: 0.3 * x,
    "concatenation": lambda x: torch.cat([torch.tanh(x.nan_to_num(0.0, 1.0, -1.0)), x]),
    "batch_matmul": lambda x: x @ x.mT,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "glu": F.glu,
    "mean": lambda x: x.mean(-1),
    "reduce_max": lambda x: x.amax(-1),
}

OPERATORS = [*LAYERS.items(), *((name, lambda f=f: Function(f)) for name, f in FUNCTIONS.items())]


def run(build: Callable[[], nn.Module], phase: str, spoil: Callable[[nn.Module, Tensor], None]):
    """Observe, spoil module or input, and observe again or emulate."""
    torch.manual_seed(0)
    module, x = build(), torch.randn(3, 6, 4)
    with emulate(module, fidelity="fast" if phase == "fast" else "exact") as chip:
        with chip.observing():
            module(x)
        spoil(module, x)
        with chip.running("observe" if phase == "observe" else "emulate"):
            module(x)


@pytest.mark.parametrize("phase", ["observe", "emulate", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "build"), OPERATORS)
def test_an_input_that_is_not_finite_names_the_site(
    name: str, build: Callable[[], nn.Module], value: float, phase: str
) -> None:
    def spoil(module: nn.Module, x: Tensor) -> None:
        x[1, 2, 1] = value

    with pytest.raises(FloatingPointError, match=rf"/{name}#0.* not finite"):
        run(build, phase, spoil)


PARAMETERS = [
    (build, name)
    for build in [*LAYERS.values(), Embedding, SmallNet]
    for name, _ in build().named_parameters()
]


@pytest.mark.parametrize("phase", ["observe", "emulate", "fast"])
@pytest.mark.parametrize(("build", "name"), PARAMETERS)
def test_a_parameter_that_is_not_finite_is_named(
    build: Callable[[], nn.Module], name: str, phase: str
) -> None:
    def spoil(module: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            module.get_parameter(name).view(-1)[0] = float("nan")

    with pytest.raises(FloatingPointError, match=rf"#0: {name} has a value that is not finite"):
        run(build, phase, spoil)
