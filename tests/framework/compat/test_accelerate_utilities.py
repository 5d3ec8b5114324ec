"""Accelerate's small functions, and what several processes do with them."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import platform
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset as HubDataset
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.accelerate import (
    Accelerator,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    notebook_launcher,
)
from loopwright.accelerate.data_loader import (
    DataLoaderDispatcher,
    DataLoaderShard,
    prepare_data_loader,
)
from loopwright.accelerate.logging import get_logger
from loopwright.accelerate.state import AcceleratorState, GradientState
from loopwright.accelerate.tracking import MLflowTracker
from loopwright.accelerate.utils import (
    CannotPadNestedTensorWarning,
    TorchContextParallelConfig,
    check_os_kernel,
    compile_regions,
    concatenate,
    convert_dict_to_env_variables,
    convert_file_size_to_int,
    convert_outputs_to_fp32,
    extract_model_from_parallel,
    get_model_tp_size,
    load_fsdp_model,
    load_fsdp_optimizer,
    merge_fsdp_weights,
    pad_across_processes,
    patch_environment,
    purge_accelerate_environment,
    save,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from loopwright.framework import launch

VARIABLE = "ACCELERATE_SOME_VARIABLE"


@pytest.fixture(autouse=True)
def _fresh_states() -> Iterator[None]:
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


@purge_accelerate_environment
class _Sets:
    mark = "kept"

    def test_one(self) -> str | None:
        os.environ[VARIABLE] = "1"
        return os.environ[VARIABLE]


class _SetsToo(_Sets):
    def test_two(self) -> None:
        os.environ[VARIABLE] = "2"


def test_variables_are_as_before_a_decorated_test_and_in_subclasses():
    assert _Sets().test_one() == "1"
    assert VARIABLE not in os.environ
    _SetsToo().test_two()
    assert VARIABLE not in os.environ

    @purge_accelerate_environment
    def change() -> None:
        os.environ[VARIABLE] = "other"
        os.environ["ANOTHER_PACKAGES"] = "1"

    change.marks = ["slow"]
    with patch_environment(**{VARIABLE: "before"}):
        change()
        assert os.environ[VARIABLE] == "before"
    assert os.environ.pop("ANOTHER_PACKAGES") == "1"
    assert purge_accelerate_environment(change).marks == ["slow"]


def test_what_cannot_be_passed_on_is_named(caplog: pytest.LogCaptureFixture):
    lines = convert_dict_to_env_variables({"A": "1", "BAD": "<x", "NONE": "", "B": "2"})
    assert lines == ["A=1\n", "B=2\n"]
    assert [record.name for record in caplog.records] == [
        "accelerate.utils.environment"
    ] * 2
    assert "BAD" in caplog.text


def test_old_kernels_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for system, release, warns in (
        ("Linux", "5.4.0-35-generic", True),
        ("Linux", "6.1.0", False),
        ("Darwin", "5.4.0", False),
    ):
        caplog.clear()
        machine = SimpleNamespace(system=system, release=release)
        monkeypatch.setattr(platform, "uname", lambda machine=machine: machine)
        check_os_kernel()
        assert ("5.4.0" in caplog.text and "5.5.0" in caplog.text) is warns


def test_tensors_are_joined_and_padded_where_that_can_be():
    assert concatenate(["text"]) == "text"
    joined = concatenate([(torch.zeros(1), [torch.ones(2)])] * 2)
    assert [len(joined[0]), len(joined[1][0])] == [2, 4]
    with pytest.raises(TypeError, match="Can only concatenate tensors"):
        concatenate([{"a": "text"}] * 2)
    Accelerator(cpu=True)
    tensor = torch.zeros(2, 3)
    assert pad_across_processes(tensor, dim=-3) is tensor
    assert pad_across_processes({"a": tensor}, dim=1)["a"].shape == (2, 3)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    with pytest.warns(CannotPadNestedTensorWarning):
        assert pad_across_processes(nested) is nested
    with pytest.raises(TypeError, match="Unsupported types"):
        pad_across_processes(["text"])


def test_sizes_are_read_in_their_units():
    sizes = {"0MB": 0, "1.5GB": 1.5e9, "512KiB": 2**19, "8Mb": 1e6, 7: 7}
    assert {name: convert_file_size_to_int(name) for name in sizes} == sizes
    for wrong in ("5MBB", "5k0MB", "-1GB"):
        with pytest.raises(ValueError, match="no size such as"):
            convert_file_size_to_int(wrong)


def test_a_model_is_got_out_of_what_is_around_it():
    model: Any = nn.Sequential(nn.Linear(2, 2))
    around = torch.compile(nn.DataParallel(model))
    kept = extract_model_from_parallel(around)
    assert kept is around
    assert kept._orig_mod is model
    assert extract_model_from_parallel(around, keep_torch_compile=False) is model
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert "forward" not in vars(model)
    pickle.dumps(model)
    part = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
    assert isinstance(extract_model_from_parallel(part)[0], nn.DataParallel)
    assert isinstance(extract_model_from_parallel(part, recursive=True)[0], nn.Linear)


def test_tensor_parallel_sizes_are_found_where_transformers_writes_them():
    model: Any = nn.Linear(1, 1)
    assert get_model_tp_size(model) is None
    model.tp_size = 2
    assert get_model_tp_size(model) == 2
    model.tp_size = None
    model.config = SimpleNamespace(distributed_config={"tp_size": 8})
    assert get_model_tp_size(model) == 8


def test_shared_weights_are_written_once_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    Accelerator(cpu=True)
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    save(model.state_dict(), tmp_path / "model.safetensors", safe_serialization=True)
    assert set(load_file(tmp_path / "model.safetensors")) == {"a.weight", "a.bias"}
    assert "Removed shared tensor ['b.weight', 'b.bias']" in caplog.text


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = type(self.blocks[0]).__name__
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_are_compiled_one_by_one_beside_the_model():
    model: Any = _Blocks()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return type(self).forward(self, x)

    model.forward = MethodType(forward, model)
    x = torch.ones(1, 2)
    compiled: Any = compile_regions(model, backend="eager")
    assert torch.equal(compiled(x), _Blocks.forward(model, x))
    assert compiled.seen == "OptimizedModule"
    assert model.seen == "Linear"
    assert list(compiled.parameters()) == list(model.parameters())
    assert extract_model_from_parallel(compiled, keep_torch_compile=False) is model


class _Outer(logging.LoggerAdapter):
    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        self.logger.log(level, msg, *args, **{**kwargs, "stacklevel": 3})


def test_records_name_the_line_that_logs(caplog: pytest.LogCaptureFixture):
    logger = get_logger(__name__)
    logger.warning("by itself")
    logger.warning_once("once")
    _Outer(logger, {}).warning("through an adapter")
    assert [record.funcName for record in caplog.records] == [
        "test_records_name_the_line_that_logs"
    ] * 3


@pytest.mark.parametrize("word", ["False", "0", "no", "true", "1"])
def test_nested_runs_are_asked_for_by_a_word(word: str):
    with patch_environment(MLFLOW_NESTED_RUN=word):
        tracker = MLflowTracker("experiment", nested_run=True)
    assert tracker.nested_run is (word in ("true", "1"))


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher])
def test_loaders_tell_their_positions_as_torchdatas(kind: Any):
    options: Any = {"batch_size": 4}
    samples: Any = range(32)
    theirs: Any = StatefulDataLoader(samples, **options)
    own = kind(samples, use_stateful_dataloader=True, **options)
    for loader in (theirs, own):
        for number, _ in enumerate(loader):
            if number == 2:
                break
    assert own.state_dict() == theirs.state_dict()
    again = kind(samples, use_stateful_dataloader=True, **options)
    again.load_state_dict(theirs.state_dict())
    assert [batch.tolist() for batch in again] == [
        list(range(begin, begin + 4)) for begin in range(12, 32, 4)
    ]


def test_loaders_are_pickled_with_their_accelerator():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(6))))
    skipped = accelerator.prepare(accelerator.skip_first_batches(loader, 2))
    read = pickle.loads(pickle.dumps(accelerator))._dataloaders
    for one, other in zip((loader, skipped), read, strict=True):
        assert isinstance(other, DataLoaderShard)
        assert list(other) == list(one)
    assert len(list(read[1])) == 4


def test_streams_of_as_many_files_as_processes_are_divided_by_files():
    stream: Any = HubDataset.from_dict({"x": list(range(8))}).to_iterable_dataset(2)
    found = []
    for index in (0, 1):
        loader = prepare_data_loader(
            DataLoader(copy.copy(stream), batch_size=2),
            num_processes=2,
            process_index=index,
            dispatch_batches=False,
        )
        found.append([batch["x"].tolist() for batch in loader])
    assert found == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_quantized_models_with_parts_elsewhere_are_refused():
    model: Any = nn.Linear(2, 2)
    model.is_loaded_in_8bit = True
    model.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="CPU or disk offload"):
        Accelerator(cpu=True).prepare_model(model)


# Several processes -------------------------------------------------------------------------------------------------


def _fail_once(folder: str) -> int:
    marker = Path(folder) / f"failed_{os.environ['RANK']}"
    if not marker.exists():
        marker.touch()
        raise RuntimeError("the first try fails")
    return Accelerator(cpu=True).num_processes


@pytest.mark.slow
def test_a_notebooks_function_is_called_again_when_it_fails(tmp_path: Path):
    args = (str(tmp_path),)
    with pytest.raises(RuntimeError, match="the first try fails"):
        notebook_launcher(_fail_once, args, num_processes=2)
    for file in tmp_path.iterdir():
        file.unlink()
    # Each process may fail once before the other one has.
    assert notebook_launcher(_fail_once, args, num_processes=2, max_restarts=2) == 2


Sizes = namedtuple("Sizes", "shape names")


def test_a_parallelism_names_its_dimensions():
    with patch_environment(PARALLELISM_CONFIG_DP_SHARD_SIZE="4"):
        config = ParallelismConfig(dp_replicate_size=2, tp_size=2)
    assert Sizes(*reversed(config._get_mesh())) == Sizes(
        (2, 4, 2), ("dp_replicate", "dp_shard", "tp")
    )
    assert config.total_size == 16
    assert config.dp_dim_names == ["dp_replicate", "dp_shard"]
    assert config.non_dp_dim_names == ["tp"]
    with pytest.raises(ValueError, match="mutually exclusive"):
        ParallelismConfig(cp_size=2, sp_size=2)
    with pytest.raises(ValueError, match="dp_shard_size must be at least 1"):
        ParallelismConfig(dp_shard_size=0)
    with pytest.raises(ValueError, match="Invalid cp_comm_strategy: wide"):
        TorchContextParallelConfig("wide")
    with pytest.raises(NotImplementedError, match="tp_size=2"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match=r"total_size \(3\) does not match"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=3))


def _train_sharded(folder: str, kind: str) -> list[list[float]]:
    """Train, write, go on, read again, go on: the same weights; then merge what was written."""
    torch.manual_seed(0)
    plugin = FullyShardedDataParallelPlugin(state_dict_type=kind)
    sizes = ParallelismConfig(dp_shard_size=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=sizes)
    assert accelerator.distributed_type == "FSDP"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(3, 4)

    def step() -> Any:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        return accelerator.get_state_dict(model)

    step()
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    written = accelerator.get_state_dict(model)
    expected = step()
    load_fsdp_model(plugin, accelerator, model, folder)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    again = step()
    if kind == "SHARDED_STATE_DICT":
        with pytest.raises(ValueError, match="pytorch_model_fsdp_0"):
            merge_fsdp_weights(folder, folder)
        merge_fsdp_weights(Path(folder) / "pytorch_model_fsdp_0", folder)
        merged = load_file(Path(folder) / "model.safetensors")
    else:
        merged = torch.load(Path(folder) / "pytorch_model_fsdp.bin")
    if accelerator.is_main_process:
        for one, other in ((again, expected), (merged, written)):
            assert one.keys() == other.keys()
            assert all(torch.allclose(one[name], other[name]) for name in one)
    return [weights.tolist() for weights in merged.values()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_sharded_weights_are_written_read_and_merged(tmp_path: Path, kind: str):
    assert len(launch(_train_sharded, (str(tmp_path), kind), 2)) == 4
