"""Say what to write instead of functions that the accelerator does not have.

:func:`.coverage` and errors of the export show these texts. A record says itself why it lacks a
form: its ``supports`` may return the text. Here are the texts for functions that no record has, and
for forms whose record says only that it lacks them.
"""

from __future__ import annotations

from typing import Any

from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.spec import NNASpec

_FRONT_END = (
    "compute spectra before the emulated modules, which targets= selects, or as a convolution with "
    "fixed sines and cosines"
)
_THREE_AXES = "accelerators have no such operator of three axes: write it with those of two axes"
_ORDER = "sort, and search, after the emulated modules, which targets= selects"
_WHOLE = (
    "no kernel rounds a quotient: compute with integers, as indices are, or before the emulated "
    "modules, which targets= selects"
)
_STATISTICS = (
    "it takes the statistics of every input: use batch norm with running statistics, or layer norm "
    "over the channels"
)

#: Remedies by the name of the torch function, without the underscore of its in-place form.
REMEDIES: dict[str, str] = {
    **dict.fromkeys(("fft", "rfft", "irfft", "ifft", "fft_rfft", "stft", "istft"), _FRONT_END),
    **dict.fromkeys(
        (
            *("conv3d", "conv_transpose3d", "max_pool3d", "avg_pool3d", "lp_pool3d"),
            *("adaptive_avg_pool3d", "adaptive_max_pool3d", "max_pool3d_with_indices"),
            *("adaptive_max_pool3d_with_indices", "max_unpool3d"),
        ),
        _THREE_AXES,
    ),
    **dict.fromkeys(
        (
            *("max_pool1d_with_indices", "max_pool2d_with_indices"),
            *("adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices"),
            *("max_unpool1d", "max_unpool2d"),
        ),
        "no kernel has the indices of maxima: leave return_indices out, and write F.interpolate or "
        "a transposed convolution instead of F.max_unpool",
    ),
    **dict.fromkeys(("sort", "argsort", "msort", "topk", "kthvalue", "median", "mode"), _ORDER),
    **dict.fromkeys(("remainder", "fmod", "floor_divide", "__floordiv__", "__mod__"), _WHOLE),
    **dict.fromkeys(("group_norm", "instance_norm"), _STATISTICS),
    "batch_norm": (
        "it takes the statistics of the example: use track_running_stats=True, and training=False "
        "where it is called as a function"
    ),
    "cosine_similarity": "write (F.normalize(x1) * F.normalize(x2)).sum(1)",
    "embedding": (
        "max_norm scales rows as they are looked up: scale the table itself, as with "
        "torch.renorm, and leave max_norm out"
    ),
    "log": (
        "if it is part of a front end, as the logarithm of a spectrogram, leave the front end out "
        "of the emulated modules with targets="
    ),
    "nan_to_num": "leave it out: results of an accelerator are finite",
    "norm": "write x.square().sum(dim).sqrt()",
    "rms_norm": "write x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight",
    "scatter_reduce": "write scatter_add for sums, and divide them by their counts for means",
    "rrelu": "write F.leaky_relu with the mean of its slopes",
}


def remedy_of(name: str) -> str:
    """Return what to write instead of a torch function; empty if nothing is known.

    Args:
        name: Name of the function or method, as ``"rrelu_"``.

    Example:
        >>> remedy_of("rrelu_")
        'write F.leaky_relu with the mean of its slopes'
    """
    return REMEDIES.get(name.rstrip("_"), "")


def reason_against(
    operator: Operator, name: str, spec: NNASpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Return why an accelerator does not run a call of an operator, and what to write instead.

    Args:
        operator: Operator of the torch function.
        name: Name of the torch function.
        spec: Accelerator.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The text, which is empty if nothing is known; None if the accelerator runs the call.

    Example:
        >>> from lightning_nna.emulation.operators.catalog import operator_of
        >>> small = NNASpec("small", operators=("fully_connected",))
        >>> reason_against(operator_of("tanh"), "tanh", small, (), {})
        "'small' lists the operators that it has, without tanh"
    """
    if operator.name and not spec.has_operator(operator.name):
        return f"{spec.name!r} lists the operators that it has, without {operator.name}"
    bits = spec.activation_bits
    if bits not in operator.widths:
        widths = " or ".join(map(str, operator.widths))
        return remedy_of(name) or f"{operator.name} has {widths}-bit activations, and not {bits}"
    answer = operator.supports(*args, **kwargs)
    if isinstance(answer, str):
        return answer
    return None if answer else remedy_of(name)
