"""Progress bars, summaries, profilers and pruning, as programs for Lightning override, patch and read them."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from loopwright.framework.compat.lightning import progress_bars
from loopwright.lightning import Trainer
from loopwright.lightning.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    RichProgressBarTheme,
    Timer,
    TQDMProgressBar,
)
from loopwright.lightning.demos import BoringModel, RandomDataset
from loopwright.lightning.loggers import CSVLogger
from loopwright.lightning.profilers import (
    AdvancedProfiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from loopwright.lightning.utilities import MisconfigurationException

pytest.importorskip("tqdm")

BARS = "loopwright.lightning.callbacks.progress.tqdm_progress"


def trainer_of(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    usual = {
        "max_epochs": 1,
        "limit_train_batches": 5,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return Trainer(**{**usual, **settings}, callbacks=[*callbacks])


class TwoLoaders(BoringModel):
    """Validates on two loaders, and prints."""

    def val_dataloader(self) -> Any:
        return [DataLoader(RandomDataset(32, 4)) for _ in range(2)]

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.print("in step", batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the bars' class is told, set in the module as a program sets it."""
    seen: list[tuple[str, Any]] = []

    class Recorded(progress_bars.Tqdm):
        def set_description(self, desc: Any = None, refresh: Any = True) -> None:
            seen.append((desc, self.total))

        @classmethod
        def write(cls, s: str, **_: Any) -> None:
            seen.append(("written", s))

    tqdm_progress = import_module(BARS)
    monkeypatch.setattr(tqdm_progress, "Tqdm", Recorded)
    return seen


def test_each_loader_has_its_bar(tmp_path: Path, recorded: list[tuple[str, Any]]):
    bar = TQDMProgressBar(refresh_rate=3)
    trainer_of(tmp_path, bar).fit(TwoLoaders())
    assert [each for each in recorded if each[0] != "written"] == [
        ("Sanity Checking DataLoader 0", 1),
        ("Sanity Checking DataLoader 1", 1),
        ("Epoch 0", 5),
        ("Validation DataLoader 0", 2),
        ("Validation DataLoader 1", 2),
    ]
    # They can be asked for when the run has ended.
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (5, 5)
    assert bar.val_progress_bar.n == 2
    with pytest.raises(TypeError, match="_test_progress_bar` reference has not been"):
        _ = bar.test_progress_bar
    assert ("written", "in step 0") in recorded


def test_prints_pass_bars_that_are_not_drawn(
    tmp_path: Path,
    recorded: list[tuple[str, Any]],
    capsys: pytest.CaptureFixture[str],
):
    trainer_of(tmp_path, TQDMProgressBar(refresh_rate=0)).fit(TwoLoaders())
    assert "in step 4" in capsys.readouterr().out
    assert not any(name == "written" for name, _ in recorded)


def test_bars_are_set_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TQDM_MINITERS", "7")
    monkeypatch.setenv("TQDM_POSITION", "2")
    bar = TQDMProgressBar(refresh_rate=3)
    assert (bar.refresh_rate, bar.process_position) == (7, 2)
    assert RichProgressBar(refresh_rate=0).is_disabled


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (1.0, "1.000"), (1e-5, "1e-5"), ("10", "10"), ("a", "a")],
)
def test_numbers_keep_their_width(number: Any, text: str):
    assert progress_bars.Tqdm.format_num(number) == text


def test_standard_metrics_are_the_loggers_version(tmp_path: Path):
    trainer = trainer_of(tmp_path, logger=CSVLogger(tmp_path, version=4))
    assert progress_bars.get_standard_metrics(trainer) == {"v_num": 4}
    assert progress_bars.get_standard_metrics(trainer_of(tmp_path)) == {}


def test_max_time_is_kept_by_a_timer(tmp_path: Path):
    trainer = trainer_of(tmp_path, max_time={"seconds": 1337})
    (timer,) = (each for each in trainer.callbacks if isinstance(each, Timer))
    assert timer.time_remaining() == 1337
    assert trainer.max_epochs == 1


def test_what_is_set_in_a_module_of_lightnings_counts(monkeypatch: pytest.MonkeyPatch):
    face = import_module(BARS)
    theirs = face.convert_inf
    monkeypatch.setattr(face, "convert_inf", lambda count: 3)
    assert progress_bars.convert_inf(9) == 3
    monkeypatch.undo()
    assert progress_bars.convert_inf is theirs


@pytest.mark.parametrize(
    ("callbacks", "settings", "message"),
    [
        (
            [TQDMProgressBar(), RichProgressBar()],
            {},
            "^You added multiple progress bar callbacks",
        ),
        (
            [TQDMProgressBar()],
            {"enable_progress_bar": False},
            "enable_progress_bar=False` but found `TQDMProgressBar",
        ),
        (
            [ModelCheckpoint()],
            {"enable_checkpointing": False},
            "`enable_checkpointing=False` but found `ModelCheckpoint`",
        ),
        ([], {"profiler": "other"}, "it can only be one of"),
    ],
)
def test_callbacks_that_exclude_each_other_are_misconfigurations(
    tmp_path: Path, callbacks: list[Any], settings: dict[str, Any], message: str
):
    with pytest.raises(MisconfigurationException, match=message):
        trainer_of(tmp_path, *callbacks, **settings)


def test_two_states_of_one_name_are_refused(tmp_path: Path):
    message = "more than one stateful callback of type `EarlyStopping`"
    with pytest.raises(RuntimeError, match=message):
        trainer_of(tmp_path, EarlyStopping("a"), EarlyStopping("a"))


class _Shown:
    found: Any = None


def _summary_of(parent: type) -> type:
    class Own(parent):
        @staticmethod
        def summarize(
            summary_data: Any,
            total_parameters: int,
            trainable_parameters: int,
            model_size: float,
            total_training_modes: dict[str, int],
            **kwargs: Any,
        ) -> None:
            names = dict(summary_data)["Name"]
            _Shown.found = (
                names,
                total_parameters,
                trainable_parameters,
                total_training_modes,
                kwargs["title"],
            )

    return Own


@pytest.mark.parametrize("parent", [ModelSummary, RichModelSummary])
def test_a_summary_is_shown_as_a_subclass_does(tmp_path: Path, parent: type):
    summary = _summary_of(parent)(title="layers")
    trainer_of(tmp_path, summary, enable_progress_bar=False).fit(BoringModel())
    assert _Shown.found == (["layer"], 66, 66, {"train": 1, "eval": 0}, "layers")
    _Shown.found = None


def test_a_profiler_reports_by_the_logger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    profiler = SimpleProfiler(filename="profile")
    trainer = trainer_of(tmp_path, profiler=profiler, enable_progress_bar=False)
    with caplog.at_level(logging.INFO):
        trainer.fit(BoringModel())
    assert "FIT Profiler Report" in caplog.text
    assert profiler.dirpath == str(tmp_path)
    assert (tmp_path / "fit-profile.txt").exists()

    own = SimpleProfiler(extended=True)
    own.recorded_durations["load"] = [0.5, 0.25]
    report = own.summary()
    assert report.splitlines()[1].split(" | ")[2].strip() == "Num calls"
    assert [cell.strip() for cell in report.splitlines()[3].split(" | ")] == [
        "load",
        "0.375",
        "2",
        "0.75",
        "100.0",
    ]
    with pytest.raises(ValueError, match="Attempting to stop recording an action"):
        own.stop("save")
    own.start("save")
    with pytest.raises(ValueError, match="Attempted to start save"):
        own.start("save")


def test_a_section_has_its_file_without_a_name_for_all(tmp_path: Path):
    profiler = AdvancedProfiler(tmp_path, dump_stats=True)
    with profiler.profile("a/b"):
        pass
    profiler.describe()
    assert [file.name for file in tmp_path.iterdir()] == ["a_b.prof"]
    with pytest.raises(ValueError, match="Attempting to stop recording an action"):
        profiler.stop("other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sort_by_key": "best"}, "Found sort_by_key: best. Should be within "),
        ({"schedule": 1}, "Schedule should be a callable"),
        ({"schedule": lambda step: 1}, "return a `torch.profiler.ProfilerAction`"),
    ],
)
def test_what_a_pytorch_profiler_refuses(arguments: dict[str, Any], message: str):
    with pytest.raises(MisconfigurationException, match=message):
        PyTorchProfiler(**arguments)
    assert PyTorchProfiler(sort_by_key="self_cpu_time_total")


class WithoutBias(BoringModel):
    """Has a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2, bias=False)


class Half(prune.BasePruningMethod):
    """Is a method."""


def test_layers_without_bias_are_drawn_again(tmp_path: Path):
    pruning = ModelPruning(
        "l1_unstructured",
        amount=0.5,
        resample_parameters=True,
        parameter_names=["weight"],
    )
    module = WithoutBias()
    before = module.layer.weight.detach().clone()
    trainer_of(tmp_path, pruning, enable_progress_bar=False).fit(module)
    assert (module.layer.weight == 0).sum() == 32
    kept = module.layer.weight != 0
    assert not torch.equal(module.layer.weight[kept], before[kept])
    assert ModelPruning._is_pruning_method(Half)
    assert not ModelPruning._is_pruning_method("l1_unstructured")


class Manual(BoringModel):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_what_accumulation_and_writers_refuse(tmp_path: Path):
    with pytest.raises(TypeError, match="Empty dict"):
        GradientAccumulationScheduler({})
    with pytest.raises(MisconfigurationException, match="at least 1; got 0"):
        GradientAccumulationScheduler({1: 0})
    scheduler = GradientAccumulationScheduler({1: 2})
    with pytest.raises(RuntimeError, match="not supported for manual optimization"):
        trainer_of(tmp_path, scheduler, enable_progress_bar=False).fit(Manual())
    with pytest.raises(MisconfigurationException, match="should be one of"):
        BasePredictionWriter("other")


class AlsoTests(TwoLoaders):
    """Tests on two loaders, too."""

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


def tasks_of(bar: RichProgressBar) -> list[tuple[str, float, float | None, bool]]:
    return [
        (task.description.strip(), task.completed, task.total, task.visible)
        for task in bar.progress.tasks
    ]


def test_tasks_of_rich_bars_can_be_read(tmp_path: Path):
    bar = RichProgressBar()
    assert bar.progress is None
    trainer = trainer_of(tmp_path, bar)
    module = AlsoTests()
    trainer.fit(module)
    assert tasks_of(bar) == [
        ("Sanity check", 1, 1, False),
        ("Sanity check", 1, 1, False),
        ("Epoch 0/0", 5, 5, True),
        ("Validation", 2, 2, False),
        ("Validation", 2, 2, False),
    ]
    assert bar.train_progress_bar.completed == 5
    assert bar.val_progress_bar.id == 4
    assert bar.val_sanity_check_bar.id == 1
    trainer.test(module)
    assert [task[0] for task in tasks_of(bar)] == ["Test", "Test"]
    assert bar.test_progress_bar.id == 1


@pytest.mark.parametrize("leave", [True, False])
def test_an_epoch_begins_its_task_anew(tmp_path: Path, leave: bool):
    bar = RichProgressBar(leave=leave, theme=RichProgressBarTheme(description="blue"))
    trainer = trainer_of(tmp_path, bar, max_epochs=3, limit_val_batches=0)
    trainer.fit(BoringModel())
    assert len(bar.progress.tasks) == 1
    assert bar.train_progress_bar.description.strip().endswith("Epoch 2/2")
    assert bar.progress.finished


def test_sections_have_lightnings_names(tmp_path: Path):
    profiler = SimpleProfiler()
    trainer = trainer_of(tmp_path, profiler=profiler, enable_progress_bar=False)
    trainer.fit(BoringModel())
    strategy = type(trainer.strategy).__name__
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts == {
        f"[Strategy]{strategy}.validation_step": 3,
        "[_TrainingEpochLoop].train_dataloader_next": 5,
        f"[Strategy]{strategy}.training_step": 5,
        f"[Strategy]{strategy}.backward": 5,
        "[LightningModule]BoringModel.optimizer_step": 5,
        "run_training_batch": 5,
        "run_training_epoch": 1,
    }
    report = profiler.summary()
    assert report.count("run_training_epoch") == 1
    assert "data loading" in report
