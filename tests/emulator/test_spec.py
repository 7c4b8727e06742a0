from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nna import NNASpec
from lightning_nna.emulator.spec import resolve_spec


def test_the_default_is_the_int8_preset() -> None:
    assert resolve_spec("litert-int8") == NNASpec()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weight_bitz": 8}, "weight_bitz"),
        ({"weight_bits": 0}, "weight_bits must be 2 to 8, got 0"),
        ({"weight_bits": 33}, "weight_bits must be 2 to 8, got 33"),
        ({"weight_bits": True}, "weight_bits"),
        ({"activation_bits": 16}, "activation_bits must be 8, got 16"),
        ({"weight_granularity": "per_row"}, "weight_granularity"),
        ({"operators": ["add", "softmax"]}, "softmax"),
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
    with pytest.raises(ValueError, match=r"bad\.yaml: weight_bits must be 2 to 8"):
        resolve_spec(str(bad))
    with pytest.raises(ValueError, match="holds a mapping"):
        resolve_spec(str(scalar))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'int9' is neither a preset \(litert-int8\)"):
        resolve_spec("int9")
