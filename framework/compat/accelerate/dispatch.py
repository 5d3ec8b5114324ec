"""Models that are too big for one device: made without memory, and spread over devices, CPU and disk for inference."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .device_maps import check_device_map, complete_device_map
from .environment import parse_flag_from_env
from .hooks import (
    GUARDED,
    AlignDevicesHook,
    CpuOffload,
    LayerwiseCastingHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
)
from .loading import load_checkpoint_in_model
from .logging import get_logger
from .offload import (
    OffloadedWeightsLoader,
    extract_submodules_state_dict,
    holds_offloaded,
    offload_state_dict,
)
from .tensors import TiedWeights, find_tied_parameters, owner_of, retie_parameters

_logger = get_logger("accelerate.big_modeling")
# Layers whose weights may be kept in a type in which they cannot be computed.
SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


@contextmanager
def init_on_device(
    device: torch.device | str, include_buffers: bool | None = None
) -> Iterator[None]:
    """A context in which modules are made on a device.

    Args:
        device: the device.
        include_buffers: make their buffers there, too (default: the environment's ``ACCELERATE_INIT_INCLUDE_BUFFERS``,
            else not).
    """
    if include_buffers is None:
        include_buffers = parse_flag_from_env("ACCELERATE_INIT_INCLUDE_BUFFERS")
    place = torch.device(device)
    if include_buffers:
        with place:
            yield
        return

    def move(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.device == place:
            return None
        moved = parameter.detach().to(place)
        new = type(parameter)(moved, requires_grad=parameter.requires_grad)
        vars(new).update(vars(parameter))
        return new

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """A context in which modules are made without memory for their parameters (on ``"meta"``).

    Args:
        include_buffers: as of :func:`init_on_device`.
    """
    with init_on_device("meta", include_buffers):
        yield


def _execution_device(model: nn.Module, given: Any) -> Any:
    return next(iter(model.parameters())).device if given is None else given


def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    preload_module_classes: list[str] | None = None,
) -> nn.Module:
    """Keep a model's weights on the CPU, from where each part fetches its own when it is called.

    Args:
        model: the model.
        execution_device: where it computes (default: where its first parameter is).
        offload_buffers: fetch buffers, too; otherwise they are on that device.
        state_dict: the weights on the CPU (default: the model's).
        preload_module_classes: names of classes whose modules fetch the weights of their parts, too.
    """
    device = _execution_device(model, execution_device)
    if state_dict is None:
        state_dict = {name: one.to("cpu") for name, one in model.state_dict().items()}
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    attach_align_device_hook(
        model,
        execution_device=device,
        offload=True,
        offload_buffers=offload_buffers,
        weights_map=state_dict,
        preload_module_classes=preload_module_classes,
    )
    return model


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: Any = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Keep a whole model on the CPU until it is called, such as one of several that are called in turn.

    Args:
        model: the model.
        execution_device: where it computes (default: the accelerator, if there is one).
        prev_module_hook: of the model before it, which leaves the device when this one is called.

    Returns:
        The model, and what brings it to the CPU again.
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: list[str] | None = None,
) -> nn.Module:
    """Keep a model's weights on disk, from where each part reads its own when it is called.

    Args:
        model: the model.
        offload_dir: the folder; if it holds weights already, they are used.
        execution_device: where it computes (default: where its first parameter is).
        offload_buffers: as of :func:`cpu_offload`.
        preload_module_classes: the same.
    """
    if not holds_offloaded(offload_dir):
        offload_state_dict(offload_dir, model.state_dict())
    return cpu_offload(
        model,
        execution_device,
        offload_buffers,
        OffloadedWeightsLoader(save_folder=offload_dir),
        preload_module_classes,
    )


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Any],
    main_device: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Spread a model over devices, CPU and disk, for inference in one process.

    Args:
        model: the model.
        device_map: where each part goes; those on ``"cpu"`` and ``"disk"`` compute on the main device.
        main_device: that device (default: the first accelerator of the map, else the CPU).
        state_dict: the weights of parts on the CPU (default: the model's).
        offload_dir: where those for ``"disk"`` are, or are written to.
        offload_index: in which files they are, if not in that folder's.
        offload_buffers: as of :func:`cpu_offload`.
        skip_keys: keys of inputs and outputs that are not moved.
        preload_module_classes: as of :func:`cpu_offload`.
        force_hooks: put hooks on the model though all of it is on one device.

    Raises:
        ValueError: if a tensor goes nowhere, or a folder is missing.
    """
    check_device_map(model, device_map)
    devices = list(dict.fromkeys(device_map.values()))
    if len(devices) == 1 and devices[0] != "disk" and not force_hooks:
        model.to(devices[0])
        model.hf_device_map = dict(device_map)  # type: ignore[assignment] # as Accelerate's
        return model
    if main_device is None:
        main_device = next((d for d in devices if d not in ("cpu", "disk")), "cpu")
    away = ("disk",) if main_device in ("cpu", "mps") else ("cpu", "disk")
    weights = _weights_elsewhere(
        model, device_map, away, state_dict, offload_dir, offload_index, main_device
    )
    places = {
        name: main_device if device in ("cpu", "disk") else device
        for name, device in device_map.items()
    }
    ties = find_tied_parameters(model)
    attach_align_device_hook_on_blocks(
        model,
        execution_device={**places, "": main_device},
        offload={name: device in away for name, device in device_map.items()},
        weights_map=weights,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        tied_params_map=_places_of_ties(model, ties),
    )
    outside = [device for device in ("cpu", "disk") if device in devices]
    if outside:
        _logger.warning(
            f"Some parameters are on the meta device because they were offloaded to the {' and '.join(outside)}."
        )
    retie_parameters(model, ties)
    _guard(model)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment] # as Accelerate's
    return model


def _weights_elsewhere(
    model: nn.Module,
    device_map: Mapping[str, Any],
    away: tuple[str, ...],
    state_dict: Mapping[str, Tensor] | None,
    folder: str | os.PathLike[str] | None,
    index: Mapping[str, Any] | None,
    main_device: Any,
) -> OffloadedWeightsLoader | None:
    """The weights of parts that are fetched when they are called; those for the disk are written, if they are not."""
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    on_cpu = [name for name, device in device_map.items() if device == "cpu"]
    if on_cpu and "cpu" in away and state_dict is None:
        state_dict = extract_submodules_state_dict(model.state_dict(), on_cpu)
    if on_disk and index is None:
        if folder is None:
            raise ValueError(
                "We need an `offload_dir` to dispatch this model according to this `device_map`, the following "
                f"submodules need to be offloaded: {', '.join(on_disk)}."
            )
        if not holds_offloaded(folder):
            state = extract_submodules_state_dict(model.state_dict(), on_disk)
            offload_state_dict(folder, state)
    folder = folder if on_disk else None
    if state_dict is None and folder is None and index is None:
        return None
    device = None if index is None else main_device
    return OffloadedWeightsLoader(state_dict, folder, index, device)


def _places_of_ties(model: nn.Module, ties: list[list[str]]) -> TiedWeights:
    """Room to note where weights are that several parts have, so that each is moved once."""
    places: TiedWeights = {}
    for name in (name for group in ties for name in group):
        owner, own_name = owner_of(model, name)
        weight = getattr(owner, own_name)
        if weight.device.type != "meta":
            places[weight.data_ptr()] = {}
    return places


def _guard(model: nn.Module) -> None:
    """Let a model that is spread warn when it is moved, or refuse, as its hooks would not know."""

    def guarded(move: Any) -> Any:
        @functools.wraps(move)
        def call(*args: Any, **kwargs: Any) -> Any:
            if move.__name__ != "to" or _names_device(args, kwargs):
                _logger.warning(
                    "You shouldn't move a model that is dispatched using accelerate hooks."
                )
            if any(one.device.type == "meta" for one in model.parameters()):
                raise RuntimeError(
                    "You can't move a model that has some modules offloaded to cpu or disk."
                )
            return move(*args, **kwargs)

        return call

    for name in GUARDED:
        setattr(model, name, guarded(getattr(model, name)))


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``to`` names a device, and not a type only."""
    given = [*args[:1], *(kwargs.get(name) for name in ("device", "tensor", "other"))]
    return any(
        one is not None and not isinstance(one, torch.dtype | bool) for one in given
    )


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: Any = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """Load weights into a model, part by part to where a map says, and spread it so.

    Args:
        model: the model, which may be on ``"meta"``.
        checkpoint: as of :func:`~.loading.load_checkpoint_in_model`, as are ``dtype``, ``offload_state_dict`` and
            what follows ``force_hooks``.
        device_map: as of :func:`dispatch_model`; or ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or
            ``"sequential"``. None loads the weights to where the model is.
        max_memory: bytes to use of each device, for such a word.
        no_split_module_classes: names of classes whose modules stay in one, for such a word.
        offload_folder: where weights for ``"disk"`` are written.
        offload_buffers: as of :func:`dispatch_model`, as are ``skip_keys``, ``preload_module_classes`` and
            ``force_hooks``.
        dtype: to convert floating-point tensors to.
        offload_state_dict: keep weights for the CPU on disk until all are read (default: if parts go to the disk).
        skip_keys: see above.
        preload_module_classes: the same.
        force_hooks: the same.
        strict: the same.
        full_state_dict: the same.
        broadcast_from_rank0: the same.

    Raises:
        ValueError: if a map is none, or there are no weights.
    """
    device_map = complete_device_map(
        model, device_map, max_memory, no_split_module_classes, dtype, offload_buffers
    )
    if offload_state_dict is None:
        offload_state_dict = "disk" in (device_map or {}).values()
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_state_dict=offload_state_dict,
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
    )


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Collection[str] | None = None,
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> None:
    """Keep the weights of a model's linear and convolutional layers in a small type, and compute in a larger one.

    Args:
        module: the model.
        storage_dtype: in which they are kept.
        compute_dtype: in which the layers compute.
        skip_modules_pattern: expressions; layers whose names hold one stay as they are.
        skip_modules_classes: modules of these classes stay as they are, with their parts.
        non_blocking: do not wait until weights are converted.
    """
    patterns = skip_modules_pattern or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def attach(part: nn.Module, name: str) -> None:
        if isinstance(part, skip_modules_classes or ()):
            return
        if any(re.search(pattern, name) for pattern in patterns):
            return
        if isinstance(part, SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING):
            hook = LayerwiseCastingHook(storage_dtype, compute_dtype, non_blocking)
            add_hook_to_module(part, hook, append=True)
            return
        for child_name, child in part.named_children():
            attach(child, f"{name}.{child_name}" if name else child_name)

    attach(module, "")


def refuse_recurrent_layers(model: nn.Module) -> None:
    """Raise for a model whose sequences cannot be divided among processes, as a state runs along them.

    Raises:
        ValueError: naming its recurrent layers.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    recurrent = sorted({kind for kind in kinds if "linear_attention" in kind})
    if recurrent:
        raise ValueError(
            f"Sequence parallelism does not support attention layers of type {recurrent} (model "
            f"{type(model).__name__}): a state runs along the sequence there. Use a model with full attention"
        )
