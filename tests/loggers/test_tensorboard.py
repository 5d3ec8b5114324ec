from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import Trainer
from loopwright.loggers import TensorBoardLogger
from tests.callbacks.scripted import Scripted, fit, loader


def accumulator(logger: TensorBoardLogger | str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        logger if isinstance(logger, str) else logger.log_dir
    ).Reload()


def points(logger: TensorBoardLogger | str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = accumulator(logger)
    return {
        tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_points_of_a_run():
    logger = TensorBoardLogger("logs")
    run = fit(logger=logger, max_epochs=2)
    run.test(dataloaders=loader(), verbose=False)
    shown = points(logger)
    assert [step for step, _ in shown["train_loss"]] == list(range(1, 9))
    assert shown["val_loss"] == [(4, 3.0), (8, 2.0)]
    assert shown["test_loss"] == [(8, 0.5)]
    assert {value for _, value in shown["epoch"]} >= {0.0, 1.0}


def test_the_trainer_makes_one_by_itself():
    run = Trainer(accelerator="cpu", max_epochs=1)
    assert isinstance(run.logger, TensorBoardLogger)
    assert run.log_dir == os.path.join(os.getcwd(), "loopwright_logs", "version_0")
    assert not os.path.exists("loopwright_logs")


def test_nothing_is_made_before_the_first_row():
    logger = TensorBoardLogger("logs", name="a", version=3, sub_dir="inner")
    assert logger.log_dir == os.path.join("logs", "a", "version_3", "inner")
    assert (logger.root_dir, logger.sub_dir) == (os.path.join("logs", "a"), "inner")
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.state_dict()
    logger.finalize("failed")
    assert os.listdir() == []
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    assert "hparams.json" in os.listdir(logger.log_dir)
    assert points(logger)["loss"] == [(1, 1.0)]


def test_dicts_and_tensors_and_a_prefix():
    logger = TensorBoardLogger("logs", prefix="run")
    metrics: dict[str, Any] = {
        "loss": torch.tensor(0.25),
        "parts": {"a": 1.0, "b": 2.0},
    }
    logger.log_metrics(metrics, step=3)
    logger.finalize("success")
    assert points(logger) == {"run-loss": [(3, 0.25)]}
    assert points(os.path.join(logger.log_dir, "run-parts_b")) == {
        "run-parts": [(3, 2.0)]
    }
    with pytest.raises(
        ValueError, match="takes numbers and dicts of numbers; 'run-name' is 'x'"
    ):
        logger.log_metrics({"name": "x"}, step=4)  # type: ignore[dict-item] # that is the point


def test_a_writer_that_somebody_has_closed():
    logger = TensorBoardLogger("logs")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.experiment.close()
    logger.log_metrics({"loss": 2.0}, step=2)
    logger.finalize("success")
    # Files of one second are read in the order of their names, of which "10" stands before "9".
    assert sorted(points(logger)["loss"]) == [(1, 1.0), (2, 2.0)]
    with pytest.raises(
        ValueError, match="takes numbers and dicts of numbers; 'parts/a' is None"
    ):
        logger.log_metrics({"parts": {"a": None}}, step=3)  # type: ignore[dict-item] # that is the point


def hparams_of(logger: TensorBoardLogger) -> dict[str, Any]:
    """The values on TensorBoard's HParams page."""
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # type: ignore[attr-defined] # protobuf makes it at run time
    )

    events = accumulator(logger)
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    return {
        name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()
    }


def test_hyperparameters():
    class Tuned(Scripted):
        def __init__(self, lr: float, model: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters()

    logger = TensorBoardLogger("logs")
    fit(
        module=Tuned(0.1, {"width": 8, "name": "wide", "dtype": torch.float32}),
        logger=logger,
    )
    assert hparams_of(logger) == {
        "lr": 0.1,
        "model/width": 8,
        "model/name": "wide",
        "model/dtype": "torch.float32",
    }
    assert points(logger)["hp_metric"] == [(0, -1.0)]
    assert (
        json.loads(Path(logger.log_dir, "hparams.json").read_text())["model"]["width"]
        == 8
    )
    assert logger.hparams["lr"] == 0.1


def test_hyperparameters_with_results():
    logger = TensorBoardLogger("logs")
    logger.log_hyperparams({"lr": 0.1})
    logger.log_hyperparams({"lr": 0.1}, {"accuracy": 0.5})
    logger.finalize("success")
    assert points(logger) == {"accuracy": [(0, 0.5)]}
    assert hparams_of(logger) == {"lr": 0.1}
    silent = TensorBoardLogger("logs", default_hp_metric=False)
    silent.log_hyperparams({"lr": 0.1})
    silent.finalize("success")
    assert points(silent) == {}
    assert "hparams.json" in os.listdir(silent.log_dir)


def test_results_beside_hyperparameters_have_their_curves_names():
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # type: ignore[attr-defined] # protobuf makes it at run time
    )

    logger = TensorBoardLogger("logs", prefix="run")
    logger.log_hyperparams({"lr": 0.1}, {"accuracy": 0.5})
    logger.finalize("success")
    content = accumulator(logger).SummaryMetadata(EXPERIMENT_TAG).plugin_data.content
    shown = HParamsPluginData.FromString(content).experiment.metric_infos
    assert [info.name.tag for info in shown] == ["run-accuracy"]
    assert points(logger) == {"run-accuracy": [(0, 0.5)]}


@pytest.mark.parametrize("saved_at", ["epoch=0-step=3", "epoch=1-step=6"])
def test_a_resumed_run_shows_each_point_once(saved_at: str):
    class Tuned(Scripted):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1)

    torch.manual_seed(0)
    fit(
        keep(), module=Tuned(), logger=(killed := TensorBoardLogger("logs"))
    )  # its checkpoints and later rows are there
    expected = points(killed)
    resumed = TensorBoardLogger("logs")
    fit(keep(), module=Tuned(), logger=resumed, ckpt_path=f"kept/{saved_at}.ckpt")
    assert resumed.version == 0
    shown = points(resumed)
    assert shown.keys() == expected.keys()
    assert {tag: sorted(values) for tag, values in shown.items()} == {
        t: sorted(v) for t, v in expected.items()
    }


@pytest.mark.parametrize("arguments", [{"save_dir": "others"}, {"version": 7}])
def test_a_resumed_run_elsewhere_begins_anew(arguments: dict[str, Any]):
    first = TensorBoardLogger("logs")
    fit(ModelCheckpoint("kept"), logger=first, max_epochs=1)
    os.makedirs("others/loopwright_logs/version_0")
    resumed = TensorBoardLogger(**{"save_dir": "logs", **arguments})
    fit(
        ModelCheckpoint("kept"),
        logger=resumed,
        max_epochs=2,
        ckpt_path="kept/epoch=0-step=4.ckpt",
    )
    assert os.listdir("others/loopwright_logs/version_0") == []
    assert [step for step, _ in points(first)["train_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in points(resumed)["train_loss"]] == [5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's tracing
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning"
)  # that random numbers differ from call to call
def test_the_graph_on_request():
    class Noisy(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * torch.rand(())

    torch.manual_seed(1)
    fit(module=(plain := Noisy()))
    torch.manual_seed(1)
    fit(
        module=(drawn := Noisy()),
        logger=(logger := TensorBoardLogger("logs", log_graph=True)),
    )
    assert accumulator(logger).Tags()["graph"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.parameters(), drawn.parameters(), strict=True)
    )


def test_no_graph_unless_asked_for_or_possible(caplog: pytest.LogCaptureFixture):
    TensorBoardLogger("logs").log_graph(nn.Linear(1, 1), torch.zeros(1, 1))
    TensorBoardLogger("logs", log_graph=True).log_graph(nn.Linear(1, 1))
    assert "needs module.example_input_array" in caplog.text
    assert os.listdir() == []


def test_users_may_use_the_writer():
    logger = TensorBoardLogger("logs")
    logger.experiment.add_text("note", "hello", 1)
    logger.finalize("success")
    assert accumulator(logger).Tags()["tensors"] == ["note/text_summary"]


def test_it_can_be_copied_and_pickled_while_it_writes():
    logger = TensorBoardLogger("logs")
    logger.log_metrics({"loss": 1.0}, step=1)
    for copied in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert copied.log_dir == logger.log_dir
    logger.finalize("success")


def test_without_tensorboard_the_way_out_is_named():
    script = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *a: None if name == 'tensorboard' else find(name, *a)\n"
        "from loopwright.loggers import TensorBoardLogger\n"
        "TensorBoardLogger('logs')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (
        "ModuleNotFoundError: TensorBoardLogger needs tensorboard: pip install tensorboard"
        in run.stderr
    )


def test_constructing_it_imports_nothing_heavy():
    script = (
        "import sys, torch\n"
        "from loopwright.loggers import CSVLogger, TensorBoardLogger\n"
        "TensorBoardLogger('logs'), CSVLogger('logs')\n"
        "print([m for m in ('tensorboard', 'torch.utils.tensorboard', 'fsspec', 'pandas') if m in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_rows_without_a_step_are_numbered():
    logger = TensorBoardLogger("logs")
    for values, step in (({"a": 1.0}, None), ({"a": 2.0}, 7), ({"a": 3.0}, None)):
        logger.log_metrics(values, step)
    logger.finalize("success")
    assert points(logger) == {"a": [(0, 1.0), (7, 2.0), (8, 3.0)]}
