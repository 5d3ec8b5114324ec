"""Optimizers of schedulefree: their modes are switched around evaluations and saves, and resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopwright.callbacks import Callback, EMAWeightAveraging
from loopwright.framework import Module
from loopwright.framework.checkpoint.reader import load_checkpoint
from tests.framework.models import loader, quiet

schedulefree = pytest.importorskip("schedulefree")


class Net(Module):
    def __init__(self, kind: str = "AdamWScheduleFree") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.kind = kind
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(flat(self))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return getattr(schedulefree, self.kind)(self.parameters(), lr=0.05)


class Watch(Callback):
    """Saves at a step, while the training goes on and while a validation runs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.trained: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.save(trainer, "training")
        self.trained.append(flat(pl_module))

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validating")

    def save(self, trainer: Any, moment: str) -> None:
        if self.folder is not None and trainer.global_step == 4:
            trainer.save_checkpoint(self.folder / f"{moment}.ckpt")
            trainer.save_checkpoint(
                self.folder / f"{moment}-file.ckpt", save_format="file"
            )


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def train_by_hand(kind: str, steps: int) -> tuple[list[Tensor], Tensor]:
    """The weights after each step, and those to evaluate at the end."""
    module = Net(kind)
    optimizer = module.configure_optimizers()
    optimizer.train()
    trained = []
    while len(trained) < steps:
        for batch in loader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            trained.append(flat(module))
    optimizer.eval()
    return trained, flat(module)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_training_and_evaluation_are_those_by_hand(kind: str, tmp_path: Path) -> None:
    module, watch = Net(kind), Watch(tmp_path)
    trainer = quiet(watch, max_epochs=2, val_check_interval=2)
    trainer.fit(module, loader(), loader(1))
    trained, evaluated = train_by_hand(kind, 8)
    assert torch.equal(torch.stack(watch.trained), torch.stack(trained))
    assert torch.equal(module.evaluated[-1], evaluated)
    assert torch.equal(flat(module), evaluated)
    trainer.test(module, loader(1))
    assert torch.equal(module.evaluated[-1], evaluated)

    _, at_save = train_by_hand(kind, 4)
    for path in tmp_path.glob("*.ckpt"):
        loaded = Net.load_from_checkpoint(path)
        assert torch.equal(flat(loaded), at_save), path
        trained_then = Net.load_from_checkpoint(path, weight_set="training")
        assert torch.equal(flat(trained_then), trained[3]), path
        resumed, again = Net(kind), Watch()
        quiet(again, max_epochs=2).fit(resumed, loader(), ckpt_path=path)
        assert torch.equal(torch.stack(again.trained), torch.stack(trained[4:])), path
        assert torch.equal(flat(resumed), evaluated), path


def test_a_save_after_a_fit_and_a_further_fit_go_on_exactly(tmp_path: Path) -> None:
    trained, _ = train_by_hand("AdamWScheduleFree", 8)
    module, watch = Net(), Watch()
    trainer = quiet(watch)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.max_epochs = 2
    trainer.fit(module, loader())
    assert torch.equal(torch.stack(watch.trained), torch.stack(trained))
    resumed, again = Net(), Watch()
    quiet(again, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(torch.stack(again.trained), torch.stack(trained[4:]))


def test_hooks_that_switch_the_modes_themselves_may_do_so() -> None:
    class Switching(Net):
        def on_validation_start(self) -> None:
            self.optimizers().eval()

        def on_validation_end(self) -> None:
            self.optimizers().train()

    module, plain = Switching(), Net()
    for each in (module, plain):
        quiet(max_epochs=2, val_check_interval=2).fit(each, loader(), loader(1))
    torch.testing.assert_close(flat(module), flat(plain))


def test_beside_an_average(tmp_path: Path) -> None:
    module, path = Net(), tmp_path / "a.ckpt"
    trainer = quiet(EMAWeightAveraging(decay=0.5), max_epochs=2)
    trainer.fit(module, loader(), loader(1))
    trainer.save_checkpoint(path)
    saved = load_checkpoint(str(path))
    assert saved["weight_sets"].keys() == {"ema", "training"}
    trained, evaluated = train_by_hand("AdamWScheduleFree", 8)
    assert torch.equal(flat(Net.load_from_checkpoint(path)), evaluated)
    average = trained[0]
    for weights in trained[1:]:
        average = average.lerp(weights, 0.5)
    assert torch.equal(module.evaluated[-1], average)
