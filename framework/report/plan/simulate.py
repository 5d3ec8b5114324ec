"""What each strategy keeps in a process's memory, moment by moment, while a traced step runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from .trace import OptimizerCost, Parameter, Trace
from .tracker import Event

FULL = 4  # bytes of a number in full precision

# DeepSpeed's defaults, in numbers.
_ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass
class Setup:
    """What a simulation is of.

    Attributes:
        parameters: all of the module.
        buffers: bytes of the module's buffers.
        trace: of the step; None if its activations are unknown.
        optimizer: what the optimizers take in each process.
        processes: how many share the work.
        compute_size: bytes of a number in the forward pass under a strategy that converts parameters for it.
        reduce_size: bytes of a number whose gradient is summed up over the processes, where FSDP does it.
        accumulates: gradients wait for those of further micro-batches.
        units: by owner of a parameter, the number of the FSDP unit that gathers it.
        root: the number of the unit that is gathered until the step's end.
        on_cpu: the processes' memory is the host's, and gloo is between them: what is set aside but not written to is
            not in memory, and collectives copy.
        zero: DeepSpeed's options of ``zero_optimization``.
        offload: the optimizer's states, and what it steps on, are in the host's memory.
    """

    parameters: Sequence[Parameter]
    buffers: int
    trace: Trace | None
    optimizer: OptimizerCost
    processes: int
    compute_size: int | None = None
    reduce_size: int | None = None
    accumulates: bool = False
    units: Mapping[int, int] = field(default_factory=dict)
    root: int = -1
    on_cpu: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    offload: bool = False

    @property
    def held(self) -> int:
        """Bytes that outlive the backward pass."""
        return 0 if self.trace is None else self.trace.events[-1].live

    def moments(self) -> Iterator[tuple[Event, str]]:
        """Give the events of the step, each with the name of the pass that it ends a stretch of."""
        if self.trace is None:
            return
        moment = "forward"
        for event in self.trace.events:
            yield event, moment
            if event.kind == "loss":
                moment = "backward"

    def option(self, name: str) -> int:
        """Return one of DeepSpeed's options; "auto" is its default."""
        short = name.removeprefix("stage3_")
        for key in (name, short):
            value = self.zero.get(key, "auto")
            if value != "auto":
                return int(value)
        return _ZERO_DEFAULTS[name]


class Ledger:
    """The bytes of each kind now, the most of each, and the most of all together.

    Attributes:
        peak: the most of all together.
        moment: when that was: ``"forward"``, ``"backward"`` or ``"step"``.
        highest: the most of each kind.
    """

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.highest: Counter[str] = Counter()
        self.peak = 0
        self.moment = "forward"

    def set(self, kind: str, size: float) -> None:
        """Set the bytes of a kind."""
        self.now[kind] = int(size)

    def see(self, moment: str, activations: int = 0, **briefly: float) -> None:
        """Take the present moment into account.

        Args:
            moment: its name.
            activations: their bytes.
            **briefly: further bytes by kind, that are there now only.
        """
        seen = Counter(self.now)
        seen["activations"] += activations
        for kind, size in briefly.items():
            seen[kind] += int(size)
        for kind, size in seen.items():
            self.highest[kind] = max(self.highest[kind], size)
        total = sum(seen.values())
        if total > self.peak:
            self.peak = total
            self.moment = moment


Simulation = Callable[[Setup, Ledger], None]


def _total(parameters: Sequence[Parameter], itemsize: int | None = None) -> int:
    return sum(p.numel * (itemsize or p.itemsize) for p in parameters)


def _trained(setup: Setup) -> list[Parameter]:
    return [parameter for parameter in setup.parameters if parameter.trained]


def _step(setup: Setup, ledger: Ledger) -> None:
    if not setup.offload:
        # The batch is still there.
        ledger.see("step", setup.held, step=setup.optimizer.step)


def single(setup: Setup, ledger: Ledger) -> None:
    """One process, with all of the module; also what DDP is with one process."""
    _replica(setup, ledger, 0)


def ddp(setup: Setup, ledger: Ledger) -> None:
    """A replica in each process; gradients are views of buckets, which stay."""
    if setup.processes == 1:
        _replica(setup, ledger, 0)
    else:
        _replica(setup, ledger, _total(_trained(setup)))


def _replica(setup: Setup, ledger: Ledger, buckets: int) -> None:
    whole = _total(_trained(setup))
    ledger.set("parameters", _total(setup.parameters) + setup.buffers)
    ledger.set("optimizer", setup.optimizer.states)
    # Those of the last step are there until the next backward begins.
    ledger.set("gradients", whole)
    for event, moment in setup.moments():
        ledger.see(moment, event.peak)
        if event.kind == "loss" and not setup.accumulates:
            ledger.set("gradients", buckets)
        elif event.kind == "gradient" and not setup.accumulates and not buckets:
            ledger.now["gradients"] += setup.parameters[event.key].nbytes
    ledger.set("gradients", whole)
    ledger.see("step")
    _step(setup, ledger)


def fsdp(setup: Setup, ledger: Ledger) -> None:
    """FSDP2: each process has a part of each parameter, and gathers one unit after the other."""
    if setup.processes == 1:
        single(setup, ledger)
    else:
        _Sharded(setup, ledger).run()


class _Sharded:
    """The units of FSDP2, as they are gathered and freed."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        self._setup = setup
        self._ledger = ledger
        self._gathered: dict[int, int] = {}
        self._whole: Counter[int] = Counter()
        self._reduced: Counter[int] = Counter()
        self._shard: Counter[int] = Counter()
        self._left: Counter[int] = Counter()
        # The unit whose gathered copy, and the one whose gradients, are kept until the next one's come.
        self._last_gathered = 0
        self._last_reduced = 0
        self._order: list[int] = []
        for parameter in setup.parameters:
            unit = setup.units[parameter.owner]
            self._whole[unit] += parameter.numel * (
                setup.compute_size or parameter.itemsize
            )
            if parameter.trained:
                size = setup.reduce_size or setup.compute_size or parameter.itemsize
                self._reduced[unit] += parameter.numel * size
                self._shard[unit] += sharded_size(parameter, setup.processes)
                self._left[unit] += 1

    def run(self) -> None:
        """Go through the step."""
        setup = self._setup
        ledger = self._ledger
        parts = sum(sharded_size(p, setup.processes) for p in setup.parameters)
        ledger.set("parameters", setup.buffers + (0 if setup.offload else parts))
        ledger.set("optimizer", 0 if setup.offload else setup.optimizer.states)
        gradients = sum(self._shard.values())
        if setup.accumulates:
            # Without a reduction, each process keeps all gradients.
            gradients = sum(self._reduced.values())
        ledger.set("gradients", 0 if setup.offload else gradients)
        for event, moment in setup.moments():
            self._act(event, moment)
        ledger.set("communication", 0)
        ledger.set("gradients", 0 if setup.offload else sum(self._shard.values()))
        ledger.see("step")
        _step(setup, ledger)

    def _act(self, event: Event, moment: str) -> None:
        ledger = self._ledger
        units = self._setup.units
        ledger.see(moment, event.peak)
        unit = event.key
        if event.kind == "forward" and self._whole[unit]:
            self._gather(unit, event.live, moment)
            self._order.append(unit)
        elif event.kind == "forwarded" and unit != self._setup.root:
            self._free(unit)
        elif event.kind == "loss" and not self._setup.accumulates:
            ledger.set("gradients", 0)
        elif event.kind == "backward" and self._whole[unit]:
            self._gather(unit, event.live, moment)
            # The one that comes next in the backward pass is gathered ahead.
            if unit in self._order and (index := self._order.index(unit)):
                self._gather(self._order[index - 1], event.live, moment)
        elif event.kind == "gradient":
            unit = units[self._setup.parameters[event.key].owner]
            self._left[unit] -= 1
            if self._left[unit] == 0:
                self._reduce(unit, event.live, moment)

    def _gather(self, unit: int, live: int, moment: str) -> None:
        if unit in self._gathered:
            return
        ledger = self._ledger
        size = self._whole[unit]
        self._gathered[unit] = size
        ledger.now["communication"] += size
        copies = size
        if self._setup.on_cpu:
            copies += size
        ledger.see(moment, live, communication=copies)
        # What was sent is kept until the next unit's comes.
        ledger.now["communication"] += size
        ledger.now["communication"] -= self._last_gathered
        self._last_gathered = size

    def _free(self, unit: int) -> None:
        self._ledger.now["communication"] -= self._gathered.pop(unit, 0)

    def _reduce(self, unit: int, live: int, moment: str) -> None:
        setup = self._setup
        ledger = self._ledger
        size = self._reduced[unit]
        self._free(unit)
        ledger.now["communication"] += size
        copies = 0
        if setup.on_cpu:
            copies = size
        part = self._shard[unit]
        if setup.offload:
            part = 0
        ledger.see(moment, live, communication=copies, gradients=part)
        if not setup.accumulates:
            ledger.now["gradients"] += part
        ledger.now["communication"] -= self._last_reduced
        self._last_reduced = size


def sharded_size(parameter: Parameter, processes: int) -> int:
    """Bytes of the largest part of a parameter that FSDP2 divides along its first dimension."""
    shape = shard_shape(parameter.shape, processes)
    return torch.Size(shape).numel() * parameter.itemsize


def shard_shape(shape: Sequence[int], processes: int) -> tuple[int, ...]:
    """The shape of the largest part of a tensor that is divided along its first dimension."""
    if not shape:
        return ()
    return (ceil(shape[0] / processes), *shape[1:])


def zero_2(setup: Setup, ledger: Ledger) -> None:
    """ZeRO's stage 2: all parameters, flat, in each process; a part of gradients, full precision and states.

    Gradients are copied into a bucket, which is summed up when it is full. After the backward pass the process's part
    is there twice for a moment, as single gradients and flat.
    """
    trained = _trained(setup)
    size = setup.compute_size or FULL
    part = ceil(_total(trained, 1) / setup.processes)
    frozen = _total([p for p in setup.parameters if not p.trained])
    whole = _total(setup.parameters, size)
    # Of frozen parameters that DeepSpeed converts, the strategy keeps the original.
    ledger.set("parameters", whole + setup.buffers + (frozen if size != FULL else 0))
    if not setup.offload:
        ledger.set("optimizer", setup.optimizer.states + part * FULL)
    ledger.set("gradients", part * size if setup.accumulates else 0)
    bucket = setup.option("reduce_bucket_size")
    filled = 0
    reduced = 0
    most = 0
    reserved = _reserved(setup, size)
    for event, moment in setup.moments():
        held = 0
        if moment == "backward":
            held = max(reserved, most * size)
        there = _part_there(setup, part, reduced) * size
        ledger.see(moment, event.peak, communication=held, gradients=there)
        if event.kind == "gradient":
            numel = setup.parameters[event.key].numel
            if filled and filled + numel > bucket:
                # What is summed up is a copy of what the bucket has.
                copies = held + filled * size
                ledger.see(moment, event.live, communication=copies, gradients=there)
                reduced += filled
                filled = 0
            filled += numel
            most = max(most, min(filled, bucket))
    held = max(reserved, most * size)
    there = _part_there(setup, part, reduced) * size
    ledger.see(
        "backward", setup.held, communication=held + filled * size, gradients=there
    )
    ledger.see("backward", setup.held, communication=held, gradients=part * size)
    _zero_step(setup, ledger, part, size, whole)


def _reserved(setup: Setup, size: int) -> int:
    """Bytes that ZeRO-2 sets aside for its buckets; of the CPU only what is written to counts."""
    if setup.on_cpu:
        return 0
    reserved = setup.option("reduce_bucket_size") * size
    if setup.zero.get("overlap_comm") is True:
        reserved *= 2
    return reserved


def _part_there(setup: Setup, part: int, reduced: int) -> int:
    """How many numbers ZeRO-2 has of its part of the gradients, after so many were summed up."""
    if setup.offload or not reduced:
        return 0
    # On the CPU, memory that is set aside fills up as it is written to.
    return min(part, ceil(reduced / setup.processes)) if setup.on_cpu else part


def _zero_step(
    setup: Setup, ledger: Ledger, part: int, size: int, whole: int = 0
) -> None:
    """Take ZeRO's step into account: the flat gradients, in the type of the backward pass and in full precision."""
    if setup.offload:
        return
    gradients = part * size
    ledger.set("gradients", gradients)
    flat = part * FULL
    if size != FULL:
        flat += part * size
    ledger.see("step", gradients=flat)
    is_kept = gradients if whole == 0 else 0
    ledger.set("gradients", is_kept + part * FULL)
    _step(setup, ledger)
    ledger.set("gradients", is_kept)
    # gloo gathers into a copy.
    ledger.see("step", communication=whole if setup.on_cpu else 0)


def zero_3(setup: Setup, ledger: Ledger) -> None:
    """ZeRO's stage 3: a part of everything; the parameters of each module are gathered when it computes."""
    _Gathering(setup, ledger).run()


class _Gathering:
    """The modules whose parameters ZeRO-3 has gathered, in numbers."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        self._setup = setup
        self._ledger = ledger
        self._size = setup.compute_size or FULL
        self._sizes: Counter[int] = Counter()
        self._there: dict[int, int] = {}
        # What was gathered ahead in one message is there twice, until the last module of it has begun.
        self._messages: list[tuple[set[int], int]] = []
        self._left: Counter[int] = Counter()
        threshold = setup.option("stage3_param_persistence_threshold")
        self._kept = 0
        for parameter in setup.parameters:
            if parameter.trained:
                self._left[parameter.owner] += 1
            if parameter.numel <= threshold:
                self._kept += parameter.numel
            else:
                self._sizes[parameter.owner] += parameter.numel
        uses = []
        for event, _ in setup.moments():
            if event.kind == "forward" and self._sizes[event.key]:
                uses.append(event.key)
        # The backward pass takes them in the opposite order.
        self._uses = [*uses, *reversed(uses)]
        self._position = -1

    def run(self) -> None:
        """Go through the step."""
        setup = self._setup
        ledger = self._ledger
        size = self._size
        part = ceil(_total(_trained(setup), 1) / setup.processes)
        parts = ceil(_total(setup.parameters, 1) / setup.processes)
        ledger.set("parameters", (parts + self._kept) * size + setup.buffers)
        ledger.set("optimizer", 0)
        ledger.set("gradients", 0)
        if not setup.offload:
            ledger.set("optimizer", setup.optimizer.states + part * FULL)
            ledger.set("gradients", part * size)
        filled = 0
        bucket = setup.option("reduce_bucket_size")
        reserved = bucket * size
        if setup.on_cpu:
            # What earlier steps have written to.
            reserved = self._most_filled(bucket) * size
        for event, moment in setup.moments():
            live = self._live() * size
            ledger.see(moment, event.peak, communication=reserved + live)
            self._use(event, moment, reserved)
            if event.kind == "gradient":
                numel = setup.parameters[event.key].numel
                if filled and filled + numel > bucket:
                    self._see_reduction(filled, reserved, event.live)
                    filled = 0
                filled += numel
        self._see_reduction(filled, reserved, 0)
        ledger.set("communication", reserved)
        _zero_step(setup, ledger, part, size)

    def _most_filled(self, bucket: int) -> int:
        setup = self._setup
        filled = 0
        most = 0
        for event, _ in setup.moments():
            if event.kind != "gradient":
                continue
            numel = setup.parameters[event.key].numel
            filled += numel
            if filled > bucket:
                filled = numel
            most = max(most, min(filled, bucket))
        return most

    def _live(self) -> int:
        numbers = sum(self._there.values())
        for _, size in self._messages:
            numbers += size
        return numbers

    def _see_reduction(self, filled: int, reserved: int, live: int) -> None:
        """Gradients are put into one tensor; gloo copies it once more."""
        copies = filled * self._size
        if self._setup.on_cpu:
            copies += copies
        there = self._live() * self._size
        total = reserved + there + copies
        self._ledger.see("backward", live, communication=total)

    def _use(self, event: Event, moment: str, reserved: int) -> None:
        unit = event.key
        if event.kind == "gradient":
            unit = self._setup.parameters[event.key].owner
            self._left[unit] -= 1
            if self._left[unit] == 0:
                self._release(unit)
        elif not self._sizes[unit]:
            return
        elif event.kind in ("forward", "backward"):
            self._position += 1
            for message, _ in self._messages:
                message.discard(unit)
            self._messages = [each for each in self._messages if each[0]]
            before = self._live()
            fetched = 0
            if unit not in self._there:
                self._there[unit] = self._sizes[unit]
                fetched = self._sizes[unit]
            fetched += self._prefetch()
            copies = 1
            if self._setup.on_cpu:
                copies = 2
            total = reserved + (before + copies * fetched) * self._size
            self._ledger.see(moment, event.live, communication=total)
        elif event.kind == "forwarded":
            self._release(unit)

    def _prefetch(self) -> int:
        """Gather what comes next, in one message; returns how many numbers these are."""
        setup = self._setup
        room = min(
            setup.option("stage3_prefetch_bucket_size"),
            setup.option("stage3_max_live_parameters") - self._live(),
        )
        message: set[int] = set()
        fetched = 0
        for unit in self._uses[self._position + 1 :]:
            if fetched >= room:
                break
            if unit not in self._there:
                self._there[unit] = self._sizes[unit]
                message.add(unit)
                fetched += self._sizes[unit]
        if message:
            self._messages.append((message, fetched))
        return fetched

    def _release(self, unit: int) -> None:
        """Free a module's parameters, unless they are used again soon."""
        reach = self._setup.option("stage3_max_reuse_distance")
        passed = 0
        for other in self._uses[self._position + 1 :]:
            if passed >= reach:
                break
            if other == unit:
                return
            passed += self._sizes[other]
        self._there.pop(unit, None)


SIMULATIONS: dict[str, Simulation] = {
    "single": single,
    "ddp": ddp,
    "fsdp": fsdp,
    "deepspeed_stage_2": zero_2,
    "deepspeed_stage_3": zero_3,
}
