"""Averages of weights: as computed by hand, beside what is trained in every checkpoint, and never in its place."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
)
from loopwright.framework import CheckpointError, Module, export, isolated_rng
from loopwright.framework.checkpoint.reader import load_checkpoint
from tests.framework.models import ended, in_a_child, quiet

DECAY, BATCHES = 0.8, 6


class Net(Module):
    """Notes the weights that evaluations run on; its two last layers are one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        tied = nn.Linear(5, 5)
        self.net = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), tied, nn.Tanh(), tied
        )
        self.evaluated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(weights_of(self))
        self.log("val_loss", self.net(batch[0]).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(weights_of(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Watch(Callback):
    """Notes the weights that are trained, and torch's average of them, after each optimizer step."""

    def __init__(self, every: int = 1, **options: Any) -> None:
        self.every, self.options = every, options
        self.steps: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []
        self.average: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.steps):
            return
        self.average = self.average or AveragedModel(
            pl_module.net, use_buffers=True, **self.options
        )
        if (trainer.global_step - 1) % self.every == 0:
            self.average.update_parameters(pl_module.net)
        self.steps.append(weights_of(pl_module))
        self.averages.append(
            {f"net.{n}": t.clone() for n, t in self.average.module.state_dict().items()}
        )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


def data(**options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4 * BATCHES, 3, generator=generator)
    return DataLoader(TensorDataset(samples), batch_size=4, **options)


def ema(**options: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(**{"decay": DECAY, **options})


def torchs(**options: Any) -> Watch:
    return Watch(multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


# What the average is.


@pytest.mark.parametrize(
    ("average", "watch"),
    [
        (ema, torchs),
        (WeightAveraging, Watch),
        (lambda: ema(update_every_n_steps=2), lambda: torchs(every=2)),
        (
            lambda: WeightAveraging(avg_fn=lambda a, w, n: a + (w - a) / (n + 3)),
            lambda: Watch(avg_fn=lambda a, w, n: a + (w - a) / (n + 3)),
        ),
    ],
)
def test_it_is_what_torch_averages(average: Any, watch: Any) -> None:
    """Bit by bit for an EMA, buffers and shared weights too, and in windows; the module has it after the fit."""
    module, watch = Net(), watch()
    trainer = quiet(average(), watch, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, data())
    torch.testing.assert_close(weights_of(module), watch.averages[-1])
    if watch.options.keys() == {"multi_avg_fn"}:
        assert equal(weights_of(module), watch.averages[-1])


def test_it_is_lightnings_after_the_same_run() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging as Lightnings

    class Same(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            self.evaluated: list[dict[str, Tensor]] = []

        training_step, validation_step = Net.training_step, Net.validation_step
        configure_optimizers = Net.configure_optimizers

    modules: list[Any] = [Net(), Same()]
    trainers = [
        quiet(ema(use_buffers=False, update_starting_at_step=3), max_epochs=2),
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=Lightnings(
                decay=DECAY, use_buffers=False, update_starting_at_step=3
            ),
        ),
    ]
    for module, trainer in zip(modules, trainers, strict=True):
        torch.manual_seed(0)
        trainer.fit(module, data(), data())
    torch.testing.assert_close(weights_of(modules[0]), weights_of(modules[1]))
    torch.testing.assert_close(modules[0].evaluated[-1], modules[1].evaluated[-1])


def test_it_is_kept_in_full_precision() -> None:
    """In bfloat16, a thousandth of what a step changes would be rounded away."""
    module, average = Net(), ema(decay=0.999)
    quiet(average, precision="bf16-true", max_epochs=3).fit(module, data())
    assert module.net[0].weight.dtype == torch.bfloat16
    assert average.weight_set.tensors["net.0.weight"].dtype == torch.float32


def test_what_is_frozen_joins_when_it_is_trained() -> None:
    class Unfreezing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch == 1)

    module, average, names = Unfreezing(), ema(), []

    class Look(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            names.append("net.0.weight" in average.weight_set.tensors)

    quiet(average, Look(), max_epochs=2).fit(module, data())
    assert names == [False, True]


# What runs on it.


def test_evaluations_run_on_it_and_training_does_not() -> None:
    module, watch, average = Net(), torchs(), ema()
    trainer = quiet(average, watch, max_epochs=2, val_check_interval=3)
    trainer.fit(module, data(), data())
    by_validation = module.evaluated[::BATCHES]
    expected = [watch.averages[i] for i in (2, 5, 8, 11)]
    assert all(itertools.starmap(equal, zip(by_validation, expected, strict=True)))

    plain, plain_watch = Net(), torchs()
    quiet(plain_watch, max_epochs=2, val_check_interval=3).fit(plain, data(), data())
    assert all(
        itertools.starmap(equal, zip(watch.steps, plain_watch.steps, strict=True))
    )
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        module.evaluated.clear()
        evaluate(module, data())
        assert equal(module.evaluated[0], watch.averages[-1])


def test_evaluations_need_not_run_on_it() -> None:
    module, watch = Net(), torchs()
    quiet(ema(evaluate=False), watch, val_check_interval=3).fit(module, data(), data())
    assert equal(module.evaluated[-1], watch.steps[-1])
    assert equal(weights_of(module), watch.averages[-1])


def test_there_is_none_before_the_first_update() -> None:
    """Lightning puts the weights of the beginning into the module, and the training is lost."""
    module, watch = Net(), torchs()
    quiet(ema(update_starting_at_step=100), watch).fit(module, data(), data())
    assert equal(module.evaluated[0], watch.steps[-1])
    assert equal(weights_of(module), watch.steps[-1])


def test_the_average_of_a_checkpoint_is_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch, path = torchs(), tmp_path / "a.ckpt"
    trainer = quiet(ema(), watch)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(path)
    module = Net()
    quiet(ema()).test(module, data(), ckpt_path=path)
    assert equal(module.evaluated[0], watch.averages[-1])
    quiet().test(module, data(), ckpt_path=path)
    assert equal(module.evaluated[-1], watch.steps[-1])
    quiet(ema(name="other")).test(module, data(), ckpt_path=path)
    assert "holds no weights 'other'" in caplog.text


# What is saved.


class SaveInside(Callback):
    """Saves at one moment of each kind, with the average in the module or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Any, moment: str) -> None:
        for save_format in ("folder", "file"):
            path = self.folder / f"{moment}-{save_format}-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, save_format=save_format)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.batch_idx == 3:
            self.save(trainer, "window" if trainer.window_is_open else "batch")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validating")

    def on_validation_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validated")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "after")

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "end")


def test_every_save_holds_both_and_resumes_exactly(tmp_path: Path) -> None:
    module, watch = Net(), torchs()
    trainer = quiet(
        ema(),
        watch,
        SaveInside(tmp_path),
        max_epochs=2,
        val_check_interval=4,
        accumulate_grad_batches=2,
        limit_val_batches=1,
    )
    trainer.fit(module, data(shuffle=True), data())
    trainer.save_checkpoint(tmp_path / f"ended-folder-{trainer.global_step}.ckpt")
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len({path.name.split("-")[0] for path in paths}) == 6
    for path in paths:
        step = int(path.stem.rpartition("-")[2])
        saved = load_checkpoint(str(path))
        own, expected = saved["state_dict"], watch.steps[step - 1]
        if path.name.startswith("window"):
            # Its batches have changed the statistics of batch norms, and nothing else.
            own, expected = (
                {n: s[n] for n in s if "net.1" not in n} for s in (own, expected)
            )
        assert equal(own, expected), path
        assert equal(saved["weight_sets"]["ema"], watch.averages[step - 1]), path
    for path in [path for path in paths if "window" not in path.name][::4]:
        again = Net()
        resumed = quiet(
            ema(), max_epochs=2, accumulate_grad_batches=2, val_check_interval=4,
            limit_val_batches=1,
        )  # fmt: skip
        resumed.fit(again, data(shuffle=True), data(), ckpt_path=path)
        assert equal(weights_of(again), watch.averages[-1]), path


def test_an_average_that_a_resumed_run_adds_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has had no update yet is no new one."""
    for callbacks in ([], [ema(update_starting_at_step=99)]):
        trainer = quiet(*callbacks, max_epochs=1)
        trainer.fit(Net(), data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        caplog.clear()
        resumed = quiet(ema(update_starting_at_step=99), max_epochs=2)
        resumed.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
        said = "of a run without EMAWeightAveraging: its weights 'ema' begin"
        assert (said in caplog.text) is (not callbacks)


def test_a_crash_in_a_validation_saves_what_is_trained(tmp_path: Path) -> None:
    class Crashing(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise OSError("no more")

    watch = torchs()
    saving = OnExceptionCheckpoint(tmp_path, filename="crash")
    trainer = quiet(ema(), watch, saving)
    module = Crashing()
    with pytest.raises(OSError, match="no more"):
        trainer.fit(module, data(), data())
    assert equal(weights_of(module), watch.steps[-1])
    saved = load_checkpoint(str(tmp_path / "crash.ckpt"))
    assert equal(saved["state_dict"], watch.steps[-1])
    assert equal(saved["weight_sets"]["ema"], watch.averages[-1])


def test_a_further_fit_goes_on_with_what_is_trained(tmp_path: Path) -> None:
    whole = Net()
    quiet(ema(), max_epochs=2).fit(whole, data())
    module, trainer = Net(), quiet(ema(), max_epochs=1)
    trainer.fit(module, data())
    with isolated_rng():
        trainer.test(module, data())
    trainer.max_epochs = 2
    trainer.fit(module, data())
    assert equal(weights_of(module), weights_of(whole))


def test_weights_that_were_changed_after_a_fit_are_trained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, trainer = Net(), quiet(ema(), max_epochs=1)
    trainer.fit(module, data())
    other = {name: torch.full_like(t, 2) for name, t in weights_of(module).items()}
    module.load_state_dict(other)
    trainer.predict(module, data())
    assert equal(module.evaluated[0], other)
    seen = []
    module.on_train_start = lambda: seen.append(weights_of(module))
    trainer.max_epochs = 2
    trainer.fit(module, data())
    assert equal(seen[0], other)
    assert "have been changed since its last fit" in caplog.text


def test_another_module_begins_an_average_of_its_own() -> None:
    average, watch = ema(), torchs()
    quiet(average).fit(Net(), data())
    module = Net()
    quiet(average, watch).fit(module, data())
    assert equal(weights_of(module), watch.averages[-1])


def test_either_can_be_loaded_and_exported(tmp_path: Path) -> None:
    watch, path = torchs(), tmp_path / "a.ckpt"
    trainer = quiet(ema(), watch)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(path, weights_only=True)
    for name, expected in ((None, watch.steps[-1]), ("ema", watch.averages[-1])):
        loaded = Net.load_from_checkpoint(path, weight_set=name)
        assert equal(weights_of(loaded), expected)
        trainer.export(tmp_path / "live.safetensors", weight_set=name)
        assert equal(load_file(tmp_path / "live.safetensors"), expected)
        options = [] if name is None else ["--weight-set", name]
        file = str(tmp_path / "of_checkpoint.safetensors")
        assert export.main([str(path), file, *options]) == 0
        assert equal(load_file(file), expected)
    with pytest.raises(CheckpointError, match=r"no weight_set 'swa'.*'ema'"):
        Net.load_from_checkpoint(path, weight_set="swa")
    with pytest.raises(ValueError, match=r"weight_set='swa'.*'ema'"):
        trainer.export(tmp_path / "x.safetensors", weight_set="swa")


def test_several_averages_are_told_apart(tmp_path: Path) -> None:
    module, path = Net(), tmp_path / "a.ckpt"
    slow = ema(decay=0.9, name="slow", evaluate=False)
    trainer = quiet(ema(), slow)
    trainer.fit(module, data())
    trainer.save_checkpoint(path)
    sets = load_checkpoint(str(path))["weight_sets"]
    assert sets.keys() == {"ema", "slow"}
    assert not equal(sets["ema"], sets["slow"])
    with pytest.raises(ValueError, match="evaluate=False"):
        quiet(ema(), ema(name="slow")).fit(Net(), data())
    with pytest.raises(ValueError, match="two callbacks"):
        quiet(ema(), ema(evaluate=False)).fit(Net(), data())


@pytest.mark.parametrize(
    "arguments",
    [{"decay": 1.5}, {"decay": "a"}, {"update_every_n_steps": 0}, {"name": "a/b"}],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EMAWeightAveraging(**arguments)
    with pytest.raises(ValueError, match="avg_fn and multi_avg_fn"):
        WeightAveraging(avg_fn=max, multi_avg_fn=max)


def test_it_can_be_pickled_before_and_after_a_fit() -> None:
    average, whole = ema(), Net()
    quiet(average).fit(whole, data())
    pickle.dumps(average)
    module = Net()
    quiet(pickle.loads(pickle.dumps(ema()))).fit(module, data())
    assert equal(module.state_dict(), whole.state_dict())


def test_what_a_checkpoint_averages_and_the_module_lacks_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, path = quiet(ema()), tmp_path / "a.ckpt"
    trainer.fit(Net(), data())
    trainer.save_checkpoint(path)

    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = self.net
            del self.net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.body(batch[0]).square().mean()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            # As migrations often do: of the weights that are trained alone.
            own = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n.replace("net", "body"): own[n] for n in own}
            for state in checkpoint["optimizer_parameters"]:
                state[0][:] = [name.replace("net", "body") for name in state[0]]

    quiet(ema(), max_epochs=2).fit(Renamed(), data(), ckpt_path=path)
    assert "The module has no net.0.bias, net.0.weight" in caplog.text


# Killed at any moment.


def train_and_save(folder: Path) -> Watch:
    watch = torchs()
    saving = ModelCheckpoint(
        folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    trainer = quiet(
        ema(), watch, saving, max_epochs=3, val_check_interval=1, limit_val_batches=2
    )
    trainer.fit(Net(), data(shuffle=True), data(), ckpt_path="last")
    return watch


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_no_kill_leaves_the_average_in_the_place_of_the_weights(
    tmp_path: Path, kills: int
) -> None:
    watch = train_and_save(tmp_path / "whole")
    chance = random.Random(kills)
    started = time.perf_counter()
    assert ended(in_a_child(lambda: train_and_save(tmp_path / "timed"))) == 0
    lasts = time.perf_counter() - started
    checked = 0
    for kill in range(kills):
        folder = tmp_path / f"killed-{kill}"
        child = in_a_child(lambda folder=folder: train_and_save(folder))
        time.sleep(chance.uniform(0.1, 1) * lasts)
        os.kill(child, chance.choice((signal.SIGKILL, signal.SIGTERM)))
        ended(child)
        for path in folder.glob("*.ckpt"):
            if not path.is_symlink() and (path / "manifest.json").exists():
                saved = load_checkpoint(str(path))
                step = saved["global_step"]
                assert equal(saved["state_dict"], watch.steps[step - 1]), path
                average = watch.averages[step - 1]
                assert equal(saved["weight_sets"]["ema"], average), path
                checked += 1
    assert checked > kills
