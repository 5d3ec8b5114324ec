"""Checkpoints in one file: what torch opens, what comes back, damage, and users' hooks that read or change them."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter, OrderedDict, defaultdict
from copy import deepcopy
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import Callback, ModelCheckpoint
from loopwright.framework import CheckpointError, Module, Trainer
from loopwright.framework.checkpoint import writer as writer_module
from loopwright.framework.checkpoint.manifest import read_manifest
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.framework.checkpoint.single_file import FileSnapshot
from loopwright.framework.checkpoint.writer import commit_file
from loopwright.framework.export import main as export
from tests.framework.models import Evaluated, data, loader, quiet, weights
from tests.programs import run_program


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Mode(str, Enum):
    """A hyperparameter of a few names."""

    FAST = "fast"


SCALE = np.float32(2.0)


class Net(Evaluated):
    """Dropout, two parameter groups of AdamW, a schedule, and hyperparameters that are no plain values."""

    def __init__(
        self,
        mode: Mode = Mode.FAST,
        root: Path = Path("data"),
        scale: Any = SCALE,
        width: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Sequential(
            nn.Linear(2, width), nn.Dropout(0.3), nn.Linear(width, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.layer[0].parameters(), "lr": 0.02},
            {"params": self.layer[2].parameters()},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def shuffled() -> DataLoader[Any]:
    return DataLoader(data(8), batch_size=2, shuffle=True)


def keeping(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_format="file", **options)


def filled(*callbacks: Any, module: Module | None = None, **options: Any) -> Trainer:
    """A Trainer that has fitted."""
    trainer = quiet(*callbacks, **options)
    torch.manual_seed(0)
    trainer.fit(module or Net(), shuffled(), loader(2))
    return trainer


# -- what is in it ----------------------------------------------------------------------------------------------------

READ = """
import collections, sys, torch
from torch import nn
for path in sys.argv[1:]:
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] == 1 and checkpoint["global_step"] == 8, checkpoint
    assert checkpoint["hyper_parameters"] == {
        "mode": "fast", "root": "data", "scale": 2.0, "width": 4
    }, checkpoint["hyper_parameters"]
    [state] = checkpoint["optimizer_states"]
    assert [*state["state"]] == [0, 1, 2, 3]
    module = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 1))
    module.load_state_dict(
        {name.removeprefix("layer."): tensor for name, tensor in checkpoint["state_dict"].items()}
    )
    groups = [{"params": module[0].parameters()}, {"params": module[2].parameters()}]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(state)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    assert abs(optimizer.param_groups[0]["lr"] - 0.02 * 0.9**2) < 1e-9
    assert any(key.startswith("ModelCheckpoint") for key in checkpoint["callbacks"])
assert not [name for name in sys.modules if name.startswith("loopwright")]
"""


def test_torch_opens_it_without_this_program() -> None:
    """Weights, optimizers, schedulers and hyperparameters, by torch's own means; by the names last and best, too."""
    callback = keeping("kept", monitor="val_loss", save_top_k=-1, save_last=True)
    filled(callback, max_epochs=2)
    [newest] = Path("kept").glob("epoch=1-*.ckpt")
    done = run_program("-I", "-c", READ, newest, callback.last_model_path)
    assert done.returncode == 0, done.stderr
    best = torch.load("kept/best.ckpt", weights_only=True)
    assert best["epoch"] == torch.load(callback.best_model_path)["epoch"]
    # The folder can be moved with its pointers.
    os.rename("kept", "moved")
    assert torch.load("moved/last.ckpt", weights_only=True)["epoch"] == 1
    assert Net.load_from_checkpoint("moved/last.ckpt").hparams.mode is Mode.FAST
    assert export(["moved/best.ckpt", "model.safetensors"]) == 0


def test_values_come_back_with_their_types(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain or not; what torch does not open with weights_only=True is a plain value there, or a pickle."""
    values = [
        None, True, 1.5, "ünï\n", [], {}, (), [1, [2, (3,)]], {1: "int", "1": "str"}, {(1, 2): 3}, {None: 1, True: 2},
        {"$tensor": "not one"}, {"$": {"$items": [torch.ones(1)]}}, {1: torch.zeros(2)}, Counter({"a": 2}),
        OrderedDict([("b", 1), ("a", (torch.ones(1),))]), {1, 2}, frozenset("ab"), torch.Size([2, 3]), torch.float16,
        torch.device("cpu"), timedelta(seconds=90, microseconds=1), float("inf"), 10**30, Path("a/b"), b"bytes",
        np.float32(0.5), {"a": [np.arange(3)]}, complex(1, 2), Mode.FAST, [{"m": Mode.FAST}], {Mode.FAST: Path("x")},
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, torch.ones(2, dtype=torch.complex128), {Path("p"): 1},
        defaultdict(list, {"a": [1]}),
    ]  # fmt: skip
    rng = [{"python": (3, (1, 2)), "torch": torch.arange(3, dtype=torch.uint8)}]
    snapshot = FileSnapshot({"mine": values, "state_dict": {}}, {}, rng, copy=True)
    commit_file(snapshot.write, "a.ckpt")
    loaded = load_checkpoint("a.ckpt", weights_only=False)
    for value, back in zip(values, loaded["mine"], strict=True):
        assert repr(back) == repr(value if type(value) is not np.float32 else 0.5)
        assert type(back) is type(value) or type(value) is np.float32
    assert repr(loaded["rng"]) == repr(rng)
    assert "kept in the file as a pickle" in capsys.readouterr().out
    closed = load_checkpoint("a.ckpt")["mine"]
    assert closed[values.index(Path("a/b"))] == Path("a/b")
    assert closed[values.index(Mode.FAST)] == "fast"
    with pytest.raises(CheckpointError, match=r"mine\.25.*weights_only=False"):
        closed[values.index(b"bytes")].decode()
    plain = torch.load("a.ckpt", weights_only=True)["mine"]
    assert plain[values.index(Path("a/b"))] == "a/b"
    assert plain[values.index(timedelta(seconds=90, microseconds=1))] == 90.000001


def test_tensors_are_written_once_and_alone() -> None:
    """Tied weights once, a part of a large tensor without the rest; while it is written, training may go on."""
    large, tied = torch.arange(100_000.0), torch.arange(1000.0)
    state = {"part": large[:10], "a": tied, "b": tied}
    for copy in (True, False):
        snapshot = FileSnapshot({"state_dict": state}, {}, None, copy)
        if copy:
            tied += 1
        commit_file(snapshot.write, "a.ckpt")
        assert os.path.getsize("a.ckpt") < 10_000
        back = torch.load("a.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(back["part"], large[:10])
        assert torch.equal(back["b"], torch.arange(1000.0) + (not copy))
        assert back["a"].data_ptr() == back["b"].data_ptr()


class Image(Tensor):
    """A kind of tensor of another library."""


@pytest.mark.parametrize("copy", [True, False])
def test_each_kind_of_tensor_comes_back(copy: bool) -> None:
    """Bit by bit: all types, turned and empty ones, views that negate or conjugate, and subclasses as plain tensors."""
    types = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    made = {
        str(d): torch.arange(6 * d.itemsize, dtype=torch.uint8).view(d).view(2, 3).mT
        for d in types
        if not str(d).startswith("torch.q")
    }
    made |= {
        "torch.bool": torch.eye(2) > 0,
        "empty": torch.empty(0, 2),
        "conj": torch.tensor([[1, 2j]]).mH,
        "neg": torch.tensor([2j]).conj().imag,
        "image": torch.ones(2, 2).as_subclass(Image),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    snapshot = FileSnapshot({"state_dict": made, "more": made}, {}, None, copy)
    commit_file(snapshot.write, "a.ckpt")
    loaded = load_checkpoint("a.ckpt")
    for back in (loaded["state_dict"], loaded["more"]):
        for name, tensor in made.items():
            assert type(back[name]) is Tensor
            assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(back[name]) == bits(tensor.detach()), name


def bits(tensor: Tensor) -> list[int]:
    tensor = tensor.resolve_conj().resolve_neg().unsqueeze(-1)
    return tensor.view(torch.uint8).flatten().tolist()


# -- going on with it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int) -> None:
    """Bit by bit, from inside an epoch and from its end, saved beside the training."""
    whole = filled(max_epochs=3)
    torch.manual_seed(0)
    callback = keeping("kept", every_n_train_steps=1, save_top_k=-1)
    first = quiet(callback, max_epochs=3, max_steps=stop)
    first.fit(Net(), shuffled(), loader(2))
    module = Net()
    trainer = quiet(max_epochs=3)
    torch.manual_seed(99)
    trainer.fit(module, shuffled(), loader(2), ckpt_path=callback.best_model_path)
    assert trainer.global_step == 12
    assert all(map(torch.equal, weights(module), weights(whole.module)))
    assert trainer.callback_metrics == whole.callback_metrics


def test_it_may_be_changed_by_torch_and_goes_on() -> None:
    """As people do who strip or average what is in it; a resumed run then takes what they have put there."""
    trainer = filled()
    trainer.save_checkpoint("a.ckpt", save_format="file")
    checkpoint = torch.load("a.ckpt", weights_only=True)
    for tensor in checkpoint["state_dict"].values():
        tensor.zero_()
    torch.save(checkpoint, "b.ckpt")
    assert not any(w.any() for w in weights(Net.load_from_checkpoint("b.ckpt")))
    again = quiet(max_epochs=2)
    again.fit(Net(), shuffled(), loader(2), ckpt_path="b.ckpt")
    assert again.global_step == 8


def test_best_and_last_and_what_is_kept() -> None:
    """As with folders: two of the best stay; another program finds the newest and the best."""
    callback = keeping("kept", monitor="train_loss", save_top_k=2, save_last=True)
    trainer = filled(callback, max_epochs=4)
    kept = {str(path) for path in Path("kept").resolve().glob("epoch=*.ckpt")}
    assert {*callback.best_k_models} <= kept
    assert len(kept) <= 3
    assert trainer.test(ckpt_path="best", dataloaders=loader(2), verbose=False)
    other = quiet(keeping("kept", monitor="train_loss"), max_epochs=5)
    other.test(Net(), loader(2), ckpt_path="best", verbose=False)
    assert other.ckpt_path == callback.best_model_path
    other.fit(Net(), shuffled(), loader(2), ckpt_path="last")
    assert other.global_step == 20
    assert str(other.ckpt_path).endswith("epoch=3-step=16.ckpt")


def test_the_trainer_says_the_format() -> None:
    """A subclass of the Trainer, for itself and for callbacks that say nothing; callbacks have the last word."""

    class OneFile(Trainer):
        save_format = "file"

    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    folder = ModelCheckpoint("folders", every_n_train_steps=4, save_format="folder")
    trainer = OneFile(
        max_epochs=1, callbacks=[ModelCheckpoint("files"), folder], **options
    )
    trainer.fit(Net(), shuffled(), loader(2))
    assert Path("files/epoch=0-step=4.ckpt").is_file()
    assert Path("folders/epoch=0-step=4.ckpt").is_dir()
    trainer.save_checkpoint("a.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load("a.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r'save_format must be "folder" or "file"'):
        trainer.save_checkpoint("a.ckpt", save_format="zip")  # type: ignore[arg-type] # which is the point
    with pytest.raises(ValueError, match="save_format"):
        ModelCheckpoint(save_format="zip")  # type: ignore[arg-type] # which is the point


def test_at_a_store() -> None:
    """Saved, found, tested and resumed; a failed upload leaves what was there."""
    url = "memory://runs/one"
    callback = keeping(url, save_last=True, every_n_train_steps=2, save_top_k=-1)
    filled(callback)
    trainer = quiet(keeping(url), max_epochs=2)
    trainer.fit(Net(), shuffled(), loader(2), ckpt_path="last")
    assert trainer.global_step == 8
    assert str(trainer.ckpt_path) == f"{url}/epoch=0-step=4.ckpt"
    opened: Any = fsspec.open(f"{url}/epoch=0-step=2.ckpt")
    with opened as file:
        assert torch.load(file, weights_only=True)["global_step"] == 2
    assert Net.load_from_checkpoint(f"{url}/last.ckpt").hparams.width == 4
    fsspec.filesystem("memory").rm("runs", recursive=True)


def test_more_logged_values_than_the_end_of_a_file_has_room_for() -> None:
    """They are in the file all the same."""
    metrics = {f"a_value_with_a_long_name_{i}": i / 7 for i in range(2000)}
    facts = {"created": 1.0, "metrics": metrics, "epoch": 3}
    commit_file(FileSnapshot({"state_dict": {}}, facts, None, False).write, "a.ckpt")
    assert read_manifest("a.ckpt")["epoch"] == 3
    assert load_checkpoint("a.ckpt")["manifest"]["metrics"] == metrics


# -- damage and failures ----------------------------------------------------------------------------------------------


def test_each_flipped_byte_is_noticed() -> None:
    """Wherever it is: in tensors, between them, in the archive's directory, and in the manifest at the end."""
    filled(keeping("kept"))
    [path] = Path("kept").glob("*.ckpt")
    content = path.read_bytes()
    for position in [*range(0, len(content), 211), *range(-2000, 0, 97), -22, -1]:
        flipped = bytearray(content)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=str(path)):
            load_checkpoint(str(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cut off"):
        load_checkpoint(str(path))
    path.write_bytes(content)
    assert load_checkpoint(str(path))


@pytest.mark.parametrize("damage", ["weights", "beginning", "end", "truncated"])
def test_the_one_before_is_used(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(keeping("kept", every_n_train_steps=2, save_top_k=-1))
    newest = Path("kept/epoch=0-step=4.ckpt")
    content = bytearray(newest.read_bytes())
    weight = load_checkpoint(str(newest))["state_dict"]["layer.0.weight"]
    place = {
        "weights": content.find(weight.numpy().tobytes()),
        "beginning": 0,
        "end": len(content) - 30,
        "truncated": 0,
    }[damage]
    content[place] ^= damage != "truncated"
    newest.write_bytes(content[:-999] if damage == "truncated" else content)
    trainer = quiet(keeping("kept", every_n_epochs=0), max_steps=3)
    trainer.fit(Net(), shuffled(), loader(2), ckpt_path="last")
    assert str(trainer.ckpt_path).endswith("epoch=0-step=2.ckpt")
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    named = [message for message in told if newest.name in message]
    assert named
    if damage == "weights":
        assert "/data/" in named[0]


def test_it_appears_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails leaves the one before, and one that was killed a name that the next save clears up."""
    trainer = filled()
    trainer.save_checkpoint("a.ckpt", save_format="file")
    before = Path("a.ckpt").read_bytes()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.left = 3000

        def write(self, chunk: Any) -> None:
            self.left -= len(chunk)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            self.file.write(chunk)

    save = FileSnapshot.write
    with monkeypatch.context() as patched:
        patched.setattr(FileSnapshot, "write", lambda s, f: save(s, Full(f)))
        with pytest.raises(OSError, match=r"a\.ckpt.*No space left"):
            trainer.save_checkpoint("a.ckpt", save_format="file")
    assert Path("a.ckpt").read_bytes() == before
    assert os.listdir() == ["a.ckpt"]
    with monkeypatch.context() as patched:
        # As a process that is killed, which a signal ends in no order.
        patched.setattr(writer_module.os, "replace", lambda *_: os._exit(3))
        if (child := os.fork()) == 0:
            trainer.save_checkpoint("a.ckpt", save_format="file")
            os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert len(os.listdir()) == 2
    trainer.save_checkpoint("a.ckpt", save_format="file")
    assert os.listdir() == ["a.ckpt"]


def test_what_is_replaced_and_what_is_not() -> None:
    """Checkpoints of either format, a file of torch's, and an empty one, whose name is reserved; nothing else."""
    trainer = filled()
    torch.save({"a": torch.ones(1)}, "a.ckpt")
    for save_format in ("file", "folder", "file", "file", "folder"):
        trainer.save_checkpoint("a.ckpt", save_format=save_format)
        assert load_checkpoint("a.ckpt")["global_step"] == 4
        assert Path("a.ckpt").is_dir() == (save_format == "folder")
    Path("empty").touch()
    trainer.save_checkpoint("empty", save_format="file")
    Path("notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"notes\.txt.*no checkpoint"):
        trainer.save_checkpoint("notes.txt", save_format="file")
    Path("a.ckpt/notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"a\.ckpt.*other files"):
        trainer.save_checkpoint("a.ckpt", save_format="file")
    torch.save({"a": torch.ones(1)}, "b.ckpt")
    with pytest.raises(OSError, match=r"b\.ckpt.*no checkpoint"):
        trainer.save_checkpoint("b.ckpt", save_format="folder")
    assert sorted(os.listdir()) == ["a.ckpt", "b.ckpt", "empty", "notes.txt"]


# -- hooks of users' --------------------------------------------------------------------------------------------------


class AveragedWeights(Callback):
    """Keeps averaged weights beside the model, and lets checkpoints hold these as the weights that others load."""

    def __init__(self, decay: float = 0.5) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.found: Any = None

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in module.state_dict().items():
            old = self.average.setdefault(name, value.detach().clone())
            old.mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v.clone() for k, v in self.average.items()}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        # Weights are applied already; those of the run itself are put back.
        self.average = {k: v.clone() for k, v in checkpoint["state_dict"].items()}
        module.load_state_dict(checkpoint["current_model_state"])
        self.found = checkpoint["callbacks"]


class WithoutFrozenPart(Callback):
    """Leaves the weights of a frozen part out of checkpoints."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        for name in [*checkpoint["state_dict"]]:
            if name.startswith("layer.0."):
                del checkpoint["state_dict"][name]


class ResetsMoments(Callback):
    """Reads optimizers as torch has them, lowers their rates, and forgets the first moments."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        [state] = checkpoint["optimizer_states"]
        flat = [p for group in state["param_groups"] for p in group["params"]]
        assert flat == [0, 1, 2, 3]
        self.steps = [float(state["state"][p]["step"]) for p in flat]
        for group in state["param_groups"]:
            group["lr"] = 1e-3
        for p in flat:
            state["state"][p]["exp_avg"].zero_()
        checkpoint["lr_schedulers"] = deepcopy(checkpoint["lr_schedulers"])


class WithHooks(Net):
    """Has hooks of its own."""

    vocabulary: Any = None
    moments: Any = None

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["vocabulary"] = {"a": 1, "b": torch.arange(2)}
        [state] = checkpoint.get("optimizer_states", [{"state": {}}])
        checkpoint["moments"] = {
            p: s["exp_avg"].sum() for p, s in state["state"].items()
        }

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.vocabulary = checkpoint["vocabulary"]
        self.moments = checkpoint["moments"]
        [state] = checkpoint["optimizer_states"]
        assert state["state"].keys() == self.moments.keys()


@pytest.mark.parametrize("save_format", ["file", "folder"])
def test_hooks_that_read_and_change_the_checkpoint(save_format: Any) -> None:
    """Written for Lightning, in the style of public repositories, they do here what they do there."""
    ema = AveragedWeights()
    callback = ModelCheckpoint("kept", save_format=save_format)
    first = filled(ema, callback, module=WithHooks())
    path = callback.best_model_path
    loaded = WithHooks.load_from_checkpoint(path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ema.average[name])
    assert loaded.vocabulary["b"].tolist() == [0, 1]
    assert [*loaded.moments] == [0, 1, 2, 3]

    again, resets = AveragedWeights(), ResetsMoments()
    trainer = quiet(again, resets, ModelCheckpoint("kept"), max_steps=4, max_epochs=-1)
    trainer.fit(module := WithHooks(), shuffled(), loader(2), ckpt_path=path)
    assert all(map(torch.equal, weights(module), weights(first.module)))
    assert resets.steps == [4.0] * 4
    assert callback.state_key in again.found
    optimizer = trainer.optimizers[0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert not any(s["exp_avg"].any() for s in optimizer.state.values())


@pytest.mark.parametrize("save_format", ["file", "folder"])
def test_a_hook_that_leaves_weights_out(save_format: Any) -> None:
    """The rest is loaded, by a module that says so."""
    trainer = filled(WithoutFrozenPart())
    trainer.save_checkpoint("a.ckpt", save_format=save_format)
    saved = load_checkpoint("a.ckpt")["state_dict"]
    assert saved.keys() == {"layer.2.weight", "layer.2.bias"}
    module = Net.load_from_checkpoint("a.ckpt", strict=False)
    assert torch.equal(weights(module)[2], weights(trainer.module)[2])
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight"):
        Net.load_from_checkpoint("a.ckpt")
    shutil.rmtree("a.ckpt", ignore_errors=True)
