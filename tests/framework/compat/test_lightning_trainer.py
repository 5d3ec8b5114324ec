"""What programs for Lightning catch, filter, read and pass at its Trainer."""

from __future__ import annotations

import csv
import logging
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from loopwright.framework import CheckpointError
from loopwright.framework.compat.lightning.saving import (
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
    update_hparams,
)
from loopwright.lightning import LightningDataModule, Trainer, seed_everything
from loopwright.lightning.accelerators import CPUAccelerator
from loopwright.lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.lightning.demos import (
    BoringDataModuleNoLen,
    BoringModel,
    IterableBoringDataModule,
    RandomDataset,
    RandomIterableDatasetWithLen,
)
from loopwright.lightning.loggers import CSVLogger
from loopwright.lightning.plugins import LightningEnvironment
from loopwright.lightning.strategies import DDPStrategy
from loopwright.lightning.utilities import (
    CombinedLoader,
    MisconfigurationException,
    rank_zero_only,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


def trainer_of(**arguments: Any) -> Trainer:
    return Trainer(
        **{**QUIET, "limit_train_batches": 2, "limit_val_batches": 2, **arguments}
    )


class Saved(BoringModel):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


class Logging(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train", float(batch_idx), on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", self.step(batch), on_step=True, on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("test", 1, on_step=True, on_epoch=True)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"max_epochs": -2}, ValueError, "`max_epochs` must be a non-negative integer"),
        ({"gradient_clip_val": (1, 2)}, TypeError, "`gradient_clip_val` should be an"),
        (
            {"gradient_clip_algorithm": "norm2"},
            ValueError,
            "`gradient_clip_algorithm` norm2 is invalid",
        ),
        ({"limit_val_batches": 1.5}, ValueError, "passed invalid value 1.5 for limit_"),
        ({"fast_dev_run": -1}, ValueError, "should be >= 0"),
        ({"barebones": True, "fast_dev_run": 1}, ValueError, "barebones=True, fast_d"),
    ],
)
def test_arguments_are_misconfigured_in_lightnings_words(
    arguments: dict[str, Any], kind: type[Exception], words: str
):
    with pytest.raises(MisconfigurationException, match=words) as caught:
        Trainer(**arguments)
    # Programs for either trainer catch it.
    assert isinstance(caught.value, kind)


def test_a_module_is_misconfigured_in_lightnings_words():
    module: Any = BoringModel()
    module.training_step = None
    with pytest.raises(MisconfigurationException, match=r"No `training_step\(\)`"):
        trainer_of().fit(module)
    no_module: Any = torch.nn.Linear(1, 1)
    with pytest.raises(
        TypeError, match=r"must be a `LightningModule` or .*, got `Linear`"
    ):
        trainer_of().test(no_module)
    with pytest.raises(MisconfigurationException, match="requires a `LightningModule"):
        trainer_of().predict()


def test_errors_of_the_users_own_stay_as_they_are():
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        trainer_of().fit(Failing())
    assert type(caught.value) is ValueError


def test_checkpoints_that_are_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found") as caught:
        trainer_of().fit(BoringModel(), ckpt_path=tmp_path / "none.ckpt")
    assert isinstance(caught.value, CheckpointError)
    trainer = trainer_of()
    with pytest.raises(AttributeError, match="if a model is attached"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="`ModelCheckpoint` is not configured"):
        trainer.test(BoringModel(), ckpt_path="best")
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer_of(max_epochs=2).fit(BoringModel(), ckpt_path=tmp_path / "a.ckpt")


def test_warnings_can_be_filtered():
    module: Any = BoringModel()
    module.val_dataloader = None
    with pytest.warns(UserWarning, match="but have no `val_dataloader`"):
        trainer_of().fit(module)
    stream = DataLoader(RandomIterableDatasetWithLen(32, 2))
    with pytest.warns(UserWarning, match="has `__len__` defined"):
        trainer_of().test(BoringModel(), stream)
    shuffled = DataLoader(RandomDataset(32, 2), shuffle=True)
    with pytest.warns(UserWarning, match="turn shuffling off"):
        trainer_of().validate(BoringModel(), shuffled)


def test_errors_of_what_a_loader_calls_are_left_alone():
    class Undecodable:
        def __iter__(self) -> Any:
            # Its error has no line of Python but the loop's.
            return map(bytes.decode, [b"\xff"])

    with pytest.raises(UnicodeDecodeError):
        trainer_of().fit(BoringModel(), Undecodable())


def test_warnings_are_pythons_after_a_checkpoint_was_saved(tmp_path: Path):
    class Saves(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            logging.getLogger("loopwright").warning("at the end")

    with pytest.warns(UserWarning, match="at the end"):
        trainer_of(callbacks=[Saves()]).fit(BoringModel())


def test_warnings_about_other_processes_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
):
    class Warns(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
            logging.getLogger("loopwright").warning("of this process")

    with pytest.warns(UserWarning, match="of this process"):
        trainer_of(callbacks=[Warns()]).fit(BoringModel())


def test_the_best_model_is_used_with_a_warning(tmp_path: Path):
    saving = ModelCheckpoint(dirpath=tmp_path)
    trainer = trainer_of(enable_checkpointing=True, callbacks=saving)
    trainer.fit(BoringModel())
    with pytest.warns(UserWarning, match="The best model of the previous `fit` call"):
        trainer.validate(verbose=False)
    assert trainer.ckpt_path == saving.best_model_path


def test_a_limit_that_ends_a_fit_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer_of(max_steps=1).fit(BoringModel())
        assert "`max_steps=1` reached" in caplog.text
        trainer_of().fit(BoringModel())
        assert "`max_epochs=1` reached" in caplog.text


def test_a_training_that_goes_on_says_so(caplog: pytest.LogCaptureFixture):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                trainer.should_stop = True

    trainer = trainer_of(max_epochs=5, min_epochs=3, callbacks=Stop())
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer.fit(BoringModel())
    assert "`min_epochs=3` or `min_steps=None` has not been met" in caplog.text
    assert trainer.current_epoch == 3


def test_values_and_rows_are_lightnings(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    trainer = trainer_of(logger=logger, log_every_n_steps=1, num_sanity_val_steps=0)
    trainer.fit(Logging())
    names = {"train", "train_step", "train_epoch", "val", "val_epoch"}
    assert set(trainer.callback_metrics) == names
    assert trainer.callback_metrics["val"].dtype == torch.float32
    assert trainer.logged_metrics["train_step"].dtype == torch.float32
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["train_step"]]
    assert [int(row["step"]) for row in rows] == [0, 1]
    (results,) = trainer.test(Logging(), verbose=False)
    assert results == {"test_epoch": 1.0}


def test_results_are_printed_by_loader(capsys: pytest.CaptureFixture[str]):
    trainer_of(limit_test_batches=1).test(Logging())
    shown = capsys.readouterr().out
    assert "Test metric" in shown
    assert "DataLoader 0" in shown


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (1, {"on_step": False, "on_epoch": False}, "is not useful"),
        ("text", {}, r"self.log\(x, 'text'\)` was called"),
        ({"a": 1}, {}, "nested dictionaries cannot be logged"),
        (torch.ones(2), {}, "must have a single element"),
    ],
)
def test_what_cannot_be_logged(value: Any, options: dict[str, Any], words: str):
    class Wrong(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", value, **options)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=words):
        trainer_of().fit(Wrong())


def test_where_nothing_can_be_logged():
    class Early(BoringModel):
        def on_fit_start(self) -> None:
            with pytest.raises(MisconfigurationException, match=r"You can't `self.log"):
                self.log("x", 1)
            with pytest.raises(MisconfigurationException, match="`dataloader_idx`"):
                self.log("x/dataloader_idx_0", 1)

    trainer_of().fit(Early())
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        BoringModel().log("x", 1)


def test_a_monitor_that_was_not_logged():
    trainer = trainer_of(callbacks=EarlyStopping("nothing"))
    with pytest.raises(RuntimeError, match="conditioned on metric `nothing`"):
        trainer.fit(BoringModel())


def test_variables_give_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "7")
    monkeypatch.setenv("PL_TRAINER_GRADIENT_CLIP_ALGORITHM", "value")
    trainer = Trainer(accelerator="cpu", logger=False)
    assert trainer.max_steps == 7
    assert trainer.gradient_clip_algorithm == "value"
    assert Trainer(accelerator="cpu", logger=False, max_steps=3).max_steps == 3


def test_arguments_read_as_they_were_given():
    trainer = Trainer(accelerator="cpu", logger=False, num_sanity_val_steps=-1)
    assert trainer.max_epochs is None
    assert trainer.num_sanity_val_steps == float("inf")
    assert trainer.gradient_clip_algorithm is None
    assert trainer_of(limit_test_batches=1e3).limit_test_batches == 1000
    assert trainer_of(max_epochs=0).fit_loop.done
    assert not trainer_of().fit_loop.done


def test_stages_and_clipping_are_given_by_name():
    found = []

    class Named(BoringModel):
        def setup(self, other: Any = None, stage: Any = None) -> None:
            found.append((other, stage))

        def clip_gradients(
            self, optimizer: Any, *, gradient_clip_val: Any, **kwargs: Any
        ) -> None:
            found.append(gradient_clip_val)

    trainer_of(max_steps=1).fit(Named())
    assert found == [(None, "fit"), None]


def test_an_evaluation_reads_the_batches_of_a_combined_loader():
    class Counting(BoringModel):
        lengths: list[int]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.lengths.append(len(batch))

    module = Counting()
    module.lengths = []
    loaders = [DataLoader(RandomDataset(32, 2)) for _ in range(2)]
    trainer_of().validate(module, CombinedLoader(loaders, "max_size"))
    assert module.lengths == [2, 2]


def test_arguments_that_nobody_takes_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_of()
    trainer.fit(Saved(5))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = Saved.load_from_checkpoint(tmp_path / "a.ckpt", nobodys=1)
    assert "Saved.__init__ does not take nobodys" in caplog.text
    assert module.hparams == {"width": 5}


def test_hyperparameters_of_data_have_a_key_of_their_own(tmp_path: Path):
    class Data(LightningDataModule):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return DataLoader(RandomDataset(32, self.hparams.size))

    trainer = trainer_of()
    trainer.fit(BoringModel(), datamodule=Data(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved[Data.CHECKPOINT_HYPER_PARAMS_KEY] == {"size": 4}


def test_files_of_hyperparameters(tmp_path: Path):
    hparams = {"rate": 0.1, "inner": {"name": "a"}, "size": 3}
    save_hparams_to_yaml(tmp_path / "a.yaml", hparams)
    assert load_hparams_from_yaml(tmp_path / "a.yaml", use_omegaconf=False) == hparams
    save_hparams_to_tags_csv(tmp_path / "a.csv", hparams)
    assert load_hparams_from_tags_csv(tmp_path / "a.csv") == hparams
    with pytest.warns(UserWarning, match="Skipping 'kind' parameter"):
        save_hparams_to_yaml(tmp_path / "b.yaml", {"kind": torch.float32, "size": 1})
    assert load_hparams_from_yaml(tmp_path / "b.yaml", use_omegaconf=False) == {
        "size": 1
    }
    with pytest.warns(RuntimeWarning, match="none.csv"):
        assert load_hparams_from_tags_csv(tmp_path / "none.csv") == {}
    update_hparams(hparams, {"inner": {"name": "b"}, "new": 1})
    assert hparams == {"rate": 0.1, "inner": {"name": "b"}, "size": 3, "new": 1}


def test_demos_with_streams():
    trainer_of().fit(BoringModel(), datamodule=BoringDataModuleNoLen())
    data = IterableBoringDataModule()
    data.setup("fit")
    assert [len(list(loader)) for loader in data.train_dataloader()] == [16, 16]


def test_names_inside_of_lightning_can_be_imported():
    optimizer = import_module("loopwright.lightning.core.optimizer")
    with pytest.raises(NotImplementedError, match="_configure_optimizers"):
        optimizer._configure_optimizers(None)
    connector = import_module("loopwright.lightning.trainer.connectors.data_connector")
    connector.warning_cache.clear()
    cpu = import_module("loopwright.lightning.accelerators.cpu")
    assert cpu._PSUTIL_AVAILABLE in (True, False)
    signals = import_module(
        "loopwright.lightning.trainer.connectors.signal_connector"
    )._SignalConnector
    assert signal.SIGTERM in signals._valid_signals()
    with pytest.raises(AttributeError, match="nobodys_name"):
        _ = optimizer.nobodys_name


def test_what_a_test_needs_of_the_machine():
    testing = import_module("loopwright.lightning.utilities.testing")
    reasons, marks = testing._runif_reasons(min_torch="99", standalone=True)
    assert any(reason.startswith("torch>=99") for reason in reasons)
    assert marks == {"standalone": True}
    assert testing._runif_reasons(min_torch="2.0", rich=True) == ([], {})
    assert testing._runif_reasons(max_torch="2.0")[0] == ["torch<2.0"]
    with pytest.raises(TypeError, match="nobodys"):
        testing._runif_reasons(nobodys=True)


def test_seeding_leaves_only_variables_of_lightnings(monkeypatch: pytest.MonkeyPatch):
    for name in ("LOOPWRIGHT_SEED", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    seed_everything(7)
    trainer_of().fit(BoringModel())
    assert os.environ["PL_GLOBAL_SEED"] == "7"
    assert "LOOPWRIGHT_SEED" not in os.environ


def test_a_training_that_overfits_is_not_shuffled():
    loader = DataLoader(RandomDataset(32, 8), shuffle=True)
    with pytest.warns(UserWarning, match="requested to overfit but enabled train"):
        trainer_of(overfit_batches=1).fit(BoringModel(), loader)


def test_steps_take_the_index_of_the_loader():
    class Indexed(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int):
            return super().validation_step(batch, batch_idx)

    class NotIndexed(BoringModel):
        def test_step(self, batch: Any, batch_idx: int):
            return super().validation_step(batch, batch_idx)

    loaders = [DataLoader(RandomDataset(32, 2)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="only a single `val_dataloader`, but have"):
        trainer_of().validate(Indexed(), loaders[0])
    with pytest.raises(RuntimeError, match="multiple `test_dataloader`, but no"):
        trainer_of().test(NotIndexed(), loaders)
    trainer_of().test(NotIndexed(), loaders[0])


class Scheduled(BoringModel):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "other": 1},
            "another": 2,
        }


def test_unknown_keys_of_optimizers_are_left_out():
    module = Scheduled()
    trainer = trainer_of()
    with pytest.warns(RuntimeWarning) as warned:
        trainer.fit(module)
    texts = [str(warning.message) for warning in warned]
    assert any("optimizer configuration: {'another'}" in text for text in texts)
    assert any("lr scheduler dict: {'other'}" in text for text in texts)
    assert any("Are you sure you didn't mean 'interval'" in text for text in texts)
    assert len(trainer.lr_scheduler_configs) == 1
    assert "configure_optimizers" not in vars(module)


class Remembering(BoringDataModuleNoLen):
    def state_dict(self) -> dict[str, Any]:
        return {"number": 3}


def test_a_checkpoint_tells_how_far_the_loops_are(tmp_path: Path):
    keep = ModelCheckpoint(tmp_path)
    trainer = trainer_of(enable_checkpointing=True, callbacks=keep, max_epochs=2)
    trainer.fit(BoringModel(), datamodule=Remembering())
    saved = torch.load(keep.best_model_path, weights_only=True)
    assert saved["Remembering"] == {"number": 3}
    loops = saved["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["total"]["completed"] == 4
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] == 2
    assert loops["epoch_loop.batch_progress"]["is_last_batch"]
    assert loops["epoch_progress"]["current"]["ready"] == 2
    assert loops["epoch_progress"]["current"]["completed"] == 1
    again = ModelCheckpoint(tmp_path / "again")
    trainer = trainer_of(enable_checkpointing=True, callbacks=again, max_epochs=3)
    path = keep.best_model_path
    with pytest.warns(UserWarning, match="dirpath has changed"):
        trainer.fit(BoringModel(), datamodule=Remembering(), ckpt_path=path)
    assert trainer.global_step == 6


def test_loops_of_evaluations():
    trainer = trainer_of()
    trainer.validate(BoringModel())
    assert trainer.validate_loop.max_batches == [2]
    assert trainer.validate_loop.num_dataloaders == 1
    trainer.test(BoringModel(), DataLoader(RandomDataset(32, 3)))
    assert trainer.test_loop.max_batches == [3]


def test_integers_are_logged_as_floats_with_a_warning():
    class Counting(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("number", torch.tensor(2))
            return super().training_step(batch, batch_idx)

    trainer = trainer_of()
    with pytest.warns(UserWarning, match="'number', ...\\)` in your `training_step`"):
        trainer.fit(Counting())
    assert trainer.callback_metrics["number"].dtype == torch.float32


def test_the_argument_that_holds_the_hyperparameters():
    class Config(BoringModel):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters(settings)

    assert Config({"width": 1})._hparams_name == "settings"
    assert Saved(2)._hparams_name == "kwargs"
    assert BoringModel()._hparams_name is None


@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", DDPStrategy()]
)
def test_a_strategy_has_the_attributes_of_its_trainer(strategy: Any):
    found: dict[str, Any] = {}

    class Net(BoringModel):
        def on_train_start(self) -> None:
            strategy: Any = self.trainer.strategy
            found.update(
                module=strategy.lightning_module,
                optimizers=strategy.optimizers == self.trainer.optimizers,
                moved=strategy.batch_to_device(torch.ones(2)),
                sum=strategy.reduce(torch.ones(1), reduce_op="sum"),
                all=strategy.reduce_boolean_decision(True),
                any=strategy.reduce_boolean_decision(False, all=False),
                sent=strategy.broadcast({"a": 1}, src=0),
            )
            strategy.barrier("here")

    trainer = Trainer(**QUIET, strategy=strategy, devices=1, fast_dev_run=1)
    assert trainer.strategy.lightning_module is None
    module = Net()
    trainer.fit(module)
    assert found.pop("module") is module
    assert found == {
        "optimizers": True,
        "moved": pytest.approx(torch.ones(2)),
        "sum": 1,
        "all": True,
        "any": False,
        "sent": {"a": 1},
    }
    shared = trainer.strategy
    assert shared.parallel_devices == [torch.device("cpu")]
    assert (shared.num_nodes, shared.num_processes) == (1, 1)
    assert shared.is_distributed is False
    assert shared.reduce(torch.ones(1), None, "sum") == 1
    assert isinstance(shared.cluster_environment, LightningEnvironment)
    assert isinstance(shared.accelerator, CPUAccelerator)


def test_what_an_exception_ends_is_interrupted():
    class Net(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise OSError("no")

    trainer = Trainer(**QUIET)
    with pytest.raises(OSError, match="no"):
        trainer.fit(Net())
    assert trainer.interrupted
    assert trainer.state.status == "interrupted"


def test_attributes_of_a_strategy_may_be_a_programs_own():
    class Own(DDPStrategy):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.model = "mine"

    trainer = Trainer(**QUIET, strategy=Own(), devices=1, fast_dev_run=1)
    batch = trainer.strategy.batch_to_device({"x": torch.ones(1)})
    assert batch == {"x": 1}
    trainer.fit(BoringModel())
    assert trainer.strategy.model == "mine"


def test_what_is_refused_inside_of_a_run_does_not_end_it():
    refused: list[str] = []

    class Net(BoringModel):
        def on_train_epoch_start(self) -> None:
            for _ in range(2):
                try:
                    self.trainer.validate(self)
                except Exception as error:
                    refused.append(str(error))

    trainer = Trainer(**QUIET, fast_dev_run=1)
    trainer.fit(Net())
    assert len(refused) == 2
    assert trainer.state.finished
