from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_nna.files import whole_file, write_whole


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_whole(tmp_path / "new" / "a.txt", "whole")
    folder = str(tmp_path / "new")
    assert events == [f"{folder}/.a.txt.{os.getpid()}", "replace", folder]
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill() -> None:
        with whole_file(path) as unfinished:
            unfinished.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fill()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_that_is_a_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError, match="a"):
        write_whole(tmp_path / "a" / "b.txt", "text")
