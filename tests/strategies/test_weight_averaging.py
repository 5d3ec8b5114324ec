"""Averages of weights where processes have all of them, or a shard each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from loopwright.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from loopwright.framework import Module
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.strategies import DeepSpeedStrategy
from loopwright.strategies.tensor_shards import full_state
from tests.strategies.distributed import all_in_processes, quiet

DECAY, STEPS, SAVED_AFTER = 0.8, 6, 3


class Net(Module):
    """Notes the weights after each step, and those that evaluations run on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.history: list[dict[str, Tensor]] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(self.net(batch).detach().clone())

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(trained(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def trained(module: Module) -> dict[str, Tensor]:
    """The weights that are trained, whole."""
    strategy = module.trainer.strategy
    whole = full_state(strategy, strategy.model_state())
    return {name: tensor.clone() for name, tensor in whole.items()}


class Save(Callback):
    """Saves in the middle of the training, while a validation runs on the average."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == SAVED_AFTER and not self.path.exists():
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path.with_suffix(".file"), save_format="file")


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return list(torch.randn(STEPS, 4, 5, generator=generator))


def fit(
    strategy: str, path: Path, resume: bool, precision: Any = "32-true"
) -> dict[str, Any]:
    module = Net()
    ema = EMAWeightAveraging(decay=DECAY)
    trainer = quiet(
        strategy=strategy,
        precision=precision,
        use_distributed_sampler=False,
        callbacks=[ema] if resume else [ema, Save(path)],
        val_check_interval=1,
        num_sanity_val_steps=0,
    )
    validation = batches(7)[:1]
    trainer.fit(
        module,
        batches(trainer.global_rank),
        validation,
        ckpt_path=path if resume else None,
    )
    last = trained(module)
    strategy_ = trainer.strategy
    average = full_state(strategy_, ema.weight_set.state(module, strategy_))
    trainer.validate(module, validation)
    end = path.with_name(f"{path.name} end")
    trainer.save_checkpoint(end)
    saved = load_checkpoint(str(end))
    return {
        "history": module.history,
        "evaluated": module.evaluated,
        "average": average,
        "after the fit": last,
        "saved": saved["state_dict"],
        "saved average": saved["weight_sets"]["ema"],
    }


STRATEGIES = [
    "ddp",
    "fsdp",
    pytest.param("deepspeed_stage_1", marks=pytest.mark.slow),
    pytest.param("deepspeed_stage_3", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run has found, by the name of its strategy; those of DeepSpeed are run when they are first asked for."""
    folder = tmp_path_factory.mktemp("averages")
    found: dict[str, Any] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in found:
            strategies = ["ddp", "fsdp"]
            if "deepspeed" in name or name == "mixed":
                strategies = ["deepspeed_stage_1", "deepspeed_stage_3"]
            found.update(all_in_processes(2, calls_of(strategies, folder)))
        return found[name]

    return find


def calls_of(strategies: list[str], folder: Path) -> dict[str, Any]:
    calls: dict[str, Any] = {}
    for strategy in strategies:
        path = folder / f"{strategy}.ckpt"
        calls[strategy] = (fit, strategy, path, False)
        calls[f"{strategy} resumed"] = (fit, strategy, path, True)
        if "deepspeed" not in strategy:
            file = path.with_suffix(".file")
            calls[f"{strategy} resumed from a file"] = (fit, strategy, file, True)
        calls[f"swa, {strategy}"] = (fit_swa, strategy)
        if "deepspeed" not in strategy:
            saved = folder / f"free-{strategy}.ckpt"
            calls[f"schedule-free, {strategy}"] = (
                fit_schedule_free,
                strategy,
                saved,
                False,
            )
            calls[f"schedule-free, {strategy} resumed"] = (
                fit_schedule_free,
                strategy,
                saved,
                True,
            )
    if "fsdp" in strategies:
        calls["fsdp resumed from ddp"] = (fit, "fsdp", folder / "ddp.ckpt", True)
    else:
        calls["schedule-free, deepspeed"] = (refuse_schedule_free,)
        path = folder / "mixed.ckpt"
        calls["mixed"] = (fit, "deepspeed_stage_2", path, False, "bf16-mixed")
    return calls


class Normed(Module):
    """With a batch norm, whose statistics belong to the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        self.begun: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_epoch_start(self) -> None:
        self.begun.append(trained(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit_swa(strategy: str) -> dict[str, Any]:
    module = Normed()
    average = StochasticWeightAveraging(0.01, 2, 1)
    trainer = quiet(
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=average,
        max_epochs=3,
    )
    trainer.fit(module, batches(trainer.global_rank))
    strategy_ = trainer.strategy
    whole = full_state(strategy_, average.weight_set.state(module, strategy_))
    return {"begun": module.begun, "average": whole}


class ScheduleFree(Net):
    def configure_optimizers(self) -> Any:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(self.parameters(), lr=0.05)


def fit_schedule_free(strategy: str, path: Path, resume: bool) -> dict[str, Any]:
    module = ScheduleFree()
    trainer = quiet(
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[] if resume else [Save(path)],
        val_check_interval=1,
        num_sanity_val_steps=0,
    )
    data = batches(trainer.global_rank)
    trainer.fit(module, data, batches(7)[:1], ckpt_path=path if resume else None)
    return {
        "history": module.history,
        "evaluated": module.evaluated,
        "after the fit": trained(module),
    }


def refuse_schedule_free() -> str:
    strategy = DeepSpeedStrategy(config={"zero_allow_untested_optimizer": True})
    with pytest.raises(ValueError, match="train") as caught:
        quiet(strategy=strategy).fit(ScheduleFree(), batches(0))
    return str(caught.value)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


def by_hand(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = dict(history[0])
    for weights in history[1:]:
        average = {n: average[n].lerp(weights[n], 1 - DECAY) for n in average}
    return average


@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, pytest.param("mixed", marks=pytest.mark.slow)]
)
def test_the_average_is_the_one_by_hand(run_of: Any, strategy: str) -> None:
    run = run_of(strategy)
    assert equal(run["average"], by_hand(run["history"]))
    assert equal(run["saved average"], run["average"])
    assert equal(run["saved"], run["history"][-1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluations_run_on_the_average(run_of: Any, strategy: str) -> None:
    run = run_of(strategy)
    x = batches(7)[0]
    for step in range(1, STEPS + 1):
        module = Net()
        module.load_state_dict(by_hand(run["history"][:step]))
        torch.testing.assert_close(run["evaluated"][step - 1], module.net(x))
    assert torch.equal(run["evaluated"][-1], run["evaluated"][-2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_whole_one(run_of: Any, strategy: str) -> None:
    """Though it was saved while an evaluation ran on the average."""
    check_resumed(run_of(strategy), run_of(f"{strategy} resumed"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_file_holds_both_as_well(run_of: Any, strategy: str) -> None:
    check_resumed(run_of(strategy), run_of(f"{strategy} resumed from a file"))


def check_resumed(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    pairs = zip(whole["history"][SAVED_AFTER:], resumed["history"], strict=True)
    assert all(equal(one, other) for one, other in pairs)
    assert equal(whole["average"], resumed["average"])
    assert equal(whole["saved"], resumed["saved"])
    for one, other in zip(
        reversed(whole["evaluated"]), reversed(resumed["evaluated"]), strict=False
    ):
        assert torch.equal(one, other)


def test_another_strategy_goes_on_with_the_average(run_of: Any) -> None:
    one, other = run_of("ddp")["average"], run_of("fsdp resumed from ddp")["average"]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_for_the_average_are_of_the_batches_of_all_processes(
    run_of: Any, strategy: str
) -> None:
    found = run_of(f"swa, {strategy}")
    counted = found["begun"][1:]
    by_hand = Normed()
    by_hand.load_state_dict(
        {name: torch.stack([w[name].double() for w in counted]).mean(0) for name in counted[0]}
    )  # fmt: skip
    update_bn([*batches(0), *batches(1)], by_hand.net)
    for name, tensor in by_hand.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(found["average"][name], tensor)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_schedule_free_optimizers_go_on_exactly(run_of: Any, strategy: str) -> None:
    whole = run_of(f"schedule-free, {strategy}")
    resumed = run_of(f"schedule-free, {strategy} resumed")
    pairs = zip(whole["history"][SAVED_AFTER:], resumed["history"], strict=True)
    assert all(equal(one, other) for one, other in pairs)
    assert equal(whole["after the fit"], resumed["after the fit"])
    assert not equal(whole["after the fit"], whole["history"][-1])
    by_hand = ScheduleFree()
    by_hand.load_state_dict(whole["after the fit"])
    torch.testing.assert_close(whole["evaluated"][-1], by_hand.net(batches(7)[0]))


@pytest.mark.slow
def test_schedule_free_optimizers_are_refused_by_name(run_of: Any) -> None:
    told = run_of("schedule-free, deepspeed")
    assert "deepspeed" in told
    assert "AdamWScheduleFree" in told
