"""Intervals in one vocabulary: when validations, checkpoints and rows are due, in runs and in those that resume."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import Trainer
from loopwright.framework.checkpoint.token_count import TokenCount
from tests.framework.models import Evaluated, loader, quiet


class Weighted(Evaluated):
    """Returns a weight with each loss, as a tensor: 3, 4, 5, 3, 4, 5 …; keeps where it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": torch.tensor(3 + batch_idx % 3)}

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)


def validated(data: Any = None, **options: Any) -> list[int]:
    """After which steps a run is validated."""
    module = Weighted()
    quiet(max_epochs=2, **options).fit(module, data or loader(6), loader(1))
    return module.validated


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("5 steps", [5, 10]),
        ("1 epoch", [6, 12]),
        ("2 epochs", [12]),
        ("0.5 epochs", [3, 6, 9, 12]),
        ("4 batches", [4, 8, 12]),
        # 3, 7, 12, 15, 19, 24; 27, 31, 36, 39, 43, 48
        ("20 tokens", [6, 11]),
        ("0.012k tokens", [3, 6, 9, 12]),
        ("1M tokens", []),
        ("10 hours", []),
        ("1e9 hours", None),
    ],
)
def test_validations(every: str, steps: list[int] | None) -> None:
    """A number of them in two epochs of six steps."""
    if steps is None:
        with pytest.raises(ValueError, match="validate_every must be an interval"):
            validated(validate_every=every)
        return
    assert validated(validate_every=every) == steps


def test_validations_by_steps_wait_for_windows() -> None:
    """Steps are those of the optimizer, and the last window of an epoch is one."""
    assert validated(validate_every="2 steps", accumulate_grad_batches=4) == [2, 4]
    assert validated(validate_every="3 steps", accumulate_grad_batches=4) == [3]
    assert validated(validate_every="24 tokens", accumulate_grad_batches=4) == [2, 4]


@pytest.mark.parametrize(
    "interval",
    ["00:00:00:00", "00:10:00", "00:00:10:00", timedelta(minutes=10), {"minutes": 10}],
)
def test_validations_by_time(interval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each so many minutes since the last one; here, each batch takes six."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class Slow(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            nonlocal now
            now += 360.0
            return super().training_step(batch, batch_idx)

    if interval == "00:00:00:00":
        with pytest.raises(ValueError, match="val_check_interval must be an interval"):
            quiet(val_check_interval=interval)
        return
    module = Slow()
    quiet(val_check_interval=interval).fit(module, loader(6), loader(1))
    assert module.validated == [2, 4, 6]
    # Only in each second epoch: there, after its first batch, as the time is up.
    module = Slow()
    trainer = quiet(
        val_check_interval=interval, check_val_every_n_epoch=2, max_epochs=2
    )
    trainer.fit(module, loader(6), loader(1))
    assert module.validated == [7, 9, 11]


class Cuts(Callback):
    """Saves after each step."""

    phase = "persist"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("every", ["5 steps", "20 tokens"])
def test_a_run_that_resumes_anywhere_validates_and_saves_as_the_whole_one(
    every: str, tmp_path: Path
) -> None:
    """Also one that was saved right before a validation."""

    def run(name: str, path: Path | None = None, *more: Callback) -> tuple[Any, Any]:
        module = Weighted()
        checkpoint = ModelCheckpoint(
            dirpath=tmp_path / name, every="16 tokens", save_top_k=-1
        )
        trainer = quiet(*more, checkpoint, max_epochs=2, validate_every=every)
        trainer.fit(module, loader(6), loader(1), ckpt_path=path)
        saved = sorted(int(p.stem.split("=")[-1]) for p in (tmp_path / name).iterdir())
        return module.validated, saved

    whole, saved = run("whole", None, Cuts(tmp_path / "cuts"))
    assert saved == [5, 9, 12]
    for step in (3, 5, 6, 8, 10):
        resumed, later = run(f"cut {step}", tmp_path / "cuts" / str(step))
        # Cuts saves before what is due at its step: a validation is made up for at once, a save after the next step.
        assert resumed == [other for other in whole if other >= step]
        assert later == [max(other, step + 1) for other in saved if other >= step]


def test_tokens_are_read_seldom_and_in_time() -> None:
    """Of a thousand steps, at most a few dozen wait for the device, and no number is passed by unnoticed."""
    count, reads = TokenCount(), 0
    mark, noticed, total = count.next_multiple(10_000), [], 0
    for step in range(1, 1001):
        weight = 90 + step % 21
        count.add(torch.tensor(weight))
        total += weight
        before = count.known_step
        if count.has_reached(mark, step):
            noticed.append((mark, total))
            mark = count.next_multiple(10_000)
        reads += count.known_step != before
    assert [mark for mark, _ in noticed] == [10_000 * i for i in range(1, 11)][
        : len(noticed)
    ]
    assert len(noticed) == total // 10_000
    assert all(0 <= total - mark < 111 for mark, total in noticed)
    assert reads < 120
    assert float(count.total) == total


def test_tokens_need_weights() -> None:
    with pytest.raises(RuntimeError, match="training_step returned none: return"):
        quiet(validate_every="1M tokens").fit(Evaluated(), loader(), loader(1))


def test_tokens_of_a_run() -> None:
    module, trainer = Weighted(), quiet(accumulate_grad_batches=4)
    trainer.fit(module, loader(6))
    assert trainer.num_tokens == 24


def test_validation_before_training(tmp_path: Path) -> None:
    """All of it, once, with a row at step 0; a run that resumes has had it."""

    class Rows(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            values.append(
                (trainer.global_step, float(trainer.callback_metrics["val_loss"]))
            )

    values: list[tuple[int, float]] = []
    module = Weighted()
    expected = [quiet().validate(module, loader(3), verbose=False)[0]["val_loss"]]
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    trainer = quiet(Rows(), checkpoint, validate_before_training=True, num_sanity_val_steps=None)  # fmt: skip
    assert trainer.num_sanity_val_steps == 0
    trainer.fit(module, loader(4), loader(3))
    assert [step for step, _ in values] == [0, 4]
    assert values[0][1] == pytest.approx(expected[0])
    values.clear()
    trainer = quiet(Rows(), validate_before_training=True, max_epochs=2)
    trainer.fit(Weighted(), loader(4), loader(3), ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, _ in values] == [8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(validate_every="5"), "validate_every must be an interval"),
        (lambda: Trainer(validate_every="5 cows"), "got '5 cows'"),
        (lambda: Trainer(validate_every="0 steps"), "got '0 steps'"),
        (lambda: Trainer(validate_every="1.5 steps"), "whole number of steps"),
        (lambda: Trainer(validate_every="1.5 epochs"), "whole number of epochs"),
        (
            lambda: Trainer(validate_every="5 steps", val_check_interval=2),
            "takes the place of val_check_interval=2",
        ),
        (
            lambda: Trainer(validate_every="5 steps", check_val_every_n_epoch=2),
            "check_val_every_n_epoch=2: leave these out",
        ),
        (lambda: Trainer(log_every="5 epochs"), 'log_every must be.*"500 steps"'),
        (
            lambda: Trainer(log_every="5 steps", log_every_n_steps=5),
            "log_every and log_every_n_steps=5 set the same",
        ),
        (
            lambda: Trainer(
                reload_dataloaders_every="2 epochs", reload_dataloaders_every_n_epochs=2
            ),
            "reload_dataloaders_every_n_epochs=2 set the same",
        ),
        (
            lambda: ModelCheckpoint(every="5 steps", every_n_epochs=1),
            "every='5 steps' takes the place of",
        ),
        (lambda: ModelCheckpoint(every="0.5 epochs"), "whole number of epochs"),
        (lambda: ModelCheckpoint(every="5 batches"), "every must be an interval"),
    ],
)
def test_intervals_that_are_none_or_two(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_intervals_that_were_numbers() -> None:
    trainer = quiet(log_every="10 steps", reload_dataloaders_every="2 epochs")
    assert trainer.log_every_n_steps == 10
    assert trainer.reload_dataloaders_every_n_epochs == 2
    assert ModelCheckpoint(every="3 epochs").every_n_epochs == 3
    same = ModelCheckpoint(train_time_interval=timedelta(minutes=2))
    assert ModelCheckpoint(every="2 minutes").state_key == same.state_key
    same = ModelCheckpoint(every_n_train_steps=1500)
    assert ModelCheckpoint(every="1.5k steps").state_key == same.state_key
