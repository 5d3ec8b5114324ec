"""Whether processes that have failed are started again: not where that would end in the same way."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from .job_report import JobFailure, failure_text, tell_job
from .rank_report import RankReport, first_line

# So many failures in a row at one step end a job.
_FAILURES_AT_ONE_STEP = 3

# A program that ends by itself within so many seconds, and has not said how, failed as it began.
_BEGINNING = 60.0

# Exceptions that come of how a program is written or called. Raised before a first step, they come each time.
_OF_THE_PROGRAM = {
    "AssertionError",
    "AttributeError",
    "CheckpointError",
    "ImportError",
    "IndexError",
    "KeyError",
    "ModuleNotFoundError",
    "NameError",
    "NotImplementedError",
    "SyntaxError",
    "TypeError",
    "ValueError",
}
_STEP = re.compile(r"global step (\d+)")
_BEFORE_TRAINING = re.compile(r"global step 0\b|in setup|in prepare_data")


class Restarts:
    """Told of each failure of a job, says whether its processes are started again.

    Args:
        allowed: how often.
        folder: where the ranks write their reports.
        processes: number of ranks on this machine.
        num_nodes: number of machines.
        goes_on_without: whether the job goes on with fewer of them.
    """

    def __init__(
        self,
        allowed: int,
        folder: str,
        processes: int,
        num_nodes: int,
        goes_on_without: bool = False,
    ) -> None:
        self._allowed = allowed
        self._folder = folder
        self._processes = processes
        self._num_nodes = num_nodes
        self._goes_on_without = goes_on_without
        self._began = time.monotonic()
        # Where the last attempts have failed, all at one place.
        self._place = ""
        self._times = 0

    def follows(self, num_restarts: int, failures: Mapping[int, Any]) -> bool:
        """Say on standard error what has failed, and that a restart follows, or why not.

        Args:
            num_restarts: how many there have been.
            failures: torchelastic's ``ProcessFailure``, by rank.
        """
        failure = failure_text(failures, self._folder, self._processes, self._num_nodes)
        why_not = self._why_not(failure)
        self._began = time.monotonic()
        if why_not:
            # What has failed is told when the job ends.
            _say(f"Not restarted: {why_not}\n")
            return False
        tell_job(failure, self._folder, self._processes * self._num_nodes)
        _say(f"\nRestart {num_restarts + 1} of {self._allowed}")
        return True

    def _why_not(self, failure: JobFailure) -> str:
        """Return why another attempt would fail, too; empty if it may not."""
        guilty = failure.reports[0]
        what = first_line(guilty.message)
        # All save and end together where one machine is asked to leave; its own launcher then starts nothing again.
        if guilty.kind == "asked" and not self._goes_on_without:
            return f"{what} has asked it to end"
        if _is_certain(guilty):
            return f"{what.partition(':')[0]} before the first step would come again"
        place = self._place_of(failure)
        self._times = self._times + 1 if place and place == self._place else 1
        self._place = place
        if place and self._times >= _FAILURES_AT_ONE_STEP:
            return f"{self._times} attempts in a row have failed {place}, this one by {what} on rank {guilty.rank}"
        return ""

    def _place_of(self, failure: JobFailure) -> str:
        """Return in words at which step this attempt has failed, as far as one of the ranks knows; or empty."""
        for report in failure.reports:
            if found := _STEP.search(report.place):
                return f"at global step {found[1]}"
        seconds = time.monotonic() - self._began
        exits = failure.reports[0].message.startswith("exit code")
        return "as they began" if exits and seconds < _BEGINNING else ""


def _is_certain(report: RankReport) -> bool:
    """Whether a rank has raised what a program raises that is wrong, before it has trained."""
    if report.kind != "failed":
        return False
    is_early = not report.place or _BEFORE_TRAINING.search(report.place) is not None
    return is_early and report.message.partition(":")[0] in _OF_THE_PROGRAM


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
