"""Lightning's names for averages of weights: its attributes, its keys on disk, and its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import loopwright.lightning as pl
from loopwright.callbacks import EMAWeightAveraging
from loopwright.framework.compat.lightning.callbacks import (
    EMAWeightAveraging as LightningsEMA,
)
from loopwright.framework.compat.lightning.callbacks import (
    StochasticWeightAveraging,
    WeightAveraging,
)
from loopwright.framework.compat.lightning.demos import BoringModel, RandomDataset
from loopwright.framework.compat.lightning.utilities import MisconfigurationException

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
}


class Counting(WeightAveraging):
    """Counts the moments that Lightning has methods for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.swaps = self.copies = 0

    def _swap_models(self, *args: Any) -> None:
        self.swaps += 1
        super()._swap_models(*args)

    def _copy_average_to_current(self, *args: Any) -> None:
        self.copies += 1
        super()._copy_average_to_current(*args)


def data() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(RandomDataset(32, 16), batch_size=4)


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def test_its_attributes_and_moments() -> None:
    callback, module = Counting(), BoringModel()
    pl.Trainer(callbacks=callback, max_epochs=3, **QUIET).fit(module, data(), data())
    average: Any = callback._average_model
    assert average.n_averaged == 12
    assert (callback.swaps, callback.copies) == (6, 1)
    for mine, theirs in zip(
        weights_of(average.module), weights_of(module), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_its_keys_are_on_disk_and_resumed(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.ckpt", BoringModel()
    torch.manual_seed(1)
    begin = {n: t.clone() for n, t in whole.state_dict().items()}

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)
                self.trained = weights_of(pl_module)

    save, loader = Save(), data()
    callbacks = [LightningsEMA(decay=0.5), save]
    pl.Trainer(callbacks=callbacks, max_epochs=2, **QUIET).fit(whole, loader)
    saved = torch.load(path)
    assert saved["averaging_state"]["n_averaged"] == 4
    assert "weight_sets" not in saved
    own = [*saved["current_model_state"].values()]
    assert all(map(torch.equal, own, save.trained))
    averaged = BoringModel.load_from_checkpoint(path)
    assert not torch.equal(averaged.layer.weight, save.trained[0])

    resumed = BoringModel()
    resumed.load_state_dict(begin)
    trainer = pl.Trainer(callbacks=LightningsEMA(decay=0.5), max_epochs=2, **QUIET)
    trainer.fit(resumed, loader, ckpt_path=path)
    assert all(map(torch.equal, weights_of(resumed), weights_of(whole)))


def test_a_checkpoint_of_lightning_itself_goes_on(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging as Lightnings

    from loopwright.framework import Module
    from tests.framework.models import quiet

    def make(base: Any) -> Any:
        class Line(base):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = nn.Linear(32, 2)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.layer(batch).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        return Line()

    loader, path = data(), tmp_path / "theirs.ckpt"

    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    theirs = make(lightning.LightningModule)
    callbacks = [Lightnings(decay=0.5), Save()]
    lightning.Trainer(callbacks=callbacks, max_epochs=2, **QUIET).fit(theirs, loader)
    ours, average = make(Module), EMAWeightAveraging(decay=0.5)
    quiet(average, max_epochs=2).fit(ours, loader, ckpt_path=path)
    assert average.weight_set.num_updates == 8
    torch.testing.assert_close(ours.layer.weight, theirs.layer.weight)


def test_wrong_arguments_raise_what_programs_catch() -> None:
    for start in (0, -1, 1.5):
        with pytest.raises(MisconfigurationException, match=">0 integer or a float"):
            StochasticWeightAveraging(0.1, start)
    with pytest.raises(MisconfigurationException, match="list of positive floats"):
        StochasticWeightAveraging([0.2, 1])
