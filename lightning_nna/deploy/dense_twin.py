"""A program without what a compiler can compress: the other side of a comparison of cycles.

Zeros and few values make a program smaller. An Ethos-U85 may then compute a layer in another way,
which can take longer than the dense layer does. Only the same program with weights that cannot be
compressed tells.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

# A weight with fewer zeros and more values is not compressed enough to change anything.
_LEAST_ZEROS = 0.2
_MOST_VALUES = 32
# Of weights on 8 bits: the largest of some hundred normal ones is about three deviations.
_DEVIATION = 40.0


def dense_twin(contents: bytes) -> bytes | None:
    """Return a program with normally distributed weights in place of compressible ones.

    Shapes, scales and instructions stay; the twin is for a compiler's estimates alone.

    Args:
        contents: Program of :func:`.export_tflite`.

    Returns:
        Its twin, the same for the same program; None if no weight has many zeros or few values.

    Example:
        >>> import tempfile, torch
        >>> from lightning_nna import calibrate
        >>> from lightning_nna.deploy import export_tflite
        >>> net = torch.nn.Linear(64, 64)
        >>> net.weight.data *= torch.rand(64, 64) < 0.5
        >>> emulator = calibrate(net, [torch.randn(8, 64)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_tflite(net, [torch.randn(1, 64)], f"{folder}/net.tflite").path
        ...     twin = dense_twin(path.read_bytes())
        >>> twin is None or dense_twin(twin) is None
        True
    """
    altered = bytearray(contents)
    model = schema.Model.GetRootAs(altered)
    graph = model.Subgraphs(0)
    generator, is_altered = np.random.default_rng(0), False
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        if tensor.Type() != schema.TensorType.INT8 or tensor.ShapeLength() < 2:
            continue
        weights = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if not isinstance(weights, np.ndarray) or not len(weights):
            continue
        is_pruned = np.mean(weights == 0) >= _LEAST_ZEROS
        if not is_pruned and len(np.unique(weights)) > _MOST_VALUES:
            continue
        drawn = generator.normal(0, _DEVIATION, len(weights)).round().clip(-127, 127)
        weights[:] = drawn.astype(np.int8).view(weights.dtype)
        is_altered = True
    return bytes(altered) if is_altered else None
