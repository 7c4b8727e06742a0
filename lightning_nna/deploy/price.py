r"""``VelaPrice``: cycles or memory of one weight on an Ethos-U, layer by layer.

The smallest part of a module that is called and has the parameter is its *layer*. Each layer is
exported alone, in the shapes in which it is called, and compiled by Vela. With :math:`C(W)` the
layer's cost with a weight :math:`W`, :math:`C_0` its cost as it is and :math:`k` the number of its
weights, the price of the weight is

.. math:: C(W) - C_0 + C_0 / k,

so that prices of all weights add up to the cost of all layers, as far as one does not hide behind
another. What the compiler makes of several layers together is not in it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_nna.deploy.graph import CaptureError
from lightning_nna.deploy.tflite import TFLiteModel, export_tflite
from lightning_nna.deploy.vela import vela_report
from lightning_nna.emulation.attachment import calibrate, strip
from lightning_nna.emulation.spec import NNASpec
from lightning_nna.weights.pipeline import WeightGrid, digest_of, pipeline_of
from lightning_nna.weights.selection import operator_weights

#: What is paid: cycles of all calls, or bytes in the memory that weights are stored in.
Budget = Literal["cycles", "memory"]
Spec = str | NNASpec | Mapping[str, Any]
#: A weight, and the scales with which it is integers.
WeightAndGrid = tuple[Tensor, WeightGrid | None]


class _Call:
    """A layer alone, calibrated for its arguments in one combination of shapes.

    Args:
        layer: Layer, which is copied.
        arguments: Arguments and keyword arguments.
        count: How often the layer is called so.
        spec: Accelerator.
    """

    def __init__(self, layer: nn.Module, arguments: Any, count: int, spec: Spec) -> None:
        self.count = count
        self._leaves, self._structure = tree_flatten(_with_ranges(arguments))
        self._tensors = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self._spec = spec
        self._layer = strip(copy.deepcopy(layer)).cpu().eval()
        self._is_calibrated = False

    @torch.no_grad()
    def export(self, changed: Mapping[str, WeightAndGrid], path: str) -> TFLiteModel:
        """Write the program of the layer with other weights.

        Args:
            changed: Weights and their scales by their names in the layer.
            path: Path of the program.

        Raises:
            CaptureError: If it has none.
        """
        example = [self._leaves[position] for position in self._tensors]
        if not self._is_calibrated:
            calibrate(self._layer, [example], lambda layer, x: self._run(layer, *x), self._spec)
            self._is_calibrated = True
        pipeline = pipeline_of(self._layer)
        parameters = {name: self._layer.get_parameter(name) for name in changed}
        originals = {name: parameter.clone() for name, parameter in parameters.items()}
        claimed = []
        try:
            for name, (weight, grid) in changed.items():
                parameters[name].copy_(weight)
                if grid is not None:
                    claimed.append(_OnGrid(WeightGrid(grid.scales.cpu(), grid.maximum)))
                    pipeline.claim(name, parameters[name], claimed[-1])
            return export_tflite(self._layer, example, path, forward=self._run)
        finally:
            for transform in claimed:
                pipeline.release(transform)
            for name, parameter in parameters.items():
                parameter.copy_(originals[name])

    def _run(self, layer: nn.Module, *tensors: Tensor) -> Any:
        leaves = list(self._leaves)
        for position, tensor in zip(self._tensors, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return layer(*args, **kwargs)


@dataclass(frozen=True)
class _Layer:
    """A part of the module with weights.

    Attributes:
        path: Name in the module.
        names: Names of its weights in the layer, by their names in the whole module.
        calls: Its calls, one for each combination of shapes.
    """

    path: str
    names: Mapping[str, str]
    calls: Sequence[_Call]


class VelaPrice:
    """Price weights by compiling their layers for an Ethos-U.

    Prices are measured when they are asked for, once for each weight; with ``cache`` they are also
    on the disk, by the contents of the layer's program.

    Args:
        module: Trained module, which stays unchanged; its weights of now are those of the layers.
        example_inputs: Arguments of its forward, in the shapes of the device.
        forward: Function of the module and the arguments that calls every layer as often as the
            device does, for example for a second of sound; None for one call of the forward.
        budget: ``"cycles"``: cycles of one such run, without operators on the CPU, for which Vela
            has none. ``"memory"``: bytes of flash and DRAM of the layer's constants and commands.
        accelerator: See :func:`.vela_report`.
        system: See :func:`.vela_report`.
        memory_mode: See :func:`.vela_report`.
        spec: Preset, or specification, of the programs.
        cache: Folder of Vela's reports, see :func:`.vela_report`; None to remember them here alone.

    Raises:
        ValueError: If ``budget`` is unknown.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> price = VelaPrice(net, [torch.randn(1, 64)], system="Ethos_U55_Deep_Embedded")
        >>> dense = price("0.weight", net[0].weight)
        >>> price("0.weight", torch.zeros(64, 64)) < 0.5 * dense
        True
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Sequence[Any],
        *,
        forward: Callable[..., Any] | None = None,
        budget: Budget = "cycles",
        accelerator: str = "ethos-u55-128",
        system: str | None = None,
        memory_mode: str | None = None,
        spec: Spec = "ethos-u",
        cache: str | Path | None = None,
    ) -> None:
        if budget not in get_args(Budget):
            raise ValueError(f"budget must be 'cycles' or 'memory', got {budget!r}")
        self.budget: Budget = budget
        self.accelerator, self.system, self.memory_mode = accelerator, system, memory_mode
        self.cache = cache
        self._layers = _layers_of(module, example_inputs, forward or _call, spec)
        self._costs: dict[Any, float] = {}

    @property
    def unit(self) -> str:
        """Unit of the prices."""
        return "cycles" if self.budget == "cycles" else "bytes"

    def __call__(self, name: str, weight: Tensor, grid: WeightGrid | None = None) -> float:
        """Return the price of a weight; negative if it saves more than its share of the layer.

        Args:
            name: Name of the parameter.
            weight: Weight that the device would have, in the shape of the parameter.
            grid: Scales with which ``weight`` is integers; None for those of the accelerator.

        Raises:
            ValueError: If no part of the module that has the parameter was called.
            CaptureError: If its layer has no program; names the layer.
            VelaError: If Vela is missing or rejects the program.
        """
        return self.together({name: (weight, grid)})

    def together(self, weights: Mapping[str, WeightAndGrid]) -> float:
        """Return the price of several weights at once, those of one layer in one program.

        Args:
            weights: Weights and their scales, see :meth:`__call__`, by the names of parameters.

        Raises:
            ValueError: See :meth:`__call__`.
            CaptureError: See :meth:`__call__`.
            VelaError: See :meth:`__call__`.
        """
        for name in weights:
            if not any(name in layer.names for layer in self._layers):
                raise ValueError(
                    f"{name} has no price: no module that has it was called with the example "
                    f"inputs; give a forward that calls it, or leave it out of targets"
                )
        total = 0.0
        for layer in self._layers:
            # A weight that is tied belongs to several layers.
            changed = {layer.names[name]: weights[name] for name in layer.names if name in weights}
            if changed:
                rest = 1 - len(changed) / len(layer.names)
                total += self._cost(layer, changed) - (rest and rest * self._cost(layer, {}))
        return total

    def _cost(self, layer: _Layer, changed: Mapping[str, WeightAndGrid]) -> float:
        """Return the cost of a layer in which some weights are others."""
        key = (
            layer.path,
            *(
                (name, digest_of(weight), None if grid is None else digest_of(grid.scales))
                for name, (weight, grid) in sorted(changed.items())
            ),
        )
        if key not in self._costs:
            self._costs[key] = self._measured(layer, changed)
        return self._costs[key]

    def _measured(self, layer: _Layer, changed: Mapping[str, WeightAndGrid]) -> float:
        total = 0.0
        for number, call in enumerate(layer.calls):
            if self.budget == "memory" and number:
                break  # Weights are stored once, for calls in all shapes.
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = call.export(changed, f"{folder}/layer.tflite")
                except CaptureError as error:
                    name = layer.path or "the module"
                    raise CaptureError(f"{name} has no price: {error}") from error
                report = vela_report(
                    model.path,
                    accelerator=self.accelerator,
                    system=self.system,
                    memory_mode=self.memory_mode,
                    cache=self.cache,
                    compare_dense=False,
                )
            if self.budget == "cycles":
                total += call.count * report.cycles
            else:
                on_the_cpu = max(0, model.weight_bytes - report.weight_bytes)
                total += report.flash_bytes + report.dram_bytes + on_the_cpu
        return total


class _OnGrid:
    """Transform of a weight that is on a grid already."""

    method = "vela_price"
    order = 1

    def __init__(self, grid: WeightGrid) -> None:
        self.grid: WeightGrid | None = grid

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        return weight

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad


def _layers_of(
    module: nn.Module, example_inputs: Sequence[Any], forward: Callable[..., Any], spec: Spec
) -> list[_Layer]:
    """Run a module, and return its layers with the calls that they got."""
    # By path and shapes: how often, and the arguments of the first time.
    seen: dict[str, dict[Any, tuple[int, Any]]] = {}

    def observer(path: str) -> Callable[..., None]:
        def observe(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = args, kwargs
            by_shapes, shapes = seen.setdefault(path, {}), _shapes(arguments)
            count, first = by_shapes.get(shapes, (0, arguments))
            by_shapes[shapes] = count + 1, first

        return observe

    handles = [
        part.register_forward_pre_hook(observer(path), with_kwargs=True)
        for path, part in module.named_modules()
    ]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            forward(module, *example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    names = {id(module.get_parameter(name)): name for name in operator_weights(module)}
    names_by_path: dict[str, dict[str, str]] = {}
    for own_name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in names:
            continue
        parts = own_name.split(".")
        ends = range(len(parts) - 1, -1, -1)
        end = next((end for end in ends if ".".join(parts[:end]) in seen), None)
        if end is not None:
            in_layer = names_by_path.setdefault(".".join(parts[:end]), {})
            in_layer.setdefault(names[id(parameter)], ".".join(parts[end:]))
    layers = []
    for path, in_layer in names_by_path.items():
        part = module.get_submodule(path)
        calls = [_Call(part, arguments, count, spec) for count, arguments in seen[path].values()]
        layers.append(_Layer(path, in_layer, calls))
    return layers


def _call(module: nn.Module, *args: Any) -> Any:
    return module(*args)


def _shapes(arguments: Any) -> Any:
    """Return what tells calls apart: shapes and types of tensors, and all else."""
    leaves, structure = tree_flatten(arguments)
    described = [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return (*described, str(structure))


def _with_ranges(arguments: Any) -> Any:
    """Copy arguments; floats that are all equal, as first states are, get a range."""
    leaves, structure = tree_flatten(arguments)
    generator = torch.Generator().manual_seed(0)
    copies = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().clone()
            if (
                leaf.is_floating_point()
                and leaf.numel()
                and bool((leaf == leaf.flatten()[0]).all())
            ):
                leaf = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        copies.append(leaf)
    return tree_unflatten(copies, structure)
