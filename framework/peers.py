"""This process among the others: which one it is, and what the Engine lets them tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import peer_tensors
from .batches import map_tensors

if TYPE_CHECKING:
    from ..strategies import Strategy
    from .call_check import CallCheck
    from .prepared import PreparedLoader


class Peers:
    """The part of the Engine that needs no more than a strategy: the process's place, and collectives.

    Attributes:
        strategy: the strategy.
        running_loader: the prepared loader that is being iterated; of several, the innermost.
    """

    strategy: Strategy
    running_loader: PreparedLoader | None
    _calls: CallCheck | None  # in debug mode
    _triggered = False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.strategy.device

    @property
    def device_mesh(self) -> Any:
        """The processes as the strategy arranges them: a ``DeviceMesh``, or None."""
        return self.strategy.device_mesh

    @property
    def num_processes(self) -> int:
        """Number of processes."""
        return self.strategy.world_size

    @property
    def process_index(self) -> int:
        """This process's index among all."""
        return self.strategy.global_rank

    @property
    def local_process_index(self) -> int:
        """This process's index on its machine."""
        return self.strategy.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.strategy.is_global_zero

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is its machine's process 0."""
        return self.strategy.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process."""
        return self.process_index == self.num_processes - 1

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the context before the others begin it (to fill a cache that they read)."""
        yield from self._first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Each machine's main process runs the context before its others begin it."""
        yield from self._first(self.is_local_main_process)

    def _first(self, is_first: bool) -> Iterator[None]:
        if not is_first:
            self._meet("main_process_first")
        try:
            yield
        finally:
            if is_first:  # the others wait for it, even if it failed
                self._meet("main_process_first")

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run in the main process only; elsewhere it returns None."""
        return self._only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run in each machine's main process only."""
        return self._only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to run in the last process only."""
        return self._only(function, lambda: self.is_last_process)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int = 0) -> Callable[..., Any]:
        """Decorate a function to run in one process only: ``@engine.on_process(process_index=1)``."""
        if function is None:
            return lambda given: self.on_process(given, process_index)
        return self._only(function, lambda: self.process_index == process_index)

    @staticmethod
    def _only(function: Callable[..., Any], here: Callable[[], bool]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if here() else None

        return run

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    # -- collectives ------------------------------------------------------------------------------------------

    def _meet(self, call: str, data: Any = None) -> None:
        """A barrier, or in debug mode a comparison of the calls, which is one."""
        if self._calls is not None:
            self._calls.check(call, data)
        self.strategy.barrier()

    def _check(self, call: str, data: Any = None, sizes: bool = True) -> None:
        if self._calls is not None:
            self._calls.check(call, data, sizes)

    def wait_for_everyone(self) -> None:
        """Wait for all processes."""
        self._meet("wait_for_everyone")

    def all_gather(self, data: Any, sync_grads: bool = False) -> Any:
        """Gather the tensors in ``data`` from all processes, stacked along a new first dimension."""
        self._check("all_gather", data)
        return map_tensors(data, lambda tensor: self.strategy.all_gather(tensor, sync_grads))

    def gather(self, data: Any) -> Any:
        """Gather the tensors in ``data`` from all processes, concatenated along the first dimension by rank.

        Numbers (0-dim tensors) become one dimension. Other shapes must be alike: see :meth:`pad_across_processes`.
        """
        self._check("gather", data)
        return map_tensors(data, lambda tensor: peer_tensors.concatenate(self.strategy, tensor))

    def gather_for_metrics(self, data: Any, use_gather_object: bool = False) -> Any:
        """Gather a step's results from all processes, in the order of the data and without a batch counted twice.

        Batches of different sizes are gathered as they are; results of a batch that only kept a process in step with
        the others are left out.

        Args:
            data: tensors, the first dimension being the batch's, or numbers, nested at will; anything else that can be
                pickled, as a list.
            use_gather_object: gather by pickling, whatever it is.
        """
        loader = self.running_loader
        mine = loader is None or loader.share != 0.0
        self._check("gather_for_metrics", data, sizes=False)
        if use_gather_object or not peer_tensors.is_tensors(data):
            found = self.strategy.gather_objects(data if mine else None)
            present = self.strategy.gather_objects(mine)
            return peer_tensors.flatten([each for each, there in zip(found, present, strict=True) if there])
        return map_tensors(data, lambda tensor: peer_tensors.concatenate_uneven(self.strategy, tensor, mine))

    def gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, by rank: anything that can be pickled."""
        self._check("gather_object")
        return self.strategy.gather_objects(value)

    def reduce(self, data: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce the tensors in ``data`` over all processes.

        Args:
            data: tensors of the same shapes everywhere.
            reduction: ``"sum"``, ``"mean"``, ``"min"``, ``"max"`` or ``"none"``.
            scale: what to multiply the result with.
        """
        if reduction not in ("sum", "mean", "min", "max", "none"):
            raise ValueError(f'reduction must be "sum", "mean", "min", "max" or "none"; got {reduction!r}')
        self._check("reduce", data)

        def reduce(tensor: Tensor) -> Tensor:
            reduced = tensor if reduction == "none" else self.strategy.reduce(tensor, reduction)
            return reduced if scale == 1.0 else reduced * scale

        return map_tensors(data, reduce)

    def broadcast(self, value: Any, from_process: int = 0) -> Any:
        """The ``value`` of one process, on all: anything that can be pickled; its tensors come to each one's device."""
        self._check("broadcast")
        if self.num_processes == 1:
            return value
        sent = map_tensors(value, lambda tensor: tensor.cpu()) if self.process_index == from_process else None
        received = self.strategy.broadcast(sent, from_process)
        return value if self.process_index == from_process else map_tensors(received, lambda t: t.to(self.device))

    def pad_across_processes(self, data: Any, dim: int = 0, pad_index: Any = 0, pad_first: bool = False) -> Any:
        """Pad tensors along ``dim`` to the largest size of all processes, so that they can be gathered."""
        self._check("pad_across_processes", data, sizes=False)
        return map_tensors(data, lambda tensor: peer_tensors.pad(self.strategy, tensor, dim, pad_index, pad_first))

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of ``inputs``: consecutive ones, the first processes having one more where uneven.

        Args:
            inputs: a list, tuple, tensor, dict of such of one length, or dataset.
            apply_padding: repeat the last one, so that all processes have as many (to gather tensors of them).
        """
        running, self.running_loader = self.running_loader, None  # what is gathered inside is no batch of its
        try:
            yield peer_tensors.split(inputs, self.process_index, self.num_processes, apply_padding)
        finally:
            self.running_loader = running

    def set_trigger(self) -> None:
        """Raise a flag that :meth:`check_trigger` lowers in all processes."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has called :meth:`set_trigger` since the last time. A collective."""
        self._check("check_trigger")
        flag = self.strategy.reduce(torch.tensor(int(self._triggered)), "max")
        found, self._triggered = bool(flag.item()), False
        return found
