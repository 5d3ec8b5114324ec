"""A job that is told to end in time: it saves, goes back into SLURM's queue, and goes on by itself when it is started
again."""

from __future__ import annotations

import csv
import faulthandler
import itertools
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loopwright.callbacks import LambdaCallback
from loopwright.framework import Trainer
from loopwright.strategies.launch.attempts import Attempt, this_attempt
from loopwright.strategies.launch.slurm import slurm_job
from tests.framework.models import Linear, loader

CODE = 128 + signal.SIGUSR1


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Path]:
    """A batch job, and a ``scontrol`` that writes its arguments down and fails if there is a file ``broken``."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\ncd {tmp_path}\necho "$@" >> asked\ntest ! -e broken || {{ echo "Job is pending" >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "loopwright")
    yield tmp_path
    # A job that is back in the queue ignores the one, and the other puts it back whenever it comes.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def attempt(monkeypatch: pytest.MonkeyPatch, restarts: int) -> None:
    """Let the next fit be the first of a program that SLURM has started ``restarts`` times before."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    numbers = "loopwright.framework.lifecycle.restarted._numbers"
    monkeypatch.setattr(numbers, itertools.count(1))


def fit(
    at_step: dict[int, Any] | None = None,
    ckpt_path: str | None = None,
    told_in: str = "",
    module: type[Linear] = Linear,
    **arguments: Any,
) -> Trainer:
    """Train 20 steps; ``at_step`` says which signal comes, or what is called, in which step."""

    def act(trainer: Trainer, *_: Any) -> None:
        action = (at_step or {}).get(trainer.global_step)
        if callable(action):
            action()
        elif action is not None:
            os.kill(os.getpid(), action)

    hooks: dict[str, Any] = {"on_train_batch_start": act}
    if told_in:
        hooks[told_in] = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)
    options: dict[str, Any] = {"logger": "csv", "max_epochs": 2, "accelerator": "cpu"}
    trainer = Trainer(
        **options | arguments,
        callbacks=[LambdaCallback(**hooks)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(), loader(10), ckpt_path=ckpt_path)
    return trainer


def asked(cluster: Path) -> list[str]:
    file = cluster / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_a_job_goes_on_in_its_own_run(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt(monkeypatch, 0)
    with pytest.raises(SystemExit) as ended:
        fit({7: signal.SIGUSR1})
    assert ended.value.code == CODE
    assert asked(cluster) == ["requeue 77"]
    assert "SLURM job 77 is back in the queue" in caplog.text
    # Meanwhile, others train there.
    for job, steps in (("78", 20), ("79", 10)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        attempt(monkeypatch, 0)
        assert fit(max_epochs=steps // 10).global_step == steps

    monkeypatch.setenv("SLURM_JOB_ID", "77")
    attempt(monkeypatch, 1)
    resumed = fit()
    assert "This job (slurm 77) was started again: going on from " in caplog.text
    assert (resumed.global_step, Path(resumed.log_dir or "").name) == (20, "version_0")
    # The program's second fit is another one, which this job has not begun before.
    assert Path(fit().log_dir or "").name == "version_3"


def test_a_fit_with_a_checkpoint_of_the_users_goes_on_from_its_own(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt(monkeypatch, 0)
    fit(max_epochs=1).save_checkpoint("before.ckpt")

    attempt(monkeypatch, 0)
    with pytest.raises(SystemExit):
        fit({13: signal.SIGUSR2}, "before.ckpt")
    assert asked(cluster) == ["requeue 77"]
    attempt(monkeypatch, 1)
    seen: list[int] = []
    fit({step: partial(seen.append, step) for step in range(20)}, "before.ckpt")
    assert seen == [*range(14, 20)]
    assert "and not from ckpt_path='before.ckpt'" in caplog.text


@pytest.mark.parametrize(
    ("variables", "arguments", "number"),
    [
        ({}, {}, signal.SIGTERM),  # as scancel sends it
        ({"SLURM_JOB_NAME": "interactive"}, {}, signal.SIGUSR1),
        ({"LOOPWRIGHT_LAUNCH": "off"}, {}, signal.SIGUSR1),
        ({}, {"auto_requeue": False}, signal.SIGUSR1),
        ({}, {"enable_checkpointing": False}, signal.SIGUSR1),
    ],
)
def test_what_is_not_put_back_into_the_queue(
    variables: dict[str, str],
    arguments: dict[str, Any],
    number: int,
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempt(monkeypatch, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        fit({7: number}, **arguments)
    assert ended.value.code == 128 + number
    assert asked(cluster) == []
    saves = arguments.get("enable_checkpointing", True)
    assert bool(list(cluster.rglob("*-step=8.ckpt"))) == saves


def test_a_task_of_an_array_and_a_queue_that_refuses(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt(monkeypatch, 0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (cluster / "broken").touch()
    with pytest.raises(SystemExit):
        # SIGTERM, which comes when the time is up, takes nothing back.
        fit(
            {
                7: lambda: [
                    os.kill(os.getpid(), number)
                    for number in (signal.SIGUSR1, signal.SIGTERM)
                ]
            }
        )
    assert asked(cluster) == ["requeue 70_3"]
    said = "could not be put back into the queue (scontrol requeue 70_3: Job is pending); its checkpoint is there"
    assert said in caplog.text
    assert list(cluster.rglob("*-step=8.ckpt"))


@pytest.mark.parametrize("told_by", ["variables", "squeue"])
def test_the_time_limit_is_known_without_a_signal(
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    told_by: str,
) -> None:
    attempt(monkeypatch, 0)
    fit(max_epochs=1)
    begin = int(time.time()) - 95
    if told_by == "variables":
        monkeypatch.setenv("SLURM_JOB_START_TIME", str(begin))
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(begin + 100))
    else:
        program = cluster / "bin" / "squeue"
        times = [datetime.fromtimestamp(begin + s).isoformat() for s in (0, 100)]
        program.write_text(f"#!/bin/sh\necho {' '.join(times)}\n")
        program.chmod(0o755)
    attempt(monkeypatch, 1)
    with pytest.raises(SystemExit) as ended:
        fit(max_epochs=100_000)
    assert ended.value.code == CODE
    assert "at SIGUSR1 or SIGUSR2, or 10 s before" in caplog.text
    assert "is about to end by its time limit" in caplog.text
    assert asked(cluster) == ["requeue 77"]


def test_a_job_whose_time_is_too_short_is_not_begun_for_ever(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt(monkeypatch, 0)
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 900))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 200))
    for hook in ("on_fit_start", "on_train_start"):
        with pytest.raises(SystemExit):
            fit(told_in=hook)
        assert "its time was up before the first step" in caplog.text
        caplog.clear()
    assert asked(cluster) == []


@pytest.mark.parametrize("hook", ["on_fit_start", "on_fit_end"])
def test_a_signal_while_nothing_is_trained_puts_the_job_back_at_once(
    hook: str, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM then ends the process; here, nothing does."""
    attempt(monkeypatch, 0)
    assert fit(told_in=hook).global_step == 20
    assert asked(cluster) == ["requeue 77"]
    # Afterwards, as while a model is tested.
    os.kill(os.getpid(), signal.SIGUSR1)
    assert asked(cluster) == ["requeue 77"] * 2


def test_a_handler_of_c_code_is_left_alone(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python does not know of those that ``faulthandler.register`` sets."""
    attempt(monkeypatch, 0)
    # A fit before may have its own there, as it stays until the program ends.
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    # That of sitecustomize would count as registered still, and not be set again.
    faulthandler.unregister(signal.SIGUSR2)
    with open("stacks", "w") as file:
        faulthandler.register(signal.SIGUSR2, file)
        try:
            assert fit({7: signal.SIGUSR2}).global_step == 20
        finally:
            faulthandler.unregister(signal.SIGUSR2)
    assert "most recent call first" in Path("stacks").read_text()
    assert not asked(cluster)


def test_a_batch_script_without_srun(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    fit(max_epochs=1)
    assert "SLURM job 77 has 4 tasks, and 1 process here: srun" in caplog.text
    caplog.clear()
    # A single task of srun's, as one that a person tries.
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    fit(max_epochs=1)
    assert "srun" not in caplog.text


SLURM = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
ELASTIC = {
    "TORCHELASTIC_RUN_ID": "a1",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "TORCHELASTIC_MAX_RESTARTS": "9",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (SLURM, Attempt("c 7", 0)),
        (SLURM | {"SLURM_RESTART_COUNT": "2"}, Attempt("c 7", 2)),
        (SLURM | ARRAY, Attempt("c 5_2", 0)),
        (SLURM | ELASTIC | {"SLURM_RESTART_COUNT": "2"}, Attempt("c 7", 5)),
        (
            SLURM | ELASTIC | {"SLURM_JOB_NAME": "bash"},
            Attempt("torchelastic a1", 3, 9),
        ),
        (SLURM | {"SLURM_JOB_NAME": "bash"}, None),
        (ELASTIC, Attempt("torchelastic a1", 3, 9)),
        # Machines that join are no failures, and counted in addition.
        (
            ELASTIC | {"LOOPWRIGHT_AGENT_JOB": "j", "LOOPWRIGHT_ATTEMPT": "4"},
            Attempt("torchelastic j", 4, 9),
        ),
        (SLURM | {"LOOPWRIGHT_JOB": "mine"}, Attempt("mine", None)),
        (SLURM | {"LOOPWRIGHT_LAUNCH": "off"}, None),
    ],
)
def test_an_attempt_is_told_from_other_jobs(
    env: dict[str, str], expected: Attempt | None
) -> None:
    assert this_attempt(env) == expected


def test_jobs_that_torchrun_names_alike_are_told_apart() -> None:
    first = this_attempt(ELASTIC | {"TORCHELASTIC_RUN_ID": "none"})
    assert first is not None
    assert str(os.getppid()) in first.job
    assert first.words == "Restart 3 of 9"


class Logs(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_a_job_without_a_checkpoint_begins_anew_in_its_folder(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And its curve does, so that each step is there once."""

    def die() -> None:
        # As if it were killed: nothing is saved.
        raise SystemExit(9)

    options: dict[str, Any] = {
        "enable_checkpointing": False, "log_every_n_steps": 1, "logger": ["csv", "jsonl"],
        "module": Logs,
    }  # fmt: skip
    attempt(monkeypatch, 0)
    with pytest.raises(SystemExit):
        fit({7: die}, **options)
    (note,) = cluster.glob(".attempt-*")
    attempt(monkeypatch, 1)
    again = fit(**options)
    assert "there is no checkpoint of the attempts before" in caplog.text
    folders = [Path(logger.log_dir or "").name for logger in again.loggers]
    assert folders == ["version_0", "version_1"]
    assert not note.exists()
    text = (Path(again.loggers[0].log_dir or "") / "metrics.csv").read_text()
    steps = [int(row["step"]) for row in csv.DictReader(text.splitlines())]
    assert steps == list(range(1, 21))
    # A program that is started by itself has a folder of its own.
    monkeypatch.delenv("SLURM_JOB_ID")
    assert Path(fit(**options).log_dir or "").name == "version_2"


def test_a_short_job_saves_later() -> None:
    for limit, margin in ((100, 10.0), (7200, 120.0)):
        job = slurm_job(SLURM | {"SLURM_JOB_START_TIME": "50", "SLURM_JOB_END_TIME": str(50 + limit)})  # fmt: skip
        assert job is not None
        assert (job.margin, job.end_time) == (margin, 50 + limit)
