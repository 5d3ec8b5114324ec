from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopwright.callbacks import ProgressBar, RichProgressBar, RichProgressBarTheme
from tests.callbacks.scripted import Scripted, fit, loader, trainer


class Screen(io.StringIO):
    """A terminal that keeps all that was written to it."""

    @property
    def frames(self) -> list[str]:
        """What was drawn, without colours and cursor movements, a line each."""
        from rich.text import Text

        return [
            line.rstrip()
            for line in Text.from_ansi(
                self.getvalue().replace("\r", "\n")
            ).plain.splitlines()
        ]

    def of(self, label: str) -> list[str]:
        return [line for line in self.frames if line.startswith(label)]


def bar(screen: Screen, **arguments: Any) -> RichProgressBar:
    return RichProgressBar(
        refresh_rate=1e9,  # each batch is drawn
        console_kwargs={
            "file": screen,
            "force_terminal": True,
            "width": 150,
            "legacy_windows": False,
        },
        **arguments,
    )


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


# -- in a terminal ----------------------------------------------------------------------------------------------------


def test_bars_of_training_and_validation(screen: Screen):
    fit(bar(screen), max_epochs=2)
    for epoch in ("Epoch 0/1", "Epoch 1/1"):
        counts = [line.split("━ ")[1].split()[0] for line in screen.of(epoch)]
        assert list(dict.fromkeys(counts)) == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    last = screen.of("Epoch")[-1]
    assert "it/s" in last
    assert "train_loss: " in last
    assert last.endswith(("val_loss: 2", "val_loss: 2 train_loss: " + last.split()[-1]))
    assert any(" 2/2 " in line for line in screen.of("Sanity check"))
    assert any(" 2/2 " in line for line in screen.of("Validation"))


def test_a_theme_styles_each_part(screen: Screen):
    colours = {
        "batch_progress": "blue",
        "time": "yellow",
        "processing_speed": "magenta",
        "metrics": "white",
    }
    theme = RichProgressBarTheme("red", **colours)
    fit(bar(screen, theme=theme), max_epochs=1)
    last = next(
        line
        for line in reversed(screen.getvalue().split("\r"))
        if "train_loss: " in line
    )
    for code, text in (
        (31, "Epoch 0/0"),
        (34, "4/4"),
        (33, "0:00:00"),
        (35, "it/s"),
        (37, "val_loss: "),
    ):
        styled = [
            part.partition("m")[2]
            for part in last.split("\x1b[")
            if part.startswith(f"{code}m")
        ]
        assert any(text in part for part in styled), text


def test_bars_of_test_and_prediction(screen: Screen):
    run = trainer(bar(screen))
    run.test(Scripted(), [loader(), loader(2)], verbose=False)
    assert " 6/6 " in screen.of("Test")[-1]
    run.predict(Scripted(), loader(3))
    assert " 3/3 " in screen.of("Prediction")[-1]


def test_nothing_is_drawn_between_two_drawings(screen: Screen):
    class Reads(RichProgressBar):
        reads = 0

        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            self.reads += 1
            return super().get_metrics(trainer, module)

    kwargs = {"file": screen, "force_terminal": True}
    slow, fast = (
        Reads(refresh_rate=1e-6, console_kwargs=kwargs),
        Reads(refresh_rate=1e9, console_kwargs=kwargs),
    )
    fit(slow, max_epochs=1, validate=False)
    assert slow.reads == 1  # at the end of the epoch
    fit(fast, max_epochs=1, validate=False)
    assert fast.reads == 5  # and after each batch


def test_no_thread_draws(screen: Screen):
    import threading

    class Counts(Scripted):
        threads: list[int]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.threads.append(threading.active_count())
            return super().training_step(batch, batch_idx)

    module = Counts()
    module.threads = []
    before = threading.active_count()
    fit(bar(screen), module=module, max_epochs=1, hang_timeout=0)
    assert set(module.threads) == {before}


def test_what_users_print_stays_above_the_bar(screen: Screen):
    class Talks(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            print(f"batch number {batch_idx}")
            return super().training_step(batch, batch_idx)

    stdout = sys.stdout
    fit(bar(screen), module=Talks(), max_epochs=1)
    assert sys.stdout is stdout
    assert [line for line in screen.frames if line.startswith("batch number")] == [
        f"batch number {i}" for i in range(4)
    ]


def test_a_file_is_no_terminal_whatever_the_colours(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
):
    """FORCE_COLOR asks for colours where there is no terminal; bars would become line after line there."""
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(variable, "1")
    fit(
        RichProgressBar(refresh_rate=1e9, console_kwargs={"file": screen}), max_epochs=2
    )
    lines = screen.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["Epoch 0/1", "Epoch 1/1"]
    assert "\x1b" not in screen.getvalue()


def test_leave_keeps_each_epoch(screen: Screen):
    def ends(leave: bool) -> int:
        screen.truncate(0)
        fit(bar(screen, leave=leave), validate=False)
        return screen.getvalue().count(
            "\x1b[?25h"
        )  # the cursor is shown again when a bar is left

    assert (ends(False), ends(True)) == (1, 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_gives_the_terminal_back(
    screen: Screen, error: type[BaseException]
):
    class Fails(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert sys.stdout is not stdout, (
                "the bar redirects print while it is on the screen"
            )
            raise error

    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises(error):
        fit(bar(screen), module=Fails())
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is visible


def test_a_loader_without_length(screen: Screen):
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield torch.ones(2), torch.ones(1)

    run = trainer(bar(screen), max_epochs=-1, max_steps=3)
    run.fit(Scripted(), DataLoader(Endless(), batch_size=2))
    assert " 3/?" in screen.of("Epoch 0 ")[-1]


@pytest.mark.parametrize(("told", "last"), [(4, "3/?"), (8, "3/4")])
def test_a_length_that_is_an_estimate(
    screen: Screen, capsys: pytest.CaptureFixture[str], told: int, last: str
):
    class Told(IterableDataset[Any]):
        def __len__(self) -> int:
            return told

        def __iter__(self) -> Any:
            return iter([(torch.ones(2), torch.ones(1))] * 6)

    batches = DataLoader(Told(), batch_size=2)
    trainer(bar(screen), max_epochs=1).fit(Scripted(), batches, batches)
    assert f" {last} " in screen.of("Epoch 0/0")[-1]
    assert f" {last} " in screen.of("Validation")[-1]
    trainer(RichProgressBar(), max_epochs=1).fit(Scripted(), batches)
    assert capsys.readouterr().out.startswith(
        f"Epoch 0/0: {last.removesuffix('/?')} batches in "
    )


def test_a_resumed_epoch_begins_where_it_was_cut(screen: Screen):
    class Stops(RichProgressBar):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint("cut.ckpt")

    fit(Stops(), max_epochs=1)
    fit(bar(screen), max_epochs=1, ckpt_path="cut.ckpt")
    counts = [line.split("━ ")[1].split()[0] for line in screen.of("Epoch")]
    assert list(dict.fromkeys(counts)) == ["2/4", "3/4", "4/4"]


def test_get_metrics_can_be_overridden(screen: Screen):
    class Mine(RichProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            metrics = super().get_metrics(trainer, module)
            metrics.pop("train_loss", None)
            return {**metrics, "phase": "[red] zone"}

    fit(
        Mine(
            refresh_rate=1e9,
            console_kwargs={"file": screen, "force_terminal": True, "width": 150},
        ),
        max_epochs=1,
    )
    assert screen.of("Epoch 0/0")[-1].endswith("val_loss: 3 phase: [red] zone")


# -- elsewhere --------------------------------------------------------------------------------------------------------


def test_without_a_terminal_an_epoch_is_a_line(capsys: pytest.CaptureFixture[str]):
    run = fit(RichProgressBar(), max_epochs=2)
    run.test(dataloaders=loader(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" batches in ")[0] for line in lines] == [
        "Epoch 0/1: 4/4",
        "Epoch 1/1: 4/4",
        "Test: 4/4",
    ]
    assert all("val_loss: " in line and "it/s" in line for line in lines[:2])
    assert not any("\x1b" in line for line in lines)


def test_the_line_has_the_values_of_the_whole_epoch(capsys: pytest.CaptureFixture[str]):
    class Counts(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log(
                "batches",
                1.0,
                on_step=False,
                on_epoch=True,
                reduce_fx="sum",
                prog_bar=True,
            )
            return super().training_step(batch, batch_idx)

    fit(RichProgressBar(), module=Counts(), max_epochs=1)
    assert "batches: 4" in capsys.readouterr().out


def test_a_validation_inside_an_epoch_is_a_line_too(capsys: pytest.CaptureFixture[str]):
    fit(RichProgressBar(), max_epochs=1, val_check_interval=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" batches in ")[0] for line in lines] == [
        "Validation: 2/2",
        "Epoch 0/0: 4/4",
    ]


def test_it_can_be_switched_off(capsys: pytest.CaptureFixture[str], screen: Screen):
    fit(RichProgressBar(refresh_rate=0))
    silent = RichProgressBar()
    silent.disable()
    fit(silent)
    assert capsys.readouterr().out == ""
    silent.enable()
    fit(silent, max_epochs=1)
    assert "Epoch 0/0" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"refresh_rate .*-1"):
        RichProgressBar(refresh_rate=-1)


def test_a_bar_can_be_copied_and_pickled_while_it_is_fit(screen: Screen):
    class Copies(RichProgressBar):
        copies: tuple[Any, ...] = ()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            copied = copy.deepcopy(self)
            assert copied._display is None
            assert self._display is not None
            super().on_train_epoch_end(trainer, module)

    fit(
        Copies(
            refresh_rate=1e9, console_kwargs={"file": screen, "force_terminal": True}
        ),
        max_epochs=1,
    )
    assert pickle.loads(pickle.dumps(RichProgressBar(leave=True))).leave


def test_a_bar_of_ones_own(capsys: pytest.CaptureFixture[str]):
    class Percent(ProgressBar):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            done = (batch_idx + 1) / trainer.num_training_batches
            self.print(f"{done:.0%} {sorted(self.get_metrics(trainer, module))}")

    mine = Percent()
    with pytest.raises(RuntimeError, match=r"Percent\.trainer is there from setup on"):
        _ = mine.trainer
    run = fit(mine, max_epochs=1, validate=False)
    assert mine.trainer is run
    assert capsys.readouterr().out.splitlines() == [
        f"{p}% ['train_loss']" for p in (25, 50, 75, 100)
    ]
