"""What Lightning's users see of modules, data, loggers, utilities and plugins, under its names."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from loopwright.framework.compat.lightning.cluster import (
    LightningEnvironment,
    SLURMEnvironment,
)
from loopwright.framework.compat.lightning.combined_loader import CombinedLoader
from loopwright.framework.compat.lightning.compile import from_compiled, to_uncompiled
from loopwright.framework.compat.lightning.core import LightningOptimizer
from loopwright.framework.compat.lightning.data import extract_batch_size, warning_cache
from loopwright.framework.compat.lightning.loggers import ExperimentWriter
from loopwright.framework.compat.lightning.model_helpers import is_overridden
from loopwright.framework.compat.lightning.model_summary import ModelSummary, summarize
from loopwright.framework.compat.lightning.parsing import (
    collect_init_args,
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)
from loopwright.framework.compat.lightning.samplers import UnrepeatedDistributedSampler
from loopwright.framework.compat.lightning.seed import reset_seed, seed_everything
from loopwright.framework.compat.lightning.throughput import Throughput
from loopwright.framework.compat.lightning.utilities import MisconfigurationException
from loopwright.lightning import LightningDataModule, LightningModule, Trainer
from loopwright.lightning.accelerators import AcceleratorRegistry, CPUAccelerator
from loopwright.lightning.demos import (
    BoringDataModule,
    BoringModel,
    RandomDataset,
)
from loopwright.lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from loopwright.lightning.plugins import (
    AsyncCheckpointIO,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    TorchCheckpointIO,
)
from loopwright.lightning.strategies import DDPStrategy, StrategyRegistry


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)


def quiet(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.mark.parametrize(
    "path",
    [
        "core.optimizer",
        "demos.boring_classes",
        "loggers.csv_logs",
        "loops.fetchers",
        "loops.optimization.automatic",
        "overrides.distributed",
        "plugins.io.async_plugin",
        "strategies.launchers.multiprocessing",
        "trainer.connectors.logger_connector.result",
        "utilities.combined_loader",
        "utilities.compile",
        "utilities.data",
        "utilities.imports",
        "utilities.model_helpers",
        "utilities.parsing",
        "utilities.seed",
    ],
)
def test_a_path_of_lightnings_is_there(path: str):
    module = import_module(f"loopwright.lightning.{path}")
    assert module.__all__


# Modules and their optimizers.


def test_an_optimizer_passes_for_the_one_inside_of_it():
    inside = torch.optim.Adam(nn.Linear(3, 4).parameters(), lr=0.1)
    optimizer = LightningOptimizer(inside)
    assert isinstance(optimizer, torch.optim.Adam)
    assert str(optimizer) == f"Lightning{inside}"
    inside.param_groups[0]["lr"] = 1.0
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.state_dict() == inside.state_dict()


def test_a_hook_gets_an_optimizer_whose_step_returns_the_loss():
    losses = []

    class Model(BoringModel):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            assert isinstance(optimizer, LightningOptimizer)
            losses.append(optimizer.step(closure=optimizer_closure))

    quiet(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(Model())
    assert len(losses) == 2
    assert all(isinstance(loss, torch.Tensor) for loss in losses)


@pytest.mark.parametrize(
    ("given", "passed", "text"),
    [
        (
            {"gradient_clip_val": 1e-4},
            {"gradient_clip_val": 1e-2},
            r"gradient_clip_val=0.0001\)` and have passed `clip_gradients\(gradient_clip_val=0.01",
        ),
        (
            {"gradient_clip_algorithm": "norm"},
            {"gradient_clip_algorithm": "foo"},
            "gradient_clip_algorithm='norm'",
        ),
    ],
)
def test_gradients_are_not_clipped_by_two_values(given: Any, passed: Any, text: str):
    class Model(BoringModel):
        def configure_gradient_clipping(self, optimizer, *_: Any, **__: Any):
            self.clip_gradients(optimizer, **passed)

    with pytest.raises(MisconfigurationException, match=text):
        quiet(max_epochs=1, limit_train_batches=1, **given).fit(Model())


def test_how_strictly_a_checkpoint_is_loaded(tmp_path: Path):
    class Model(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = True

    trainer = quiet(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(Model())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "model.ckpt").strict_loading is True
    with pytest.raises(ValueError, match="in conflict with"):
        Model.load_from_checkpoint(tmp_path / "model.ckpt", strict=False)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Model().load_from_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_what_is_no_module_is_refused(run: str):
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        getattr(quiet(), run)(object())


def test_calls_are_compiled_and_not_any_more():
    compiled = torch.compile(BoringModel(), backend="eager")
    module = from_compiled(compiled)
    assert module.calls_are_compiled
    assert not to_uncompiled(compiled).calls_are_compiled
    with pytest.raises(ValueError, match="required to be a compiled LightningModule"):
        to_uncompiled(BoringModel())


# Data.


def test_data_modules_of_datasets_get_the_sizes():
    class Data(LightningDataModule):
        def __init__(self, other: int, batch_size: int = 1) -> None:
            super().__init__()
            self.sizes = other, batch_size

    data = Data.from_datasets(RandomDataset(32, 8), batch_size=4, other=5)
    assert data.sizes == (5, 4)
    assert data.train_dataloader().batch_size == 4
    assert str(data).startswith(
        "{Train dataloader: size=8}\n{Validation dataloader: No"
    )


def test_a_data_module_is_loaded_as_a_module_is(tmp_path: Path):
    class Data(BoringDataModule):
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = quiet(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(BoringModel(), Data(8))
    path = tmp_path / "data.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["datamodule_hparams_name"] == "kwargs"
    assert Data.load_from_checkpoint(path, map_location="cpu").hparams.size == 8


def test_one_hyperparameter_with_two_values_is_an_error():
    class Model(BoringModel):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Data(BoringDataModule):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(RuntimeError, match="Error while merging hparams"):
        quiet(fast_dev_run=True).fit(Model(1), Data(2))


def test_a_combined_loader_read_by_hand():
    loaders = {
        "a": DataLoader(RandomDataset(2, 10), 4),
        "b": DataLoader(RandomDataset(2, 20), 5),
    }
    for mode, count in (("min_size", 3), ("max_size", 4), ("max_size_cycle", 4)):
        combined = CombinedLoader(loaders, mode)
        indices = [index for batch, index, _ in combined if list(batch) == ["a", "b"]]
        assert indices == list(range(count)) == list(range(len(combined)))
    combined = CombinedLoader(loaders, "sequential")
    combined.limits = 2
    indices = [(index, loader) for _, index, loader in combined]
    assert indices == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert combined.batch_sampler["a"] is loaders["a"].batch_sampler
    with pytest.raises(ValueError, match="Unsupported mode 'other'"):
        CombinedLoader(loaders, "other")


def test_a_batch_size_that_is_not_clear_is_warned_of():
    warning_cache.clear()
    with pytest.warns(UserWarning, match=r"Trying to infer .* we found is 11"):
        assert extract_batch_size([torch.zeros(11, 2), torch.zeros(10)]) == 11
    with pytest.raises(MisconfigurationException, match="could not infer"):
        extract_batch_size("text")


def test_a_sampler_that_repeats_nothing():
    parts = [
        list(UnrepeatedDistributedSampler(range(103), 4, rank, shuffle=False))
        for rank in range(4)
    ]
    assert [len(part) for part in parts] == [26, 26, 26, 25]
    assert sorted(index for part in parts for index in part) == list(range(103))


# Loggers.


class Rows(Logger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, list[str]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, sorted(metrics)))


def test_rows_are_numbered_as_lightning_does():
    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            self.log("loss", loss)
            return loss

        def on_validation_epoch_end(self):
            self.log("val", 1.0)

        def on_test_epoch_end(self):
            self.log_dict({"test": 1.0, "step": 7.0})

    rows = Rows()
    trainer = quiet(
        max_epochs=1, limit_train_batches=1, logger=rows, log_every_n_steps=1
    )
    trainer.fit(Model())
    trainer.test(Model())
    assert rows.rows == [
        (0, ["epoch", "loss"]),
        (0, ["epoch", "val"]),
        (7, ["test"]),
    ]


def test_a_csv_logger_writes_by_its_writer(tmp_path: Path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
    logger.log_hyperparams({"a": 1})
    assert "a" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()
    logger.log_metrics({"loss": 1.0}, step=0)
    assert isinstance(logger.experiment, ExperimentWriter)
    assert logger.experiment.metrics == [{"step": 0, "loss": 1.0}]
    logger.log_metrics({"loss": 2.0}, step=1)
    assert logger.experiment.metrics == []
    text = Path(logger.experiment.metrics_file_path).read_text()
    assert text.splitlines() == ["step,loss", "0,1.0", "1,2.0"]


def test_a_csv_logger_says_that_its_folder_is_in_use(tmp_path: Path):
    folder = tmp_path / "exp" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step\n")
    logger = CSVLogger(tmp_path, "exp", 0)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        assert logger.experiment.metrics == []
    assert not (folder / "metrics.csv").exists()


def test_a_graph_that_cannot_be_drawn_is_warned_of(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="Could not log computational graph"):
        logger.log_graph(BoringModel())


def test_a_logger_without_a_folder():
    assert Rows().root_dir is None
    assert Rows().group_separator == "/"
    trainer = quiet(max_epochs=1, limit_train_batches=1, logger=Rows())
    trainer.fit(BoringModel())
    assert trainer.log_dir is None


# Utilities.


def test_a_summary_has_columns():
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 5)
            self.second = nn.Linear(5, 2)
            self.alone = nn.Parameter(torch.ones(4))
            self.example_input_array = torch.rand(2, 3)

        def forward(self, x):
            return self.second(self.first(x))

    module = Model()
    module.second.eval()
    summary = summarize(module)
    assert summary.layer_names == ["first", "second"]
    assert summary.in_sizes == [[2, 3], [2, 5]]
    assert summary.out_sizes == [[2, 5], [2, 2]]
    assert summary.param_nums == [20, 12]
    assert summary.total_parameters == 36
    assert summary.total_training_modes == {"train": 1, "eval": 1}
    assert summary.total_flops > 0
    assert "other params" in str(summary)
    with pytest.raises(ValueError, match="can be -1, 0 or > 0, got -2"):
        ModelSummary(module, max_depth=-2)


def test_attributes_are_found_where_they_are_kept():
    class Data(LightningDataModule):
        batch_size = 8

    model = LightningModule()
    trainer = Trainer()
    model.trainer = trainer
    trainer.datamodule = Data()
    assert lightning_hasattr(model, "batch_size")
    lightning_setattr(model, "batch_size", 16)
    assert lightning_getattr(model, "batch_size") == 16
    with pytest.raises(AttributeError, match="neither stored in the model namespace"):
        lightning_getattr(model, "other")


def test_arguments_of_all_constructors_are_collected():
    import inspect

    class Base:
        def __init__(self, first: int, **others: Any) -> None:
            super().__init__()
            self.collected = collect_init_args(inspect.currentframe(), [])

    class Derived(Base):
        def __init__(self, first: int, second: int, **others: Any) -> None:
            super().__init__(first, **others)

    collected = Derived(1, 2, third=3).collected
    assert collected[0] == {"first": 1, "third": 3}
    assert collected[1] == {"first": 1, "second": 2, "third": 3}


def test_what_is_overridden():
    assert is_overridden("training_step", BoringModel())
    assert not is_overridden("whatever", BoringModel())
    with pytest.raises(ValueError, match="Expected a parent"):
        is_overridden("whatever", object())


def test_a_seed_is_noted_where_lightning_notes_it(monkeypatch: pytest.MonkeyPatch):
    seed_everything(123, workers=True)
    drawn = torch.rand(1)
    assert os.environ["PL_GLOBAL_SEED"] == "123"
    assert os.environ["PL_SEED_WORKERS"] == "1"
    reset_seed()
    assert torch.equal(torch.rand(1), drawn)
    with pytest.raises(ValueError, match="is not in bounds"):
        seed_everything(-1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "text")
    with pytest.raises(ValueError, match="Invalid seed specified"):
        seed_everything()


def test_throughput_over_a_window():
    throughput = Throughput(window_size=2, world_size=2)
    throughput.update(time=1.0, batches=1, samples=2)
    assert throughput.compute() == {"time": 1.0, "batches": 1, "samples": 2}
    throughput.update(time=2.0, batches=3, samples=6)
    metrics = throughput.compute()
    assert metrics["device/samples_per_sec"] == 4.0
    assert metrics["samples_per_sec"] == 8.0
    with pytest.raises(ValueError, match="increase"):
        throughput.update(time=1.0, batches=4, samples=8)


# Plugins, strategies, accelerators.


def test_precisions_answer_by_lightnings_names():
    assert isinstance(quiet(precision="64-true").precision_plugin, DoublePrecision)
    assert isinstance(quiet(precision="bf16-true").precision_plugin, HalfPrecision)
    plugin = quiet(precision="bf16-mixed").precision_plugin
    assert isinstance(plugin, MixedPrecision)
    assert plugin.precision == "bf16-mixed"
    with plugin.forward_context():
        assert torch.is_autocast_enabled("cpu")
    with DoublePrecision().module_init_context():
        assert nn.Linear(1, 1).weight.dtype == torch.float64
    assert HalfPrecision().convert_input([torch.zeros(1)])[0].dtype == torch.float16
    with pytest.raises(ValueError, match="must be '16-mixed' or 'bf16-mixed'"):
        MixedPrecision("16")


def test_a_precision_of_ones_own_trains():
    class Own(MixedPrecision):
        pass

    trainer = quiet(plugins=Own("bf16-mixed", "cpu"), fast_dev_run=True)
    trainer.fit(BoringModel())
    assert isinstance(trainer.precision_plugin, Own)


def test_strategies_are_registered_by_lightnings_names():
    entry = StrategyRegistry["ddp_spawn_find_unused_parameters_true"]
    assert entry["strategy"] is DDPStrategy
    assert entry["init_params"] == {
        "find_unused_parameters": True,
        "start_method": "spawn",
    }
    assert "deepspeed_stage_2_offload" in StrategyRegistry.available_strategies()


def test_accelerators_answer_by_lightnings_names():
    assert CPUAccelerator.parse_devices("2") == 2
    with pytest.raises(TypeError, match="should be an int > 0"):
        CPUAccelerator.parse_devices(0)
    with pytest.raises(MisconfigurationException, match="Device should be CPU"):
        CPUAccelerator().setup_device(torch.device("cuda"))

    class Own(CPUAccelerator):
        def __init__(self, number: int) -> None:
            self.number = number

    AcceleratorRegistry.register("own", Own, number=3)
    assert AcceleratorRegistry.get("own").number == 3
    AcceleratorRegistry.remove("own")
    assert "own" not in AcceleratorRegistry.available_accelerators()


def test_environments_tell_of_the_process(monkeypatch: pytest.MonkeyPatch):
    names = ("NTASKS", "PROCID", "LOCALID", "NODEID")
    for number, name in enumerate(names):
        monkeypatch.setenv(f"SLURM_{name}", str(4 - number))
    slurm = SLURMEnvironment()
    ranks = slurm.world_size(), slurm.global_rank(), slurm.local_rank()
    assert (*ranks, slurm.node_rank()) == (4, 3, 2, 1)
    assert slurm.creates_processes_externally
    own = LightningEnvironment()
    own.set_world_size(2)
    assert (own.world_size(), own.global_rank()) == (2, 0)
    assert own.main_port == own.main_port


def test_a_checkpoint_is_written_in_a_thread(tmp_path: Path):
    io = AsyncCheckpointIO(TorchCheckpointIO())
    weight = torch.zeros(1)
    io.save_checkpoint({"weight": weight}, tmp_path / "one.ckpt")
    weight.add_(1)
    io.teardown()
    assert io.load_checkpoint(tmp_path / "one.ckpt")["weight"] == 0
    io.remove_checkpoint(tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()
    trainer = quiet(plugins=AsyncCheckpointIO(), max_epochs=1, limit_train_batches=1)
    trainer.fit(BoringModel())
    callback = trainer.checkpoint_callback
    assert callback is not None
    assert os.path.exists(callback.best_model_path)


def test_overfitting_goes_before_the_limits():
    trainer = quiet(overfit_batches=2, limit_train_batches=0.5, max_epochs=1)
    trainer.fit(BoringModel())
    assert trainer.global_step == 2


def test_what_torchscript_and_onnx_need():
    with pytest.raises(ValueError, match="only supports 'script' or 'trace'"):
        BoringModel().to_torchscript(method="other")
    with pytest.raises(ValueError, match="requires either `example_inputs`"):
        BoringModel().to_torchscript(method="trace")
    with pytest.raises(ValueError, match="Could not export to ONNX"):
        BoringModel().to_onnx("model.onnx")


class Sized(LightningDataModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 4))


def test_what_packages_load_by_lightnings_function_is_what_the_class_loads():
    trainer = quiet(max_steps=1, logger=False, enable_checkpointing=False)
    trainer.fit(BoringModel(), datamodule=Sized(3))
    trainer.save_checkpoint("saved.ckpt")
    Path("more.csv").write_text("key,value\nsize,5\n")
    load = import_module("loopwright.lightning.core.saving")._load_from_checkpoint
    assert load(Sized, "saved.ckpt").hparams == {"size": 3}
    assert load(Sized, "saved.ckpt", weights_only=True).hparams == {"size": 3}
    assert load(Sized, "saved.ckpt", hparams_file="more.csv").hparams == {"size": 5}
    assert isinstance(load(BoringModel, "saved.ckpt"), BoringModel)
