"""What happens when the processes do not do the same: each case ends or goes on by a rule, and none hangs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)
from torchmetrics import MeanMetric, SumMetric

from loopwright.callbacks import Callback, EarlyStopping
from loopwright.framework import Module
from loopwright.framework.data.sharding import LOOK_AHEAD
from loopwright.strategies import DeepSpeedStrategy, Precision
from loopwright.strategies.group import SingleProcess
from tests.samples import as_dataset
from tests.strategies.distributed import all_in_processes, in_processes, quiet, told_by


def data(samples: int = 40) -> TensorDataset:
    return TensorDataset(torch.arange(samples).float()[:, None] / samples)


class Net(Module):
    """Does on one rank what ``way`` says, from batch 2 on."""

    def __init__(self, way: str = "", rank: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        if way in ("unused", "unfrozen"):
            self.spare = nn.Linear(1, 1).requires_grad_(way == "unused")
        self.metric = MeanMetric()
        self.way, self.rank = way, rank
        self.read: list[tuple[float, list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        train: Any = self.trainer.run.loaders.train
        self.read.append((train.batch_weight, x.flatten().tolist()))
        loss = (self.layer(x) - 1).square().mean()
        self.log("loss", loss, on_epoch=True)
        odd = self.global_rank == self.rank and batch_idx >= 2
        if odd and self.way == "other key":
            self.log("mine", 1.0, on_epoch=True)
        if odd and self.way == "none":
            return None
        if self.way == "metric":
            self.log("metric", self.metric, rank_zero_only=True)
        if odd and self.way in ("raise", "save after it"):
            raise ValueError("a bad sample")
        if odd and self.way == "stop":
            self.trainer.should_stop = True
        if odd and self.way == "main only":
            self.log("main", 1.0, on_epoch=True, rank_zero_only=True)
        if self.way == "weights" and self.global_rank != self.rank:
            return {"loss": loss, "weight": 2}
        return loss

    def on_train_epoch_start(self) -> None:
        if self.way == "unfrozen":
            self.spare.requires_grad_(self.current_epoch == 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).mean())
        if self.way == "gather":
            self.all_gather(batch[0])
        if self.way == "validation key" and self.global_rank == self.rank:
            self.log("other", 1.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return (
            -1
            if self.way == "skip" and self.global_rank == self.rank and batch_idx >= 2
            else None
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfterIt(Callback):
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint("after.ckpt")  # the others will not come


def fit(way: str, rank: int, options: dict[str, Any]) -> Any:
    module, trainer = (
        Net(way, rank),
        quiet(**options, callbacks=[SaveAfterIt()] if way == "save after it" else []),
    )
    trainer.fit(module, DataLoader(data(), 2), DataLoader(data(10), 2))
    steps = trainer.global_step, trainer.current_epoch, len(module.read)
    return trainer.strategy.gather_objects(
        (steps, {k: float(v) for k, v in trainer.callback_metrics.items()})
    )


@pytest.mark.parametrize(
    ("way", "kind", "words"),
    [
        ("none", RuntimeError, ["returned None on rank 1, batch 2"]),
        (
            "raise",
            ValueError,
            [
                "Rank 1 of 2 failed at epoch 0, batch 2, global step 2",
                "ValueError: a bad sample",
            ],
        ),
        ("gather", RuntimeError, ["all_gather", "batch", "Rank 0"]),
        ("save after it", ValueError, ["ValueError: a bad sample"]),
    ],
)
def test_what_one_process_does_ends_all_with_its_error(
    way: str, kind: type[Exception], words: list[str]
):
    with pytest.raises(kind) as error:
        in_processes(2, fit, way, 1, {})
    assert error.type is kind
    for word in words:
        assert word in told_by(error.value)
    if "rank 0" not in words[-1]:  # the guilty one comes first
        assert re.search(r"Rank (\d)", told_by(error.value))


def refused(way: str) -> list[str]:
    """What each process says when all of them find out."""
    with pytest.raises((RuntimeError, ValueError)) as error:
        lying() if way == "lying" else fit(way, 1, REFUSED_WITH.get(way, {}))
    said: list[Any] = [None, None]
    dist.all_gather_object(said, f"{error.type.__name__}: {error.value}")
    return said


# Of parameters that the loss does not use: in a single step, which no other follows; and from the second epoch on.
REFUSED_WITH = {
    "unused": {"max_steps": 1, "limit_val_batches": 0},
    "unfrozen": {"max_epochs": 2},
}
UNUSED = [
    "RuntimeError",
    "spare.weight",
    "spare.bias",
    'strategy="ddp_find_unused_parameters_true"',
]
REFUSED = {
    "unused": UNUSED,
    "unfrozen": UNUSED,
    "other key": [
        "RuntimeError",
        "'mine'",
        "on rank 1 and not on rank 0",
        "train epoch",
    ],
    "validation key": [
        "RuntimeError",
        "'other'",
        "on rank 1 and not on rank 0",
        "validation epoch",
    ],
    "weights": ["RuntimeError", "weight", "none on rank 1"],
    "metric": ["ValueError", "rank_zero_only=True", "Metric"],
    # A loader that promises too much.
    "lying": ["RuntimeError", "no batch 4 of the 5 that its length promised"],
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_differs_is_refused_by_all(told: dict[str, Any], way: str):
    for said in told[way]:
        for word in REFUSED[way]:
            assert word in said


class SavesInside(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 5:
            trainer.save_checkpoint(self.path)


def mended(folder: Path) -> Any:
    """What goes on from a checkpoint of a run that logged another name in one process, and failed for it."""
    path = folder / "inside.ckpt"
    trainer = quiet(callbacks=[SavesInside(path)])
    with pytest.raises(RuntimeError, match="'mine'"):
        trainer.fit(Net("other key"), DataLoader(data(), 2))
    trainer = quiet()
    trainer.fit(Net(), DataLoader(data(), 2), ckpt_path=path)
    values = sorted(trainer.callback_metrics)
    return trainer.strategy.gather_objects((trainer.global_step, values))


def test_a_mended_program_goes_on_from_what_failed_for_a_name(told: dict[str, Any]):
    (steps, names), (steps_1, names_1) = told["mended"]
    assert steps == steps_1 == 10
    assert names == ["loss", "loss_epoch", "loss_step"]
    assert "mine_epoch" not in names_1


def proceeds() -> list[Any]:
    slow = {"max_epochs": 3, "num_sanity_val_steps": 0}
    return [fit("stop", 1, slow), fit("skip", 1, slow), fit("main only", 0, slow)]


def test_what_one_process_asks_for_happens_in_all_at_the_same_step(
    told: dict[str, Any],
):
    stop, skip, main = told["proceeds"]
    for (steps, _), (steps_1, _) in (stop, skip, main):
        assert steps == steps_1
    assert stop[0][0][1] == 0, "it stopped in the first epoch or right after it"
    assert skip[0][0][0] < 3 * 10, "each epoch was cut short"
    assert "main" in main[0][1]
    assert "main" not in main[1][1]


# -- loaders that differ ----------------------------------------------------------------------------------------------


class Own(IterableDataset):
    """A stream of which each process gives another part; each may begin with the same batches."""

    def __init__(self, lengths: tuple[int, ...], rank: int, alike: int = 0) -> None:
        self.length, self.rank, self.alike = lengths[rank], rank, alike

    def __iter__(self):
        yield from (
            torch.tensor([100.0 * self.rank * (i >= self.alike) + i])
            for i in range(self.length)
        )


class Judged(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    predict_step = test_step


def own_loaders(lengths: tuple[int, ...]) -> list[Any]:
    """Loaders of unequal length, sized and unsized, in each process its own; then those that may not differ."""
    found: list[Any] = []
    for kind in ("sized", "stream", "found out"):
        module, trainer = (
            Net(),
            quiet(use_distributed_sampler=None if kind == "found out" else False),
        )
        rank = dist.get_rank() if dist.is_initialized() else trainer.global_rank
        own = Own(lengths, rank)
        loader: Any = [*own] if kind == "sized" else own
        loader = (
            DataLoader(as_dataset(torch.stack(loader)), 1)
            if kind == "sized"
            else DataLoader(loader, 1)
        )
        trainer.fit(module, loader)
        found.append(trainer.strategy.gather_objects(module.read))
    module, trainer = Net(), quiet()
    with pytest.raises(
        ValueError,
        match=r"5 batches on rank 0, 6 batches on rank 1.*use_distributed_sampler=False",
    ):
        trainer.fit(module, DataLoader(data(10 + 2 * trainer.global_rank), 2))
    for stage in ("validate", "test", "predict"):
        trainer = quiet()
        with pytest.raises(
            ValueError,
            match=rf"{stage} loader 0 has 5 batches on rank 0, 6 batches on rank 1",
        ):
            getattr(trainer, stage)(
                Judged(), DataLoader(data(10 + 2 * trainer.global_rank), 2)
            )
    trainer = quiet()
    read = [min(length, 2 * LOOK_AHEAD) for length in lengths]
    counted = f"until now {read[0]} batches on rank 0, {read[1]} batches on rank 1"
    with pytest.raises(RuntimeError, match=rf"different streams.*{counted}"):
        trainer.fit(Net(), DataLoader(Own(lengths, trainer.global_rank, alike=1), 1))
    return found


LENGTHS = [(LOOK_AHEAD + 3, 2), (1, 2 * LOOK_AHEAD)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_process_that_runs_out_of_batches_waits_for_the_others(
    told: dict[str, Any], lengths: tuple[int, ...]
):
    for read in told[f"own loaders {lengths}"]:
        assert [len(steps) for steps in read] == [max(lengths)] * 2
        for rank, steps in enumerate(read):
            own = [100.0 * rank + i for i in range(lengths[rank])]
            assert [
                sample for share, samples in steps if share for sample in samples
            ] == own
            for i, (share, _) in enumerate(steps):
                present = sum(length > i for length in lengths)
                assert share == (2 / present if i < lengths[rank] else 0)


class Lies(Dataset):
    """One that raises at its end, and a loader whose length promises more batches than there are."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(1)


class Short(DataLoader):
    def __len__(self) -> int:
        return 10


def lying() -> None:
    quiet().fit(Net(), Short(Lies(), 1))


def distributed_sampler() -> list[Any]:
    """The user's own DistributedSampler is left alone, in training and evaluation; and a rank without any batch."""
    found = []
    module, trainer = Net(), quiet()
    sampler = DistributedSampler(
        data(20), trainer.world_size, trainer.global_rank, shuffle=False
    )
    trainer.fit(module, DataLoader(data(20), 2, sampler=sampler))
    found.append([sample for _, samples in module.read for sample in samples])
    trainer.validate(module, DataLoader(data(2), 2), verbose=False)
    found.append(float(trainer.callback_metrics["val_loss"]))
    own = DataLoader(data(4 if trainer.global_rank == 0 else 0), 2)
    quiet(use_distributed_sampler=False).validate(module, own, verbose=False)
    found.append(float(module.trainer.callback_metrics["val_loss"]))
    return trainer.strategy.gather_objects(found)


def test_own_samplers_and_ranks_without_a_batch(told: dict[str, Any]):
    first, second = told["distributed sampler"]
    assert first[0] == pytest.approx([i / 20 for i in range(0, 20, 2)])
    assert second[0] == pytest.approx([i / 20 for i in range(1, 20, 2)])
    assert first[1:] == second[1:]


# -- callbacks and collectives ----------------------------------------------------------------------------------------


class Count(Callback):
    """How often Python called for a collective in each batch."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.by_batch: list[list[str]] = []

    def on_train_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.calls = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.by_batch.append(self.calls)


def counted(counter: Count, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    counter.calls.append(name)
    return original(*args, **kwargs)


def count() -> list[list[str]]:
    counter = Count()
    trainer = quiet(
        callbacks=[counter, EarlyStopping("loss", patience=5)],
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "all_reduce",
            "all_gather",
            "broadcast",
            "barrier",
            "all_gather_object",
            "broadcast_object_list",
        ):
            patch.setattr(
                dist, name, partial(counted, counter, name, getattr(dist, name))
            )
        trainer.fit(Net(), DataLoader(data(2000), 2))
    return counter.by_batch


def test_a_step_has_no_collective_but_those_of_ddp(told: dict[str, Any]):
    by_batch = told["count"]
    assert len(by_batch) == 500
    # The control word, after batches 1, 3, 7, 15, …: as far again each time, until a second is reached. In the first
    # batch the processes also tell each other whether there are weights.
    calls = [
        calls for calls in by_batch[1:-1] if calls
    ]  # the last one has those of the epoch's end
    assert all(found == ["all_reduce"] for found in calls)
    assert len(calls) <= 10


class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        module.layer.weight.requires_grad_(trainer.current_epoch > 0)


def finetune() -> list[Tensor]:
    module, trainer = Net(), quiet(callbacks=[Unfreeze()], max_epochs=2)
    module.layer.weight.requires_grad_(False)
    trainer.fit(module, DataLoader(data(), 2))
    return trainer.strategy.gather_objects(
        torch.cat([p.detach().flatten() for p in module.parameters()])
    )


def test_parameters_that_are_unfrozen_later_stay_equal(told: dict[str, Any]):
    first, second = told["finetune"]
    assert first.equal(second)
    assert first[0] != Net().layer.weight.item()


class Plateau(Net):
    def __init__(self) -> None:
        super().__init__()
        self.metric = SumMetric()
        self.register_buffer(
            "apart", torch.full((2, 3), 1.0 + dist.get_rank())[:, ::2]
        )  # with gaps in memory

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("own", float(self.global_rank * batch_idx), rank_zero_only=False)
        self.log("main", 1.0, rank_zero_only=True, sync_dist=True, on_step=True)
        # The second process's last batch is a dummy: it takes part in what is reduced at once, and counts nothing.
        self.log("true", True, sync_dist=True, on_step=True, reduce_fx="sum")
        if not self.trainer.metrics.is_dummy:
            self.metric.update(1.0)
        self.log("metric", self.metric, sync_dist=True, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "own"},
        }


def plateau() -> Any:
    trainer = quiet(
        max_epochs=3, callbacks=[EarlyStopping("main", strict=False, patience=9)]
    )
    dist.init_process_group("gloo")
    module: Any = Plateau()
    trainer.fit(module, DataLoader(data(10), 2))
    batches, metric = (
        float(trainer.callback_metrics[name]) for name in ("batches", "metric_epoch")
    )
    return trainer.strategy.gather_objects(
        (
            trainer.optimizers[0].param_groups[0]["lr"],
            module.apart.tolist(),
            batches,
            metric,
        )
    )


def test_the_loss_scale_of_a_precision_in_deepspeeds_configuration():
    """DeepSpeed has float16 on GPUs only: what it would be told. It says nothing of a scale that nobody set."""
    from loopwright.strategies.deepspeed_config import complete_config

    def section(config: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        strategy = DeepSpeedStrategy(config=config)
        strategy.group = SingleProcess(torch.device("cuda", 0))
        precision = Precision(
            "16-mixed", compute=torch.float16, loss_scaling=True, **fields
        )
        return complete_config(strategy, precision)["fp16"]

    assert section() == {"enabled": True}
    assert section(init_scale=1024.0, growth_interval=500) == {
        "enabled": True, "initial_scale_power": 10, "loss_scale_window": 500
    }  # fmt: skip
    assert (
        section({"fp16": {"loss_scale_window": 7}}, init_scale=2.0)["loss_scale_window"]
        == 7
    )
    wrong: list[dict[str, Any]] = [
        {"init_scale": 1000.0},
        {"growth_factor": 4.0},
        {"backoff_factor": 0.25},
    ]
    for fields in wrong:
        with pytest.raises(
            ValueError, match=rf"doubles and halves.*{next(iter(fields))}"
        ):
            section(**fields)
    with pytest.raises(
        ValueError, match=r"fp16.initial_scale_power=3.*init_scale=1024"
    ):
        section({"fp16": {"initial_scale_power": 3}}, init_scale=1024.0)


def test_values_of_one_process_decide_for_all():
    first, second = in_processes(2, plateau)
    assert first == second
    assert first[1] == [[1.0, 1.0], [1.0, 1.0]]
    assert first[2] == 5, (
        "the batch that keeps a process in step does not count, in hooks either"
    )
    assert first[3] == 5, "nor in a metric that is logged of it"


def stop_early() -> Any:
    module = Net()
    stopping = EarlyStopping("val_loss", patience=1, mode="max", min_delta=100)
    trainer = quiet(callbacks=[stopping], max_epochs=20)
    trainer.fit(module, DataLoader(data(), 2), DataLoader(data(10), 2))
    sync = module.all_gather(
        torch.tensor([float(trainer.global_rank)], requires_grad=True), sync_grads=True
    )
    weight = torch.tensor([1.0, 10.0])
    leaf = torch.tensor([2.0 + trainer.global_rank], requires_grad=True)
    (
        (module.all_gather(leaf, sync_grads=True).squeeze(1) ** 2) * weight
    ).sum().backward()
    reduced = [
        float(trainer.strategy.reduce(torch.tensor(1 + trainer.global_rank), op))
        for op in ("mean", "sum", "min", "max")
    ]
    return trainer.strategy.gather_objects(
        (
            trainer.current_epoch,
            stopping.wait_count,
            sync.detach().flatten().tolist(),
            leaf.grad.item() if leaf.grad is not None else None,
            reduced,
        )
    )


def test_early_stopping_and_the_collectives_of_a_module(told: dict[str, Any]):
    first, second = told["stop early"]
    assert first[:2] == second[:2] == (2, 1)
    assert first[2] == second[2] == [0.0, 1.0]
    assert (first[3], second[3]) == (
        2 * 2 * 1 * 2,
        2 * 3 * 10 * 2,
    )  # of the sum over both processes' losses
    assert first[4] == second[4] == [1.5, 3, 1, 2]


# -- one start of processes for all that need no end of them ----------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two processes tells."""
    return all_in_processes(
        2,
        {
            **{way: (refused, way) for way in REFUSED},
            "proceeds": (proceeds,),
            **{f"own loaders {lengths}": (own_loaders, lengths) for lengths in LENGTHS},
            "distributed sampler": (distributed_sampler,),
            "count": (count,),
            "finetune": (finetune,),
            "stop early": (stop_early,),
            "mended": (mended, tmp_path_factory.mktemp("mended")),
        },
    )


class SavesAlone(Callback):
    """Saves in the main process only, as many callbacks that people write do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and batch_idx == 3:
            trainer.save_checkpoint(self.folder / "alone.ckpt")
            trainer.export(self.folder / "alone.safetensors")


def saved_by_one(folder: Path) -> Any:
    """The weights of a run in the middle of which one process saves, and of the one that goes on from there."""
    found = []
    for ckpt_path in (None, folder / "alone.ckpt"):
        module, trainer = (
            Net(),
            quiet(strategy="ddp", max_epochs=2, callbacks=[SavesAlone(folder)]),
        )
        trainer.fit(module, DataLoader(data(), 2, shuffle=True), ckpt_path=ckpt_path)
        found.append([parameter.detach().clone() for parameter in module.parameters()])
    return found


@pytest.mark.slow
def test_a_checkpoint_that_one_process_saved_is_resumed_by_any_number(tmp_path: Path):
    whole, resumed = in_processes(2, saved_by_one, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    module = Net()
    loader = DataLoader(data(), 2, shuffle=True)
    quiet(max_epochs=2).fit(module, loader, ckpt_path=tmp_path / "alone.ckpt")
    assert sum(len(x) for _, x in module.read) == 40 - 2 * 4 * 2
    assert (tmp_path / "alone.safetensors").is_file()


def fit_in_parts(folder: Path) -> None:
    trainer = quiet(strategy="fsdp", callbacks=[SavesAlone(folder)])
    trainer.fit(Net(), DataLoader(data(), 2))


@pytest.mark.slow
def test_one_process_alone_cannot_save_a_state_in_parts(tmp_path: Path):
    with pytest.raises(RuntimeError) as error:
        in_processes(2, fit_in_parts, tmp_path)
    assert re.search(
        r"rank 0: save_checkpoint\(\) at .*test_rules.py:\d+", str(error.value)
    )
    assert re.search(
        r"rank 1: waits in another collective, at .*test_rules.py:\d+", str(error.value)
    )
