"""A pass over the training batches that trains nothing."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from ..data.iteration import INFINITE
from ..metrics.metric_state import unchanged_metrics
from ..seed import isolated_rng
from .step import step_arguments

if TYPE_CHECKING:
    from .run import Run


def forward_training_batches(run: Run) -> None:
    """Do what :meth:`Trainer.forward_training_batches` says."""
    loaders = run.loaders
    strategy = run.engine.strategy
    most = loaders.max_batches["train"]
    count = None if most == INFINITE else int(most)
    transfer = loaders.transfer()
    num_arguments = step_arguments(run.module.training_step)
    with (
        isolated_rng(run.engine.device),
        unchanged_metrics(run.module),
        run.metrics.context("train", "batch"),
        torch.no_grad(),
    ):
        for batch_idx, batch in enumerate(islice(loaders.iterate_train(), count)):
            moved = batch if transfer is None else transfer(batch, 0)
            # What is logged does not count.
            run.metrics.begin_batch(moved, is_dummy=True)
            arguments = (moved, batch_idx)[:num_arguments]
            strategy.evaluate("training_step", *arguments)
    # Whoever asks for the position, such as a save, is to find the one of before.
    loaders.load_train(again=True)
