"""Whatever gives the batches, and whatever it draws at random: a run that goes on is the one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopwright.framework import CheckpointError
from tests.framework.resumed_runs import LOADERS, SAVED_AT, own_loop, train
from tests.strategies.distributed import in_processes

# Of these, nobody can tell at which batch a loader's own state is.
REFUSED = {
    name
    for name in LOADERS
    if "stateful" in name
    and (
        name.startswith(("max_size:", "sequential:"))
        or name == "max_size_cycle: stream and stateful"
    )
}


def difference(folder: Path, name: str, by_trainer: bool) -> Any:
    """What differs between a run and its rest, or the error."""
    path = folder / f"{name} {by_trainer}"

    def run(resume: bool) -> dict[str, Any]:
        if by_trainer:
            return train(name, path, resume)
        return own_loop("auto", path, resume, make_loader=LOADERS[name])

    whole = run(resume=False)
    try:
        rest = run(resume=True)
    except CheckpointError as error:
        return str(error)
    return [key for key in whole if whole[key] != rest[key]]


def differences(folder: Path, by_trainer: bool) -> dict[str, Any]:
    """Of all loaders, as :func:`difference`."""
    engine_cannot = (
        set() if by_trainer else {"batches"}
    )  # it prepares what it knows to be a loader
    return {
        name: difference(folder, name, by_trainer)
        for name in LOADERS
        if name not in engine_cannot
    }


def check(found: dict[str, Any]) -> None:
    expected = {name: "refused" if name in REFUSED else [] for name in found}
    assert {
        name: "refused" if "cannot go on" in value else value
        for name, value in found.items()
    } == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by_trainer", "processes"),
    [
        pytest.param(True, 1, id="Trainer-1"),
        pytest.param(True, 2, id="Trainer-2"),
        pytest.param(False, 2, id="Engine-2"),
    ],
)
def test_the_rest_of_a_run_is_the_same_to_the_last_bit(
    tmp_path: Path, processes: int, by_trainer: bool
):
    check(in_processes(processes, differences, tmp_path, by_trainer))


# What keeps a state of its own, and goes on inside an epoch.
KEPT = [
    name
    for name in LOADERS
    if "stateful" in name and name not in REFUSED and "stream" not in name
]


def all_samples(
    folder: Path, resume: bool, save_again: bool = False
) -> dict[str, list[Any]]:
    """What a run reads, or its rest, by loader and rank."""
    found = {}
    for name in KEPT:
        path = folder / name
        found[name] = train(name, path, resume, save_again=save_again)["samples"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_reads_the_rest_once(
    tmp_path: Path, before: int, after: int
):
    whole = in_processes(before, all_samples, tmp_path, False)
    rest = in_processes(after, all_samples, tmp_path, True, True)
    for name in KEPT:
        in_turn = [
            [batch for round_ in zip(*by_rank, strict=True) for batch in round_]
            for by_rank in (whole[name], rest[name])
        ]
        assert in_turn[0] == in_turn[1], name


@pytest.mark.parametrize(
    "name", ["max_size_cycle: shuffled and stream", "own iteration", "stateful stream"]
)
def test_one_process_goes_on_in_the_same_way(tmp_path: Path, name: str):
    assert SAVED_AT[1] % 10, "inside an epoch"
    assert difference(tmp_path, name, by_trainer=True) == []
