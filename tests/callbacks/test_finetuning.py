from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from loopwright.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
)
from loopwright.framework import Module
from tests.framework.models import loader
from tests.strategies.distributed import all_in_processes, quiet


class Net(Module):
    """A backbone with batch norm, and a head; ``schedule`` makes a scheduler of the optimizer."""

    def __init__(
        self, norm: bool = True, schedule: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        between = nn.BatchNorm1d(4) if norm else nn.LayerNorm(4)
        self.first = nn.Linear(2, 4)
        self.backbone = nn.Sequential(self.first, between, nn.Dropout(0.2))
        self.head = nn.Linear(4, 1)
        self.schedule = schedule
        self.rates: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        groups = self.trainer.optimizers[0].param_groups
        self.rates.append([round(float(group["lr"]), 6) for group in groups])
        loss = (self.head(self.backbone(batch[0])) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trained = filter(lambda parameter: parameter.requires_grad, self.parameters())
        optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        if self.schedule is None:
            return optimizer
        return [optimizer], [self.schedule(optimizer)]


def train(folder: Path, epochs: int, **arguments: Any) -> Any:
    """Train a Net whose backbone is unfrozen in epoch 1; returns the module and its Trainer."""
    torch.manual_seed(0)
    options = {"norm": arguments.pop("norm", True)}
    module = Net(**options, schedule=arguments.pop("schedule", None))
    path = arguments.pop("ckpt_path", None)
    train_bn = arguments.pop("train_bn", True)
    callbacks: list[Any] = [BackboneFinetuning(1, train_bn=train_bn)]
    if path is None:
        callbacks.append(
            ModelCheckpoint(
                folder, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=3
            )
        )
        arguments["enable_checkpointing"] = True
    trainer = quiet(max_epochs=epochs, callbacks=callbacks, **arguments)
    trainer.fit(module, loader(8, shuffle=True), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("train_bn", [True, False])
def test_backbone_is_trained_from_its_epoch_on_with_a_rising_rate(
    tmp_path: Path, train_bn: bool
):
    first, _ = train(tmp_path, 1, train_bn=train_bn)
    torch.manual_seed(0)
    begin = Net()
    assert torch.equal(first.first.weight, begin.first.weight)
    module, _ = train(tmp_path, 5, train_bn=train_bn)
    assert not torch.equal(module.first.weight, begin.first.weight)
    by_epoch = module.rates[::8]
    assert by_epoch == [
        [0.01],
        [0.01, 0.001],
        [0.01, 0.002],
        [0.01, 0.004],
        [0.01, 0.008],
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lambda optimizer: {
            "scheduler": ReduceLROnPlateau(optimizer),
            "monitor": "loss",
        },
    ],
)
def test_run_that_resumes_has_the_groups_and_what_is_frozen(
    tmp_path: Path, schedule: Any
):
    """Inside the epoch that has unfrozen the backbone, whose hook does not run again, and in an epoch after it."""
    whole, _ = train(tmp_path, 4, schedule=schedule)
    for name in ("epoch=1-step=12", "epoch=2-step=21"):
        path = tmp_path / f"{name}.ckpt"
        resumed, trainer = train(
            tmp_path / "again", 4, schedule=schedule, ckpt_path=path
        )
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), (name, key)
        assert all(parameter.requires_grad for parameter in resumed.parameters())
        assert len(trainer.optimizers[0].param_groups) == 2


def test_state_without_names_of_what_is_frozen_trains_the_groups(tmp_path: Path):
    """As Lightning saves it."""

    class Loads(BackboneFinetuning):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(
                {k: v for k, v in state_dict.items() if k != "frozen"}
            )

        @property
        def state_key(self) -> str:
            return "BackboneFinetuning"

    whole, _ = train(tmp_path, 4, norm=False)
    torch.manual_seed(0)
    module = Net(norm=False)
    path = tmp_path / "epoch=2-step=21.ckpt"
    trainer = quiet(max_epochs=4, callbacks=[Loads(1)])
    trainer.fit(module, loader(8, shuffle=True), ckpt_path=path)
    assert torch.equal(module.first.weight, whole.first.weight)


def test_run_that_went_on_without_it_is_told_apart(tmp_path: Path):
    class All(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = quiet(max_epochs=2)
    trainer.fit(All(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = quiet(max_epochs=3, callbacks=[BackboneFinetuning(1)])
    with pytest.raises(ValueError, match="no state of it: set unfreeze_backbone_at"):
        trainer.fit(All(), loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_resumes_where_the_backbone_is_pruned(tmp_path: Path):
    def fit(epochs: int, path: Path | None = None) -> Any:
        torch.manual_seed(0)
        callbacks = [
            BackboneFinetuning(2),
            ModelPruning("l1_unstructured", use_lottery_ticket_hypothesis=False),
        ]
        module, trainer = Net(), quiet(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, loader(8, shuffle=True), ckpt_path=path)
        return module.state_dict(), trainer

    whole, _ = fit(4)
    for epochs in (2, 3):
        fit(epochs)[1].save_checkpoint(tmp_path / f"{epochs}.ckpt")
        resumed, _ = fit(4, tmp_path / f"{epochs}.ckpt")
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name


def test_fit_that_is_called_again_goes_on_with_the_groups(tmp_path: Path):
    whole, _ = train(tmp_path, 4)
    module, trainer = train(tmp_path / "again", 3)
    trainer.max_epochs = 4
    trainer.fit(module, loader(8, shuffle=True))
    assert torch.equal(module.first.weight, whole.first.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: StepLR(optimizer, 1, 0.5),
        lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=40),
        lambda optimizer: CyclicLR(optimizer, 0.01, 0.05, 10),
        lambda optimizer: SequentialLR(
            optimizer,
            [LinearLR(optimizer), LambdaLR(optimizer, lambda step: 0.9**step)],
            [2],
        ),
    ],
)
def test_schedulers_follow_with_the_new_group(make: Any):
    """Added while a schedule is on its way, a group has a tenth of the other's rate ever after."""
    module = Net(
        schedule=lambda optimizer: {"scheduler": make(optimizer), "interval": "step"}
    )

    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)

    quiet(max_epochs=3, callbacks=[Unfreezes()]).fit(module, loader(4))
    later = module.rates[4:]
    assert len(later) == 8
    for first, second in later:
        assert second == pytest.approx(first / 10, abs=1e-5)


def test_what_is_flattened_filtered_and_frozen():
    class Owner(nn.Module):
        """Has parameters of its own beside those of a module inside it."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(2, 2)

    norm, owner = nn.BatchNorm1d(2), Owner()
    parts = nn.ModuleDict({"norm": norm, "owner": owner})
    assert BaseFinetuning.flatten_modules(parts) == [norm, owner, owner.inner]
    assert BaseFinetuning.flatten_modules([norm, [norm, owner.inner]]) == [
        norm,
        owner.inner,
    ]
    BaseFinetuning.freeze(parts)
    assert list(BaseFinetuning.filter_params(parts)) == [norm.weight, norm.bias]
    assert not list(BaseFinetuning.filter_params(parts, train_bn=False))
    BaseFinetuning.freeze(parts, train_bn=False)
    assert not norm.track_running_stats
    frozen = BaseFinetuning.filter_params(parts, requires_grad=False)
    assert len(list(frozen)) == 5
    BaseFinetuning.make_trainable(parts)
    assert norm.track_running_stats
    assert owner.scale.requires_grad


def test_parameters_that_an_optimizer_has_stay_where_they_are():
    """They are told apart by which they are, not by their values: two layers of zeros are two."""
    zeros = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(zeros[0].parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BaseFinetuning.unfreeze_and_add_param_group(zeros[1], optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    with pytest.warns(UserWarning, match="already exist within another group"):
        BaseFinetuning.unfreeze_and_add_param_group(zeros, optimizer)
    assert len(optimizer.param_groups) == 2


def test_the_others_keep_their_rate_where_the_optimizer_has_the_backbone_already():
    """As where configure_optimizers filters nothing: its one group is not the backbone's, whose rate would be lower."""

    class Unfiltered(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Unfiltered()
    with pytest.warns(UserWarning, match="already exist within another group"):
        quiet(callbacks=[BackboneFinetuning(1)], max_epochs=4).fit(module, loader())
    assert {rate for rates in module.rates for rate in rates} == {0.01}


def test_mistakes_are_named(caplog: pytest.LogCaptureFixture):
    class NoBackbone(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.backbone

    with pytest.raises(ValueError, match="NoBackbone should have"):
        quiet(callbacks=[BackboneFinetuning()]).fit(NoBackbone(), loader())
    with pytest.raises(NotImplementedError, match="must override freeze_before"):
        quiet(callbacks=[BaseFinetuning()]).fit(Net(), loader())
    with pytest.raises(ValueError, match="unfreeze_backbone_at_epoch"):
        BackboneFinetuning(-1)
    with caplog.at_level(logging.INFO, "loopwright"):
        quiet(callbacks=[BackboneFinetuning(0, verbose=True)]).fit(Net(), loader())
    assert "Current lr: 0.01, Backbone lr: 0.001" in caplog.text


def _in_two(folder: Path, strategy: str) -> list[Tensor]:
    """The weights of a whole run and of one that resumes, with the backbone's as they were at first."""
    arguments: dict[str, Any] = {"norm": False, "strategy": strategy, "devices": 2}
    whole, trainer = train(folder, 3, **arguments)
    states = [_full(trainer, whole)]
    paths = sorted(folder.glob("epoch=2-*.ckpt"))
    resumed, trainer = train(folder / "again", 3, ckpt_path=paths[0], **arguments)
    return [*states, _full(trainer, resumed), Net(norm=False).first.weight]


def _full(trainer: Any, module: Any) -> Tensor:
    weight = module.first.weight
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


@pytest.mark.slow
def test_two_processes_unfreeze_and_resume(tmp_path: Path):
    runs = all_in_processes(
        2,
        {name: (_in_two, tmp_path / name, name) for name in ("ddp", "fsdp")},
    )
    for name, (whole, resumed, before) in runs.items():
        assert torch.equal(whole, resumed), name
        assert not torch.equal(whole, before), name
