r"""Products of bytes with a weight, exact and as fast as the processor allows.

.. math:: a = q\, W^\top, \qquad q \in \{-128 \ldots 127\}^{n \times k}

Processors with instructions for products of bytes do four of them where they do one in float32.
Elsewhere the sums are formed in float32 while none can reach :math:`2^{24}`, and in float64 beyond.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host

# float32 holds every integer up to here, and so every partial sum of a matrix product.
FLOAT32_INTEGERS = 2**24
# Largest magnitude of a byte.
_BYTE = 128


@lru_cache(maxsize=1)
def has_byte_products() -> bool:
    """Tell whether this processor multiplies bytes quickly, and this torch correctly.

    Without the instructions torch falls back on a loop that is slower than float32, and where it
    does not, its sums of pairs saturate at 16 bits; the extremes of a small product tell.
    """
    if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
        return False
    extremes = torch.tensor([-128, 127], dtype=torch.int8).repeat(64)
    rows = torch.stack([extremes, extremes.flip(0), extremes.sort().values])
    expected = rows.double() @ rows.double().T
    return torch.equal(torch._int_mm(rows, rows.T).double(), expected)


class ByteProduct:
    """A weight made ready for many products with bytes.

    Args:
        integers: int8, shape ``(out, in)``.

    Example:
        >>> product = ByteProduct(torch.tensor([[1, -2]], dtype=torch.int8))
        >>> product(torch.tensor([[3, 4]], dtype=torch.int8)).int().tolist()
        [[-5]]
    """

    def __init__(self, integers: Tensor) -> None:
        # A single column has strides that torch hands to its kernel as they are, and wrongly so.
        if on_host(integers) and integers.shape[1] > 1 and has_byte_products():
            self.columns = integers.T
            self.dtype = torch.int32
            return
        # Most often the shape alone tells.
        fits = integers.shape[1] * _BYTE**2 < FLOAT32_INTEGERS
        if not fits and in_memory(integers):
            fits = float(integers.abs().sum(1).max()) * _BYTE < FLOAT32_INTEGERS
        self.dtype = torch.float32 if fits else torch.float64
        self.columns = integers.to(self.dtype).T

    def empty(self, rows: int) -> Tensor:
        """Allocate the accumulators of a product, shape ``(rows, out)``."""
        return self.columns.new_empty((rows, self.columns.shape[1]), dtype=self.dtype)

    def __call__(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Accumulators of ``q``, shape ``(n, in)``, int8 and contiguous.

        Args:
            q: Bytes.
            out: Where they go, from :meth:`empty`; given back.
        """
        out = self.empty(q.shape[0]) if out is None else out
        if self.dtype == torch.int32:
            return torch._int_mm(q, self.columns, out=out)
        return torch.mm(q.to(self.dtype), self.columns, out=out)


class WideProduct:
    """A weight made ready for many products with integers of 16 bits, as two products of bytes.

    Args:
        product: Product of bytes with the weight, shape ``(out, in)``.
        row_sums: Sums of the weight's rows, float64, shape ``(out,)``.
        largest_sum: Largest sum of absolute integers over a row.

    Example:
        >>> weight = torch.tensor([[1, -2]], dtype=torch.int8)
        >>> product = WideProduct(ByteProduct(weight), torch.tensor([-1.0]).double(), 3.0)
        >>> product(torch.tensor([[1000, -32768]], dtype=torch.int16)).tolist()
        [[66536]]
    """

    def __init__(self, product: ByteProduct, row_sums: Tensor, largest_sum: float) -> None:
        self._product = product
        # The lower bytes lose 128, to have a sign.
        self._missing = row_sums * _BYTE
        fits = largest_sum * 2.0**16 < 2.0**31 and product.dtype == torch.int32
        self.dtype = torch.int32 if fits else torch.float64
        self._missing = self._missing.to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sums of products, exact, shape ``(n, out)``, of :attr:`dtype`.

        Args:
            x: Integers, int16, shape ``(n, in)``.
        """
        rows = len(x)
        parts = torch.empty((2 * rows, x.shape[1]), dtype=torch.int8, device=x.device)
        # 1000 is 3 * 256 + 104 + 128: both factors, 3 and 104, are bytes with a sign.
        torch.bitwise_right_shift(x, 8, out=parts[:rows])
        torch.add(x, _BYTE, out=parts[rows:])
        sums = self._product(parts)
        high, low = sums[:rows], sums[rows:]
        if self.dtype == torch.int32:
            return low.add_(high, alpha=256).add_(self._missing)
        return high.double().mul_(256).add_(low).add_(self._missing)
