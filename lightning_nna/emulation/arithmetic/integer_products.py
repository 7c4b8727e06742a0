r"""Products of bytes with a weight, exact and as fast as the processor allows.

.. math:: a = q\, W^\top, \qquad q \in \{-128 \ldots 127\}^{n \times k}

Processors with instructions for products of bytes do four of them where they do one in float32.
Elsewhere the sums are formed in float32 while none can reach :math:`2^{24}`, and in float64 beyond.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

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
        if integers.is_cpu and integers.shape[1] > 1 and has_byte_products():
            self.columns = integers.T
            self.dtype = torch.int32
            return
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
