"""A run that was saved inside an epoch goes on with another number of processes: each sample left is seen once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchmetrics import MaxMetric, MeanMetric, MinMetric, SumMetric
from torchmetrics.classification import BinaryAUROC

from loopwright.callbacks import Callback, EarlyStopping, ModelCheckpoint
from loopwright.framework import CheckpointError, Engine, Module
from tests.strategies.distributed import in_processes, quiet

SAMPLES = 45
CUT = 3  # batches of each process before the run is cut, with two processes; twice as many with one


class Numbers(Dataset):
    """Each sample is its own number."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES))


class Backwards(Sampler):
    """A sampler of the user's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES - 1, -1, -1))

    def __len__(self) -> int:
        return SAMPLES


class Stateful:
    """A loader that knows how far it has been read, and can only be moved by its own state."""

    def __init__(self, batch_size: int = 3, sized: bool = True) -> None:
        self.batch_size, self.sized = batch_size, sized
        self.position = self.begin = 0

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("nobody knows")
        return -(-SAMPLES // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        self.position, self.begin = self.begin, 0
        return self._batches()

    def _batches(self) -> Iterator[Tensor]:
        while self.position < SAMPLES:
            batch = torch.arange(
                self.position, min(self.position + self.batch_size, SAMPLES)
            )
            self.position += self.batch_size
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["position"]


def shuffled(batch_size: int = 3, **arguments: Any) -> DataLoader:
    return DataLoader(Numbers(), batch_size, shuffle=True, **arguments)


# By name, the loader before the cut and after it, how many samples of an epoch are seen at most, and the Trainer's
# arguments. Where they are limited, in batches of 2, one process leaves an odd number of batches to two.
CASES: dict[str, Any] = {
    "shuffled": (shuffled, shuffled, SAMPLES, {}),
    "another batch size": (shuffled, lambda: shuffled(7), SAMPLES, {}),
    "workers": (shuffled, lambda: shuffled(num_workers=1), SAMPLES, {}),
    "windows": (shuffled, shuffled, SAMPLES, {"accumulate_grad_batches": 3}),
    "limited": (lambda: shuffled(2), lambda: shuffled(2), 22, {}),
    "own sampler": (
        *[lambda: DataLoader(Numbers(), 3, sampler=Backwards())] * 2,
        SAMPLES,
        {},
    ),
    "list": (
        *[lambda: [torch.arange(i, i + 3) for i in range(0, SAMPLES, 3)]] * 2,
        SAMPLES,
        {},
    ),
    "stream": (*[lambda: DataLoader(Stream(), 3)] * 2, SAMPLES, {}),
    "limited stream": (*[lambda: DataLoader(Stream(), 2)] * 2, 22, {}),
    "limited streams": (
        *[lambda: {"a": DataLoader(Stream(), 2), "b": DataLoader(Stream(), 1)}] * 2,
        22,
        {},
    ),
    "with a state": (Stateful, Stateful, SAMPLES, {}),
    "with a state and no length": (*[lambda: Stateful(sized=False)] * 2, SAMPLES, {}),
    "several loaders": (
        *[lambda: {"a": shuffled(), "b": DataLoader(Numbers(5), 1, shuffle=True)}] * 2,
        SAMPLES,
        {},
    ),
}


class Net(Module):
    """Notes the samples that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.seen: list[list[int]] = []
        self.mean, self.sum, self.min, self.max = (
            MeanMetric(),
            SumMetric(),
            MinMetric(),
            MaxMetric(),
        )
        self.auroc = BinaryAUROC()

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch["a"] if isinstance(batch, dict) else batch
        if not self.seen:
            self.seen.append([])
        if not self.trainer.metrics.is_dummy:  # else it only keeps the peers company
            self.seen[-1] += batch.tolist()
        numbers = batch.float()
        for name, metric in (
            ("mean", self.mean),
            ("sum", self.sum),
            ("min", self.min),
            ("max", self.max),
        ):
            metric.update(numbers)
            self.log(name, metric, on_step=False, on_epoch=True)
        self.auroc.update(numbers * 7 % 11 / 11, batch % 2)
        self.log("auroc", self.auroc, on_step=False, on_epoch=True)
        self.log(
            "logged_mean",
            numbers.mean(),
            on_step=False,
            on_epoch=True,
            batch_size=len(batch),
        )
        self.log(
            "logged_max", numbers.max(), on_step=False, on_epoch=True, reduce_fx="max"
        )
        return (self.linear(numbers[:, None] / SAMPLES) - 1.0).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7),
                "interval": "step",
            }
        ]


class Cut(Callback):
    """Saves a checkpoint after a batch, and ends the run."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1 and trainer.batch_idx == self.batches:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@dataclass
class Told:
    """What a run has come to, by rank where it differs."""

    seen: list[list[list[int]]]
    metrics: dict[str, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    steps: int = 0
    rate: float = 0.0
    score: Any = None


def run(
    path: Path, name: str, cut: int = 0, resume: bool = False, epochs: int = 3
) -> Told:
    before, after, seen, arguments = CASES[name]
    torch.manual_seed(4)
    module = Net()
    trainer = quiet(
        max_epochs=epochs,
        callbacks=[
            EarlyStopping("mean", patience=5, check_on_train_epoch_end=True),
            *([Cut(path, cut)] if cut else []),
        ],
        **arguments,
    )
    if seen < SAMPLES:
        trainer.limit_train_batches = seen // 2 // trainer.world_size
    trainer.state.seed = 11
    try:
        trainer.fit(
            module, (after if resume else before)(), ckpt_path=path if resume else None
        )
    except InterruptedError:
        trainer.strategy.barrier()
        return Told(trainer.strategy.gather_objects(module.seen))
    stopping: Any = trainer.early_stopping_callback
    return Told(
        trainer.strategy.gather_objects(module.seen),
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        [parameter.detach().clone() for parameter in module.parameters()],
        trainer.global_step,
        trainer.optimizers[0].param_groups[0]["lr"],
        stopping.wait_count,
    )


def cut_all(folder: Path, cut: int) -> dict[str, Told]:
    return {name: run(folder / f"{name}.ckpt", name, cut) for name in CASES}


def resume_all(folder: Path, epochs: int) -> dict[str, Told]:
    return {
        name: run(folder / f"{name}.ckpt", name, resume=True, epochs=epochs)
        for name in CASES
    }


def cut_by_two(folder: Path) -> dict[str, Any]:
    """What one process goes on with."""
    return {
        "cut": cut_all(folder / "two", CUT),
        "engine": engine_cut(folder / "engine-two", CUT),
    }


def with_two(folder: Path) -> dict[str, Any]:
    """What one process has begun, and what needs two from its beginning to its end."""
    return {
        "resumed": resume_all(folder / "one", 2),
        "engine": engine_resume(folder / "engine-one"),
        "same batches": equal_batches(folder, 3, 6, ranks=2),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def two_to_one(folder: Path) -> tuple[Any, Any]:
    before = in_processes(2, cut_by_two, folder)
    return before, {
        "resumed": resume_all(folder / "two", 2),
        "engine": engine_resume(folder / "engine-two"),
    }


@pytest.fixture(scope="module")
def one_to_two(folder: Path) -> tuple[Any, Any]:
    before = {
        "cut": cut_all(folder / "one", 2 * CUT),
        "engine": engine_cut(folder / "engine-one", 2 * CUT),
    }
    equal_batches(folder, 6, 6, ranks=1)
    return before, in_processes(2, with_two, folder)


@pytest.fixture(params=["2 to 1", "1 to 2"])
def changed(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(
        {"2 to 1": "two_to_one", "1 to 2": "one_to_two"}[request.param]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_sample_of_the_epoch_is_seen_once(changed: tuple[Any, Any], name: str):
    before, after = changed[0]["cut"][name], changed[1]["resumed"][name]
    last_before = [number for own in before.seen for number in own[1]]
    first_after = [number for own in after.seen for number in own[0]]
    assert last_before
    assert first_after
    numbers, count, ranks = (
        sorted(last_before + first_after),
        CASES[name][2],
        len(before.seen),
    )
    if count < SAMPLES:
        count = count // 2 // ranks * 2 * ranks
    assert len(set(numbers)) == len(numbers) == count
    if count == SAMPLES or "stream" in name:
        assert numbers == list(range(count))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_epochs_values_are_those_of_all_its_samples(
    changed: tuple[Any, Any], name: str
):
    numbers = [
        number
        for told in (changed[0]["cut"], changed[1]["resumed"])
        for own in told[name].seen
        for number in own[-1]
    ]
    numbers, metrics = torch.tensor(numbers), changed[1]["resumed"][name].metrics
    auroc = BinaryAUROC()(numbers.float() * 7 % 11 / 11, numbers % 2)
    assert metrics["mean"] == pytest.approx(numbers.float().mean().item())
    assert metrics["logged_mean"] == pytest.approx(numbers.float().mean().item())
    assert metrics["sum"] == numbers.sum()
    assert (metrics["min"], metrics["max"], metrics["logged_max"]) == (
        numbers.min(),
        numbers.max(),
        numbers.max(),
    )
    assert metrics["auroc"] == pytest.approx(auroc.item())


@pytest.mark.slow
def test_counters_schedulers_and_callbacks_go_on(
    two_to_one: tuple[Any, Any], one_to_two: tuple[Any, Any]
):
    # An epoch has 15 batches: 8 steps for two processes, and 15 for one.
    alone, together = (
        two_to_one[1]["resumed"]["shuffled"],
        one_to_two[1]["resumed"]["shuffled"],
    )
    assert alone.steps == 8 + CUT + (15 - 2 * CUT)
    assert together.steps == 15 + 2 * CUT + 5
    for told in (alone, together):
        assert told.rate == pytest.approx(0.1 * 0.7 ** (told.steps // 4))
        assert told.score == 1  # the mean of all numbers is the same in both epochs


def equal_batches(folder: Path, batch_size: int, whole: int, ranks: int) -> Any:
    """Train on windows of the same ``whole`` samples, whatever the number of processes; cut, or go on."""
    path = folder / "same.ckpt"
    torch.manual_seed(4)
    module = Net()
    trainer = quiet(max_epochs=2, callbacks=[Cut(path, 2)] if ranks == 1 else [])
    trainer.state.seed = 11
    loader = DataLoader(Numbers(42), batch_size, shuffle=True)
    if ranks == 1:
        twin = quiet(max_epochs=2)
        twin.state.seed = 11
        whole_run = copy.deepcopy(module)
        twin.fit(whole_run, copy.copy(loader))
        torch.save(
            [parameter.detach() for parameter in whole_run.parameters()],
            folder / "same.pt",
        )
        with pytest.raises(InterruptedError):
            trainer.fit(module, loader)
        return None
    trainer.fit(module, loader, ckpt_path=path)
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.slow
def test_with_the_same_global_batches_the_weights_are_the_same(
    one_to_two: tuple[Any, Any], folder: Path
):
    """One process with batches of 6, and then two with batches of 3: the samples of each step are the same."""
    for ours, uninterrupted in zip(
        one_to_two[1]["same batches"], torch.load(folder / "same.pt"), strict=True
    ):
        torch.testing.assert_close(ours, uninterrupted, rtol=1e-6, atol=1e-6)


# -- the Engine -------------------------------------------------------------------------------------------------------


def engine_run(path: Path, cut: int = 0) -> Any:
    """Read two epochs; stop in the second after ``cut`` batches and save, or begin where that was."""
    torch.manual_seed(4)
    engine = Engine(accelerator="cpu", launch=False)
    engine.connect()
    model = nn.Linear(1, 1)
    prepared: Any = engine.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), shuffled()
    )
    model, optimizer, loader = prepared
    seen: list[list[int]] = []
    if not cut:
        engine.load_state(path)
    while loader.epoch < 2:
        seen.append([])
        for batch in loader:
            if loader.share:
                seen[-1] += batch.tolist()
            engine.backward(model(batch[:, None] / SAMPLES).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if cut and loader.epoch == 1 and loader.batches == cut:
                engine.save_state(path)
                told = engine.strategy.gather_objects(seen)
                engine.end_training()
                return told
    told = engine.strategy.gather_objects(seen)
    engine.end_training()
    return told


def engine_cut(path: Path, cut: int) -> Any:
    return engine_run(path, cut)


def engine_resume(path: Path) -> Any:
    return engine_run(path)


@pytest.mark.slow
def test_an_engines_loop_sees_each_sample_once(changed: tuple[Any, Any]):
    before, after = changed[0]["engine"], changed[1]["engine"]
    numbers = [number for own in before for number in own[1]] + [
        number for own in after for number in own[0]
    ]
    assert sorted(numbers) == list(range(SAMPLES))


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_batches_that_only_count_as_such_keep_their_size(tmp_path: Path):
    """The place of a sampler of the user's own is known in batches: another size would begin elsewhere."""
    path = tmp_path / "cut.ckpt"
    with pytest.raises(InterruptedError):
        quiet(max_epochs=2, callbacks=[Cut(path, 3)]).fit(
            Net(), DataLoader(Numbers(), 3, sampler=Backwards())
        )
    with pytest.raises(
        CheckpointError,
        match=r"batches can be counted, whose sizes have been changed from \[3\] to \[5\]",
    ):
        quiet(max_epochs=2).fit(
            Net(), DataLoader(Numbers(), 5, sampler=Backwards()), ckpt_path=path
        )


def test_what_is_no_sum_cannot_be_joined(tmp_path: Path):
    from torchmetrics.regression import PearsonCorrCoef

    from loopwright.framework.metrics.metric_state import (
        merge_metric_states,
        metric_states,
    )

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pearson = PearsonCorrCoef()

    holder = Holder()
    states = []
    for seed in range(2):
        holder.pearson.update(torch.randn(4), torch.randn(4))
        states.append(metric_states(holder))
        torch.manual_seed(seed)
    with pytest.raises(CheckpointError, match="PearsonCorrCoef keeps a state"):
        merge_metric_states(holder, states, keep=True)


def test_a_model_checkpoint_is_taken_up_in_its_folder(tmp_path: Path):
    """Another batch size in one process: the epoch is completed, and the next one is whole."""
    torch.manual_seed(4)
    module = Net()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    quiet(
        max_steps=18, max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True
    ).fit(module, shuffled())
    again = Net()
    trainer = quiet(
        max_epochs=3, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True
    )
    trainer.fit(again, shuffled(9), ckpt_path="last")
    assert sorted(module.seen[1] + again.seen[0]) == list(range(SAMPLES))
    assert sorted(again.seen[1]) == list(range(SAMPLES))
    assert trainer.global_step == 18 + 4 + 5


class Validated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list[tuple[int, int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append((self.trainer.current_epoch, self.trainer.batch_idx))


def test_a_validation_that_a_mixed_epoch_is_too_short_for(tmp_path: Path):
    """Three batches of 9 and six of 3 are fewer than the interval; the whole epochs of 15 are long enough for it."""
    path, again = tmp_path / "cut.ckpt", Validated()
    with pytest.raises(InterruptedError):
        quiet(max_epochs=2, callbacks=[Cut(path, 3)]).fit(Net(), shuffled(9))
    arguments = {"max_epochs": 3, "num_sanity_val_steps": 0}
    quiet(val_check_interval=12, **arguments).fit(
        again, shuffled(), shuffled(SAMPLES), ckpt_path=path
    )
    assert list(map(len, again.seen)) == [SAMPLES - 27, SAMPLES]
    assert again.validated == [(2, 12)]
    with pytest.raises(
        ValueError,
        match="val_check_interval=16 is more than the 15 training batches of an epoch",
    ):
        quiet(val_check_interval=16, **arguments).fit(
            again, shuffled(), shuffled(SAMPLES), ckpt_path=path
        )
