"""Two machines of torchrun's with a cable between them: ``python -m tests.clusters.namespaces [SCENE …]``.

Each agent runs in a network namespace of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.clusters.program import NUM_STEPS
from tests.clusters.scenes import (
    CannotRunError,
    Stage,
    finish,
    install,
    play,
    require_root,
    wait_until,
)

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# The most that a process waits for the others, and by when all of them are to be over.
TIMEOUT = 10
SECONDS_UNTIL_OVER = 100
# An agent of torchrun's waits for its store without a time-out: until the kernel gives a dead connection up. That takes
# 15 minutes by default, and this way about 15 seconds.
GIVE_UP_SOON = "echo 5 > /proc/sys/net/ipv4/tcp_retries2"


class Machines:
    """Two network namespaces, and the device in each.

    Attributes:
        names: of the namespaces.
        devices: what the cable is plugged into.
    """

    def __init__(self) -> None:
        suffix = uuid.uuid4().hex[:6]
        self.names = (f"loopwright_a_{suffix}", f"loopwright_b_{suffix}")
        self.devices = (f"lwa{suffix}", f"lwb{suffix}")

    def connect(self) -> None:
        """Make both namespaces and the cable."""
        for name in self.names:
            ip("netns", "add", name)
        ends = [
            (device, "netns", name)
            for device, name in zip(self.devices, self.names, strict=True)
        ]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for name, device, address in zip(
            self.names, self.devices, ADDRESSES, strict=True
        ):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", name, "sh", "-c", GIVE_UP_SOON)
        self.plug("up")

    def plug(self, state: str) -> None:
        """Bring the cable's ends "up", or the second one "down"."""
        ends = [*zip(self.names, self.devices, strict=True)]
        for name, device in ends if state == "up" else ends[1:]:
            ip("-n", name, "link", "set", device, state)

    def remove(self) -> None:
        """Remove the namespaces, and the cable with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, stage: Stage, *arguments: Any) -> list[subprocess.Popen[bytes]]:
        """Start an agent of torchrun's with one process on each machine, of a job that trains."""
        torchrun = (sys.executable, "-m", "torch.distributed.run")
        options = (*torchrun, "--nnodes", 2, "--nproc-per-node", 1)
        return [
            self.start_one(stage, index, *options, arguments=arguments)
            for index in range(2)
        ]

    def start_one(
        self, stage: Stage, index: int, *launcher: Any, arguments: Sequence[Any] = ()
    ) -> subprocess.Popen[bytes]:
        """Start an agent on one of the machines.

        Args:
            stage: the job's.
            index: of the machine; the agents of both meet on the first one.
            launcher: the command, with its own options.
            arguments: of the program.
        """
        name = self.names[index]
        meeting = [
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29555"),
            *("--rdzv-conf", f"is_host={int(index == 0)},timeout=60"),
            *("--rdzv-id", name[-6:], "--local-addr", ADDRESSES[index]),
        ]
        return stage.start(
            *("ip", "netns", "exec", name, *launcher, *meeting),
            *("-m", "tests.clusters.program", stage.folder, *arguments),
            env={"GLOO_SOCKET_IFNAME": self.devices[index]},
        )


def ip(*arguments: str) -> None:
    """Run ``ip``."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CannotRunError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def cluster(folder: Path) -> Iterator[Machines]:
    """Make the two machines."""
    require_root()
    install(["ip"], ["iproute2"])
    machines = Machines()
    try:
        machines.connect()
        yield machines
    finally:
        machines.remove()


def train(machines: Machines, stage: Stage) -> None:
    for agent in machines.start(stage):
        assert agent.wait(120) == 0
    stage.check_whole()


def link_goes_down(machines: Machines, stage: Stage) -> None:
    stage.pause(0.2)
    agents = machines.start(stage, "--timeout", TIMEOUT)
    stage.wait_for_step(8)
    machines.plug("down")
    begin = time.monotonic()
    try:
        ended: list[float] = []
        for agent in agents:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(max(0.1, begin + SECONDS_UNTIL_OVER - time.monotonic()))
                ended.append(time.monotonic() - begin)
        print(f"over after {', '.join(f'{s:.0f} s' for s in ended)}")
        assert len(ended) == 2, "an agent is still there"
        assert all(agent.returncode for agent in agents)
    finally:
        machines.plug("up")
    # With the cable in again, the job goes on.
    stage.pause(0)
    for agent in machines.start(stage):
        assert agent.wait(120) == 0
    stage.check_whole()


def agent_killed(machines: Machines, stage: Stage) -> None:
    stage.pause(0.2)
    agents = machines.start(stage, "--timeout", TIMEOUT)
    stage.wait_for_step(8)
    agents[1].kill()
    begin = time.monotonic()
    wait_until(lambda: not stage.processes(), "nothing of the job is left", 60)
    print(f"over after {time.monotonic() - begin:.0f} s")
    assert agents[0].wait(1) != 0
    assert max(stage.steps()) < NUM_STEPS - 1, "the orphan has trained to the end"


def machine_comes_back(machines: Machines, stage: Stage) -> None:
    """A job for one or two machines goes on without one of them, and with it when it is there again."""
    launcher = (
        *(sys.executable, "-m", "loopwright", "launch", "--cpu"),
        *("--nnodes", "1:2", "--processes", 1, "--max_restarts", 3),
    )
    stage.pause(0.2)
    stays, goes = (machines.start_one(stage, index, *launcher) for index in range(2))
    stage.wait_for_step(8)
    assert "2 processes launched by" in stage.text(), "one machine has begun alone"
    goes.kill()
    # Alone, an epoch has twice as many steps.
    wait_until(lambda: "1 process launched by" in stage.text(), "one goes on", 90)
    count = len(stage.steps())
    wait_until(lambda: len(stage.steps()) > count + 3, "it trains alone", 60)
    returns = machines.start_one(stage, 1, *launcher)
    wait_until(
        lambda: stage.text().count("2 processes launched by") == 2,
        "both go on together",
        90,
    )
    stage.pause(0)
    assert [stays.wait(120), returns.wait(30)] == [0, 0]
    assert stage.weights()
    numbers = [step for step, _ in stage.curve()]
    assert numbers == [*range(1, len(numbers) + 1)], (
        f"a gap, or a step twice: {numbers}"
    )


SCENES = (train, agent_killed, link_goes_down, machine_comes_back)


if __name__ == "__main__":
    sys.exit(finish(play("torchrun on two machines", cluster, SCENES, *sys.argv[1:])))
