"""Hooks of Module, DataModule and Callback fire in Lightning 2.6's order: whole sequences, recorded there, held here.

Where ours differs, it is for one of these reasons; the tests that hold a difference say "unlike Lightning".

==========================  =========================================================================================
difference                  reason
==========================  =========================================================================================
optimizer_step              without a closure fires after configure_gradient_clipping, not before training_step; one
                            that takes a closure fires as in Lightning (test_closures.py)
callbacks that decide or    run after the module in every hook (Lightning: in on_train_epoch_end only), so that a
persist                     checkpoint holds what the module did in the same hook
plateau schedulers          step before the checkpoint of that epoch is saved, so that it holds their new state
training_step gives None    that batch fires neither zero_grad nor a step, and counts for nothing in its window
-1 of on_train_batch_start  counts from a callback too; steps no scheduler, as no window ended; steps an open window
                            rather than drop its gradients
should_stop                 ends at the next complete window (Lightning drops an open one), and as soon as min_steps
                            are done (Lightning: at the epoch's end); the epoch left is not counted as completed
evaluation with ckpt_path   leaves the callbacks' states alone: a test of an old checkpoint must not set back which is
                            the best
KeyboardInterrupt           is raised again as itself (Lightning: SystemExit)
val_dataloader              of the sanity check is called with gradients enabled, as any other time
==========================  =========================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import DataModule, Module, Trainer
from tests.framework.models import quiet
from tests.framework.recording import (
    Data,
    Observer,
    Recorder,
    Tiny,
    expand,
    recording,
    samples,
)

# A line without owner is the callback's hook, then the module's.
BLOCKS = {
    "<SETUP>": """
        module.configure_callbacks
        datamodule+module.prepare_data
        datamodule+callback+module.setup
        module.configure_model""",
    "<LOAD>": """
        module.on_load_checkpoint
        datamodule.load_state_dict
        callback.on_load_checkpoint
        callback.load_state_dict""",
    "<BEFORE_FIT>": """
        <SETUP>
        module.configure_optimizers
        on_fit_start""",
    "<LOADERS>": """
        datamodule.train_dataloader
        datamodule.val_dataloader""",
    "<BEGIN>": """
        <BEFORE_FIT>
        <LOADERS>
        on_train_start""",
    "<TRANSFER>": """
        datamodule.on_before_batch_transfer
        datamodule.transfer_batch_to_device
        datamodule.on_after_batch_transfer""",
    "<START_BATCH>": """
        <TRANSFER>
        on_train_batch_start
        module.training_step""",
    "<ZERO_GRAD>": """
        on_before_zero_grad
        module.optimizer_zero_grad""",
    "<BACKWARD>": """
        on_before_backward
        module.backward
        on_after_backward""",
    "<STEP>": """
        on_before_optimizer_step
        module.configure_gradient_clipping
        module.optimizer_step           # unlike Lightning""",
    "<FIRST_OF_WINDOW>": """
        <START_BATCH>
        <ZERO_GRAD>
        <BACKWARD>
        on_train_batch_end""",
    "<INSIDE_WINDOW>": """
        <START_BATCH>
        <BACKWARD>
        on_train_batch_end""",
    "<LAST_OF_WINDOW>": """
        <START_BATCH>
        <BACKWARD>
        <STEP>
        module.lr_scheduler_step
        on_train_batch_end""",
    "<TRAIN_BATCH>": """
        <START_BATCH>
        <ZERO_GRAD>
        <BACKWARD>
        <STEP>
        module.lr_scheduler_step
        on_train_batch_end""",
    "<TRAIN_BATCH without scheduler>": """
        <START_BATCH>
        <ZERO_GRAD>
        <BACKWARD>
        <STEP>
        on_train_batch_end""",
    "<VALIDATION_BATCH>": """
        <TRANSFER>
        on_validation_batch_start
        module.validation_step
        on_validation_batch_end""",
    "<VALIDATION_START>": """
        module.on_validation_model_eval
        on_validation_start
        on_validation_epoch_start""",
    "<EVALUATION>": """
        <VALIDATION_START>
        2 x <VALIDATION_BATCH>
        on_validation_epoch_end
        on_validation_end
        module.on_validation_model_train""",
    "<VALIDATION>": """
        module.on_validation_model_zero_grad
        <EVALUATION>""",
    "<SANITY_CHECK>": """
        callback.on_sanity_check_start
        datamodule.val_dataloader
        <EVALUATION>
        callback.on_sanity_check_end""",
    "<EPOCH>": """
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end""",
    "<TEST>": """
        module.on_test_model_eval
        on_test_start
        on_test_epoch_start
        2 x [
            <TRANSFER>
            on_test_batch_start
            module.test_step
            on_test_batch_end
        ]
        on_test_epoch_end
        on_test_end
        module.on_test_model_train""",
    "<PREDICTION>": """
        module.on_predict_model_eval
        on_predict_start
        on_predict_epoch_start
        2 x [
            <TRANSFER>
            on_predict_batch_start
            module.predict_step
            on_predict_batch_end
        ]
        on_predict_epoch_end
        on_predict_end
        module.on_predict_model_train""",
    "<END>": """
        on_train_end
        on_fit_end
        <TEARDOWN>""",
    "<TEARDOWN>": "datamodule+callback+module.teardown",
    "<NO_EPOCH>": """
        on_fit_end
        <TEARDOWN>""",
    "<EXCEPTION>": "callback+datamodule.on_exception",
    "<SAVE>": """
        callback+datamodule.state_dict
        on_save_checkpoint""",
}


@dataclass
class Run:
    """What a scenario runs: recording objects that share one recorder."""

    recorder: Recorder
    trainer: Trainer
    module: Any
    datamodule: Any

    def fit(self, **kwargs: Any) -> Run:
        self.trainer.fit(self.module, datamodule=self.datamodule, **kwargs)
        return self

    def assert_order(self, text: str, blocks: dict[str, str] = BLOCKS) -> None:
        assert self.recorder.events == expand(text, blocks)


def prepare(
    *others: Any,
    module: dict[str, Any] | None = None,
    acts: dict[str, Any] | None = None,
    **trainer: Any,
) -> Run:
    """A Trainer with a recording callback before ``others``, a recording module and data module."""
    recorder = Recorder()
    callback = recording(Observer, Callback, "callback", recorder)(**(acts or {}))
    made = quiet(callback, *others, **trainer)
    tiny = recording(Tiny, Module, "module", recorder)(**(module or {}))
    return Run(
        recorder, made, tiny, recording(Data, DataModule, "datamodule", recorder)()
    )


def stop(trainer: Trainer, batch_idx: int) -> None:
    """Ask to stop after the second batch."""
    if batch_idx == 1 and trainer.current_epoch == 0:
        trainer.should_stop = True


# -- fit ------------------------------------------------------------------------------------------------------------


TWO_EPOCHS = """
    <BEFORE_FIT>
    <SANITY_CHECK>
    datamodule.train_dataloader
    on_train_start
    2 x <EPOCH>
    <END>
"""


def test_fit_with_sanity_check_and_validation() -> None:
    """Two epochs from the first hook to the last."""
    prepare(
        max_epochs=2, num_sanity_val_steps=2, gradient_clip_val=1.0
    ).fit().assert_order(TWO_EPOCHS)


ACCUMULATION = """
    <BEGIN>
    on_train_epoch_start
    <FIRST_OF_WINDOW>
    <INSIDE_WINDOW>
    <LAST_OF_WINDOW>
    <TRAIN_BATCH>                       # a window of what is left
    <VALIDATION>
    on_train_epoch_end
    <END>
"""


def test_accumulation() -> None:
    """A window clears gradients at its first batch and steps at its last, or the epoch's."""
    prepare(accumulate_grad_batches=3).fit().assert_order(ACCUMULATION)


def spans(recorder: Recorder) -> list[tuple[str, tuple[int, int, bool, bool]]]:
    """The states that calls saw: ``first call … last call`` of each stretch with one state."""
    found: list[tuple[str, Any]] = []
    for event, state in zip(recorder.events, recorder.states, strict=True):
        if found and found[-1][1] == state:
            found[-1] = (f"{found[-1][0].split(' … ')[0]} … {event}", state)
        else:
            found.append((event, state))
    return found


STEP_TO_STEP = "module.lr_scheduler_step … module.optimizer_step"


def test_what_hooks_see() -> None:
    """Epoch, global step, the module's mode and whether gradients are enabled, in each call of two epochs."""
    run = prepare(max_epochs=2, num_sanity_val_steps=2, gradient_clip_val=1.0)
    run.recorder.trainer, run.recorder.module = run.trainer, run.module
    run.fit()
    assert spans(run.recorder) == [
        ("module.configure_callbacks … datamodule.val_dataloader", (0, 0, True, True)),
        ("module.on_validation_model_eval", (0, 0, True, False)),
        (
            "callback.on_validation_start … module.on_validation_model_train",
            (0, 0, False, False),
        ),
        ("callback.on_sanity_check_end … module.optimizer_step", (0, 0, True, True)),
        (STEP_TO_STEP, (0, 1, True, True)),
        (STEP_TO_STEP, (0, 2, True, True)),
        (STEP_TO_STEP, (0, 3, True, True)),
        (
            "module.lr_scheduler_step … module.on_validation_model_zero_grad",
            (0, 4, True, True),
        ),
        ("module.on_validation_model_eval", (0, 4, True, False)),
        (
            "callback.on_validation_start … module.on_validation_model_train",
            (0, 4, False, False),
        ),
        ("callback.on_train_epoch_end … module.on_train_epoch_end", (0, 4, True, True)),
        ("callback.on_train_epoch_start … module.optimizer_step", (1, 4, True, True)),
        (STEP_TO_STEP, (1, 5, True, True)),
        (STEP_TO_STEP, (1, 6, True, True)),
        (STEP_TO_STEP, (1, 7, True, True)),
        (
            "module.lr_scheduler_step … module.on_validation_model_zero_grad",
            (1, 8, True, True),
        ),
        ("module.on_validation_model_eval", (1, 8, True, False)),
        (
            "callback.on_validation_start … module.on_validation_model_train",
            (1, 8, False, False),
        ),
        ("callback.on_train_epoch_end … module.on_train_epoch_end", (1, 8, True, True)),
        ("callback.on_train_end … module.teardown", (2, 8, True, True)),
    ]


def test_what_hooks_see_in_a_window() -> None:
    """The global step counts windows; it rises between the optimizer's step and the scheduler's."""
    run = prepare(accumulate_grad_batches=3)
    run.recorder.trainer, run.recorder.module = run.trainer, run.module
    run.fit()
    assert spans(run.recorder) == [
        ("module.configure_callbacks … module.optimizer_step", (0, 0, True, True)),
        (STEP_TO_STEP, (0, 1, True, True)),
        (
            "module.lr_scheduler_step … module.on_validation_model_zero_grad",
            (0, 2, True, True),
        ),
        ("module.on_validation_model_eval", (0, 2, True, False)),
        (
            "callback.on_validation_start … module.on_validation_model_train",
            (0, 2, False, False),
        ),
        ("callback.on_train_epoch_end … module.on_train_epoch_end", (0, 2, True, True)),
        ("callback.on_train_end … module.teardown", (1, 2, True, True)),
    ]


def test_no_validation() -> None:
    """With limit_val_batches=0 nothing of validation fires, its loader neither."""
    prepare(limit_val_batches=0).fit().assert_order("""
        <BEFORE_FIT>
        datamodule.train_dataloader
        on_train_start
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        on_train_epoch_end
        <END>
    """)


def test_validation_twice_an_epoch() -> None:
    """val_check_interval=0.5 of four batches: after the second and the fourth."""
    prepare(val_check_interval=0.5).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        2 x [
            2 x <TRAIN_BATCH>
            <VALIDATION>
        ]
        on_train_epoch_end
        <END>
    """)


def test_validation_counted_over_epochs() -> None:
    """check_val_every_n_epoch=None: after batches 3 and 6 of eight, in whatever epoch they lie."""
    prepare(
        val_check_interval=3, check_val_every_n_epoch=None, max_epochs=2
    ).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        3 x <TRAIN_BATCH>
        <VALIDATION>
        <TRAIN_BATCH>
        on_train_epoch_end
        on_train_epoch_start
        2 x <TRAIN_BATCH>
        <VALIDATION>
        2 x <TRAIN_BATCH>
        on_train_epoch_end
        <END>
    """)


def test_validation_every_second_epoch() -> None:
    """The validation loader is made when it is first needed."""
    prepare(check_val_every_n_epoch=2, max_epochs=3).fit().assert_order("""
        <BEFORE_FIT>
        datamodule.train_dataloader
        on_train_start
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        on_train_epoch_end
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        module.on_validation_model_zero_grad
        datamodule.val_dataloader
        <EVALUATION>
        on_train_epoch_end
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        on_train_epoch_end
        <END>
    """)


def test_validation_inside_a_window() -> None:
    """on_validation_model_zero_grad does not fire while gradients wait for a step."""
    prepare(accumulate_grad_batches=4, val_check_interval=2).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <FIRST_OF_WINDOW>
        <INSIDE_WINDOW>
        <EVALUATION>
        <INSIDE_WINDOW>
        <LAST_OF_WINDOW>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


WITHOUT_DATAMODULE = {
    **BLOCKS,
    "<SETUP>": """
        module.configure_callbacks
        module.prepare_data
        callback+module.setup
        module.configure_model""",
    "<LOADERS>": """
        module.train_dataloader
        module.val_dataloader""",
    "<TRANSFER>": BLOCKS["<TRANSFER>"].replace("datamodule", "module"),
    "<TEARDOWN>": "callback+module.teardown",
}


def test_fit_without_datamodule() -> None:
    """The module makes its loaders and moves its batches."""
    run = prepare()
    run.trainer.fit(run.module)
    run.assert_order("<BEGIN>\n<EPOCH>\n<END>", WITHOUT_DATAMODULE)


def test_loaders_given_to_fit() -> None:
    """No loader hook fires."""
    run = prepare()
    run.trainer.fit(run.module, samples(4), samples(2))
    run.assert_order("<BEGIN>\n<EPOCH>\n<END>", {**WITHOUT_DATAMODULE, "<LOADERS>": ""})


def test_transfer_hooks_of_the_module_beside_a_datamodule() -> None:
    """The data's own come first; where it has none, the module's are called."""
    recorder = Recorder()
    names = (
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    )
    datamodule = recording(Data, DataModule, "datamodule", recorder, without=names)()
    run = prepare()
    run.trainer.fit(run.module, datamodule=datamodule)
    moved = [event for event in run.recorder.events if "transfer" in event]
    assert moved == expand("6 x <TRANSFER>", WITHOUT_DATAMODULE)
    assert not [event for event in recorder.events if "transfer" in event]


class Unsized(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.ones(3, 4))


@pytest.mark.parametrize("skip_at", [None, 2])
def test_loader_without_length(skip_at: int | None) -> None:
    """Validation runs when the loader has ended, unless the epoch's rest was skipped."""
    run = prepare(module={"skip_at": skip_at})
    run.trainer.fit(run.module, DataLoader(Unsized(), batch_size=1), samples(2))
    skipped, whole = (
        "2 x <TRAIN_BATCH>\n <TRANSFER>\n on_train_batch_start",
        "3 x <TRAIN_BATCH>\n <VALIDATION>",
    )
    epoch = f"on_train_epoch_start\n {whole if skip_at is None else skipped}\n on_train_epoch_end"
    run.assert_order(
        f"<BEGIN>\n {epoch}\n <END>", {**WITHOUT_DATAMODULE, "<LOADERS>": ""}
    )


NO_EPOCH = "<BEFORE_FIT>\n datamodule.train_dataloader\n <NO_EPOCH>"


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 0}, {"max_steps": 0, "max_epochs": None}]
)
def test_nothing_to_train(limits: dict[str, Any]) -> None:
    """Set-up and tear-down, but no on_train_start."""
    prepare(**limits).fit().assert_order(NO_EPOCH)


def test_no_training_batches() -> None:
    """limit_train_batches=0 does not even make the loader."""
    prepare(limit_train_batches=0).fit().assert_order("<BEFORE_FIT>\n<NO_EPOCH>")


def test_two_fits_on_one_trainer() -> None:
    """The second has nothing to do; after raising max_epochs, the third goes on."""
    run = prepare().fit()
    run.recorder.forget()
    run.fit().assert_order(NO_EPOCH)
    run.recorder.forget()
    run.trainer.max_epochs = 2
    run.fit().assert_order("<BEGIN>\n<EPOCH>\n<END>")
    assert (run.trainer.current_epoch, run.trainer.global_step) == (2, 8)


def test_fast_dev_run() -> None:
    """One batch of each, no sanity check."""
    prepare(fast_dev_run=True, num_sanity_val_steps=2).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <TRAIN_BATCH>
        module.on_validation_model_zero_grad
        <VALIDATION_START>
        <VALIDATION_BATCH>
        on_validation_epoch_end
        on_validation_end
        module.on_validation_model_train
        on_train_epoch_end
        <END>
    """)


def test_manual_optimization() -> None:
    """Only what the step itself calls: backward and the optimizer's step."""
    prepare(module={"manual": True}).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        4 x [
            <START_BATCH>
            <BACKWARD>
            on_before_optimizer_step
            on_train_batch_end
        ]
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


# -- schedulers -----------------------------------------------------------------------------------------------------


def test_scheduler_by_epoch() -> None:
    """StepLR steps with the epoch's last batch: before on_train_batch_end, before validation."""
    prepare(module={"scheduler": "epoch"}, max_epochs=2).fit().assert_order("""
        <BEGIN>
        2 x [
            on_train_epoch_start
            3 x <TRAIN_BATCH without scheduler>
            <TRAIN_BATCH>
            <VALIDATION>
            on_train_epoch_end
        ]
        <END>
    """)


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_plateau_scheduler(interval: float) -> None:
    """Once an epoch, after on_train_epoch_end, however often validation runs."""
    validations = 1 if interval == 1.0 else 2
    prepare(
        module={"scheduler": "plateau"}, val_check_interval=interval
    ).fit().assert_order(f"""
        <BEGIN>
        on_train_epoch_start
        {validations} x [
            {4 // validations} x <TRAIN_BATCH without scheduler>
            <VALIDATION>
        ]
        on_train_epoch_end
        module.lr_scheduler_step
        <END>
    """)


# -- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "loader", "loop"),
    [
        ("validate", "val", "<EVALUATION>"),
        ("test", "test", "<TEST>"),
        ("predict", "predict", "<PREDICTION>"),
    ],
)
@pytest.mark.parametrize("with_datamodule", [True, False])
def test_evaluation(fn: str, loader: str, loop: str, with_datamodule: bool) -> None:
    """validate, test and predict: no fit hooks, no optimizers."""
    run = prepare()
    kwargs = {} if fn == "predict" else {"verbose": False}
    getattr(run.trainer, fn)(
        run.module, datamodule=run.datamodule if with_datamodule else None, **kwargs
    )
    owner, blocks = (
        ("datamodule", BLOCKS) if with_datamodule else ("module", WITHOUT_DATAMODULE)
    )
    run.assert_order(
        f"<SETUP>\n {owner}.{loader}_dataloader\n {loop}\n <TEARDOWN>", blocks
    )


# -- stopping -------------------------------------------------------------------------------------------------------


def test_max_steps_inside_an_epoch() -> None:
    """No validation, but the epoch's end hooks."""
    prepare(max_epochs=3, max_steps=2).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        2 x <TRAIN_BATCH>
        on_train_epoch_end
        <END>
    """)


def test_should_stop_inside_an_epoch() -> None:
    """Validation runs at once, then the end hooks."""
    prepare(acts={"on_train_batch_end": stop}, max_epochs=3).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        2 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


def test_should_stop_before_min_epochs() -> None:
    """Training goes on to the end of the last epoch that is required."""
    run = prepare(acts={"on_train_batch_end": stop}, max_epochs=4, min_epochs=2).fit()
    run.assert_order("<BEGIN>\n 2 x <EPOCH>\n <END>")


def test_should_stop_before_min_steps() -> None:
    """Unlike Lightning: until the steps that are required, not to the epoch's end."""
    prepare(
        acts={"on_train_batch_end": stop}, max_epochs=4, min_steps=3
    ).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        3 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


def test_should_stop_inside_a_window() -> None:
    """Unlike Lightning: the window is completed, not dropped."""
    prepare(
        acts={"on_train_batch_end": stop}, max_epochs=3, accumulate_grad_batches=3
    ).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <FIRST_OF_WINDOW>
        <INSIDE_WINDOW>
        <LAST_OF_WINDOW>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


SKIPPED = """
    <BEGIN>
    on_train_epoch_start
    <TRAIN_BATCH>
    <TRANSFER>
    on_train_batch_start                # returns -1; unlike Lightning, no scheduler steps
    on_train_epoch_end
    <EPOCH>
    <END>
"""


def test_module_skips_the_rest_of_an_epoch() -> None:
    """on_train_batch_start returning -1: no step, no validation, on to the next epoch."""
    prepare(module={"skip_at": 1}, max_epochs=2).fit().assert_order(SKIPPED)


def test_callback_skips_the_rest_of_an_epoch() -> None:
    """Unlike Lightning, a callback's -1 counts as well; the others still see the hook."""
    acts = {
        "on_train_batch_start": lambda trainer, i: (
            -1 if (trainer.current_epoch, i) == (0, 1) else None
        )
    }
    prepare(acts=acts, max_epochs=2).fit().assert_order(SKIPPED)


def test_skipping_with_a_scheduler_by_epoch() -> None:
    """The epoch counts as one for schedulers."""
    prepare(
        module={"skip_at": 1, "scheduler": "epoch"}, max_epochs=1
    ).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <TRAIN_BATCH without scheduler>
        <TRANSFER>
        on_train_batch_start
        module.lr_scheduler_step
        on_train_epoch_end
        <END>
    """)


def test_skipping_inside_a_window() -> None:
    """Unlike Lightning: what the window gathered is stepped on."""
    prepare(module={"skip_at": 1}, accumulate_grad_batches=2).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <FIRST_OF_WINDOW>
        <TRANSFER>
        on_train_batch_start
        <STEP>
        module.lr_scheduler_step
        on_train_epoch_end
        <END>
    """)


def test_training_step_gives_none() -> None:
    """Unlike Lightning: neither zero_grad nor a step for that batch."""
    prepare(module={"none_at": 1}).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <TRAIN_BATCH>
        <START_BATCH>
        on_train_batch_end
        2 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


def test_none_at_the_start_of_a_window() -> None:
    """Unlike Lightning: the next batch clears the gradients."""
    prepare(module={"none_at": 0}, accumulate_grad_batches=2).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        <START_BATCH>
        on_train_batch_end
        <TRAIN_BATCH>
        <FIRST_OF_WINDOW>
        <LAST_OF_WINDOW>
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


# -- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_training_step(error: type[BaseException]) -> None:
    """on_exception and nothing else, no teardown either; the exception itself is raised again."""
    run = prepare(module={"fails": (error, "training_step")})
    with pytest.raises(error, match="from training_step"):
        run.fit()
    run.assert_order("""
        <BEGIN>
        on_train_epoch_start
        <TRAIN_BATCH>
        <START_BATCH>
        <EXCEPTION>
    """)


FAILING_VALIDATION = """
    <VALIDATION_START>
    <VALIDATION_BATCH>
    <TRANSFER>
    on_validation_batch_start
    module.validation_step
    <EXCEPTION>
"""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_validation_of_fit(error: type[BaseException]) -> None:
    """The same inside validation."""
    run = prepare(module={"fails": (error, "validation_step")})
    with pytest.raises(error, match="from validation_step"):
        run.fit()
    run.assert_order(f"""
        <BEGIN>
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        module.on_validation_model_zero_grad
        {FAILING_VALIDATION}
    """)


def test_exception_in_sanity_check() -> None:
    """The same before training."""
    run = prepare(
        module={"fails": (RuntimeError, "validation_step")}, num_sanity_val_steps=2
    )
    with pytest.raises(RuntimeError, match="from validation_step"):
        run.fit()
    run.assert_order(f"""
        <BEFORE_FIT>
        callback.on_sanity_check_start
        datamodule.val_dataloader
        {FAILING_VALIDATION}
    """)


def test_exception_in_validate() -> None:
    """The same outside of fit."""
    run = prepare(module={"fails": (RuntimeError, "validation_step")})
    with pytest.raises(RuntimeError, match="from validation_step"):
        run.trainer.validate(run.module, datamodule=run.datamodule, verbose=False)
    run.assert_order(f"<SETUP>\n datamodule.val_dataloader\n {FAILING_VALIDATION}")


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_saving() -> None:
    """A monitoring ModelCheckpoint saves after the epoch's end hooks."""
    prepare(ModelCheckpoint("saved", monitor="val_loss")).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        4 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end
        <SAVE>
        <END>
    """)


def test_saving_every_two_steps() -> None:
    """Unlike Lightning, after the module's on_train_batch_end."""
    prepare(ModelCheckpoint("saved", every_n_train_steps=2)).fit().assert_order("""
        <BEGIN>
        on_train_epoch_start
        2 x [
            2 x <TRAIN_BATCH>
            <SAVE>
        ]
        <VALIDATION>
        on_train_epoch_end
        <END>
    """)


def test_saving_after_a_validation_inside_an_epoch() -> None:
    """Unlike Lightning, after the module's on_validation_end, and before on_validation_model_train."""
    run = prepare(
        ModelCheckpoint("saved", monitor="val_loss"), val_check_interval=0.5
    ).fit()
    run.assert_order("""
        <BEGIN>
        on_train_epoch_start
        2 x [
            2 x <TRAIN_BATCH>
            module.on_validation_model_zero_grad
            <VALIDATION_START>
            2 x <VALIDATION_BATCH>
            on_validation_epoch_end
            on_validation_end
            <SAVE>
            module.on_validation_model_train
        ]
        on_train_epoch_end
        <END>
    """)


def test_saving_with_a_plateau_scheduler() -> None:
    """Unlike Lightning, the scheduler has stepped when its state is saved."""
    run = prepare(
        ModelCheckpoint("saved", monitor="val_loss"), module={"scheduler": "plateau"}
    ).fit()
    run.assert_order("""
        <BEGIN>
        on_train_epoch_start
        4 x <TRAIN_BATCH without scheduler>
        <VALIDATION>
        on_train_epoch_end
        module.lr_scheduler_step
        <SAVE>
        <END>
    """)


def test_phases() -> None:
    """In each hook: observers in the user's order, the module, then who decides, then who persists."""
    recorder = Recorder()
    tiny = recording(Tiny, Module, "module", recorder)()

    def named(cls: type, owner: str, *args: Any, **kwargs: Any) -> Any:
        made = recording(cls, Callback, owner, recorder)
        made.state_key = owner
        return made(*args, **kwargs)

    checkpoint = named(ModelCheckpoint, "checkpoint", "saved", monitor="val_loss")
    stopping = named(EarlyStopping, "stopping", "val_loss")
    quiet(
        checkpoint,
        stopping,
        named(Observer, "a"),
        named(Observer, "b"),
        num_sanity_val_steps=1,
    ).fit(tiny)
    together = ("a", "b", "module", "stopping", "checkpoint")
    by_hook: dict[str, list[str]] = {}
    for event in recorder.events:
        owner, hook = event.split(".")
        by_hook.setdefault(hook, []).append(owner)
    shared = [
        hook
        for hook, owners in by_hook.items()
        if {"a", "module"} <= set(owners) and "state" not in hook
    ]
    assert len(shared) == 21
    for hook in shared:
        count = len(by_hook[hook]) // len(together)
        assert by_hook[hook] == list(together) * count, hook


@pytest.fixture
def saved() -> dict[str, str]:
    """Checkpoints of a first run: of its epoch's end, and of the moment after its second batch."""

    def save(trainer: Trainer, batch_idx: int) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint("middle.ckpt")

    run = prepare(acts={"on_train_batch_end": save}).fit()
    run.trainer.save_checkpoint("end.ckpt")
    return {"middle": "middle.ckpt", "end": "end.ckpt"}


def test_resume_after_an_epoch(saved: dict[str, str]) -> None:
    """Weights and states before the optimizers are made; the sanity check runs again."""
    prepare(max_epochs=2, num_sanity_val_steps=2).fit(
        ckpt_path=saved["end"]
    ).assert_order("""
        <SETUP>
        <LOAD>
        module.configure_optimizers
        on_fit_start
        <SANITY_CHECK>
        datamodule.train_dataloader
        on_train_start
        <EPOCH>
        <END>
    """)


def test_resume_inside_an_epoch(saved: dict[str, str]) -> None:
    """No second on_train_epoch_start for the epoch that goes on."""
    prepare(max_epochs=2).fit(ckpt_path=saved["middle"]).assert_order("""
        <SETUP>
        <LOAD>
        module.configure_optimizers
        on_fit_start
        <LOADERS>
        on_train_start
        2 x <TRAIN_BATCH>
        <VALIDATION>
        on_train_epoch_end
        <EPOCH>
        <END>
    """)


def test_resume_at_the_end(saved: dict[str, str]) -> None:
    """Nothing is left to train."""
    prepare().fit(ckpt_path=saved["end"]).assert_order("""
        <SETUP>
        <LOAD>
        module.configure_optimizers
        on_fit_start
        datamodule.train_dataloader
        <NO_EPOCH>
    """)


def test_test_with_a_checkpoint(saved: dict[str, str]) -> None:
    """Evaluation loads the data's state; unlike Lightning, not those of callbacks."""
    run = prepare()
    run.trainer.test(
        run.module, datamodule=run.datamodule, ckpt_path=saved["end"], verbose=False
    )
    run.assert_order("""
        <SETUP>
        module.on_load_checkpoint
        datamodule.load_state_dict
        callback.on_load_checkpoint
        datamodule.test_dataloader
        <TEST>
        <TEARDOWN>
    """)


# -- several loaders ------------------------------------------------------------------------------------------------


class Several(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.layer(part).mean() for part in batch)


def places(run: Recorder, *names: str) -> list[tuple[Any, ...]]:
    """The numbers that hooks of these names got: indices of batches and loaders."""
    return [
        (event, *(a for a in arguments if isinstance(a, int)))
        for event, arguments in run.arguments
        if event.split(".")[1] in names
    ]


@pytest.mark.parametrize("several", [True, False])
def test_indices_with_several_loaders(several: bool) -> None:
    """Training reads all together; validation one after the other, and only then passes a loader's index."""
    recorder = Recorder()
    module = recording(Several, Module, "module", recorder)()
    callback = recording(Observer, Callback, "callback", recorder)()
    validation = [samples(2), samples(1)] if several else [samples(2)]
    quiet(callback).fit(module, [samples(3), samples(2)], validation)
    assert places(recorder, "training_step") == [
        ("module.training_step", i) for i in range(3)
    ]
    batches = [a[0] for e, a in recorder.arguments if e == "module.training_step"]
    assert all(isinstance(batch, list) and len(batch) == 2 for batch in batches)

    seen: list[tuple[int, ...]] = [(0, 0), (1, 0), (0, 1)] if several else [(0,), (1,)]
    names = ("on_validation_batch_start", "validation_step", "on_validation_batch_end")
    expected = [
        (event, *place)
        for place in seen
        for event in expand(
            "on_validation_batch_start\nmodule.validation_step\non_validation_batch_end",
            {},
        )
    ]
    assert places(recorder, *names) == expected
    moved = [place[1:] for place in places(recorder, "on_before_batch_transfer")]
    assert moved == [(0,)] * 3 + [(place[1] if several else 0,) for place in seen]


def test_one_training_loader_in_a_list() -> None:
    """Its batches come in a list too."""
    recorder = Recorder()
    quiet().fit(recording(Several, Module, "module", recorder)(), [samples(2)])
    assert [
        len(a[0]) for e, a in recorder.arguments if e == "module.training_step"
    ] == [1, 1]


# -- what setup and teardown call their stage -----------------------------------------------------------------------


class Renamed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Any] = []

    def setup(self, what: str) -> None:
        self.stages.append(what)

    def teardown(self, *args: str) -> None:
        self.stages.append(args)


class RenamedObserver(Callback):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def setup(self, owner: Trainer, model: Module, what: str) -> None:
        self.stages.append(what)

    def teardown(self, owner: Trainer, model: Module, stage: str, /) -> None:
        self.stages.append(stage)


class RenamedData(DataModule):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, what: str) -> None:
        self.stages.append(what)

    def teardown(self, what: str) -> None:
        self.stages.append(what)

    def train_dataloader(self) -> Any:
        return samples(1)


def test_setup_and_teardown_may_call_the_stage_as_they_like() -> None:
    module, callback, data = Renamed(), RenamedObserver(), RenamedData()
    quiet(callback).fit(module, datamodule=data)
    assert module.stages == ["fit", ("fit",)]
    assert callback.stages == data.stages == ["fit", "fit"]


def test_setup_gets_its_stage_by_name_where_it_takes_that() -> None:
    """As Lightning gives it."""
    module = Tiny()
    given: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> None:
        given.append((args, kwargs))

    # As wrappers of whole modules do.
    module.setup = note
    quiet().fit(module, samples(1))
    assert given == [((), {"stage": "fit"})]
