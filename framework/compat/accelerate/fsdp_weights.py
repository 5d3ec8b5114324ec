"""Accelerate's files for what FSDP shards: each process writes its part, or the main one writes all."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.prepared import unwrapped
from .checkpoints import MODEL_NAME, OPTIMIZER_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from .logging import get_logger
from .other import save
from .state import PartialState

if TYPE_CHECKING:
    from .accelerator import Accelerator

_logger = get_logger("accelerate.utils.fsdp_utils")
_FSDP_MODEL_NAME = f"{MODEL_NAME}_fsdp"


def enable_fsdp_ram_efficient_loading() -> None:
    """Let transformers load weights in the main process only, as FSDP sends them to the others."""
    os.environ.setdefault("ACCELERATE_USE_FSDP", "True")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "True"


def disable_fsdp_ram_efficient_loading() -> None:
    """Let transformers load weights in all processes."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"


def _is_whole(plugin: Any) -> bool:
    """Whether a plugin asks for one file with all values."""
    kind = plugin.state_dict_type
    return str(getattr(kind, "name", kind)).upper() == "FULL_STATE_DICT"


def _options(is_whole: bool) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=is_whole, cpu_offload=is_whole)


def _refuse_own_ways(adapter_only: bool, use_dcp: bool) -> None:
    """Raise for ways to write that are not served.

    Raises:
        NotImplementedError: naming the first.
    """
    for name, is_asked in (("adapter_only", adapter_only), ("use_dcp", not use_dcp)):
        if is_asked:
            raise NotImplementedError(
                f"{name}={name == 'adapter_only'} is not served here: leave it out, or use save_state, which writes "
                "for any number of processes"
            )


def _write(
    accelerator: Accelerator, key: str, state: Any, whole_path: str, parts_path: str
) -> None:
    """Write a state, whole or in parts."""
    if whole_path:
        if accelerator.is_main_process:
            torch.save(state, whole_path)
    else:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save as save_parts

        writer = FileSystemWriter(parts_path)
        save_parts({key: state}, storage_writer=writer)  # collective
    accelerator.wait_for_everyone()


def _read(key: str, state: Any, whole_path: str, parts_path: str) -> Any:
    """Read a state, whole or in parts; ``state`` is one that is built alike."""
    if whole_path:
        return torch.load(whole_path, map_location="cpu", weights_only=True)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    found = {key: state}
    reader = FileSystemReader(parts_path)
    load_parts(found, storage_reader=reader)  # collective
    return found[key]


def _paths(
    plugin: Any, folder: Any, name: str, parts_name: str, index: int
) -> tuple[str, str]:
    """The file for a whole state, empty if parts are asked for, and the folder for these."""
    number = "" if index == 0 else f"_{index}"
    whole = os.path.join(folder, f"{name}{number}.bin") if _is_whole(plugin) else ""
    return whole, os.path.join(folder, f"{parts_name}_{index}")


def save_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Accelerator,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Write a prepared model's weights to ``pytorch_model_fsdp.bin``, or in parts; all processes call this.

    Args:
        fsdp_plugin: its ``state_dict_type`` says which.
        accelerator: that has prepared the model.
        model: the model.
        output_dir: the folder.
        model_index: which of several models it is.
        adapter_only: must be False.
        use_dcp: must be True.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    _refuse_own_ways(adapter_only, use_dcp)
    os.makedirs(output_dir, exist_ok=True)
    whole, parts = _paths(
        fsdp_plugin, output_dir, _FSDP_MODEL_NAME, _FSDP_MODEL_NAME, model_index
    )
    options = _options(bool(whole))
    state = get_model_state_dict(unwrapped(model), options=options)  # collective
    _write(accelerator, "model", state, whole, parts)


def load_fsdp_model(
    fsdp_plugin: Any,
    accelerator: Accelerator,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Load what :func:`save_fsdp_model` wrote, with its arguments; all processes call this."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        set_model_state_dict,
    )

    _refuse_own_ways(adapter_only, use_dcp)
    whole, parts = _paths(
        fsdp_plugin, input_dir, _FSDP_MODEL_NAME, _FSDP_MODEL_NAME, model_index
    )
    module = unwrapped(model)
    own = {} if whole else get_model_state_dict(module)
    state = _read("model", own, whole, parts)
    set_model_state_dict(module, state, options=_options(bool(whole)))


def save_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Accelerator,
    optimizer: Any,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    use_dcp: bool = True,
) -> None:
    """Write a prepared optimizer's state to ``optimizer.bin``, or in parts; all processes call this.

    Args:
        fsdp_plugin: its ``state_dict_type`` says which.
        accelerator: that has prepared the optimizer.
        optimizer: the optimizer.
        model: the model that it trains.
        output_dir: the folder.
        optimizer_index: which of several optimizers it is.
        use_dcp: must be True.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    _refuse_own_ways(False, use_dcp)
    os.makedirs(output_dir, exist_ok=True)
    whole, parts = _paths(
        fsdp_plugin, output_dir, OPTIMIZER_NAME, OPTIMIZER_NAME, optimizer_index
    )
    state = get_optimizer_state_dict(
        unwrapped(model), unwrapped(optimizer), options=_options(bool(whole))
    )  # collective
    _write(accelerator, "optimizer", state, whole, parts)


def load_fsdp_optimizer(
    fsdp_plugin: Any,
    accelerator: Accelerator,
    optimizer: Any,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Load what :func:`save_fsdp_optimizer` wrote, with its arguments; all processes call this."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    _refuse_own_ways(adapter_only, use_dcp)
    whole, parts = _paths(
        fsdp_plugin, input_dir, OPTIMIZER_NAME, OPTIMIZER_NAME, optimizer_index
    )
    module, trained = unwrapped(model), unwrapped(optimizer)
    own = {} if whole else get_optimizer_state_dict(module, trained)
    state = _read("optimizer", own, whole, parts)
    set_optimizer_state_dict(module, trained, state, options=_options(bool(whole)))


def merge_fsdp_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """Make one file of weights that :func:`save_fsdp_model` wrote in parts; all processes call this.

    Args:
        checkpoint_dir: the folder of the parts.
        output_path: the folder of ``model.safetensors``.
        safe_serialization: False writes ``pytorch_model.bin``.
        remove_checkpoint_dir: remove the parts.

    Raises:
        ValueError: if there are none.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if not os.path.isfile(os.path.join(checkpoint_dir, ".metadata")):
        names = (f"{_FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0")
        inside = [n for n in names if os.path.isdir(os.path.join(checkpoint_dir, n))]
        advice = f" It has {' and '.join(inside)}: pass that" if inside else ""
        raise ValueError(
            f"Tried to load from {checkpoint_dir} but couldn't find a valid metadata file.{advice}"
        )
    state = PartialState()
    if state.is_main_process:
        os.makedirs(output_path, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            whole = os.path.join(folder, "whole.pt")
            dcp_to_torch_save(checkpoint_dir, whole)
            weights = torch.load(whole, weights_only=True)
        # The one key says what was written.
        if len(weights) == 1:
            weights = next(iter(weights.values()))
        name = SAFE_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME
        path = os.path.join(output_path, name)
        save(weights, path, safe_serialization=safe_serialization)
        _logger.info("Merged the parts of %s in %s", checkpoint_dir, path)
        if remove_checkpoint_dir:
            shutil.rmtree(checkpoint_dir)
    state.wait_for_everyone()
