"""Other weights of a module, such as their average, kept beside those that are trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import getLogger
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import require

if TYPE_CHECKING:
    from ..strategies import Strategy

log = getLogger("loopwright")

# Changes tensors of a set, all of one device and type, given those of the module and how many updates came before.
Average = Callable[[list[Tensor], list[Tensor], int], None]


class WeightSet:
    """Values for a module's trained parameters and its buffers; where those are sharded, for this process's parts.

    A checkpoint holds them beside the module's own, under the set's name. They are in the module only while it is
    evaluated, and after a fit; whatever saves meanwhile takes them out for as long as that takes.

    Args:
        name: what checkpoints call it.
        device: where to keep it. Default: each tensor where the module has it.
        use_buffers: average buffers as parameters; otherwise they are copies of the module's at the last update.
        is_evaluated: whether evaluations run on it.

    Attributes:
        tensors: by name; none before the first update. Those with fewer than 32 bits a number are kept with 32.
        num_updates: how many there were.
        belongs_in_module: it was in the module of another process, from which it has come.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        is_evaluated: bool = True,
    ) -> None:
        is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None
        require(is_name, "name", "of letters, digits, '_', '-' and '.'", name)
        self.name = name
        self.device = None if device is None else torch.device(device)
        self.use_buffers = use_buffers
        self.is_evaluated = is_evaluated
        self.tensors: dict[str, Tensor] = {}
        self.num_updates = 0
        self.belongs_in_module = False
        # How to find the module's tensors.
        self._getters: dict[str, Callable[[Any], Tensor]] = {}
        # Its tensors have been put together from the parts of all processes.
        self._is_whole = False
        # While it is in the module: where, and what was there before. After a fit, the module may move to other memory,
        # or be copied: then the former is not kept.
        self._places: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[str, int], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}}

    def count_from(self, num_updates: int) -> None:
        """Have had so many updates, as a run that is resumed."""
        self.num_updates = num_updates

    def clear(self) -> None:
        """Forget all: the next update is the first."""
        self.tensors = {}
        self.num_updates = 0
        self._before = {}

    # Its values.

    def begin(self, module: nn.Module, strategy: Strategy) -> None:
        """A fit begins: find the module's tensors, and take this process's part of what the last fit has left."""
        self._getters = _getters_of(module)
        if self._is_whole:
            self.load(self.tensors, module, strategy)

    @torch.no_grad()
    def update(self, module: nn.Module, strategy: Strategy, average: Average) -> None:
        """Average the module's weights with those of the set, which begins with a copy of them.

        A parameter that is not trained has no average: it joins with the first update after it is unfrozen.
        """
        by_kind: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, getter in self._getters.items():
            tensor = getter(module)
            mine = self.tensors.get(name)
            is_parameter = isinstance(tensor, nn.Parameter)
            if mine is None and is_parameter and not tensor.requires_grad:
                continue
            part = strategy.local_part(tensor)
            if mine is None or not (is_parameter or self.use_buffers):
                self.tensors[name] = self._copy_of(part)
            elif mine.numel():
                own, current = by_kind.setdefault((mine.device, mine.dtype), ([], []))
                own.append(mine)
                current.append(part.to(mine))
        for own, current in by_kind.values():
            average(own, current, self.num_updates)
        self.num_updates += 1

    def copy_buffers(self, module: nn.Module) -> None:
        """Take the buffers that the module has now."""
        for name, getter in self._getters.items():
            tensor = getter(module)
            if not isinstance(tensor, nn.Parameter) and name in self.tensors:
                self.tensors[name].copy_(tensor)

    def _copy_of(self, part: Tensor) -> Tensor:
        """A copy as the set keeps it: in 16 bits, what a step changes would mostly be rounded away."""
        is_short = part.is_floating_point() and part.element_size() < 4
        dtype = torch.float32 if is_short else part.dtype
        return part.detach().to(self.device or part.device, dtype, copy=True)

    def state(self, module: nn.Module, strategy: Strategy) -> dict[str, Any]:
        """Its tensors by all names that the module's state has for them, as shards where the module's are."""
        if self._is_whole:
            return self.tensors
        state = {}
        first_names = _first_names(module)
        for name, value in strategy.model_state().items():
            tensor = self.tensors.get(first_names.get(name, name))
            if tensor is not None:
                is_shard = not isinstance(value, Tensor)
                state[name] = replace(value, tensor=tensor) if is_shard else tensor
        return state

    def load(
        self, state: dict[str, Tensor], module: nn.Module, strategy: Strategy
    ) -> None:
        """Take this process's part of whole tensors, as of :meth:`state`; those that the module lacks are left out."""
        self.tensors = {}
        self._is_whole = False
        states = strategy.model_state()
        if unknown := state.keys() - states.keys():
            log.warning(
                "The module has no %s, of which the checkpoint holds the weights %r: what it has instead joins them "
                "with the next update",
                ", ".join(sorted(unknown)),
                self.name,
            )
        self._getters = _getters_of(module)
        for name, getter in self._getters.items():
            if name in state and name in states:
                part = strategy.saved_part(state, name, states[name])
                device = self.device or strategy.local_part(getter(module)).device
                self.tensors[name] = part.to(device, copy=True)

    @torch.no_grad()
    def restore(self, module: nn.Module, strategy: Strategy) -> None:
        """Write the parameters into the module, as those that are trained."""
        for name, tensor in self.tensors.items():
            place = self._getters[name](module)
            if isinstance(place, nn.Parameter):
                strategy.local_part(place).copy_(tensor)

    def gather(self, whole: dict[str, Tensor], belongs_in_module: bool) -> None:
        """Have these whole tensors, on the CPU, in the place of this process's parts, to be sent to another process.

        Args:
            whole: by name, as of :meth:`state`.
            belongs_in_module: it was in the module, and is to be in that of the other process.
        """
        self.tensors = {name: tensor.cpu() for name, tensor in whole.items()}
        self._is_whole = True
        self.belongs_in_module = belongs_in_module

    # In the module.

    @property
    def is_in_module(self) -> bool:
        """Whether it has been put into the module, and not been taken out."""
        return bool(self._before)

    @torch.no_grad()
    def put_in(self, module: nn.Module, strategy: Strategy) -> None:
        """Let the module have these weights. A collective where they are sharded."""
        self._places = self._find_places(module, strategy)
        self._replace()

    def _find_places(
        self, module: nn.Module, strategy: Strategy
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """What the module evaluates with, and what is to stand there."""
        getters = _getters_of(module)
        return {
            (name, number): pair
            for name, value in self.tensors.items()
            for number, pair in enumerate(
                strategy.evaluated_part(getters[name](module), value)
            )
        }

    def _replace(self) -> None:
        for key, (place, value) in self._places.items():
            self._before[key] = place.clone()
            place.copy_(value)

    @torch.no_grad()
    def take_out(self, module: nn.Module, strategy: Strategy) -> bool:
        """Let the module have its own weights again. A collective where they are sharded.

        Returns:
            Whether it has them; False if its weights have been changed since they were replaced, and stay as they are.
        """
        is_unchanged = True
        if not self._places:
            self._places = self._find_places(module, strategy)
            is_unchanged = _are_equal(self._places, strategy)
        if is_unchanged:
            for key, before in self._before.items():
                self._places[key][0].copy_(before)
        self._before = {}
        return is_unchanged

    def leave_in(self, module: nn.Module, strategy: Strategy) -> None:
        """Let the module have these weights after a fit, until the next one begins."""
        self.put_in(module, strategy)
        self._places = {}

    @contextmanager
    def within(self, module: nn.Module, strategy: Strategy) -> Iterator[None]:
        """A context in which the module has these weights."""
        if self.is_in_module or not self.tensors:
            yield
            return
        try:
            self.put_in(module, strategy)
            yield
        finally:
            self.take_out(module, strategy)
            self._places = {}

    @contextmanager
    def without(self, module: nn.Module, strategy: Strategy) -> Iterator[None]:
        """A context in which the module has its own weights."""
        if not self.is_in_module:
            yield
            return
        is_left_in = not self._places
        was_there = self.take_out(module, strategy)
        try:
            yield
        finally:
            if was_there:
                with torch.no_grad():
                    self._replace()
            if is_left_in:
                self._places = {}


def _getters_of(module: nn.Module) -> dict[str, Callable[[Any], Tensor]]:
    """What finds each parameter, and each buffer of a module's state, by its first name."""
    state = module.state_dict(keep_vars=True)
    names = [name for name, _ in module.named_parameters()]
    names += [name for name, _ in module.named_buffers() if name in state]
    return {name: attrgetter(name) for name in names}


def _first_names(module: nn.Module) -> dict[str, str]:
    """The first name of each parameter and buffer, by each of its names."""
    names: dict[Any, str] = {}
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name: names.setdefault(tensor, name) for name, tensor in named}


def _are_equal(places: dict[Any, tuple[Tensor, Tensor]], strategy: Strategy) -> bool:
    """Whether the same values stand everywhere as were put there, in all processes that have parts of them."""
    pairs = places.values()
    equal = all(torch.equal(place, value.to(place)) for place, value in pairs)
    if strategy.capabilities.shards_state:
        equal = bool(strategy.reduce(torch.tensor(float(equal)), "min"))
    return equal
