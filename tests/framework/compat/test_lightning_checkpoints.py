"""Callbacks that save, stop and log, as programs for Lightning find them: names of files and states, and errors."""

from __future__ import annotations

import logging
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from loopwright.lightning import LightningModule, Trainer
from loopwright.lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    EarlyStoppingReason,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ThroughputMonitor,
    Timer,
)
from loopwright.lightning.demos import BoringModel, RandomDataset
from loopwright.lightning.loggers import CSVLogger
from loopwright.lightning.tuner import Tuner
from loopwright.lightning.utilities import MisconfigurationException, _load


def fit(
    folder: Path,
    *callbacks: Any,
    module: LightningModule | None = None,
    **settings: Any,
) -> Trainer:
    usual = {
        "max_epochs": 2,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**usual, **settings}, callbacks=[*callbacks])
    trainer.fit(module or BoringModel())
    return trainer


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


class Logs(BoringModel):
    """Logs one value an epoch."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self.values = values

    def on_validation_epoch_end(self) -> None:
        place = min(self.current_epoch, len(self.values) - 1)
        self.log("score", self.values[place])


def test_a_folder_has_the_checkpoints_alone(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", save_top_k=-1)
    fit(tmp_path, saves, module=Logs((2.0, 1.0)))
    assert names_in(tmp_path) == {"epoch=0.ckpt", "epoch=1.ckpt"}
    assert saves.best_model_path == str(tmp_path / "epoch=1.ckpt")


def test_the_last_of_none_is_a_file_of_its_own(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    trainer = fit(tmp_path, saves)
    last = tmp_path / "last.ckpt"
    assert names_in(tmp_path) == {"last.ckpt"}
    assert not last.is_symlink()
    assert saves.last_model_path == str(last)
    assert saves.best_model_path == ""
    assert torch.load(last, weights_only=True)["global_step"] == 4

    trainer = fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0), max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(BoringModel(), ckpt_path=str(last))
    assert trainer.global_step == 6


def test_states_have_lightnings_names(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, "{epoch}", monitor="score")
    stops = EarlyStopping("score")
    fit(tmp_path, saves, stops, module=Logs((2.0, 1.0)))
    states = torch.load(saves.best_model_path, weights_only=True)["callbacks"]
    key = (
        "ModelCheckpoint{'monitor': 'score', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None}"
    )
    assert states[key]["best_model_path"] == saves.best_model_path
    assert "EarlyStopping{'monitor': 'score', 'mode': 'min'}" in states

    again = EarlyStopping("score")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(
            tmp_path,
            again,
            ModelCheckpoint(tmp_path),
            module=Logs((2.0, 1.0, 5.0)),
            max_epochs=1,
        )
    again.load_state_dict(states["EarlyStopping{'monitor': 'score', 'mode': 'min'}"])
    assert again.best_score == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_top_k": -3}, "save_top_k=-3. Must be >= -1"),
        ({"save_top_k": 3}, r"\(save_top_k=3, monitor=None\) is not a valid"),
        ({"every_n_epochs": -3}, "every_n_epochs=-3. Must be >= 0"),
        (
            {"every_n_train_steps": 1, "every_n_epochs": 2},
            "Combination of parameters every_n_train_steps=1, every_n_epochs=2",
        ),
        (
            {"train_time_interval": timedelta(1), "every_n_epochs": 2},
            "should be mutually exclusive",
        ),
        ({"mode": "best"}, "`mode` can be 'min' or 'max', but got best"),
    ],
)
def test_arguments_that_do_not_fit_are_misconfigurations(
    arguments: dict[str, Any], message: str
):
    with pytest.raises(MisconfigurationException, match=message):
        ModelCheckpoint(**arguments)


def test_names_are_made_of_metrics():
    saves = ModelCheckpoint()
    name = saves._format_checkpoint_name
    assert name(None, {"epoch": 3, "step": 2}, prefix="run") == "run-epoch=3-step=2"
    plain = name(
        "loss={val/loss:.2f}", {"val/loss": 0.5}, auto_insert_metric_name=False
    )
    assert plain == "loss=0.50"
    assert ModelCheckpoint(dirpath="").dirpath is None
    assert saves._every_n_train_steps == 0


class StopsInThird(EarlyStopping):
    """Decides by the number of values that it has seen."""

    seen = 0

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str]:
        self.seen += 1
        return self.seen == 3, "three values"


class ChecksAtEnd(EarlyStopping):
    """Looks at the value when the training has ended."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_early_stopping_check(trainer)


def test_criteria_of_a_subclass_stop(tmp_path: Path):
    stops = StopsInThird("score")
    trainer = fit(tmp_path, stops, module=Logs((2.0, 1.0)), max_epochs=9)
    assert trainer.current_epoch == 3
    assert stops.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert stops.stopping_reason_message == "three values"

    checks = ChecksAtEnd("score")
    fit(tmp_path / "end", checks, module=Logs((2.0, 1.0)))
    assert checks.best_score == 1


def test_the_reason_for_stopping_says_what_it_is(tmp_path: Path):
    stops = EarlyStopping("score", divergence_threshold=8)
    fit(tmp_path, stops, module=Logs((2.0, 9.0)))
    assert stops.stopping_reason is EarlyStoppingReason.DIVERGENCE_THRESHOLD
    assert stops.stopping_reason_message is not None
    assert "Divergence threshold reached" in stops.stopping_reason_message

    with pytest.raises(MisconfigurationException, match=r"`mode` can be .* got best"):
        EarlyStopping("score", mode="best")
    with pytest.raises(RuntimeError, match="metric `other` which is not available"):
        fit(tmp_path / "other", EarlyStopping("other"))


class Finetuned(BoringModel):
    """Has a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.backbone(x))

    def configure_optimizers(self) -> Any:
        # The backbone is frozen at first.
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def test_rates_and_momentum_can_be_read(tmp_path: Path):
    rates = LearningRateMonitor(log_momentum=True)
    backbone = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    logger = CSVLogger(tmp_path)
    fit(tmp_path, backbone, rates, module=Finetuned(), logger=logger)
    # The first epoch's rate is that of the group which is the first of two now.
    assert len(rates.lrs["lr-SGD/pg1"]) == 2
    assert len(rates.lrs["lr-SGD/pg2"]) == 1
    assert "lr-SGD" not in rates.lrs
    assert rates.last_momentum_values["lr-SGD/pg2-momentum"] == 0.9
    assert rates.last_weight_decay_values["lr-SGD/pg2-weight_decay"] is None


class WithoutMomentum(BoringModel):
    """Has an optimizer without momentum."""

    def configure_optimizers(self) -> Any:
        return torch.optim.ASGD(self.parameters())


class OfOneName(BoringModel):
    """Has two groups of one name."""

    def configure_optimizers(self) -> Any:
        weight, bias = self.parameters()
        groups = [{"params": [p], "name": "layer"} for p in (weight, bias)]
        return torch.optim.SGD(groups, lr=0.1)


def test_what_a_rate_monitor_cannot_log(tmp_path: Path):
    with pytest.raises(MisconfigurationException, match="`Trainer` that has no logger"):
        fit(tmp_path, LearningRateMonitor())
    with pytest.raises(MisconfigurationException, match="should be `step` or `epoch`"):
        LearningRateMonitor("batch")  # type: ignore[arg-type] # on purpose
    settings = {"logger": CSVLogger(tmp_path), "enable_checkpointing": False}
    with pytest.warns(RuntimeWarning, match="optimizers do not have momentum"):
        fit(
            tmp_path,
            LearningRateMonitor(log_momentum=True),
            module=WithoutMomentum(),
            **settings,
        )
    message = "cannot have multiple parameter groups with identical"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, LearningRateMonitor(), module=OfOneName(), **settings)


def test_searches_and_timers_refuse_other_modes(tmp_path: Path):
    with pytest.raises(MisconfigurationException, match="Unsupported parameter value"):
        Timer(interval="batch")
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="should be either of"):
        Tuner(trainer).scale_batch_size(BoringModel(), mode="other")
    with pytest.raises(ValueError, match="should be either of"):
        Tuner(trainer).lr_find(BoringModel(), mode="other")
    assert LearningRateFinder(num_training_steps=7)._num_training_steps == 7


class TwoSizes(BoringModel):
    """Has a batch size beside that of its hyperparameters."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.save_hyperparameters()


def test_the_tuner_warns_of_two_batch_sizes(tmp_path: Path):
    trainer = Trainer(
        logger=False, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match="are mutually exclusive"):
        Tuner(trainer).scale_batch_size(TwoSizes(), max_trials=1)


class RunsCode:
    """Its pickle calls a function."""

    def __reduce__(self) -> Any:
        return print, ("this runs code",)


def test_a_file_from_the_net_runs_no_code_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(
        torch.hub,
        "load_state_dict_from_url",
        lambda url, **options: asked.append(options["weights_only"]),
    )
    _load("http://host/model.ckpt")
    _load("http://host/model.ckpt", weights_only=False)
    assert asked == [True, False]

    path = tmp_path / "model.ckpt"
    torch.save({"a": RunsCode()}, path)
    with pytest.raises(pickle.UnpicklingError):
        _load(path)


def test_checkpoints_are_told_with_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    saves = ModelCheckpoint(tmp_path, monitor="score", verbose=True)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, saves, module=Logs((0.5, 0.7)), num_sanity_val_steps=0)
    best = str(tmp_path / "epoch=0-step=2.ckpt")
    first = "Epoch 0, global step 2: 'score' reached 0.50000 (best 0.50000)"
    assert f"{first}, saving model to {best!r} as top 1" in caplog.text
    assert "Epoch 1, global step 4: 'score' was not in top 1" in caplog.text
    assert "is not among the best" not in caplog.text
    assert saves.verbose


def test_a_copy_of_a_checkpoint_callback_equals_it(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    assert vars(pickle.loads(pickle.dumps(saves))) == vars(saves)
    assert vars(ModelCheckpoint(tmp_path, every_n_train_steps=4)) != vars(saves)


class SavesByHand(Trainer):
    """Notes what is saved."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.saved: list[tuple[str, Any]] = []

    def save_checkpoint(self, filepath: Any, weights_only: Any = False, **_: Any):
        self.saved.append((Path(filepath).name, weights_only))
        super().save_checkpoint(filepath, weights_only)


def test_a_trainers_own_way_to_save_is_used(tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = SavesByHand(
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[saves],
    )
    trainer.fit(BoringModel())
    assert trainer.saved == [
        ("epoch=0-step=2.ckpt", True),
        ("epoch=1-step=4.ckpt", True),
    ]
    assert names_in(tmp_path) == {"epoch=1-step=4.ckpt"}


def test_a_link_takes_the_place_of_what_was_there(tmp_path: Path):
    trainer = fit(tmp_path, max_epochs=1)
    (tmp_path / "new.ckpt").touch()
    last = tmp_path / "last.ckpt"
    last.mkdir()
    for _ in range(2):
        ModelCheckpoint._link_checkpoint(trainer, str(tmp_path / "new.ckpt"), str(last))
        assert os.readlink(last) == "new.ckpt"


class SavesNothing(Checkpoint):
    """A Checkpoint of a program."""


def test_a_checkpoint_of_another_kind_is_found(tmp_path: Path):
    other = SavesNothing()
    trainer = fit(tmp_path, other, max_epochs=1)
    assert trainer.checkpoint_callback is other
    with pytest.raises(MisconfigurationException, match="is not configured"):
        trainer.test(ckpt_path="best")
    assert other.save_now(trainer) == ""


def test_a_fit_that_ended_before_its_checkpoint_is_refused(tmp_path: Path):
    saved = str(tmp_path / "third.ckpt")
    fit(tmp_path, max_epochs=3, enable_checkpointing=False).save_checkpoint(saved)
    trainer = Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False
    )
    message = "You restored a checkpoint with current_epoch=3, but .*max_epochs=1"
    with (
        pytest.raises(MisconfigurationException, match=message),
        pytest.warns(UserWarning, match="nothing to train"),
    ):
        trainer.fit(BoringModel(), ckpt_path=saved)


def test_criteria_can_be_tried_without_a_run(
    caplog: pytest.LogCaptureFixture,
):
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.callback_metrics["score"] = torch.tensor([[0.5]])
    stops = EarlyStopping("score", verbose=True)
    with caplog.at_level(logging.INFO):
        stops._run_early_stopping_check(trainer)
    assert stops.best_score == 0.5
    assert "score improved from inf to 0.5" in caplog.text


class Somewhere:
    """What a message is told of: a process of two."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.global_rank = rank


def test_messages_name_their_process(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        EarlyStopping._log_info(Somewhere(1), "first", False)
        EarlyStopping._log_info(Somewhere(1), "second", True)
        EarlyStopping._log_info(Somewhere(0), "third", True)
    assert caplog.messages == ["[rank: 1] first", "[rank: 0] third"]


class Sized(BoringModel):
    """Has a batch size, and rates that are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2
        self.lr = 0.1

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 64), self.batch_size)


def test_a_search_tells_its_trials_and_its_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = Trainer(
        logger=False, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path
    )
    with caplog.at_level(logging.INFO):
        size = Tuner(trainer).scale_batch_size(Sized(), init_val=32)
    assert size == 64
    assert "Batch size 32 succeeded, trying batch size 64" in caplog.text
    assert "batch size 64 is greater or equal than the length" in caplog.text
    assert trainer.train_dataloader.batch_size == 64
    assert trainer.train_dataloader is trainer.train_dataloader
    assert BatchSizeFinder()._tried == ""


def test_limits_of_rates_come_in_any_order(tmp_path: Path):
    trainer = Trainer(
        logger=False, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path
    )
    found = Tuner(trainer).lr_find(Sized(), min_lr=1.0, max_lr=1e-6, num_training=3)
    assert found is not None
    assert all(1e-6 <= rate <= 1.0 for rate in found.results["lr"])


# A trial leaves a module's attributes as they were.
_limits: list[int] = []


class NotesLimit(Sized):
    """Notes in each batch up to which step the training goes."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        _limits.append(trainer.fit_loop.max_steps)


def test_a_trial_has_a_loop_of_its_own(tmp_path: Path):
    _limits.clear()
    module = NotesLimit()
    searches = LearningRateFinder(num_training_steps=3, early_stop_threshold=None)
    trainer = fit(tmp_path, searches, module=module, max_epochs=1)
    assert _limits == [3, 3, 3, -1, -1]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 2
    counters = trainer.fit_loop.state_dict()["epoch_loop.batch_progress"]
    assert counters["total"]["completed"] == 2


class Rows(CSVLogger):
    """Keeps the rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def test_throughput_is_logged_inside_evaluations(tmp_path: Path):
    logger = Rows(tmp_path)
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: 3, window_size=3)
    trainer = Trainer(
        logger=logger,
        accelerator="cpu",
        callbacks=[monitor],
        limit_test_batches=5,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for _ in range(2):
        trainer.test(BoringModel(), verbose=False)
    samples = [
        (step, row["test/samples"])
        for step, row in logger.rows
        if "test/samples" in row
    ]
    assert samples == [(2, 6), (4, 12), (7, 21), (9, 27)]
    assert logger.rows[-1][1]["test/device/samples_per_sec"] > 0


def test_a_checkpoint_can_be_looked_at(tmp_path: Path):
    trainer = fit(tmp_path, max_epochs=1, enable_checkpointing=False)
    content = trainer._checkpoint_connector.dump_checkpoint()
    assert content["global_step"] == 2
    assert len(content["optimizer_states"]) == 1
    alone = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    weights = trainer.lightning_module.state_dict()
    name = "layer.weight"
    assert torch.equal(alone["state_dict"][name], weights[name])
    assert "optimizer_states" not in alone
    assert not list(tmp_path.iterdir())
