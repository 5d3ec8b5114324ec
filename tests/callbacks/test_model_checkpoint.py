from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import Module
from loopwright.framework.checkpoint.find import find_checkpoints, resolve
from loopwright.framework.checkpoint.manifest import is_complete
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.loggers import CSVLogger, Logger
from tests.callbacks.scripted import Scripted, fit, loader, trainer

FALLING, RISING = (3.0, 2.0, 1.0), (1.0, 2.0, 3.0)


def names(folder: str | Path = "checkpoints") -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def target(pointer: str) -> str:
    return os.path.basename(resolve(pointer))


# -- what is kept, and how it is called -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "values", "kept"),
    [
        ({}, FALLING, {"epoch=2-step=12.ckpt"}),
        ({}, RISING, {"epoch=2-step=12.ckpt"}),
        ({"monitor": "val_loss"}, FALLING, {"epoch=2-step=12.ckpt", "best.ckpt"}),
        ({"monitor": "val_loss"}, RISING, {"epoch=0-step=4.ckpt", "best.ckpt"}),
        (
            {"monitor": "val_loss", "mode": "max"},
            RISING,
            {"epoch=2-step=12.ckpt", "best.ckpt"},
        ),
        (
            {"monitor": "val_loss", "save_top_k": 2},
            FALLING,
            {"epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "best.ckpt"},
        ),
        (
            {"monitor": "val_loss", "save_top_k": 2},
            RISING,
            {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "best.ckpt"},
        ),
        (
            {"save_top_k": -1},
            FALLING,
            {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"},
        ),
        ({"save_top_k": 0}, FALLING, set()),
        (
            {"filename": "{epoch:02d}-{val_loss:.2f}"},
            FALLING,
            {"epoch=02-val_loss=1.00.ckpt"},
        ),
        (
            {"filename": "{epoch}-{val_loss:.2f}", "auto_insert_metric_name": False},
            FALLING,
            {"2-1.00.ckpt"},
        ),
        ({"filename": "same"}, FALLING, {"same.ckpt"}),
        (
            {"filename": "same", "monitor": "val_loss", "save_top_k": 2},
            FALLING,
            {"same.ckpt", "same-v1.ckpt", "best.ckpt"},
        ),
        (
            {
                "filename": "same",
                "monitor": "val_loss",
                "save_top_k": 2,
                "enable_version_counter": False,
            },
            FALLING,
            {"same.ckpt", "best.ckpt"},
        ),
        ({"every_n_epochs": 2, "save_top_k": -1}, FALLING, {"epoch=1-step=8.ckpt"}),
        ({"every_n_epochs": 0}, FALLING, set()),
        (
            {"every_n_train_steps": 5, "save_top_k": -1},
            FALLING,
            {"epoch=1-step=5.ckpt", "epoch=2-step=10.ckpt"},
        ),
        ({"save_last": True}, FALLING, {"epoch=2-step=12.ckpt", "last.ckpt"}),
        ({"save_last": "link"}, FALLING, {"epoch=2-step=12.ckpt", "last.ckpt"}),
        (
            {"save_last": True, "save_top_k": 0},
            FALLING,
            {"epoch=2-step=12.ckpt", "last.ckpt"},
        ),
        (
            {"save_last": True, "monitor": "val_loss"},
            RISING,
            {"epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt", "best.ckpt", "last.ckpt"},
        ),
        (
            {"save_last": True, "every_n_train_steps": 5},
            FALLING,
            {"epoch=2-step=10.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"},
        ),
    ],
)
def test_names_of_what_is_kept(
    arguments: dict[str, Any], values: tuple[float, ...], kept: set[str]
):
    fit(ModelCheckpoint(**arguments), module=Scripted(values))
    assert names() == kept


def test_every_kept_checkpoint_is_complete_and_of_its_step():
    callback = ModelCheckpoint(save_top_k=-1)
    fit(callback)
    for name in names():
        path = os.path.join("checkpoints", name)
        assert is_complete(path)
        assert f"step={load_checkpoint(path)['global_step']}.ckpt" in name


def test_attributes_tell_the_best_and_the_worst():
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    fit(callback, module=Scripted((2.0, 3.0, 1.0)))
    assert os.path.basename(callback.best_model_path) == "epoch=2-step=12.ckpt"
    assert os.path.basename(callback.kth_best_model_path) == "epoch=0-step=4.ckpt"
    assert (callback.best_model_score, callback.kth_value, callback.current_score) == (
        1.0,
        2.0,
        1.0,
    )
    assert {
        os.path.basename(path): value.item()
        for path, value in callback.best_k_models.items()
    } == {
        "epoch=0-step=4.ckpt": 2.0,
        "epoch=2-step=12.ckpt": 1.0,
    }
    assert target("checkpoints/best.ckpt") == "epoch=2-step=12.ckpt"


def test_nan_is_the_worst_of_all():
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=1)
    fit(callback, module=Scripted((float("nan"), 7.0, float("nan"))))
    assert names() == {"epoch=1-step=8.ckpt", "best.ckpt"}
    assert callback.best_model_score == 7.0


def test_a_second_run_in_the_same_folder_overwrites_nothing():
    fit(ModelCheckpoint("kept", save_last=True))
    fit(ModelCheckpoint("kept", save_last=True))
    assert names("kept") == {
        "epoch=2-step=12.ckpt",
        "epoch=2-step=12-v1.ckpt",
        "last.ckpt",
        "last-v1.ckpt",
    }
    assert target("kept/last.ckpt") == "epoch=2-step=12.ckpt"
    assert target("kept/last-v1.ckpt") == "epoch=2-step=12-v1.ckpt"


@pytest.mark.parametrize("filename", ["best", "last"])
def test_checkpoints_called_as_pointers_are_stay_checkpoints(filename: str):
    callback = ModelCheckpoint(filename=filename, monitor="val_loss", save_last=True)
    fit(callback)
    assert os.path.isdir(callback.best_model_path)
    assert os.path.basename(callback.best_model_path) == f"{filename}.ckpt"
    assert resolve(callback.last_model_path) == callback.best_model_path


@pytest.mark.parametrize(
    ("arguments", "metrics", "name"),
    [
        ({}, {"epoch": 1, "step": 5}, "epoch=1-step=5.ckpt"),
        ({"ver": 2}, {"epoch": 1, "step": 5}, "epoch=1-step=5-v2.ckpt"),
        ({"prefix": "p", "filename": "{epoch}"}, {"epoch": 1}, "p-epoch=1.ckpt"),
        (
            {"filename": "{val/loss:.1f}"},
            {"val/loss": torch.tensor(0.25)},
            "val/loss=0.2.ckpt",
        ),
        (
            {"filename": "{a.b}-{epoch_test}-{epoch}"},
            {"a.b": 1, "epoch_test": 2, "epoch": 3},
            "a.b=1-epoch_test=2-epoch=3.ckpt",
        ),
        ({"filename": "{missing:d}"}, {}, "missing=0.ckpt"),
    ],
)
def test_format_checkpoint_name(
    arguments: dict[str, Any], metrics: dict[str, Any], name: str
):
    assert ModelCheckpoint().format_checkpoint_name(metrics, **arguments) == name


def test_a_value_that_does_not_take_its_format_is_named():
    with pytest.raises(ValueError, match=r"'val_loss' is .*1.5.* formatted as 'd'"):
        ModelCheckpoint(filename="{val_loss:d}").format_checkpoint_name(
            {"val_loss": torch.tensor(1.5)}
        )


# -- where ------------------------------------------------------------------------------------------------------------


def test_default_folders(tmp_path: Path):
    alone, logged = ModelCheckpoint(), ModelCheckpoint()
    fit(alone, default_root_dir=tmp_path / "alone")
    fit(logged, logger=CSVLogger(tmp_path / "logs", name="digits"))
    assert alone.dirpath == str(tmp_path / "alone" / "checkpoints")
    assert logged.dirpath == str(
        tmp_path / "logs" / "digits" / "version_0" / "checkpoints"
    )
    assert names(str(alone.dirpath)) == {"epoch=2-step=12.ckpt"}
    assert names(str(logged.dirpath)) == {"epoch=2-step=12.ckpt"}


def test_a_logger_without_folder_names_one_below_the_root(tmp_path: Path):
    class Remote(Logger):
        name, version = "project", 7  # type: ignore[assignment] # properties in the contract

        def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    callback = ModelCheckpoint()
    fit(callback, logger=Remote())
    assert callback.dirpath == str(tmp_path / "project" / "version_7" / "checkpoints")


# -- pointers and removal ---------------------------------------------------------------------------------------------


def test_last_points_to_the_newest_though_it_is_not_among_the_best():
    callback = ModelCheckpoint(monitor="val_loss", save_last=True)
    fit(callback, module=Scripted(RISING))
    assert os.path.basename(callback.last_model_path) == "last.ckpt"
    assert target(callback.last_model_path) == "epoch=2-step=12.ckpt"
    assert load_checkpoint(callback.last_model_path)["global_step"] == 12


def test_a_pointer_whose_name_changes_leaves_none_behind():
    callback = ModelCheckpoint(save_last=True)
    callback.CHECKPOINT_NAME_LAST = "{epoch}-last"  # type: ignore[misc] # as published code does
    fit(callback)
    assert names() == {"epoch=2-step=12.ckpt", "epoch=2-last.ckpt"}


@pytest.mark.parametrize("folder", ["kept", "memory://slashes/kept"])
def test_slashes_in_names_leave_no_empty_folders(folder: str):
    arguments: dict[str, Any] = {
        "filename": "{epoch}/{val_loss:.1f}/a",
        "auto_insert_metric_name": False,
    }
    callback = ModelCheckpoint(folder, monitor="val_loss", **arguments)
    fit(callback)
    filesystem, path = fsspec.core.url_to_fs(folder)
    found = {
        name.removeprefix(f"{path}/")
        for name in filesystem.find(path, maxdepth=2, withdirs=True)
    }
    assert found - {path} == {"best.ckpt", "2", "2/1.0"}


def test_what_a_user_puts_into_a_checkpoint_outlives_it():
    class Notes(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Module) -> None:
            if trainer.current_epoch == 1:
                Path("kept/epoch=0-step=4.ckpt/notes.txt").write_text("mine")

    fit(ModelCheckpoint("kept", async_save=False), Notes())
    assert names("kept") == {"epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt"}
    assert os.listdir("kept/epoch=0-step=4.ckpt") == ["notes.txt"]


class Witness(Logger):
    """Notes what lies in the folder when a checkpoint has been committed; may die at that moment."""

    def __init__(self, die_at_save: int = 0) -> None:
        self.seen: list[set[str]] = []
        self.die_at_save = die_at_save

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        assert all(is_complete(path) for path in checkpoint_callback.best_k_models)
        self.seen.append(names(checkpoint_callback.dirpath))
        if len(self.seen) == self.die_at_save:
            raise KeyboardInterrupt


def test_the_old_one_goes_only_after_the_next_is_committed():
    witness = Witness()
    fit(ModelCheckpoint("kept", monitor="val_loss", save_last=True), logger=witness)
    assert witness.seen[1] == {
        "epoch=0-step=4.ckpt",
        "epoch=1-step=8.ckpt",
        "best.ckpt",
        "last.ckpt",
    }
    assert witness.seen[2] == {
        "epoch=1-step=8.ckpt",
        "epoch=2-step=12.ckpt",
        "best.ckpt",
        "last.ckpt",
    }


def test_what_an_interruption_left_is_removed_by_the_resumed_run():
    with pytest.raises(KeyboardInterrupt):
        fit(ModelCheckpoint("kept"), logger=Witness(die_at_save=2))
    assert names("kept") == {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"}
    fit(ModelCheckpoint("kept"), ckpt_path="kept/epoch=1-step=8.ckpt")
    assert names("kept") == {"epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"}


def test_what_a_run_was_resumed_from_is_kept_while_it_runs():
    fit(ModelCheckpoint("kept"), max_epochs=1)
    fit(ModelCheckpoint("kept"), max_epochs=3, ckpt_path="kept/epoch=0-step=4.ckpt")
    assert names("kept") == {"epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt"}
    fit(ModelCheckpoint("kept"), max_epochs=4, ckpt_path="kept/epoch=2-step=12.ckpt")
    assert names("kept") == {"epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt"}


def test_a_failed_save_raises_and_changes_nothing():
    class Refuses(Scripted):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.current_epoch == 1:
                raise OSError("disk full")

    callback = ModelCheckpoint("kept", monitor="val_loss", save_last=True)
    with pytest.raises(OSError, match="disk full"):
        fit(callback, module=Refuses())
    assert names("kept") == {"epoch=0-step=4.ckpt", "best.ckpt", "last.ckpt"}
    assert (
        list(callback.best_k_models)
        == [callback.best_model_path]
        == [resolve(callback.last_model_path)]
    )
    assert callback.best_model_score == 3.0


def test_another_module_in_the_same_trainer_has_checkpoints_of_its_own():
    callback = ModelCheckpoint("kept", monitor="val_loss", save_top_k=2)
    run = trainer(callback)
    run.fit(Scripted(), loader(), loader())
    first = names("kept") - {"best.ckpt"}
    run.fit(Scripted((5.0, 6.0, 7.0)), loader(), loader())
    assert callback.best_model_score == 5.0
    assert [os.path.basename(path) for path in callback.best_k_models] == [
        "epoch=0-step=4.ckpt",
        "epoch=1-step=8-v1.ckpt",
    ]
    assert first <= names("kept")


def test_a_copy_can_be_made_while_a_checkpoint_is_written():
    class Copies(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Module) -> None:
            self.copied = copy.deepcopy(trainer)

    copies = Copies()
    fit(ModelCheckpoint("kept", every_n_train_steps=1), copies)
    assert copies.copied.checkpoint_callback.best_model_path.endswith("step=8.ckpt")


def test_a_local_url_is_a_path(tmp_path: Path):
    callback = ModelCheckpoint(
        f"file://{tmp_path}/kept", filename="same", enable_version_counter=False
    )
    made = fit(callback)
    assert callback.best_model_path == f"{tmp_path}/kept/same.ckpt"
    made.save_checkpoint(f"local://{tmp_path}/mine.ckpt")
    assert load_checkpoint(f"file://{tmp_path}/mine.ckpt")["global_step"] == 12
    assert names(tmp_path) == {"kept", "mine.ckpt"}


# -- when -------------------------------------------------------------------------------------------------------------


class Saves(Callback):
    """Notes the step and the next batch of each save."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.batches: list[int] = []

    def on_save_checkpoint(
        self, trainer: Any, module: Module, checkpoint: dict[str, Any]
    ) -> None:
        self.steps.append(trainer.global_step)
        self.batches.append(trainer.batch_idx)


def test_nothing_is_saved_outside_of_training():
    saves = Saves()
    callback = ModelCheckpoint(
        "kept", monitor="val_loss", every_n_epochs=2, save_on_train_epoch_end=False
    )
    run = trainer(callback, saves, max_epochs=1)
    run.validate(Scripted(), loader(), verbose=False)
    run.test(Scripted(), loader(), verbose=False)
    run.fit(Scripted(), loader(), loader())
    run.validate(
        Scripted(), loader(), verbose=False
    )  # at a step that was not saved, in what would be epoch 1
    assert saves.steps == []


def test_the_sanity_check_of_a_resumed_run_saves_nothing():
    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint("cut.ckpt")

    fit(Stops(), max_epochs=1)
    saves = Saves()
    callback = ModelCheckpoint(save_on_train_epoch_end=False)
    fit(callback, saves, max_epochs=1, num_sanity_val_steps=2, ckpt_path="cut.ckpt")
    assert saves.steps == [4]


def test_fast_dev_run_saves_nothing():
    fit(ModelCheckpoint("kept", save_last=True, every_n_train_steps=1), fast_dev_run=2)
    assert names("kept") == set()


def test_inside_an_accumulation_window_nothing_is_saved():
    saves = Saves()
    fit(
        ModelCheckpoint(every_n_train_steps=1, save_top_k=-1),
        saves,
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    assert saves.steps == [1, 2]
    assert saves.batches == [2, 4]


def test_a_window_that_was_not_among_the_best_is_not_tried_again_inside_the_next():
    class Scored(Scripted):
        scores = (
            9.0,
            1.0,
            0.5,
            2.0,
            0.0,
            3.0,
            0.0,
            4.0,
        )  # of each batch; every second one ends a window

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("score", self.scores[self.trainer.current_epoch * 4 + batch_idx])
            return super().training_step(batch, batch_idx)

    saves, callback = Saves(), ModelCheckpoint(every_n_train_steps=1, monitor="score")
    fit(
        callback,
        saves,
        module=Scored(),
        accumulate_grad_batches=2,
        max_epochs=2,
        validate=False,
    )
    assert (saves.steps, saves.batches) == ([1], [2])
    assert callback.best_model_score == 1.0


def test_an_interval_of_no_time_saves_each_step():
    saves = Saves()
    fit(ModelCheckpoint(train_time_interval=timedelta(0)), saves, max_epochs=1)
    assert saves.steps == [1, 2, 3, 4]


def test_a_long_interval_saves_nothing_and_goes_on_in_a_resumed_run():
    callback = ModelCheckpoint("kept", train_time_interval=timedelta(hours=1))
    assert callback.state_dict()["interval_elapsed"] == 0.0
    assert fit(callback, max_epochs=1).global_step == 4
    assert names("kept") == set()
    saved = callback.state_dict()
    assert saved["interval_elapsed"] > 0.0
    resumed, saves = (
        ModelCheckpoint("kept", train_time_interval=timedelta(hours=1)),
        Saves(),
    )
    resumed.load_state_dict({**saved, "interval_elapsed": 3600.0})
    fit(resumed, saves, max_epochs=1)
    assert saves.steps == [1]  # the hour was over; the next one begins


def test_validation_inside_an_epoch_moves_saving_there():
    saves = Saves()
    fit(
        ModelCheckpoint(monitor="val_loss", save_top_k=-1),
        saves,
        max_epochs=1,
        val_check_interval=2,
    )
    assert saves.steps == [2, 4]


def test_without_validation_the_end_of_the_epoch_counts():
    saves = Saves()
    fit(ModelCheckpoint(), saves, validate=False, check_val_every_n_epoch=2)
    assert saves.steps == [4, 8, 12]


def test_the_value_is_that_of_the_validation_at_the_same_step():
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, save_top_k=-1)
    saves = Saves()
    fit(callback, saves, max_epochs=2)
    # At step 2 there is no value yet: that checkpoint is saved after the validation at step 4.
    assert saves.steps == [4, 6, 8]
    assert [value.item() for value in callback.best_k_models.values()] == [
        3.0,
        3.0,
        2.0,
    ]


def test_a_value_of_the_epoch_is_waited_for():
    class Averages(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    saves, callback = Saves(), ModelCheckpoint(monitor="mean", every_n_train_steps=2)
    fit(callback, saves, module=Averages(), max_epochs=2, check_val_every_n_epoch=3)
    assert saves.steps == [4]
    assert callback.best_model_score == 1.5


def test_the_end_of_training_saves_what_no_validation_came_to_rank():
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    fit(callback, max_epochs=1, check_val_every_n_epoch=2)
    assert names() == {"epoch=0-step=4.ckpt", "best.ckpt"}
    assert callback.best_model_score == float("inf")


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        ({}, {}),
        ({}, {"validate": False}),
        ({"every_n_train_steps": 1}, {"validate": False}),
        ({"every_n_train_steps": 1}, {}),
        ({"save_on_train_epoch_end": False}, {}),
    ],
)
def test_a_monitor_that_was_never_logged_is_an_error(
    arguments: dict[str, Any], run: dict[str, Any]
):
    with pytest.raises(
        RuntimeError, match=r"monitor='val_los'.*logged so far: '(train|val)_loss'"
    ):
        fit(ModelCheckpoint(monitor="val_los", **arguments), **run)


def test_the_nearest_name_is_suggested():
    with pytest.raises(RuntimeError, match="Did you mean 'val_loss'"):
        fit(ModelCheckpoint(monitor="val_los"))


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
        {"monitor": "val_loss", "mode": "max"},
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"monitor": "val_loss", "every_n_train_steps": 3, "save_last": True},
        {"monitor": "val_loss", "every_n_train_steps": 3, "save_top_k": -1},
    ],
)
@pytest.mark.parametrize("cut", [4, 6, 8])
def test_a_resumed_run_keeps_the_same_as_the_uninterrupted_one(
    arguments: dict[str, Any], cut: int
):
    class Copies(Callback):
        """Saves one checkpoint of its own, at a step at which the run could have been killed."""

        phase = "persist"

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == cut:
                trainer.save_checkpoint("copy.ckpt")
                os.system(
                    "rm -rf before && cp -r kept before"
                )  # the folder as it was at that moment

    values = (2.0, 3.0, 1.0, 2.5)
    whole = ModelCheckpoint("kept", **arguments)
    fit(whole, Copies(), module=Scripted(values), max_epochs=4)
    expected_names, expected = names("kept"), whole.state_dict()

    os.system("rm -rf kept && mkdir -p before && mv before kept")
    resumed = ModelCheckpoint("kept", **arguments)
    fit(resumed, module=Scripted(values), max_epochs=4, ckpt_path="copy.ckpt")
    assert names("kept") == expected_names
    state = resumed.state_dict()
    assert {k: v for k, v in state.items() if k != "interval_elapsed"} == {
        k: v for k, v in expected.items() if k != "interval_elapsed"
    }


def test_a_resumed_run_goes_on_in_the_default_folder():
    fit(
        ModelCheckpoint(monitor="val_loss", save_top_k=2),
        logger=CSVLogger("logs"),
        max_epochs=1,
    )
    resumed = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    folder = "logs/loopwright_logs/version_0/checkpoints"
    fit(resumed, logger=CSVLogger("logs"), ckpt_path=f"{folder}/epoch=0-step=4.ckpt")
    assert os.listdir("logs/loopwright_logs") == ["version_0"]
    assert names(folder) == {
        f"epoch={epoch}-step={4 * epoch + 4}.ckpt" for epoch in range(3)
    } | {"best.ckpt"}


def test_what_a_pointer_resumed_from_is_kept_too():
    fit(ModelCheckpoint("kept", save_last=True), max_epochs=1)
    fit(ModelCheckpoint("kept", save_last=True), ckpt_path="kept/last.ckpt")
    assert names("kept") == {"epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"}


def test_a_run_that_ends_as_soon_as_it_is_resumed_saves_nothing_again():
    def callbacks() -> list[Callback]:
        return [
            EarlyStopping("val_loss", patience=1),
            ModelCheckpoint("kept", save_last=True),
        ]

    fit(*callbacks(), module=Scripted(RISING))
    before = names("kept")
    fit(*callbacks(), module=Scripted(RISING), ckpt_path="kept/epoch=1-step=8.ckpt")
    assert names("kept") == before


def test_a_new_folder_begins_a_new_list():
    fit(ModelCheckpoint("old", monitor="val_loss", save_top_k=3), max_epochs=2)
    moved = ModelCheckpoint("new", monitor="val_loss", save_top_k=3)
    with pytest.warns(
        UserWarning, match="dirpath has changed from .*old.* to .*new"
    ) as caught:
        fit(moved, max_epochs=3, ckpt_path="old/epoch=0-step=4.ckpt")
    assert len(caught) == 1
    assert names("old") == {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "best.ckpt"}
    assert names("new") == {"epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "best.ckpt"}


def test_weights_only_checkpoints_load_but_do_not_resume():
    callback = ModelCheckpoint(save_weights_only=True)
    fit(callback)
    assert "optimizer_states" not in load_checkpoint(callback.best_model_path)
    with pytest.raises(RuntimeError, match="weights_only"):
        fit(ModelCheckpoint("other"), ckpt_path=callback.best_model_path)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "least"}, "mode must be 'min'.*'least'"),
        ({"save_top_k": -2}, "save_top_k .*-2"),
        ({"save_top_k": 2}, "save_top_k=2 needs a monitor"),
        ({"save_top_k": 1.5}, "save_top_k .*1.5"),
        ({"save_last": "yes"}, "save_last .*'yes'"),
        ({"every_n_train_steps": -1}, "every_n_train_steps .*-1"),
        ({"every_n_epochs": 0.5}, "every_n_epochs .*0.5"),
        ({"train_time_interval": 60}, "train_time_interval .*60"),
        ({"every_n_train_steps": 2, "every_n_epochs": 2}, "give one of"),
        ({"train_time_interval": timedelta(1), "every_n_epochs": 2}, "give one of"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelCheckpoint(**arguments)


# -- several runs at once ---------------------------------------------------------------------------------------------


def runs_at_once(barrier: Any, root: str, number: int, answers: Any) -> None:
    """In a process of its own: runs that begin with those of a peer, in the same folders; tells what each saved."""
    os.chdir(root)
    told = []
    kinds: dict[str, Any] = {
        "numbered": lambda folder: {
            "logger": CSVLogger(folder),
            "default_root_dir": folder,
        },
        "plain": lambda folder: {"default_root_dir": folder},
        "given": lambda folder: {"dirpath": f"{folder}/kept"},
    }
    for folder, made in (
        (f"{kind}{i}", kinds[kind]) for kind in kinds for i in range(7)
    ):
        arguments = made(folder)
        module = Scripted()
        torch.nn.init.constant_(module.layer.weight, number)
        saves = ModelCheckpoint(
            arguments.pop("dirpath", None),
            monitor="val_loss",
            save_top_k=-1,
            save_last=True,
        )
        barrier.wait()
        fit(saves, module=module, **arguments)
        bias = [
            load_checkpoint(path)["state_dict"]["layer.bias"].item()
            for path in saves.best_k_models
        ]
        newest = load_checkpoint(saves.last_model_path)["state_dict"][
            "layer.bias"
        ].item()
        told.append(
            (
                folder,
                saves.dirpath,
                sorted(saves.best_k_models),
                bias,
                newest == module.layer.bias.item(),
            )
        )
    answers.put((number, told))


def test_runs_that_start_at_once_keep_all_their_checkpoints(tmp_path: Path):
    spawn = torch.multiprocessing.get_context("spawn")
    barrier, answers = (
        spawn.Barrier(2, timeout=60),
        spawn.Queue(),
    )  # nobody waits for one that has failed
    runs = [
        spawn.Process(target=runs_at_once, args=(barrier, str(tmp_path), i, answers))
        for i in (1, 2)
    ]
    for run in runs:
        run.start()
    (_, one), (_, other) = sorted(answers.get(timeout=120) for _ in runs)
    for run in runs:
        run.join()
    for (folder, dirpath, paths, values, is_own), (
        _,
        theirs,
        their_paths,
        their_values,
        is_theirs,
    ) in zip(one, other, strict=True):
        assert dirpath != theirs, folder
        assert is_own
        assert is_theirs
        assert not set(paths) & set(their_paths)
        assert set(values).isdisjoint(their_values)
        assert len(paths) == len(their_paths) == 3
        found = {
            path
            for path in find_checkpoints(str(tmp_path / folder))
            if "v" not in os.path.basename(path)
        }
        assert found == {*paths, *their_paths}
        first, second = sorted((dirpath, theirs))
        assert second == (
            first.replace("version_0", "version_1")
            if "numbered" in folder
            else f"{first}/v1"
        )


def test_a_folder_is_free_again_when_the_run_that_had_it_is_over():
    for number in range(3):
        callback = ModelCheckpoint("kept", filename="{epoch}", every_n_epochs=3)
        fit(
            callback,
            ModelCheckpoint("kept", filename="same folder", monitor="val_loss"),
        )
        assert callback.dirpath == os.path.abspath("kept"), number


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_folder_that_cannot_be_written_to_is_noticed_before_training(
    on_save_error: Any,
):
    Path("notes").write_text("a file")

    class Begins(Callback):
        begun = False

        def on_train_start(self, trainer: Any, module: Module) -> None:
            self.begun = True

    begins = Begins()
    try:
        fit(ModelCheckpoint("notes/kept", on_save_error=on_save_error), begins)
    except OSError as error:
        assert "the folder for checkpoints" in str(error)  # noqa: PT017 # the other setting raises nothing
        assert "notes/kept" in str(error)  # noqa: PT017
    assert begins.begun == (on_save_error == "warn")
