"""What a failed run leaves in its log folder, and what of it is printed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback
from loopwright.framework import Module, Trainer
from loopwright.framework.lifecycle import signals
from loopwright.loggers import CSVLogger
from loopwright.strategies.launch import failure_files, failures
from loopwright.strategies.launch.failure_files import add_reports
from loopwright.strategies.launch.job_report import failure_text
from loopwright.strategies.launch.peers import Peer
from loopwright.strategies.launch.rank_report import (
    RankReport,
    read_report,
    write_report,
)
from loopwright.strategies.launch.readable import readable
from tests.samples import as_dataset


def report(rank: int, kind: Any, **more: Any) -> RankReport:
    """What is known of a rank; it has just happened."""
    values = {"message": f"why {rank}", "time": time.time() + rank, **more}
    return RankReport(rank, kind, **values)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "failure.json").read_text())


def test_who_fails_at_once_is_in_one_file(tmp_path: Path) -> None:
    """Eight ranks fail; each writes by itself, and none overwrites another one's cause."""
    folder = str(tmp_path / "made")
    ranks = [
        threading.Thread(
            target=add_reports,
            args=(folder, "job", 8, [report(i, "failed" if i in (3, 5) else "lost")]),
        )
        for i in range(8)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    content = told(tmp_path / "made")
    assert [item["rank"] for item in content["ranks"]] == [3, 5, 0, 1, 2, 4, 6, 7]
    assert content["summary"] == "Rank 3 of 8 failed: why 3"
    assert sorted(os.listdir(folder)) == ["failure.json", "failure.txt"]


def test_a_cause_is_kept_and_another_jobs_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    add_reports(folder, "job", 2, [report(1, "failed", trace="a trace")])
    # Its agent saw only that it was killed, and that its peer has lost it.
    reports = [report(1, "lost"), report(0, "lost")]
    ordered = add_reports(folder, "job", 2, reports)
    assert [item.kind for item in ordered] == ["failed", "lost"]
    assert "a trace" in (tmp_path / "failure.txt").read_text()

    for job, attempt in (("job", 1), ("other", 1)):
        (alone,) = add_reports(folder, job, 2, [report(0, "lost", attempt=attempt)])
        assert (alone.rank, told(tmp_path)["attempt"]) == (0, attempt)
    # The same job, started once more by hand.
    monkeypatch.setattr(failure_files, "_STARTED", time.time() + 99)
    assert len(add_reports(folder, "other", 2, [report(1, "lost", attempt=1)])) == 1


def test_what_a_killed_process_has_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the lock, and has left half a file."""
    monkeypatch.setattr(failure_files, "_STALE_SECONDS", 0.05)
    lock = tmp_path / "failure.json.lock"
    lock.touch()
    (tmp_path / "failure.json").write_text("{")
    assert len(add_reports(str(tmp_path), "job", 2, [report(0, "lost")])) == 1
    assert not lock.exists()


class Interrupted(RankReport):
    """A signal comes while it is added."""

    def text(self, world_size: int) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().text(world_size)


def test_who_is_told_to_end_while_it_reports_reports_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler has interrupted the thread that holds the lock: to wait for it would take for ever."""
    monkeypatch.setattr(signals, "one_is_gone", lambda peers: True)
    stopped: list[Any] = []
    monkeypatch.setattr(signals, "record_stop", stopped.append)

    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            first = Interrupted(**vars(report(0, "failed", trace="a trace")))
            add_reports(str(tmp_path), "job", 2, [first])
            raise ValueError("reported")

    with pytest.raises(ValueError, match="reported"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            Fails(), DataLoader(as_dataset(torch.ones(4, 2)))
        )
    assert stopped == []
    assert "a trace" in (tmp_path / "failure.txt").read_text()
    assert not (tmp_path / "failure.json.lock").exists()


class Overtaken(RankReport):
    """Another process takes the lock for one that was left, while it is added."""

    def text(self, world_size: int) -> str:
        os.remove("failure.json.lock")
        return super().text(world_size)


def test_a_process_whose_lock_was_taken_away_can_still_be_told_to_end() -> None:
    first = Overtaken(**vars(report(0, "failed")))
    with pytest.raises(FileNotFoundError):
        add_reports(".", "job", 2, [first])
    assert not failure_files.is_adding()


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def validation_step(
        self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def raises(hook: str, error: BaseException) -> Callback:
    """A callback that raises in a hook."""

    def fail(self: Callback, *args: Any) -> None:
        if not args[0].sanity_checking:
            raise error

    # As if it had been defined by that name.
    fail.__code__ = fail.__code__.replace(co_name=hook)
    return type("Raises", (Callback,), {hook: fail})()


class Broken(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def end_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer], None]:
    """Fit, and end the program by what it raises, as Python does where nobody catches it."""
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    monkeypatch.setattr(failures._worker, "has_hook", False)
    data = as_dataset(torch.ones(8, 2))

    def end(trainer: Trainer) -> None:
        try:
            trainer.fit(Net(), DataLoader(data, 4), [DataLoader(data, 4)] * 2)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)

    return end


def trainer(folder: Path, callback: Callback, **more: Any) -> Trainer:
    options = {"logger": False, "enable_progress_bar": False, **more}
    return Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_model_summary=False, callbacks=[callback],
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("setup", "epoch 0, batch 0, global step 0, in setup"),
        ("on_train_batch_end", "epoch 0, batch 1, global step 1"),
        (
            "on_validation_batch_end",
            "epoch 0, batch 2, global step 2, in validation (batch 0 of loader 0)",
        ),
        (
            "on_save_checkpoint",
            "epoch 0, batch 2, global step 2, while a checkpoint was saved",
        ),
        ("on_fit_end", "epoch 1, batch 0, global step 2, in teardown"),
    ],
)
def test_the_place_names_phase_and_hook(
    hook: str, place: str, end_by: Any, tmp_path: Path
) -> None:
    end_by(trainer(tmp_path, raises(hook, ValueError("no"))))
    wanted = f"Rank 0 of 1 failed at {place}, in {hook} of Raises: ValueError: no"
    assert told(tmp_path)["summary"] == wanted


def test_only_what_ends_a_program_is_told(end_by: Any, tmp_path: Path) -> None:
    """In the folder of the run's first logger; and not what a user has asked for."""
    for error, more in (
        (KeyboardInterrupt(), {}),
        (SystemExit(0), {}),
        (ValueError(), {"fast_dev_run": True}),
    ):
        end_by(trainer(tmp_path, raises("on_train_start", error), **more))
        assert not (tmp_path / "failure.json").exists()
    caught = trainer(tmp_path, raises("on_train_start", ValueError("caught")))
    with pytest.raises(ValueError, match="caught"):
        caught.fit(Net(), DataLoader(as_dataset(torch.ones(8, 2)), 4))
    assert not (tmp_path / "failure.json").exists()

    logger = CSVLogger(tmp_path, name="runs")
    end_by(trainer(tmp_path, raises("on_train_start", SystemExit(3)), logger=logger))
    content = told(tmp_path / "runs" / "version_0")
    assert (content["exit_code"], content["world_size"]) == (3, 1)


def test_who_ends_as_asked_and_is_stopped_while_it_leaves(tmp_path: Path) -> None:
    """The agent sends SIGTERM as soon as the quicker rank has left."""
    folder = tmp_path / "job" / "attempt_0"
    failures_of_agent = {}
    for rank, exit_code in ((0, 138), (1, -signal.SIGTERM)):
        asked = report(rank, "asked", message="SIGUSR1", exit_code=138, time=1.0 - rank)
        write_report(str(folder / str(rank) / "error.json"), asked)
        ended = SimpleNamespace(exitcode=exit_code, pid=rank + 1, timestamp=2)
        failures_of_agent[rank] = ended
    job = failure_text(failures_of_agent, str(tmp_path), 2)
    assert (job.exit_code, job.rank) == (138, 1)
    assert job.text == "Rank 1 of 2 ended by SIGUSR1, as asked"


def test_a_process_that_is_asked_to_end_says_with_which_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    failures.record_end_by_signal(signal.SIGUSR1)
    told_by_it = read_report(str(tmp_path / "error.json"))
    assert told_by_it is not None
    assert (told_by_it.kind, told_by_it.exit_code) == ("asked", 138)


NOTES_ITS_PLACE = """
import json, os
from loopwright.strategies.launch.peers import note_place, place_file
from loopwright.strategies.launch.processes import process_here

note_place("the beginning, which is a long way off")
note_place("step 3")
print(json.dumps([process_here(), place_file()]), flush=True)
input()
"""


def test_a_peer_that_was_killed_is_named_at_once_with_its_last_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever loses it may be ended by torchrun before it has cleaned up."""
    command = [sys.executable, "-c", NOTES_ITS_PLACE]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        peer = Peer(*json.loads(process.stdout.readline()))
        assert not peer.has_ended()
        process.kill()
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name in variables:
        monkeypatch.setenv(name, variables[name])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(failures._worker, "folder", lambda: str(tmp_path))
    monkeypatch.setattr(failures._worker, "peers", {1: peer})
    failures.record_failure(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    ended = "Rank 1 of 2 ended with no report of its own: it was killed, or left by os._exit, last seen at step 3"
    assert capfd.readouterr().err == f"{ended}\n"
    assert told(tmp_path)["summary"] == ended


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (Broken(), ["Broken: <exception str() failed>"]),
        (ValueError("ü \udc80 模型"), ["ValueError: ü \\udc80 模型"]),
        (ValueError("x" * 10_000_000), ["x" * 10_000_000]),
    ],
    ids=["no text", "not ASCII", "ten megabytes"],
)
def test_any_exception_can_be_told(
    error: Exception, parts: list[str], end_by: Any, tmp_path: Path
) -> None:
    error.__cause__ = KeyError("a cause")
    parts = [*parts, "KeyError: 'a cause'"]
    if sys.version_info >= (3, 11):
        group = ExceptionGroup  # noqa: F821 # since Python 3.11
        error.__cause__ = group("two", [error.__cause__, OSError("other")])
        error.add_note("a note")
        parts += ["two (2 sub-exceptions)", "OSError: other", "a note"]
    end_by(trainer(tmp_path, raises("on_train_start", error)))
    text = (tmp_path / "failure.txt").read_text()
    assert [part for part in parts if part not in text] == []
    assert len(told(tmp_path)["summary"]) < 500


def test_a_traceback_that_is_printed_shows_the_users_functions(
    end_by: Any, tmp_path: Path
) -> None:
    end_by(trainer(tmp_path, raises("on_train_batch_end", ValueError("x" * 99_000))))
    whole = (tmp_path / "failure.txt").read_text()
    shown = readable(whole)
    assert "loop/fit.py" in whole
    assert "loop/fit.py" not in shown
    files = re.findall(r'File ".*/(\w+\.py)"', shown)
    assert files == ["test_failure_files.py"] * 2
    assert "calls inside of loopwright and torch]" in shown
    assert "characters …" in shown
    # Where the user's last function called one of ours, that is the cause.
    with pytest.raises(ValueError, match="devices") as caught:
        Trainer(devices=-7)
    inside = "".join(traceback.format_exception(caught.value))
    assert readable(inside) == inside
