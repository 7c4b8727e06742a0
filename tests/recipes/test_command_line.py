"""The command ``lightning-nna``."""

from __future__ import annotations

import sys

import pytest

from recipes.command_line import COMMANDS, main


def test_without_arguments_it_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["trian"])
    assert refusal.value.code == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_a_command_runs_its_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-nna"])
    # As in a new process: other tests may have imported it.
    monkeypatch.delitem(sys.modules, "recipes.drift_replay", raising=False)
    with pytest.raises(SystemExit) as done:
        main(["drift-replay", "--help"])
    assert done.value.code == 0
    assert "--wavelet" in capsys.readouterr().out
