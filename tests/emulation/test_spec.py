from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nna import NNASpec
from lightning_nna.emulation.spec import resolve_spec


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weight_bitz": 8}, "weight_bitz"),
        ({"weight_bits": 0}, "weight_bits must be 2, 3, 4, 5, 6, 7, 8; got 0"),
        ({"weight_bits": 33}, "weight_bits must be 2, 3, 4, 5, 6, 7, 8; got 33"),
        ({"weight_bits": True}, "weight_bits"),
        ({"activation_bits": 12}, "activation_bits must be 8, 16; got 12"),
        ({"accumulator_bits": 33}, "accumulator_bits must be 16, 20, 24, 32, 40, 48, 64; got 33"),
        ({"bias_bits": 0}, "bias_bits must be 8, 16, 20, 24, 32, 40; got 0"),
        ({"table_entries": 300}, "table_entries must be 0 or a power of two from 16 to 65536"),
        ({"rounding": "up"}, "rounding must be 'reference', 'double', 'single', 'shift'"),
        ({"accumulator_overflow": "trap"}, "accumulator_overflow must be 'saturate', 'wrap'"),
        ({"weight_granularity": "per_row"}, "weight_granularity"),
        ({"operators": ["add", "kthvalue"]}, "kthvalue"),
        ({"preset": "npu"}, "preset must be one of"),
    ],
)
def test_a_wrong_key_or_value_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NNASpec.from_mapping(settings)


def test_yaml_round_trip_and_its_errors(tmp_path: Path) -> None:
    good, bad, scalar = (tmp_path / name for name in ("good.yaml", "bad.yaml", "scalar.yaml"))
    good.write_text("name: four\nweight_bits: 4\noperators: [add, lstm]\n")
    bad.write_text("weight_bits: 33\n")
    scalar.write_text("hello\n")
    assert resolve_spec(str(good)) == NNASpec("four", weight_bits=4, operators=("add", "lstm"))
    with pytest.raises(ValueError, match=r"bad\.yaml: weight_bits must be 2, 3"):
        resolve_spec(str(bad))
    with pytest.raises(ValueError, match="holds a mapping"):
        resolve_spec(str(scalar))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(
        ValueError,
        match=r"'int9' is neither a preset \(ethos-u, litert-int16x8, litert-int8, shift, tflm-",
    ):
        resolve_spec("int9")


def test_a_file_may_change_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "narrow.yaml"
    path.write_text("preset: shift\nname: narrow\naccumulator_bits: 20\n")
    spec = resolve_spec(str(path))
    assert (spec.rounding, spec.accumulator_bits, spec.name) == ("shift", 20, "narrow")
