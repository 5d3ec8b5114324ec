"""A run that meets a poisoned batch goes back and past it, or skips the step, as if the batch had not been there."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from loopwright.callbacks import Callback, ModelCheckpoint, SpikeDetector, SpikeError
from loopwright.callbacks.spike_baseline import Baseline
from loopwright.framework import CombinedLoader, Module, Trainer, seed_everything
from loopwright.framework.checkpoint.find import find_manifests
from loopwright.loggers import CSVLogger
from loopwright.strategies.tensor_shards import full_state
from tests.strategies.distributed import call_all, in_processes

BATCH = 4
SAMPLES = 48


class Samples(Dataset):
    """Each sample is augmented at random; those that are poisoned are multiplied by ``factor``."""

    def __init__(self, *poisoned: int, factor: float = math.nan) -> None:
        self.poisoned = poisoned
        self.factor = factor

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = torch.randn(4, generator=torch.Generator().manual_seed(index))
        x = clean + 0.1 * torch.randn(4)
        return (x * self.factor if index in self.poisoned else x), clean.sum()


class Stream(IterableDataset):
    def __init__(self, *poisoned: int) -> None:
        self.samples = Samples(*poisoned)

    def __iter__(self) -> Iterator[Any]:
        yield from (self.samples[index] for index in range(SAMPLES))


class Net(Module):
    """Dropout, batch norm, a scheduler of steps, logged values."""

    def __init__(self, normalizes: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8) if normalizes else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(4, 8), norm, nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x)[:, 0] - y).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Dies(Callback):
    """Saves and raises after a batch, once it has come there so often."""

    def __init__(self, path: Path, batch_idx: int, times: int) -> None:
        self.path = path
        self.batch_idx = batch_idx
        self.times = times

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times -= batch_idx == self.batch_idx
        if not self.times:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


def made(folder: Any, *callbacks: Callback, every: int = 2, **options: Any) -> Trainer:
    saves = ModelCheckpoint(
        Path(folder) / "ckpt", every_n_train_steps=every, save_top_k=-1
    )
    options = {"max_epochs": 1, "precision": "32-true", **options}
    return Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, saves],
        logger=CSVLogger(folder, version=0),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fitted(
    folder: Any,
    loader: Any,
    *callbacks: Callback,
    module: Callable[[], Module] = Net,
    ckpt_path: Any = None,
    **options: Any,
) -> list[Tensor]:
    """The weights and buffers that a fit ends with."""
    seed_everything(1, verbose=False)
    net = module()
    made(folder, *callbacks, **options).fit(net, loader, ckpt_path=ckpt_path)
    return [value.clone() for value in net.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows(folder: Any) -> str:
    return (Path(folder) / "loopwright_logs/version_0/metrics.csv").read_text()


def without(batches: list[int]) -> DataLoader[Any]:
    """The loader of a dataset that never had these batches."""
    left = [index for index in range(SAMPLES) if index // BATCH not in batches]
    return DataLoader(Subset(Samples(), left), BATCH)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_goes_back_and_ends_as_if_the_batch_had_not_been_there(
    tmp_path: Path, accumulate: int, caplog: pytest.LogCaptureFixture
):
    detector = SpikeDetector(every_n_steps=3)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    found = fitted(tmp_path / "a", DataLoader(Samples(29), BATCH), detector, **options)
    (incident,) = detector.incidents
    window = [7] if accumulate == 1 else [6, 7]
    assert incident["batches"] == window
    assert 29 in incident["samples"]
    assert len(incident["samples"]) == BATCH * accumulate
    assert "samples 2" in caplog.text
    assert same(found, fitted(tmp_path / "b", without(window), **options))
    # Rows after the checkpoint are rewound, and its steps are those of the run without the batch.
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_the_samples_of_a_shuffled_loader_are_named(tmp_path: Path):
    detector = SpikeDetector()
    nets: list[Net] = []

    def module() -> Net:
        nets.append(Net())
        return nets[0]

    loader = DataLoader(Samples(29, 5), BATCH, shuffle=True)
    found = fitted(tmp_path / "a", loader, detector, module=module)
    trainer = nets[0].trainer
    order = [trainer.samples_of(i, 0) or [] for i in range(SAMPLES // BATCH)]
    assert sorted(sum(order, [])) == list(range(SAMPLES))  # noqa: RUF017 # a dozen lists
    poisoned = [batch for batch in order if 29 in batch or 5 in batch]
    assert [incident["samples"] for incident in detector.incidents] == poisoned
    left = [batch for batch in order if batch not in poisoned]
    reference = DataLoader(Samples(), batch_sampler=left)
    # Batch norm, dropout and augmentation draw as they would without these batches.
    assert same(found, fitted(tmp_path / "b", reference))


def test_a_run_that_is_killed_after_it_leaves_the_batch_out_too(tmp_path: Path):
    killed_after_it_went_back(tmp_path)


def killed_after_it_went_back(folder: Path) -> None:
    """Every rank checks for itself; where there are two, a step has a batch of each."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    path = folder / "own.ckpt"
    # It goes back to a checkpoint, has not come to the batch again, and is killed.
    at = 7 if ranks == 1 else 4
    # That of the last rank.
    first = (at * ranks + ranks - 1) * BATCH
    loader = DataLoader(Samples(first + 1), BATCH)
    options = {"every": 3, "strategy": "ddp" if ranks > 1 else "auto", "devices": ranks}
    dies = Dies(path, at - 1, times=2)
    with pytest.raises(RuntimeError, match="killed"):
        fitted(folder / "a", loader, SpikeDetector(), dies, **options)
    again = SpikeDetector()
    found = fitted(folder / "a", loader, again, ckpt_path=path, **options)
    assert again.rollbacks == 1
    (incident,) = again.incidents
    assert incident["batches"] == [at]
    assert incident["samples"] == list(range(first, first + BATCH))
    left_out = range(at * ranks, (at + 1) * ranks)
    assert same(found, fitted(folder / "b", without([*left_out]), **options))


def test_samples_of_several_loaders_are_named(tmp_path: Path):
    """Which loader has them, and where: one that has ended begins again, in another order."""

    class Several(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.cat([x[:, 0] for x, _ in batch.values()]).tolist())
            return super().training_step(batch["long"], batch_idx) + (
                super().training_step(batch["short"], batch_idx)
            )

    seen: list[Any] = []
    short = DataLoader(Subset(Fixed(), range(12)), BATCH, shuffle=True)
    long = DataLoader(Fixed(29), BATCH, shuffle=True)
    loader = CombinedLoader({"long": long, "short": short}, "max_size_cycle")
    detector = SpikeDetector(every_n_steps=1)
    fitted(tmp_path, loader, detector, module=Several)
    (incident,) = detector.incidents
    samples = incident["samples"]
    assert (0, 29) in samples
    assert len(samples) == 2 * BATCH
    # What the step saw of the shorter one was what is named.
    (step,) = [step for step in seen if any(map(math.isnan, step))]
    named = [Fixed()[index][0][0] for loader, index in samples if loader == 1]
    assert step[BATCH:] == torch.stack(named).tolist()


def test_streams_are_named_by_position(tmp_path: Path, caplog: Any):
    detector = SpikeDetector()
    loader = DataLoader(Stream(29), BATCH)
    fitted(tmp_path, loader, detector)
    assert detector.incidents[0]["batches"] == [7]
    assert detector.incidents[0]["samples"] is None
    assert "batch 7" in caplog.text


class Fixed(Samples):
    """Nothing is drawn at random."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y = torch.randn((), generator=torch.Generator().manual_seed(index))
        x = torch.arange(4.0) * index / SAMPLES - y
        return (x * self.factor if index in self.poisoned else x), y


class Sharded(Net):
    """For strategies that shard: no batch norm, whose statistics each process has for itself, and no dropout."""

    def __init__(self) -> None:
        super().__init__(normalizes=False)
        self.net[2] = nn.Identity()


def ends_without_the_window(
    folder: Path, strategy: str, action: Any, accumulate: int = 1
) -> None:
    """In two processes, the second of which has the poisoned batch."""
    options = {
        "strategy": strategy,
        "devices": 2,
        "accumulate_grad_batches": accumulate,
    }

    def weights(name: str, loader: Any, *callbacks: Callback) -> dict[str, Tensor]:
        seed_everything(1, verbose=False)
        trainer = made(folder / name, *callbacks, **options)
        trainer.fit(Sharded(), loader)
        return full_state(trainer.strategy, trainer.strategy.model_state())

    detector = SpikeDetector(action)
    found = weights("a", DataLoader(Fixed(21), BATCH), detector)
    (incident,) = detector.incidents
    assert set(range(20, 24)) <= {*incident["samples"]}
    left = [
        i for i in range(SAMPLES) if i // BATCH // 2 // accumulate != 2 // accumulate
    ]
    expected = weights("b", DataLoader(Subset(Fixed(), left), BATCH))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
def test_strategies_go_back_and_skip(tmp_path: Path):
    scenes = [
        ("ddp", "skip", 2),
        ("fsdp", "rollback", 2),
        ("deepspeed_stage_3", "rollback"),
    ]
    calls: dict[str, tuple[Any, ...]] = {
        "killed": (killed_after_it_went_back, tmp_path / "killed")
    }
    for number, scene in enumerate(scenes):
        calls[str(scene)] = (ends_without_the_window, tmp_path / str(number), *scene)
    in_processes(2, call_all, calls)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_skipped_step_leaves_nothing_behind(tmp_path: Path, precision: str):
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "precision": precision}

    def module() -> Net:
        net = Net()
        net.net[2] = nn.Identity()
        return net

    detector = SpikeDetector("skip")
    poisoned = DataLoader(Fixed(29), BATCH)
    found = fitted(tmp_path / "a", poisoned, detector, module=module, **options)
    assert [incident["batches"] for incident in detector.incidents] == [[6, 7]]
    left = [index for index in range(SAMPLES) if index // BATCH not in (6, 7)]
    clean = DataLoader(Subset(Fixed(), left), BATCH)
    assert same(found, fitted(tmp_path / "b", clean, module=module, **options))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


class Rooted(Net):
    """The gradient of a poisoned sample is not finite, though its loss is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch[0].eq(0).all(1).any():
            return next(self.parameters()).sum().mul(0).abs().sqrt() + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("watches", [False, True])
def test_a_broken_step_is_found_by_its_gradients_or_by_what_follows(
    tmp_path: Path, watches: bool
):
    detector = SpikeDetector(watch_gradients=watches)
    loader = DataLoader(Fixed(29, factor=0.0), BATCH)
    found = fitted(tmp_path / "a", loader, detector, module=Rooted)
    batches = sorted(each["batches"][0] for each in detector.incidents)
    assert batches == ([7] if watches else [7, 8, 9, 10])
    left = [index for index in range(SAMPLES) if index // BATCH not in batches]
    clean = DataLoader(Subset(Fixed(), left), BATCH)
    assert same(found, fitted(tmp_path / "b", clean, module=Rooted))


def test_a_loss_too_high_and_one_spike_too_many(tmp_path: Path):
    loader = DataLoader(Fixed(29, factor=1e4), BATCH)
    detector = SpikeDetector(max_rollbacks=1)
    with pytest.raises(
        SpikeError, match=r"epoch 1, batch 7: its loss is .* samples 28"
    ):
        fitted(tmp_path, loader, detector, module=Sharded, max_epochs=2)
    assert "is the limit" in detector.incidents[0]["reason"]


def test_it_begins_anew_where_there_is_no_checkpoint(tmp_path: Path):
    detector = SpikeDetector()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=detector,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(Samples(13), BATCH))
    assert (detector.rollbacks, trainer.global_step) == (1, SAMPLES // BATCH - 1)
    assert os.listdir(tmp_path) == [], "the checkpoint of the beginning goes at the end"


def test_another_run_has_losses_of_its_own(tmp_path: Path):
    detector = SpikeDetector()
    made(tmp_path / "small", detector).fit(Net(), DataLoader(Samples(9), BATCH))
    assert len(detector.incidents) == 1
    high = [(torch.randn(4, 4), torch.full((4,), 1e3)) for _ in range(12)]
    trainer = made(tmp_path / "high", detector)
    trainer.fit(Net(), high)
    assert (detector.incidents, detector.rollbacks) == ([], 0)
    assert trainer.global_step == 12


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization_goes_back_and_does_not_skip(tmp_path: Path):
    poisoned = DataLoader(Samples(29), BATCH)
    found = fitted(tmp_path / "a", poisoned, SpikeDetector(), module=Manual)
    assert same(found, fitted(tmp_path / "b", without([7]), module=Manual))
    with pytest.raises(ValueError, match="takes automatic optimization"):
        fitted(tmp_path / "c", poisoned, SpikeDetector("skip"), module=Manual)


class Late(Callback):
    """Goes back to before a batch only when a later checkpoint has been saved; once."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 8 and not trainer.loggers[0].hparams:
            trainer.loggers[0].hparams["has gone"] = True
            trainer.rewind([(0, 4)])


def test_later_checkpoints_are_kept_under_another_name(tmp_path: Path):
    """A path finds them, ``"last"`` does not, and the run saves anew under their names."""
    found = fitted(tmp_path / "a", DataLoader(Samples(), BATCH), Late())
    assert same(found, fitted(tmp_path / "b", without([4])))
    (aside,) = tmp_path.rglob("*.taken-back")
    assert aside.name == "epoch=0-step=6.ckpt.taken-back"
    again = aside.with_suffix("")
    assert isinstance(Net.load_from_checkpoint(aside), Net)
    assert {*find_manifests(str(aside.parent))} == {
        str(path) for path in aside.parent.glob("*.ckpt")
    }
    assert again.is_dir()


class Pickled(Callback):
    """Has a state that only pickle can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("a"), "none": object}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["path"] == Path("a")


def test_it_goes_back_to_a_resumed_checkpoint_with_pickled_objects(tmp_path: Path):
    """The fit was told to load them, and may again."""
    own = tmp_path / "a/own.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        fitted(
            tmp_path / "a",
            DataLoader(Samples(), BATCH),
            Pickled(),
            Dies(own, 4, 1),
            every=99,
        )
    seed_everything(1, verbose=False)
    detector = SpikeDetector()
    trainer = made(tmp_path / "a", detector, Pickled(), every=99)
    trainer.fit(
        Net(), DataLoader(Samples(29), BATCH), ckpt_path=own, weights_only=False
    )
    assert detector.rollbacks == 1


def test_an_iterator_is_refused(tmp_path: Path):
    batches = iter([*DataLoader(Samples(29), BATCH)])
    with pytest.raises(RuntimeError, match=r"list_iterator.* can be read once only"):
        fitted(tmp_path, batches, SpikeDetector())


def limits(values: list[float]) -> float:
    baseline = Baseline(window=100, warmup=50, threshold=10.0)
    baseline.add(values)
    return baseline.limit()


def test_what_is_ordinary():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, generator=draw)
    normal = (2.5 + 0.05 * noise).tolist()
    assert 2.8 < limits(normal) < 3.3, "of a steady loss, ten deviations are little"
    near_zero = (0.01 * noise.exp()).tolist()
    assert max(near_zero) < limits(near_zero), "and near zero they are much"
    decay = [10 * math.exp(-i / 200) + float(noise[i]) / 10 for i in range(1000)]
    for begin in range(0, 1000, 10):
        assert max(decay[begin : begin + 10]) < limits(decay[:begin])
    assert limits([3.0] * 4) == math.inf
    assert limits([3.0] * 10) == 30.0
    negative = (-100 + noise).tolist()
    assert -95 < limits(negative) < 0
