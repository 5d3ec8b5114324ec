"""Training with DDP in real gloo groups equals training in one process."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.framework import CombinedLoader, Module, Trainer
from loopwright.strategies import DDPStrategy
from tests.samples import as_dataset
from tests.strategies.distributed import all_in_processes, in_processes, quiet

FEATURES = 6


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(
        x, x.mean(1, keepdim=True) + 0.1 * torch.randn(samples, 1, generator=generator)
    )


class Net(Module):
    """Keeps each step's loss, its number of samples, and the samples."""

    def __init__(self, weighted: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 1))
        self.weighted = weighted
        self.steps: list[tuple[float, int]] = []
        self.samples: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        errors = (self.net(x) - y).square()
        self.log("loss", errors.mean(), on_step=False, on_epoch=True)
        loader: Any = self.trainer.run.loaders.train
        share = loader.batch_weight
        if share:
            self.samples += x[:, 0].tolist()
        if (
            self.weighted
        ):  # as with tokens: some samples count more, and processes hold unequal sums
            weights = 1 + (x[:, :1] > 0) * 3.0
            self.steps.append(
                ((errors * weights).sum().item(), weights.sum().item() if share else 0)
            )
            return {
                "loss": (errors * weights).sum() / weights.sum(),
                "weight": weights.sum(),
            }
        self.steps.append((errors.sum().item(), len(x) if share else 0))
        return errors.mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def outcome(module: Net, trainer: Any) -> dict[str, Any]:
    """What the processes have come to: losses by step over all of them, samples, weights."""
    gather = trainer.strategy.gather_objects
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    told = gather((module.steps, module.samples, weights))
    losses = [
        sum(loss for loss, count in steps if count) / sum(count for _, count in steps)
        for steps in zip(*(steps for steps, _, _ in told), strict=True)
    ]
    assert all(weights.equal(other) for _, _, other in told), (
        "the replicas have drifted apart"
    )
    return {
        "losses": losses,
        "samples": [samples for _, samples, _ in told],
        "weights": weights,
        "loss": float(trainer.callback_metrics["loss"]),
        "steps": trainer.global_step,
    }


def train(
    samples: int, batch_size: int, weighted: bool, options: dict[str, Any]
) -> dict[str, Any]:
    module, trainer = Net(weighted), quiet(**options)
    trainer.fit(module, DataLoader(data(samples), batch_size, shuffle=True))
    return outcome(module, trainer)


def assert_equal(one: dict[str, Any], several: dict[str, Any]) -> None:
    assert several["steps"] == one["steps"]
    assert several["losses"] == pytest.approx(one["losses"], abs=1e-6)
    torch.testing.assert_close(several["weights"], one["weights"], atol=2e-6, rtol=0)
    assert several["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert sorted(chain(*several["samples"])) == sorted(
        chain(*one["samples"])
    )  # each sample once in each epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """What two processes come to, which are started once for all that is to be compared."""
    return all_in_processes(
        2,
        {
            "sizes": (cases, 8, SIZES),
            "precisions": (cases, 8, PRECISIONS),
            "weighted gradient": (weighted_gradient,),
            "closures": (closures, 8),
            "cut and resumed": (cut_and_resumed, str(folder)),
            "manual and options": (manual_and_options,),
        },
    )


def cases(
    batch_size: int, arguments: list[tuple[int, bool, dict[str, Any]]]
) -> list[Any]:
    """``train`` with several arguments."""
    found = []
    for samples, weighted, options in arguments:
        torch.manual_seed(0)
        found.append(train(samples, batch_size, weighted, options))
    return found


PLAIN: dict[str, Any] = {"max_epochs": 15}
# Of 7 batches: 3, 3 and 1.
WINDOWS: dict[str, Any] = {
    "max_epochs": 43,
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 0.5,
}
VALUE: dict[str, Any] = {
    "max_epochs": 2,
    "gradient_clip_val": 0.05,
    "gradient_clip_algorithm": "value",
}
SIZES = [
    (104, False, PLAIN),
    (104, False, WINDOWS),
    (101, False, WINDOWS),
    (109, True, WINDOWS),
    (99, True, VALUE),
]


def test_several_processes_train_as_one_with_the_global_batch(two: dict[str, Any]):
    """100 steps and more; accumulation, clipping, short last windows, last batches and last rounds; weights."""
    one = cases(16, SIZES)
    assert one[0]["steps"] >= 100
    assert one[1]["steps"] >= 100
    for expected, got in zip(one, two["sizes"], strict=True):
        assert_equal(expected, got)


PRECISIONS = [
    (101, False, {"precision": each, "max_epochs": 3})
    for each in ("bf16-mixed", "16-mixed", "bf16-true")
]


def test_mixed_precision_trains_in_several_processes(two: dict[str, Any]):
    for expected, got in zip(cases(16, PRECISIONS), two["precisions"], strict=True):
        assert got["steps"] == expected["steps"]
        assert got["losses"] == pytest.approx(expected["losses"], abs=0.02)


class Searches(Net):
    """Evaluates as often as its loss asks for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(
            self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
        )


class Overrides(Net):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        optimizer.step(closure=optimizer_closure)


def closures(batch_size: int) -> list[dict[str, Any]]:
    # A search magnifies what rounding makes different.
    exact = {"precision": "64-true"}
    found = []
    for kind, weighted, options in (
        (Searches, False, exact),
        (Searches, True, exact),
        (Overrides, True, {"accumulate_grad_batches": 3}),
    ):
        torch.manual_seed(0)
        module, trainer = kind(weighted), quiet(max_epochs=3, **options)
        trainer.fit(module, DataLoader(data(45), batch_size, shuffle=True))
        found.append(outcome(module, trainer))
    return found


def test_optimizers_that_evaluate_decide_alike(two: dict[str, Any]):
    """As one process with the global batch, though the processes' own losses differ; the last rounds are short."""
    one = closures(16)
    assert len(one[0]["losses"]) > 2 * one[0]["steps"]
    for expected, got in zip(one, two["closures"], strict=True):
        assert_equal(expected, got)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_and_synchronised_batch_norm():
    module, trainer = in_processes(2, on_gpus)
    assert module == trainer


def on_gpus() -> list[dict[str, Tensor]]:
    module = Net()
    module.net.insert(1, nn.BatchNorm1d(12))
    trainer = Trainer(
        accelerator="gpu", precision="bf16-mixed", sync_batchnorm=True, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(101), 8, shuffle=True))
    assert isinstance(module.net[1], nn.BatchNorm1d), "the user's own is back"
    assert not isinstance(module.net[1], nn.SyncBatchNorm)
    sums = {name: float(tensor.sum()) for name, tensor in module.state_dict().items()}
    return trainer.strategy.gather_objects(sums)


def test_weights_give_the_global_weighted_mean(two: dict[str, Any]):
    """One window over both processes against the gradient computed by hand."""
    got = two["weighted gradient"]
    module, (x, y) = Net(), data(32).tensors
    torch.manual_seed(0)
    module = Net()
    weights = 1 + (x[:, :1] > 0) * 3.0
    ((module.net(x) - y).square() * weights).sum().div(weights.sum()).backward()
    expected = gradient_of(module)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def gradient_of(module: nn.Module) -> Tensor:
    gradients: list[Any] = [p.grad for p in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients])


def weighted_gradient() -> Tensor:
    torch.manual_seed(0)
    module, trainer = Net(weighted=True), quiet(accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data(32), 8))
    return gradient_of(module)


# -- loaders ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.dataset = data(samples)

    def __iter__(self):
        yield from (self.dataset[i] for i in range(len(self.dataset)))


class Told(Stream):
    """A stream whose length tells another number of samples."""

    def __init__(self, samples: int, told: int) -> None:
        super().__init__(samples)
        self.told = told

    def __len__(self) -> int:
        return self.told


class Loader(DataLoader):
    """A subclass whose constructor takes other arguments."""

    def __init__(self, samples: int) -> None:
        super().__init__(data(samples), batch_size=4, shuffle=True)


def batches_of(samples: int, size: int) -> list[Any]:
    return list(DataLoader(data(samples), size))


LOADERS = {
    "shuffled, incomplete round": lambda: DataLoader(data(53), 4, shuffle=True),
    "workers": lambda: DataLoader(data(53), 4, num_workers=1),
    "drop_last": lambda: DataLoader(data(54), 4, drop_last=True),
    "one batch": lambda: DataLoader(data(3), 4),
    "subclass": lambda: Loader(50),
    "batch sampler": lambda: DataLoader(
        data(50), batch_sampler=BatchSampler(RandomSampler(data(50)), 4, False)
    ),
    "list": lambda: batches_of(50, 4),
    "stream": lambda: DataLoader(Stream(70), 2),
    "stream that tells too few": lambda: DataLoader(Told(70, told=20), 2),
    "stream that tells too many": lambda: DataLoader(Told(70, told=99), 2),
    "several streams": lambda: {
        "a": DataLoader(Told(70, told=20), 2),
        "b": [DataLoader(Told(9, told=99), 2)],
    },
    "several": lambda: {
        "a": DataLoader(data(50), 4, shuffle=True),
        "b": DataLoader(data(10), 4, shuffle=True),
    },
    "sequential": lambda: CombinedLoader(
        [DataLoader(data(26), 4), DataLoader(data(13), 4)], "sequential"
    ),
}


class Reads(Module):
    """Keeps the first number of each sample that counts, and how much it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)
        self.read: list[tuple[int, float, list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = (batch["a"] if isinstance(batch, dict) else batch)[0]
        loader: Any = self.trainer.run.loaders.train
        self.read.append((batch_idx, loader.batch_weight, x[:, 0].tolist()))
        return self.layer(x).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read_all(names: list[str]) -> list[Any]:
    read = []
    for name in names:
        module, trainer = Reads(), quiet()
        torch.manual_seed(5)
        trainer.fit(module, LOADERS[name]())
        read.append(trainer.strategy.gather_objects(module.read))
    return read


@pytest.fixture(scope="module")
def three(folder: Path) -> dict[str, Any]:
    """What three processes come to."""
    return all_in_processes(
        3,
        {
            "read": (read_all, list(LOADERS)),
            "buckets": (buckets,),
            "resumed": (resumed_with_all_options, str(folder / "cut.ckpt")),
        },
    )


def test_each_sample_is_read_once_in_steps_of_equal_number(three: dict[str, Any]):
    one = read_all(list(LOADERS))
    for name, (alone,), shared in zip(LOADERS, one, three["read"], strict=True):
        assert len({len(steps) for steps in shared}) == 1, name
        counted = [
            sample
            for steps in shared
            for _, share, samples in steps
            if share
            for sample in samples
        ]
        expected = [sample for *_, samples in alone for sample in samples]
        if name == "drop_last":  # 13 batches of 4 make four rounds of three
            assert len(counted) == 48
            assert set(counted) <= set(expected)
        else:
            assert sorted(counted) == sorted(expected), name
        # The batches are those of one process, dealt out in turn.
        dealt = [
            steps[i][2]
            for i in range(len(shared[0]))
            for steps in shared
            if steps[i][1]
        ]
        assert dealt == [samples for *_, samples in alone][: len(dealt)], name
        for i, shares in enumerate(
            zip(*([share for _, share, _ in steps] for steps in shared), strict=True)
        ):
            assert sum(shares) == pytest.approx(3), (
                f"{name}, step {i}: the gradient must be a mean"
            )


class Stateful(DataLoader):
    """Keeps its own place, as torchdata's StatefulDataLoader does."""

    read = 0

    def __iter__(self):
        for batch in islice(super().__iter__(), self.read, None):
            self.read += 1
            yield batch
        self.read = 0

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


class Unsized(Stateful):
    def __len__(self) -> int:
        raise TypeError


class Shuffled(StatefulDataLoader):
    """In the order of a generator that goes on from epoch to epoch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, shuffle=True)


def cut_and_resumed(folder: str) -> list[Any]:
    """The samples read by a stateful loader in two epochs: of a run, and of one that is cut and of its rest."""
    read = []
    for kind in (Stateful, Unsized, Shuffled):
        for cut_at in (
            2,
            6,
            8,
        ):  # inside the first epoch, at its end, and inside the second
            for name, ckpt_path in (
                ("whole", None),
                ("cut", None),
                ("rest", f"{folder}/cut.ckpt"),
            ):
                module, trainer = (
                    Reads(),
                    quiet(max_epochs=2, max_steps=cut_at if name == "cut" else -1),
                )
                torch.manual_seed(9 if name == "rest" else 1)
                trainer.fit(module, kind(data(23), 2), ckpt_path=ckpt_path)
                if name == "cut":
                    trainer.save_checkpoint(f"{folder}/cut.ckpt")
                counted = [
                    sample
                    for _, share, samples in module.read
                    if share
                    for sample in samples
                ]
                read.append(trainer.strategy.gather_objects(counted))
    return read


def test_loaders_that_keep_their_own_state_go_on_in_each_process(two: dict[str, Any]):
    for whole, cut, rest in batched(two["cut and resumed"], 3):
        assert sorted(chain(*whole)) == sorted(data(23).tensors[0][:, 0].tolist() * 2)
        assert [
            before + after for before, after in zip(cut, rest, strict=True)
        ] == whole


def batched(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# -- buckets ----------------------------------------------------------------------------------------------------------


class Tied(Module):
    """Of several buckets; the last layer's weight is the first layer's, which has its gradient last."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32, bias=False)
        self.middle = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.last = nn.Linear(32, 32, bias=False)
        self.last.weight = self.first.weight
        self.frozen = frozen

    def on_train_epoch_start(self) -> None:
        self.middle[0].requires_grad_(self.current_epoch > 0 or not self.frozen)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (
            (self.last(self.middle(self.first(batch)).tanh()) - batch).square().mean()
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


SMALL = 0.006  # MB, less than two layers


def buckets() -> list[str]:
    """In the order of the first backward and of the third: the gradients there are, and the buckets sent."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    events: list[str] = []

    module = Tied()
    for name in ("first", "middle.3", "middle.0"):
        weight = module.get_parameter(f"{name}.weight")
        weight.register_post_accumulate_grad_hook(
            lambda _, name=name: events.append(name)
        )

    def note(state, bucket):  # DDP would refuse annotations that are strings
        events.append(f"bucket {bucket.index()}")
        return allreduce_hook(state, bucket)

    strategy = DDPStrategy(bucket_cap_mb=SMALL, ddp_comm_hook=note)
    quiet(strategy=strategy).fit(module, DataLoader(as_dataset(torch.randn(36, 32)), 4))
    return events


def test_gradients_are_sent_while_the_backward_runs(three: dict[str, Any]):
    step = three["buckets"][: len(three["buckets"]) // 3]
    assert three["buckets"] == step * 3, "the first step as those that follow"
    assert step[-1] == "bucket 2"
    assert (
        step.index("middle.3")
        < step.index("bucket 0")
        < step.index("middle.0")
        < step.index("first")
    )


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "static graph": ({"static_graph": True}, {}),
    "unused parameters": ({"find_unused_parameters": True}, {}),
    "copies": ({"gradient_as_bucket_view": False}, {}),
    "windows": ({}, {"accumulate_grad_batches": 2}),
}


def resumed_with_all_options(path: str) -> dict[str, bool]:
    """Whether a run that is resumed inside the second epoch, in which a layer is unfrozen, ends as a whole one."""
    return {name: resumed(path, name, name == "plain") for name in WAYS}


def resumed(path: str, way: str, frozen: bool) -> bool:
    samples = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    weights = {}
    for name in ("whole", "cut", "rest"):
        torch.manual_seed(2)
        module, options = Tied(frozen), WAYS[way]
        strategy = DDPStrategy(bucket_cap_mb=SMALL, **options[0])
        # Of 5 in an epoch; windows of 2 batches are 3 in an epoch.
        stop = {"cut": 4 if way == "windows" else 7}.get(name, -1)
        trainer = quiet(strategy=strategy, max_epochs=2, max_steps=stop, **options[1])
        trainer.fit(
            module,
            DataLoader(as_dataset(samples), 4, shuffle=True),
            ckpt_path=path if name == "rest" else None,
        )
        if name == "cut":
            trainer.save_checkpoint(path)
        weights[name] = torch.cat(
            [parameter.detach().flatten() for parameter in module.parameters()]
        )
    return weights["whole"].equal(weights["rest"])


def test_a_resumed_run_adds_up_as_the_whole_one(three: dict[str, Any]):
    assert three["resumed"] == dict.fromkeys(WAYS, True)


# -- hooks into DDP ---------------------------------------------------------------------------------------------------


class Manual(Module):
    """Two optimizers, as a GAN has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, layer in zip(
            self.optimizers(), (self.first, self.second), strict=True
        ):
            optimizer.update((layer(x) - y).square().mean())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(layer.parameters(), lr=0.05)
            for layer in (self.first, self.second)
        ]


def manual(batch_size: int, accumulate: int) -> Tensor:
    torch.manual_seed(0)
    module = Manual()
    trainer = quiet(
        accumulate_grad_batches=accumulate, max_epochs=3, strategy="ddp_find_unused_parameters_true",
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(112), batch_size))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert all(
        weights.equal(other) for other in trainer.strategy.gather_objects(weights)
    )
    return weights


def manual_and_options() -> list[Any]:
    results: list[Any] = [manual(8, 1), manual(8, 3)]
    # A communication hook, and the other options of DDP.
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
        fp16_compress_hook,
    )

    torch.manual_seed(0)
    strategy = DDPStrategy(
        ddp_comm_hook=fp16_compress_hook,
        static_graph=True,
        bucket_cap_mb=1,
        broadcast_buffers=False,
    )
    module, trainer = Net(), quiet(strategy=strategy)
    trainer.fit(module, DataLoader(data(64), 8))
    results.append(outcome(module, trainer)["weights"])
    strategy = DDPStrategy(static_graph=True)
    torch.manual_seed(0)
    module, trainer = Net(), quiet(strategy=strategy, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data(64), 8))
    results.append(outcome(module, trainer)["weights"])
    return results


def test_manual_optimization_and_the_options_of_ddp(two: dict[str, Any]):
    one, told = [manual(16, 1), manual(16, 3)], two["manual and options"]
    for expected, got in zip(one, told, strict=False):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    accumulated = Net()
    quiet(accumulate_grad_batches=2).fit(accumulated, DataLoader(data(64), 16))
    expected = torch.cat([p.detach().flatten() for p in accumulated.parameters()])
    torch.testing.assert_close(told[3], expected, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    module = Net()
    quiet().fit(module, DataLoader(data(64), 16))
    plain = torch.cat([p.detach().flatten() for p in module.parameters()])
    difference = (told[2] - plain).abs().max()
    assert 0 < difference < 5e-2, (
        "gradients were compressed to float16 on their way, and else as usual"
    )
