"""Folders that belong to one run at a time."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from loopwright.callbacks import LambdaCallback, ModelCheckpoint
from loopwright.framework.checkpoint.folder_claims import claim_folder, release_folders
from loopwright.framework.checkpoint.reader import load_checkpoint
from tests.framework.models import Linear, ended, in_a_child, loader, quiet


def test_runs_that_come_and_go_never_share_a_folder(tmp_path: Path) -> None:
    """Empty folders go with the run that made them, and another may be about to take that one."""
    path, owner = str(tmp_path / "kept"), object()

    def act() -> None:
        for _ in range(300):
            claimed = claim_folder(path, owner)
            held = f"{tmp_path}/{claimed.replace('/', ':')}.held"
            os.close(
                os.open(held, os.O_CREAT | os.O_EXCL)
            )  # raises if somebody else has it
            os.unlink(held)
            release_folders(owner)

    children = [in_a_child(act) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]


def test_a_users_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("theirs", "ours"):
        claim_folder(str(tmp_path / name), name)
        release_folders(name)
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
        claim_folder(path, child)
        release_folders(child)
    assert ended(child) == 0


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("theirs")
    with pytest.raises(FileExistsError, match="kept"):
        claim_folder(str(tmp_path / "kept"), "a run")


def test_runs_in_threads_of_one_process_have_folders_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As two trials of a search at once; callbacks of one run share a folder, and runs one after the other, too."""
    meet = threading.Barrier(2, timeout=30)

    def run(number: int) -> list[str]:
        folders = []
        for _ in range(2):
            saves = [
                ModelCheckpoint(tmp_path / "kept", filename=f"{n}", every_n_epochs=n)
                for n in (1, 2)
            ]
            trainer = quiet(
                *saves,
                LambdaCallback(on_train_start=lambda trainer, module: meet.wait()),
                max_epochs=2,
            )
            torch.manual_seed(number)
            trainer.fit(module := Linear(), loader())
            meet.wait()  # both have ended
            for save in saves:
                found = load_checkpoint(save.best_model_path)["state_dict"][
                    "layer.weight"
                ]
                assert torch.equal(found, module.layer.weight)
            paths = [str(save.dirpath) for save in saves]
            folders.append({os.path.relpath(path, tmp_path) for path in paths})
        return folders

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(run, range(2)))
    for both in zip(*told, strict=True):
        assert sorted(map(sorted, both)) == [["kept"], ["kept/v1"]]
    assert (
        len([line for line in caplog.messages if "is in use by another run" in line])
        == 4
    )


def test_a_run_that_failed_has_no_folder_any_more(tmp_path: Path):
    """A hook that raises while others end the run keeps no folder from the next."""

    def fail(*_: object) -> None:
        raise RuntimeError("no more")

    for number in range(2):
        fails = (
            LambdaCallback(on_train_start=fail, on_exception=fail)
            if number == 0
            else LambdaCallback()
        )
        save = ModelCheckpoint(tmp_path / "kept")
        with (
            pytest.raises(RuntimeError, match="no more")
            if number == 0
            else nullcontext()
        ):
            quiet(save, fails).fit(Linear(), loader())
        assert save.dirpath == str(tmp_path / "kept")
