"""Memory that a step on the CPU frees is kept for the next one, where the C library is glibc."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from loopwright.framework import Module, Trainer
from loopwright.strategies.launch.agent import agent
from loopwright.strategies.launch.malloc import (
    MALLOC,
    add_to_environment,
    keep_freed_memory,
)

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"

needs_glibc = pytest.mark.skipif(
    not (sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION")),
    reason="glibc's malloc",
)


class Echo(Module):
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch


# Each step takes 80 MB in parts and lets them go, as activations are; these are 20,000 pages.
PROGRAM = """
import resource
from loopwright.strategies.launch.malloc import keep_freed_memory

def step():
    parts = [bytearray(2**22) for _ in range(20)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
step()
before = faults()
step()
print(faults() - before)
"""


@needs_glibc
@pytest.mark.parametrize(("choice", "keeps"), [("on", True), ("off", False)])
def test_a_step_takes_the_pages_of_the_last_one(choice: str, keeps: bool) -> None:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**variables, MALLOC: choice},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (int(ended.stdout) < 50) == keeps


@needs_glibc
def test_a_run_says_that_it_keeps_nothing_near_a_containers_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "loopwright.strategies.launch.malloc.free_in_container", lambda: 2**29
    )
    monkeypatch.delenv(MALLOC, raising=False)
    trainer = Trainer(accelerator="cpu", devices=1, barebones=True)
    with caplog.at_level(logging.WARNING, logger="loopwright"):
        trainer.predict(Echo(), [torch.ones(1)])
    assert caplog.text.count("less than 1 GiB of the container's memory") == 1


@needs_glibc
def test_started_processes_get_the_variables_and_this_one_has_its_own_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(THRESHOLD, raising=False)
    with agent(1):
        assert os.environ[THRESHOLD] == str(32 * 2**20)
    assert THRESHOLD not in os.environ


@needs_glibc
@pytest.mark.parametrize(
    "own",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1000"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
        {MALLOC: "off"},
    ],
)
def test_what_the_user_has_set_holds(own: dict[str, str]) -> None:
    environment = dict(own)
    add_to_environment(environment, 1)
    assert environment == own


@needs_glibc
def test_all_keeps_blocks_of_any_size() -> None:
    environment = {MALLOC: "all"}
    add_to_environment(environment, 1)
    assert environment["MALLOC_MMAP_MAX_"] == "0"


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MALLOC, "yes")
    with pytest.raises(ValueError, match='must be "on", "all" or "off"; got \'yes\''):
        keep_freed_memory()


@needs_glibc
def test_near_a_containers_limit_only_the_users_word_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "loopwright.strategies.launch.malloc.free_in_container", lambda: 2**30
    )
    monkeypatch.delenv(MALLOC, raising=False)
    environment: dict[str, str] = {}
    add_to_environment(environment, 2)
    assert not environment
    assert "less than 1 GiB" in keep_freed_memory(2)
    environment[MALLOC] = "all"
    add_to_environment(environment, 2)
    assert "MALLOC_MMAP_MAX_" in environment
