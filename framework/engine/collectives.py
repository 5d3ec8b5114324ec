"""The Engine's view of the processes: which one this is, and collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import formerly
from ..data.device_input import move_batch
from . import tensor_collectives
from .gather import Results
from .splitting import split

if TYPE_CHECKING:
    from ...strategies import Strategy
    from .call_check import CallCheck
    from .loaders import PreparedLoader


Function = Callable[..., Any]


class Collectives:
    """The part of the Engine that needs no more than a strategy: which process this is, and collectives.

    Attributes:
        strategy: the strategy.
        running_loader: the prepared loader that is being iterated; of several, the innermost.
    """

    strategy: Strategy
    running_loader: PreparedLoader | None
    # Compares the rare calls that all processes must make; None with one process.
    _calls: CallCheck | None = None
    # The same object in debug mode, for the frequent calls, too; else None.
    _every_call: CallCheck | None = None
    # Whether set_trigger was called since the last check_trigger.
    _triggered = False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.strategy.group.device

    @property
    def device_mesh(self) -> Any:
        """The processes as the strategy arranges them: a ``DeviceMesh``, or None."""
        return self.strategy.device_mesh

    @property
    def num_processes(self) -> int:
        """Number of processes."""
        return self.strategy.group.world_size

    @property
    def process_index(self) -> int:
        """This process's index among all."""
        return self.strategy.group.rank

    @property
    def local_process_index(self) -> int:
        """This process's index on its machine."""
        return self.strategy.group.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.strategy.group.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is its machine's process 0."""
        return self.strategy.group.local_rank == 0

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
            # The others wait, even if the context has failed here.
            if is_first:
                self._meet("main_process_first")

    def on_main_process(self, function: Function) -> Function:
        """Decorate a function to run in the main process only; elsewhere it returns None."""
        return self.on_process(function, 0)

    def on_local_main_process(self, function: Function) -> Function:
        """Decorate a function to run in each machine's main process only."""
        return _only_if(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Function) -> Function:
        """Decorate a function to run in the last process only."""
        return _only_if(function, lambda: self.is_last_process)

    def on_process(
        self, function: Function | None = None, process_index: int = 0
    ) -> Function:
        """Decorate a function to run in one process only: ``@engine.on_process(process_index=1)``."""
        if function is None:
            return lambda given: self.on_process(given, process_index)
        return _only_if(function, lambda: self.process_index == process_index)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def all_call(self, call: str, alone: bool = False) -> bool:
        """Wait until all processes have come to a call that all must make; for calls that are rare.

        Args:
            call: its name.
            alone: whether this process can also make it alone.

        Returns:
            Whether all make it; False only if ``alone``.

        Raises:
            RuntimeError: if a process can no longer come, as it calls something else or has ended; file and line on
                each rank are named.
        """
        if self._calls is None or self.strategy.group.failed:
            return True
        return self._calls.check(call, alone=alone)

    def _meet(self, call: str) -> None:
        """Compare a rare call with those of the other processes, and wait for all of them. A collective."""
        self.all_call(call)
        self.strategy.barrier()

    def _check(self, call: str, data: Any = None, sizes: bool = True) -> None:
        """Before a collective: compare it with those of the other processes in debug mode, and keys in any case."""
        if self._every_call is not None:
            self._every_call.check(call, data, sizes)
        if self.num_processes == 1:
            return
        keys = tensor_collectives.keys_of(data)
        if keys is not None:
            # Values are matched by their order only. Without this, those of different keys would be put together.
            # collective
            tensor_collectives.require_alike(self.strategy.gather_objects(keys), call)

    def wait_for_everyone(self) -> None:
        """Wait for all processes.

        Raises:
            RuntimeError: if one of them can no longer come, as it calls something else or has ended; file and line on
                each rank are named.
        """
        self._meet("wait_for_everyone")

    def all_gather(self, data: Any, sync_grads: bool = False) -> Any:
        """Gather the tensors and numbers in ``data`` from all processes, stacked along a new first dimension.

        Args:
            data: a tensor or a number, or a nesting of dicts, lists and tuples; anything else in it stays as it is.
            sync_grads: let gradients flow back through the gathering.

        Returns:
            ``data`` with tensors of the shape ``(num_processes, ...)``; with one process, as they were.
        """
        self._check("all_gather", data)

        def gather(value: Any) -> Any:
            if isinstance(value, (Tensor, Number)):
                return self.strategy.all_gather(
                    tensor_collectives.as_tensor(value), sync_grads
                )
            return tensor_collectives.rebuild_in_key_order(value, gather)

        return gather(data)

    @formerly(data="tensor")
    def gather(self, tensor: Any) -> Any:
        """Gather the tensors in ``tensor`` from all processes, concatenated along the first dimension by rank.

        Numbers (0-dim tensors, and Python's) become one dimension. Other shapes must be alike: see
        :meth:`pad_across_processes`.

        Raises:
            TypeError: for anything else.
            RuntimeError: for dicts of different keys.
        """
        self._check("gather", tensor)
        concatenate = partial(tensor_collectives.concatenate, self.strategy)
        return tensor_collectives.map_values(tensor, concatenate, "gather")

    @formerly(data="input_data")
    def gather_for_metrics(
        self, input_data: Any, use_gather_object: bool = False
    ) -> Any:
        """Gather a step's results from all processes, in the order of the data and without a batch counted twice.

        Batches of different sizes are gathered as they are; results of a batch that only kept a process in step with
        the others are left out.

        Args:
            input_data: tensors, the first dimension being the batch's, or 0-dim ones, are joined to one; lists, one
                item for each sample, to one list; in tuples and dicts, each by itself. A list of the batch's columns
                (tensors with as many rows as the loader's ``batch_size``) is treated as a tuple. Anything else, such as
                a number, and a dict that holds tensors beside other things, becomes a list of those of all processes.
            use_gather_object: gather by pickling, whatever it is, and join lists and tuples.

        Raises:
            RuntimeError: if the structure differs between processes.
        """
        self._check(
            "gather_for_metrics",
            input_data if isinstance(input_data, Tensor) else None,
            sizes=False,
        )
        results = Results(self.strategy, self.running_loader)
        return (
            results.gather_objects(input_data)
            if use_gather_object
            else results.gather(input_data)
        )

    def gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, by rank: anything that can be pickled; tensors come to each one's device."""
        self._check("gather_object")
        return tensor_collectives.exchange(self.strategy, value)

    @formerly(data="tensor")
    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce the tensors and Python numbers in ``tensor`` over all processes.

        Args:
            tensor: tensors of the same shapes everywhere, and numbers.
            reduction: ``"sum"``, ``"mean"``, ``"min"``, ``"max"`` or ``"none"``.
            scale: what to multiply the result with.

        Raises:
            TypeError: for anything else in ``tensor``.
            RuntimeError: for dicts of different keys.
        """
        if reduction not in ("sum", "mean", "min", "max", "none"):
            raise ValueError(
                f'reduction must be "sum", "mean", "min", "max" or "none"; got {reduction!r}'
            )
        self._check("reduce", tensor)
        reduce_value = partial(
            tensor_collectives.reduce, self.strategy, reduction=reduction, scale=scale
        )
        return tensor_collectives.map_values(tensor, reduce_value, "reduce")

    def broadcast(self, value: Any, from_process: int = 0) -> Any:
        """Give the value of one process to all; its tensors come to each one's device.

        Args:
            value: anything that can be pickled; what other processes give is not looked at.
            from_process: the index of the process whose value it is.

        Returns:
            That process's value.
        """
        self._check("broadcast")
        if self.num_processes == 1:
            return value
        if self.process_index == from_process:
            portable = move_batch(value, torch.device("cpu"))
            self.strategy.broadcast(portable, from_process)
            return value
        received = self.strategy.broadcast(None, from_process)
        return move_batch(received, self.device)

    @formerly(data="tensor")
    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: Any = 0, pad_first: bool = False
    ) -> Any:
        """Pad tensors along a dimension to the largest size of all processes, so that they can be gathered.

        Args:
            tensor: a tensor, or a nesting of dicts, lists and tuples of tensors.
            dim: the dimension.
            pad_index: the value to pad with.
            pad_first: pad at the beginning instead of the end.

        Returns:
            ``tensor`` with padded tensors.
        """
        self._check("pad_across_processes", tensor, sizes=False)

        def pad(value: Any) -> Any:
            if isinstance(value, Tensor):
                return tensor_collectives.pad(
                    self.strategy, value, dim, pad_index, pad_first
                )
            return tensor_collectives.rebuild_in_key_order(value, pad)

        return pad(tensor)

    @contextmanager
    def split_between_processes(
        self, inputs: Any, apply_padding: bool = False
    ) -> Iterator[Any]:
        """This process's part of ``inputs``: consecutive ones, the first processes having one more where uneven.

        Args:
            inputs: a list, tuple, tensor, dict of such of one length, or dataset.
            apply_padding: repeat the last one, so that all processes have as many (to gather tensors of them).
        """
        # What is gathered inside is not of the loader's batch, so it does not count as a dummy with it.
        running = self.running_loader
        self.running_loader = None
        try:
            yield split(inputs, self.process_index, self.num_processes, apply_padding)
        finally:
            self.running_loader = running

    def set_trigger(self) -> None:
        """Raise a flag that :meth:`check_trigger` lowers in all processes."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Whether any process has called :meth:`set_trigger` since the last time. A collective."""
        self._check("check_trigger")
        flag = self.strategy.reduce(torch.tensor(int(self._triggered)), "max")
        self._triggered = False
        return bool(flag.item())  # host-device sync


def _only_if(function: Function, is_here: Callable[[], bool]) -> Function:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_here() else None

    return run
