"""Which samples a training step had: from the seed, the epoch and the position alone, and shown through the dataset."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import callbacks as builtin_callbacks
from ...strategies.group import Group
from ..checkpoint.reader import load_checkpoint
from ..data.iteration import INFINITE
from ..lifecycle.attachment import attached
from ..lifecycle.execute import begin_run, prepare_data
from .asked import Asked
from .step_values import told_samples

if TYPE_CHECKING:
    from ..loop.run import Run, RunRequest
    from ..trainer import Trainer

# How many samples of a batch are shown.
_MOST_SHOWN = 8
_LONGEST_TEXT = 200


class PlayedGroup(Group):
    """One process that plays a rank of many: it is told that they all say what it says.

    Args:
        device: its device.
        rank: which rank it plays.
        local_rank: that rank's index on its machine.
        world_size: number of ranks.
    """

    def __init__(
        self, device: torch.device, rank: int, local_rank: int, world_size: int
    ) -> None:
        self.device = device
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size

    def join(self) -> None:
        """Let code that asks torch for its rank hear the same."""
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(
            "fake", rank=self.rank, world_size=self.world_size, store=FakeStore()
        )

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value once for each rank."""
        return [value] * self.world_size


def show_batch(
    trainer: Trainer,
    request: RunRequest,
    wanted: Asked,
    start: Mapping[str, Any] | None,
) -> None:
    """Print the samples of a step, without training.

    Args:
        trainer: the program's, which is about to fit.
        request: what was asked of it.
        wanted: which step, of which rank.
        start: how the run began, if that is known.
    """
    if wanted.world_size > 1:
        group = trainer.strategy.group
        played = PlayedGroup(
            group.device, wanted.rank, group.local_rank, wanted.world_size
        )
        trainer.strategy.use_group(played)
        trainer.strategy.connect()
    with attached(trainer, request.module, request.datamodule, changes_weights=False):
        run = begin_run(trainer, request)
        run.state.start()
        if wanted.checkpoint is not None:
            counters = load_checkpoint(wanted.checkpoint)["run"]["state"]
            run.state.load_state_dict(counters)
        elif start is not None:
            run.state.share_seed(start["data_seed"])
        prepare_data(run)
        run.hooks.call("setup", "fit")
        run.loaders.load_train()
        for line in _lines(run, wanted):
            print(line, flush=True)


def _lines(run: Run, wanted: Asked) -> Iterator[str]:
    loader = run.loaders.train
    assert loader is not None
    rank = (
        f", rank {wanted.rank} of {wanted.world_size}" if wanted.world_size > 1 else ""
    )
    place = find_window(run, wanted.step)
    if place is None:
        yield (
            f"step {wanted.step}{rank}: nobody can tell its batches before they are read, as the loader's length is "
            f"not certain (a stream) and the step lies beyond epoch {run.state.epoch}; loopwright replay comes to it"
        )
        return
    epoch, batches = place
    if not run.module.automatic_optimization:
        yield "manual optimization: one step a batch is assumed"
    for batch_idx in batches:
        samples = loader.samples_of(epoch, batch_idx)
        yield f"step {wanted.step}{rank}: epoch {epoch}, batch {batch_idx}"
        yield f"samples           {told_samples(samples)}"
        yield from _shown(run, samples or [])


def find_window(run: Run, step: int) -> tuple[int, range] | None:
    """Return the epoch and the indices of the batches of a step, counted on from where the run is.

    Args:
        run: a fit whose loader has been made.
        step: the step, later than where the run is.

    Returns:
        None where that depends on how many batches a stream gives.
    """
    state = run.state
    loader = run.loaders.train
    assert loader is not None
    epoch = state.epoch
    first = state.batch_idx
    done = state.global_step
    length = run.loaders.max_batches["train"]
    if state.batches_done or state.epoch_done:
        epoch = epoch + 1
        first = 0
        length = run.loaders.whole_epoch
    while True:
        loader.begin_epoch(
            epoch, loader.segment if epoch == state.epoch else type(loader.segment)()
        )
        left_out = {i for data in state.left_out or () for i in loader.steps_with(data)}
        window = _accumulation_in(run, epoch)
        if length == INFINITE:
            start = first + (step - done - 1) * window
            # Where this epoch ends, nobody knows.
            return (
                (epoch, range(start, start + window)) if epoch == state.epoch else None
            )
        while first < length:
            batches = range(first, min(first + window, int(length)))
            # A window of which nothing is trained on is no step.
            done += not left_out.issuperset(batches)
            if done == step:
                return epoch, batches
            first = batches.stop
        epoch = epoch + 1
        first = 0
        length = run.loaders.whole_epoch


def _accumulation_in(run: Run, epoch: int) -> int:
    """Return the number of batches of a step in an epoch."""
    for callback in run.trainer.callbacks:
        if isinstance(callback, builtin_callbacks.GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return run.state.accumulate_grad_batches or run.trainer.accumulate_grad_batches


# The samples themselves.


def _shown(run: Run, samples: list[Any]) -> Iterator[str]:
    """Give a line for each of the first samples, as its dataset gives it now."""
    loader = run.loaders.train
    assert loader is not None
    parts = loader.source.parts
    for sample in samples[:_MOST_SHOWN]:
        # Of several loaders, a pair says which one it is.
        part, index = sample if len(parts) > 1 else (0, sample)
        dataset = getattr(parts[part].loader, "dataset", None)
        try:
            text = describe(dataset[index])  # type: ignore[index]  # any map-style dataset
        except Exception as error:
            text = f"raises {type(error).__name__}: {error}"
        yield f"  {sample!s:<16}{text}"
    if len(samples) > _MOST_SHOWN:
        yield f"  and {len(samples) - _MOST_SHOWN} more"


def describe(value: Any) -> str:
    """Return a sample in a few words: tensors by their shapes and ranges, all else as it is."""
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{key}: {describe(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)) and any(
        isinstance(item, (Tensor, Mapping)) for item in value
    ):
        return "(" + ", ".join(map(describe, value)) + ")"
    text = reprlib.repr(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"


def _describe_tensor(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.numel():
        return f"{kind} {tuple(tensor.shape)}"
    if tensor.numel() == 1:
        return f"{tensor.item()!r}"
    numbers = (
        tensor.detach().double()
        if not tensor.is_complex()
        else tensor.detach().abs().double()
    )
    bad = int((~torch.isfinite(numbers)).sum())
    text = f"{kind} {tuple(tensor.shape)} from {numbers.min().item():.4g} to {numbers.max().item():.4g}"
    return f"{text}, {bad} not finite" if bad else text
