"""What the modules of a step compute, by fingerprints; and the first place at which two such steps differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..seed import device_rng_state, isolated_rng
from .fingerprint import (
    as_hex,
    combined,
    fingerprint,
    fingerprints,
    gradients_of,
    parameters_of,
)

FORMAT = 1


@dataclass
class Call:
    """A call of a module.

    Attributes:
        module: its name; empty for the outermost.
        kind: its class.
        number: how often it had been called before.
        is_leaf: whether it has no modules inside.
        inputs: fingerprint of the tensors among its arguments.
        outputs: of those in what it has returned, in 16 hexadecimal digits like all of them.
    """

    module: str
    kind: str
    number: int
    is_leaf: bool
    inputs: str
    outputs: str


@dataclass
class Trace:
    """What a step has computed.

    Attributes:
        random: fingerprint of the states of torch's generators before it.
        before: of each parameter and buffer before it, by name.
        calls: of modules, in the order in which they returned.
        gradients: of each parameter after it, by name.
        after: of each parameter and buffer after it, by name.
    """

    random: str = ""
    before: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    gradients: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Read what :meth:`write` has written."""
        found = json.loads(Path(path).read_text())
        assert found.pop("format") == FORMAT, f"{path} is of another version"
        found["calls"] = [Call(**call) for call in found["calls"]]
        return cls(**found)


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Note what a module and those inside it compute in this context: a step, with its backward and the optimizer's.

    It changes nothing that they compute. Reading their outputs waits for the device at each of them.

    Args:
        module: the module; one that is compiled is traced where its compiled code lets hooks run.
    """
    trace = Trace(random=_random_state(module), before=_each(_state_of(module)))
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            _watch(part, name, trace.calls, hooks)
        yield trace
    trace.gradients = _each(gradients_of(module))
    trace.after = _each(_state_of(module))


def _watch(part: nn.Module, name: str, calls: list[Call], hooks: ExitStack) -> None:
    """Note each call of a module in ``calls`` from now on, until ``hooks`` is left."""
    is_leaf = next(part.children(), None) is None
    # Those of calls that have not returned, as a module may call itself.
    begun: list[str] = []
    number: Counter[str] = Counter()

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        # It may change its arguments in place.
        begun.append(_of_all([args, kwargs]))

    def after(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        kind = type(part).__name__
        inputs = begun.pop()
        calls.append(Call(name, kind, number[name], is_leaf, inputs, _of_all(outputs)))
        number[name] += 1

    hooks.enter_context(part.register_forward_pre_hook(before, with_kwargs=True))
    hooks.enter_context(part.register_forward_hook(after, with_kwargs=True))


def _of_all(value: Any) -> str:
    """Return the fingerprint of all tensors in a nested value, which depends on their order."""
    each = fingerprints([*_tensors_in(value)])
    return as_hex(combined(found + place for place, found in enumerate(each)))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for each in value:
            yield from _tensors_in(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _tensors_in(getattr(value, each.name))


def _each(tensors: dict[str, Tensor]) -> dict[str, str]:
    found = map(as_hex, fingerprints([*tensors.values()]))
    return dict(zip(tensors, found, strict=True))


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    return {**parameters_of(module), **dict(module.named_buffers())}


def _random_state(module: nn.Module) -> str:
    states = [torch.get_rng_state()]
    device = device_rng_state(_device_of(module))
    return as_hex(fingerprint(states if device is None else [*states, device]))


def _device_of(module: nn.Module) -> torch.device:
    tensors = _state_of(module).values()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


# Two of them.


@dataclass
class FirstDifference:
    """The first place at which two steps differ.

    Attributes:
        what: ``"state"`` (a parameter or buffer before the step), ``"inputs"`` (of the first call), ``"outputs"`` (of a
            module), ``"calls"`` (other modules are called), ``"gradients"``, or ``"update"`` (by the optimizer).
        name: of the module, parameter or buffer; empty for the outermost module.
        kind: the module's class in each of the two.
        number: how often the module had been called before.
        other_name: its name in the second of the two.
        inputs_differ: whether the module got other inputs.
        random_differs: whether the generators of random numbers were in other states before the step.
        also: of how many more places the same can be said.
    """

    what: str
    name: str = ""
    kind: tuple[str, str] = ("", "")
    number: int = 0
    other_name: str = ""
    inputs_differ: bool = False
    random_differs: bool = False
    also: int = 0

    def __str__(self) -> str:
        name = f"{self.name!r} (and {self.also} more)" if self.also else repr(self.name)
        match self.what:
            case "state":
                return f"what the step begins with differs: first {name}"
            case "inputs":
                return f"the first module that is called, {self._module}, gets other inputs: the batches differ"
            case "calls":
                return f"one of them calls a module more: {self._module}"
            case "gradients":
                return f"all modules give the same, and the gradients differ: first that of {name}"
            case "update":
                return f"the gradients are the same, and the step leaves other values: first in {name}"
        why = "its inputs and its parameters are the same"
        if self.inputs_differ:
            why = "its inputs differ as well, so look at what is computed between it and the modules before"
        elif self.random_differs:
            why += ", the states of the random generators are not"
        return f"the first module whose output differs is {self._module}: {why}"

    @property
    def _module(self) -> str:
        name = repr(self.name) if self.name else "the whole module"
        kinds = " and ".join(dict.fromkeys(self.kind))
        again = f", call {self.number + 1}" if self.number else ""
        other = (
            "" if self.other_name in ("", self.name) else f", there {self.other_name!r}"
        )
        return f"{name} ({kinds}{again}{other})"


def compare_traces(first: Trace, second: Trace) -> FirstDifference | None:
    """Return the first place at which two steps differ, or None if nothing does."""
    names = _names_that_differ(first.before, second.before)
    if names:
        return FirstDifference("state", names[0], also=len(names) - 1)
    found = _compare_calls(first, second)
    if found is not None:
        return found
    # The backward goes from the last parameter to the first.
    names = _names_that_differ(first.gradients, second.gradients)[::-1]
    if names:
        return FirstDifference("gradients", names[0], also=len(names) - 1)
    names = _names_that_differ(first.after, second.after)
    if names:
        return FirstDifference("update", names[0], also=len(names) - 1)
    return None


def _names_that_differ(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Return the names of what differs; where a refactoring has changed names, what is there is told by its order."""
    if first.keys() == second.keys():
        return [name for name in first if first[name] != second[name]]
    if sorted(first.values()) == sorted(second.values()):
        return []
    pairs = zip(first.items(), second.items(), strict=False)
    found = [name for (name, mine), (_, other) in pairs if mine != other]
    return found or [*first, *second][-1:]


def _compare_calls(first: Trace, second: Trace) -> FirstDifference | None:
    if {c.module for c in first.calls} == {c.module for c in second.calls}:
        calls = first.calls
        others = second.calls
    else:
        # Modules were renamed, or put together otherwise: what computes is compared in its order.
        calls = [call for call in first.calls if call.is_leaf]
        others = [call for call in second.calls if call.is_leaf]
    for place, (call, other) in enumerate(zip(calls, others, strict=False)):
        if call.outputs == other.outputs:
            continue
        found = FirstDifference(
            "outputs",
            call.module,
            (call.kind, other.kind),
            call.number,
            other.module,
            call.inputs != other.inputs,
            first.random != second.random,
        )
        if found.inputs_differ and not place:
            found.what = "inputs"
        return found
    if len(calls) != len(others):
        place = min(len(calls), len(others))
        longer = calls if len(calls) > place else others
        call = longer[place]
        return FirstDifference("calls", call.module, (call.kind, call.kind))
    return None


def first_difference(
    module: nn.Module, other: nn.Module, *args: Any, **kwargs: Any
) -> FirstDifference | None:
    """Call two modules with the same arguments and random numbers; return the first place at which they differ.

    Calls are compared in the order in which they returned, so that of a module that differs because one inside it does,
    the inner one is named. Like any call, this changes running statistics of modules in training mode.

    Args:
        module: one module.
        other: another one, such as after a refactoring.
        *args: for both of them.
        **kwargs: for both of them.

    Returns:
        None if all modules inside them have given the same, to the last bit.
    """
    traces = []
    for each in (module, other):
        device = _device_of(each)
        with isolated_rng(device), torch.no_grad(), traced(each) as trace:
            each(*args, **kwargs)
        traces.append(trace)
    return compare_traces(*traces)
