r"""The plain recurrent layer, of Elman: two products, a sum and a function.

.. math:: h \leftarrow \tanh(W x + b + R h + b') \quad\text{or}\quad \mathrm{relu}(\dots)

Its states have 16 bits (see :mod:`.recurrent_steps`): with tanh in steps of :math:`2^{-15}`, so
that an initial state beyond 1 is clipped; with ReLU those of the sum.

Reference:
    Elman, "Finding structure in time", Cognitive Science 14(2), 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.operators.activation import WIDE_OUTPUT, tanh
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.clamping import relu
from lightning_nna.emulation.operators.elementwise import add
from lightning_nna.emulation.operators.recurrent_steps import States, Step, WholeSequence, run_steps
from lightning_nna.emulation.operators.rnn_sequence import (
    Nonlinearity,
    RNNSteps,
    rnn_grids,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import QParams


def tanh_layer(
    call: Call, rows: Tensor, layout: Layout, start: States, group: Sequence[Tensor]
) -> tuple[Tensor, States]:
    """Run a layer with tanh, see :func:`.recurrent_steps.run_steps` for the shapes."""
    return run_steps(call, rows, layout, start, group, _TanhStep)


def relu_layer(
    call: Call, rows: Tensor, layout: Layout, start: States, group: Sequence[Tensor]
) -> tuple[Tensor, States]:
    """Run a layer with ReLU, see :func:`.recurrent_steps.run_steps` for the shapes."""
    return run_steps(call, rows, layout, start, group, _ReluStep)


class _PlainStep(Step):
    """One step of a function of a sum."""

    kind: Nonlinearity

    @override
    def sequence(self, x: QParams, h: QParams) -> WholeSequence | None:
        grids = rnn_grids(self.call, x, h, self.kind)
        if grids is None:
            return None
        return WholeSequence(grids.recurrent, partial(RNNSteps, self.call, grids, kind=self.kind))


class _TanhStep(_PlainStep):
    """One step whose states have the scale of the kernel's tanh."""

    kind: Nonlinearity = "tanh"

    def observe(self, state: Tensor, later: Call) -> None:
        pass

    def grid(self, state: Tensor, later: Call) -> QParams:
        return WIDE_OUTPUT

    def __call__(self, x: Tensor, states: States) -> States:
        return (tanh(self.call.child("tanh"), add(self.next, x, self.product(states[0]))),)


class _ReluStep(_PlainStep):
    """One step whose states have the scale of the sum."""

    kind: Nonlinearity = "relu"

    def __call__(self, x: Tensor, states: States) -> States:
        return (relu(self.call.child("relu"), add(self.next, x, self.product(states[0]))),)
