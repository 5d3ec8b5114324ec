"""Programs that were written for Lightning run on Loopwright, and what they cannot have is said by name."""

from __future__ import annotations

import inspect
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from loopwright.framework import Trainer as NativeTrainer
from loopwright.framework.compat.imports import ImportedFaces, unserved
from loopwright.framework.compat.lightning.model_summary import ModelSummary
from loopwright.lightning import LightningModule, Trainer, seed_everything
from loopwright.lightning.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ProgressBar,
    SpikeDetection,
    TQDMProgressBar,
)
from loopwright.lightning.callbacks import ModelSummary as SummaryOfLayers
from loopwright.lightning.demos import (
    BoringModel,
    RandomDataset,
)
from loopwright.lightning.loggers import CSVLogger
from loopwright.lightning.profilers import Profiler, SimpleProfiler
from loopwright.lightning.utilities import CombinedLoader, MisconfigurationException
from tests.programs import run_program

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}

# In the style of Lightning's users. The order of its data is its own, as the two trainers shuffle otherwise.
PROGRAM = """
import json, sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader


class Model(pl.LightningModule):
    def __init__(self, width=4, sizes=None):
        super().__init__()
        sizes = sizes or {"in": 32}
        self.save_hyperparameters()
        self.body = torch.nn.Sequential(torch.nn.Linear(sizes["in"], width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def training_step(self, batch, batch_idx) -> STEP_OUTPUT:
        loss = self.body(batch).square().mean()
        self.loss = loss.detach()
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self.body(batch).square().mean()})

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Collects(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # There, it is divided for the window already.
        self.losses.append(float(pl_module.loss))


pl.seed_everything(3, verbose=False)
data = DataLoader(RandomDataset(32, 64), batch_size=8)
model, collects = Model(), Collects()
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=3, gradient_clip_val=0.5, accumulate_grad_batches=2, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    callbacks=[collects, EarlyStopping("val_loss"), LearningRateMonitor(), ModelCheckpoint(monitor="val_loss")],
)
trainer.fit(model, data, data)
results = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
results["tested"] = trainer.test(model, data, verbose=False)[0]["val_loss"]
results["losses"] = collects.losses
results["saved"] = bool(trainer.checkpoint_callback.best_model_path)
results["hparams"] = dict(model.hparams)
if rank_zero_only.rank == 0:
    print("RESULTS", json.dumps(results))
"""


def results_of(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.slow
def test_a_program_written_for_lightning_has_the_results_that_it_has_there(
    tmp_path: Path,
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = run_program("-m", "loopwright.lightning", program, cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    assert "answered by Loopwright" in here.stderr
    there = run_program(program, cwd=tmp_path)
    ours, theirs = results_of(here.stdout), results_of(there.stdout)
    assert ours.keys() == theirs.keys()
    assert ours["hparams"] == theirs["hparams"] == {"width": 4, "sizes": {"in": 32}}
    assert ours["losses"] == theirs["losses"]
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=1e-6), name
    assert (tmp_path / "lightning_logs" / "version_0").is_dir()


@pytest.mark.slow
def test_a_program_runs_in_two_processes(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    program = PROGRAM.replace(
        'accelerator="cpu"', 'accelerator="cpu", devices=2, strategy="ddp_spawn"'
    )
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(program)
    run = run_program(
        "-m",
        "loopwright.lightning",
        "-m",
        "package.train",
        "--flag",
        cwd=tmp_path,
        timeout=170,
    )
    assert run.returncode == 0, run.stderr
    assert "strategy='ddp_spawn' is 'ddp' here" in run.stderr
    assert "2 processes" in run.stderr
    # One line, of the main process, with half of the batches.
    assert run.stdout.count("RESULTS") == 1
    assert len(results_of(run.stdout)["losses"]) == 12


def test_install_answers_lightnings_paths_and_no_others(tmp_path: Path) -> None:
    program = """
import loopwright.lightning
loopwright.lightning.install()
loopwright.lightning.install()
import lightning, lightning.fabric, pytorch_lightning as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.trainer.states import TrainerFn
assert lightning.LightningModule is pl.LightningModule is loopwright.lightning.LightningModule
assert pl.utilities.rank_zero.rank_zero_only is not None and pl.utilities.types.STEP_OUTPUT is not None
assert TrainerFn.FITTING == "fit"
for statement in ("import lightning.pytorch.nothing", "from lightning.pytorch.callbacks import Nothing"):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
    else:
        raise SystemExit(statement)
"""
    run = run_program("-c", program, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("answered by Loopwright") == 1
    assert "No module named 'lightning.pytorch.nothing'" in run.stdout
    assert "cannot import name 'Nothing'" in run.stdout


def test_install_refuses_a_lightning_that_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lightning.py").write_text("")
    program = (
        "import pytorch_lightning, loopwright.lightning\nloopwright.lightning.install()"
    )
    run = run_program("-c", program, cwd=tmp_path)
    assert run.returncode == 1
    assert "pytorch_lightning has been imported before (from " in run.stderr
    assert "call loopwright.lightning.install() before" in run.stderr


def test_a_path_belongs_to_its_longest_face() -> None:
    faces = ImportedFaces({"a": "one", "a.b": "two"}, {"b", "c"})
    assert faces.target_of("a") == "one"
    assert faces.target_of("a.c") == "one"
    assert faces.target_of("a.b.c") == "two"
    assert faces.target_of("a.d") is None
    assert faces.target_of("b") is None


def test_the_trainer_shows_all_its_arguments() -> None:
    names = set(inspect.signature(Trainer.__init__).parameters)
    assert names >= set(inspect.signature(NativeTrainer.__init__).parameters)
    assert names >= {"plugins", "enable_autolog_hparams", "model_registry"}
    with pytest.raises(TypeError, match="here that is devices="):
        Trainer(gpus=1)


def test_default_callbacks_and_logger_are_of_the_classes_that_programs_look_for(
    tmp_path: Path,
) -> None:
    from loopwright.lightning.loggers import TensorBoardLogger

    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert trainer.loggers[0].name == "lightning_logs"

    class Own(Checkpoint):
        pass

    # Whoever saves in a way of their own gets no ModelCheckpoint beside it.
    assert Trainer(accelerator="cpu", callbacks=Own()).checkpoint_callbacks == []


def test_a_strategy_made_by_name_is_of_the_class_that_programs_ask_for() -> None:
    from loopwright.lightning.strategies import (
        DDPStrategy,
        FSDPStrategy,
        SingleDeviceStrategy,
        StrategyRegistry,
    )

    strategy = Trainer(strategy="ddp", devices=2, **QUIET).strategy
    assert isinstance(strategy, DDPStrategy)
    assert not isinstance(strategy, FSDPStrategy)
    StrategyRegistry.register("mine", DDPStrategy, find_unused_parameters=True)
    try:
        mine: Any = Trainer(strategy="mine", devices=2, **QUIET).strategy
        assert mine.options["find_unused_parameters"]
    finally:
        StrategyRegistry.remove("mine")
    single = Trainer(strategy=SingleDeviceStrategy(device="cpu"), **QUIET)
    assert single.strategy.root_device == torch.device("cpu")
    with pytest.raises(NotImplementedError, match=r"'parallel_devices' here: use dev"):
        DDPStrategy(parallel_devices=[torch.device("cpu")])


def test_plugins_are_taken_or_refused_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from loopwright.lightning.plugins import (
        MixedPrecision,
        SLURMEnvironment,
        TorchCheckpointIO,
        TorchElasticEnvironment,
    )

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with caplog.at_level("INFO", "loopwright"):
        trainer = Trainer(
            plugins=[
                MixedPrecision("16-mixed", "cpu", scaler),
                SLURMEnvironment(auto_requeue=False),
                TorchElasticEnvironment(),
            ],
            **QUIET,
        )
    assert trainer.precision == "16-mixed"
    assert trainer.precision_plugin.init_scale == 8.0
    assert "TorchElasticEnvironment changes nothing" in caplog.text
    assert not trainer.auto_requeue
    assert SLURMEnvironment(requeue_signal=signal.SIGUSR2).auto_requeue
    with pytest.raises(NotImplementedError, match="--signal=SIGUSR1"):
        SLURMEnvironment(requeue_signal=signal.SIGHUP)

    class Writes(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None: ...  # fmt: skip

    with pytest.raises(NotImplementedError, match="Writes writes no checkpoint here"):
        Trainer(plugins=Writes(), **QUIET)
    with pytest.raises(TypeError, match="plugins must hold"):
        Trainer(plugins=["16-mixed"], **QUIET)


def test_what_is_not_there_can_be_imported_and_says_so_when_it_is_used() -> None:
    from loopwright.lightning.loggers import NeptuneLogger

    assert not isinstance(object(), NeptuneLogger)
    with pytest.raises(NotImplementedError, match="NeptuneLogger is not there"):
        NeptuneLogger(project="x")
    kind = unserved("Old", "use New")

    class Derived(kind): ...

    with pytest.raises(NotImplementedError, match=r"Old is not there.*use New"):
        Derived()


class Writer(BasePredictionWriter):
    def __init__(self, interval: str) -> None:
        super().__init__(interval)
        self.written: list[Any] = []

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        *rest: Any,
    ) -> None:
        self.written.append(("batch", batch_indices, len(prediction)))

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        self.written.append(("epoch", batch_indices, [len(p) for p in predictions]))


def test_a_prediction_writer_gets_predictions_and_the_samples_indices() -> None:
    writer = Writer("batch_and_epoch")
    data = DataLoader(RandomDataset(32, 5), batch_size=2)
    Trainer(callbacks=writer, **QUIET).predict(
        BoringModel(), data, return_predictions=False
    )
    indices = [[0, 1], [2, 3], [4]]
    assert writer.written == [
        *(("batch", each, len(each)) for each in indices),
        ("epoch", [indices], [2, 2, 1]),
    ]
    with pytest.raises(MisconfigurationException, match="never"):
        Writer("never")


def test_windows_of_accumulation_change_with_the_epoch() -> None:
    scheduler = GradientAccumulationScheduler({0: 4, 2: 1})
    trainer = Trainer(callbacks=scheduler, **{**QUIET, "max_epochs": 3})
    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 8)))
    assert trainer.global_step == 2 + 2 + 8


def test_bars_of_tqdm_tell_how_far_the_run_is_and_can_be_overridden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bar(TQDMProgressBar):
        def init_validation_tqdm(self) -> Any:
            bar = super().init_validation_tqdm()
            bar.colour = "green"
            return bar

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            return {**super().get_metrics(trainer, pl_module), "mine": 5}

    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.step(batch)
            self.log("shown", loss.detach() * 0 + 0.5, prog_bar=True)
            return loss

    data = DataLoader(RandomDataset(32, 4))
    quiet = {**QUIET, "enable_progress_bar": True}
    trainer = Trainer(callbacks=Bar(refresh_rate=2), **quiet)
    trainer.fit(Model(), data, data)
    trainer.predict(Model(), data)
    shown = capsys.readouterr().out
    texts = ("Epoch 0: 100%", "4/4", "shown=0.5", "mine=5")
    loaders = ("Validation DataLoader 0: 100%", "Predicting DataLoader 0: 100%")
    assert all(text in shown for text in (*texts, *loaders))
    # In the colour that the override has asked for.
    assert "\x1b[32m" in shown
    trainer = Trainer(callbacks=TQDMProgressBar(refresh_rate=0), **quiet)
    trainer.fit(Model(), data)
    assert "%" not in capsys.readouterr().out


def test_hyperparameters_of_another_frame_and_none_for_the_loggers(
    tmp_path: Path,
) -> None:
    class Model(BoringModel):
        def __init__(self, width: int = 3, secret: str = "x") -> None:
            super().__init__()
            self.save_hyperparameters(ignore="secret", frame=inspect.currentframe())

    model = Model()
    assert model.hparams == {"width": 3}
    from loopwright.lightning.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        **{**QUIET, "logger": logger, "limit_train_batches": 1},
        enable_autolog_hparams=False,
    )
    trainer.fit(model)
    assert not Path(logger.log_dir, "hparams.yaml").exists()


def test_hyperparameters_of_a_file_go_before_the_checkpoints(tmp_path: Path) -> None:
    """Those that the class takes; what the caller passes goes before both."""

    class Wide(BoringModel):
        def __init__(self, width: int = 1, rate: float = 0.1, name: str = "a") -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = Trainer(**{**QUIET, "limit_train_batches": 1})
    trainer.fit(Wide(width=2, rate=0.2, name="b"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    files = {
        "hparams.yaml": "width: 3\nrate: 1e-3\nunknown: 1\n",
        "meta.csv": "key,value\nwidth,3\nrate,0.001\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        loaded = Wide.load_from_checkpoint(
            tmp_path / "a.ckpt", hparams_file=tmp_path / name, width=4
        )
        assert (loaded.hparams.width, loaded.hparams.name) == (4, "b")
        assert float(loaded.hparams.rate) == 0.001
    with pytest.raises(ValueError, match=r"hparams_file is a \.yaml.*notes\.txt"):
        Wide.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file="notes.txt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert whole["hparams_name"] == "kwargs"


def test_a_module_is_made_on_the_device_in_the_runs_precision() -> None:
    trainer = Trainer(precision="bf16-true", **QUIET)
    with trainer.init_module():
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    with trainer.init_module(empty_init=True):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        torch.nn.Linear(2, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_the_fit_loop_tells_and_takes_what_programs_read_and_set() -> None:
    trainer = Trainer(**QUIET)
    seen = []

    class Model(BoringModel):
        def on_train_batch_start(self, *_: Any) -> None:
            loop = trainer.fit_loop
            seen.append((loop.epoch_loop.batch_idx, loop.epoch_progress.current.completed))  # fmt: skip

    trainer.fit(Model(), DataLoader(RandomDataset(32, 2)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(RandomDataset(32, 2)))
    assert seen == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert trainer.current_epoch == 2


def test_a_module_becomes_torchscript(tmp_path: Path) -> None:
    model = BoringModel()
    path = tmp_path / "model.pt"
    model.to_torchscript(path, method="trace", example_inputs=torch.ones(1, 32))
    assert torch.equal(torch.jit.load(path)(torch.ones(1, 32)), model(torch.ones(1, 32)))  # fmt: skip
    with pytest.raises(ValueError, match="example_input_array"):
        model.to_torchscript(method="trace")
    assert model.training


def test_a_seed_is_taken() -> None:
    assert seed_everything(7, workers=True, verbose=False) == 7
    assert issubclass(BoringModel, LightningModule)


def test_parts_need_no_import_of_their_own():
    program = (
        "import loopwright.lightning as pl\n"
        "assert pl.callbacks.EarlyStopping is pl.callbacks.early_stopping.EarlyStopping\n"
        "assert pl.pytorch.Trainer is pl.Trainer and pl.fabric.utilities and pl.utilities.types\n"
        "assert not hasattr(pl, 'no_part') and not hasattr(pl.utilities, 'no_part')\n"
    )
    ended = run_program("-c", program)
    assert ended.returncode == 0, ended.stderr


class MeasuresItself(BoringModel):
    def training_step(self, batch, batch_idx):
        profiler: Any = self.trainer.profiler
        with profiler.profile("mine"):
            return super().training_step(batch, batch_idx)


class Names(Profiler):
    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def start(self, action_name):
        self.begun.append(action_name)

    def stop(self, action_name):
        self.ended.append(action_name)


def test_programs_measure_sections_of_their_own(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    settings = {**QUIET, "limit_train_batches": 2, "limit_val_batches": 1}
    Trainer(**settings).fit(MeasuresItself())

    simple = SimpleProfiler()
    trainer = Trainer(**settings, profiler=simple, default_root_dir=tmp_path)
    with caplog.at_level("INFO"):
        trainer.fit(MeasuresItself())
    assert trainer.profiler is simple
    assert len(simple.recorded_durations["mine"]) == 2
    assert "mine" in caplog.text

    names = Names()
    Trainer(**settings, profiler=names).fit(MeasuresItself())
    assert sorted(names.begun) == sorted(names.ended)
    assert names.begun.count("mine") == names.begun.count("run_training_batch") == 2
    assert names.begun.count("validate_step") == 1


class Counts(ProgressBar):
    def __init__(self):
        super().__init__()
        self.train, self.val, self.test = set(), set(), []

    def on_train_batch_end(self, *_):
        self.train.add(self.total_train_batches)
        self.val.add(self.total_val_batches_current_epoch)

    def on_test_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ):
        if self.has_dataloader_changed(dataloader_idx):
            self.test.append(self.total_test_batches_current_dataloader)


class TwoLoaders(BoringModel):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return super().test_step(batch, batch_idx)


def test_a_progress_bar_tells_how_many_batches_there_are() -> None:
    bar = Counts()
    settings = {**QUIET, "enable_progress_bar": True, "limit_val_batches": 3}
    trainer = Trainer(**settings, limit_train_batches=2, callbacks=[bar])
    trainer.fit(BoringModel())
    assert (bar.train, bar.val) == ({2}, {3})
    loaders = [DataLoader(RandomDataset(32, length)) for length in (4, 5)]
    trainer.test(TwoLoaders(), loaders, verbose=False)
    assert bar.test == [4, 5]


def test_loaders_that_are_combined_give_indices_when_read_by_hand() -> None:
    loaders = [DataLoader(RandomDataset(32, length)) for length in (1, 2)]
    read = CombinedLoader(loaders, "max_size")
    assert [indices for _, *indices in read] == [[0, 0], [1, 0]]
    read = CombinedLoader(loaders, "sequential")
    assert [indices for _, *indices in read] == [[0, 0], [0, 1], [1, 1]]
    # A run does not see them.
    Trainer(**QUIET).test(TwoLoaders(), read, verbose=False)


def test_a_trial_run_has_a_model_checkpoint_that_saves_nothing(
    tmp_path: Path,
) -> None:
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True},
        fast_dev_run=True,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    assert trainer.checkpoint_callback.best_model_path == ""
    assert list(tmp_path.iterdir()) == []


HPARAMS = {"lr": 1e-05, "name": '1e-05 "NaN"', "most": float("inf"), "layers": [1, 2]}


def test_values_and_hyperparameters_are_in_files_that_yaml_reads(
    tmp_path: Path,
) -> None:
    yaml = pytest.importorskip("yaml")
    logger = CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="valid_loss")
    settings = {**QUIET, "enable_checkpointing": True, "logger": logger}
    trainer = Trainer(**settings, callbacks=[checkpoint], limit_train_batches=1)
    logger.log_hyperparams(HPARAMS)

    class Logs(BoringModel):
        def validation_step(self, batch, batch_idx):
            self.log("valid_loss", 0.5)

    trainer.fit(Logs())
    text = Path(logger.log_dir, "hparams.yaml").read_text()
    assert yaml.safe_load(text) == HPARAMS
    checkpoint.to_yaml()
    text = (tmp_path / "kept" / "best_k_models.yaml").read_text()
    assert yaml.safe_load(text) == {checkpoint.best_model_path: 0.5}


def test_a_summary_counts_each_layer() -> None:
    summary = ModelSummary(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
    assert summary.layer_types == ["Linear", "ReLU"]
    assert summary.param_nums == [9, 0]


def test_when_a_validation_is_due_is_told_in_batches() -> None:
    trainer = Trainer(**QUIET, val_check_interval=0.5)
    trainer.fit(BoringModel())
    assert trainer.val_check_batch == 32


class ReadsItself(BoringModel):
    def training_step(self, dataloader_iter):
        return self.step(next(dataloader_iter))


def test_a_step_that_reads_the_loader_itself_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="takes dataloader_iter"):
        Trainer(**QUIET).fit(ReadsItself())


def test_a_summary_that_is_given_is_shown_although_none_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = Trainer(**QUIET, callbacks=[SummaryOfLayers(max_depth=2)])
    trainer.fit(BoringModel())
    assert "Linear" in capsys.readouterr().out


class Spiking(BoringModel):
    """The loss of batch 4 is a given one, and those of the others fall."""

    spike = 3.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        level = self.spike if batch_idx == 4 else 1 / (batch_idx + 1)
        return {"loss": 0 * self.layer(batch).sum() + level}


@pytest.mark.parametrize(
    ("spike", "finite_only", "is_found"),
    [
        (3.0, True, True),
        (0.5, True, False),
        (float("nan"), True, True),
        (float("nan"), False, False),
    ],
)
def test_spike_detection_names_the_batches_and_ends(
    tmp_path: Path, spike: float, finite_only: bool, is_found: bool
):
    from loopwright.lightning.fabric.utilities.spike import (  # pyright: ignore[reportMissingImports] # made at run time
        TrainingSpikeException,
    )

    detection = SpikeDetection(exclude_batches_path=tmp_path, finite_only=finite_only)
    model = Spiking()
    model.spike = spike
    trainer = Trainer(
        callbacks=[detection], limit_train_batches=10, limit_val_batches=0, **QUIET
    )
    if not is_found:
        trainer.fit(model)
        assert detection.bad_batches == []
        return
    with pytest.raises(
        TrainingSpikeException, match="Training spike detected in batch 4"
    ):
        trainer.fit(model)
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [3, 4]
    again = SpikeDetection()
    again.load_state_dict(detection.state_dict())
    assert (again.bad_batches, again.last_val) == ([3, 4], 0.25)
