from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
)
from loopwright.framework import Module, Trainer
from tests.strategies.distributed import in_processes


class Net(Module):
    """Two layers under AdamW, whose weight decay moves what a mask hides, too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 8)
        self.body = nn.Sequential(self.first, nn.Tanh())
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.body(batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

    @property
    def weights(self) -> list[Tensor]:
        return [self.first.weight, self.head.weight]

    def zeros(self) -> list[int]:
        return [int((weight == 0).sum()) for weight in self.weights]


def loader() -> DataLoader[Any]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=2)


def fit(module: Module, *callbacks: Callback, **options: Any) -> Trainer:
    has_saver = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=has_saver,
        gradient_clip_val=0.5,
        **{"max_epochs": 3, "num_sanity_val_steps": 1, **options},
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


class ByHand(Callback):
    """The same by torch's functions."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        parameters = [(pl_module.body[0], "weight"), (pl_module.head, "weight")]
        prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.5)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        prune.remove(pl_module.body[0], "weight")
        prune.remove(pl_module.head, "weight")


def weights_only(**options: Any) -> ModelPruning:
    defaults: dict[str, Any] = {
        "pruning_fn": "l1_unstructured",
        "parameter_names": ["weight"],
        "use_lottery_ticket_hypothesis": False,
    }
    return ModelPruning(**{**defaults, **options})


def test_weights_are_those_of_pruning_by_hand():
    expected, module = Net(), Net()
    fit(expected, ByHand())
    fit(module, weights_only())
    for weight, other in zip(module.weights, expected.weights, strict=True):
        assert torch.equal(weight, other)
        assert isinstance(weight, nn.Parameter)
    # Half of what is left, three times, of 40 weights.
    assert sum(module.zeros()) == 35


@pytest.mark.parametrize("permanent", [True, False])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, permanent: bool):
    options: dict[str, Any] = {
        "make_pruning_permanent": permanent,
        "use_lottery_ticket_hypothesis": lambda epoch: epoch == 1,
    }
    whole = Net()
    fit(whole, weights_only(**options), max_epochs=4)
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6)
    ends = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True)
    fit(Net(), weights_only(**options), steps, ends, max_epochs=2)
    # In the middle of the second epoch, and at the end of it, when masks were made.
    for path in (tmp_path / "step=6.ckpt", tmp_path / "end.ckpt"):
        resumed = Net(seed=7)
        fit(resumed, weights_only(**options), ckpt_path=path, max_epochs=4)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (path, name)


def test_checkpoints_hold_masks_or_pruned_weights(tmp_path: Path):
    for permanent in (True, False):
        folder = tmp_path / str(permanent)
        saver = ModelCheckpoint(folder, every_n_epochs=1)
        pruning = weights_only(make_pruning_permanent=permanent)
        module = Net()
        trainer = fit(module, pruning, saver, max_epochs=2)
        has_masks = hasattr(module.head, "weight_mask")
        assert has_masks is not permanent
        copy.deepcopy(module)
        path = saver.best_model_path
        other = Net(seed=5)
        if permanent:
            # The saved model needs no pruning, nor does a run that goes on with it.
            loaded = Net.load_from_checkpoint(path)
            assert loaded.zeros() == module.zeros()
            fit(other, ckpt_path=path, max_epochs=3)
            assert sum(other.zeros()) == 0
            continue
        value = trainer.validate(module, loader(), verbose=False)
        evaluated = Trainer(accelerator="cpu", logger=False, callbacks=weights_only())
        assert evaluated.validate(other, loader(), ckpt_path=path, verbose=False) == value  # fmt: skip
        assert sum(other.zeros()) == sum(module.zeros()) == 30


def test_another_fit_goes_on_pruning_and_another_model_begins_anew():
    pruning = weights_only(amount=0.25)
    module = Net()
    trainer = fit(module, pruning, max_epochs=1)
    assert sum(module.zeros()) == 10
    trainer.max_epochs = 2
    trainer.fit(module, loader())
    assert sum(module.zeros()) == 18  # and a quarter of the other 30, rounded
    other = Net()
    trainer.max_epochs = 1
    trainer.fit(other, loader())
    assert sum(other.zeros()) == 10


def test_the_winning_ticket_has_its_first_values():
    first, module = Net(), Net()
    fit(module, ModelPruning("l1_unstructured", amount=0.5), max_epochs=1)
    for weight, original in zip(module.weights, first.weights, strict=True):
        kept = weight != 0
        assert torch.equal(weight[kept], original[kept])
    again = Net()
    fit(again, ModelPruning("l1_unstructured", resample_parameters=True), max_epochs=1)
    for weight, original in zip(again.weights, first.weights, strict=True):
        assert not torch.equal(weight[weight != 0], original[weight != 0])


def test_rows_are_pruned_and_told(caplog: pytest.LogCaptureFixture):
    module = Net()
    pruning = ModelPruning(
        "ln_structured",
        [(module.first, "weight")],
        use_global_unstructured=False,
        amount=lambda epoch: 2 if epoch == 1 else 0,
        pruning_dim=0,
        pruning_norm=1,
        verbose=2,
        prune_on_train_epoch_end=False,
    )
    with caplog.at_level(logging.INFO, "loopwright"):
        fit(module, pruning)
    assert int(torch.all(module.first.weight == 0, dim=1).sum()) == 2
    told = [line for line in caplog.messages if line.startswith("Applied")]
    assert told == [
        "Applied `ln_structured`. Pruned: 0/32 (0.00%) -> 8/32 (25.00%)",
        "Applied `ln_structured` to `Linear(in_features=4, out_features=8, bias=True).weight` with amount=2. "
        "Pruned: 0 (0.00%) -> 8 (25.00%)",
    ]


def test_two_of_them_and_a_method_of_ones_own():
    class Negative(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def __init__(self, amount: float) -> None:
            self.amount = amount

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask * (t >= 0)

    module = Net()
    negative = weights_only(pruning_fn=Negative)
    fit(module, weights_only(amount=0.1), negative, max_epochs=1)
    assert all(bool((weight >= 0).all()) for weight in module.weights)
    with pytest.raises(ValueError, match="under the same key 'ModelPruning"):
        fit(module, weights_only(), weights_only())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_fn": "l3"}, "isn't available in PyTorch's"),
        ({"pruning_fn": {}}, r"expected to be a str in \["),
        ({"pruning_fn": "random_structured"}, "pruning_dim should be provided"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0}, "`pruning_norm` should be"),
        (
            {"pruning_fn": "random_structured", "pruning_dim": 0},
            "supported with `use_global_unstructured=True`",
        ),
        (
            {"pruning_fn": prune.L1Unstructured, "use_global_unstructured": False},
            "currently only supported with",
        ),
        (
            {"parameter_names": ["chocolate"]},
            r"chocolate isn't in \('weight', 'bias'\)",
        ),
        ({"verbose": 3}, r"must be any of \(0, 1, 2\)"),
        ({"amount": "half"}, "be either an int, a float or a function; got 'half'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelPruning(**{"pruning_fn": "l1_unstructured", **arguments})


def test_an_average_beside_it_is_refused():
    message = "ModelPruning and EMAWeightAveraging exclude each other"
    with pytest.raises(ValueError, match=message):
        fit(Net(), weights_only(), EMAWeightAveraging())


def test_parameters_that_the_model_lacks():
    with pytest.raises(ValueError, match="should either be list of tuple"):
        fit(Net(), weights_only(parameters_to_prune=["head"]))
    with pytest.raises(ValueError, match=r"missing modules: \[Linear"):
        fit(Net(), weights_only(parameters_to_prune=[(nn.Linear(1, 1), "weight")]))
    module = Net()
    with pytest.raises(ValueError, match=r"missing parameters: \['wait'\]"):
        fit(module, weights_only(parameters_to_prune=[(module.head, "wait")]))


def scenes(folder: Path) -> list[Tensor]:
    """Prune at random in two processes, save, and resume; returns the main one's weights."""
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    results = []
    for epochs, path in ((3, None), (2, None), (3, folder / "last.ckpt")):
        module = Net()
        pruning = ModelPruning("random_unstructured", amount=0.25)
        saver = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
        trainer = fit(module, pruning, saver, max_epochs=epochs, ckpt_path=path, **two)
        file = folder / f"weights-{len(results)}-{trainer.global_rank}.pt"
        torch.save(module.state_dict(), file)
        results.append(module.head.weight.detach())
    with pytest.raises(ValueError, match="'fsdp' keeps parameters in shards"):
        fit(Net(), ModelPruning("l1_unstructured"), devices=2, strategy="fsdp")
    return results


@pytest.mark.slow
def test_all_processes_have_the_same_masks_and_resume_with_them(tmp_path: Path):
    in_processes(2, scenes, tmp_path)
    for run in range(3):
        own = [torch.load(tmp_path / f"weights-{run}-{rank}.pt") for rank in range(2)]
        assert (own[0]["head.weight"] == 0).any()
        for name, value in own[0].items():
            assert torch.equal(own[1][name], value)
    whole, resumed = (torch.load(tmp_path / f"weights-{run}-0.pt") for run in (0, 2))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
