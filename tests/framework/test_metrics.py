"""What ``self.log`` keeps, under which names, and where it shows."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, MinMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

from loopwright.callbacks import Callback
from loopwright.framework import Module, Trainer
from loopwright.framework.metrics.values import CHUNK
from loopwright.loggers import CSVLogger, Logger
from tests.framework.models import Linear, loader, quiet

VALUES = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])


def values(batch_size: int = 2) -> DataLoader[Any]:
    """1, 2, 4, 8, 16 in batches: with the default size, the last batch has one."""
    return DataLoader(TensorDataset(VALUES), batch_size=batch_size)


class Logs(Module):
    """Calls ``log(module, batch, batch_idx)`` in each kind of step."""

    def __init__(
        self,
        train: Callable[..., Any] | None = None,
        evaluate: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.train_log, self.evaluate_log = train, evaluate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.train_log is not None:
            self.train_log(self, batch[0], batch_idx)
        return self.weight * 1.0

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.evaluate_log is not None:
            self.evaluate_log(self, batch[0], batch_idx)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rows(Logger):
    """Keeps its rows as (step, values without the epoch)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        # Rows of validation steps have no epoch.
        if "epoch" in metrics:
            self.epochs.append(int(metrics["epoch"]))
        self.rows.append(
            (step, {name: value for name, value in metrics.items() if name != "epoch"})
        )


class AtEachBatch(Callback):
    """What callback_metrics held after each training batch."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.found.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        )


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def fit(
    train: Callable[..., Any] | None = None,
    evaluate: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    trainer = quiet(log_every_n_steps=1, **kwargs)
    trainer.fit(
        Logs(train, evaluate), values(), values() if evaluate is not None else None
    )
    return trainer


# -- steps and epochs -----------------------------------------------------------------------------------------------

MEAN = (1 + 2 + 4 + 8 + 16) / 5


@pytest.mark.parametrize(
    ("options", "callback", "rows"),
    [
        ({}, {"x": 16}, [(1, {"x": 1.5}), (2, {"x": 6}), (3, {"x": 16})]),
        ({"on_step": False, "on_epoch": True}, {"x": MEAN}, [(3, {"x": MEAN})]),
        (
            {"on_epoch": True},
            {"x": MEAN, "x_step": 16, "x_epoch": MEAN},
            [
                (1, {"x_step": 1.5}),
                (2, {"x_step": 6}),
                (3, {"x_step": 16}),
                (3, {"x_epoch": MEAN}),
            ],
        ),
        ({"logger": False}, {"x": 16}, []),
    ],
)
def test_training(
    options: dict[str, Any], callback: dict[str, float], rows: list[Any]
) -> None:
    """By default the step's value; with on_epoch the epoch's mean, each sample counting once."""
    logger = Rows()
    trainer = fit(
        lambda module, x, i: module.log("x", x.mean(), **options), logger=logger
    )
    assert floats(trainer.callback_metrics) == pytest.approx(callback)
    assert logger.rows == [(step, pytest.approx(row)) for step, row in rows]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_evaluation(stage: str) -> None:
    """By default the epoch's mean, exact with a smaller last batch."""
    logger = Rows()

    def log(module: Module, x: Tensor, batch_idx: int) -> None:
        module.log("x", x.mean())

    trainer = quiet(logger=logger)
    if stage == "fit":
        trainer.fit(Logs(None, log), values(), values())
    else:
        results = getattr(trainer, stage)(Logs(None, log), values(), verbose=False)
        assert results == [{"x": pytest.approx(MEAN)}]
    assert floats(trainer.callback_metrics) == {"x": pytest.approx(MEAN)}
    assert logger.rows == [(3 if stage == "fit" else 0, {"x": pytest.approx(MEAN)})]


def test_on_step_in_evaluation() -> None:
    """Gives both names; the plain one is the epoch's."""
    trainer = quiet()
    trainer.validate(
        Logs(None, lambda m, x, i: m.log("x", x.mean(), on_step=True)),
        values(),
        verbose=False,
    )
    assert floats(trainer.callback_metrics)["x_epoch"] == pytest.approx(MEAN)
    assert floats(trainer.callback_metrics)["x"] == pytest.approx(MEAN)


@pytest.mark.parametrize(
    ("reduce_fx", "result"),
    [
        ("mean", MEAN), ("avg", MEAN), (torch.mean, MEAN),
        ("sum", 1.5 + 6 + 16), (torch.sum, 1.5 + 6 + 16),
        ("min", 1.5), (min, 1.5), (torch.min, 1.5),
        ("max", 16), (max, 16), (torch.max, 16),
    ],
)  # fmt: skip
def test_reduce_fx(reduce_fx: Any, result: float) -> None:
    """Only the mean is weighted by the batch's size."""
    trainer = fit(None, lambda m, x, i: m.log("x", x.mean(), reduce_fx=reduce_fx))
    assert floats(trainer.callback_metrics)["x"] == pytest.approx(result)


def test_batch_size() -> None:
    """Given, it is the weight; else it is found in the batch, however nested."""
    trainer = fit(None, lambda m, x, i: m.log("x", x.mean(), batch_size=i + 1))
    assert floats(trainer.callback_metrics)["x"] == pytest.approx(
        (1.5 + 2 * 6 + 3 * 16) / 6
    )

    class Nested(Logs):
        def validation_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.log("x", batch["a"]["b"].mean())

    batches = [{"a": {"b": x, "n": "text"}, "c": [x]} for (x,) in values()]
    assert quiet().validate(Nested(), batches, verbose=False) == [
        {"x": pytest.approx(MEAN)}
    ]


def test_many_steps_are_exact() -> None:
    """A thousand values of very unlike size, folded on the way: the mean to float64's precision."""
    numbers = torch.rand(1000, dtype=torch.float64) * 10.0 ** torch.randint(
        -6, 6, (1000,)
    )
    module = Logs(None, lambda m, x, i: m.log("x", x.sum()))
    trainer = quiet()
    trainer.validate(module, DataLoader(TensorDataset(numbers)), verbose=False)
    assert float(trainer.callback_metrics["x"]) == pytest.approx(
        numbers.mean().item(), rel=1e-12
    )


def test_epochs_begin_anew() -> None:
    """Nothing of one epoch is in the next one's mean."""
    logger = Rows()

    def log(module: Module, x: Tensor, batch_idx: int) -> None:
        module.log("x", float(module.current_epoch), on_step=False, on_epoch=True)

    fit(log, logger=logger, max_epochs=3)
    assert logger.rows == [(3, {"x": 0}), (6, {"x": 1}), (9, {"x": 2})]
    assert logger.epochs == [0, 1, 2]


@pytest.mark.parametrize(
    "value",
    [3, 3.0, True + 2, torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3.0]]), np.float32(3), np.int64(3),
     torch.tensor(3.0, requires_grad=True), torch.tensor(3, dtype=torch.float16)],
)  # fmt: skip
def test_kinds_of_numbers(value: Any) -> None:
    """Python's, NumPy's, and tensors of one element; kept without their graph."""
    trainer = fit(lambda m, x, i: m.log("x", value, on_epoch=True))
    metrics = trainer.callback_metrics
    assert floats(metrics) == {"x": 3, "x_step": 3, "x_epoch": 3}
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_tensor_that_changes_afterwards() -> None:
    """What was logged stays."""

    def log(module: Any, x: Tensor, batch_idx: int) -> None:
        value = x.mean()
        module.log("x", value, on_epoch=True)
        value.zero_()

    assert floats(fit(log).callback_metrics)["x_epoch"] == pytest.approx(MEAN)


def test_enable_graph() -> None:
    """The value keeps its graph when asked to."""
    found: list[bool] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            found.append(trainer.callback_metrics["x"].requires_grad)

    module = Logs(lambda m, x, i: m.log("x", m.weight * 2, enable_graph=bool(i)))
    quiet(Looks()).fit(module, values())
    assert found == [False, True, True]


def test_logging_changes_nothing() -> None:
    """Neither random numbers nor weights."""
    noisy, silent = (
        Logs(lambda m, x, i: m.log("x", m.weight, on_epoch=True, prog_bar=True)),
        Logs(),
    )
    states = []
    for module in (noisy, silent):
        torch.manual_seed(3)
        quiet().fit(module, values())
        states.append((torch.get_rng_state(), module.weight.detach()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


# -- where it shows -------------------------------------------------------------------------------------------------


def test_prog_bar() -> None:
    """progress_bar_metrics holds what was logged for the bar, as numbers."""
    trainer = fit(lambda m, x, i: (m.log("a", 1.0, prog_bar=True), m.log("b", 2.0)))
    assert trainer.progress_bar_metrics == {"a": 1.0}
    assert floats(trainer.logged_metrics) == {"a": 1.0, "b": 2.0}


def test_plain_name_inside_an_epoch() -> None:
    """With on_step and on_epoch, it is the step's value until the epoch has one."""
    watch = AtEachBatch()
    trainer = quiet(watch, max_epochs=2)
    trainer.fit(Logs(lambda m, x, i: m.log("x", x.mean(), on_epoch=True)), values())
    assert [found["x"] for found in watch.found] == [1.5, 6, 16] * 2
    assert [found.get("x_epoch") for found in watch.found] == [None] * 3 + [
        pytest.approx(MEAN)
    ] * 3
    assert floats(trainer.callback_metrics)["x"] == pytest.approx(MEAN)


def test_rows_of_a_csv_file(tmp_path: Path) -> None:
    """Steps, validation, epochs: what a real file holds at the end."""

    def train(module: Module, x: Tensor, batch_idx: int) -> None:
        module.log("loss", x.mean(), on_step=True, on_epoch=True)
        module.log("hidden", 1.0, logger=False)

    logger = CSVLogger(tmp_path)
    trainer = quiet(logger=logger, log_every_n_steps=2, max_epochs=2)
    trainer.fit(Logs(train, lambda m, x, i: m.log("val", x.mean())), values(), values())
    with open(logger.metrics_file_path, newline="") as file:
        rows = [
            {name: float(v) for name, v in row.items() if v}
            for row in csv.DictReader(file)
        ]
    assert rows == [
        pytest.approx(row)
        for row in (
            {"epoch": 0, "step": 2, "loss_step": 6},
            {"epoch": 0, "step": 3, "val": MEAN},
            {"epoch": 0, "step": 3, "loss_epoch": MEAN},
            {"epoch": 1, "step": 4, "loss_step": 1.5},
            {"epoch": 1, "step": 6, "loss_step": 16},
            {"epoch": 1, "step": 6, "val": MEAN},
            {"epoch": 1, "step": 6, "loss_epoch": MEAN},
        )
    ]


def test_several_loaders() -> None:
    """Each value gets its loader's index; without it, one mean over all."""

    def log(module: Module, x: Tensor, batch_idx: int) -> None:
        module.log("x", x.mean())
        module.log("y", x.mean(), add_dataloader_idx=False)

    trainer = quiet()
    loaders = [values(), DataLoader(TensorDataset(torch.tensor([[31.0]])))]
    results = trainer.validate(Logs(None, log), loaders, verbose=False)
    both = pytest.approx((5 * MEAN + 31) / 6)
    assert results == [
        {"x/dataloader_idx_0": pytest.approx(MEAN), "y": both},
        {"x/dataloader_idx_1": 31, "y": both},
    ]


def test_log_in_hooks() -> None:
    """Outside of batches it is an epoch's value, in validation too."""

    class Hooks(Logs):
        def on_train_start(self) -> None:
            self.log("start", 1)

        def on_train_epoch_start(self) -> None:
            self.log("epoch_start", 2)

        def on_train_batch_end(self, *_: Any) -> None:
            self.log("batch_end", 3)

        def on_validation_epoch_end(self) -> None:
            self.log("val_end", 4)

        def on_train_epoch_end(self) -> None:
            assert "val_end" in self.trainer.callback_metrics
            self.log("epoch_end", 5)

    logger, trainer = Rows(), quiet()
    trainer.logger = logger
    trainer.fit(Hooks(), values(), values())
    assert floats(trainer.callback_metrics) == {
        "start": 1, "epoch_start": 2, "batch_end": 3, "val_end": 4, "epoch_end": 5
    }  # fmt: skip
    assert logger.rows == [
        (3, {"val_end": 4}),
        (3, {"start": 1, "epoch_start": 2, "epoch_end": 5}),
    ]


def test_callbacks_can_log() -> None:
    """Through the module."""

    class Watches(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Module, *_: Any) -> None:
            module.log("from_callback", 7.0)

    trainer = quiet(Watches())
    trainer.fit(Logs(), values())
    assert floats(trainer.callback_metrics) == {"from_callback": 7}


class Logging(Callback):
    """Logs by its own methods; it cannot be hashed, as dataclasses cannot."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.log("batch", float(batch_idx), on_step=False, on_epoch=True)
        self.log_dict({"a": 1, "b": 2.5}, prog_bar=True)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.log("val", 4, True)
        if trainer.state.fn == "fit":
            # Another run of the same callback, in between.
            quiet(self).validate(Logs(None, lambda *_: None), values(), verbose=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.log("end", 3)


def test_callbacks_log_by_themselves() -> None:
    """As by the module, in the run in which they take part; outside of runs that is an error."""
    callback = Logging()
    trainer = quiet(callback)
    trainer.fit(Logs(None, lambda *_: None), values(), values())
    assert floats(trainer.callback_metrics) == {
        "batch": 0.8, "a": 1, "b": 2.5, "val": 4, "end": 3
    }  # fmt: skip
    assert set(trainer.progress_bar_metrics) == {"a", "b", "val"}
    copy.deepcopy(callback)
    assert vars(callback) == {}, "what refers to the module would be pickled with it"
    quiet(callback, Logging()).fit(Logs(), values())
    with pytest.raises(RuntimeError, match="Logging logs while a Trainer runs"):
        callback.log("x", 1)


def test_validate_and_test_do_not_mix() -> None:
    """What a run logged before is gone from the results of the next."""
    trainer, module = quiet(), Logs(None, lambda m, x, i: m.log("x", x.mean()))
    trainer.validate(module, values(), verbose=False)
    module.evaluate_log = lambda m, x, i: m.log("y", x.mean())
    assert trainer.test(module, values(), verbose=False) == [{"y": pytest.approx(MEAN)}]


def test_after_a_failed_evaluation() -> None:
    """What it had logged is not in the next one's mean, nor in its metrics."""

    class Fails(Logs):
        def __init__(self) -> None:
            super().__init__()
            self.total = SumMetric()
            self.fails = True

        def validation_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.total.update(batch[0])
            self.log("x", batch[0].mean())
            self.log("total", self.total)
            if self.fails and batch_idx == 1:
                raise RuntimeError("once")

    trainer, module = quiet(), Fails()
    with pytest.raises(RuntimeError, match="once"):
        trainer.validate(module, values(), verbose=False)
    module.fails = False
    assert trainer.validate(module, values(), verbose=False) == [
        {"x": pytest.approx(MEAN), "total": 31}
    ]


def test_after_an_evaluation_that_failed_in_its_second_loader() -> None:
    """What is logged before the first batch of the next one belongs to no loader."""

    class Fails(Logs):
        fails = True

        def on_validation_epoch_start(self) -> None:
            self.log("start", 1.0)

        def validation_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if self.fails and dataloader_idx == 1:
                raise RuntimeError("once")

    trainer, module = quiet(), Fails()
    with pytest.raises(RuntimeError, match="once"):
        trainer.validate(module, [values(), values()], verbose=False)
    module.fails = False
    assert trainer.validate(module, values(), verbose=False) == [{"start": 1}]


# -- torchmetrics ---------------------------------------------------------------------------------------------------


class Metered(Logs):
    """A metric for training and a collection for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.extremes = MetricCollection({"min": MinMetric(), "max": MaxMetric()})
        self.total = SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean(batch[0] + 100 * self.current_epoch)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        return self.weight * 1.0

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.extremes.update(batch[0])
        self.total.update(batch[0])
        self.log_dict(cast("Any", self.extremes))
        self.log("total", self.total)


def test_metrics_are_computed_and_reset() -> None:
    """A Metric's own reduction at the epoch's end; each epoch and each validation anew."""
    logger = Rows()
    trainer = quiet(
        logger=logger, max_epochs=2, log_every_n_steps=1, num_sanity_val_steps=1
    )
    module = Metered()
    trainer.fit(module, values(), values())
    evaluation = {"min": 1, "max": 16, "total": 31}
    assert logger.rows == [
        (1, {"mean_step": 1.5}), (2, {"mean_step": 6}), (3, {"mean_step": 16}),
        (3, evaluation), (3, {"mean_epoch": pytest.approx(MEAN)}),
        (4, {"mean_step": 101.5}), (5, {"mean_step": 106}), (6, {"mean_step": 116}),
        (6, evaluation), (6, {"mean_epoch": pytest.approx(100 + MEAN)}),
    ]  # fmt: skip
    assert floats(trainer.callback_metrics)["mean"] == pytest.approx(100 + MEAN)
    assert module.total.update_count == 0


def test_the_sanity_check_leaves_metrics_alone() -> None:
    """Also one that is not logged, and so not reset."""

    class Unlogged(Metered):
        def validation_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.total.update(batch[0])

    module = Unlogged()
    quiet(num_sanity_val_steps=-1).fit(module, values(), values())
    assert module.total.compute() == 31


def test_log_dict() -> None:
    """Several numbers at once."""
    trainer = fit(
        None,
        lambda m, x, i: m.log_dict(
            {"a": x.min(), "b": x.max()}, prog_bar=True, reduce_fx="max"
        ),
    )
    assert (
        floats(trainer.callback_metrics)
        == trainer.progress_bar_metrics
        == {"a": 16, "b": 16}
    )


class OfClasses(Module):
    """Logs a metric that computes a dict by ``log(module, metrics)``."""

    def __init__(self, log: Callable[..., Any]) -> None:
        super().__init__()
        self.log_metrics = log
        self.layer = nn.Linear(3, 3)
        accuracy = MulticlassAccuracy(3, average=None)
        classes = ClasswiseWrapper(accuracy, labels=["red", "green", "blue"])
        self.metrics = MetricCollection(
            {"micro": MulticlassAccuracy(3, average="micro"), "each": classes}
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.metrics(*batch)
        self.log_metrics(self, self.metrics)
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metrics.update(*batch)
        self.log_metrics(self, self.metrics)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def colours() -> DataLoader[Any]:
    scores = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2])]
    return DataLoader(
        TensorDataset(scores, torch.tensor([0, 0, 1, 2, 2, 1])), batch_size=3
    )


def test_a_metric_that_computes_a_dict() -> None:
    """Each of its values under a name of its own, from a collection and alone; of steps, too."""
    each = {
        "each_multiclassaccuracy_red": 0.5,
        "each_multiclassaccuracy_green": 0.5,
        "each_multiclassaccuracy_blue": 1,
    }
    (found,) = quiet().validate(
        OfClasses(lambda m, metrics: m.log_dict(metrics)), colours(), verbose=False
    )
    assert found == pytest.approx({"micro": 4 / 6, **each})
    (found,) = quiet().validate(
        OfClasses(lambda m, metrics: m.log("each", metrics["each"])),
        colours(),
        verbose=False,
    )
    assert found == pytest.approx(each)


class Twice(SumMetric):
    """Computes a dict, of each batch too."""

    def compute(self) -> Any:
        return {"once": super().compute(), "twice": {"all": 2 * super().compute()}}


def test_values_of_steps_of_a_metric_that_computes_a_dict() -> None:
    """Under the names that a number would have."""

    def log(module: Any, x: Tensor, batch_idx: int) -> None:
        module.twice(x)
        module.log("x", module.twice, on_step=True, on_epoch=True)

    module, trainer = Logs(log), quiet()
    module.twice = Twice()
    trainer.fit(module, values())
    assert floats(trainer.callback_metrics) == {
        "x_once_step": 16, "x_once": 31, "x_once_epoch": 31,
        "x_twice_all_step": 32, "x_twice_all": 62, "x_twice_all_epoch": 62,
    }  # fmt: skip


class Several(SumMetric):
    """Computes what is no number."""

    computed: Any = None

    def compute(self) -> Any:
        return self.computed


@pytest.mark.parametrize(
    ("computed", "words"),
    [
        (
            torch.ones(3),
            r"compute\(\).*'m' must be a tensor of one element; got a tensor of shape \(3,\).*log_dict",
        ),
        (
            (torch.ones(2), torch.ones(2)),
            r"'m' must be a tensor of one element; got \(tensor",
        ),
    ],
)
def test_a_metric_that_computes_what_is_no_number(computed: Any, words: str) -> None:
    """The name, what it computed, and the way out."""
    module = Logs(evaluate=lambda m, x, i: m.log("m", m.several))
    module.several = Several()
    module.several.computed = computed
    with pytest.raises(ValueError, match=words):
        quiet().validate(module, values(), verbose=False)


def test_what_is_no_number_among_a_metrics_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Is left out, as MeanAveragePrecision's vector of classes; a line says so once in all epochs."""
    module = Logs(evaluate=lambda m, x, i: m.log("m", m.several))
    module.several = Several()
    module.several.computed = {
        "a": torch.ones(()),
        "classes": torch.ones(2),
        "b": {"c": 2, "d": "text"},
    }
    trainer = quiet(max_epochs=2)
    with caplog.at_level("WARNING", "loopwright"):
        trainer.fit(module, values(), values())
    assert floats(trainer.callback_metrics) == {"m_a": 1, "m_b_c": 2}
    assert [line for line in caplog.messages if "left out" in line] == [
        "log('m'): 'classes' is left out, as it is no number: a tensor of shape (2,)",
        "log('m_b'): 'd' is left out, as it is no number: 'text'",
    ]


def test_a_metric_that_computes_a_dict_for_one_loader_of_two() -> None:
    """Without the loader's index in its name, it stands in the results of the loader for which it was logged."""
    module: Any = Logs(
        evaluate=lambda m, x, i: m.log("x", m.twice, add_dataloader_idx=False)
    )
    module.twice = Twice()
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx, dataloader_idx: (
        dataloader_idx or step(batch, batch_idx)
    )
    found = quiet().validate(module, [values(), values()], verbose=False)
    assert [set(values) for values in found] == [{"x_once", "x_twice_all"}, set()]


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (
            lambda m, x, i: m.log("x", x),
            ValueError,
            r"must have one element; got shape \(2, 1\)",
        ),
        (
            lambda m, x, i: m.log("x", "text"),
            TypeError,
            "must be a number, a tensor or a Metric; got 'text'",
        ),
        (
            lambda m, x, i: m.log("x", {"a": 1}),
            TypeError,
            "got {'a': 1}; log_dict takes several",
        ),
        (lambda m, x, i: m.log(3, 1.0), TypeError, "name must be a str; got 3"),
        (
            lambda m, x, i: m.log("x", 1, on_step=False, on_epoch=False),
            ValueError,
            "would keep nothing; set one",
        ),
        (
            lambda m, x, i: m.log("x", 1, reduce_fx="median"),
            ValueError,
            "one of mean, sum, min, max, or a function.*got 'median'",
        ),
        (
            lambda m, x, i: m.log("x", 1, on_step=not i),
            ValueError,
            "was logged with on_step=True",
        ),
        (
            lambda m, x, i: m.log("x", 1, sync_dist_group=object()),
            ValueError,
            "sync_dist_group must be None",
        ),
        (
            lambda m, x, i: m.log("x", MeanMetric()),
            ValueError,
            "must be an attribute of the module",
        ),
    ],
)
def test_wrong_use(log: Any, error: type[Exception], message: str) -> None:
    """Raises at the call, naming the value and what is accepted."""
    with pytest.raises(error, match=message):
        fit(log)


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_start", "on_validation_epoch_end", "on_train_epoch_end"]
)
def test_on_step_outside_of_a_step(hook: str) -> None:
    """There is no step to log for."""

    class Wrong(Logs):
        pass

    setattr(Wrong, hook, lambda self: self.log("x", 1, on_step=True))
    with pytest.raises(ValueError, match="this is no step; use on_epoch=True"):
        quiet().fit(Wrong(), values(), values())


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_end", "predict_step"]
)
def test_where_nothing_can_be_logged(hook: str) -> None:
    """Says where it can."""

    class Wrong(Logs):
        pass

    setattr(Wrong, hook, lambda self, *_: self.log("x", 1))
    run = quiet().predict if hook == "predict_step" else quiet().fit
    with pytest.raises(
        RuntimeError, match="here has no effect: values can be logged in"
    ):
        run(Wrong(), values())


def test_a_batch_of_unclear_size() -> None:
    """Tensors that disagree need batch_size; step values do not."""
    batches = [(torch.ones(2), torch.ones(3))]
    log: Any = lambda m, x, i: m.log("x", 1.0, on_epoch=True)  # noqa: E731 # as those above
    with pytest.raises(
        ValueError, match=r"this batch has first dimensions \[2, 3\]; pass batch_size"
    ):
        quiet().fit(Logs(log), batches)
    quiet().fit(Logs(lambda m, x, i: m.log("x", 1.0)), batches)


def test_without_a_trainer() -> None:
    """A step that is called by hand still works, with a warning."""
    module = Logs(lambda m, x, i: m.log("x", 1.0))
    with pytest.warns(UserWarning, match="without a Trainer has no effect"):
        module.training_step([VALUES], 0)


def test_epoch_values_are_there_in_the_hooks_of_the_epochs_end() -> None:
    """For training and for validation; what is logged in the hook itself joins the same row."""
    seen: list[tuple[str, float]] = []

    class Reads(Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.seen_metric = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.log(
                "x",
                float(batch_idx + 10 * self.current_epoch),
                on_step=False,
                on_epoch=True,
                batch_size=1,
            )
            return self.weight.sum()

        def on_train_epoch_end(self):
            seen.append(("train", float(self.trainer.callback_metrics["x"])))

        def validation_step(self, batch, batch_idx):
            self.seen_metric.update(batch_idx)
            self.log("metric", self.seen_metric, batch_size=1)

        def on_validation_epoch_end(self):
            seen.append(("val", float(self.trainer.callback_metrics["metric"])))
            assert float(self.seen_metric.compute()) == 0.5  # not reset yet
            self.log("late", 7.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = CSVLogger(".")
    trainer = Trainer(
        max_epochs=2,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = [torch.ones(1)] * 2
    trainer.fit(Reads(), batches, batches)
    assert seen == [("val", 0.5), ("train", 0.5), ("val", 0.5), ("train", 10.5)]
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["late"]]
    assert [(row["metric"], row["late"]) for row in rows] == [("0.5", "7.0")] * 2


def test_results_of_each_loader_without_its_index_in_the_name() -> None:
    """What was logged in one loader's batches stands in that loader's results; the rest in all."""

    class Two(Linear):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log(f"only_{dataloader_idx}", 1.0, add_dataloader_idx=False)
            self.log(
                f"steps_{dataloader_idx}",
                2.0,
                on_step=True,
                on_epoch=True,
                add_dataloader_idx=False,
            )
            self.log("both", 3.0, add_dataloader_idx=False)
            self.log("indexed", 4.0)

        def on_test_epoch_end(self) -> None:
            self.log("late", 5.0)

    trainer = quiet()
    for _ in range(2):
        results = trainer.test(Two(), [loader(1), loader(1)], verbose=False)
        for index, found in enumerate(results):
            steps = {f"steps_{index}", f"steps_{index}_epoch"}
            assert set(found) == {
                f"only_{index}",
                *steps,
                "both",
                f"indexed/dataloader_idx_{index}",
                "late",
            }


def spread(values: Tensor) -> Tensor:
    """A reduction of one's own: all values of the epoch come together."""
    return values.max() - values.min()


@pytest.mark.parametrize(
    ("reduce_fx", "result"),
    [(spread, 14.5), (torch.median, 6.0), (lambda v: v[-1], 16.0), (len, 3.0), (sum, 23.5)],
)  # fmt: skip
def test_reductions_by_any_function(reduce_fx: Any, result: float) -> None:
    trainer = fit(None, lambda m, x, i: m.log("x", x.mean(), reduce_fx=reduce_fx))
    assert floats(trainer.callback_metrics)["x"] == pytest.approx(result)


def test_an_epoch_reduced_by_a_function_is_resumed(tmp_path: Path) -> None:
    """The values until then are in the checkpoint, and the function is that of the module; chunks are joined."""
    numbers = [torch.rand(1) for _ in range(CHUNK + 20)]

    def log(module: Any, x: Tensor, batch_idx: int) -> None:
        module.log("x", x.mean(), on_step=False, on_epoch=True, reduce_fx=spread)

    whole = quiet(max_epochs=1)
    whole.fit(Logs(log), numbers)
    cut = quiet(max_epochs=1, max_steps=CHUNK + 10)
    cut.fit(Logs(log), numbers)
    cut.save_checkpoint(tmp_path / "cut")
    resumed = quiet(max_epochs=1)
    resumed.fit(Logs(log), numbers, ckpt_path=tmp_path / "cut")
    expected = float(spread(torch.cat(numbers)))
    for trainer in (whole, resumed):
        assert float(trainer.callback_metrics["x"]) == pytest.approx(expected)


def test_rows_of_validation_steps(tmp_path: Path) -> None:
    """Their step counts the batches of the validations of a run, over a resume, too; sanity checks count nothing."""

    def log(module: Any, x: Tensor, batch_idx: int) -> None:
        module.log("both", x.mean(), on_step=True, on_epoch=True)
        module.log("step", float(batch_idx), on_step=True, on_epoch=False)

    rows: list[Any] = []
    for epochs, path in ((1, None), (2, tmp_path / "cut")):
        logger = Rows()
        trainer = quiet(logger=logger, max_epochs=epochs, num_sanity_val_steps=2)
        trainer.fit(Logs(None, log), values(), values(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "cut")
        rows += logger.rows
    steps = [(step, row) for step, row in rows if "both_step" in row]
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4, 5]
    assert [row for _, row in steps[:3]] == [
        {"both_step": 1.5, "step": 0.0},
        {"both_step": 6.0, "step": 1.0},
        {"both_step": 16.0, "step": 2.0},
    ]
    assert [step for step, row in rows if "both_epoch" in row] == [3, 6]
