"""Checkpoints on disk: tensors and JSON, complete or not there, and any damage is noticed and named."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import zlib
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loopwright.framework import CheckpointError, Engine, Module
from loopwright.framework.checkpoint import writer as module_under_test
from loopwright.framework.checkpoint.configs import AttributeDict
from loopwright.framework.checkpoint.find import find_checkpoints, resolve
from loopwright.framework.checkpoint.manifest import (
    is_complete,
    read_manifest,
    seal_manifest,
)
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.framework.checkpoint.serialization import decode, encode
from loopwright.framework.checkpoint.writer import (
    Snapshot,
    commit,
    remove_checkpoint,
    save_checkpoint,
    write_pointer,
)
from tests.framework.models import (
    Evaluated,
    Linear,
    ended,
    in_a_child,
    loader,
    quiet,
    weights,
)

FACTS = {"created": 1.0, "global_step": 3}


class Adam(Evaluated):
    """A module whose optimizer has a state."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def saved(
    path: str | Path = "a.ckpt",
    module: Module | None = None,
    weights_only: bool = False,
) -> str:
    """A checkpoint of a short run."""
    trainer = quiet()
    trainer.fit(module or Adam(), loader())
    trainer.save_checkpoint(path, weights_only=weights_only)
    return str(path)


def files(path: str | Path) -> set[str]:
    return {
        str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()
    }


ALL = {
    "manifest.json", "model/model.safetensors", "optimizer/optimizer.safetensors", "rng/rank-0.json",
    "rng/rank-0.safetensors", "state.json", "state.safetensors",
}  # fmt: skip

# -- what is on disk ------------------------------------------------------------------------------------------------


def test_layout() -> None:
    """The documented files; with weights_only, those that hold weights and hyperparameters."""
    assert files(saved("whole.ckpt")) == ALL
    only = saved("weights.ckpt", weights_only=True)
    assert files(only) == {
        "manifest.json",
        "model/model.safetensors",
        "state.json",
        "state.safetensors",
    }
    assert is_complete(only)
    assert list(Path.cwd().iterdir()) != []
    assert not [
        path for path in Path.cwd().iterdir() if path.name.startswith(".")
    ]  # no temporary left


def test_safetensors_reads_the_files() -> None:
    """Weights under their own names, optimizer states by parameter name."""
    module = Adam()
    path = saved(module=module)
    model = load_file(f"{path}/model/model.safetensors")
    assert model.keys() == {"layer.weight", "layer.bias"}
    assert torch.equal(model["layer.weight"], module.layer.weight)
    optimizer = load_file(f"{path}/optimizer/optimizer.safetensors")
    assert {
        f"optimizer_states.0.state.layer.weight.{name}"
        for name in ("exp_avg", "exp_avg_sq", "step")
    } <= set(optimizer)


def test_manifest() -> None:
    """Facts about the run, and each file's size."""
    path = saved()
    manifest = read_manifest(path)
    assert (manifest["epoch"], manifest["global_step"], manifest["world_size"]) == (
        1,
        4,
        1,
    )
    assert (manifest["strategy"], manifest["precision"], manifest["module"]) == (
        "single",
        "32-true",
        "Adam",
    )
    assert manifest["torch"] == torch.__version__
    assert manifest["files"].keys() == ALL - {"manifest.json"}
    for name, expected in manifest["files"].items():
        assert Path(path, name).stat().st_size == expected["size"]


def test_state_is_json() -> None:
    """Counters can be read by anything."""
    state = json.loads(Path(saved(), "state.json").read_text())
    assert state["run"]["state"]["global_step"] == 4
    assert state["epoch"] == 1


class Tied(Linear):
    """Weights shared between two layers, a view as a buffer, an empty and a half-precision one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 1)
        self.other.weight = self.layer.weight
        base = torch.arange(12.0).reshape(3, 4)
        self.register_buffer("view", base[1])
        self.register_buffer("transposed", base.T)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("short", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))


def test_shared_tensors_and_views() -> None:
    """All names come back with their values; what is shared is stored once."""
    module: Any = Tied()
    path = saved(module=module)
    loaded = load_checkpoint(path)["state_dict"]
    assert loaded.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype
    assert len(load_file(f"{path}/model/model.safetensors")) == len(loaded) - 1
    twin: Any = Tied.load_from_checkpoint(path)
    assert twin.other.weight is twin.layer.weight
    with torch.no_grad():
        twin.view.fill_(5)
    assert torch.equal(twin.short, module.short)


def test_names_of_equal_place_but_other_shape() -> None:
    """Views of one buffer are told apart by their shapes."""
    base = torch.arange(6.0)
    state = {
        "whole": base,
        "first": base[:3],
        "matrix": base.view(2, 3),
        "last": base[3:],
    }
    save_checkpoint({"state_dict": state}, "a.ckpt", FACTS, None)
    loaded = load_checkpoint("a.ckpt")["state_dict"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_loaded_tensors_can_be_changed() -> None:
    """Each by itself: nothing shares memory with a file or another entry."""
    save_checkpoint(
        {"state_dict": {"w": torch.ones(2)}, "x": {"a": torch.ones(2)}},
        "a.ckpt",
        FACTS,
        None,
    )
    loaded = load_checkpoint("a.ckpt")
    loaded["state_dict"]["w"].zero_()
    assert torch.equal(loaded["x"]["a"], torch.ones(2))


def test_extra_state() -> None:
    """What a module adds to its state_dict beside tensors."""

    class Extra(Linear):
        def get_extra_state(self) -> Any:
            return {"version": 3}

        def set_extra_state(self, state: Any) -> None:
            self.version = state["version"]

    assert Extra.load_from_checkpoint(saved(module=Extra())).version == 3


@pytest.mark.parametrize("fn", ["fit", "test"])
def test_memory_filesystem(fn: str) -> None:
    """Any fsspec URL is a place for a checkpoint."""
    url = f"memory://{fn}/a.ckpt"
    module, trainer = Adam(), quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint(url)
    assert is_complete(url)
    assert trainer.checkpoints.exists(url)
    twin = Adam.load_from_checkpoint(url)
    assert all(map(torch.equal, weights(module), weights(twin)))
    if fn == "fit":
        resumed = quiet(max_epochs=2)
        resumed.fit(Adam(), loader(), ckpt_path=url)
        assert resumed.global_step == 8
    else:
        quiet().test(Adam(), loader(), ckpt_path=url, verbose=False)
    trainer.save_checkpoint(url)  # again, over what is there
    assert find_checkpoints(f"memory://{fn}") == [url]
    write_pointer(f"memory://{fn}/last.ckpt", url)
    assert resolve(f"memory://{fn}/last.ckpt") == url
    filesystem = fsspec.filesystem("memory")
    filesystem.rm_file(
        next(
            name
            for name in filesystem.find(f"/{fn}/a.ckpt")
            if name.endswith("state.json")
        )
    )
    assert not is_complete(url)
    remove_checkpoint(url)
    assert not trainer.checkpoints.exists(url)


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize(
    "damage",
    [
        "first byte",
        "middle byte",
        "last byte",
        "truncated",
        "longer",
        "missing",
        "empty",
    ],
)
def test_damage_is_noticed_and_named(name: str, damage: str) -> None:
    """Each file, each kind of damage: loading says which file of which checkpoint."""
    save_checkpoint(
        {"state_dict": {"w": torch.ones(3)}, "optimizer_states": [{"m": torch.ones(3)}], "t": torch.ones(2)},
        "a.ckpt", FACTS, [{"torch": torch.get_rng_state()}],
    )  # fmt: skip
    file = Path("a.ckpt", name)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        place = {
            "first byte": 0,
            "middle byte": len(content) // 2,
            "last byte": -1,
        }.get(damage)
        if place is not None:
            content[place] ^= 1
        content = {
            "truncated": content[:-1],
            "longer": content + b" ",
            "empty": bytearray(),
        }.get(damage, content)
        file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"a\.ckpt") as caught:
        load_checkpoint("a.ckpt")
    assert name in str(caught.value)
    assert any(
        word in str(caught.value) for word in ("damaged", "no complete checkpoint")
    )
    if damage in ("truncated", "longer", "empty") and name != "manifest.json":
        assert "bytes" in str(caught.value)  # says the two sizes
    if "byte" not in damage or name == "manifest.json":
        assert not is_complete("a.ckpt")
        assert find_checkpoints(".") == [] or name != "manifest.json"


def test_every_byte_of_the_manifest_counts() -> None:
    """Any one flipped bit is noticed."""
    save_checkpoint({"state_dict": {}}, "a.ckpt", FACTS, None)
    file = Path("a.ckpt/manifest.json")
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(
            content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        )
        assert not is_complete("a.ckpt"), content[place : place + 1]
    file.write_bytes(content)
    assert is_complete("a.ckpt")


def test_a_later_format_is_refused() -> None:
    """With what this version reads."""
    save_checkpoint({"state_dict": {}}, "a.ckpt", {**FACTS, "format": 99}, None)
    with pytest.raises(
        CheckpointError, match="has format 99, this version reads up to 2; upgrade"
    ):
        load_checkpoint("a.ckpt")


def test_nothing_there() -> None:
    """A missing path, files of another kind, a folder that is no checkpoint."""
    with pytest.raises(
        CheckpointError, match=r"there is no checkpoint at 'none\.ckpt'"
    ):
        load_checkpoint("none.ckpt")
    Path("other.ckpt").write_text("weights")
    with pytest.raises(
        CheckpointError,
        match=r"neither a checkpoint directory, nor a pointer to one, nor a file of",
    ):
        load_checkpoint("other.ckpt")
    Path("folder").mkdir()
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint: manifest\.json is missing"
    ):
        load_checkpoint("folder")
    assert not is_complete("none.ckpt")
    assert not is_complete("other.ckpt")
    assert not is_complete("folder")


# -- writing --------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it fails at: what was there stays, and no temporary is left."""
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, "a.ckpt", FACTS, None)
    writing = module_under_test.writing
    for fail_at in range(3):
        left = [fail_at]

        def failing(path: str, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return writing(path)

        monkeypatch.setattr(module_under_test, "writing", failing)
        with pytest.raises(
            OSError,
            match=r"checkpoint '.*a\.ckpt' could not be written: No space left on device",
        ):
            save_checkpoint(
                {"state_dict": {"w": torch.zeros(1)}}, "a.ckpt", FACTS, None
            )
        assert torch.equal(load_checkpoint("a.ckpt")["state_dict"]["w"], torch.ones(1))
        assert [path.name for path in Path.cwd().iterdir()] == ["a.ckpt"]


def test_overwriting() -> None:
    """The new one is there whole, without files of the old one."""
    saved("a.ckpt")
    saved("a.ckpt", module=Linear(), weights_only=True)
    assert "optimizer/optimizer.safetensors" not in files("a.ckpt")
    assert [path.name for path in Path.cwd().iterdir()] == ["a.ckpt"]
    assert is_complete("a.ckpt")


def test_pointers(tmp_path: Path) -> None:
    """A small file names a checkpoint: relative where it stands beside it, so that a folder can be moved."""
    saved(tmp_path / "runs" / "a.ckpt")
    write_pointer(
        str(tmp_path / "runs" / "last.ckpt"), str(tmp_path / "runs" / "a.ckpt")
    )
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert resolve(str(tmp_path / "moved" / "last.ckpt")) == str(
        tmp_path / "moved" / "a.ckpt"
    )
    write_pointer(str(tmp_path / "far.ckpt"), str(tmp_path / "moved" / "a.ckpt"))
    assert resolve(str(tmp_path / "far.ckpt")) == str(tmp_path / "moved" / "a.ckpt")
    assert is_complete(str(tmp_path / "moved" / "a.ckpt"))
    assert isinstance(Adam.load_from_checkpoint(tmp_path / "moved" / "last.ckpt"), Adam)
    remove_checkpoint(str(tmp_path / "far.ckpt"))
    assert not (tmp_path / "far.ckpt").exists()
    assert (tmp_path / "moved" / "a.ckpt").exists()


def test_finding() -> None:
    """Complete ones, the one written last first."""
    for name, created, step in (("old", 3.0, 1), ("new", 2.0, 5), ("newer", 4.0, 5)):
        save_checkpoint(
            {"state_dict": {}},
            f"{name}.ckpt",
            {"created": created, "global_step": step},
            None,
        )
    Path("broken.ckpt").mkdir()
    write_pointer("last.ckpt", "new.ckpt")
    assert [Path(path).name for path in find_checkpoints(".")] == [
        "newer.ckpt",
        "old.ckpt",
        "new.ckpt",
    ]
    assert find_checkpoints("nowhere") == []


def test_save_checkpoint_before_a_run() -> None:
    """There is nothing to save."""
    with pytest.raises(RuntimeError, match="has run nothing yet"):
        quiet().save_checkpoint("a.ckpt")


def test_weights_only_cannot_resume() -> None:
    """It says so, and what it is good for."""
    path = saved(weights_only=True)
    with pytest.raises(
        CheckpointError,
        match=r"weights_only=True.*cannot resume a run; load its weights with",
    ):
        quiet(max_epochs=2).fit(Adam(), loader(), ckpt_path=path)
    quiet().test(Adam(), loader(), ckpt_path=path, verbose=False)


# -- what users put in ----------------------------------------------------------------------------------------------


class Thing:
    """Neither tensor nor JSON."""

    def __init__(self, value: int = 1) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and other.value == self.value

    __hash__ = None  # type: ignore[assignment] # compared only


class Unpicklable:
    """Refuses."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


class Takes(Linear):
    """Hyperparameters of any kind."""

    def __init__(self, thing: Any = None, number: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.thing = thing


def test_objects_in_hyperparameters(capsys: pytest.CaptureFixture[str]) -> None:
    """Are pickled apart, told, and opened only when asked to."""
    path = saved(module=Takes(Thing(5), number=3))
    assert files(path) == {*ALL, "objects.pkl"}
    captured = capsys.readouterr()
    assert "hyper_parameters.thing" in captured.out + captured.err

    with pytest.raises(
        CheckpointError,
        match=r"hyper_parameters.thing.*weights_only=False if you trust it",
    ):
        Takes.load_from_checkpoint(path)
    assert Takes.load_from_checkpoint(path, weights_only=False).thing == Thing(5)
    assert Takes.load_from_checkpoint(path, thing="another").hparams == {
        "thing": "another",
        "number": 3,
    }


def test_loading_runs_no_code() -> None:
    """Not even where the file was replaced by one that would, unless told to."""

    class Harms:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("harm"),)

    path = saved(module=Takes(Harms()))
    Path("harm").unlink(missing_ok=True)  # the hyperparameters were copied
    checkpoint = load_checkpoint(path)
    assert not Path("harm").exists()
    sealed = checkpoint["hyper_parameters"]["thing"]
    assert "not loaded" in repr(sealed)
    for use in (lambda: sealed.anything, lambda: sealed()):
        with pytest.raises(CheckpointError, match="weights_only=False"):
            use()
    load_checkpoint(path, weights_only=False)
    assert Path("harm").exists()


def test_an_object_that_cannot_be_pickled(capsys: pytest.CaptureFixture[str]) -> None:
    """Is left out and named; the others, and the checkpoint, are saved."""
    path = saved(module=Takes([Unpicklable(), Thing(2)]))
    captured = capsys.readouterr()
    assert (
        "hyper_parameters.thing.0 could not be pickled" in captured.out + captured.err
    )
    checkpoint = load_checkpoint(path, weights_only=False)
    assert checkpoint["hyper_parameters"]["thing"][1] == Thing(2)
    with pytest.raises(
        CheckpointError, match="could not be pickled when the checkpoint was saved"
    ):
        checkpoint["hyper_parameters"]["thing"][0].value  # noqa: B018 # reading is the test
    assert isinstance(Takes.load_from_checkpoint(path, thing=1), Takes)


def test_damage_of_the_objects() -> None:
    """Is noticed where they are loaded."""
    path = saved(module=Takes(Thing()))
    Path(path, "objects.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"damaged: objects\.pkl"):
        load_checkpoint(path, weights_only=False)


def test_resuming_does_not_need_the_objects() -> None:
    """Hyperparameters are for constructing; a run that has its module goes on without them."""
    path = saved(module=Takes(Thing()))
    trainer = quiet(max_epochs=2)
    trainer.fit(Takes(Thing()), loader(), ckpt_path=path)
    assert trainer.global_step == 8


SURROGATE = "a\ud800"  # half of a pair, as in file names that are no UTF-8


def test_lone_surrogates() -> None:
    """In keys, values, and names of tensors and objects: they come back, beside names that look like their escapes."""
    state = {
        SURROGATE: torch.tensor(1),
        r"a\ud800": torch.tensor(2),
        "__metadata__": torch.tensor(3),
        "ü": torch.ones(1),
    }
    rest = {
        SURROGATE: {
            SURROGATE: torch.tensor(4),
            r"a\ud800": torch.tensor(5),
            "s": [SURROGATE],
            "o": Thing(6),
        },
        "optimizer_states": [{SURROGATE: torch.tensor(7)}],
        "__metadata__": torch.tensor(8),
    }
    save_checkpoint(
        {"state_dict": state, **rest}, "a.ckpt", FACTS, [{SURROGATE: torch.tensor(9)}]
    )
    loaded = load_checkpoint("a.ckpt", weights_only=False)
    assert loaded.pop("manifest")
    assert loaded == {
        "state_dict": state,
        **rest,
        "rng": [{SURROGATE: torch.tensor(9)}],
    }
    assert load_file("a.ckpt/model/model.safetensors").keys() == {"ü", r"a\ud800"}


class Rotates(Linear):
    """A weight of a type that the format of the files lacks, and two names for it."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(
            torch.tensor([[1 + 2j, 3j, 0.1]], dtype=torch.complex128).mT
        )
        self.same = self.turn
        self.register_buffer("scalar", torch.tensor(0.1 - 1j, dtype=torch.complex128))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + (self.turn.abs() ** 2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def test_complex_weights_resume() -> None:
    """By default, weights as optimizer states, and the run is the uninterrupted one."""
    module, whole, resumed = Rotates(), Rotates(), Rotates()
    whole.load_state_dict(module.state_dict())
    path = saved(module=module)
    assert files(path) == ALL
    raw = load_file(f"{path}/model/model.safetensors")["turn"]
    assert torch.equal(raw, torch.view_as_real(module.turn.detach()))
    quiet(max_epochs=2).fit(whole, loader())
    quiet(max_epochs=2).fit(resumed, loader(), ckpt_path=path)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert Rotates.load_from_checkpoint(path).same.dtype == torch.complex128


@pytest.mark.parametrize("copy", [False, True])
def test_each_type_of_tensor_comes_back(copy: bool) -> None:
    """Bit by bit and without pickling, whether safetensors knows the type or not; also empty and without dimensions."""
    types = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    plain = [dtype for dtype in types if not str(dtype).startswith("torch.q")]
    made = {
        str(d): torch.arange(6 * d.itemsize, dtype=torch.uint8).view(d).view(2, 3).mT
        for d in plain
    }
    made[str(torch.bool)] = torch.eye(2) > 0
    made |= {f"{d} {shape}": torch.zeros(math.prod(shape) * d.itemsize, dtype=torch.uint8).view(d).view(shape)
             for d in plain for shape in ((0, 2), (2, 0), (1,))}  # fmt: skip
    made |= {
        "scalar": torch.tensor(2j, dtype=torch.complex128).conj(),
        "neg": torch.tensor([2j]).conj().imag,
    }
    made["conj"] = torch.tensor([[1, 2j]], dtype=torch.complex128).mH
    snapshot = Snapshot({"state_dict": made, "more": {"x": made}}, FACTS, None, copy)
    commit(snapshot, "a.ckpt")
    loaded = load_checkpoint("a.ckpt")
    assert "objects.pkl" not in files("a.ckpt")
    for back in (loaded["state_dict"], loaded["more"]["x"]):
        assert back.keys() == made.keys()
        for name, tensor in made.items():
            assert (back[name].dtype, back[name].shape) == (
                tensor.dtype,
                tensor.shape,
            ), name
            assert bits(back[name]) == bits(tensor), name


def bits(tensor: Tensor) -> list[int]:
    tensor = tensor.resolve_conj().resolve_neg().unsqueeze(-1)
    return tensor.view(torch.uint8).flatten().tolist()


class Lazy(Linear):
    """A layer and a normalization whose sizes are known once they have run."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.LazyLinear(3)
        self.norm = nn.LazyBatchNorm1d()


def test_lazy_parameters() -> None:
    """Without a value yet, they are saved as that, and loaded without pickling; with one, as any other."""
    module = Lazy()
    save_checkpoint(
        {"state_dict": module.state_dict(), "mine": [module.later.weight]},
        "a.ckpt",
        FACTS,
        None,
    )
    assert files("a.ckpt") == ALL - {
        name for name in ALL if name.startswith(("rng", "optimizer"))
    }
    loaded = load_checkpoint("a.ckpt")
    assert {name: type(value) for name, value in loaded["state_dict"].items()} == {
        name: type(value) for name, value in module.state_dict().items()
    }
    assert type(loaded["mine"][0]) is nn.UninitializedParameter
    back = Lazy.load_from_checkpoint("a.ckpt")
    assert isinstance(back.later.weight, nn.UninitializedParameter)
    module.norm(module.later(torch.ones(2, 5)))
    save_checkpoint({"state_dict": module.state_dict()}, "b.ckpt", FACTS, None)
    assert torch.equal(
        Lazy.load_from_checkpoint("b.ckpt").later.weight, module.later.weight
    )

    class Ran(Lazy):
        def __init__(self) -> None:
            super().__init__()
            self.later(torch.ones(2, 5))

    with pytest.raises(CheckpointError, match=r"a\.ckpt.*uninitialized parameter"):
        Ran.load_from_checkpoint("a.ckpt")


def test_what_hooks_add() -> None:
    """on_save_checkpoint's keys reach on_load_checkpoint, tensors and nested values too."""

    class Adds(Linear):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"a": torch.arange(3), "b": (1, {2: "x"})}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.found = checkpoint["mine"]

    path = saved(module=Adds())
    found = Adds.load_from_checkpoint(path).found
    assert torch.equal(found["a"], torch.arange(3))
    assert found["b"] == (1, {2: "x"})


# -- encoding -------------------------------------------------------------------------------------------------------


def there_and_back(value: Any) -> Any:
    """Through JSON."""
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    encoded = json.loads(json.dumps(encode(value, "x", tensors, objects)))
    return decode(encoded, tensors, objects)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1.5, "text", "ünï\n", "", [], {}, (), [1, [2, (3,)]], (1, (2, [3])), {"a": {"b": [1, 2]}},
        {1: "int", "1": "str"}, {(1, 2): 3}, {None: 1, True: 2}, {"$tensor": "not one"}, {"$": {"$items": []}},
        Counter({"a": 2}), Counter({1: 2}), OrderedDict([("b", 1), ("a", 2)]), OrderedDict([(1, (2,))]),
        {1, 2}, frozenset("ab"), set(), torch.Size([2, 3]), torch.float16, torch.device("cpu"),
        timedelta(seconds=90, microseconds=1), float("inf"), 10**30, defaultdict(list, {"a": [1]}), b"bytes",
        complex(1, 2), range(3), Thing(4), [Thing(1), {"t": Thing(2)}],
    ],
    ids=lambda value: type(value).__name__,  # no addresses, no order of a set: names are the same in each process
)  # fmt: skip
def test_values_come_back(value: Any) -> None:
    """Equal, and of the same type."""
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, OrderedDict):
        assert list(back) == list(value)


def test_types_inside_come_back() -> None:
    """Tuples stay tuples and ints stay ints, however deep."""
    value = {"a": [(1, {2: (3.0, "x")})]}
    assert repr(there_and_back(value)) == repr(value)


class Mode(str, Enum):  # as in scripts from before StrEnum
    """A hyperparameter of a few names."""

    FAST = "fast"
    SLOW = "slow"


class Level(IntEnum):
    """One of numbers."""

    LOW = 1


class Attributes(dict[str, Any]):
    """Reads keys as attributes, as in many scripts."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Name(str):
    """With a method of its own."""

    __slots__ = ()

    def greet(self) -> str:
        """Use it."""
        return f"hello {self[:]}"


EXTENDED = [
    Mode.FAST, Level.LOW, Name("n"), Attributes(width=3), Attributes(inner=Attributes(width=3), modes=[Mode.SLOW]),
    {Mode.FAST: 0.1, Mode.SLOW: Level.LOW}, {Mode.SLOW, Mode.FAST}, frozenset({Level.LOW}), (Mode.FAST, [Mode.SLOW]),
    Attributes({Mode.FAST: {Level.LOW: 1}}), AttributeDict(width=AttributeDict(x=1)), {"a": {1: Mode.FAST}},
]  # fmt: skip


@pytest.mark.parametrize("value", EXTENDED, ids=lambda value: type(value).__name__)
def test_classes_that_extend_plain_ones(value: Any) -> None:
    """Come back as they were where objects are loaded, and as plain values of the same content where they are not."""
    objects: dict[str, Any] = {}
    encoded = json.loads(json.dumps(encode(value, "x", {}, objects)))
    back, plain = decode(encoded, {}, objects), decode(encoded, {}, None)
    assert (back, types_in(back)) == (value, types_in(value))
    assert plain == value
    own = {Mode, Level, Name, Attributes}
    assert not own.intersection(types_in(plain))


def types_in(value: Any) -> list[type]:
    """The types of a value and of all in it."""
    items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    if isinstance(value, dict):
        items = [part for item in value.items() for part in item]
    return (
        [type(value), *(t for item in items for t in types_in(item))]
        if is_nest(value)
        else [type(value)]
    )


def is_nest(value: Any) -> bool:
    """Whether values are in it."""
    return isinstance(value, (dict, list, tuple, set, frozenset))


def test_a_dict_of_attributes_with_tensors() -> None:
    """Its tensors are written once, and its keys are attributes still."""
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    encoded = encode(
        Attributes(weight=torch.ones(2), mode=Mode.FAST), "x", tensors, objects
    )
    assert objects == {"x.mode": Mode.FAST}
    for known in (objects, None):
        back = decode(json.loads(json.dumps(encoded)), tensors, known)
        assert (back.weight.tolist(), back.mode) == ([1, 1], "fast")


class Chooses(Linear):
    """A module with enums and dicts of its own making among its arguments."""

    def __init__(
        self, mode: Mode, level: Level | None, config: Attributes, untold: Any = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = config.width


def test_enums_and_dicts_in_hyperparameters(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Enums come back by the annotation, keys as attributes; all as they were if objects may be loaded. No line."""

    def make() -> Chooses:
        modes = {Mode.SLOW: 1, Mode.FAST: {Mode.SLOW, Mode.FAST}}
        return Chooses(
            Mode.FAST,
            Level.LOW,
            Attributes(width=3, modes=modes),
            {"mode": Mode.SLOW, "name": Name("n")},
        )

    path = saved(module=make())
    assert "objects.pkl" not in "".join(capsys.readouterr())
    loaded = Chooses.load_from_checkpoint(path)
    assert loaded.hparams == make().hparams
    assert loaded.hparams.mode is Mode.FAST
    assert loaded.hparams.level is Level.LOW
    assert loaded.width == 3
    assert loaded.hparams.untold["mode"] == "slow"
    loaded = Chooses.load_from_checkpoint(path, weights_only=False)
    assert type(loaded.hparams.config) is Attributes
    assert loaded.hparams.untold["mode"] is Mode.SLOW
    assert loaded.hparams.untold["name"].greet() == "hello n"
    for weights_only in (None, False):
        quiet(max_epochs=2).fit(
            make(), loader(), ckpt_path=path, weights_only=weights_only
        )
    assert "other hyperparameters" not in caplog.text


@dataclass
class Chosen:
    """A configuration with enums."""

    mode: Mode = Mode.SLOW
    modes: list[Mode] = field(default_factory=lambda: [Mode.FAST, Mode.SLOW])
    maybe: Mode | None = None
    either: Mode | str = "fast"


class Configured(Linear):
    """Takes one."""

    def __init__(self, config: Chosen) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = config


def test_enums_in_a_configuration() -> None:
    """Are what its class says, without pickled objects."""
    config = Configured.load_from_checkpoint(
        saved(module=Configured(Chosen(maybe=Mode.FAST)))
    ).config
    assert config.mode is Mode.SLOW
    assert config.modes[0] is Mode.FAST
    assert config.maybe is Mode.FAST
    assert type(config.either) is str


def test_a_dict_that_cannot_be_pickled(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its plain value is taken, which is said where the object was asked for."""

    class Closed(Attributes):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("not me")

    save_checkpoint({"state_dict": {}, "mine": Closed(a=1)}, "a.ckpt", FACTS, None)
    assert capsys.readouterr().out == ""
    assert load_checkpoint("a.ckpt")["mine"].a == 1
    assert caplog.text == ""
    assert load_checkpoint("a.ckpt", weights_only=False)["mine"].a == 1
    assert (
        "'mine' could not be pickled when the checkpoint was saved; its plain value is taken"
        in caplog.text
    )


def test_nan_comes_back() -> None:
    """As NaN."""
    assert (
        str(there_and_back([float("nan"), {"a": float("-inf")}]))
        == "[nan, {'a': -inf}]"
    )


def test_numpy_comes_back() -> None:
    """Arrays as arrays, scalars as numbers."""
    array = there_and_back({"a": np.arange(6, dtype=np.int16).reshape(2, 3)})["a"]
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.int16
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert there_and_back(np.float32(1.5)) == 1.5
    assert (
        repr(there_and_back({np.str_("a"): [np.str_("b"), np.float64(1)]}))
        == "{'a': ['b', 1.0]}"
    )
    assert there_and_back(np.array(["a", "b"])).tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "array",
    [
        np.array([1 + 2j]), np.array([1 + 2j], "c8"), np.array([[1, 2], [3, 4]], ">f4").T, np.array(3, ">u2"),
        np.array([1 - 1j], ">c16"), np.arange(3, dtype="u2")[::-1], np.arange(3, dtype="u8"), np.zeros((0, 2), ">i8"),
        np.array(["2020-01-01"], "M8[D]"), np.array([5], ">m8[s]"), np.array([b"a"]), np.array(["ab"], ">U2"),
        np.array([(1, 2.5)], [("a", ">i4"), ("b", "f8")]), np.array([0.1], np.longdouble), np.array([{}, 1], object),
        np.array([1], np.clongdouble), np.array([b"ab"], "V2"), np.ma.array([1, 2], mask=[0, 1]),
        np.asmatrix([[1.0, 2.0]]), np.asmatrix([[1.0]]), np.zeros(2, [("a", "i4")]).view(np.recarray),
    ],
    ids=lambda array: f"{type(array).__name__} {array.dtype.str}",
)  # fmt: skip
def test_any_array_can_be_saved(array: Any) -> None:
    """What torch can hold without pickling, in the machine's order of bytes; the rest as other objects."""
    save_checkpoint({"state_dict": {}, "mine": {"x": array}}, "a.ckpt", FACTS, None)
    held = (
        type(array) is np.ndarray
        and array.dtype.kind in "biufc"
        and array.dtype.char not in "gG"
    )
    assert ("objects.pkl" in files("a.ckpt")) != held
    back = load_checkpoint("a.ckpt", weights_only=False)["mine"]["x"]
    assert type(back) is type(array)
    assert back.dtype == array.dtype.newbyteorder("=") or array.dtype.char in "UVm"
    assert (back.shape, back.tolist()) == (array.shape, array.tolist())


@pytest.mark.parametrize(
    "scalar",
    [
        np.timedelta64(5, "ns"),
        np.datetime64(5, "ns"),
        np.longdouble("0.1"),
        np.complex128(1j),
        np.uint16(3),
    ],
)
def test_numpy_scalars_come_back(scalar: Any) -> None:
    """As equal ones: numbers as Python's own, and what is none as it is."""
    back = there_and_back(scalar)
    assert back == scalar
    assert type(back) is (int if scalar.dtype.kind == "u" else type(scalar))


def test_tensors_come_back() -> None:
    """Under names that do not collide."""
    value = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "l": [torch.tensor(3)], "l.0": torch.tensor(4),
             1: torch.tensor(5), "1": torch.tensor(6)}  # fmt: skip
    back = there_and_back(value)
    assert [
        back["a"]["b"],
        back["a.b"],
        back["l"][0],
        back["l.0"],
        back[1],
        back["1"],
    ] == [1, 2, 3, 4, 5, 6]


def test_paths_come_back_as_paths() -> None:
    """A pathlib path becomes a str: that is what the next machine can use."""
    assert there_and_back({"p": Path("a/b")}) == {"p": Path("a/b")}


# -- folders that hold something else ---------------------------------------------------------------------------------

OTHERS = {
    "args.json": "{}", "logs/a.txt": "log", "state.json": "mine", "model/config.json": "{}",
    "epoch=0.ckpt/notes": "an earlier one",
}  # fmt: skip


@pytest.fixture(params=["local", "store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet."""
    return "run" if request.param == "local" else f"memory:/{tmp_path}/run"


def put(root: str, names: Any) -> None:
    """Write the user's files."""
    for name, text in names.items():
        opened: Any = fsspec.open(f"{root}/{name}", "w", auto_mkdir=True)
        with opened as file:
            file.write(text)


def content_of(root: str) -> dict[str, bytes]:
    """All files below a folder."""
    filesystem, path = fsspec.core.url_to_fs(root)
    return {
        name.removeprefix(f"{path}/"): filesystem.cat_file(name)
        for name in filesystem.find(path)
    }


def test_a_save_touches_nothing_else_in_the_folder(root: str) -> None:
    """Again and again, with names that are taken; of the checkpoints before, nothing is left."""
    kept = {name: text.encode() for name, text in OTHERS.items()}
    put(root, OTHERS)
    for value in (1.0, 2.0, 3.0):
        save_checkpoint({"state_dict": {"w": torch.tensor([value])}}, root, FACTS, None)
        assert load_checkpoint(root)["state_dict"]["w"].item() == value
        found = content_of(root)
        assert {name: found[name] for name in kept} == kept
        assert len(found) - len(kept) == len(read_manifest(root)["files"]) + 1
        assert find_checkpoints(root) == [root]
    remove_checkpoint(root)
    assert content_of(root) == kept


def test_what_a_user_puts_into_a_checkpoint_stays(root: str) -> None:
    """When it is saved over, and when it is removed."""
    notes = {"notes.txt": "mine", "model/config.json": "{}"}
    save_checkpoint({"state_dict": {"w": torch.ones(1)}}, f"{root}/a.ckpt", FACTS, None)
    put(f"{root}/a.ckpt", notes)
    save_checkpoint(
        {"state_dict": {"w": torch.zeros(1)}}, f"{root}/a.ckpt", FACTS, None
    )
    assert load_checkpoint(f"{root}/a.ckpt")["state_dict"]["w"].item() == 0
    remove_checkpoint(f"{root}/a.ckpt")
    assert content_of(f"{root}/a.ckpt") == {
        name: text.encode() for name, text in notes.items()
    }


@pytest.mark.parametrize(
    "name", ["", "/manifest.json"], ids=["a file", "a manifest of another kind"]
)
def test_what_is_no_checkpoint_is_not_replaced(root: str, name: str) -> None:
    """An error names it, and it is as it was."""
    put(root, {f"mine{name}": '{"short_name": "app"}'})
    before = content_of(root)
    with pytest.raises(
        OSError,
        match=r"checkpoint '.*mine' could not be written.*no.* checkpoint.*save elsewhere",
    ):
        save_checkpoint({"state_dict": {}}, f"{root}/mine", FACTS, None)
    if name:
        with pytest.raises(CheckpointError, match="mine"):
            remove_checkpoint(f"{root}/mine")
    assert content_of(root) == before


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """The checkpoint goes where it leads."""
    Path("disk").mkdir()
    Path("out").symlink_to("disk")
    for value in (1.0, 2.0):
        save_checkpoint(
            {"state_dict": {"w": torch.tensor([value])}}, "out", FACTS, None
        )
        assert load_checkpoint("disk")["state_dict"]["w"].item() == value
    assert Path("out").is_symlink()
    remove_checkpoint("out")
    assert not files("disk")
    Path("later").symlink_to("not there yet")
    save_checkpoint({"state_dict": {}}, "later", FACTS, None)
    assert Path("later").is_symlink()
    assert is_complete("not there yet")


def test_a_save_where_the_program_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder in which it works stays that folder, though there is nothing else in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for number, path in enumerate(
        (".", str(tmp_path / "here"), str(tmp_path / "here"), ".")
    ):
        save_checkpoint(
            {"state_dict": {"w": torch.tensor([number])}}, path, FACTS, None
        )
        assert load_checkpoint(".")["state_dict"]["w"].item() == number
        assert Path("manifest.json").is_file()
    assert not [name for name in files(tmp_path) if ".tmp" in name or ".old" in name]


NEARLY_OURS = {
    ".run.notes.tmp": "mine", ".run.tmp": "mine", "manifest.json.tmp": "mine", ".cache.v1.2.3.tmp/notes": "mine",
    ".run.host-1-99999999.abcdef12.tmp/notes": "an unfinished checkpoint in it, of the same name",
}  # fmt: skip


def test_names_that_are_nearly_ours(root: str) -> None:
    """What only looks like something that a save has left is a user's, old or not."""
    put(root, NEARLY_OURS)
    if Path(root).is_dir():
        os.utime(f"{root}/.cache.v1.2.3.tmp", (1, 1))
    for path in (root, f"{root}/a.ckpt", root):
        save_checkpoint({"state_dict": {}}, path, FACTS, None)
    assert content_of(root).keys() >= NEARLY_OURS.keys()


def test_names_that_are_patterns(root: str) -> None:
    """A name with brackets or stars in it is that name, and nobody else's."""
    others, own = {f"{root}/acc1.ckpt", f"{root}/accx.ckpt"}, f"{root}/acc[1]*?.ckpt"
    for path in (*others, own, own):
        save_checkpoint({"state_dict": {}}, path, FACTS, None)
    assert {*find_checkpoints(root)} == {*others, own}
    put(own, {"notes.txt": "mine"})
    remove_checkpoint(own)
    assert {*find_checkpoints(root)} == others
    assert content_of(own).keys() == {"notes.txt"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_folders_of_others(tmp_path: Path) -> None:
    """One that stands in a folder of somebody else's, and has one in it into which nobody may look, like a disk's."""
    folder = tmp_path / "disk"
    (folder / "lost+found").mkdir(parents=True, mode=0o700)
    nobody = 65534
    os.chown(folder, nobody, nobody)
    for above in folder.parents[: len(folder.parents) - 2]:
        above.chmod(0o755)

    def act() -> None:
        os.setgid(nobody)
        os.setuid(nobody)
        for value in (1, 2):
            save_checkpoint(
                {"state_dict": {"w": torch.tensor([value])}}, str(folder), FACTS, None
            )
        remove_checkpoint(str(folder))
        for value in (1, 2):
            save_checkpoint(
                {"state_dict": {"w": torch.tensor([value])}}, str(folder), FACTS, None
            )

    for alone in (False, True):
        if alone:
            remove_checkpoint(str(folder))
            (folder / "lost+found").rmdir()
        assert ended(in_a_child(act)) == 0, alone
        assert load_checkpoint(str(folder))["state_dict"]["w"].item() == 2


# -- what is not loaded ---------------------------------------------------------------------------------------------


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """Keeps functions: as an attribute, and in a dict."""

    def __init__(self, optimizer: Any, curve: Any) -> None:
        self.curve, self.more = (
            curve,
            {"steps": 1, "round": lambda rate: round(rate, 4)},
        )
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [
            self.more["round"](base * self.curve(self.last_epoch))
            for base in self.base_lrs
        ]


class Schedules(Linear):
    """Its schedulers hold functions and objects of a class of its own, one inside another."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        kinds = torch.optim.lr_scheduler
        warmup = Warmup(optimizer, lambda step: min(1.0, (step + 1) / 5))
        called = kinds.LambdaLR(optimizer, Curve())
        return [optimizer], [
            {"scheduler": kinds.ChainedScheduler([warmup, called]), "interval": "step"}
        ]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates = [
            *getattr(self, "rates", []),
            self.trainer.optimizers[0].param_groups[0]["lr"],
        ]


class Curve:
    """Can be called, and holds what cannot be saved as JSON."""

    def __init__(self) -> None:
        self.base = Thing(2)

    def __call__(self, step: int) -> float:
        return self.base.value ** -min(step, 3)


def test_a_schedulers_functions_are_not_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By objects that were not loaded: the new scheduler's own are kept, and the rates go on."""
    caplog.set_level("INFO", "loopwright")
    whole, module, resumed = Schedules(), Schedules(), Schedules()
    quiet(max_epochs=2).fit(whole, loader())
    path = saved(module=module)
    quiet(max_epochs=2).fit(resumed, loader(), ckpt_path=path)
    assert [*module.rates, *resumed.rates] == whole.rates
    assert (
        "The checkpoint's 'lr_schedulers.0._schedulers.0.curve' is a pickled object and not loaded"
        in caplog.text
    )


def test_a_registered_object_keeps_what_is_not_loaded(tmp_path: Path) -> None:
    """What it has already stays; what it has nothing for is an error that names it."""

    class Registered:
        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)

        state_dict = lambda self: dict(self.__dict__)  # noqa: E731 # as short as it can be
        load_state_dict = lambda self, state: self.__dict__.update(state)  # noqa: E731

    for now, expected in (
        ({"n": 0, "call": max}, {"n": 5, "call": max}),
        ({"n": 0}, None),
    ):
        engine = Engine(accelerator="cpu", devices=1)
        engine.register_for_checkpointing(Registered(n=5, call=min))
        engine.save_state(tmp_path / "a")
        other = Engine(accelerator="cpu", devices=1)
        other.register_for_checkpointing(item := Registered(**now))
        if expected is None:
            with pytest.raises(
                CheckpointError, match=r"registered\.0\.call.*weights_only=False"
            ):
                other.load_state(tmp_path / "a")
        else:
            other.load_state(tmp_path / "a")
            assert vars(item) == expected


@pytest.mark.parametrize(
    "map_location",
    [
        lambda storage, location: storage,
        lambda storage, location: None,
        {"cuda:0": "cpu"},
        torch.device("cpu"),
        "cpu",
    ],
    ids=["function", "function that gives none", "dict", "device", "name"],
)
def test_map_location_is_that_of_torch(map_location: Any) -> None:
    """A name, a device, a dict, or a function."""
    path = saved(weights_only=True)
    assert (
        Adam.load_from_checkpoint(
            path, map_location=map_location
        ).layer.weight.device.type
        == "cpu"
    )
    elsewhere = torch.empty(0, device="meta").untyped_storage()
    for whole in (
        path,
        saved("whole.ckpt"),
    ):  # with random generators, which are no tensors of anybody's model
        moved = Adam.load_from_checkpoint(
            whole, map_location=lambda storage, location: elsewhere
        )
        assert moved.layer.weight.device.type == "meta"


# -- made to harm -----------------------------------------------------------------------------------------------------


def altered(name: str, content: bytes, other: str | None = None, **about: Any) -> str:
    """A checkpoint whose file ``name`` has another content, and a manifest that says so."""
    save_checkpoint(
        {"state_dict": {"w": torch.ones(2, 3)}, "optimizer_states": [{"m": torch.ones(3)}], "x": 1},
        "a.ckpt", FACTS, [{"torch": torch.get_rng_state()}],
    )  # fmt: skip
    body = read_manifest("a.ckpt")
    file = Path("a.ckpt", other or name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    body["files"][other or name] = {"size": len(content), "crc32": zlib.crc32(content)}
    Path("a.ckpt/manifest.json").write_bytes(seal_manifest({**body, **about}))
    return "a.ckpt"


def tensors(header: Any, data: bytes = bytes(24)) -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any = (2, 3), end: Any = 24, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def pieces(shape: Any, offset: Any) -> dict[str, Any]:
    return {
        "w": entry(),
        "__metadata__": {"pieces": json.dumps({"w": [shape, offset]})},
    }


DEEP = b"[" * 200_000 + b"]" * 200_000
MODEL = "model/model.safetensors"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", DEEP), ("state.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000), ("state.json", b"[1]"),
        ("state.json", b"{"), ("state.json", b'{"x": {"$tensor": "gone"}}'), ("state.json", b'{"x": {"$eval": "1"}}'),
        ("state.json", b'{"x": {"$dtype": "load"}}'), ("state.json", b'{"x": {"$device": "nowhere"}}'),
        ("state.json", b'{"x": {"$dict": "Popen", "$value": 1}}'), ("state.json", b'{"x": {"$items": 3}}'),
        ("state.json", b'{"model_extra_state": 3}'), ("rng/rank-0.json", DEEP), ("state.json", b"\xff\xfe"),
        (MODEL, b""), (MODEL, b"\xff" * 8), (MODEL, tensors(DEEP)), (MODEL, tensors({"w": entry(end=2**62)})),
        (MODEL, tensors({"w": entry([2**40, 2**40])})), (MODEL, tensors({"w": entry([-2, -3])})),
        (MODEL, tensors({"w": entry(dtype="F7")})), (MODEL, tensors({"w": "no"})), (MODEL, tensors(b"[]")),
        (MODEL, tensors({"w": entry(), "__metadata__": {"aliases": '{"v": "gone"}'}})),
        (MODEL, tensors({"w": entry(), "__metadata__": {"dtypes": '{"w": "load"}'}})),
        (MODEL, tensors({"w": entry(), "__metadata__": {"dtypes": DEEP.decode()}})),
        (MODEL, tensors(pieces([2**50, 3], [0, 0]))), (MODEL, tensors(pieces([-4, -3], 0))),
        (MODEL, tensors(pieces([2, 3], [9, 0]))), (MODEL, tensors(pieces([2, 3], [0]))),
        (MODEL, tensors(pieces("no", "no"))), (MODEL, tensors(pieces([4, 3], [0, 0]))),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:40]),
)  # fmt: skip
def test_content_that_was_made_to_harm(name: str, content: bytes) -> None:
    """Is an error of the checkpoint, whatever it makes others raise."""
    path = altered(name, content)
    assert is_complete(path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [{"hyper_parameters": "x"}, {"hyper_parameters": [1]}, {"hyper_parameters": 3}, {"hyper_parameters_call": [1]},
     {"hyper_parameters_call": {"arguments": ["lr"]}},
     {"hyper_parameters_call": {"arguments": 3, "whole": None}, "hyper_parameters": {"lr": 0.1}}],
    ids=repr,
)  # fmt: skip
def test_hyperparameters_of_another_shape(state: Any) -> None:
    """Are damage before anything is constructed from them."""
    with pytest.raises(
        CheckpointError,
        match=r"a\.ckpt' is damaged: its hyperparameters are not as they should be",
    ):
        Linear.load_from_checkpoint(altered("state.json", json.dumps(state).encode()))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.json",
        "model/../../secret.json",
        "/etc/hostname",
        "",
        "a//b",
        "C:\\x",
        ".",
    ],
)
@pytest.mark.parametrize("where", ["files", "folder"])
def test_names_outside_of_the_checkpoint(name: str, where: str) -> None:
    """Nothing there is read, nor removed."""
    secret = b'{"secret": 1}'
    Path("secret.json").write_bytes(secret)
    about: dict[str, Any] = {"folder": name}
    if where == "files":
        facts = {"size": len(secret), "crc32": zlib.crc32(secret)}
        about = {"files": {**read_manifest(altered("x", b""))["files"], name: facts}}
    path = altered("x", b"", **about)
    with pytest.raises(CheckpointError, match="no file inside of it"):
        load_checkpoint(path)
    assert not is_complete(path)
    assert find_checkpoints(".") == []
    with pytest.raises(CheckpointError):
        remove_checkpoint(path)
    assert Path("secret.json").read_bytes() == secret


def test_a_tensor_that_is_there_twice() -> None:
    """Which of them is meant, nobody knows."""
    twice = tensors({"w": entry()})
    with pytest.raises(
        CheckpointError,
        match=r"damaged: in model/model.safetensors, model/rank-1.safetensors, w is",
    ):
        load_checkpoint(altered(MODEL, twice, "model/rank-1.safetensors"))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", MODEL])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_is_not_opened(make: Any, name: str) -> None:
    """A pipe that nobody writes to would be waited for."""
    path = altered(
        "x" if name == "manifest.json" else name, b""
    )  # a pipe's size is none, too
    Path(path, name).unlink()
    make(Path(path, name))
    with pytest.raises(
        CheckpointError, match=rf"a\.ckpt.*{name} is missing, or no file"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["manifest.json", "model/model.safetensors"])
def test_a_size_beyond_the_memory(name: str) -> None:
    """A file with a hole of many terabytes is not read."""
    path = altered("x", b"")
    with Path(path, name).open("r+b") as file:
        file.truncate(2**43)
    with pytest.raises(CheckpointError, match=f"damaged: {name} "):
        load_checkpoint(path)
    if name != "manifest.json":
        body = read_manifest(path)
        body["files"][name]["size"] = 2**43
        Path(path, "manifest.json").write_bytes(seal_manifest(body))
        with pytest.raises(
            CheckpointError,
            match=f"damaged: in {name}, .*more or fewer bytes than its tensors",
        ):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "body",
    [{}, [], 3, {"format": 1}, {"format": "1", "files": {}}, {"format": 1, "files": []},
     {"format": 1, "files": {"a": 1}}, {"format": 1, "files": {}, "created": "now"},
     {"format": 1, "files": {}, "folder": 3}, {"format": 1, "files": {}, "metrics": ["loss"]},
     {"format": 1, "files": {"a": {"size": "1", "crc32": 2}}}],
    ids=repr,
)  # fmt: skip
def test_a_manifest_of_another_shape(body: Any) -> None:
    """Is an error, and no checkpoint to find."""
    path = altered("x", b"")
    Path(path, "manifest.json").write_bytes(seal_manifest(body))
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*damaged"):
        load_checkpoint(path)
    assert find_checkpoints(".") == []


def test_pointers_and_files_of_weights_that_were_made_to_harm() -> None:
    """Are errors that name them, too."""
    cases = {"a.ckpt": DEEP, "b.ckpt": b'{"checkpoint": 3}', "c.ckpt": b"PK\x03\x04" + bytes(100),
             "d.safetensors": tensors(DEEP), "e.ckpt": b'{"checkpoint": ' * 200_000}  # fmt: skip
    for name, content in cases.items():
        Path(name).write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load_checkpoint(name)
