"""What of this machine a process may use."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from loopwright.strategies.launch import machine
from loopwright.strategies.launch.machine import (
    free_in_container,
    free_port,
    usable_cpus,
    usable_memory,
)


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(content + "\n")


def test_free_memory_of_control_groups_is_that_of_the_narrowest_one(
    tmp_path: Path,
) -> None:
    gib = 2**30
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(
        root / "job" / "task",
        memory_max="max",
        memory_current="5",
        memory_stat="anon 5",
    )
    (root / "job" / "memory.max").write_text(f"{4 * gib}\n")
    (root / "job" / "memory.current").write_text(f"{3 * gib}\n")
    # What the system can drop is as good as free.
    (root / "job" / "memory.stat").write_text(f"anon 5\ninactive_file {gib}\n")
    own.write_text("0::/job/task\n")
    assert free_in_container(str(root), str(own)) == 2 * gib

    # Version 1: without a limit, that is the greatest number.
    first = root / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    own.write_text("4:cpu,memory:/elsewhere\n")
    assert free_in_container(str(root), str(own)) is None
    (first / "memory.limit_in_bytes").write_text(f"{gib}\n")
    (first / "memory.usage_in_bytes").write_text(f"{gib // 2}\n")
    assert free_in_container(str(root), str(own)) == gib // 2


def test_cpus_are_no_more_than_a_containers_share_of_time(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    here = len(os.sched_getaffinity(0))
    own.write_text("0::/job\n")
    (root / "job").mkdir(parents=True)
    assert usable_cpus(str(root), str(own)) == here
    (root / "job" / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(str(root), str(own)) == here
    # One CPU and a half is a part of a second one.
    (root / "cpu.max").write_text("150000 100000\n")
    assert usable_cpus(str(root), str(own)) == min(2, here)
    (root / "job" / "cpu.max").write_text("20000 100000\n")
    assert usable_cpus(str(root), str(own)) == 1

    # Version 1.
    group(root / "cpu" / "task", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    (root / "cpu" / "task" / "cpu.cfs_quota_us").write_text("100000\n")
    own.write_text("4:cpu,cpuacct:/task\n")
    (root / "cpu.max").unlink()
    assert usable_cpus(str(root), str(own)) == 1


def test_memory_is_that_of_the_machine_at_most() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = usable_memory()
    assert memory is not None
    assert 0 < memory <= pages


def test_a_port_is_free_and_none_that_connections_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():
        first, last = map(int, given.read_text().split())
        assert not first <= free_port() <= last
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("", 0))
        other.bind(("", 0))
        used, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        monkeypatch.setattr(machine, "_PORTS", [used, free])
        assert {free_port() for _ in range(10)} == {free}
