"""Stochastic weight averaging: the average, the learning rate and the statistics as computed by hand; exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, update_bn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, StochasticWeightAveraging
from loopwright.framework import Module
from loopwright.framework.checkpoint.reader import load_checkpoint
from tests.framework.models import quiet

EPOCHS, START = 5, 3


class Net(Module):
    def __init__(self, norm: bool = True, scheduler: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        middle = nn.BatchNorm1d(5) if norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(3, 5), middle, nn.Linear(5, 1))
        self.scheduler = scheduler
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        if not self.scheduler:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Watch(Callback):
    """Notes the weights at the begin of each epoch, and saves every three steps, and at the end of the last epoch."""

    phase = "persist"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.begun: list[dict[str, Tensor]] = []
        self.trained: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained = weights_of(pl_module)
        if self.folder is not None and trainer.global_step % 3 == 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.folder is not None and trainer.current_epoch == EPOCHS - 1:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def data(**options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(16, 3, generator=generator)), batch_size=4, **options
    )


def swa(**options: Any) -> StochasticWeightAveraging:
    return StochasticWeightAveraging(
        **{"swa_lrs": 0.02, "swa_epoch_start": START, "annealing_epochs": 2, **options}
    )


def train(module: Net, *callbacks: Any, **options: Any) -> Any:
    trainer = quiet(*callbacks, max_epochs=EPOCHS)
    trainer.fit(module, data(shuffle=True), **options)
    return trainer


def test_average_rate_and_statistics_are_those_by_hand() -> None:
    module, watch, average = Net(), Watch(), swa()
    trainer = train(module, watch, average)
    counted = watch.begun[START - 1 :]
    by_hand = Net()
    by_hand.load_state_dict(
        {name: sum(w[name] for w in counted) / len(counted) for name in counted[0]}
    )
    update_bn(data(), by_hand.net)
    for name, tensor in weights_of(module).items():
        # Of whole epochs, but in another order of the samples.
        tolerance = 0.15 if "running" in name else 1e-6
        torch.testing.assert_close(
            tensor, weights_of(by_hand)[name], atol=tolerance, rtol=0
        )
    assert average.weight_set.num_updates == 3
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, SWALR)
    first = [0.1, 0.09, 0.081, (0.081 + 0.02) / 2, 0.02]
    assert module.rates == pytest.approx([rate for rate in first for _ in range(4)])
    assert trainer.callback_metrics["loss"] > 0


@pytest.mark.parametrize("scheduler", [False, True])
def test_it_is_lightnings_after_the_same_run(scheduler: bool) -> None:
    """With batch norms, Lightning takes another step on old gradients, while it computes their statistics."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import StochasticWeightAveraging as Lightnings

    class Same(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scheduler = Net(False).net, scheduler
            self.rates: list[float] = []

        training_step, configure_optimizers = (
            Net.training_step,
            Net.configure_optimizers,
        )
        on_train_batch_start = Net.on_train_batch_start

    modules: list[Any] = [Net(False, scheduler), Same()]
    theirs = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=Lightnings(0.02, START, 2),
    )
    quiet(swa(), max_epochs=EPOCHS).fit(modules[0], data())
    theirs.fit(modules[1], data())
    torch.testing.assert_close(weights_of(modules[0]), weights_of(modules[1]))
    assert modules[0].rates == modules[1].rates


@pytest.mark.parametrize("scheduler", [False, True])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, scheduler: bool) -> None:
    whole = Net(scheduler=scheduler)
    train(whole, Watch(tmp_path), swa())
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert len(paths) == 7
    for path in paths:
        module = Net(scheduler=scheduler)
        train(module, swa(), ckpt_path=path)
        for name, tensor in weights_of(module).items():
            assert torch.equal(tensor, whole.state_dict()[name]), (path, name)
        assert module.rates == whole.rates[int(path.stem) :]


def test_a_save_after_the_fit_holds_what_was_trained(tmp_path: Path) -> None:
    module, watch = Net(), Watch()
    trainer = train(module, watch, swa())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = load_checkpoint(str(tmp_path / "a.ckpt"))
    for name, tensor in module.state_dict().items():
        assert torch.equal(saved["state_dict"][name], watch.trained[name])
        assert torch.equal(saved["weight_sets"]["swa"][name], tensor)
    resumed = Net()
    trainer = quiet(swa(), max_epochs=EPOCHS + 1)
    trainer.fit(resumed, data(shuffle=True), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.current_epoch == EPOCHS + 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"swa_epoch_start": 0}, "swa_epoch_start"),
        ({"swa_epoch_start": 1.5}, "swa_epoch_start"),
        ({"swa_lrs": [0.2, 1]}, "swa_lrs"),
        ({"swa_lrs": []}, "swa_lrs"),
        ({"annealing_strategy": "none"}, "annealing_strategy"),
        ({"avg_fn": 3}, "avg_fn"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        swa(**arguments)


def test_what_it_cannot_do_is_refused() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            parts = (self.net[0], self.net[2])
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    with pytest.raises(ValueError, match="2 optimizers"):
        train(Two(False), swa())
    with pytest.raises(ValueError, match="max_epochs"):
        quiet(swa(swa_epoch_start=0.5), max_epochs=-1, max_steps=4).fit(Net(), data())
    with pytest.raises(ValueError, match=r"swa_lrs.*1 parameter groups"):
        train(Net(), swa(swa_lrs=[0.1, 0.2]))
