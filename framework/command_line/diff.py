"""``loopwright diff``: where two runs differ, in their settings and in what they have computed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EQUAL = 0
DIFFERENT = 1
TROUBLE = 2
# Longer values are cut.
LONGEST = 60


def main(arguments: list[str]) -> int:
    """Run the command.

    Args:
        arguments: what follows ``diff`` on the command line.

    Returns:
        The exit code: 0 if what was computed is the same, 1 if it differs or cannot be compared, 2 if there is no such
        run.
    """
    options = _parser().parse_args(arguments)
    from ..report.rerun import RerunError, find_record

    runs = [Path(run) for run in options.runs]
    if all(run.is_file() for run in runs):
        return _compare_files(*runs)
    try:
        first, second = (Path(find_record(run)) for run in options.runs)
    except RerunError as error:
        print(f"loopwright diff: {error}", file=sys.stderr)
        return TROUBLE
    return _compare_records(first, second, options.replay, options.rank)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="loopwright diff",
        description="Tell where two runs differ: in their settings, then the first step whose fingerprints are not "
        "equal, and, by running single steps of both once more, the first module that gives something else.",
        epilog="Fingerprints are kept by Trainer(fingerprint=100). Exit code: 0 if all are equal, 1 if not.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs=2,
        metavar="RUN",
        help="a run's log folder; or both are files that `loopwright replay RUN --step N --trace FILE` has written",
    )
    parser.add_argument(
        "--no-replay",
        dest="replay",
        action="store_false",
        help="do not run steps once more",
    )
    parser.add_argument(
        "--rank", type=int, default=0, help="of several processes, the one to run"
    )
    return parser


def _compare_files(first: Path, second: Path) -> int:
    from ..report.trace import Trace, compare_traces

    found = compare_traces(Trace.read(first), Trace.read(second))
    print("The two steps are equal." if found is None else _sentence(found))
    return EQUAL if found is None else DIFFERENT


def _compare_records(first: Path, second: Path, replays: bool, rank: int) -> int:
    from ..report.diff import first_step, read_fingerprints

    print(f"First:  {first}\nSecond: {second}\n")
    _print_settings(first, second)
    mine = read_fingerprints(first)
    other = read_fingerprints(second)
    if not _have_common_steps(mine, other):
        _print_logged(first, second)
        return DIFFERENT
    found = first_step(mine, other)
    if found is None:
        common = sorted(mine.keys() & other.keys())
        print(f"Fingerprints: all {len(common)} are equal, up to step {common[-1]}.")
        return EQUAL
    print(f"Fingerprints: {found}.")
    if replays:
        _print_replay(first, second, found, rank)
    return DIFFERENT


def _print_settings(first: Path, second: Path) -> None:
    from ..report.diff import settings_that_differ

    differing = [*settings_that_differ(first, second)]
    if not differing:
        print("Settings: equal.")
        return
    print("Settings that differ:")
    width = min(max(len(name) for name, _, _ in differing), 40)
    for name, mine, other in differing:
        print(f"  {name:<{width}}  {_shown(mine)} → {_shown(other)}")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    lines = text.splitlines()
    if len(lines) > 1:
        return f"({len(lines)} lines)"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _have_common_steps(mine: dict[int, Any], other: dict[int, Any]) -> bool:
    """Return whether both runs have fingerprints of a step; say so if not."""
    if mine.keys() & other.keys():
        return True
    runs = {"first": mine, "second": other}
    without = " and the ".join(name for name, found in runs.items() if not found)
    if without:
        print(
            f"Fingerprints: the {without} run has none. Trainer(fingerprint=100) keeps them every 100 optimizer steps."
        )
    else:
        print(
            f"Fingerprints: no step has those of both. The first run has steps {_range(mine)}, the second "
            f"{_range(other)}."
        )
    return False


def _range(steps: dict[int, Any]) -> str:
    ordered = sorted(steps)
    first = ordered[0]
    last = ordered[-1]
    return str(first) if first == last else f"{first} to {last}"


def _print_logged(first: Path, second: Path) -> None:
    """Tell the first logged value that differs, where there is nothing better to tell."""
    from ..report.diff import first_logged_difference

    found = first_logged_difference(first, second)
    if found is not None:
        step, name, mine, other = found
        print(f"Logged values: {name} is {mine!r} → {other!r} at step {step}.")


def _print_replay(first: Path, second: Path, found: Any, rank: int) -> None:
    from ..report.diff import find_in_replay
    from ..report.rerun import rerun
    from ..report.trace import Trace

    with tempfile.TemporaryDirectory() as folder:

        def replay(record: Path, step: int) -> Trace:
            print(f"Running step {step} of {record} once more …", file=sys.stderr)
            file = Path(folder, "trace.json")
            file.unlink(missing_ok=True)
            with _without_output():
                code = rerun(str(record), step, rank=rank, trace=str(file))
            if code or not file.is_file():
                raise RuntimeError(
                    f"step {step} of {record} could not be run once more (exit code {code})"
                )
            return Trace.read(file)

        try:
            where = find_in_replay(first, second, found, replay)
        except RuntimeError as error:
            print(
                f"Replay: {error}. Where a run's program or data are on another machine, run `loopwright replay RUN "
                f"--step {found.step} --trace FILE` there, and `loopwright diff FILE FILE` with both files."
            )
            return
    if where is None:
        print(
            "Replay: run once more, both compute the same: what differed came from outside of the step."
        )
    else:
        print(f"Step {where[0]}: {where[1]}.")


@contextmanager
def _without_output() -> Iterator[None]:
    """Let nothing that this process or those it starts write reach standard output."""
    sys.stdout.flush()
    output = os.dup(1)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _sentence(found: Any) -> str:
    text = str(found)
    return f"{text[0].upper()}{text[1:]}."
