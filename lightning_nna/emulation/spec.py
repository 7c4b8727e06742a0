"""``NNASpec``: the operators and the arithmetic of an accelerator; and presets.

A spec is a frozen dataclass, the name of a preset, or a YAML file with the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_nna.emulation.operators.record import operator_of, operators
from lightning_nna.emulation.runtime_kernels import has_kernel
from lightning_nna.settings_files import read_yaml

Granularity = Literal["per_channel", "per_tensor"]
Rounding = Literal["reference", "double", "single", "shift"]
#: Rounding of reference kernels, see :mod:`.arithmetic.rescaling`.
KernelRounding = Rounding | Literal["real", "reduced"]
Overflow = Literal["saturate", "wrap"]
RuntimeName = Literal["litert", "tflm", "tosa"]
LSTMForm = Literal["sequence", "elementary"]

#: Name of the preset where none is given: that of TFLite-Micro, which microcontrollers and hosts of
#: NPUs run. The defaults of the fields of :class:`NNASpec` are its values.
DEFAULT_PRESET = "tflm-int8"

#: Widths of the accumulators of LiteRT's kernels in bits, by the width of their activations.
LITERT_ACCUMULATOR = {8: 32, 16: 64}
#: Widths of their biases. With 16-bit activations, 64 bits are stored and processors use 40.
LITERT_BIAS = {8: 32, 16: 40}

# Runtimes whose LSTM kernel has projections.
_WITH_PROJECTIONS = frozenset({"litert"})

_CHOICES: dict[str, tuple[Any, ...]] = {
    "activation_bits": (8, 16),
    "weight_bits": (2, 3, 4, 5, 6, 7, 8),
    "bias_bits": (8, 16, 20, 24, 32, 40),
    "accumulator_bits": (16, 20, 24, 32, 40, 48, 64),
    "accumulator_overflow": ("saturate", "wrap"),
    "weight_granularity": ("per_channel", "per_tensor"),
    "rounding": ("reference", "double", "single", "shift"),
    "runtime": ("litert", "tflm", "tosa"),
    "lstm": ("sequence", "elementary"),
    "table_entries": (0, *(2**k for k in range(4, 17))),
}


@dataclass(frozen=True)
class NNASpec:
    """Describe the arithmetic of one accelerator; fields default to those of the default preset.

    Args:
        name: Name in reports and messages.
        activation_bits: Width of activations between operators: 8 (with zero points) or 16
            (symmetric).
        weight_bits: Width b of weights, 2 to 8; values are symmetric, in ±(2^(b-1) - 1).
        bias_bits: Width of biases, which have the scale of the accumulator. If a bias does not fit,
            the weight scale of its channel is raised until it does.
        accumulator_bits: Width of the sum of a fully connected layer, a convolution or a matrix
            product, 16 to 64.
        accumulator_overflow: Behavior of a sum beyond that width: ``"wrap"``, as in LiteRT's
            kernels, or ``"saturate"``.
        weight_granularity: ``"per_channel"`` for one scale for each output channel of a layer, or
            ``"per_tensor"``. LSTM gates and embeddings always have one scale for each tensor, as
            their kernels do.
        runtime: Runtime whose kernels the arithmetic equals, where they differ: ``"litert"`` for
            LiteRT's reference kernels, ``"tflm"`` for TFLite-Micro's, ``"tosa"`` for those of
            TOSA's reference model.
        rounding: Rounding of the requantization: ``"reference"``, that of the runtime's kernel of
            each operator; ``"double"``, a fixed-point multiplier rounded twice, everywhere;
            ``"single"``, the same rounded once; ``"shift"``, a shift alone: then every scale
            is a power of two.
        lstm: Form of LSTM layers: ``"sequence"``, the kernel that runs whole sequences with 8-bit
            hidden states, where the runtime has one, or ``"elementary"``, fully connected layers,
            sums, products, sigmoids and tanh with 16-bit states. See :meth:`lstm_form`.
        table_entries: Number of entries of the tables of 16-bit non-linearities, interpolated
            linearly: a power of two, or 0 for the functions of the reference kernels. 8-bit tables
            have an entry for every input.
        operators: Names of the operators that run on the accelerator; the others run in float and
            are reported as CPU fallbacks. None for all operators, with those registered later.

    Raises:
        ValueError: If a field is out of range; the message names it and what is allowed.

    Example:
        >>> NNASpec(weight_bits=4).weight_max
        7

    Reference:
        The TensorFlow Lite 8-bit quantization specification.
    """

    name: str = DEFAULT_PRESET
    activation_bits: int = 8
    weight_bits: int = 8
    bias_bits: int = 32
    accumulator_bits: int = 32
    accumulator_overflow: Overflow = "wrap"
    weight_granularity: Granularity = "per_channel"
    runtime: RuntimeName = "tflm"
    rounding: Rounding = "reference"
    lstm: LSTMForm = "sequence"
    table_entries: int = 0
    operators: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            _require_choice(field, getattr(self, field), allowed)
        if self.operators is None:
            return
        unknown = sorted(set(self.operators) - set(operators()))
        if unknown:
            raise ValueError(f"operators has unknown names {unknown}; known: {list(operators())}")
        object.__setattr__(self, "operators", tuple(self.operators))

    def has_operator(self, name: str) -> bool:
        """Tell whether an operator runs on the accelerator.

        Example:
            >>> NNASpec(operators=("add", "lstm")).has_operator("mul")
            False
        """
        return name in operators() if self.operators is None else name in self.operators

    def has_kernel(self, name: str, dtype: str) -> bool:
        """Tell whether the runtime has a kernel, as measured (see :mod:`.runtime_kernels`).

        Args:
            name: Name of the kernel among the schema's operators.
            dtype: Type of its first operand, as ``"int8"``.

        Example:
            >>> NNASpec(runtime="tflm").has_kernel("TOPK_V2", "int8")
            False
        """
        return has_kernel(self.runtime, name, dtype)

    def runs_alike(self, names: Collection[str], sites: Collection[str]) -> bool:
        """Tell whether an accelerator with other operators emulates the same sites of a network.

        Args:
            names: Names of the operators of the other accelerator.
            sites: Sites of the network, as ``path/operator``.

        Example:
            >>> NNASpec().runs_alike(["add", "mul"], ["encoder/add"])
            True
        """
        # A site that ran in float has the name of its torch function.
        labels = {site.rsplit("/", 1)[-1] for site in sites}
        records = (operators().get(label) or operator_of(label) for label in labels)
        used = {operator.name for operator in records if operator is not None and operator.name}
        return all(self.has_operator(name) == (name in names) for name in used)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """All fields except the name, as plain values; equal ones mean equal results.

        Example:
            >>> NNASpec("my-accelerator").arithmetic == NNASpec().arithmetic
            True
        """
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        names = operators() if self.operators is None else self.operators
        return {**fields, "operators": sorted(names)}

    @property
    def weight_max(self) -> int:
        """Largest integer of a weight; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def power_of_two_scales(self) -> bool:
        """Tell whether every scale is a power of two."""
        return self.rounding == "shift"

    def accumulator_width(self, bits: int) -> int:
        """Return the width of the accumulators of an operator, in bits.

        In LiteRT, kernels of 8 bits sum in 32 bits and kernels of 16 bits in 64, also within one
        network. An accelerator with another width has that width everywhere.

        Args:
            bits: Width of the operator's activations, 8 or 16.

        Example:
            >>> NNASpec().accumulator_width(16), NNASpec(accumulator_bits=24).accumulator_width(16)
            (64, 24)
        """
        own = self.accumulator_bits
        return LITERT_ACCUMULATOR[bits] if own == LITERT_ACCUMULATOR[self.activation_bits] else own

    def bias_width(self, bits: int) -> int:
        """Return the width of the biases of an operator, in bits.

        Args:
            bits: Width of the operator's activations, 8 or 16.

        Example:
            >>> NNASpec().bias_width(16), NNASpec(bias_bits=16).bias_width(16)
            (40, 16)
        """
        own = self.bias_bits
        return LITERT_BIAS[bits] if own == LITERT_BIAS[self.activation_bits] else own

    def largest_bias(self, bits: int) -> float:
        """Return the largest bias, in units of the accumulator.

        It fits the width of biases, and leaves half of the accumulator's range to the products.

        Args:
            bits: Width of the operator's activations, 8 or 16.

        Example:
            >>> NNASpec().largest_bias(8) == 2**30
            True
        """
        half = 2.0 ** (self.accumulator_width(bits) - 2)
        return min(half, 2.0 ** (self.bias_width(bits) - 1) - 1)

    def rounding_of(
        self, reference: KernelRounding, micro: KernelRounding | None = None
    ) -> KernelRounding:
        """Return the rounding of an operator, given that of LiteRT's reference kernel.

        Args:
            reference: Rounding of LiteRT's reference kernel.
            micro: Rounding of the kernel in TFLite-Micro and in TOSA; None for the same.

        Example:
            >>> NNASpec(runtime="tflm").rounding_of("real", "double")
            'double'
        """
        if self.rounding != "reference":
            return self.rounding
        return reference if micro is None or self.runtime == "litert" else micro

    @property
    def factor_precision(self) -> type[np.floating]:
        """Type in which kernels form the factor of their requantization.

        Some of LiteRT's, of a product, a PReLU, an absolute value, a leaky ReLU and a hard swish,
        have single precision; all of TFLite-Micro's have double precision, and in TOSA all but that
        of a product.

        Example:
            >>> NNASpec(runtime="litert").factor_precision, NNASpec(runtime="tflm").factor_precision
            (<class 'numpy.float32'>, <class 'numpy.float64'>)
        """
        return np.float32 if self.runtime == "litert" else np.float64

    def lstm_form(self, *, projected: bool = False) -> LSTMForm:
        """Return the form of an LSTM layer: elementary, too, where the runtime lacks a kernel.

        Args:
            projected: Whether the layer has a projection, which TFLite-Micro's kernel lacks.

        Example:
            >>> micro = NNASpec(runtime="tflm")
            >>> micro.lstm_form(), micro.lstm_form(projected=True)
            ('sequence', 'elementary')
        """
        has_one = self.has_kernel("UNIDIRECTIONAL_SEQUENCE_LSTM", "int8")
        if projected:
            has_one = self.runtime in _WITH_PROJECTIONS
        return self.lstm if has_one else "elementary"

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> NNASpec:
        """Build a spec from plain keys, as a YAML file has them.

        Args:
            settings: Values by field name. Missing fields have the values of the preset that the
                key ``preset`` names, by default :data:`DEFAULT_PRESET`.

        Raises:
            ValueError: If a key is unknown, or a value is not allowed.

        Example:
            >>> NNASpec.from_mapping({"name": "tiny", "weight_bits": 4}).weight_bits
            4
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known - {"preset"})
        if unknown:
            allowed = sorted(known | {"preset"})
            raise ValueError(f"an NNASpec has no key {unknown}; allowed: {allowed}")
        values = dict(settings)
        base = values.pop("preset", DEFAULT_PRESET)
        if base not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {base!r}")
        if values.get("operators") is not None:
            values["operators"] = tuple(values["operators"])
        return dataclasses.replace(PRESETS[base], **values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> NNASpec:
        """Read a spec from a YAML file.

        Args:
            path: Path of a file with a mapping of field names to values.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no YAML, has a key twice, is not a mapping, or a key or value
                is not allowed; the message names the file.
        """
        content = read_yaml(path)
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: a spec file holds a mapping of keys, got {content!r}")
        try:
            return cls.from_mapping(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def resolve_spec(spec: str | NNASpec | Mapping[str, Any]) -> NNASpec:
    """Convert an argument ``spec`` to an :class:`NNASpec`.

    Args:
        spec: Spec, name of a preset, mapping of keys, or path of a YAML file.

    Raises:
        ValueError: If a name is neither a preset nor an existing file.

    Example:
        >>> resolve_spec("litert-int8").activation_bits
        8
    """
    if isinstance(spec, NNASpec):
        return spec
    if isinstance(spec, Mapping):
        return NNASpec.from_mapping(spec)
    if spec in PRESETS:
        return PRESETS[spec]
    if Path(spec).is_file():
        return NNASpec.from_yaml(spec)
    raise ValueError(
        f"spec {spec!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a YAML file"
    )


def _require_choice(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    """Raise unless a value is allowed; a bool is not allowed as a number."""
    if isinstance(value, bool) or value not in allowed:
        if name == "table_entries":
            shown = "0 or a power of two from 16 to 65536"
        else:
            shown = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be {shown}; got {value!r}")


#: Accelerators by name; the page on the emulation describes them.
PRESETS: dict[str, NNASpec] = {
    spec.name: spec
    for spec in (
        NNASpec("tflm-int8", runtime="tflm"),
        NNASpec(
            "tflm-int16x8", runtime="tflm", activation_bits=16, accumulator_bits=64, bias_bits=40
        ),
        # What Vela leaves to the host runs on TFLite-Micro. Vela does not return the cell state of
        # the LSTM's kernel; the elementary form takes fewer cycles, too.
        NNASpec("ethos-u", runtime="tflm", lstm="elementary"),
        NNASpec("litert-int8", runtime="litert"),
        NNASpec(
            "litert-int16x8",
            runtime="litert",
            activation_bits=16,
            accumulator_bits=64,
            bias_bits=40,
        ),
        NNASpec("tosa-int8", runtime="tosa"),
        NNASpec(
            "tosa-int16x8", runtime="tosa", activation_bits=16, accumulator_bits=64, bias_bits=40
        ),
        NNASpec(
            "shift",
            runtime="litert",
            rounding="shift",
            accumulator_bits=24,
            accumulator_overflow="saturate",
            table_entries=256,
        ),
    )
}
