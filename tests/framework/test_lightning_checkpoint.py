"""Files that Lightning has written in the middle of a training go on here, with the losses that it has there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright import callbacks as ours
from loopwright.framework import CheckpointError, DataModule, Engine, Module
from loopwright.framework.checkpoint.reader import load_checkpoint
from tests.framework.models import data, quiet

lightning = pytest.importorskip("lightning.pytorch")

# Lightning says much of what does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Regression:
    """A step with Adam in two groups and schedulers by steps and by a validated value, for both trainers' modules."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()  # type: ignore[attr-defined] # of the base beside this one
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Any:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))  # type: ignore[attr-defined] # of the base beside this one

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[2].parameters(), "weight_decay": 0.1},
            {"params": self.net[0].parameters()},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        epoch = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": step, "interval": "step"}, epoch]


class Adversaries(Regression):
    """Two optimizers, which the step runs itself: one in each batch, the other in every second one."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[attr-defined] # of the base beside this one
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)  # type: ignore[attr-defined] # of the base beside this one
            optimizer.step()
            self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net[2].parameters(), lr=0.05)
        return [first, torch.optim.SGD(self.net[0].parameters(), 0.1, 0.9)]


class LightningRegression(Regression, lightning.LightningModule):
    pass


class OurRegression(Regression, Module):
    pass


class LightningAdversaries(Adversaries, lightning.LightningModule):
    pass


class OurAdversaries(Adversaries, Module):
    pass


def in_order() -> DataLoader[Any]:
    return DataLoader(data(16), batch_size=4)


def stateful() -> Any:
    return StatefulDataLoader(data(16), batch_size=4, shuffle=True)


def lightning_trainer(*callbacks: Any, **options: Any) -> Any:
    quiet_options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
    }
    return lightning.Trainer(callbacks=[*callbacks], **{**quiet_options, **options})


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return make()


def saving(**options: Any) -> Any:
    return lightning.callbacks.ModelCheckpoint("lightning", save_top_k=-1, **options)


def files() -> Iterator[Path]:
    return iter(sorted(Path("lightning").glob("*.ckpt")))


@pytest.mark.parametrize("kind", ["automatic", "manual", "accumulating"])
def test_from_an_epochs_end(kind: str) -> None:
    """Saved after an epoch, by its hooks or its validation, and after the last one."""
    lightnings, mine = {
        "manual": (LightningAdversaries, OurAdversaries),
    }.get(kind, (LightningRegression, OurRegression))
    options: dict[str, Any] = {}
    if kind == "accumulating":
        options["accumulate_grad_batches"] = 2
    module = seeded(lightnings)
    trainer = lightning_trainer(saving(), max_epochs=4, **options)
    trainer.fit(module, in_order(), in_order())
    steps = trainer.global_step
    assert len([*files()]) == 4
    for path in [*files()][:3]:
        done = load_checkpoint(str(path))["epoch"] + 1
        resumed = seeded(mine)
        again = quiet(max_epochs=4, **options)
        again.fit(resumed, in_order(), in_order(), ckpt_path=path)
        left = module.losses[done * len(module.losses) // 4 :]
        assert resumed.losses == pytest.approx(left, rel=1e-6, abs=1e-9)
        assert again.current_epoch == 4
        # Lightning counts the steps of both optimizers.
        assert again.global_step == (16 if kind == "manual" else steps)
        for ours_, theirs in zip(
            resumed.state_dict().values(), module.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours_, theirs)
    trainer.save_checkpoint("end.ckpt")
    longer = seeded(mine)
    quiet(max_epochs=5, **options).fit(longer, in_order(), ckpt_path="end.ckpt")
    assert len(longer.losses) == len(module.losses) // 4


@pytest.mark.parametrize("loader", [in_order, stateful])
@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_from_inside_an_epoch(loader: Callable[[], Any], step: int) -> None:
    """A loader in order goes on at the next batch; one that keeps a state, as Lightning itself does."""
    module = seeded(LightningRegression)
    trainer = lightning_trainer(saving(every_n_train_steps=1))
    torch.manual_seed(11)
    trainer.fit(module, loader(), in_order())
    [path] = Path("lightning").glob(f"*step={step}.ckpt")
    resumed = seeded(OurRegression)
    again = quiet(max_epochs=3)
    torch.manual_seed(12)
    again.fit(resumed, loader(), in_order(), ckpt_path=path)
    assert again.global_step == 12
    if loader is in_order:
        assert resumed.losses == pytest.approx(module.losses[step:], rel=1e-6)
        return
    # The next epoch's order is drawn anew, by Lightning, too.
    in_epoch = -step % 4
    theirs = module.losses[step : step + in_epoch]
    assert resumed.losses[:in_epoch] == pytest.approx(theirs, rel=1e-6)


def test_from_validations_inside_an_epoch() -> None:
    """What a validation saved is not validated again, nor is its last batch trained on again."""
    module = seeded(LightningRegression)
    trainer = lightning_trainer(
        saving(monitor="val_loss", save_on_train_epoch_end=False),
        val_check_interval=2,
    )
    trainer.fit(module, in_order(), in_order())
    assert len([*files()]) == 6

    class Counts(ours.Callback):
        validations = 0

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.validations += 1

    for path in files():
        step = load_checkpoint(str(path))["global_step"]
        resumed, counts = seeded(OurRegression), Counts()
        again = quiet(counts, max_epochs=3, val_check_interval=2)
        again.fit(resumed, in_order(), in_order(), ckpt_path=path)
        assert resumed.losses == pytest.approx(module.losses[step:], rel=1e-6)
        assert counts.validations == 6 - step // 2


class Plateau(Regression):
    """A learning rate that falls when a validated value does not."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.3, threshold=0.9
        )
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}


class LightningPlateau(Plateau, lightning.LightningModule):
    pass


class OurPlateau(Plateau, Module):
    pass


def test_an_engine_takes_its_state() -> None:
    """Weights, optimizer, schedulers and the count of steps, into what was prepared in the same order."""
    theirs, mine = seeded(LightningRegression), OurRegression()
    lightning_trainer(saving(), max_epochs=1).fit(theirs, in_order())
    [optimizer], [step, epoch] = mine.configure_optimizers()
    engine = Engine(accelerator="cpu")
    prepared = engine.prepare(mine, optimizer, step["scheduler"], epoch)
    engine.load_state(next(files()))
    assert engine.global_step == 4
    for name, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}
    assert prepared[2].get_last_lr()[0] == pytest.approx(0.05 * 0.97**4)


def test_what_lightning_itself_leaves_out_at_an_epochs_end() -> None:
    """What steps by a value after the save is not made up for; the run goes on as Lightning's own does."""
    callback = saving(monitor="val_loss", save_on_train_epoch_end=False)
    trainer = lightning_trainer(callback, max_epochs=5)
    trainer.fit(seeded(LightningPlateau), in_order(), in_order())
    path = [*files()][2]
    theirs, mine = seeded(LightningPlateau), seeded(OurPlateau)
    lightning_trainer(max_epochs=5).fit(theirs, in_order(), in_order(), ckpt_path=path)
    quiet(max_epochs=5).fit(mine, in_order(), in_order(), ckpt_path=path)
    assert len(mine.losses) == 8
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-6)


class Numbers(DataModule):
    """Data with a state."""

    seen = 0

    def train_dataloader(self) -> Any:
        return in_order()

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class LightningNumbers(lightning.LightningDataModule):
    train_dataloader = Numbers.train_dataloader
    val_dataloader = Numbers.train_dataloader
    state_dict = Numbers.state_dict


LightningNumbers.__qualname__ = Numbers.__qualname__


class Remembers:
    """A callback of a user's, for both trainers."""

    memory: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"memory": [1, torch.ones(1)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.memory = state_dict["memory"]


class OurRemembers(Remembers, ours.Callback):
    state_key = "Remembers"  # type: ignore[assignment] # shorter than a property


class LightningRemembers(Remembers, lightning.Callback):
    state_key = "Remembers"


def test_states_of_callbacks_and_data(caplog: pytest.LogCaptureFixture) -> None:
    """Patience, the best checkpoints, and what users keep; a line says what is not taken over."""
    theirs = saving(monitor="val_loss", save_last=True)
    patience = lightning.callbacks.EarlyStopping("val_loss", patience=9, min_delta=9.0)
    trainer = lightning_trainer(theirs, patience, LightningRemembers())
    trainer.fit(seeded(LightningRegression), datamodule=LightningNumbers())
    last = copy.copy(theirs.last_model_path)
    kept = {str(path) for path in Path("lightning").resolve().glob("epoch*.ckpt")}

    callback = ours.ModelCheckpoint(
        "lightning",
        monitor="val_loss",
        save_top_k=-1,
        save_last=True,
        save_format="file",
    )
    stopping = ours.EarlyStopping("val_loss", patience=9, min_delta=9.0)
    memory, numbers = OurRemembers(), Numbers()
    again = quiet(callback, stopping, memory, max_epochs=4)
    again.fit(seeded(OurRegression), datamodule=numbers, ckpt_path=last)
    assert stopping.wait_count == 3
    assert memory.memory == [1, torch.ones(1)]
    assert numbers.seen == 7
    assert kept < {*callback.best_k_models}
    assert len(callback.best_k_models) == 4
    # Its last.ckpt is a checkpoint, which stays.
    assert load_checkpoint(last)["global_step"] == 12
    assert load_checkpoint(callback.last_model_path)["global_step"] == 16
    [line] = [m for m in caplog.messages if "is Lightning's" in m]
    assert "no random states" in line
    assert "lacks" not in caplog.text


@pytest.mark.parametrize("save_format", ["file", "folder"])
def test_its_checkpoints_are_not_replaced(save_format: Any) -> None:
    """Though the next one would have the same name."""
    named: dict[str, Any] = {"dirpath": "lightning", "filename": "model"}
    theirs = lightning.callbacks.ModelCheckpoint(**named)
    lightning_trainer(theirs, max_epochs=1).fit(LightningRegression(), in_order())
    path = Path("lightning/model.ckpt")
    before = path.read_bytes()
    callback = ours.ModelCheckpoint(**named, save_format=save_format)
    again = quiet(callback, max_epochs=3)
    again.fit(OurRegression(), in_order(), ckpt_path=path)
    assert path.read_bytes() == before
    assert Path(callback.best_model_path).name == "model-v1.ckpt"
    assert load_checkpoint(callback.best_model_path)["global_step"] == 12
    assert len([*Path("lightning").iterdir()]) == 2


def test_what_is_not_opened_unasked_and_what_is_damaged() -> None:
    """Objects are loaded with weights_only=False; a flipped byte is named."""

    class WithObject(LightningRegression):
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["mine"] = Path("x")

    module = seeded(WithObject)
    lightning_trainer(saving(), max_epochs=1).fit(module, in_order())
    [path] = files()
    with pytest.raises(CheckpointError, match="weights_only=False if you trust it"):
        quiet(max_epochs=2).fit(OurRegression(), in_order(), ckpt_path=path)
    again = quiet(max_epochs=2)
    again.fit(OurRegression(), in_order(), ckpt_path=path, weights_only=False)
    assert again.global_step == 8
    content = bytearray(path.read_bytes())
    weight = module.state_dict()["net.0.weight"].numpy().tobytes()
    content[content.find(weight)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*data/\d+ was altered"):
        OurRegression.load_from_checkpoint(path)


def test_other_optimizers_than_here() -> None:
    """An error names what differs."""
    lightning_trainer(saving(), max_epochs=1).fit(LightningRegression(), in_order())
    [path] = files()
    with pytest.raises(CheckpointError, match="the checkpoint has 1 optimizer_states"):
        quiet(max_epochs=2).fit(OurAdversaries(), in_order(), ckpt_path=path)

    class OneGroup(OurRegression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            step = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return [optimizer], [step, step]

    with pytest.raises(CheckpointError, match=r"parameter groups .*\[2, 2\].*\[4\]"):
        quiet(max_epochs=2).fit(OneGroup(), in_order(), ckpt_path=path)


class Configured:
    """Takes all hyperparameters as one argument."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(config)  # type: ignore[attr-defined] # of the base beside this one
        self.net = nn.Linear(config["width"], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


class LightningConfigured(Configured, lightning.LightningModule):
    pass


class OurConfigured(Configured, Module):
    pass


def test_our_file_for_lightnings_module() -> None:
    """Lightning loads a module from a file of ours."""
    configured = quiet()
    configured.fit(OurConfigured({"width": 2}), in_order())
    configured.save_checkpoint("c.ckpt", save_format="file")
    assert LightningConfigured.load_from_checkpoint("c.ckpt").net.in_features == 2
    assert OurConfigured.load_from_checkpoint("c.ckpt").net.in_features == 2
    module = seeded(OurRegression)
    trainer = quiet()
    trainer.fit(module, in_order())
    trainer.save_checkpoint("a.ckpt", save_format="file")
    theirs = LightningRegression.load_from_checkpoint("a.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)
