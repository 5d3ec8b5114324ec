from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from loopwright.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from tests.callbacks.scripted import Scripted, fit, loader, trainer


class Drawings(TQDMProgressBar):
    """Notes what the epochs' bar tells, and how often it is drawn."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.told: list[int] = []
        self.drawn = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        self.told.append(self.train_progress_bar.n)

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        self.drawn += 1
        return super().get_metrics(*args)


def test_bars_tell_each_batch_but_are_drawn_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = [0.0]
    monkeypatch.setattr("loopwright.callbacks.tqdm_progress.time.monotonic", lambda: now[0])  # fmt: skip
    bar = Drawings()
    run = trainer(bar, max_epochs=1)
    run.fit(Scripted(), loader(20))
    assert bar.told == list(range(1, 21))
    # The first batch, the last one, and the epoch's end with its values.
    assert bar.drawn == 3
    assert "Epoch 0: 100%" in capsys.readouterr().out
    assert run.progress_bar_callback is bar

    bar = Drawings(refresh_rate=8)
    trainer(bar, max_epochs=1).fit(Scripted(), loader(20))
    assert bar.told == [0] * 7 + [8] * 8 + [16] * 4 + [20]


def test_a_resumed_epoch_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    fit(saves, max_epochs=1, max_steps=3, validate=False)
    bar = Drawings()
    fit(bar, ckpt_path=saves.best_model_path, max_epochs=1, validate=False)
    assert bar.told == [4]
    assert "Epoch 0: 100%" in capsys.readouterr().out


def test_two_bars_are_one_too_many():
    with pytest.raises(
        ValueError, match=r"2 progress bars \(TQDMProgressBar, RichProg"
    ):
        trainer(TQDMProgressBar(), RichProgressBar())


def test_there_is_no_bar_outside_of_runs_nor_without_tqdm(
    monkeypatch: pytest.MonkeyPatch,
):
    bar = copy.deepcopy(TQDMProgressBar())
    with pytest.raises(TypeError, match="TQDMProgressBar has no bar of train"):
        _ = bar.train_progress_bar
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"loopwright\[tqdm\]"):
        fit(bar)
