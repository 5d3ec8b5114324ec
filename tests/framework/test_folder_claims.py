"""Folders that belong to one run at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from loopwright.framework.folder_claims import claim_folder, release_folder
from tests.framework.models import ended, in_a_child


def test_runs_that_come_and_go_never_share_a_folder(tmp_path: Path) -> None:
    """Empty folders go with the run that made them, and another may be about to take that one."""
    path = str(tmp_path / "kept")

    def act() -> None:
        for _ in range(300):
            claimed = claim_folder(path)
            held = f"{tmp_path}/{claimed.replace('/', ':')}.held"
            os.close(os.open(held, os.O_CREAT | os.O_EXCL))  # raises if somebody else has it
            os.unlink(held)
            release_folder(claimed)

    children = [in_a_child(act) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]


def test_a_users_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("theirs", "ours"):
        release_folder(claim_folder(str(tmp_path / name)))
    assert os.listdir(tmp_path) == ["theirs"]


def test_a_folder_that_comes_and_goes_while_it_is_made(tmp_path: Path) -> None:
    path = str(tmp_path / "kept")

    def act() -> None:
        for _ in range(3000):
            with suppress(FileExistsError):
                os.mkdir(path)
            sum(range(10_000))  # the folder is there for a moment, and gone for another
            with suppress(OSError):
                os.rmdir(path)
            sum(range(10_000))

    child = in_a_child(act)
    for _ in range(1500):
        release_folder(claim_folder(path))
    assert ended(child) == 0


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("theirs")
    with pytest.raises(FileExistsError, match="kept"):
        claim_folder(str(tmp_path / "kept"))
