from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from loopwright.callbacks import EarlyStopping, LearningRateMonitor
from loopwright.loggers import Logger
from tests.callbacks.scripted import Scripted, fit


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows if name in row}


class Configured(Scripted):
    """With optimizers made by a function of the module."""

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.configure = configure
        self.automatic_optimization = False
        self.head = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Halving(Scripted):
    def __init__(self, interval: str) -> None:
        super().__init__()
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1.0)
        return [optimizer], [
            {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": self.interval}
        ]


def names_for(configure: Any, **arguments: Any) -> set[str]:
    rows = Rows()
    fit(
        LearningRateMonitor("epoch", **arguments),
        module=Configured(configure),
        logger=rows,
        max_epochs=1,
    )
    return {
        name for _, row in rows.rows for name in row if name.startswith(("lr-", "warm"))
    }


@pytest.mark.parametrize(
    ("configure", "names"),
    [
        (lambda m: SGD(m.parameters(), 0.1), {"lr-SGD"}),
        (
            lambda m: [Adam(m.layer.parameters()), Adam(m.head.parameters())],
            {"lr-Adam", "lr-Adam-1"},
        ),
        (
            lambda m: [Adam(m.layer.parameters()), SGD(m.head.parameters(), 0.1)],
            {"lr-Adam", "lr-SGD"},
        ),
        (
            lambda m: SGD(
                [{"params": m.layer.parameters()}, {"params": m.head.parameters()}], 0.1
            ),
            {"lr-SGD/pg1", "lr-SGD/pg2"},
        ),
        (
            lambda m: SGD(
                [
                    {"params": m.layer.parameters(), "name": "body"},
                    {"params": m.head.parameters()},
                ],
                0.1,
            ),
            {"lr-SGD/body", "lr-SGD/pg2"},
        ),
        (
            lambda m: SGD([{"params": m.layer.parameters(), "name": "body"}], 0.1),
            {"lr-SGD/body"},
        ),
        (
            lambda m: (
                [o := SGD(m.parameters(), 0.1)],
                [{"scheduler": StepLR(o, 1), "name": "warm"}],
            ),
            {"warm"},
        ),
    ],
)
def test_names(configure: Any, names: set[str]):
    assert names_for(configure) == names


def test_momentum_and_weight_decay_on_request():
    def configure(module: Configured) -> Any:
        return [
            SGD(module.layer.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
            Adam(module.head.parameters(), betas=(0.8, 0.99)),
        ]

    rows = Rows()
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    fit(monitor, module=Configured(configure), logger=rows, max_epochs=1)
    row = next(row for _, row in rows.rows if "lr-SGD" in row)
    assert (row["lr-SGD-momentum"], row["lr-SGD-weight_decay"]) == (0.9, 0.01)
    assert (row["lr-Adam-momentum"], row["lr-Adam-weight_decay"]) == (0.8, 0.0)
    assert row["epoch"] == 0


def test_a_step_has_the_rate_that_it_was_taken_with():
    rows, monitor = Rows(), LearningRateMonitor()
    fit(monitor, module=Halving("step"), logger=rows, max_epochs=1)
    assert rows.of("lr-SGD") == {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.125}
    assert rows.of("lr-SGD").keys() == rows.of("train_loss").keys()
    assert monitor.lrs == {"lr-SGD": [1.0, 0.5, 0.25, 0.125]}


def test_rows_come_when_the_others_do():
    rows = Rows()
    fit(LearningRateMonitor(), module=Halving("step"), logger=rows, log_every_n_steps=3)
    assert rows.of("lr-SGD").keys() == rows.of("train_loss").keys() == {3, 6, 9, 12}


def test_an_accumulation_window_gives_one_row():
    rows, monitor = Rows(), LearningRateMonitor("step")
    fit(
        monitor,
        module=Halving("step"),
        logger=rows,
        max_epochs=1,
        accumulate_grad_batches=2,
    )
    assert monitor.lrs == {"lr-SGD": [1.0, 0.5]}
    assert rows.of("lr-SGD") == {1: 1.0, 2: 0.5}


def test_each_scheduler_is_logged_at_its_own_interval():
    rows = Rows()
    fit(LearningRateMonitor(), module=Halving("epoch"), logger=rows)
    assert rows.of("lr-SGD") == {0: 1.0, 4: 0.5, 8: 0.25}


@pytest.mark.parametrize(
    ("interval", "steps"), [("epoch", {0, 4, 8}), ("step", set(range(1, 13)))]
)
def test_a_given_interval_counts_for_all(interval: Any, steps: set[int]):
    rows = Rows()
    fit(
        LearningRateMonitor(interval),
        module=Halving("epoch" if interval == "step" else "step"),
        logger=rows,
    )
    assert rows.of("lr-SGD").keys() == steps


def test_it_needs_a_logger():
    with pytest.raises(RuntimeError, match="LearningRateMonitor needs a logger"):
        fit(LearningRateMonitor())


def test_groups_of_one_name_are_an_error():
    with pytest.raises(
        ValueError, match=r"need different names; lr-SGD has \['a', 'a'\]"
    ):
        names_for(
            lambda m: SGD(
                [
                    {"params": m.layer.parameters(), "name": "a"},
                    {"params": m.head.parameters(), "name": "a"},
                ],
                0.1,
            )
        )


def test_an_unknown_interval_is_an_error():
    with pytest.raises(ValueError, match=r"logging_interval must be .*'batch'"):
        LearningRateMonitor("batch")  # type: ignore[arg-type] # that is the point


def test_other_callbacks_can_monitor_it():
    stop = EarlyStopping(
        "lr-SGD", stopping_threshold=0.2, check_on_train_epoch_end=True
    )
    run = fit(
        LearningRateMonitor("epoch", log_momentum=True),
        stop,
        module=Halving("epoch"),
        logger=Rows(),
        max_epochs=9,
    )
    assert stop.stopped_epoch == 3  # after rates of 1, 0.5, 0.25 and 0.125
    assert run.callback_metrics["lr-SGD"] == 0.125
    assert run.callback_metrics["lr-SGD-momentum"] == 0
