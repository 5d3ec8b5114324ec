"""GradientAccumulationScheduler: windows that change with the epoch, in a run and in one that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopwright.callbacks import GradientAccumulationScheduler
from tests.framework.models import Linear, loader, quiet, weights


class Counts(Linear):
    """Keeps how many steps were taken before each epoch, and what was expected in all."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.expected: int | float = 0

    def on_train_epoch_start(self) -> None:
        self.steps.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        self.expected = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_windows_change_with_the_epoch() -> None:
    """1 before the first that is named; the steps of the whole run are known beforehand."""
    module = Counts()
    trainer = quiet(GradientAccumulationScheduler({1: 4, 3: 2}), max_epochs=4)
    trainer.fit(module, loader(5))
    assert module.steps == [0, 5, 7, 9]
    assert trainer.global_step == module.expected == 12


def test_a_run_that_resumes_inside_an_epoch_is_the_whole_one(tmp_path: Path) -> None:
    def make(**options: Any) -> Any:
        scheduler = GradientAccumulationScheduler({0: 2, 1: 3})
        return quiet(scheduler, max_epochs=3, **options)

    torch.manual_seed(0)
    whole = Linear()
    part, resumed = Linear(), Linear()
    for module in (part, resumed):
        module.load_state_dict(whole.state_dict())
    make().fit(whole, loader(5))
    first = make(max_steps=4)
    first.fit(part, loader(5))
    assert (first.current_epoch, first.batch_idx) == (1, 3)
    first.save_checkpoint(tmp_path / "cut")
    trainer = make()
    trainer.fit(resumed, loader(5), ckpt_path=tmp_path / "cut")
    assert trainer.global_step == 3 + 2 + 2
    assert all(map(torch.equal, weights(whole), weights(resumed)))


@pytest.mark.parametrize(
    ("scheduling", "message"),
    [
        ({}, "a dict of numbers of batches by epoch.*got {}"),
        (3, "got 3"),
        ({-1: 2}, "an epoch must be an int of at least 0; got -1"),
        ({0: 0}, "a number of batches must be an int of at least 1; got 0"),
    ],
)
def test_what_is_no_schedule(scheduling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientAccumulationScheduler(scheduling)


def test_two_numbers_for_the_same_are_refused() -> None:
    trainer = quiet(GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=4)
    with pytest.raises(ValueError, match="set the same"):
        trainer.fit(Linear(), loader())
