from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from loopwright.callbacks import EarlyStopping, ModelCheckpoint
from loopwright.callbacks.early_stopping import EarlyStoppingReason
from tests.callbacks.scripted import Scripted, fit

NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "values", "epochs", "reason"),
    [
        (
            {"patience": 2},
            (3.0, 2.0, 2.5, 2.1, 1.0),
            4,
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
        ),
        ({"patience": 0}, (3.0, 2.0, 2.5), 3, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        (
            {"patience": 1, "mode": "max"},
            (1.0, 2.0, 1.5),
            3,
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
        ),
        (
            {"patience": 1, "min_delta": 0.5},
            (3.0, 2.4, 2.0),
            3,
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
        ),
        (
            {"patience": 1, "min_delta": 0.5, "mode": "max"},
            (1.0, 1.6, 2.0),
            3,
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
        ),
        ({}, (3.0, NAN), 2, EarlyStoppingReason.NON_FINITE_METRIC),
        (
            {"check_finite": False, "patience": 2},
            (3.0, NAN, NAN),
            3,
            EarlyStoppingReason.PATIENCE_EXHAUSTED,
        ),
        (
            {"stopping_threshold": 2.5},
            (3.0, 2.4),
            2,
            EarlyStoppingReason.STOPPING_THRESHOLD,
        ),
        (
            {"divergence_threshold": 5.0},
            (3.0, 5.5),
            2,
            EarlyStoppingReason.DIVERGENCE_THRESHOLD,
        ),
        (
            {"divergence_threshold": 1.0, "mode": "max"},
            (3.0, 0.5),
            2,
            EarlyStoppingReason.DIVERGENCE_THRESHOLD,
        ),
        ({"patience": 3}, (3.0, 2.0, 1.0), 6, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 9}, (3.0, 2.0, 1.0), 8, EarlyStoppingReason.NOT_STOPPED),
    ],
)
def test_when_it_stops(
    arguments: dict[str, Any],
    values: tuple[float, ...],
    epochs: int,
    reason: EarlyStoppingReason,
):
    callback = EarlyStopping("val_loss", **arguments)
    run = fit(callback, module=Scripted(values), max_epochs=8)
    assert run.current_epoch == epochs
    assert callback.stopping_reason is reason
    assert callback.stopped_epoch == (
        epochs - 1 if reason is not EarlyStoppingReason.NOT_STOPPED else 0
    )


def test_the_reason_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "loopwright"):
        callback = EarlyStopping("val_loss", patience=1)
        fit(callback, module=Scripted((3.0, 4.0)))
    message = "val_loss did not improve in the last 1 checks; the best was 3."
    assert callback.stopping_reason_message == message
    assert f"EarlyStopping, epoch 1: Stopping: {message}" in caplog.messages


def test_attributes_count():
    callback = EarlyStopping("val_loss", patience=5)
    fit(callback, module=Scripted((3.0, 2.0, 2.5)))
    assert (callback.wait_count, callback.best_score, callback.patience) == (1, 2.0, 5)
    assert callback.monitor_op(torch.tensor(1.0), torch.tensor(2.0))


def test_after_each_validation_if_an_epoch_has_several():
    class Constant(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    run = fit(
        EarlyStopping("val_loss", patience=2),
        module=Constant(),
        val_check_interval=1,
        num_sanity_val_steps=2,
    )
    assert (
        run.global_step == 3
    )  # the first check sets the best value, the sanity check counts for nothing


def test_only_after_validation_if_not_every_epoch_has_one():
    run = fit(
        EarlyStopping("val_loss", patience=1),
        module=Scripted((1.0,)),
        check_val_every_n_epoch=2,
        max_epochs=9,
    )
    assert run.current_epoch == 4


def test_without_validation_it_checks_each_epoch():
    class Worse(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("loss", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    run = fit(
        EarlyStopping("loss", patience=1),
        module=Worse(),
        validate=False,
        check_val_every_n_epoch=3,
    )
    assert run.current_epoch == 2


def test_the_minimum_number_of_epochs_is_trained():
    run = fit(
        EarlyStopping("val_loss", patience=1),
        module=Scripted((1.0,)),
        min_epochs=4,
        max_epochs=6,
    )
    assert run.current_epoch == 4


def test_a_monitor_that_is_not_logged():
    with pytest.raises(
        RuntimeError, match=r"monitor='val_los'.*'val_loss'.* Did you mean 'val_loss'"
    ):
        fit(EarlyStopping("val_los"))
    assert fit(EarlyStopping("val_los", strict=False)).current_epoch == 3


def test_fast_dev_run_checks_nothing():
    assert fit(EarlyStopping("no such value"), fast_dev_run=True).global_step == 1


def test_what_it_decided_is_in_the_checkpoint_of_that_epoch():
    callback = EarlyStopping("val_loss", patience=1)
    fit(callback, ModelCheckpoint("kept", save_top_k=-1), module=Scripted((1.0, 2.0)))
    resumed = EarlyStopping("val_loss", patience=1)
    run = fit(
        resumed,
        module=Scripted((1.0, 2.0)),
        ckpt_path="kept/epoch=1-step=8.ckpt",
        max_epochs=9,
    )
    assert run.global_step == 8  # it stops at once
    assert resumed.wait_count == 1


def test_more_patience_lets_a_stopped_run_go_on():
    fit(
        EarlyStopping("val_loss", patience=1),
        ModelCheckpoint("kept"),
        module=Scripted((1.0, 2.0)),
    )
    more = EarlyStopping("val_loss", patience=3)
    run = fit(
        more,
        module=Scripted((1.0, 2.0)),
        ckpt_path="kept/epoch=1-step=8.ckpt",
        max_epochs=9,
    )
    assert run.current_epoch == 4
    assert more.patience == more.wait_count == 3


@pytest.mark.parametrize("cut", [3, 4, 7])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(cut: int):
    values = (3.0, 2.0, 2.5, 2.6, 1.0)
    whole, first, resumed = (EarlyStopping("val_loss", patience=2) for _ in range(3))
    steps = fit(whole, module=Scripted(values), max_epochs=8).global_step
    fit(
        first,
        ModelCheckpoint("kept", save_last=True),
        module=Scripted(values),
        max_steps=cut,
    )
    run = fit(
        resumed, module=Scripted(values), max_epochs=8, ckpt_path="kept/last.ckpt"
    )
    assert run.global_step == steps == 16
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "auto"}, "mode must be .*'auto'"),
        ({"patience": -1}, "patience .*-1"),
        ({"patience": 1.5}, "patience .*1.5"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EarlyStopping("val_loss", **arguments)
