"""C++ sources of a program for TFLite-Micro: the file as an array, operators, test vectors.

Everything is in one namespace, so that several programs go into one firmware.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_nna.deploy.runtimes import UnsupportedProgramError
from lightning_nna.deploy.tflite import ProgramFile

#: Operators that ``MicroMutableOpResolver`` has a function for, see ``micro_mutable_op_resolver.h``
#: of tensorflow/tflite-micro.
MICRO_OPERATORS = frozenset(
    """
    ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND
    BROADCAST_ARGS BROADCAST_TO CALL_ONCE CAST CEIL CONCATENATION CONV_2D COS CUMSUM
    DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP
    EQUAL EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GREATER
    GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG
    LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM MAX_POOL_2D MEAN MINIMUM
    MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PADV2 PRELU QUANTIZE READ_VARIABLE REDUCE_MAX REDUCE_MIN
    RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT SELECT_V2
    SHAPE SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE
    SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV
    UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK VAR_HANDLE WHILE ZEROS_LIKE
    """.split()
)
# Operators whose function is not named by their words, each with one capital letter.
_FUNCTIONS = {
    "BATCH_MATMUL": "AddBatchMatMul",
    "CUMSUM": "AddCumSum",
    "PADV2": "AddPadV2",
    "TFLM_DECODE": "AddDecode",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    "ethos-u": "AddEthosU",
}
_TYPES = {"int8": "std::int8_t", "int16": "std::int16_t", "int32": "std::int32_t"}
_TYPES |= {"bool": "bool", "float32": "float"}
_PER_LINE = 16


def resolver_function(operator: str) -> str:
    """Return the function of ``MicroMutableOpResolver`` that adds an operator.

    Args:
        operator: Name in the schema, or of a custom operator.

    Raises:
        UnsupportedProgramError: If TFLite-Micro does not have it.

    Example:
        >>> resolver_function("CONV_2D"), resolver_function("BATCH_MATMUL")
        ('AddConv2D', 'AddBatchMatMul')
    """
    if operator in _FUNCTIONS:
        return _FUNCTIONS[operator]
    if operator not in MICRO_OPERATORS:
        raise UnsupportedProgramError(
            f"TFLite-Micro has no kernel of {operator}: use another function in the module, or "
            "emulate it with a preset of this runtime, as tflm-int8 is, which names the call site"
        )
    return "Add" + "".join(word.title() for word in operator.split("_"))


def data_header(name: str, size_bytes: int, arena_bytes: int | None, file: ProgramFile) -> str:
    """Return the header of a program's array, with the figures that a caller needs.

    Args:
        name: Namespace.
        size_bytes: Bytes of the program.
        arena_bytes: Bytes of working memory; None if they were not measured.
        file: Program, for its inputs and outputs.
    """
    lines = [
        "// The program, for tflite::GetModel.",
        "extern const unsigned char kData[];",
        f"constexpr std::size_t kDataBytes = {size_bytes};",
        "",
    ]
    if arena_bytes is not None:
        lines += [
            "// An arena in which TFLite-Micro's reference kernels run on a 64-bit computer.",
            f"constexpr std::size_t kArenaBytes = {arena_bytes};",
            "",
        ]
    lines.append("// real value = scale * (integer - zero point)")
    for kind, tensors in (("Input", file.input_tensors), ("Output", file.output_tensors)):
        for number, tensor in enumerate(tensors):
            lines.append(f"// {kind} {number}: {tensor.dtype} {list(tensor.shape)}, {tensor.name}")
            elements = int(np.prod(tensor.shape))
            lines.append(f"constexpr std::size_t k{kind}{number}Elements = {elements};")
            if tensor.qparams is not None:
                scale = np.float32(tensor.qparams.scale)
                lines.append(f"constexpr float k{kind}{number}Scale = {_float(scale)};")
                zero_point = tensor.qparams.zero_point
                lines.append(f"constexpr int k{kind}{number}ZeroPoint = {zero_point};")
    return _header(f"{name}_data", name, lines)


def data_source(name: str, contents: bytes) -> str:
    """Return the source of a program's array.

    Args:
        name: Namespace.
        contents: Bytes of the program.
    """
    return _source(
        f"{name}_data",
        name,
        [
            "alignas(16) const unsigned char kData[] = {",
            *_hexadecimal(contents),
            "};",
            'static_assert(sizeof(kData) == kDataBytes, "the header is of another program");',
        ],
    )


def operators_header(name: str, operators: Mapping[str, int]) -> str:
    """Return the header that adds a program's operators to a resolver.

    Args:
        name: Namespace.
        operators: Number of instructions of each operator by its name.

    Raises:
        UnsupportedProgramError: If TFLite-Micro does not have an operator.
    """
    calls = [f"operators.{resolver_function(each)}() == kTfLiteOk" for each in operators]
    lines = [
        f"using Operators = tflite::MicroMutableOpResolver<{len(operators)}>;",
        "",
        "inline bool AddOperators(Operators& operators) {",
        "  using namespace tflite;",
        "  return " + " &&\n         ".join(calls) + ";",
        "}",
    ]
    include = '#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"'
    return _header(f"{name}_operators", name, lines, [include])


def vectors_header(
    name: str, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
) -> str:
    """Return the header of test vectors.

    Args:
        name: Namespace.
        inputs: Integers of each input, the number of a vector first.
        outputs: Integers of each output, the number of a vector first.
    """
    lines = [f"constexpr std::size_t kVectors = {len(outputs[0])};"]
    lines += [f"extern const {each};" for each in _declarations(inputs, outputs)]
    return _header(f"{name}_test_vectors", name, lines, [f'#include "{name}_data.h"'])


def vectors_source(
    name: str, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
) -> str:
    """Return the source of test vectors, see :func:`vectors_header`."""
    lines = []
    arrays = (*inputs, *outputs)
    for declaration, values in zip(_declarations(inputs, outputs), arrays, strict=True):
        lines.append(f"const {declaration} = {{")
        for vector in values.reshape(len(values), -1):
            lines += ["    {", *_numbers(vector), "    },"]
        lines.append("};")
    return _source(f"{name}_test_vectors", name, lines)


def check_source(name: str, inputs: int, outputs: int) -> str:
    """Return the source of a function that compares the test vectors on the device.

    Args:
        name: Namespace.
        inputs: Number of inputs.
        outputs: Number of outputs.
    """
    copies = [
        f"    std::memcpy(interpreter.input({k})->data.raw, kInput{k}[vector],\n"
        f"                sizeof(kInput{k}[0]));"
        for k in range(inputs)
    ]
    comparisons = [
        f"    if (std::memcmp(interpreter.output({k})->data.raw, kOutput{k}[vector],\n"
        f"                    sizeof(kOutput{k}[0])) != 0) {{\n"
        "      return false;\n"
        "    }"
        for k in range(outputs)
    ]
    return "\n".join(
        [
            "#include <cstring>",
            "",
            f'#include "{name}_operators.h"',
            f'#include "{name}_test_vectors.h"',
            '#include "tensorflow/lite/micro/micro_interpreter.h"',
            '#include "tensorflow/lite/schema/schema_generated.h"',
            "",
            f"namespace {name} {{",
            "",
            "// Compares every test vector; the arena is aligned to 16 bytes.",
            "bool Check(std::uint8_t* arena, std::size_t arena_bytes) {",
            "  using namespace tflite;",
            "  Operators operators;",
            "  if (!AddOperators(operators)) {",
            "    return false;",
            "  }",
            "  MicroInterpreter interpreter(GetModel(kData), operators, arena, arena_bytes);",
            "  if (interpreter.AllocateTensors() != kTfLiteOk) {",
            "    return false;",
            "  }",
            "  for (std::size_t vector = 0; vector < kVectors; ++vector) {",
            "    if (interpreter.Reset() != kTfLiteOk) {  // States start at zero.",
            "      return false;",
            "    }",
            *copies,
            "    if (interpreter.Invoke() != kTfLiteOk) {",
            "      return false;",
            "    }",
            *comparisons,
            "  }",
            "  return true;",
            "}",
            "",
            f"}}  // namespace {name}",
            "",
        ]
    )


def _header(file: str, name: str, lines: Sequence[str], includes: Sequence[str] = ()) -> str:
    guard = f"LIGHTNING_NNA_{file.upper()}_H_"
    first = [f"#ifndef {guard}", f"#define {guard}", "", "#include <cstddef>", "#include <cstdint>"]
    body = [*includes, "", f"namespace {name} {{", "", *lines, "", f"}}  // namespace {name}"]
    return "\n".join([*first, "", *body, "", f"#endif  // {guard}", ""])


def _source(file: str, name: str, lines: Sequence[str]) -> str:
    first = [f'#include "{file}.h"', "", f"namespace {name} {{", ""]
    return "\n".join([*first, *lines, "", f"}}  // namespace {name}", ""])


def _declarations(
    inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
) -> list[str]:
    return [
        f"{_TYPES[str(values.dtype)]} k{kind}{number}[kVectors][k{kind}{number}Elements]"
        for kind, arrays in (("Input", inputs), ("Output", outputs))
        for number, values in enumerate(arrays)
    ]


def _hexadecimal(contents: bytes) -> list[str]:
    text = [f"0x{byte:02x}" for byte in contents]
    return _wrapped(text)


def _numbers(values: NDArray[np.generic]) -> list[str]:
    if values.dtype == np.float32:
        return _wrapped([_float(np.float32(x)) for x in values])
    return _wrapped([str(int(x)) for x in values])


def _float(x: np.float32) -> str:
    """Write a float so that the same bits are read back."""
    return f"{float(x):.8e}f"


def _wrapped(numbers: Sequence[str]) -> list[str]:
    return [
        "    " + ", ".join(numbers[start : start + _PER_LINE]) + ","
        for start in range(0, len(numbers), _PER_LINE)
    ]
