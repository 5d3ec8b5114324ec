"""FSDP2 and DeepSpeed's ZeRO train, save, resume, evaluate and refuse as one process does, with state in parts."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import CheckpointError, Module, Trainer
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    create_strategy,
)
from loopwright.strategies.launch.failures import is_loss
from tests.programs import run_program
from tests.strategies.distributed import all_in_processes, quiet

pytestmark = pytest.mark.slow  # whichever comes first starts the processes for all

VOCABULARY, WIDTH, LENGTH = 11, 5, 4
GLOBAL = 16  # samples of a batch, over all processes
ZERO = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]


# -- what is trained --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH + 1), nn.Linear(WIDTH + 1, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(self.up(x).tanh())


class Net(Module):
    """A language model of 219 numbers: a tied weight, one that is frozen, a counter that the loss depends on.

    Of none of its parameters' dimensions can two processes have halves, and of one they cannot have parts at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.make()

    def make(self) -> None:
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(
            torch.randn(LENGTH - 1, WIDTH), requires_grad=False
        )
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) * self.gain)

    def loss(self, tokens: Tensor, reduction: str = "mean") -> Tensor:
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        loss = self.loss(batch[0]) * (1 + 0.1 * float(self.count % 3))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        trained = {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        small = [
            name
            for name in trained
            if "bias" in name or "norm" in name or name == "gain"
        ]
        groups = [
            {
                "params": [
                    parameter
                    for name, parameter in trained.items()
                    if name not in small
                ],
                "weight_decay": 0.2,
            },
            {"params": [trained[name] for name in small], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Late(Net):
    """Makes its parts in ``configure_model``, where they may be in parts from the beginning."""

    def make(self) -> None:
        self.made = False

    def configure_model(self) -> None:
        if not self.made:
            super().make()
        self.made = True


class Closed(Net):
    """Steps by a closure, which makes no difference."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        optimizer.step(closure=optimizer_closure)


class Faint(Net):
    """Its gradients are so small that no loss scale is too large for them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 2.0**-10


class Weighted(Net):
    """As with padding: the tokens of a batch that count are more in one process than in the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        counts = (batch[0][:, 1:] > 3).flatten().float()
        loss = (self.loss(batch[0], "none") * counts).sum() / counts.sum()
        self.losses.append(loss.item())
        return {"loss": loss, "weight": counts.sum()}


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(VOCABULARY, (samples, 1), generator=generator)
    noise = torch.randint(2, (samples, LENGTH), generator=generator)
    return TensorDataset((start + torch.arange(LENGTH) * 3 + noise) % VOCABULARY)


def fit(
    strategy: str | Strategy,
    module: Net | None = None,
    samples: int = 96,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[Net, Trainer]:
    """Train with global batches of 16 samples, in one order whatever the number of processes."""
    module, trainer = (
        module or Net(),
        quiet(strategy=strategy, **{"max_epochs": -1, **options}),
    )
    trainer.state.seed = 11
    loader = DataLoader(data(samples), GLOBAL // trainer.world_size, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def losses(module: Net, trainer: Trainer) -> list[float]:
    """Of each batch, over all processes."""
    told = trainer.strategy.gather_objects(module.losses)
    return torch.tensor(told, dtype=torch.float64).mean(0).tolist()


@contextmanager
def alone() -> Iterator[None]:
    """In the process that runs the tests: DeepSpeed makes a group and sets variables, for one process too."""
    import deepspeed.comm

    environment = dict(os.environ)
    gc.freeze()  # ZeRO 3 collects all garbage each time
    try:
        yield
    finally:
        gc.unfreeze()
        deepspeed.comm.destroy_process_group()  # forgets the groups that DeepSpeed has made in it, too
        os.environ.clear()
        os.environ.update(environment)


# -- losses -----------------------------------------------------------------------------------------------------------

SHARDED = ["fsdp", *ZERO]
OFFLOADED = [
    "fsdp_cpu_offload",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
]
WINDOWS: dict[str, Any] = {"accumulate_grad_batches": 2}
CLIPPED: dict[str, Any] = {**WINDOWS, "gradient_clip_val": 0.3}


def trained(
    strategy: str, module: Net | None = None, steps: int = 100, **options: Any
) -> list[float]:
    return losses(*fit(strategy, module, max_steps=steps, **options))


def all_losses() -> dict[str, list[float]]:
    return {
        **{name: trained(name, **WINDOWS) for name in ("ddp", *SHARDED)},
        **{name: trained(name, steps=10, **WINDOWS) for name in OFFLOADED},
        **{
            f"{name} late": trained(name, Late(), steps=10, **WINDOWS)
            for name in ("fsdp", "deepspeed_stage_3")
        },
        **{
            f"{name} clipped": trained(
                name,
                Closed() if name in ("fsdp", "deepspeed_stage_2") else Net(),
                steps=30,
                **CLIPPED,
            )
            for name in ("ddp", *SHARDED)
        },
    }


def test_losses_are_those_of_one_process(two: dict[str, Any]):
    """100 steps of AdamW with two groups, windows of two batches, and a scheduler."""
    told, one = two["losses"], trained("single", **WINDOWS)
    assert len(one) == 200
    assert sum(one[-12:]) < 0.7 * sum(one[:12])
    for name in ("ddp", *SHARDED):
        assert told[name] == pytest.approx(one, abs=1e-5), name
    assert told["fsdp"] == told["ddp"]


@pytest.mark.parametrize("name", [*OFFLOADED, "fsdp late", "deepspeed_stage_3 late"])
def test_offloaded_states_and_late_parameters_are_trained_alike(
    two: dict[str, Any], name: str
):
    assert two["losses"][name] == pytest.approx(two["losses"]["ddp"][:20], abs=1e-5)


def test_losses_with_clipped_gradients_are_those_of_one_process(two: dict[str, Any]):
    told, one = two["losses"], trained("single", steps=30, **CLIPPED)
    assert max(abs(a - b) for a, b in zip(one, told["ddp"], strict=False)) > 1e-3, (
        "it clips"
    )
    for name in ("ddp", *SHARDED):
        assert told[f"{name} clipped"] == pytest.approx(one, abs=1e-4), name


HALVES: list[tuple[str, str, type[Net]]] = [
    *(("bf16-mixed", name, Net) for name in ("ddp", "fsdp", *ZERO[1:])),
    *(("16-mixed", name, Faint) for name in ("ddp", "fsdp")),
]


def in_half_precision() -> dict[tuple[str, str], Any]:
    return {
        (how, name): trained(name, kind(), 15, precision=how, **CLIPPED)
        for how, name, kind in HALVES
    }


@pytest.mark.parametrize(
    ("how", "name"), [(how, name) for how, name, _ in HALVES if name != "ddp"]
)
def test_half_precision_is_that_of_ddp(two: dict[str, Any], how: str, name: str):
    told = two["halves"]
    assert told[how, name] == pytest.approx(told[how, "ddp"], rel=0.02)


def overflow() -> list[tuple[float, float, bool]]:
    """By rank: the loss scale that gradients in parts have led to, the steps that were taken, and their success."""
    module, trainer = fit("fsdp", max_steps=16, precision="16-mixed")
    assert trainer.engine.scaler is not None
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    fell = sum(module.losses[-3:]) < sum(module.losses[:3])
    return trainer.strategy.gather_objects(
        (trainer.engine.scaler.get_scale(), *steps, fell)
    )


def test_all_processes_leave_out_the_step_in_which_one_has_an_overflow(
    two: dict[str, Any],
):
    (scale, steps, fell), other = two["overflow"]
    assert other == (scale, steps, True)
    assert fell
    assert 2 <= steps < 16
    assert scale == 2.0**16 / 2 ** (16 - steps)


def weighted() -> dict[str, list[float]]:
    return {
        name: trained(name, Weighted(), 10, **CLIPPED) for name in ("ddp", *SHARDED)
    }


def test_weighted_batches_are_those_of_ddp(two: dict[str, Any]):
    told = two["weighted"]
    for name in SHARDED:
        assert told[name] == pytest.approx(told["ddp"], abs=1e-5), name


# -- checkpoints ------------------------------------------------------------------------------------------------------

# By how it was saved, or is resumed: the strategy, and the number of processes.
ONE = {f"{name} at 1": name for name in ("single", "fsdp", *ZERO[1:])}
TWO = {f"{name} at 2": name for name in ("ddp", "fsdp", *ZERO[1:])}
# Saved in one file, too, whose resuming is tried.
FILES = ["fsdp at 2", "deepspeed_stage_2 at 2", "deepspeed_stage_3 at 2"]
SAMPLES = 48  # three steps an epoch: step 5 is in the middle of the second


class SaveNow(Callback):
    """Saves without waiting for its turn, as a user does, at step 5."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)
            file = self.path.with_name("file.ckpt")
            trainer.save_checkpoint(file, save_format="file")


def begin(folder: Path, kind: str, strategy: str) -> dict[str, Any]:
    """Ten steps with a checkpoint at the fifth, written while it goes on, and at the last."""
    callbacks = [
        ModelCheckpoint(
            folder / kind, filename="{step}", every_n_train_steps=5, save_top_k=-1
        ),
        SaveNow(folder / kind / "now.ckpt"),
    ]
    module, trainer = fit(
        strategy,
        samples=SAMPLES,
        max_steps=10,
        callbacks=callbacks,
        enable_checkpointing=True,
        inference_mode=False,
    )
    trainer.export(folder / kind / "weights.safetensors")
    return {"losses": losses(module, trainer)}


def go_on(
    folder: Path, saved: str, strategy: str, name: str = "step=5.ckpt"
) -> list[float]:
    path = folder / saved / name
    return losses(*fit(strategy, samples=SAMPLES, max_steps=10, ckpt_path=path))


def begin_all(folder: Path, kinds: dict[str, str]) -> dict[str, Any]:
    return {kind: begin(folder, kind, strategy) for kind, strategy in kinds.items()}


def go_on_all(
    folder: Path, kinds: dict[str, str]
) -> dict[tuple[str, ...], list[float]]:
    return {
        (saved, kind): go_on(folder, saved, strategy)
        for saved in (*ONE, *TWO)
        for kind, strategy in kinds.items()
    } | {
        ("file", saved, kind): go_on(folder, saved, strategy, "file.ckpt")
        for saved in FILES
        for kind, strategy in kinds.items()
    }


@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("resumed", [*ONE, *TWO])
def test_a_file_with_all_of_a_sharded_state_is_resumed_by_any_strategy(
    runs: dict[str, Any], folder: Path, saved: str, resumed: str
):
    content = torch.load(folder / saved / "file.ckpt", weights_only=True)
    assert content["state_dict"].keys() == Net().state_dict().keys()
    whole, rest = (
        runs["begun"][saved]["losses"],
        runs["resumed"]["file", saved, resumed],
    )
    if resumed in TWO:
        assert rest == whole[5:]
    else:
        assert rest == pytest.approx(whole[5:], rel=1e-6)


@pytest.mark.parametrize("saved", [*ONE, *TWO])
@pytest.mark.parametrize("resumed", [*ONE, *TWO])
def test_a_checkpoint_is_resumed_by_any_strategy(
    runs: dict[str, Any], saved: str, resumed: str
):
    whole, rest = runs["begun"][saved]["losses"], runs["resumed"][saved, resumed]
    assert len(whole) == 10
    if saved[-1] == resumed[-1]:  # the number of processes
        assert rest == whole[5:]
    else:
        assert rest == pytest.approx(whole[5:], rel=1e-6)


@pytest.mark.parametrize("kind", [*ONE, *TWO])
def test_checkpoints_hold_the_same_whatever_the_strategy(
    runs: dict[str, Any], folder: Path, kind: str
):
    same = "ddp at 2" if kind in TWO else "single at 1"
    for name, expected in (
        ("step=5", same),
        ("now", same),
        ("file", same),
        ("step=10", same),
        ("step=5", "single at 1"),
    ):
        told = load_checkpoint(str(folder / kind / f"{name}.ckpt"))
        ours, theirs = (
            _content(load_checkpoint(str(folder / k / f"{name}.ckpt")))
            for k in (kind, expected)
        )
        assert ours.keys() == theirs.keys()
        exact = kind[-1] == expected[-1]
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7
            )
        groups = told["optimizer_states"][0]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
        assert [len(group["params"]) for group in groups] == [5, 8]


def _content(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and moments, by name."""
    found = dict(checkpoint["state_dict"])
    for name, state in checkpoint["optimizer_states"][0]["state"].items():
        assert state.keys() == {"exp_avg", "exp_avg_sq", "step"}
        found |= {
            f"{name}.{key}": torch.as_tensor(value).float()
            for key, value in state.items()
        }
    return found


@pytest.mark.parametrize("kind", [*ONE, *TWO])
def test_a_checkpoint_is_loaded_into_a_plain_module(
    runs: dict[str, Any], folder: Path, kind: str
):
    plain = Net.load_from_checkpoint(folder / kind / "step=10.ckpt").state_dict()
    exported = load_file(folder / kind / "weights.safetensors")
    assert plain.keys() == exported.keys() == Net().state_dict().keys()
    for name, value in plain.items():
        assert exported[name].equal(value), name
        assert value.shape == Net().state_dict()[name].shape
    first = load_checkpoint(str(folder / "single at 1" / "step=10.ckpt"))["state_dict"]
    for name, value in plain.items():
        torch.testing.assert_close(value, first[name], rtol=1e-5, atol=1e-6)
    assert plain["count"] == 10


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_each_process_saves_its_part_only(
    runs: dict[str, Any], folder: Path, name: str
):
    path = folder / f"{name} at 2" / "step=5.ckpt"
    whole = {
        "model": 219 + (name != "deepspeed_stage_2") * (LENGTH - 1) * WIDTH,
        "optimizer": 2 * 219,
    }
    for part, numbers in whole.items():
        sizes = [
            _numbers(path / part / f"rank-{rank}.safetensors") for rank in range(2)
        ]
        assert sum(sizes) == numbers
        # FSDP gives the first process the larger part of each parameter, which matters for ones as small as these.
        assert min(sizes) > (0.35 if name == "fsdp" else 0.4) * numbers
    assert not set(_names(path / "model" / "model.safetensors")) & {
        "embed.weight",
        "head.bias",
    }


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _numbers(file: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(file).values())


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first byte": (lambda file: flip(file, 0), "was altered"),
    # In the header of a small file, and in the numbers of a larger one.
    "byte": (lambda file: flip(file, 0.7), "was altered"),
    "last byte": (lambda file: flip(file, 1), "was altered"),
    "end": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "bytes"),
    "file": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "saved", ["fsdp at 2", "deepspeed_stage_2 at 2", "deepspeed_stage_3 at 2"]
)
def test_a_damaged_part_is_noticed_and_the_checkpoint_before_used(
    runs: dict[str, Any], folder: Path, tmp_path: Path, saved: str, damage: str
):
    harm, words = DAMAGES[damage]
    shutil.copytree(folder / saved, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "now.ckpt")
    (tmp_path / "ckpt" / "file.ckpt").unlink()
    harm(tmp_path / "ckpt" / "step=10.ckpt" / "model" / "rank-1.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"step=10\.ckpt.*model/rank-1\.safetensors .*{words}"
    ):
        load_checkpoint(str(tmp_path / "ckpt" / "step=10.ckpt"))
    trainer = quiet(default_root_dir=tmp_path, max_steps=6, max_epochs=-1)
    (tmp_path / "ckpt").rename(tmp_path / "checkpoints")
    trainer.state.seed = 11
    module = Net()
    trainer.fit(
        module, DataLoader(data(SAMPLES), GLOBAL, shuffle=True), ckpt_path="last"
    )
    assert str(trainer.ckpt_path).endswith("step=5.ckpt")
    assert module.losses == pytest.approx(
        runs["begun"]["single at 1"]["losses"][5:6], rel=1e-6
    )


class Full(Callback):
    """From step 3 on, one process can write no more than 64 bytes to a file."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.engine.saver.wait()  # the checkpoint of step 2 is complete
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))


def write_in_vain(folder: Path, strategy: str, rank: int) -> dict[str, Any]:
    """What each process says when one of them cannot write its part: at once, and while the training goes on.

    And whether it says that it is not to blame.
    """
    trainer = fit(strategy, max_steps=2)[1]
    path = folder / f"{strategy} {rank}.ckpt"
    trainer.save_checkpoint(path)
    saves = ModelCheckpoint(
        folder / f"{strategy} {rank}",
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=-1,
    )
    said = {}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if trainer.global_rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, usual[1]))
        with pytest.raises(OSError) as error:  # noqa: PT011 # the message is what this returns
            trainer.save_checkpoint(path)
        said["saving"] = str(error.value), is_loss(error.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        with pytest.raises(OSError) as error:  # noqa: PT011 # as above
            fit(
                strategy,
                max_steps=5,
                callbacks=[saves, Full(rank)],
                enable_checkpointing=True,
            )
        said["training"] = str(error.value), is_loss(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    return {what: trainer.strategy.gather_objects(told) for what, told in said.items()}


FULL = [("fsdp", 1), ("deepspeed_stage_2", 0), ("deepspeed_stage_3", 1)]


def write_all_in_vain(folder: Path) -> dict[tuple[str, int], Any]:
    return {case: write_in_vain(folder, *case) for case in FULL}


@pytest.mark.parametrize(("strategy", "rank"), FULL)
def test_a_part_that_cannot_be_written_fails_the_save_in_all(
    two: dict[str, Any], folder: Path, strategy: str, rank: int
):
    told = two["full"][strategy, rank]
    full = folder / "full"
    for what, path in (
        ("saving", full / f"{strategy} {rank}.ckpt"),
        ("training", full / f"{strategy} {rank}" / "step=4.ckpt"),
    ):
        for said, _ in told[what]:
            assert str(path) in said
            assert "File too large" in said
        # So a report begins with the error of the one whose disk is full.
        assert [is_lost for _, is_lost in told[what]] == [rank == 1, rank == 0]
    assert load_checkpoint(str(full / f"{strategy} {rank}.ckpt"))["global_step"] == 2
    assert (
        load_checkpoint(str(full / f"{strategy} {rank}" / "step=2.ckpt"))["global_step"]
        == 2
    )
    assert [path.name for path in (full / f"{strategy} {rank}").iterdir()] == [
        "step=2.ckpt"
    ]


class ScalesLoss(DeepSpeedStrategy):
    """Scales the loss as with float16, which DeepSpeed has on GPUs only."""

    def _initialize(self, optimizer: Any) -> Any:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        engine = super()._initialize(optimizer)
        engine.optimizer.loss_scaler = DynamicLossScaler(
            8.0, 3, 1.0, delayed_shift=2, consecutive_hysteresis=False
        )
        return engine


def test_a_dynamic_loss_scale_goes_on(tmp_path: Path):
    """It doubles after three more steps, and those before the checkpoint count."""
    scales: list[list[float]] = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            scales[-1].append(trainer.strategy._zero.loss_scaler.cur_scale)

    path = tmp_path / "step=5.ckpt"
    with alone():
        for steps, ckpt_path in ((10, None), (5, None), (10, path)):
            scales.append([])
            _, trainer = fit(
                ScalesLoss(2), max_steps=steps, ckpt_path=ckpt_path, callbacks=[Notes()]
            )
            if steps == 5:
                trainer.save_checkpoint(path)
        fit("single", max_steps=6, ckpt_path=path)  # which has no use for it
    whole, before, after = scales
    assert len(set(whole)) > 2
    assert before + after == whole


# -- evaluation -------------------------------------------------------------------------------------------------------


class Judged(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.auroc = (
            MeanMetric(),
            nn.ModuleList(BinaryAUROC() for _ in range(2)),
        )
        self.accuracy = nn.ModuleList(
            MulticlassAccuracy(VOCABULARY, average="micro") for _ in range(2)
        )

    def judge(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert batch_idx >= 0, "a rank that has had no batch runs one as its first"
        logits, targets = self(batch[0][:, :-1])[:, -1], batch[0][:, -1]
        self.log("loss", self.loss(batch[0]), batch_size=len(targets), sync_dist=True)
        self.log("lowest", logits.min(), reduce_fx="min")
        self.log("samples", float(len(targets)), reduce_fx="sum", sync_dist=True)
        self.mean.update(logits)
        self.auroc[dataloader_idx].update(logits[:, 0].sigmoid(), (targets == 0).long())  # type: ignore[operator] # a Metric
        self.accuracy[dataloader_idx].update(logits, targets)  # type: ignore[operator] # as above
        self.log("auroc", self.auroc[dataloader_idx])
        self.log("accuracy", self.accuracy[dataloader_idx])

    validation_step = test_step = judge

    def on_test_epoch_end(self) -> None:
        self.log("mean", self.mean)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"logits": self(batch[0][:, :-1]), "tokens": batch[0]}


class Stream(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        numbers = data(self.samples)
        yield from (numbers[i] for i in range(self.samples))


def evaluated(strategy: str) -> dict[str, Any]:
    """Of 7 batches and of one; of a fresh module, one in training, and a trained one."""
    loaders = [DataLoader(data(50), 8), DataLoader(data(5), 8)]
    stream = DataLoader(Stream(37), 8)
    fresh, trainer = Judged(), quiet(strategy=strategy)
    found: dict[str, Any] = {
        "fresh": trainer.test(fresh, loaders, verbose=False),
        "fresh stream": trainer.test(fresh, stream, verbose=False),
        "fresh predictions": trainer.predict(
            fresh, loaders[0], return_predictions="all"
        ),
    }
    module, trainer = Judged(), quiet(strategy=strategy, max_epochs=2)
    trainer.state.seed = 11
    trainer.fit(
        module,
        DataLoader(data(96), GLOBAL // trainer.world_size, shuffle=True),
        loaders,
    )
    found["validation"] = [
        {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    ]
    found["test"] = trainer.test(module, loaders, verbose=False)
    found["stream"] = trainer.test(module, stream, verbose=False)
    found["again"] = trainer.validate(module, loaders, verbose=False)
    found["predictions"] = trainer.predict(module, loaders, return_predictions="all")
    own = trainer.predict(module, loaders[0])
    assert own is not None
    found["own"] = trainer.strategy.gather_objects(
        [batch["tokens"].tolist() for batch in own]
    )
    told = trainer.strategy.gather_objects(repr(found["test"]))
    assert len(set(told)) == 1, "all processes know the same"
    return found


EVALUATED = ["fsdp", "deepspeed_stage_2", "deepspeed_stage_3"]


def all_evaluated() -> dict[str, Any]:
    return {name: evaluated(name) for name in EVALUATED}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return evaluated("single")


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_that_of_one_process(
    two: dict[str, Any], single: dict[str, Any], name: str
):
    told = two["evaluated"][name]
    assert single["fresh"][0]["samples/dataloader_idx_0"] == 50
    assert single["stream"][0]["samples"] == 37
    for what in ("fresh", "fresh stream", "validation", "test", "stream", "again"):
        assert len(told[what]) == len(single[what])
        for ours, theirs in zip(told[what], single[what], strict=True):
            assert ours == pytest.approx(
                theirs, rel=1e-6 if "fresh" in what else 1e-5
            ), what
    assert single["validation"][0].items() >= single["again"][0].items()
    assert told["validation"][0].items() >= told["again"][0].items()


@pytest.mark.parametrize("name", EVALUATED)
def test_predictions_come_in_order(
    two: dict[str, Any], single: dict[str, Any], name: str
):
    told = two["evaluated"][name]
    assert told["own"] == [single["own"][0][rank::2] for rank in range(2)]
    pairs = [(told["fresh predictions"], single["fresh predictions"])]
    pairs += zip(told["predictions"], single["predictions"], strict=True)
    for ours, theirs in pairs:
        assert len(ours) == len(theirs) in (7, 1)
        for batch, expected in zip(ours, theirs, strict=True):
            assert batch["tokens"].equal(expected["tokens"])
            torch.testing.assert_close(
                batch["logits"], expected["logits"], rtol=1e-5, atol=1e-5
            )


def test_stage_3_replaces_the_linear_layer_for_its_own_module_only():
    """What else is trained in the process would otherwise go through DeepSpeed's, which takes longer."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    found = []

    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found.append(nn.functional.linear)
            return super().training_step(batch, batch_idx)

    class Between(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            found.append(nn.functional.linear)

    usual = nn.functional.linear
    with alone():
        fit("deepspeed_stage_3", Looks(), max_steps=2, callbacks=[Between()])
    assert found == [zero3_linear_wrap, usual] * 2
    assert nn.functional.linear is usual is not zero3_linear_wrap


# -- activation checkpointing -----------------------------------------------------------------------------------------

POLICIES: dict[str, Any] = {
    "class": Block,
    "function": lambda part: isinstance(part, Block),
}
KINDS: dict[str, Callable[..., Strategy]] = {
    "single": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "deepspeed_stage_2": DeepSpeedStrategy,
    "deepspeed_stage_3": lambda **options: DeepSpeedStrategy(3, **options),
}


def recomputed(kind: str) -> dict[str, tuple[list[float], int]]:
    """By policy: the losses of six steps, and how often the chosen parts were called."""
    found = {}
    for policy in (None, *POLICIES):
        chosen = (
            {} if policy is None else {"activation_checkpointing": POLICIES[policy]}
        )
        module, trainer = fit(KINDS[kind](**chosen), max_steps=6)
        blocks: Any = module.blocks
        found[str(policy)] = (
            losses(module, trainer),
            sum(block.calls for block in blocks),
        )
    with pytest.raises(
        ValueError,
        match=r"activation_checkpointing=.*Conv2d.* chooses no submodule of Net",
    ):
        fit(KINDS[kind](activation_checkpointing=nn.Conv2d), max_steps=1)
    return found


def all_recomputed() -> dict[str, Any]:
    return {kind: recomputed(kind) for kind in KINDS if kind != "single"}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_computed_twice_and_losses_are_the_same(
    two: dict[str, Any], kind: str
):
    told = recomputed(kind) if kind == "single" else two["recomputed"][kind]
    usual, calls = told["None"]
    assert calls == 6 * 2
    for policy in POLICIES:
        assert told[policy] == (usual, 2 * calls)


# -- what is refused --------------------------------------------------------------------------------------------------


class Several(Net):
    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(part.parameters(), lr=0.1)
            for part in (self.norm, self.blocks)
        ]


# By name: the module, the strategy, the Trainer's arguments, the error, and words of it.
REFUSED: dict[str, tuple[type[Net], str, dict[str, Any], list[str]]] = {
    "double": (
        Net,
        "deepspeed_stage_2",
        {"precision": "64-true"},
        ["64-true", "deepspeed_stage_2", "32-true"],
    ),
    "half": (
        Net,
        "deepspeed_stage_3",
        {"precision": "16-mixed"},
        ["16-mixed", "CPU", "bf16-mixed"],
    ),
    "true half": (
        Net,
        "deepspeed_stage_1",
        {"precision": "16-true"},
        ["16-true", "CPU", "bf16-mixed"],
    ),
    "value": (
        Net,
        "deepspeed_stage_2",
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        ["deepspeed_stage_2", "gradient_clip_algorithm", "norm", "value"],
    ),
    "several": (
        Several,
        "deepspeed_stage_2",
        {},
        ["deepspeed_stage_2", "one optimizer", "SGD and SGD"],
    ),
}


def refuse(name: str) -> list[tuple[str, int]]:
    """What each process says, and how many steps it has run by then."""
    kind, strategy, options, _ = REFUSED[name]
    module = kind()
    with pytest.raises(ValueError) as error:  # noqa: PT011 # the message is what this returns
        fit(strategy, module, max_steps=2, **options)
    return _gathered((str(error.value), len(module.losses)))


def _gathered(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def refuse_all() -> dict[str, list[tuple[str, int]]]:
    return {name: refuse(name) for name in REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_training(two: dict[str, Any], name: str):
    for said, steps in two["refused"][name]:
        for word in REFUSED[name][-1]:
            assert word in said
        assert steps == 0


def end_early(strategy: str) -> list[tuple[int, list[float]]]:
    """Windows of two batches, of which the last one of each epoch of a stream holds one."""
    module, trainer = (
        Net(),
        quiet(strategy=strategy, accumulate_grad_batches=2, max_epochs=2),
    )
    trainer.fit(module, DataLoader(Stream(16 * 3), 8))
    return _gathered((trainer.global_step, module.losses))


def all_end_early() -> dict[str, list[tuple[int, list[float]]]]:
    return {name: end_early(name) for name in ("ddp", *SHARDED)}


@pytest.mark.parametrize("name", SHARDED)
def test_a_window_ends_where_a_stream_does(two: dict[str, Any], name: str):
    for (steps, losses), (_, expected) in zip(
        two["early"][name], two["early"]["ddp"], strict=True
    ):
        assert steps == 4
        assert len(losses) == 6
        assert losses == pytest.approx(expected, rel=1e-5)


# -- DeepSpeed's configuration ----------------------------------------------------------------------------------------

# By key: another value than that of the run, and its own.
CONFIGURED: dict[str, tuple[Any, Any]] = {
    "train_micro_batch_size_per_gpu": (4, 8),
    "gradient_accumulation_steps": (3, 2),
    "train_batch_size": (16, 32),
    "gradient_clipping": (0.7, 0.3),
    "bf16.enabled": (True, False),
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    config: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[name] = value
    return config


def configure(folder: Path) -> dict[str, Any]:
    """What is said of a dict and of a file with each wrong value, and the losses with right ones."""
    told: dict[str, Any] = {}
    for key, (wrong, _) in CONFIGURED.items():
        (folder / f"{key}.json").write_text(json.dumps(nested({key: wrong})))
        for config in (
            nested({key: wrong}),
            folder / f"{key}.json",
            str(folder / f"{key}.json"),
        ):
            with pytest.raises(ValueError) as error:  # noqa: PT011 # the message is what this returns
                fit(DeepSpeedStrategy(config=config), max_steps=2, **CLIPPED)
            told.setdefault(key, []).extend(_gathered(str(error.value)))
    own = {key: right for key, (_, right) in CONFIGURED.items()}
    for name, values in (("equal", own), ("auto", dict.fromkeys(own, "auto"))):
        config = {**nested(values), "zero_optimization": {"overlap_comm": False}}
        given = json.dumps(config)
        told[name] = losses(
            *fit(DeepSpeedStrategy(config=config), max_steps=5, **CLIPPED)
        )
        assert json.dumps(config) == given, "it stays the user's"
    return told


@pytest.mark.parametrize("key", CONFIGURED)
def test_a_configuration_that_contradicts_the_trainer_is_refused(
    two: dict[str, Any], key: str
):
    assert len(two["configured"][key]) == 3 * 2
    for said in two["configured"][key]:
        for word in (key, *map(repr, CONFIGURED[key])):
            assert word in said


@pytest.mark.parametrize("name", ["equal", "auto"])
def test_a_configuration_that_says_the_same_is_taken(two: dict[str, Any], name: str):
    assert two["configured"][name] == two["losses"]["deepspeed_stage_2 clipped"][:10]


@pytest.mark.parametrize("as_file", [False, True])
def test_a_stage_is_said_once_or_twice_alike(tmp_path: Path, as_file: bool):
    def strategy(stage: int | None, said: Any) -> DeepSpeedStrategy:
        config: Any = {"zero_optimization": {} if said is None else {"stage": said}}
        if as_file:
            (tmp_path / "config.json").write_text(json.dumps(config))
            config = tmp_path / "config.json"
        return DeepSpeedStrategy(stage, config=config)

    with pytest.raises(ValueError, match=r"zero_optimization\.stage=3.*stage=2"):
        strategy(2, 3)
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3; got 0"):
        strategy(None, 0)
    assert strategy(3, 3).stage == 3
    assert strategy(None, 1).name == "deepspeed_stage_1"
    assert strategy(None, None).stage == 2
    assert strategy(3, "auto").stage == 3
    assert strategy(None, "auto").stage == 2


@pytest.mark.parametrize(
    ("section", "words"),
    [("optimizer", "configure_optimizers"), ("scheduler", "configure_opt")],
)
def test_sections_that_belong_elsewhere_are_refused(
    tmp_path: Path, section: str, words: str
):
    config = {section: {"type": "Adam"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in (config, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=rf"'{section}'.*{words}"):
            DeepSpeedStrategy(config=given)
    with pytest.raises(
        TypeError, match="config must be a dict, or the path of a JSON file; got 3"
    ):
        DeepSpeedStrategy(config=3)  # type: ignore[arg-type] # on purpose
    with pytest.raises(
        ValueError, match="offload_parameters=True needs stage=3; got stage=2"
    ):
        DeepSpeedStrategy(2, offload_parameters=True)


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "deepspeed" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from loopwright.strategies import create_strategy
from tests.strategies.test_sharded import fit
try:
    create_strategy("deepspeed_stage_2")
except ImportError as error:
    print(error)
print(len(fit("single", max_steps=2)[0].losses))
"""


def test_without_deepspeed_all_else_works():
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (root, os.environ.get("PYTHONPATH")))
        ),
    }
    done = run_program("-c", WITHOUT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pip install loopwright[deepspeed]" in done.stdout
    assert done.stdout.split()[-1] == "2"
    assert create_strategy("deepspeed_stage_2").name == "deepspeed_stage_2"


# -- one start of processes for all -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("full", "config"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def begun(folder: Path) -> dict[str, Any]:
    """What one process saves."""
    with alone():
        return begin_all(folder, ONE)


@pytest.fixture(scope="module")
def two(folder: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """What two processes come to, which are started once."""
    return all_in_processes(
        2,
        {
            "frozen": (gc.freeze,),  # as above
            "losses": (all_losses,),
            "halves": (in_half_precision,),
            "overflow": (overflow,),
            "weighted": (weighted,),
            "begun": (begin_all, folder, TWO),
            "resumed": (go_on_all, folder, TWO),
            "evaluated": (all_evaluated,),
            "recomputed": (all_recomputed,),
            "refused": (refuse_all,),
            "early": (all_end_early,),
            "configured": (configure, folder / "config"),
            "full": (write_all_in_vain, folder / "full"),
        },
    )


@pytest.fixture(scope="module")
def runs(folder: Path, begun: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """All that was saved, and resumed from there."""
    with alone():
        resumed = go_on_all(folder, ONE)
    return {
        "begun": {**begun, **two["begun"]},
        "resumed": {**resumed, **two["resumed"]},
    }
