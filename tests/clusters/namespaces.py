"""Two machines of torchrun's with a cable between them: ``python -m tests.clusters.namespaces [SCENE …]``.

Each agent runs in a network namespace of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
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
        """Start an agent with one process on each machine, of a job that trains."""
        agents = []
        for index, (name, device, address) in enumerate(
            zip(self.names, self.devices, ADDRESSES, strict=True)
        ):
            torchrun = [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"{ADDRESSES[0]}:29555", "--rdzv-id", name[-6:]),
                *("--rdzv-conf", f"is_host={int(index == 0)},timeout=60"),
                *("--local-addr", address, "-m", "tests.clusters.program"),
                *(stage.folder, *arguments),
            ]
            agents.append(
                stage.start(
                    *("ip", "netns", "exec", name, *torchrun),
                    env={"GLOO_SOCKET_IFNAME": device},
                )
            )
        return agents


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


SCENES = (train, agent_killed, link_goes_down)


if __name__ == "__main__":
    sys.exit(finish(play("torchrun on two machines", cluster, SCENES, *sys.argv[1:])))
