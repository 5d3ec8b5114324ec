"""After which failures the processes of a job are started again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopwright.strategies.launch.rank_report import RankReport, write_report
from loopwright.strategies.launch.restarts import Restarts


class Job:
    """Fails as a test says, in two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restarts = Restarts(20, str(folder), 2, 1)
        self.attempts = 0

    def is_restarted(self, code: int, *reports: RankReport) -> bool:
        """Whether another attempt follows one in which rank 1 ended with this exit code, and ranks left reports."""
        for report in reports:
            attempt = self.folder / "run" / f"attempt_{self.attempts}"
            write_report(str(attempt / str(report.rank) / "error.json"), report)
        # What torchelastic tells of a process that has failed.
        failure: Any = SimpleNamespace(exitcode=code, pid=1, timestamp=1.0)
        follows = self.restarts.follows(self.attempts, {1: failure})
        self.attempts += 1
        return follows


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def raised(
    message: str, step: int, where: str = "in training_step of Net"
) -> RankReport:
    place = f"epoch 0, batch {step}, global step {step}, {where}"
    return RankReport(1, "failed", place, message, "Traceback …")


def test_three_failures_at_one_step_end_a_job(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    error = "RuntimeError: a bad sample"
    for step in (7, 7, 8, 8):
        assert job.is_restarted(1, raised(error, step))
    told = capsys.readouterr().err
    assert "Rank 1 of 2 failed at epoch 0, batch 7, global step 7" in told
    assert "Restart 4 of 20" in told
    assert not job.is_restarted(1, raised(error, 8))
    assert (
        "Not restarted: 3 attempts in a row have failed at global step 8, this one by RuntimeError: a bad sample on "
        "rank 1" in capsys.readouterr().err
    )


def test_a_killed_rank_has_failed_where_its_peers_lost_it(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 9, 9, 13):
        assert job.is_restarted(-9, RankReport(0, "lost", f"global step {step}"))
    assert job.is_restarted(-9, RankReport(0, "lost", "global step 13"))
    assert not job.is_restarted(-9, RankReport(0, "lost", "global step 13"))
    assert "at global step 13, this one by SIGKILL on rank 1" in capsys.readouterr().err


def test_nobody_knows_where_a_single_process_was_killed(job: Job) -> None:
    """So all restarts are for it."""
    assert all(job.is_restarted(-9) for _ in range(19))


@pytest.mark.parametrize(
    "report",
    [
        raised("ValueError: max_epochs must be an integer", 0),
        raised("TypeError: no such argument", 12, "in setup, in setup of Data"),
        RankReport(1, "failed", "", "ModuleNotFoundError: No module named 'timm'"),
    ],
    ids=["at step 0", "in setup", "before the run"],
)
def test_what_would_come_again_is_not_tried_again(
    report: RankReport, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not job.is_restarted(1, report)
    kind = report.message.partition(":")[0]
    assert f"Not restarted: {kind} before the first step" in capsys.readouterr().err


def test_errors_of_the_surroundings_are_tried_again(job: Job) -> None:
    for message in ("OSError: the disk is away", "ValueError: a bad batch"):
        assert job.is_restarted(1, raised(message, 4 + job.attempts))


def test_a_program_that_ends_as_it_begins_is_tried_three_times(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [job.is_restarted(2) for _ in range(3)] == [True, True, False]
    assert "failed as they began, this one by exit code 2" in capsys.readouterr().err


def test_a_job_that_was_told_to_end_is_not_begun_again(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not job.is_restarted(138, RankReport(1, "asked", message="SIGUSR1"))
    assert "Not restarted: SIGUSR1 has asked it to end" in capsys.readouterr().err


def test_a_machine_that_is_asked_to_leave_is_left(tmp_path: Path) -> None:
    """Where a job has one number of machines, all end together."""
    asked = RankReport(1, "asked", message="SIGTERM")
    assert not Job(tmp_path / "one").is_restarted(143, asked)
    job = Job(tmp_path / "several")
    job.restarts = Restarts(20, str(job.folder), 2, 2, goes_on_without=True)
    assert job.is_restarted(143, asked)
