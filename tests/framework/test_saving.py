"""Saving while the training goes on, what a checkpoint is resumed to after damage, and weights from and for others."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from loopwright.framework import CheckpointError, Engine, Module
from loopwright.framework.checkpoint import writer as checkpoint_module
from loopwright.framework.checkpoint.manifest import is_complete, read_manifest
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.framework.checkpoint.tensors import StagedTensors
from loopwright.framework.checkpoint.writer import save_checkpoint
from loopwright.framework.data.workers import noting
from loopwright.framework.export import main as export
from loopwright.loggers import CSVLogger, TensorBoardLogger
from tests.framework.models import (
    Evaluated,
    Linear,
    Told,
    data,
    in_a_child,
    loader,
    quiet,
    weights,
)
from tests.programs import run_program


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- beside the training ----------------------------------------------------------------------------------------------


class Gate:
    """Lets nothing be written until it is opened; may then refuse it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.error: OSError | None = None
        writing = checkpoint_module.writing

        def gated(path: str) -> Any:
            assert self.opened.wait(30)
            if self.error is not None:
                raise self.error
            return writing(path)

        monkeypatch.setattr(checkpoint_module, "writing", gated)


class At(Callback):
    """Calls a function after each step, with the Trainer."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.function(trainer, module)


def test_the_training_goes_on_while_a_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch,
):
    """What is saved is the state of the save's step."""
    gate = Gate(monkeypatch)
    after: dict[int, list[Tensor]] = {}

    def note(trainer: Any, module: Any) -> None:
        after[trainer.global_step] = weights(module)
        if trainer.global_step == 4:
            assert not list(Path("kept").glob("*.ckpt")), "the first save waits still"
            gate.opened.set()

    callback = ModelCheckpoint("kept", every_n_train_steps=2, save_top_k=-1)
    quiet(At(note), callback).fit(Linear(), loader(5))
    saved = load_checkpoint("kept/epoch=0-step=2.ckpt")["state_dict"]
    assert torch.equal(after[2][0], saved["layer.weight"])
    assert not torch.equal(after[2][0], after[4][0])
    # The second waited for the first, and the end for both.
    assert read_manifest("kept/epoch=0-step=4.ckpt")["global_step"] == 4
    assert callback.best_model_path.endswith("epoch=0-step=4.ckpt")


def test_a_synchronous_save_holds_the_training_up():
    complete: list[bool] = []
    folder = Path("kept")
    callback = ModelCheckpoint(folder, every_n_train_steps=1, async_save=False)

    class After(ModelCheckpoint):
        """Persists too, so it comes behind."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            complete.append(
                is_complete(str(folder / f"epoch=0-step={trainer.global_step}.ckpt"))
            )

    quiet(callback, After("other", every_n_epochs=0)).fit(Linear(), loader(3))
    assert complete == [True] * 3


def test_an_error_surfaces_at_the_next_save(monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    steps: list[int] = []

    def note(trainer: Any, module: Any) -> None:
        steps.append(trainer.global_step)
        if trainer.global_step == 3:
            gate.error = OSError(28, "No space left on device")
            gate.opened.set()

    callback = ModelCheckpoint("kept", every_n_train_steps=2, save_last=True)
    with pytest.raises(
        OSError,
        match=r"checkpoint '.*kept/epoch=0-step=2\.ckpt' could not be written: No space left",
    ):
        quiet(At(note), callback).fit(Linear(), loader(6))
    assert steps[-1] == 4
    assert (callback.best_model_path, callback.last_model_path) == ("", "")
    assert not list(Path().glob("kept/*"))


def test_the_last_saves_error_surfaces_at_the_end(monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    gate.error = OSError(28, "No space left on device")
    gate.opened.set()
    with pytest.raises(OSError, match=r"epoch=0-step=4\.ckpt"):
        quiet(ModelCheckpoint("kept")).fit(Linear(), loader(4))


def test_training_goes_on_without_a_checkpoint_if_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The best of those that could be written stays the best, and is not removed for one that could not."""
    gate = Gate(monkeypatch)
    gate.opened.set()

    def note(trainer: Any, module: Any) -> None:
        trainer.engine.saver.wait()
        gate.error = (
            OSError(28, "No space left on device")
            if trainer.global_step in (3, 4)
            else None
        )

    callback = ModelCheckpoint(
        "kept",
        every_n_train_steps=2,
        save_top_k=1,
        save_last=True,
        on_save_error="warn",
    )
    trainer = quiet(At(note), callback)
    trainer.fit(Linear(), loader(7))  # the save of step 4 fails
    assert trainer.global_step == 7
    warned = [
        record.message for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert len(warned) == 1
    assert "epoch=0-step=4.ckpt" in warned[0]
    assert "goes on" in warned[0]
    assert {path.name for path in Path("kept").iterdir()} == {
        "epoch=0-step=6.ckpt",
        "epoch=0-step=7.ckpt",
        "last.ckpt",
    }
    assert Linear.load_from_checkpoint("kept/last.ckpt").layer.weight.shape == (1, 2)


def test_what_could_not_be_written_is_not_among_the_best(
    monkeypatch: pytest.MonkeyPatch,
):
    """0.5 is saved, 0.1 cannot be, and 0.3 is then the best that there is."""
    gate = Gate(monkeypatch)
    gate.opened.set()

    class Valued(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.trainer.engine.saver.wait()
            gate.error = (
                OSError(28, "No space left on device")
                if self.current_epoch == 1
                else None
            )
            self.log("value", [0.5, 0.1, 0.3][self.current_epoch])

    callback = ModelCheckpoint("kept", monitor="value", on_save_error="warn")
    quiet(callback, max_epochs=3).fit(Valued(), loader(2), loader(1))
    assert callback.best_model_path.endswith("epoch=2-step=6.ckpt")
    assert {path.name for path in Path("kept").iterdir()} == {
        "epoch=2-step=6.ckpt",
        "best.ckpt",
    }


def test_a_signal_saves_though_the_save_before_failed(monkeypatch: pytest.MonkeyPatch):
    """The error ends the run, after the last attempt; with "warn", the signal does."""
    gate = Gate(monkeypatch)

    def note(trainer: Any, module: Any) -> None:
        if trainer.global_step == 3:
            trainer.engine.saver.wait()
            gate.error = None
            os.kill(os.getpid(), signal.SIGTERM)

    ways: Any = (("raise", OSError), ("warn", SystemExit))
    for on_save_error, raised in ways:
        gate.error = OSError(28, "No space left on device")
        gate.opened.set()
        callback = ModelCheckpoint(
            on_save_error, every_n_train_steps=2, on_save_error=on_save_error
        )
        with pytest.raises(raised):
            quiet(At(note), callback).fit(Linear(), loader(6))
        assert (
            load_checkpoint(f"{on_save_error}/epoch=0-step=3.ckpt")["global_step"] == 3
        )


def test_a_signal_is_not_taken_back():
    """By a hook that sets should_stop to False: the run ends with the step."""

    class Goes(Linear):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = False

    trainer = quiet(ModelCheckpoint("kept"))
    with pytest.raises(SystemExit):
        trainer.fit(Goes(), loader(6))
    assert trainer.global_step == 2


def test_last_looks_where_the_callbacks_save():
    """Two in one folder: the default folders, with other runs' checkpoints, are not searched."""
    quiet(ModelCheckpoint(), max_epochs=3).fit(Linear(), loader(4))
    both = [ModelCheckpoint("kept", every_n_epochs=n) for n in (1, 2)]
    trainer = quiet(*both)
    trainer.fit(Linear(), loader(4), ckpt_path="last")
    assert trainer.global_step == 4
    assert trainer.ckpt_path is None


def test_a_checkpoint_with_a_dot_in_front_is_found():
    callback = ModelCheckpoint("kept", filename=".{epoch}")
    quiet(callback).fit(Linear(), loader(4))
    assert Path(callback.best_model_path).name == ".epoch=0.ckpt"
    trainer = quiet(ModelCheckpoint("kept", filename=".{epoch}"), max_epochs=2)
    trainer.fit(Linear(), loader(4), ckpt_path="last")
    assert trainer.ckpt_path == callback.best_model_path
    assert trainer.global_step == 8


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_signal_that_comes_while_workers_start(
    monkeypatch: pytest.MonkeyPatch, kind: Any
):
    """It goes to all processes of a job: one that is just being set up lives on, too."""
    utils: Any = torch.utils.data._utils  # type: ignore[attr-defined] # torch exports it not
    sets_up = utils.signal_handling._set_worker_signal_handlers

    def set_up_and_be_told() -> None:
        sets_up()
        os.kill(os.getpid(), signal.SIGTERM)

    module = "torch.utils.data._utils.signal_handling._set_worker_signal_handlers"
    monkeypatch.setattr(module, set_up_and_be_told)
    trainer = quiet(max_epochs=2)
    loaders = [kind(data(size), 1, num_workers=2) for size in (3, 2)]
    trainer.fit(Evaluated(), *loaders)
    assert trainer.global_step == 6
    loaders[
        0
    ]._iterator = None  # torchdata's ends its workers quickly now, and slowly when it is collected
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_that_comes_when_training_has_ended():
    """In its last hooks: all that a run leaves is there, and the exit code tells."""

    class Signalled(Evaluated):
        def on_train_end(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            self.trainer.log_row({"late": 1.0})

    logger = CSVLogger(".")
    with pytest.raises(SystemExit) as ended:
        quiet(ModelCheckpoint("kept"), logger=logger, log_every_n_steps=1).fit(
            Signalled(), loader(3), loader(1)
        )
    assert ended.value.code == 128 + signal.SIGTERM
    assert "late" in Path(logger.log_dir, "metrics.csv").read_text()
    assert is_complete("kept/epoch=0-step=3.ckpt")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_do_again_what_they_did_after_a_run_in_a_hook_and_after_an_error():
    class Nested(Evaluated):
        fails = False

        def on_train_end(self) -> None:
            quiet().validate(self, loader(1), verbose=False)
            if self.fails:
                raise ValueError("a mistake")

    quiet().fit(Nested(), loader(2), loader(1))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handlers: list[Any] = []

    class Notes(Callback):
        def on_exception(
            self, trainer: Any, module: Any, exception: BaseException
        ) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    failing = Nested()
    failing.fails = True
    with pytest.raises(ValueError, match="a mistake"):
        quiet(Notes()).fit(failing, loader(2), loader(1))
    assert handlers == [signal.SIG_DFL]


def test_a_signal_that_comes_too_late_for_the_loop_is_sent_again():
    """In the teardown: the run is finished, and then the process ends as the signal says."""
    finished: list[str] = []

    class Last(Linear):
        def teardown(self, stage: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(stage)

    trainer = quiet()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Last(), loader(2))
    assert finished == ["fit"]
    assert trainer.state.status == "finished"


def test_workers_end_with_their_run_after_runs_in_threads():
    """Of two runs in threads, the second begins in the first and ends after it: neither keeps signals from workers."""
    begun, ended = threading.Event(), threading.Event()
    meet = threading.Barrier(2, timeout=30)

    def first() -> None:
        quiet(LambdaCallback(on_train_start=lambda *_: (begun.set(), meet.wait()))).fit(
            Linear(), loader(2)
        )
        ended.set()

    def second() -> None:
        begun.wait(30)
        hooks = {
            "on_train_start": lambda *_: meet.wait(),
            "on_train_end": lambda *_: ended.wait(30),
        }
        quiet(LambdaCallback(**hooks)).fit(Linear(), loader(2))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    # The test fails if a process is left behind, as a worker that does not end when it is told to.
    quiet(max_steps=2).fit(Linear(), DataLoader(Told(40, 40), 2, num_workers=1))


IN_A_DAEMON = """
import threading
from torch.utils.data import DataLoader
from loopwright.callbacks import LambdaCallback
from tests.framework.models import Linear, data, quiet

begun = threading.Event()
trainer = quiet(LambdaCallback(on_train_batch_end=lambda *_: begun.set()), max_epochs=-1)
fit = lambda: trainer.fit(Linear(), DataLoader(data(), 2, num_workers=1))
threading.Thread(target=fit, daemon=True).start()
assert begun.wait(60)
"""


@pytest.mark.slow
def test_a_program_ends_though_a_daemon_thread_trains():
    """Its workers do not ignore the signal by which they are ended, and for which the program's end waits."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", IN_A_DAEMON]
    ended = subprocess.run(command, cwd=root, timeout=100, check=False)
    assert ended.returncode == 0


def test_programs_that_are_forked_count_their_runs_apart():
    """A process that ends its run while a fork of it begins another one: neither would find the other's count."""
    begun = threading.Event()

    def fit_in_a_fork() -> None:
        quiet().fit(Linear(), loader(2))
        os._exit(0 if not noting else 1)

    def fork(*_: Any) -> None:
        if not begun.is_set():
            begun.set()
            status = os.waitpid(in_a_child(fit_in_a_fork), 0)[1]
            assert status == 0
            assert noting

    quiet(LambdaCallback(on_train_batch_start=fork)).fit(Linear(), loader(2))
    assert begun.is_set()
    assert not noting


def test_a_path_may_end_in_a_slash():
    trainer = quiet()
    trainer.fit(Linear(), loader(2))
    trainer.save_checkpoint("out/")
    assert is_complete("out")
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]


def test_names_are_not_given_twice_while_one_is_written(
    monkeypatch: pytest.MonkeyPatch,
):
    """Two callbacks save at one step into one folder."""
    first, second = (
        ModelCheckpoint("kept", every_n_train_steps=2, monitor=monitor)
        for monitor in (None, "step")
    )
    quiet(first, second).fit(Linear(), loader(2))
    assert first.best_model_path.endswith("epoch=0-step=2.ckpt")
    assert second.best_model_path.endswith("epoch=0-step=2-v1.ckpt")
    assert is_complete(first.best_model_path)
    assert is_complete(second.best_model_path)


def test_a_checkpoint_due_in_a_window_is_saved_at_its_end():
    """Validation after every third batch, a step after every second: the run goes on exactly from each."""

    class Drops(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def loss(self, batch: Any) -> Tensor:
            return (self.drop(self(batch[0])) - batch[1]).square().mean()

    def run(**arguments: Any) -> tuple[Any, Any]:
        torch.manual_seed(1)
        module, callback = (
            Drops(),
            ModelCheckpoint("kept", monitor="val_loss", save_top_k=-1),
        )
        trainer = quiet(
            callback,
            accumulate_grad_batches=2,
            val_check_interval=3,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(12), loader(1), **arguments)
        return weights(module), trainer.global_step

    whole, steps = run()
    saved = sorted(Path("kept").glob("epoch=0*"))
    cursors = [
        load_checkpoint(str(path))["run"]["state"]["batch_idx"] for path in saved
    ]
    assert sorted(cursors) == [4, 6, 10, 12]
    for path in saved:
        resumed, steps_again = run(ckpt_path=path)
        assert all(map(torch.equal, whole, resumed)), path
        assert steps == steps_again


def test_an_engine_saves_beside_its_loop(monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    engine = Engine(accelerator="cpu")
    model = engine.prepare(nn.Linear(2, 1))
    before = model.weight.detach().clone()
    engine.save_state("a.ckpt", wait=False)
    with torch.no_grad():
        model.weight.zero_()
    assert not Path("a.ckpt").exists()
    gate.opened.set()
    engine.wait_for_save()
    assert torch.equal(before, load_checkpoint("a.ckpt")["state_dict"]["weight"])
    engine.save_state("a.ckpt", wait=False)
    engine.load_state("a.ckpt")  # which waits
    assert model.weight.abs().sum() == 0
    gate.error = OSError(28, "No space left on device")
    engine.save_state("b.ckpt", wait=False)
    with pytest.raises(OSError, match=r"b\.ckpt"):
        engine.end_training()


def test_an_engines_error_is_told_at_the_end_of_a_program_that_does_not_ask():
    program = """
from loopwright.framework import Engine
engine = Engine(accelerator="cpu")
open("file", "w").close()
engine.save_state("file/below.ckpt", wait=False)
"""
    ended = run_program("-c", program)
    assert "file/below.ckpt' could not be written" in ended.stderr


# -- the files --------------------------------------------------------------------------------------------------------


class Collected:
    def __init__(self) -> None:
        self.content = b""

    def write(self, content: Any) -> None:
        self.content += bytes(content)


def test_tensor_files_are_those_of_the_library():
    kinds = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    ]  # fmt: skip
    tensors = {
        f"{kind}".removeprefix("torch."): torch.arange(6).view(2, 3).to(kind)
        for kind in kinds
    }
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "ünï": torch.ones(1),
        "turned": torch.eye(3).T,
    }
    file = Collected()
    for chunk in StagedTensors(tensors, copy=False).chunks():
        file.write(chunk)
    theirs = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert file.content == save(theirs, metadata={"format": "pt"})


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged_files() -> list[str]:
    rest = (
        "state.json",
        "state.safetensors",
        "rng/rank-0.json",
        "rng/rank-0.safetensors",
        "objects.pkl",
        "manifest.json",
    )
    return ["model/model.safetensors", "optimizer/optimizer.safetensors", *rest]


class WithObject(Evaluated):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = print  # which goes to objects.pkl


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "kept"
    callback = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    quiet(callback).fit(WithObject(), loader(4))
    return folder


@pytest.mark.parametrize("damage", ["a byte flipped", "truncated", "removed"])
@pytest.mark.parametrize("name", damaged_files())
def test_damage_is_named_and_the_checkpoint_before_is_used(
    two_checkpoints: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(two_checkpoints, "kept")
    file = Path("kept/epoch=0-step=4.ckpt", name)
    content = bytearray(file.read_bytes())
    if damage == "a byte flipped":
        content[len(content) * 2 // 3] ^= 16
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    trainer = quiet(ModelCheckpoint("kept", every_n_epochs=0), max_steps=3)
    trainer.fit(WithObject(), loader(4), ckpt_path="last")
    assert str(trainer.ckpt_path).endswith("epoch=0-step=2.ckpt")
    assert trainer.global_step == 3
    told = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING
    ]
    assert any(
        "epoch=0-step=4.ckpt" in message and name in message for message in told
    ), told


def test_resuming_opens_no_pickle(
    two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nor does evaluating, or loading into a module."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for module, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    path = str(two_checkpoints / "epoch=0-step=4.ckpt")
    trainer = quiet(max_epochs=2)
    trainer.fit(WithObject(), loader(4), ckpt_path=path)
    assert trainer.global_step == 8
    trainer.test(WithObject(), loader(4), ckpt_path=path, verbose=False)
    WithObject.load_from_checkpoint(path)
    with pytest.raises(AssertionError, match="a pickle was opened"):
        WithObject.load_from_checkpoint(path, weights_only=False)


# -- an exception -----------------------------------------------------------------------------------------------------


def test_an_exception_leaves_a_checkpoint_to_go_on_from():
    def fail(trainer: Any, module: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError

    torch.manual_seed(0)
    whole = Linear()
    twin = Linear()
    twin.load_state_dict(whole.state_dict())
    quiet(max_epochs=2).fit(whole, loader(4))
    with pytest.raises(ZeroDivisionError):
        quiet(At(fail), OnExceptionCheckpoint("kept"), max_epochs=2).fit(
            twin, loader(4)
        )
    again = Linear()
    quiet(max_epochs=2).fit(again, loader(4), ckpt_path="kept/on_exception.ckpt")
    assert all(map(torch.equal, weights(again), weights(whole)))


def test_what_is_no_training_leaves_none():
    class Fails(Evaluated):
        def test_step(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet(OnExceptionCheckpoint("kept")).test(Fails(), loader(4))
    assert not Path("kept").exists()
    with pytest.raises(ValueError, match="filename"):
        OnExceptionCheckpoint("kept", filename="")


# -- what runs beside the loop ----------------------------------------------------------------------------------------


class Scores(Linear):
    """Validation values that go down and then up."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float([5, 3, 4, 2, 6, 7, 8, 9][self.current_epoch]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True)
        return loss


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("stop", [5, 11, 18])
def test_what_runs_beside_the_loop_goes_on_as_if_nothing_had_happened(stop: int):
    """Cut between two checkpoints: patience, the best ones, time, and each point in TensorBoard once."""

    def run(folder: str, stop: int = 0) -> Any:
        def fail(trainer: Any, module: Any) -> None:
            if trainer.global_step == stop:
                raise ZeroDivisionError

        torch.manual_seed(0)
        timer, stopping = Timer(), EarlyStopping("val_loss", patience=3)
        best = ModelCheckpoint(f"{folder}/best", monitor="val_loss", save_top_k=2)
        steps = ModelCheckpoint(f"{folder}/steps", every_n_train_steps=3)
        logger = TensorBoardLogger(folder, name="logs", version=0)
        trainer = quiet(
            At(fail),
            timer,
            stopping,
            best,
            steps,
            max_epochs=8,
            logger=logger,
            log_every_n_steps=1,
        )
        trainer.fit(Scores(), loader(4), loader(1), ckpt_path="last")
        kept = {
            Path(path).name: float(score) for path, score in best.best_k_models.items()
        }
        return (
            trainer,
            timer,
            (stopping.wait_count, stopping.stopped_epoch, float(stopping.best_score)),
            kept,
        )

    whole = run("whole")
    with pytest.raises(ZeroDivisionError):
        run("cut", stop)
    (saved,) = (load_checkpoint(str(path)) for path in Path("cut/steps").glob("epoch*"))
    trainer, timer, stopped, kept = run("cut")
    assert (stopped, kept) == whole[2:]
    assert trainer.current_epoch == whole[0].current_epoch
    assert (
        timer.time_elapsed() > saved["callbacks"]["Timer"]["time_elapsed"]["train"] > 0
    )
    left, expected = (
        {path.name for path in Path(folder, "best").iterdir()}
        for folder in ("cut", "whole")
    )
    resumed_from = {Path(trainer.ckpt_path).name}  # is kept while the run goes on
    assert left - resumed_from == expected - resumed_from
    assert points(Path("cut/logs/version_0")) == points(Path("whole/logs/version_0"))


# -- weights for others, and from others ------------------------------------------------------------------------------


class Tied(Linear):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(7))


def test_exported_weights_are_one_file_for_any_program(
    caplog: pytest.LogCaptureFixture,
):
    module, trainer = Tied(), quiet()
    with pytest.raises(RuntimeError, match="fit first"):
        trainer.export("model.safetensors")
    trainer.fit(module, loader(2))
    trainer.export("model.safetensors")
    twin = Tied()
    twin.load_state_dict(load_file("model.safetensors"))
    assert all(map(torch.equal, weights(module), weights(twin)))
    Path("kept").mkdir()
    for folder in ("kept", "new/", ""):
        example = os.path.join(folder, "model.safetensors")
        with pytest.raises(
            ValueError, match=f"one file, such as '{example}'; got '{folder}'"
        ):
            trainer.export(folder)
    assert not Path("new").exists()
    assert not [*Path("kept").iterdir(), *Path().glob("*.tmp")]
    trainer.export("half.safetensors", dtype=torch.bfloat16)
    half = load_file("half.safetensors")
    assert half["first.weight"].dtype == torch.bfloat16
    assert half["count"].dtype == torch.int64
    assert all(
        map(
            torch.equal,
            weights(module),
            weights(Tied.load_from_checkpoint("model.safetensors")),
        )
    )


def test_the_export_program(capsys: pytest.CaptureFixture[str]):
    module, trainer = Tied(), quiet()
    trainer.fit(module, loader(2))
    trainer.save_checkpoint("a.ckpt")
    ended = run_program(
        "-W", "error", "-m", "loopwright.framework.export", "a.ckpt", "out.safetensors"
    )
    assert ended.returncode == 0, ended.stderr
    assert "out.safetensors: 5 tensors" in ended.stdout
    assert torch.equal(
        load_file("out.safetensors")["second.weight"], module.first.weight
    )
    assert (
        export(["a.ckpt", "memory://out/half.safetensors", "--dtype", "float16"]) == 0
    )
    assert Tied.load_from_checkpoint("memory://out/half.safetensors").count == 7
    assert export(["nothing.ckpt", "x.safetensors"]) == 1
    assert "no checkpoint at 'nothing.ckpt'" in capsys.readouterr().err
    assert not Path("x.safetensors").exists()
    assert export(["a.ckpt", "a.ckpt"]) == 1
    assert "such as 'a.ckpt/model.safetensors'; got 'a.ckpt'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lightning_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as Lightning leaves it, callbacks and schedulers in it."""
    pytest.importorskip("lightning")
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Net(lightning.LightningModule):
        def __init__(self, width: int, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(width, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    folder = tmp_path_factory.mktemp("lightning")
    module = Net(2, lr=0.01)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ModelCheckpoint(folder, monitor="loss"), EarlyStopping("loss")],
    )  # fmt: skip
    trainer.fit(module, loader(2))
    trainer.save_checkpoint(folder / "theirs.ckpt")
    return folder / "theirs.ckpt", {
        name: value.detach().clone() for name, value in module.state_dict().items()
    }


class Ours(Evaluated):
    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_from_lightning(lightning_checkpoint: tuple[Path, dict[str, Tensor]]):
    path, state = lightning_checkpoint
    module = Ours.load_from_checkpoint(path)
    assert module.hparams == {"width": 2, "lr": 0.01}
    assert all(
        torch.equal(state[name], value) for name, value in module.state_dict().items()
    )
    other = Ours(2)
    quiet().test(other, loader(2), ckpt_path=path, verbose=False)
    assert all(
        torch.equal(state[name], value) for name, value in other.state_dict().items()
    )
    with pytest.raises(CheckpointError, match="does not fit this run"):
        quiet(max_epochs=3).fit(Ours(2), loader(2), ckpt_path=path)
    assert export([str(path), "weights.safetensors"]) == 0
    assert load_file("weights.safetensors").keys() == state.keys()


class Harms:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("weights_only", [None, True])
def test_foreign_pickles_run_no_code_unasked(weights_only: bool | None):
    torch.save(
        {"state_dict": Linear().state_dict(), "hyper_parameters": {"x": Harms()}},
        "theirs.ckpt",
    )
    with pytest.raises(
        CheckpointError, match=r"'theirs\.ckpt' holds pickled objects .* is not opened"
    ):
        Linear.load_from_checkpoint("theirs.ckpt", weights_only=weights_only)
    assert not Path("harm").exists()
    Linear.load_from_checkpoint("theirs.ckpt", weights_only=False)
    assert Path("harm").exists()


def test_files_of_other_programs():
    module = Linear()
    torch.save(module.state_dict(), "plain.pt")
    assert all(
        map(
            torch.equal,
            weights(module),
            weights(Linear.load_from_checkpoint("plain.pt")),
        )
    )
    torch.save([1, 2], "list.pt")
    with pytest.raises(
        CheckpointError, match="holds no state_dict; its content is a list"
    ):
        load_checkpoint("list.pt")
    torch.save({"epoch": 3}, "none.pt")
    with pytest.raises(
        CheckpointError, match="no state_dict and no tensors; its keys are 'epoch'"
    ):
        load_checkpoint("none.pt")
    Path("broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="no safetensors file, or damaged"):
        load_checkpoint("broken.safetensors")


def test_what_safetensors_cannot_hold_is_kept_all_the_same():
    """Sparse and quantized tensors."""

    class Odd(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wide", torch.eye(2).to_sparse())

    save_checkpoint(
        {"state_dict": Odd().state_dict()}, "odd.ckpt", {"created": 1.0}, None
    )
    assert torch.equal(
        load_checkpoint("odd.ckpt", weights_only=False)["state_dict"][
            "wide"
        ].to_dense(),
        torch.eye(2),
    )
    with pytest.raises(CheckpointError, match=r"wide.*weights_only=False"):
        Odd.load_from_checkpoint("odd.ckpt")
