"""What each process reads of a checkpoint, and the memory that this takes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Module
from loopwright.framework.checkpoint.file_tensors import open_tensors
from loopwright.framework.checkpoint.storage import LocalStorage
from loopwright.framework.checkpoint.tensors import StagedTensors
from loopwright.strategies.stored_tensors import StoredState
from loopwright.strategies.tensor_shards import TensorShard
from tests.strategies.distributed import in_new_processes, quiet

WIDTH, LAYERS = 1024, 20
# Of parameters and AdamW's two moments: 252 MB.
WHOLE = 3 * 4 * LAYERS * WIDTH**2


def resident(kind: str) -> int:
    """The resident size in bytes: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def forget_peak() -> int:
    """Let VmHWM begin anew; returns the resident size now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Large(Module):
    """Notes the highest memory while a checkpoint is opened, and while it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )
        self.taken: dict[str, int] = {}
        self.before = 0

    def begin(self) -> None:
        self.before = forget_peak()

    def note(self, name: str) -> None:
        self.taken[name] = resident("VmHWM") - self.before

    def setup(self, stage: str) -> None:
        self.note("opened")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The strategy has set up the module.
        self.begin()

    def on_train_start(self) -> None:
        self.note("loaded")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layers(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def fitted(strategy: Any, steps: int, ckpt_path: Any = None) -> tuple[Large, Any]:
    torch.manual_seed(0)
    module = Large()
    trainer = quiet(strategy=strategy, max_steps=steps, max_epochs=-1)
    loader = DataLoader(TensorDataset(torch.ones(8, WIDTH)), 1)
    module.begin()
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def memory_of_resuming(folder: Path, strategies: tuple[str, ...]) -> dict[str, Any]:
    """By strategy and rank: what was taken, in bytes; and how many messages a start takes."""
    found: dict[str, Any] = {"collectives": collectives()}
    for strategy in strategies:
        path = folder / f"{strategy}.ckpt"
        _, trainer = fitted(strategy, 1)
        trainer.save_checkpoint(path)
        del trainer, _
        # The first one imports, and makes what stays.
        for _ in range(2):
            module, trainer = fitted(strategy, 2, path)
            found[strategy] = trainer.strategy.gather_objects(module.taken)
            del module, trainer
    return found


def collectives() -> list[int]:
    """How many messages make a module of so many small tensors equal in all processes."""
    counted = []
    broadcast = dist.broadcast

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counted.append(tensor.numel())
        return broadcast(tensor, *arguments, **options)

    module = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20)))
    module.register_buffer("angle", torch.zeros(3, dtype=torch.complex64))
    trainer = quiet(strategy="ddp")
    trainer.strategy.connect()
    rank = trainer.strategy.global_rank
    for tensor in module.state_dict().values():
        tensor.fill_(rank + 1)
    dist.broadcast = counting
    try:
        trainer.strategy.group.broadcast_tensors([*module.state_dict().values()])
    finally:
        dist.broadcast = broadcast
    assert all((tensor == 1).all() for tensor in module.state_dict().values())
    return [len(module.state_dict()), len(counted)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_takes_its_part_of_a_checkpoint_and_hardly_more(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    told = in_new_processes(processes, memory_of_resuming, tmp_path, ("fsdp",))
    # One for each type of numbers, and one before was of 101.
    assert told["collectives"] == [101, 3]
    for taken in told["fsdp"]:
        assert taken["opened"] < 0.05 * WHOLE
        # The parameters' part is there before.
        assert taken["loaded"] < (2 / 3 / processes + 0.05) * WHOLE


# What is read, in one process.


def parts_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the same in two files that hold parts of them."""
    tensors = {
        "rows": torch.randn(10, 4),
        "columns": torch.randn(10, 4),
        "flat": torch.randn(7),
        "complex": torch.randn(3, dtype=torch.complex128),
        "number": torch.tensor(3.0),
    }
    rows, columns, flat = tensors["rows"], tensors["columns"], tensors["flat"]
    files: list[dict[str, Any]] = [
        {
            "rows": TensorShard(rows[:6], (10, 4), (0, 0)),
            "columns": TensorShard(columns[:, :1], (10, 4), (0, 0)),
            "flat": TensorShard(flat[:5], (7,), 0),
            "complex": tensors["complex"],
        },
        {
            "rows": TensorShard(rows[6:], (10, 4), (6, 0)),
            "columns": TensorShard(columns[:, 1:], (10, 4), (0, 1)),
            "flat": TensorShard(flat[5:], (7,), 5),
            "number": tensors["number"],
        },
    ]
    sizes = {}
    for number, content in enumerate(files):
        path = folder / f"{number}.safetensors"
        with path.open("wb") as file:
            for chunk in StagedTensors(content, copy=False).chunks():
                file.write(chunk)
        sizes[str(path)] = path.stat().st_size
    return tensors, dict(open_tensors(sizes, LocalStorage(), "cpu"))


def test_any_part_of_a_tensor_is_read_from_the_parts_that_were_saved(tmp_path: Path):
    tensors, stored = parts_of(tmp_path)
    for name, tensor in tensors.items():
        assert stored[name].whole().equal(tensor), name
    for name in ("rows", "columns"):
        tensor, each = tensors[name], stored[name]
        assert each.part((5, 4), (3, 0)).equal(tensor[3:8])
        assert each.part((9, 2), (1, 2)).equal(tensor[1:, 2:])
        assert each.part((9,), 11).equal(tensor.flatten()[11:20])
    rounded = torch.empty(5, 4, dtype=torch.bfloat16)
    stored["rows"].read(rounded, (3, 0))
    assert rounded.equal(tensors["rows"][3:8].bfloat16())


def test_only_what_is_asked_for_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    read_into = LocalStorage.read_into

    def counting(self: Any, path: str, memory: memoryview, begin: int) -> None:
        read.append(len(memory))
        read_into(self, path, memory, begin)

    tensors, stored = parts_of(tmp_path)
    monkeypatch.setattr(LocalStorage, "read_into", counting)
    state = StoredState(stored)
    assert sorted(state) == sorted(tensors)
    assert len(state) == 5
    assert "rows" in state
    assert not read
    assert stored["rows"].part((2, 4), (5, 0)).equal(tensors["rows"][5:7])
    assert read == [16, 16]
    state["flat"].mul_(2)
    assert state["flat"].equal(tensors["flat"] * 2)
    assert read == [16, 16, 20, 8]


@pytest.mark.parametrize(
    "ask", [dict, lambda s: {**s}, lambda s: s | {}, lambda s: {} | s, copy.deepcopy,
            lambda s: dict(s.items()), lambda s: dict(zip(s, s.values(), strict=True)), lambda s: s.copy(),
            lambda s: OrderedDict(s), lambda s: {name: s.get(name) for name in s},
            lambda s: {name: s.pop(name) for name in [*s]}, lambda s: dict(s.popitem() for _ in [*s]),
            lambda s: {name: s.setdefault(name) for name in s}, lambda s: pickle.loads(pickle.dumps(s))],
)  # fmt: skip
def test_a_state_gives_tensors_in_every_way_that_a_dict_has(tmp_path: Path, ask: Any):
    tensors, stored = parts_of(tmp_path)
    told = ask(StoredState(stored))
    assert told.keys() == tensors.keys()
    assert all(type(value) is Tensor for value in dict.values(told))
    assert all(value.equal(tensors[name]) for name, value in told.items())


class Small(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layer.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.tied(self.layer(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def saved_small(path: str) -> Small:
    module = Small()
    trainer = quiet(max_steps=2)
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, 3)), 1))
    trainer.save_checkpoint(path)
    return module


def test_a_stores_files_are_fetched_once_though_they_are_verified_first(
    monkeypatch: pytest.MonkeyPatch,
):
    module = saved_small("memory://slices/a.ckpt")
    fetched: list[str] = []
    cat_file = MemoryFileSystem.cat_file

    def counting(
        self: Any, path: str, start: Any = None, end: Any = None, **o: Any
    ) -> Any:
        # What is less than a block is the header of a file.
        is_header = start == 0 and end == 2**16
        fetched.extend([] if is_header else [path.rpartition("/")[2]])
        return cat_file(self, path, start=start, end=end, **o)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    loaded = Small.load_from_checkpoint("memory://slices/a.ckpt")
    assert fetched.count("model.safetensors") == 1
    assert fetched.count("optimizer.safetensors") == 1
    for name, value in module.state_dict().items():
        assert loaded.state_dict()[name].equal(value)


def test_weights_are_loaded_into_a_module_on_the_meta_device(tmp_path: Path):
    module = saved_small(str(tmp_path / "a.ckpt"))
    with torch.device("meta"):
        loaded = Small.load_from_checkpoint(tmp_path / "a.ckpt")
    for name, value in module.state_dict().items():
        assert loaded.state_dict()[name].equal(value)
    assert loaded.tied.weight is loaded.layer.weight


class WithConstant(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.ones(2), persistent=False)


def test_what_a_checkpoint_lacks_is_not_left_on_the_meta_device(tmp_path: Path):
    saved_small(str(tmp_path / "a.ckpt"))
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"constant is on the meta device"),
    ):
        WithConstant.load_from_checkpoint(tmp_path / "a.ckpt")


class Changes(Small):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layer.bias"] += 1
        checkpoint["state_dict"]["tied.bias"] = torch.zeros(3)
        moments = checkpoint["optimizer_states"][0]["state"][1]
        self.register_buffer("kept", moments["exp_avg"])


class Exchanged(Small):
    """Has given its biases each other's names since."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self.exchange)

    @staticmethod
    def exchange(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        one, other = "layer.bias", "tied.bias"
        state[one], state[other] = state[other], state[one]


class KeepsItsHead(Small):
    """Takes from a checkpoint only a part."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # fmt: skip
        kept = {k: v for k, v in state_dict.items() if not k.startswith("layer.")}
        return super().load_state_dict(kept, strict=False, assign=assign)


def test_code_that_renames_or_leaves_out_tensors_has_its_say(tmp_path: Path):
    """Nothing is read into the module before that code is called."""
    module = saved_small(str(tmp_path / "a.ckpt"))
    loaded = Exchanged.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.layer.bias.equal(module.tied.bias)
    assert loaded.tied.bias.equal(module.layer.bias)
    assert not module.tied.bias.equal(module.layer.bias)
    torch.manual_seed(7)
    untouched = KeepsItsHead().layer.bias
    torch.manual_seed(7)
    assert KeepsItsHead.load_from_checkpoint(tmp_path / "a.ckpt").layer.bias.equal(
        untouched
    )


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    storage = LocalStorage()
    storage.note(str(path))
    memory = bytearray(2)
    storage.read_into(str(path), memoryview(memory), 1)
    assert memory == b"23"
    path.write_bytes(b"56789")
    with pytest.raises(OSError, match="was replaced while it was read"):
        storage.read_into(str(path), memoryview(memory), 1)


def test_hooks_find_tensors_and_change_them(tmp_path: Path):
    module = saved_small(str(tmp_path / "a.ckpt"))
    changed = Changes()
    changed.strict_loading = False
    quiet(max_steps=2).fit(
        changed,
        DataLoader(TensorDataset(torch.ones(4, 3)), 1),
        ckpt_path=tmp_path / "a.ckpt",
    )
    assert changed.layer.bias.equal(module.layer.bias + 1)
    assert not changed.tied.bias.any()
    assert changed.layer.weight.equal(module.layer.weight)
    assert changed.kept.shape == (3,)
