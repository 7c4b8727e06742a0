r"""Second moments :math:`E[a a^T]` of the inputs of each weight, observed where it multiplies.

A weight is known by its identity when a function of torch is called with it, so that modules,
functional calls and fused recurrent layers are observed alike. No input of a batch is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_nna.emulation.sites import TRANSPARENT_FILES

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_ATTENTION_ARGUMENTS = tuple(signature(F.multi_head_attention_forward).parameters)

TRANSPARENT_FILES.add(__file__)


class InputMoments(TorchFunctionMode):
    """Sum the outer products of inputs within a ``with`` block.

    Linear layers, convolutions and transposed convolutions of one and two dimensions (by groups,
    one moment for all), recurrent layers (hidden states stand for the states before them) and cells
    and, where PyTorch calls them, the projections of attention. Embeddings, whose inputs are
    numbers of rows, are noted as looked up. Nothing else is observed: three-dimensional
    convolutions, the projections inside of recurrent layers, other functions, and weights that are
    transformed before their use.

    Args:
        parameters: Parameters by name, each seen as ``(rows, columns)``.
        sums: Sums of outer products by name, shape ``(columns, columns)``, that all ranks agree on,
            see :meth:`agree`; earlier ones are added to.
        counts: Numbers of summed input rows by name.
        transposed_groups: Number of groups by name of the parameters that are seen as the weights
            of transposed convolutions, ``(in, out / groups, *positions)``, whose rows are outputs.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sums: dict[str, Tensor] | None = None,
        counts: dict[str, int] | None = None,
        transposed_groups: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = dict(parameters)
        self.sums = {} if sums is None else sums
        self.counts = {} if counts is None else counts
        self._transposed_groups = dict(transposed_groups or {})
        self._fresh: dict[str, Tensor] = {}
        self._fresh_counts: dict[str, int] = {}
        #: Names of weights whose inputs are numbers of rows.
        self.looked_up: set[str] = set()
        self._looks: dict[str, Callable[..., None]] = {
            "embedding": self._embedding,
            "embedding_bag": self._embedding,
            **dict.fromkeys((f"{name}_cell" for name in _RECURRENT), self._cell),
            "linear": self._linear,
            "conv1d": self._convolution,
            "conv2d": self._convolution,
            "conv_transpose1d": self._transposed_convolution,
            "conv_transpose2d": self._transposed_convolution,
            "multi_head_attention_forward": self._attention,
        }

    def moment(self, name: str) -> Float[Tensor, "columns columns"] | None:
        """Compute the mean outer product of a weight's inputs; None without any input.

        Args:
            name: Name of the parameter.
        """
        self.agree()
        if not self.counts.get(name):
            return None
        return self.sums[name] / self.counts[name]

    def agree(self, *, over_ranks: bool = False) -> None:
        """Add the new outer products to the sums.

        Args:
            over_ranks: Whether those of all processes are added.
        """
        for name, parameter in self._parameters.items():
            total, count = self._fresh.get(name), self._fresh_counts.get(name, 0)
            if over_ranks:
                groups = self._transposed_groups.get(name)
                rows = parameter.shape[0] if groups is None else parameter.shape[1] * groups
                columns = parameter.numel() // rows
                total = parameter.new_zeros(columns, columns) if total is None else total
                counted = torch.tensor(float(count), dtype=torch.float64, device=parameter.device)
                dist.all_reduce(total)
                dist.all_reduce(counted)
                count = int(counted)
            if total is not None and count:
                earlier = self.sums.get(name)
                self.sums[name] = total if earlier is None else earlier.add_(total)
                self.counts[name] = self.counts.get(name, 0) + count
        self._fresh, self._fresh_counts = {}, {}

    def clear(self) -> None:
        """Drop all sums and counts."""
        for store in (self.sums, self.counts, self._fresh, self._fresh_counts):
            store.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Observe the inputs of a function that multiplies with a weight."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        look = self._looks.get(name)
        if name in _RECURRENT:
            result = func(*args, **kwargs)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if not kwargs:  # As modules call it.
                    self._recurrent(func, result[0].detach(), *args)
            return result
        if look is not None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                look(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _add(self, weight: Any, inputs: Tensor) -> None:
        """Add the outer products of a weight's inputs, shape ``(…, columns)``."""
        name = self._names.get(id(weight))
        if name is None:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        product = rows.T @ rows
        earlier = self._fresh.get(name)
        self._fresh[name] = product if earlier is None else earlier.add_(product)
        self._fresh_counts[name] = self._fresh_counts.get(name, 0) + len(rows)

    def _embedding(
        self, func: Callable[..., Any], input: Tensor, weight: Any, *_: Any, **__: Any
    ) -> None:
        name = self._names.get(id(weight))
        if name is not None:
            self.looked_up.add(name)

    def _cell(
        self, func: Callable[..., Any], input: Tensor, hx: Any, w_ih: Any, w_hh: Any, *_: Any
    ) -> None:
        self._add(w_ih, input)
        self._add(w_hh, hx[0] if isinstance(hx, (tuple, list)) else hx)

    def _linear(
        self, func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        self._add(weight, input)

    def _attention(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Observe the inputs of the packed projection, or of three, and of the last one."""
        bound = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        inputs = [bound[name] for name in ("query", "key", "value")]
        packed = bound["in_proj_weight"]
        if packed is not None:
            self._add(packed, torch.cat([x.flatten(0, -2) for x in inputs]))
        else:
            for name, x in zip(("q", "k", "v"), inputs, strict=True):
                self._add(bound[f"{name}_proj_weight"], x)
        last = bound["out_proj_weight"]
        if id(last) in self._names:
            unit = torch.eye(last.shape[1], dtype=last.dtype, device=last.device)
            # Without dropout: it would draw numbers that training is to draw.
            arguments = bound | {"out_proj_weight": unit, "out_proj_bias": None, "dropout_p": 0.0}
            self._add(last, func(**arguments)[0])

    def _convolution(
        self,
        func: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        if id(weight) not in self._names:
            return
        axes = weight.ndim - 2
        x = input if input.ndim == axes + 2 else input[None]
        stride, dilation = _tuple(stride, axes), _tuple(dilation, axes)
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            x = F.pad(x, sides)
            padding = 0
        padding = _tuple(0 if padding == "valid" else padding, axes)
        if axes == 1:
            x = x[:, :, None]
            kernel, stride = (1, *kernel), (1, *stride)
            padding, dilation = (0, *padding), (1, *dilation)
        self._add_patches(weight, F.unfold(x, kernel, dilation, padding, stride), groups)

    def _transposed_convolution(
        self,
        func: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        """Observe the patches of the input, with zeros between its elements, below each kernel."""
        if self._transposed_groups.get(self._names.get(id(weight), "")) != groups:
            return
        axes = weight.ndim - 2
        x = input if input.ndim == axes + 2 else input[None]
        kernel = tuple(weight.shape[2:])
        stride, padding = _tuple(stride, axes), _tuple(padding, axes)
        output_padding, dilation = _tuple(output_padding, axes), _tuple(dilation, axes)
        spread = x.new_zeros(*x.shape[:2], *_spread(x.shape[2:], stride))
        every: Any = (..., *(slice(None, None, step) for step in stride))
        spread[every] = x
        sides: list[int] = []
        for axis in reversed(range(axes)):
            before = dilation[axis] * (kernel[axis] - 1) - padding[axis]
            sides += [before, before + output_padding[axis]]
        x = F.pad(spread, sides)
        if axes == 1:
            x, kernel, dilation = x[:, :, None], (1, *kernel), (1, *dilation)
        patches = F.unfold(x, kernel, dilation)
        # The first place of a patch meets the last of the kernel.
        patches = patches.unflatten(1, (x.shape[1], -1)).flip(2).flatten(1, 2)
        self._add_patches(weight, patches, groups)

    def _add_patches(self, weight: Tensor, patches: Tensor, groups: int) -> None:
        """Add patches ``(batch, groups x columns, positions)``: each group is an input of all."""
        batch, _, positions = patches.shape
        self._add(weight, patches.reshape(batch, groups, -1, positions).transpose(2, 3))

    def _recurrent(self, func: Callable[..., Any], output: Tensor, *args: Any) -> None:
        # (input, states, weights, …, batch_first), or (data, batch sizes, states, weights, …).
        is_packed = not isinstance(args[3], bool)
        x, sizes = args[0], args[1:2] if is_packed else ()
        states, weights, biases, layers, _, _, both = args[2:9] if is_packed else args[1:8]
        rest = () if is_packed else args[8:9]
        if not any(id(weight) in self._names for weight in weights):
            return
        is_lstm = isinstance(states, (tuple, list))
        directions = 2 if both else 1
        each = len(weights) // (layers * directions)

        def outputs(x: Tensor, index: int) -> Tensor:
            """Compute the outputs of one layer in one direction; an only one has them already."""
            if layers * directions == 1:
                return output
            own = list(weights[index * each : (index + 1) * each])
            first = [s[index : index + 1] for s in (states if is_lstm else [states])]
            state = tuple(first) if is_lstm else first[0]
            result: Tensor = func(x, *sizes, state, own, biases, 1, 0.0, False, False, *rest)[0]
            return result

        for layer in range(layers):
            results = []
            for direction in range(directions):
                index = layer * directions + direction
                inner, outer = weights[index * each : index * each + 2]
                self._add(inner, x)
                if direction:  # The second direction reads time reversed.
                    result = _reversed(outputs(_reversed(x, sizes, rest), index), sizes, rest)
                else:
                    result = outputs(x, index)
                self._add(outer, result)
                results.append(result)
            x = torch.cat(results, -1)


def _reversed(x: Tensor, sizes: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
    if not sizes:
        return x.flip(1 if rest[0] else 0)
    packed = nn.utils.rnn.PackedSequence(x, sizes[0])
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed)
    turned = torch.zeros_like(padded)
    for row, length in enumerate(lengths.tolist()):
        turned[:length, row] = padded[:length, row].flip(0)
    return nn.utils.rnn.pack_padded_sequence(turned, lengths).data


def _spread(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the sizes of axes whose elements are ``stride`` apart."""
    return [(size - 1) * step + 1 for size, step in zip(shape, stride, strict=True)]


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
