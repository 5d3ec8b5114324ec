"""Validation, test and prediction give the same at any number of processes, to the last sample."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassF1Score,
)

from loopwright.callbacks import Callback
from loopwright.framework import Module
from tests.strategies.distributed import all_in_processes, in_processes, quiet

SAMPLES, FEATURES, CLASSES = 101, 5, 3


def data(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(
        x,
        torch.randint(CLASSES, (samples,), generator=generator),
        torch.arange(samples),
    )


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.auroc = nn.ModuleList(
            BinaryAUROC() for _ in range(2)
        )  # keeps all predictions in lists
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(CLASSES, average="micro"),
                "f1": MulticlassF1Score(CLASSES),
            }
        )
        self.mean = MeanMetric()

    def evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y, _ = batch
        logits = self.layer(self.norm(x))
        self.log("loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("lowest", logits.min(), reduce_fx="min")
        self.log("highest", logits.max(), reduce_fx="max")
        self.log(
            "samples",
            float(len(y)),
            reduce_fx="sum",
            on_step=True,
            on_epoch=True,
            sync_dist=True,
        )
        auroc: Any = self.auroc[dataloader_idx]
        auroc.update(logits[:, 0].sigmoid(), (y == 0).long())
        self.log("auroc", auroc)
        self.mean.update(logits)
        if dataloader_idx == 0:
            self.metrics.update(logits, y)
            self.log_dict(cast("Any", self.metrics), add_dataloader_idx=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layer(self.norm(batch[0])), batch[1])

    validation_step = test_step = evaluate

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.mean)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"logits": self.layer(self.norm(batch[0])), "index": batch[2]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    def __iter__(self):
        samples = data()
        yield from (samples[index] for index in range(len(samples)))


def loaders(samples: int = SAMPLES) -> list[DataLoader]:
    # Forked, as in a script's processes; in those that are spawned, as here, each worker would import all again.
    forked = {"num_workers": 1, "multiprocessing_context": "fork"}
    return [DataLoader(data(samples), 8), DataLoader(data(20), 6, **forked)]


def evaluate() -> dict[str, Any]:
    module, trainer = Net(), quiet()
    results: dict[str, Any] = {
        "validate": trainer.validate(module, loaders(), verbose=False),
        "test": trainer.test(module, loaders(), verbose=False),
        "shuffled": trainer.test(
            module, DataLoader(data(), 8, shuffle=True), verbose=False
        ),
        "stream": trainer.test(module, DataLoader(Stream(), 8), verbose=False),
        "few": trainer.test(
            module, loaders(samples=3), verbose=False
        ),  # fewer batches than processes
        "limited": quiet(limit_test_batches=5).test(module, loaders(), verbose=False),
        "predict": trainer.predict(module, loaders(), return_predictions="all"),
        "predict one": trainer.predict(module, loaders()[0], return_predictions="all"),
    }
    own: Any = trainer.predict(module, loaders()[0])
    results["own"] = trainer.strategy.gather_objects(
        [batch["index"].tolist() for batch in own]
    )
    results["ranks agree"] = all(
        str(other) == str(results["validate"])
        for other in trainer.strategy.gather_objects(results["validate"])
    )
    return results


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return evaluate()


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    """Two processes, which are started once."""
    calls = {
        "evaluate": (evaluate,),
        "fit": (fit_with_validation,),
        "nested": (runs_in_hooks,),
    }
    return all_in_processes(2, calls)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_exact_at_any_number_of_processes(
    one: dict[str, Any], two: dict[str, Any], processes: int
):
    several = two["evaluate"] if processes == 2 else in_processes(processes, evaluate)
    assert several["ranks agree"]
    assert several["own"] == [
        one["own"][0][rank::processes] for rank in range(processes)
    ]
    assert several.keys() == one.keys()
    assert len(one["validate"]) == 2
    assert one["validate"][0]["samples_epoch/dataloader_idx_0"] == SAMPLES
    for name in one.keys() - {"own", "ranks agree"}:
        if name.startswith("predict"):
            flat_one, flat_several = (_flat(found[name]) for found in (one, several))
            assert len(flat_one) == len(flat_several)
            assert all(
                a.equal(b) for a, b in zip(flat_one, flat_several, strict=True)
            ), name
        else:
            assert len(several[name]) == len(one[name])
            for got, expected in zip(several[name], one[name], strict=True):
                assert_equal_values(got, expected, to_rounding=name == "shuffled")


def assert_equal_values(
    got: dict[str, float], expected: dict[str, float], to_rounding: bool
) -> None:
    """Values of the same samples. What is summed in another order may round otherwise.

    A torchmetric sums 32-bit numbers as it meets them, so its order depends on the number of processes. What ``log``
    sums itself it sums in 64 bits, which hold the sum of a few 32-bit numbers exactly, in whatever order.
    """
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if to_rounding or name.startswith(("mean", "auroc")):
            assert got[name] == pytest.approx(value, rel=1e-6), name
        else:
            assert got[name] == value, name


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value
    return [tensor for child in children for tensor in _flat(child)]


def fit_with_validation() -> list[Any]:
    module, trainer = Net(), quiet(max_epochs=2, limit_val_batches=4)
    trainer.fit(
        module, DataLoader(data(88), 8), loaders()
    )  # 11 batches: the last round has one process idle
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    logged = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if "samples_step" not in name
    }
    again = quiet(limit_val_batches=4).validate(module, loaders(), verbose=False)
    assert {**again[0], **again[1]}.items() <= logged.items(), (
        "an idle process validates"
    )
    alone = quiet().validate(module, loaders()[0], verbose=False)
    return trainer.strategy.gather_objects((logged, buffers, alone))


def test_running_statistics_are_the_same_everywhere_when_it_is_validated(
    two: dict[str, Any],
):
    (logged, buffers, alone), (logged_1, buffers_1, alone_1) = two["fit"]
    assert logged == logged_1
    assert alone == alone_1
    assert all(buffers[name].equal(buffers_1[name]) for name in buffers)
    assert buffers["norm.running_mean"].abs().max() > 0


class Evaluates(Callback):
    """Runs the module with another Trainer at the end of each training epoch, or inside the validation."""

    def __init__(self, hook: str, **arguments: Any) -> None:
        self.arguments, self.running, self.error = arguments, False, ""
        setattr(self, hook, self.run)

    def run(self, trainer: Any, module: Any) -> None:
        if self.running:
            return
        self.running = True
        inner = quiet(**self.arguments)
        try:
            inner.validate(module, loaders(30), verbose=False)
        except RuntimeError as error:
            self.error = str(error)
        if not self.error:
            inner.predict(module, loaders(30)[0])
        self.running = False


def runs_in_hooks() -> dict[str, Any]:
    def fit(*callbacks: Callback) -> list[Any]:
        module, trainer = Net(), quiet(max_epochs=2, callbacks=list(callbacks))
        trainer.fit(
            module, DataLoader(data(88), 8, shuffle=True), DataLoader(data(30), 8)
        )
        state = {name: value.clone() for name, value in module.state_dict().items()}
        logged = {
            name: float(value) for name, value in trainer.callback_metrics.items()
        }
        return trainer.strategy.gather_objects(
            (state, logged, module.trainer is trainer)
        )

    otherwise = Evaluates("on_train_epoch_end", precision="bf16-true")
    hooks = ("on_train_epoch_end", "on_validation_epoch_end")
    return {
        "none": fit(),
        **{hook: fit(Evaluates(hook)) for hook in hooks},
        "refused": fit(otherwise),
        "error": otherwise.error,
    }


def test_runs_in_hooks_leave_the_outer_one_as_it_was(two: dict[str, Any]):
    """In several processes, too; there, a module whose gradients are averaged is not converted."""
    found = two["nested"]
    for name in ("on_train_epoch_end", "on_validation_epoch_end", "refused"):
        for (state, logged, same), (expected, expected_log, _) in zip(
            found[name], found["none"], strict=True
        ):
            assert same
            assert logged == expected_log
            assert all(state[key].equal(expected[key]) for key in expected), name
    assert (
        "use the same precision and device, or run copy.deepcopy(module)"
        in found["error"]
    )
