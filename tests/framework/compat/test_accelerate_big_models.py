"""Models that are spread over devices, CPU and disk under Accelerate's names compute as before, and as mapped there."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from loopwright import accelerate as ours
from loopwright.accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from loopwright.accelerate.big_modeling import attach_layerwise_casting_hooks
from loopwright.accelerate.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from loopwright.accelerate.state import AcceleratorState, GradientState
from loopwright.accelerate.utils import (
    OffloadedWeightsLoader,
    align_module_device,
    get_balanced_memory,
    has_offloaded_params,
    load_offloaded_weight,
    offload_state_dict,
    offload_weight,
    set_module_tensor_to_device,
)


@pytest.fixture(autouse=True)
def _fresh_states() -> Iterator[None]:
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


class Block(nn.Module):
    """Layers, a buffer that a state has, and one that it has not."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.down = nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).relu()) * self.scale


class Blocks(nn.Module):
    """Blocks between layers that may be tied."""

    def __init__(self, count: int = 3, width: int = 4, ties: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(count)])
        self.last = nn.Linear(width, width)
        if ties:
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Plus(ModelHook):
    """Adds to the input, and doubles the output."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return (args[0] + 1, *args[1:]), kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 2


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_parameters() if one.device.type == "meta"]


def test_hooks_change_what_goes_in_and_comes_out_and_are_taken_off():
    layer = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    plain, shifted = layer(x), layer(x + 1) * 2
    add_hook_to_module(layer, Plus())
    assert torch.equal(layer(x), shifted)
    add_hook_to_module(layer, Plus())
    assert torch.equal(layer(x), shifted)
    add_hook_to_module(layer, Plus(), append=True)
    assert isinstance(layer._hf_hook, SequentialHook)
    assert not torch.equal(layer(x), shifted)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), plain)
    assert "forward" not in vars(layer) or layer.forward == nn.Linear.forward.__get__(
        layer
    )
    assert not hasattr(layer, "_hf_hook")


def test_a_hook_may_compute_without_gradients():
    layer = nn.Linear(2, 2)
    hook = ModelHook()
    hook.no_grad = True
    add_hook_to_module(layer, hook)
    assert not layer(torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_are_there_in_a_call_only(
    tmp_path: Path, place: str, buffers: bool, ties: bool
):
    model = Blocks(ties=ties).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if place == "cpu":
        cpu_offload(model, offload_buffers=buffers)
    else:
        disk_offload(model, tmp_path, offload_buffers=buffers)
    assert len(on_meta(model)) == len(list(model.named_parameters()))
    assert has_offloaded_params(model.blocks[0].up)
    assert torch.allclose(model(x), expected)
    assert len(on_meta(model)) == len(list(model.named_parameters()))
    with align_module_device(model.first):
        assert torch.equal(model.first.weight, state["first.weight"])
    whole = ours.Accelerator(cpu=True).get_state_dict(model)
    assert set(whole) == set(state)
    assert all(torch.equal(whole[name], state[name]) for name in state)
    remove_hook_from_submodules(model)
    assert not on_meta(model)
    assert torch.allclose(model(x), expected)


def test_a_model_goes_where_its_map_says_and_is_not_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = Blocks().eval()
    x = torch.randn(5, 4)
    expected = model(x)
    device_map = {"first": "cpu", "blocks": "disk", "last": "cpu"}
    with pytest.raises(ValueError, match="`offload_dir`"):
        dispatch_model(Blocks(), device_map)
    with pytest.raises(ValueError, match=r"any device for .* last\.weight"):
        dispatch_model(model, {"first": "cpu", "blocks": "disk"})
    with caplog.at_level(logging.WARNING):
        dispatch_model(model, device_map, offload_dir=tmp_path)
    assert "offloaded to the cpu and disk" in caplog.text
    assert model.hf_device_map == device_map
    assert {name.partition(".")[0] for name in on_meta(model)} == {"blocks"}
    assert torch.allclose(model(x), expected)
    with pytest.raises(RuntimeError, match="can't move a model"):
        model.to("cpu")
    remove_hook_from_submodules(model)
    model.to("cpu")


def test_weights_are_loaded_to_where_a_map_says(tmp_path: Path):
    model = Blocks().eval()
    x = torch.randn(5, 4)
    expected = model(x)
    accelerator = ours.Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "whole", max_shard_size=600)
    with init_empty_weights():
        empty = Blocks()
    assert len(on_meta(empty)) == len(list(empty.named_parameters()))
    assert empty.blocks[0].scale.device.type == "cpu"
    device_map = {"first": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    device_map |= {"blocks.2": "disk", "last": "cpu"}
    load_checkpoint_and_dispatch(
        empty.eval(),
        tmp_path / "whole",
        device_map=device_map,
        offload_folder=tmp_path / "disk",
    )
    assert torch.allclose(empty(x), expected)
    # What was spread is saved whole.
    accelerator.save_model(empty, tmp_path / "again")
    again = load_checkpoint_and_dispatch(Blocks().eval(), tmp_path / "again")
    assert torch.allclose(again(x), expected)
    with pytest.raises(ValueError, match="'balanced_low_0' or 'sequential'"):
        load_checkpoint_and_dispatch(Blocks(), tmp_path / "again", device_map="wide")
    with pytest.raises(ValueError, match="`offload_folder`"):
        load_checkpoint_and_dispatch(
            Blocks(), tmp_path / "again", device_map={"": "disk"}
        )


def test_weights_keep_their_type_if_they_are_whole_numbers(tmp_path: Path):
    model: Any = nn.BatchNorm1d(3)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    load_checkpoint_and_dispatch(
        model, tmp_path / "weights.bin", device_map={"": "cpu"}, dtype="float16"
    )
    assert model.running_mean.dtype == torch.float16
    assert model.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("whole", [None, ["Block"], "Block"])
@pytest.mark.parametrize("falls_back", [False, True])
def test_device_maps_are_accelerates(ties: bool, whole: Any, falls_back: bool):
    """For memory from far too little to enough, on one device and on two."""
    for count in (1, 3):
        model = Blocks(count, ties=ties)
        for size in (60, 150, 300, 500, 700, 1100, 1700, 4000):
            memories: list[dict[Any, Any]] = [
                {0: size},
                {0: size, "cpu": 900},
                {0: size, 1: 2 * size, "cpu": 500},
                {"cpu": size},
            ]
            for memory in memories:
                options = {
                    "no_split_module_classes": whole,
                    "fallback_allocation": falls_back,
                    "offload_buffers": True,
                }
                got = infer_auto_device_map(model, dict(memory), **options)
                try:
                    expected = accelerate.infer_auto_device_map(
                        model, dict(memory), **options
                    )
                except IndexError:
                    # It looks for a tied part among those that it has placed already.
                    assert ties
                    assert falls_back
                else:
                    assert got == dict(expected), (count, memory)
                for low_zero in (False, True):
                    assert get_balanced_memory(
                        model,
                        dict(memory),
                        no_split_module_classes=whole,
                        low_zero=low_zero,
                    ) == accelerate.utils.get_balanced_memory(
                        model,
                        dict(memory),
                        no_split_module_classes=whole,
                        low_zero=low_zero,
                    )


def test_a_map_is_asked_for_by_its_purpose():
    model = Blocks()
    with pytest.raises(ValueError, match="Device gpu is not recognized"):
        infer_auto_device_map(model, {"gpu": 100})
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        infer_auto_device_map(model, {0: 350, "cpu": "1MB"})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]
)
def test_weights_on_disk_are_read_as_they_were(tmp_path: Path, dtype: torch.dtype):
    for weight in (torch.arange(6).reshape(2, 3).to(dtype), torch.tensor(3).to(dtype)):
        index: Any = offload_weight(weight, "weight", tmp_path, index={})
        theirs: Any = accelerate.utils.offload_weight(weight, "theirs", tmp_path, {})
        assert index == {"weight": theirs["theirs"]}
        for name in ("weight", "theirs"):
            read = load_offloaded_weight(tmp_path / f"{name}.dat", index["weight"])
            assert read.dtype == dtype
            assert torch.equal(read.float(), weight.float())


def test_a_loader_of_weights_prefers_those_in_memory(tmp_path: Path):
    offload_state_dict(tmp_path, {"a": torch.zeros(2), "b": torch.ones(3)})
    weights = OffloadedWeightsLoader({"a": torch.full((2,), 5.0)}, tmp_path)
    assert list(weights) == ["a", "b"]
    assert weights["a"].tolist() == [5.0, 5.0]
    assert weights["b"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="Need either"):
        OffloadedWeightsLoader()


def test_a_tensor_is_put_on_a_device_by_its_name():
    model: Any = Blocks()
    set_module_tensor_to_device(model, "blocks.0.up.weight", "meta")
    assert on_meta(model) == ["blocks.0.up.weight"]
    with pytest.raises(ValueError, match="we need a `value`"):
        set_module_tensor_to_device(model, "blocks.0.up.weight", "cpu")
    with pytest.raises(ValueError, match="this looks incorrect"):
        set_module_tensor_to_device(
            model, "blocks.0.up.weight", "cpu", value=torch.zeros(1)
        )
    with pytest.raises(ValueError, match="does not have a parameter or a buffer"):
        set_module_tensor_to_device(model, "first.weights", "cpu")
    set_module_tensor_to_device(
        model, "blocks.0.up.weight", "cpu", value=torch.ones(8, 4), dtype="float16"
    )
    assert model.blocks[0].up.weight.dtype == torch.float16
    assert isinstance(model.blocks[0].up.weight, nn.Parameter)


def test_whole_models_take_turns_on_the_device():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.randn(1, 2)
    expected = second(first(x))
    first, hook = cpu_offload_with_hook(first, "cpu")
    second, other = cpu_offload_with_hook(second, "cpu", prev_module_hook=hook)
    assert torch.equal(second(first(x)), expected)
    hook.remove()
    other.offload()
    other.remove()
    assert not hasattr(second, "_hf_hook")


def test_weights_are_kept_in_a_small_type_and_computed_in_a_larger_one():
    model: Any = Blocks(1).eval()
    x = torch.randn(2, 4)
    attach_layerwise_casting_hooks(
        model, torch.bfloat16, torch.float32, skip_modules_pattern=["last"]
    )
    assert model.first.weight.dtype == torch.bfloat16
    assert model.last.weight.dtype == torch.float32
    assert model.blocks[0].norm.weight.dtype == torch.float32
    assert model(x).dtype == torch.float32
    assert model.blocks[0].down.weight.dtype == torch.bfloat16
