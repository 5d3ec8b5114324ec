"""When a fit validates and ends: the loop's alarm against the rules, batch by batch."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from loopwright.callbacks import Callback
from loopwright.framework import Module
from tests.strategies.distributed import quiet

EPOCHS = 3


class Case(NamedTuple):
    """A fit's arguments."""

    batches: int
    interval: int | float
    every_n_epochs: int | None
    accumulate: int
    max_steps: int
    stop_at: int  # the batch of the run at whose end somebody asks to stop; 0 for none


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Notes validations, and asks to stop."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.trained = 0
        self.validations: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trained += 1
        if self.trained == self.stop_at:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validations.append(self.trained)


def expected(case: Case) -> tuple[list[int], int, int]:
    """By the rules: after which batches there is a validation, and how many batches and steps are taken."""
    interval: Any = case.interval
    if isinstance(interval, float):
        interval = max(1, int(case.batches * interval))
    validations: list[int] = []
    trained = steps = 0
    for epoch in range(EPOCHS):
        validates = (
            case.every_n_epochs is None or (epoch + 1) % case.every_n_epochs == 0
        )
        for number in range(1, case.batches + 1):
            trained += 1
            is_last = number == case.batches
            stepped = number % case.accumulate == 0 or is_last
            steps += stepped
            counted = trained if case.every_n_epochs is None else number
            if validates and counted % interval == 0:
                validations.append(trained)
            asked = 0 < case.stop_at <= trained and stepped
            if steps == case.max_steps or asked:
                # Whoever asks to stop inside an epoch gets a validation of where the training ended.
                if asked and not is_last and steps != case.max_steps:
                    validations += [trained] if trained not in validations else []
                return validations, trained, steps
    return validations, trained, steps


CASES = [
    Case(*values)
    for values in product(
        (1, 4, 7), (1, 3, 0.5, 1.0), (1, 2, None), (1, 3), (-1, 5), (0, 6)
    )
    if not (values[1] == 3 and values[0] == 1 and values[2] is not None)
    if not (values[1] == 0.5 and values[2] is None)
]


@pytest.mark.parametrize("every_n_epochs", [1, 2, None])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_validations_and_the_end_come_by_the_rules(
    accumulate: int, every_n_epochs: int | None
):
    for case in CASES:
        if (case.accumulate, case.every_n_epochs) != (accumulate, every_n_epochs):
            continue
        watch = Watch(case.stop_at)
        trainer = quiet(
            callbacks=watch,
            max_epochs=EPOCHS,
            num_sanity_val_steps=0,
            max_steps=case.max_steps,
            val_check_interval=case.interval,
            check_val_every_n_epoch=case.every_n_epochs,
            accumulate_grad_batches=case.accumulate,
        )
        trainer.fit(Net(), [torch.ones(2, 1)] * case.batches, [torch.ones(2, 1)])
        found = watch.validations, watch.trained, trainer.global_step
        assert found == expected(case), case
