"""Batches on their way to a CUDA device: from pinned memory, on a stream of their own, before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .batches import move_items
from .combined import may_read_ahead

# How many batches are copied before they are asked for.
DEPTH = 2


class Copies:
    """Copies batches to a device beside what it computes.

    Args:
        device: a CUDA device.
        cuda: what has its streams.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    def begin(self, batch: Any) -> tuple[Any, Any, list[Tensor]]:
        """Begin to copy a batch; returns what :meth:`end` takes.

        Tensors in pinned memory are copied from there, others are pinned first. What has a ``to`` of its own is moved
        on the stream that computes, as its tensors are out of reach.
        """
        computes = self._cuda.current_stream(self._device)
        copied: list[Tensor] = []

        def move(item: Any) -> Any:
            if not isinstance(item, Tensor) or item.device.type != "cpu":
                with self._cuda.stream(computes):
                    return item.to(self._device)
            if item.layout is torch.strided and not item.is_pinned():
                item = item.pin_memory()
            copied.append(item.to(self._device, non_blocking=True))
            return copied[-1]

        with self._cuda.stream(self._stream):
            return move_items(batch, move), self._stream.record_event(), copied

    def end(self, batch: Any, copied_all: Any, copied: list[Tensor]) -> Any:
        """Let the stream that computes wait for the copies; returns the batch on the device."""
        computes = self._cuda.current_stream(self._device)
        computes.wait_event(copied_all)
        for tensor in copied:
            # Its memory is reused only after the step that reads it.
            tensor.record_stream(computes)
        return batch


@cache
def copies_to(device: torch.device) -> Copies | None:
    """Those of a CUDA device, which have one stream; None for any other."""
    return Copies(device) if device.type == "cuda" else None


def move_batch(batch: Any, device: torch.device) -> Any:
    """Move all tensors to ``device``; on CUDA on a stream of their own, so that the copy overlaps the step before.

    What has a ``to`` method is moved by it, except for a mapping that has no device of its own.
    """
    copies = copies_to(device)
    if copies is None:
        return move_items(batch, lambda item: item.to(device))
    return copies.end(*copies.begin(batch))


class CopiedAhead:
    """The batches of a loader, the next ones of which are being copied to the device.

    Args:
        batches: what to iterate.
        loader: where they come from; its ``batch_weight`` is that of the batch read last.
        copies: what copies them.

    Attributes:
        batch_weight: that of the batch given last.
    """

    def __init__(self, batches: Iterator[Any], loader: Any, copies: Copies) -> None:
        self._batches = batches
        self._loader = loader
        self._copies = copies
        # What was read, with its weight; in the end the error that has ended it, which may be StopIteration.
        self._read: deque[tuple[Any, float]] = deque()
        self._error: Exception | None = None
        self._is_shared = dist.is_available() and dist.is_initialized()
        self.batch_weight = 1.0

    def __iter__(self) -> CopiedAhead:
        return self

    def __next__(self) -> Any:
        while len(self._read) <= DEPTH and self._error is None:
            try:
                batch = next(self._batches)
            except Exception as error:
                if self._is_shared and not isinstance(error, StopIteration):
                    # Others may wait for this process, which reads together with them.
                    raise
                # It is raised where its batch belongs.
                self._error = error
            else:
                begun = self._copies.begin(batch)
                self._read.append((begun, self._loader.batch_weight))
        if not self._read:
            assert self._error is not None
            error = self._error
            self._error = StopIteration()
            raise error
        begun, self.batch_weight = self._read.popleft()
        return self._copies.end(*begun)


def copied_ahead(
    batches: Iterator[Any], loader: Any, weights: Any, device: torch.device
) -> Iterator[Any]:
    """The same batches; those of a CUDA device are copied ahead where that changes nothing else.

    Args:
        batches: an iteration of a loader.
        loader: the loader, as the user gave it.
        weights: has the ``batch_weight`` of the batch read last.
        device: where they are wanted.
    """
    copies = copies_to(device)
    if copies is None or not may_read_ahead(loader):
        return batches
    return CopiedAhead(batches, weights, copies)
