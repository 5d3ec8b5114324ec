"""A run that is stopped and resumed ends with the weights of one that was not, to the last bit."""

from __future__ import annotations

import json
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric

from loopwright.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from loopwright.framework import (
    CheckpointError,
    CombinedLoader,
    Engine,
    Module,
    Trainer,
    seed_everything,
)
from loopwright.framework.checkpoint.manifest import read_manifest, seal_manifest
from loopwright.framework.checkpoint.serialization import encode
from tests.samples import as_dataset

BATCHES, EPOCHS = 5, 3


class Augmented(Dataset):
    """Samples with random augmentation from all three generators."""

    def __len__(self) -> int:
        return BATCHES * 4 - 1

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.rand(8) + random.random() + float(np.random.rand())
        return noise + torch.arange(8.0) * index / 10


class Stream(IterableDataset):
    """The same, readable from its start only, in an order drawn when it is begun."""

    def __iter__(self):
        samples = Augmented()
        for index in torch.randperm(len(samples)).tolist():
            yield samples[index]


class Stateful:
    """A loader that keeps its own place, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self):
        for index in range(self.place, BATCHES):
            self.place = index + 1
            yield torch.stack([torch.full((8,), float(index)), torch.arange(8.0)])
        self.place = 0

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


class Noisy(Module):
    """Dropout, a step-wise schedule, an epoch-wise one on a monitored value, values and a metric over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 1)
        )
        self.mean_loss = MeanMetric()
        self.seen: list[float] = []
        self.epoch_means: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.sum().item())
        loss = (self.net(batch) - batch.mean()).square().mean()
        self.mean_loss.update(loss)
        self.log("train_loss", loss, on_epoch=True)
        self.log("metric", self.mean_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())

    def on_train_epoch_start(self) -> None:
        torch.rand(3)  # a hook may draw random numbers too

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        warm = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 10)
        )
        return [optimizer], [
            {"scheduler": warm, "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss"},
        ]


class Reacting(Noisy):
    """Schedules that react to values by steps: one found by validation, and the training's own."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        validated, trained = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.9, patience=0
            )
            for _ in range(2)
        )
        return [optimizer], [
            {
                "scheduler": validated,
                "interval": "step",
                "frequency": 2,
                "monitor": "val_loss",
            },
            {"scheduler": trained, "interval": "step", "monitor": "train_loss"},
        ]


def best_path(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    assert callback is not None
    return callback.best_model_path


def states_of(trainer: Trainer) -> dict[str, Any]:
    """States of what the last fit trained with."""
    assert trainer.last_fit is not None
    return trainer.last_fit.states()


def train(
    root: Path,
    loader: Any,
    max_steps: int = -1,
    ckpt_path: str | None = None,
    seed: int = 3,
    callbacks=(),
    kind: type[Noisy] = Noisy,
    **arguments,
) -> tuple[Trainer, Noisy]:
    """One run in fresh objects, as in a new process."""
    seed_everything(seed, verbose=False)
    module = kind()
    validation = [torch.arange(32.0).reshape(4, 8) / 32]
    trainer = Trainer(
        max_epochs=EPOCHS,
        max_steps=max_steps,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": bool(callbacks), **arguments},
    )
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return trainer, module


def flat(state: dict) -> tuple:
    """Nested state with its tensors as lists, to compare."""
    tensors: dict[str, Tensor] = {}
    encoded = encode(state, "", tensors, {})
    return encoded, {name: tensor.tolist() for name, tensor in tensors.items()}


def assert_same(resumed: tuple[Trainer, Noisy], whole: tuple[Trainer, Noisy]) -> None:
    """Equal weights, optimizer states, schedules, logged values, and the same batches at the end."""
    for (name, mine), (_, theirs) in zip(
        resumed[1].state_dict().items(), whole[1].state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert resumed[1].seen == whole[1].seen[len(whole[1].seen) - len(resumed[1].seen) :]
    assert flat(states_of(resumed[0])) == flat(states_of(whole[0]))
    assert (resumed[0].current_epoch, resumed[0].global_step) == (
        whole[0].current_epoch,
        whole[0].global_step,
    )
    assert flat(resumed[0].callback_metrics) == flat(whole[0].callback_metrics)


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "workers": lambda: DataLoader(
        Augmented(), batch_size=4, shuffle=True, num_workers=2
    ),
    "persistent": lambda: DataLoader(
        Augmented(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stateful": Stateful,
    "stream-workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=1),
}


@pytest.mark.parametrize("stop", range(1, BATCHES * EPOCHS))
def test_stopped_after_any_step(tmp_path, stop) -> None:
    """max_steps=k, save, and go on in new objects with other random numbers around."""
    whole = train(tmp_path, LOADERS["shuffled"]())
    cut, _ = train(tmp_path, LOADERS["shuffled"](), max_steps=stop)
    assert cut.global_step == stop
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = train(
        tmp_path, LOADERS["shuffled"](), ckpt_path=str(tmp_path / "cut.ckpt"), seed=99
    )
    assert len(resumed[1].seen) == BATCHES * EPOCHS - stop
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    "kind", ["workers", "persistent", "stream", "stream-workers", "stateful"]
)
@pytest.mark.parametrize("stop", [2, BATCHES, 2 * BATCHES + 3])
def test_stopped_with_every_kind_of_loader(tmp_path, kind, stop) -> None:
    """Random augmentation in workers, and loaders that can only be read from their start."""
    whole = train(tmp_path, LOADERS[kind]())
    cut, _ = train(tmp_path, LOADERS[kind](), max_steps=stop)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    assert_same(
        train(tmp_path, LOADERS[kind](), ckpt_path=str(tmp_path / "cut.ckpt"), seed=99),
        whole,
    )


class Numbered(Dataset):
    """Samples that draw nothing, as torchdata's workers do not go on with their random numbers."""

    def __len__(self) -> int:
        return BATCHES * 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(8.0) * index / 10


class Endless(Stateful):
    """A stream that goes on where it was left, whatever calls itself an epoch."""

    def __iter__(self):
        while True:
            self.place += 1
            yield torch.full((2, 8), float(self.place)) + torch.arange(8.0)


class WithLength(Stateful):
    """As any loader with a length, it is not asked for more batches."""

    def __len__(self) -> int:
        return BATCHES


made: list[StatefulDataLoader] = []


def torchdatas(seed: int, workers: int) -> StatefulDataLoader:
    """A loader whose order depends on when it was made."""
    seed_everything(seed, verbose=False)
    made.append(StatefulDataLoader(Numbered(), 4, shuffle=True, num_workers=workers))
    return made[-1]


@pytest.fixture
def ends_workers():
    """End those of loaders that were left inside an epoch: torchdata would wait for them when they are collected."""
    yield
    while made:
        made.pop()._iterator = None


OWN_STATES: dict[str, Any] = {
    "torchdata": lambda seed: torchdatas(seed, 0),
    "torchdata, workers": lambda seed: torchdatas(seed, 2),
    "endless": lambda seed: Endless(),
    "without length": lambda seed: Stateful(),
    "with length": lambda seed: WithLength(),
}


@pytest.mark.parametrize("kind", OWN_STATES)
@pytest.mark.parametrize("stop", [2, BATCHES, 2 * BATCHES + 3])
def test_loaders_with_a_state_of_their_own(tmp_path, ends_workers, kind, stop) -> None:
    """Inside epochs, at their end, and at their last step: they go on as the whole run's loader did."""
    make = OWN_STATES[kind]
    limit: dict[str, Any] = {"limit_train_batches": BATCHES}
    save = ModelCheckpoint(
        tmp_path / "saved",
        save_top_k=-1,
        every_n_train_steps=1,
        save_on_train_epoch_end=False,
    )
    whole = train(tmp_path, make(3), **limit)
    cut, _ = train(tmp_path, make(3), max_steps=stop, callbacks=[save], **limit)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    for path in (
        tmp_path / "cut.ckpt",
        next((tmp_path / "saved").glob(f"*step={stop}.ckpt")),
    ):
        resumed = train(tmp_path, make(99), ckpt_path=str(path), seed=99, **limit)
        assert len(resumed[1].seen) == BATCHES * EPOCHS - stop
        assert_same(resumed, whole)


@pytest.mark.parametrize("kind", OWN_STATES)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_no_batch_is_lost_to_an_exception(
    tmp_path, ends_workers, kind, accumulate, fails_at
) -> None:
    """The loader has given it, and the step has not been taken: it comes again, as do those of the open window."""
    make, options = (
        OWN_STATES[kind],
        {"limit_train_batches": BATCHES, "accumulate_grad_batches": accumulate},
    )
    whole = train(tmp_path, make(3), **options)

    class Failing(Noisy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if len(self.seen) == fails_at:
                raise ValueError("a mistake")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="a mistake"):
        train(
            tmp_path,
            make(3),
            kind=Failing,
            callbacks=[OnExceptionCheckpoint(tmp_path)],
            **options,
        )
    resumed = train(
        tmp_path,
        make(3),
        ckpt_path=str(tmp_path / "on_exception.ckpt"),
        seed=99,
        **options,
    )
    done = len(whole[1].seen) - len(resumed[1].seen)
    assert fails_at - accumulate < done <= fails_at
    assert resumed[1].seen == pytest.approx(whole[1].seen[done:])


def test_a_run_that_fails_again_and_again(tmp_path, ends_workers) -> None:
    """Resumed, it fails in its first step: what it is to read again does not change."""
    whole = train(tmp_path, torchdatas(3, 0), accumulate_grad_batches=4)

    class Failing(Noisy):
        fails_at = 6

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if len(self.seen) == self.fails_at:
                raise ValueError("a mistake")
            return super().training_step(batch, batch_idx)

    path = None
    for fails_at in (8, 0, 0):
        Failing.fails_at = fails_at
        with pytest.raises(ValueError, match="a mistake"):
            train(
                tmp_path, torchdatas(3 if path is None else 9, 0), kind=Failing, ckpt_path=path,
                callbacks=[OnExceptionCheckpoint(tmp_path)], accumulate_grad_batches=4,
            )  # fmt: skip
        path = str(tmp_path / "on_exception.ckpt")
    resumed = train(
        tmp_path, torchdatas(9, 0), ckpt_path=path, accumulate_grad_batches=4
    )
    assert resumed[1].seen == whole[1].seen[5:]


def test_a_finished_run_may_be_resumed_saved_and_extended(
    tmp_path, ends_workers
) -> None:
    whole = train(tmp_path, torchdatas(3, 0))
    cut, _ = train(tmp_path, torchdatas(3, 0), max_steps=BATCHES)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    done, _ = train(
        tmp_path,
        torchdatas(9, 0),
        max_steps=BATCHES,
        ckpt_path=str(tmp_path / "cut.ckpt"),
    )
    done.save_checkpoint(tmp_path / "again.ckpt")
    assert_same(
        train(tmp_path, torchdatas(8, 0), ckpt_path=str(tmp_path / "again.ckpt")), whole
    )


def test_a_loader_that_has_changed(tmp_path, ends_workers, caplog) -> None:
    """At an epoch's end it begins as a new one does, and says so; inside an epoch nobody knows where to go on."""
    for steps in (BATCHES, 2):
        cut, _ = train(tmp_path, torchdatas(3, 2), max_steps=steps)
        cut.save_checkpoint(tmp_path / f"{steps}.ckpt")
    _, module = train(
        tmp_path, torchdatas(3, 0), ckpt_path=str(tmp_path / f"{BATCHES}.ckpt")
    )
    assert len(module.seen) == 2 * BATCHES
    assert "is not the one that the checkpoint was saved with" in caplog.text
    with pytest.raises(
        CheckpointError, match="resume with the one that the checkpoint was saved with"
    ):
        train(tmp_path, torchdatas(3, 0), ckpt_path=str(tmp_path / "2.ckpt"))
    both = CombinedLoader([torchdatas(3, 0), torchdatas(4, 0)], "sequential")
    cut, _ = train(tmp_path, both, max_steps=2)
    cut.save_checkpoint(tmp_path / "both.ckpt")
    with pytest.raises(CheckpointError, match="combined in mode 'sequential'"):
        train(tmp_path, both, ckpt_path=str(tmp_path / "both.ckpt"))


def test_augmentation_does_not_depend_on_the_number_of_workers(tmp_path) -> None:
    """A run cut with two workers and resumed with one equals the whole one."""
    whole = train(tmp_path, LOADERS["workers"]())
    cut, _ = train(tmp_path, LOADERS["workers"](), max_steps=7)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    one = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1)
    assert_same(
        train(tmp_path, one, ckpt_path=str(tmp_path / "cut.ckpt"), seed=99), whole
    )


def test_from_each_checkpoint_that_a_run_saved(tmp_path) -> None:
    """Saved inside hooks: after steps, after validations in the middle of an epoch, at its end."""
    options: dict[str, Any] = {"val_check_interval": 2, "accumulate_grad_batches": 2}
    save = ModelCheckpoint(
        tmp_path / "saved", save_top_k=-1, every_n_train_steps=1, monitor=None
    )
    ends = ModelCheckpoint(
        tmp_path / "ends", save_top_k=-1, every_n_epochs=1, monitor=None
    )
    whole = train(tmp_path, LOADERS["shuffled"](), callbacks=[save, ends], **options)
    checkpoints = sorted((tmp_path / "saved").glob("*.ckpt")) + sorted(
        (tmp_path / "ends").glob("*.ckpt")
    )
    assert len(checkpoints) >= 3 * EPOCHS
    for path in checkpoints:
        resumed = train(
            tmp_path, LOADERS["shuffled"](), ckpt_path=str(path), seed=99, **options
        )
        assert_same(resumed, whole)


def test_schedulers_that_react_by_steps(tmp_path) -> None:
    """A checkpoint of the same step knows of them, and one from before a validation is followed by it."""
    options: dict = {"val_check_interval": 2, "kind": Reacting}
    save = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1)
    by_value = ModelCheckpoint(
        tmp_path / "by value", "val_loss", save_top_k=-1, save_on_train_epoch_end=False
    )
    whole = train(
        tmp_path, LOADERS["shuffled"](), callbacks=[save, by_value], **options
    )
    assert whole[0].optimizers[0].param_groups[0]["lr"] < 0.009
    checkpoints = [
        *(tmp_path / "saved").glob("*.ckpt"),
        *(tmp_path / "by value").glob("*.ckpt"),
    ]
    assert len(checkpoints) > BATCHES * EPOCHS
    for path in checkpoints:
        assert_same(
            train(
                tmp_path, LOADERS["shuffled"](), ckpt_path=str(path), seed=99, **options
            ),
            whole,
        )


def test_schedulers_that_react_by_steps_need_no_validation(tmp_path) -> None:
    """Where a validation is due and there is nothing to validate on; and where it is due in other epochs only."""

    class Trained(Noisy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.5, patience=0, mode="max"
            )
            by_steps = {
                "scheduler": plateau,
                "interval": "step",
                "monitor": "train_loss",
                "frequency": BATCHES,
            }
            return [optimizer], [by_steps]

    class Without(Trained):
        def val_dataloader(self):
            return None

    def last_epochs(kind: type[Noisy], **arguments: Any) -> list[int]:
        seed_everything(3, verbose=False)
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = Trainer(
            max_epochs=EPOCHS, enable_checkpointing=False, **quiet, **arguments
        )
        trainer.fit(
            kind(),
            LOADERS["shuffled"](),
            None if kind is Without else [torch.ones(2, 8)],
        )
        return trainer.lr_scheduler_configs[0].scheduler.last_epoch

    assert (
        last_epochs(Without)
        == last_epochs(Trained)
        == last_epochs(Trained, check_val_every_n_epoch=2)
        == EPOCHS
    )
    save = ModelCheckpoint(
        tmp_path, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    options: dict[str, Any] = {"check_val_every_n_epoch": 2, "kind": Trained}
    whole = train(tmp_path, LOADERS["shuffled"](), callbacks=[save], **options)
    path = str(tmp_path / f"epoch=0-step={BATCHES}.ckpt")
    assert_same(
        train(tmp_path, LOADERS["shuffled"](), ckpt_path=path, seed=99, **options),
        whole,
    )


def test_fit_again_goes_on_inside_the_epoch(tmp_path) -> None:
    """Counters, data order and the values of the unfinished epoch go on in a second call of fit."""
    module = Noisy()
    trainer = Trainer(
        max_epochs=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = [torch.randn(2, 8) for _ in range(BATCHES)]
    losses: list[float] = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(
        outputs["loss"].item()
    )
    trainer.fit(module, loader, loader[:1])
    assert (trainer.current_epoch, trainer.batch_idx, trainer.global_step) == (0, 3, 3)
    trainer.max_steps = -1
    trainer.fit(module, loader, loader[:1])
    assert (trainer.current_epoch, trainer.global_step) == (1, BATCHES)
    assert module.seen == [batch.sum().item() for batch in loader]
    assert trainer.callback_metrics["train_loss_epoch"].item() == pytest.approx(
        sum(losses) / BATCHES
    )
    assert trainer.callback_metrics["metric"].item() == pytest.approx(
        sum(losses) / BATCHES
    )


def test_loss_scale_goes_on(tmp_path) -> None:
    """Under 16-mixed the GradScaler's scale and growth are part of the state."""
    whole = train(tmp_path, LOADERS["shuffled"](), precision="16-mixed")
    cut, _ = train(tmp_path, LOADERS["shuffled"](), max_steps=8, precision="16-mixed")
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    path = str(tmp_path / "cut.ckpt")
    resumed = train(
        tmp_path, LOADERS["shuffled"](), ckpt_path=path, seed=99, precision="16-mixed"
    )
    assert_same(resumed, whole)
    scalers: list[Any] = [run.engine.scaler for run, _ in (resumed, whole)]
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_early_stopping_keeps_its_patience(tmp_path) -> None:
    """A resumed run stops in the epoch in which the whole one stopped."""

    def stopper() -> EarlyStopping:
        return EarlyStopping(
            "val_loss", patience=1, mode="max", min_delta=100.0
        )  # never improves after the first

    whole = train(tmp_path, LOADERS["shuffled"](), callbacks=[stopper()])
    assert whole[0].current_epoch == 2
    cut, _ = train(
        tmp_path, LOADERS["shuffled"](), max_steps=BATCHES + 1, callbacks=[stopper()]
    )
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = train(
        tmp_path,
        LOADERS["shuffled"](),
        ckpt_path=str(tmp_path / "cut.ckpt"),
        seed=99,
        callbacks=[stopper()],
    )
    assert_same(resumed, whole)


def test_last_finds_the_newest_and_passes_over_a_damaged_one(tmp_path, caplog) -> None:
    """ckpt_path="last" starts from nothing, from the newest checkpoint, or from the one before a damaged one."""
    folder = tmp_path / "checkpoints"

    def save() -> ModelCheckpoint:
        return ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)

    whole = train(tmp_path / "whole", LOADERS["shuffled"]())
    fresh = train(tmp_path, LOADERS["shuffled"](), ckpt_path="last", callbacks=[save()])
    assert_same(fresh, whole)
    newest = max(
        folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2])
    )
    weights = newest / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = train(
        tmp_path, LOADERS["shuffled"](), ckpt_path="last", seed=99, callbacks=[save()]
    )
    assert len(resumed[1].seen) == BATCHES  # one epoch again
    assert_same(resumed, whole)
    assert str(newest) in caplog.text


def test_last_passes_over_what_holds_no_run(tmp_path) -> None:
    """Weights alone, though they are newer; a clock that was set back changes nothing about what is newer."""
    folder = tmp_path / "kept"

    def fit(steps: int, **arguments: Any) -> tuple[Trainer, Noisy]:
        save = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)
        run = train(
            tmp_path,
            LOADERS["shuffled"](),
            max_steps=steps,
            callbacks=[save],
            **arguments,
        )
        run[0].save_checkpoint(folder / f"weights-{steps}.ckpt", weights_only=True)
        return run

    fit(2)
    before = time.time()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: before - 3600)
        assert len(fit(4, ckpt_path="last")[1].seen) == 2
    assert len(fit(5, ckpt_path="last")[1].seen) == 1
    for path in folder.glob("epoch=*"):
        shutil.rmtree(path)
    with pytest.raises(
        CheckpointError, match=r"none of 3 checkpoints, such as .*, holds a run"
    ):
        fit(6, ckpt_path="last")


def test_a_manifest_that_cannot_be_read_is_left_out(tmp_path, caplog) -> None:
    save = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1)
    train(tmp_path, LOADERS["shuffled"](), max_steps=3, callbacks=[save])
    manifest = tmp_path / "kept" / "epoch=0-step=3.ckpt" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    save = ModelCheckpoint(tmp_path / "kept")
    resumed = train(
        tmp_path, LOADERS["shuffled"](), max_steps=4, callbacks=[save], ckpt_path="last"
    )
    assert len(resumed[1].seen) == 2
    assert "epoch=0-step=3.ckpt' is no complete checkpoint" in caplog.text


def damaged(path: Path, file: str, keys: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` where ``keys`` lead to in a JSON file of a checkpoint; the checksums know of it."""
    body = read_manifest(str(path))
    content = (
        {**body} if file == "manifest.json" else json.loads((path / file).read_text())
    )
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    if value is ...:
        del place[keys[-1]]
    if file == "manifest.json":
        body = content
    else:
        altered = json.dumps(content).encode()
        (path / file).write_bytes(altered)
        body["files"][file] = {"size": len(altered), "crc32": zlib.crc32(altered)}
    (path / "manifest.json").write_bytes(seal_manifest(body))


STATE, LOGGED, LOADER = ("run", "state"), ("run", "logged", 0), ("loader_states", 0, 0)
STATES_OF_ANOTHER_SHAPE = [
    (("run",), 3), (("run",), None), (STATE, ...), (STATE, []), ((*STATE, "epoch"), float("nan")),
    ((*STATE, "epoch"), -5), ((*STATE, "epoch"), ...), ((*STATE, "global_step"), "many"),
    ((*STATE, "batch_idx"), True), ((*STATE, "validated"), 1.5), ((*STATE, "epoch_done"), 1),
    ((*STATE, "seed"), float("inf")), ((*STATE, "part"), "all"), ((*STATE, "part"), {"first": 1}),
    (("run", "logged"), [3]), ((*LOGGED, "metrics"), ...), ((*LOGGED, "metrics", "train", 0, "reduction"), ...),
    ((*LOGGED, "metrics", "results"), 7), ((*LOGGED, "metric_states"), "none"),
    ((*LOGGED, "metric_states", "mean_loss", "state"), ...), (("loader_states",), [3]), ((*LOADER, "loader"), ...),
    ((*LOADER, "cursor"), {"epoch": "x"}), ((*LOADER, "cursor"), "far"), (("run", "saved_by"), ...),
    (("callbacks",), [1]), (("loggers",), "csv"),
    (("optimizer_states",), "x"), (("lr_schedulers",), {"a": 1}), (("global_step",), float("nan")),
]  # fmt: skip
ELSEWHERE_OF_ANOTHER_SHAPE = [
    ("rng/rank-0.json", ("python",), "x"), ("rng/rank-0.json", ("torch",), 3),
    ("rng/rank-0.json", ("numpy",), {"$tuple": ["MT19937"]}), ("manifest.json", ("world_size",), ...),
]  # fmt: skip


def test_a_state_of_another_shape_is_damage(tmp_path, caplog) -> None:
    """Named before training, and passed over by "last": a checksum that is right does not make its content so."""
    kept = tmp_path / "kept"
    for steps in (1, 2):
        save = ModelCheckpoint(
            kept, filename="{step}", save_top_k=-1, every_n_train_steps=1
        )
        ckpt_path = "last" if steps == 2 else None
        train(
            tmp_path,
            LOADERS["shuffled"](),
            max_steps=steps,
            callbacks=[save],
            ckpt_path=ckpt_path,
        )
    newest, engine = kept / "step=2.ckpt", Engine(accelerator="cpu")
    shutil.copytree(newest, tmp_path / "whole.ckpt")
    for file, keys, value in [
        ("state.json", *case) for case in STATES_OF_ANOTHER_SHAPE
    ] + ELSEWHERE_OF_ANOTHER_SHAPE:
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "whole.ckpt", newest)
        damaged(newest, file, keys, value)
        caplog.clear()
        with pytest.raises(
            CheckpointError,
            match=r"step=2\.ckpt' is damaged: its state is not as it should be",
        ):
            train(tmp_path, LOADERS["shuffled"](), max_steps=3, ckpt_path=str(newest))
        with pytest.raises(
            CheckpointError,
            match=r"step=2\.ckpt' is damaged: its state is not as it should be",
        ):
            engine.load_state(newest)
        assert Noisy.load_from_checkpoint(newest).net[0].weight.shape == (
            16,
            8,
        )  # what is asked for is whole
        save = ModelCheckpoint(kept, save_top_k=0, save_last=False)
        resumed = train(
            tmp_path,
            LOADERS["shuffled"](),
            max_steps=2,
            callbacks=[save],
            ckpt_path="last",
        )
        assert len(resumed[1].seen) == 1, (keys, value)
        assert "trying the one before" in caplog.text
    # A run goes on without those that it does not take up.
    damaged(tmp_path / "whole.ckpt", "state.json", ("hyper_parameters",), "x")
    assert (
        len(
            train(
                tmp_path,
                LOADERS["shuffled"](),
                max_steps=3,
                ckpt_path=tmp_path / "whole.ckpt",
            )[1].seen
        )
        == 1
    )


def test_a_replaced_checkpoint_is_never_out_of_reach(tmp_path, monkeypatch) -> None:
    """Killed between moving the old one aside and the new one into place, the old one is found."""
    import os

    path = tmp_path / "same.ckpt"
    trainer, _ = train(tmp_path, LOADERS["shuffled"](), max_steps=2)
    trainer.save_checkpoint(path)
    moves: list[str] = []

    def killed(source, target) -> None:
        moves.append(target)
        if len(moves) == 2:
            os._exit(9)
        os.replace(source, target)

    monkeypatch.setattr("os.rename", killed)
    if (child := os.fork()) == 0:
        trainer.save_checkpoint(path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert not path.exists()
    whole = train(tmp_path, LOADERS["shuffled"]())
    assert_same(
        train(tmp_path, LOADERS["shuffled"](), ckpt_path=str(path), seed=99), whole
    )
    trainer.save_checkpoint(path)
    assert path.exists()


class Planned(Noisy):
    """Asks for the number of steps while optimizers are made, as a OneCycleLR does."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == BATCHES * EPOCHS
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        }


def fit_planned(
    root: Path, loader, module: Noisy, seed: int = 3, ckpt_path=None, **arguments
) -> Trainer:
    seed_everything(seed, verbose=False)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=EPOCHS, default_root_dir=root, **quiet, **arguments)
    trainer.fit(module, loader, [torch.ones(2, 8)], ckpt_path=ckpt_path)
    return trainer


def test_data_order_when_the_loader_is_made_early(tmp_path) -> None:
    """estimated_stepping_batches makes the training loader before the optimizers: with the checkpoint's seed."""
    whole, resumed = Planned(), Planned()
    save = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=4)
    fit_planned(tmp_path, LOADERS["shuffled"](), whole, callbacks=save)
    path = tmp_path / "saved" / "epoch=1-step=8.ckpt"
    fit_planned(
        tmp_path,
        LOADERS["shuffled"](),
        resumed,
        seed=99,
        ckpt_path=path,
        enable_checkpointing=False,
    )
    assert resumed.seen == whole.seen[8:]


def test_epoch_wise_schedulers_step_once_where_the_length_is_unknown(tmp_path) -> None:
    """A checkpoint of the last validation of an epoch whose end was only found by reading."""

    class Halving(Noisy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return {
                "optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
            }

    save = ModelCheckpoint(
        tmp_path / "saved", save_top_k=-1, save_on_train_epoch_end=False
    )
    whole, resumed = Halving(), Halving()
    expected = fit_planned(tmp_path, LOADERS["stream"](), whole, callbacks=save)
    path = tmp_path / "saved" / f"epoch=0-step={BATCHES}.ckpt"
    found = fit_planned(
        tmp_path,
        LOADERS["stream"](),
        resumed,
        seed=99,
        ckpt_path=path,
        enable_checkpointing=False,
    )
    assert (
        found.optimizers[0].param_groups[0]["lr"]
        == expected.optimizers[0].param_groups[0]["lr"]
    )
    assert resumed.seen == whole.seen[BATCHES:]


def test_persistent_validation_workers_take_no_number_from_the_training(
    tmp_path,
) -> None:
    """They draw their seed when they start, in the first validation of a process."""

    def validation() -> DataLoader:
        return DataLoader(
            TensorDataset(torch.ones(4, 8)),
            2,
            num_workers=1,
            persistent_workers=True,
            collate_fn=first,
        )

    def run(**arguments) -> Noisy:
        module = Noisy()
        seed = arguments.pop("seed", 3)
        seed_everything(seed, verbose=False)
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        path = arguments.pop("ckpt_path", None)
        trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, **quiet, **arguments)
        trainer.fit(module, LOADERS["shuffled"](), validation(), ckpt_path=path)
        return module

    whole = run(callbacks=ModelCheckpoint(tmp_path, save_top_k=-1))
    resumed = run(
        seed=99,
        ckpt_path=tmp_path / f"epoch=0-step={BATCHES}.ckpt",
        enable_checkpointing=False,
    )
    for (name, mine), theirs in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


VALIDATION = DataLoader(as_dataset(torch.ones(4, 8)), 2)


class Rated(Noisy):
    """Has hyperparameters, one of which its optimizer takes."""

    def __init__(
        self, lr: float = 0.1, depth: int = 1, bound: float = float("nan")
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def test_other_hyperparameters_are_named_and_which_count(tmp_path, caplog) -> None:
    """Once, in one line; nothing is said where they are the same."""

    def fit(module: Module, epochs: int, resume: bool) -> Trainer:
        caplog.clear()
        trainer = Trainer(max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
                          callbacks=[ModelCheckpoint(tmp_path)])  # fmt: skip
        trainer.fit(
            module,
            LOADERS["shuffled"](),
            VALIDATION,
            ckpt_path="last" if resume else None,
        )
        return trainer

    fit(Rated(), 1, False)
    fit(Rated(), 2, True)
    assert "other hyperparameters" not in caplog.text
    trainer = fit(Rated(lr=0.5), 3, True)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    [message] = [
        record.getMessage()
        for record in caplog.records
        if "other hyperparameters" in record.getMessage()
    ]
    assert "lr was 0.1 and is 0.5" in message
    assert "go on with the checkpoint's (lr of parameter group 0 = 0.1)" in message
    assert "depth" not in message
    assert "bound" not in message, "a not-a-number is no other one"


class Renamed(Rated):
    """The same under another name."""


def test_last_says_what_it_leaves_out(tmp_path, caplog) -> None:
    """In the default folder, where only checkpoints of the module's class count."""

    def fit(module: Module, epochs: int) -> Trainer:
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, enable_progress_bar=False,
                          enable_model_summary=False, logger=False)  # fmt: skip
        trainer.fit(module, LOADERS["shuffled"](), VALIDATION, ckpt_path="last")
        return trainer

    fit(Rated(), 1)
    assert "left out" not in caplog.text
    trainer = fit(Renamed(), 2)
    assert trainer.ckpt_path is None
    assert "1 checkpoints, such as" in caplog.text
    assert (
        "they are of Rated, and this module is a Renamed; if its class was renamed, pass the path"
        in caplog.text
    )


@pytest.mark.parametrize("given", [True, False], ids=["folder given", "default folder"])
def test_best_of_an_earlier_program(tmp_path, given, caplog) -> None:
    """Its pointer lies in the folder: of two runs there, that of the last one; without a monitor, the newest."""

    def make(**arguments: Any) -> Trainer:
        folder = tmp_path if given else None
        saves = ModelCheckpoint(folder, monitor="val_loss", mode="max", save_top_k=3)
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(
            default_root_dir=tmp_path, callbacks=[saves], **{**quiet, **arguments}
        )

    with pytest.raises(
        ValueError, match=r'ckpt_path="best": no checkpoint was saved as best yet'
    ):
        make().validate(Rated(), VALIDATION, ckpt_path="best", verbose=False)
    make(max_epochs=2).fit(Rated(), LOADERS["shuffled"](), VALIDATION)
    trained = make(max_epochs=2)
    trained.fit(Rated(), LOADERS["shuffled"](), VALIDATION)
    expected = best_path(trained)
    assert "-v1" in expected
    caplog.set_level("INFO", "loopwright")
    for run in ("validate", "fit"):
        again = make(max_epochs=2)
        getattr(again, run)(
            Rated(),
            VALIDATION if run == "validate" else LOADERS["shuffled"](),
            ckpt_path="best",
        )
        assert again.ckpt_path == expected
    assert "an earlier run left" in caplog.text
    with pytest.raises(ValueError, match="fast_dev_run saves none"):
        make(fast_dev_run=True).validate(
            Rated(), VALIDATION, ckpt_path="best", verbose=False
        )
    plain = Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
                    callbacks=[ModelCheckpoint(tmp_path if given else None, save_last=True)])  # fmt: skip
    plain.validate(Rated(), VALIDATION, ckpt_path="best", verbose=False)
    assert plain.ckpt_path == expected


@pytest.mark.parametrize("mode", ["max", "min"])
def test_best_of_an_earlier_program_by_its_own_name(tmp_path, mode) -> None:
    """Checkpoints that are called "best" themselves are no pointers; nor are files of other programs."""
    saves = {
        "dirpath": tmp_path,
        "filename": "best",
        "monitor": "val_loss",
        "mode": mode,
        "save_last": True,
    }
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trained = Trainer(max_epochs=3, callbacks=[ModelCheckpoint(**saves)], **quiet)
    trained.fit(Rated(), LOADERS["shuffled"](), VALIDATION)
    torch.save({"state_dict": {}}, tmp_path / "best-of-lightning.ckpt")
    again = Trainer(callbacks=[ModelCheckpoint(**saves)], **quiet)
    again.validate(Rated(), VALIDATION, ckpt_path="best", verbose=False)
    assert again.ckpt_path == best_path(trained)


def first(samples: list) -> Tensor:
    """A collate function: the first tensors of the samples, stacked."""
    return torch.stack([sample[0] for sample in samples])


def test_fit_again_keeps_moments_and_schedules(tmp_path) -> None:
    """Two calls of fit end where one ends; another learning rate begins anew, another module at the beginning."""

    def run(*epochs: int, lr: float | None = None) -> tuple[Trainer, Noisy]:
        seed_everything(3, verbose=False)
        module = Noisy()
        trainer = Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = [
            torch.randn(2, 8, generator=torch.Generator().manual_seed(i))
            for i in range(BATCHES)
        ]
        for count in epochs:
            trainer.max_epochs = count
            trainer.fit(module, batches, batches[:1])
        return trainer, module

    (once, whole), (twice, parts) = run(3), run(1, 3)
    assert flat(states_of(once)) == flat(states_of(twice))
    assert torch.equal(next(whole.net.parameters()), next(parts.net.parameters()))
    other = Noisy()
    twice.fit(other, [torch.randn(2, 8)], [torch.randn(2, 8)])
    assert (len(other.seen), twice.current_epoch) == (3, 3)


class Unfreeze(Callback):
    """Trains the backbone from the second epoch on, with its own rate, and knows in a resumed run that it has begun."""

    def __init__(self) -> None:
        self.added = False

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.added = state_dict["added"]

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        if self.added:
            self.add(trainer, module)

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            self.add(trainer, module)

    def add(self, trainer: Trainer, module: Any) -> None:
        self.added = True
        trainer.optimizers[0].add_param_group(
            {"params": [*module.net[0].parameters()], "lr": 0.001}
        )


class Head(Noisy):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net[1:].parameters(), lr=0.01)


@pytest.mark.parametrize("stop", [4, 7, 12])
def test_parameter_groups_that_a_callback_adds(tmp_path, stop) -> None:
    """It adds them again in on_fit_start, before the optimizer's state is loaded."""
    loader = DataLoader(Augmented(), 4, shuffle=True)
    whole = train(
        tmp_path / "whole",
        loader,
        callbacks=[Unfreeze()],
        kind=Head,
        enable_checkpointing=False,
    )
    cut, _ = train(
        tmp_path / "cut",
        loader,
        stop,
        callbacks=[Unfreeze()],
        kind=Head,
        enable_checkpointing=False,
    )
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    path = str(tmp_path / "cut.ckpt")
    resumed = train(
        tmp_path,
        loader,
        ckpt_path=path,
        seed=9,
        callbacks=[Unfreeze()],
        kind=Head,
        enable_checkpointing=False,
    )
    assert_same(resumed, whole)
    assert [group["lr"] for group in resumed[0].optimizers[0].param_groups] == [
        0.01,
        0.001,
    ]


def test_parameter_groups_that_a_callback_adds_in_a_fit_that_goes_on(tmp_path) -> None:
    """Called twice, fit goes on with the moments of both groups."""
    loader = DataLoader(Augmented(), 4, shuffle=True)
    whole = train(
        tmp_path / "whole",
        loader,
        callbacks=[Unfreeze()],
        kind=Head,
        enable_checkpointing=False,
    )
    trainer, module = train(
        tmp_path / "twice",
        loader,
        10,
        callbacks=[Unfreeze()],
        kind=Head,
        enable_checkpointing=False,
    )
    trainer.max_steps = -1
    trainer.fit(module, loader, DataLoader(Augmented(), 4))
    assert trainer.global_step == whole[0].global_step
    assert len(trainer.optimizers[0].param_groups) == 2


OPTIMIZERS = {
    "SGD": lambda own: torch.optim.SGD(own, 0.1, momentum=0.9),
    "Adam": lambda own: torch.optim.Adam(own, 0.1),
    "AdamW": lambda own: torch.optim.AdamW(own, 0.1),
    "RMSprop": lambda own: torch.optim.RMSprop(own, 0.1),
}


@pytest.mark.parametrize("before", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("after", OPTIMIZERS)
def test_resuming_with_another_kind_of_optimizer(
    before: str, after: str, tmp_path, caplog
) -> None:
    """It is an error that names both, or a line where one can go on with the other's state."""

    def fit(kind: str, epochs: int, path: str | None) -> None:
        module = Rated()
        module.configure_optimizers = lambda: OPTIMIZERS[kind](module.parameters())
        trainer = Trainer(max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
                          callbacks=[ModelCheckpoint(tmp_path)])  # fmt: skip
        trainer.fit(module, LOADERS["shuffled"](), VALIDATION, ckpt_path=path)

    fit(before, 1, None)
    if after == before:
        fit(after, 2, "last")
        assert "other optimizers" not in caplog.text
    elif (before, after) == ("Adam", "AdamW"):
        fit(after, 2, "last")
        assert "whose options stay: its Adam is now a AdamW" in caplog.text
    else:
        with pytest.raises(
            CheckpointError,
            match=f"its {before} is now a {after}, which cannot take its state",
        ):
            fit(after, 2, "last")
