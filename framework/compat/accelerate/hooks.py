"""Accelerate's hooks: what a module does around its ``forward``, such as to fetch weights that are elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .logging import get_logger
from .memory import clear_device_cache
from .offload import PrefixedDataset
from .operations import find_device, send_to_device
from .state import PartialState
from .tensors import (
    TiedWeights,
    get_non_persistent_buffers,
    named_module_tensors,
    owner_of,
    set_module_tensor_to_device,
)

_logger = get_logger("accelerate.hooks")
# What `dispatch_model` puts on a model, so that it is not moved by mistake.
GUARDED = ("to", "cuda", "xpu")
_FORWARD = "forward"


def _outside_of_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that ``torch.compile`` is to leave as it is."""
    left_out: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Only now, as this imports torch's compiler.
        if not left_out:
            left_out.append(torch.compiler.disable(method))
        return left_out[0](*args, **kwargs)

    return call


class ModelHook:
    """What a module does before and after its ``forward``; to be subclassed.

    Attributes:
        no_grad: compute without gradients.
    """

    no_grad = False

    def init_hook(self, module: Any) -> Any:
        """Called when the hook is put on a module; returns the module."""
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Called before ``forward``; returns its arguments as ``(args, kwargs)``."""
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        """Called after ``forward``; returns its result."""
        return output

    def detach_hook(self, module: Any) -> Any:
        """Called when the hook is taken off; returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several hooks, one after the other.

    Args:
        *hooks: these hooks.
    """

    def __init__(self, *hooks: Any) -> None:
        self.hooks = hooks

    def init_hook(self, module: Any) -> Any:
        """Called when the hook is put on a module."""
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    @_outside_of_graphs
    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Called before ``forward``."""
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    @_outside_of_graphs
    def post_forward(self, module: Any, output: Any) -> Any:
        """Called after ``forward``."""
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def detach_hook(self, module: Any) -> Any:
        """Called when the hook is taken off."""
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def _hooked_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for the ``forward`` of a module with a hook."""
    hook = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    if hook.no_grad:
        with torch.no_grad():
            output = module._old_forward(*args, **kwargs)
    else:
        output = module._old_forward(*args, **kwargs)
    return module._hf_hook.post_forward(module, output)


def _set_forward(module: Any, forward: Any) -> None:
    """Let a module have another ``forward``."""
    # A graph's module writes its own in its class, which is its alone.
    if any(kind.__name__ == "GraphModule" for kind in type(module).__mro__):
        setattr(type(module), _FORWARD, forward)
    else:
        vars(module)[_FORWARD] = forward


def add_hook_to_module(module: Any, hook: ModelHook, append: bool = False) -> Any:
    """Put a hook on a module, whose ``forward`` calls it from then on.

    Args:
        module: the module.
        hook: the hook.
        append: keep the hook that is there, and call this one after it; otherwise this one is put in its place.

    Returns:
        The module.
    """
    if append and getattr(module, "_hf_hook", None) is not None:
        before = module._hf_hook
        remove_hook_from_module(module)
        hook = SequentialHook(before, hook)
    if not (hasattr(module, "_hf_hook") and hasattr(module, "_old_forward")):
        module._old_forward = module.forward
    module = hook.init_hook(module)
    module._hf_hook = hook
    forward = functools.partial(_hooked_forward, module)
    _set_forward(module, functools.update_wrapper(forward, module._old_forward))
    return module


def remove_hook_from_module(module: Any, recurse: bool = False) -> Any:
    """Take the hook off a module.

    Args:
        module: the module.
        recurse: off all of its parts, too.

    Returns:
        The module.
    """
    if hasattr(module, "_hf_hook"):
        module._hf_hook.detach_hook(module)
        del module._hf_hook
    if hasattr(module, "_old_forward"):
        _set_forward(module, module._old_forward)
        del module._old_forward
    for name in GUARDED:
        vars(module).pop(name, None)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Take the hooks off a module and all of its parts."""
    remove_hook_from_module(module, recurse=True)


class AlignDevicesHook(ModelHook):
    """Brings a module's inputs to its device, and its weights, too, if they are elsewhere between its calls.

    Args:
        execution_device: where it computes.
        offload: its weights are elsewhere between its calls.
        io_same_device: bring its outputs to where its inputs came from.
        weights_map: its weights by name, which may be read only when asked for (default: those it has, on the CPU).
        offload_buffers: its buffers are elsewhere, too.
        place_submodules: so are the weights of its parts.
        skip_keys: keys of its inputs and outputs that are not moved.
        tied_params_map: where weights that several parts have are already.
    """

    def __init__(
        self,
        execution_device: Any = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, Any] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | list[str] | None = None,
        tied_params_map: TiedWeights | None = None,
    ) -> None:
        self.execution_device = execution_device
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = skip_keys
        self.tied_params_map = tied_params_map
        self.input_device: torch.device | None = None
        self.original_devices: dict[str, torch.device] = {}
        self.tied_params_names: set[str] = set()
        # Of tied weights, the places that this module's call has filled.
        self._filled: list[dict[Any, Tensor]] = []

    def __repr__(self) -> str:
        return (
            f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload}, "
            f"io_same_device={self.io_same_device}, offload_buffers={self.offload_buffers}, "
            f"place_submodules={self.place_submodules}, skip_keys={self.skip_keys!r})"
        )

    def _tensors(self, module: nn.Module, buffers: bool) -> dict[str, Tensor]:
        return dict(named_module_tensors(module, buffers, self.place_submodules))

    def _offloaded(self, module: nn.Module) -> list[str]:
        """Names of the tensors that are elsewhere between calls."""
        found = named_module_tensors(
            module, self.offload_buffers, self.place_submodules, True
        )
        return [name for name, _ in found]

    def init_hook(self, module: Any) -> Any:
        """Called when the hook is put on a module: its weights go where they are to be."""
        device = self.execution_device
        if device is not None and torch.device(device).type == "meta":
            # There, no weight has an address of its own.
            self.tied_params_map = None
        if self.offload:
            self._put_away(module)
            names = self._kept(module)
        else:
            names = list(self._tensors(module, True))
        for name in names if device is not None else ():
            set_module_tensor_to_device(
                module, name, device, tied_params_map=self.tied_params_map
            )
        return module

    def _put_away(self, module: nn.Module) -> None:
        tensors = self._tensors(module, True)
        self.original_devices = {name: one.device for name, one in tensors.items()}
        if self.weights_map is None:
            tensors = self._tensors(module, self.offload_buffers)
            self.weights_map = {name: one.to("cpu") for name, one in tensors.items()}
        for name in self._offloaded(module):
            owner, own_name = owner_of(module, name)
            address = getattr(owner, own_name).data_ptr()
            # Weights that are read from files have new addresses each time: their names tell that they are tied.
            if self.tied_params_map is not None and address in self.tied_params_map:
                self.tied_params_names.add(name)
            set_module_tensor_to_device(module, name, "meta")

    def _kept(self, module: nn.Module) -> list[str]:
        """Names of the buffers that stay on the device between calls."""
        if self.offload_buffers:
            return list(get_non_persistent_buffers(module, self.place_submodules, True))
        return [name for name, _ in module.named_buffers(recurse=self.place_submodules)]

    @_outside_of_graphs
    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Called before ``forward``: fetch the weights, and bring the inputs."""
        device = self.execution_device
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        for name in self._offloaded(module) if self.offload else ():
            self._fetch(module, name)
        if device is None:
            return args, kwargs
        return (
            send_to_device(args, device),
            send_to_device(kwargs, device, skip_keys=self.skip_keys),
        )

    def _fetch(self, module: nn.Module, name: str) -> None:
        assert self.weights_map is not None
        value = self.weights_map[name]
        tied = self.tied_params_map
        if tied is not None:
            if name in self.tied_params_names:
                tied.setdefault(value.data_ptr(), {})
            places = tied.get(value.data_ptr())
            if places is not None and self.execution_device not in places:
                self._filled.append(places)
        set_module_tensor_to_device(
            module, name, self.execution_device, value=value, tied_params_map=tied
        )

    @_outside_of_graphs
    def post_forward(self, module: Any, output: Any) -> Any:
        """Called after ``forward``: let the weights go, and bring the outputs."""
        for name in self._offloaded(module) if self.offload else ():
            set_module_tensor_to_device(module, name, "meta")
        for places in self._filled:
            places.pop(self.execution_device, None)
        self._filled.clear()
        if self.io_same_device and self.input_device is not None:
            return send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def detach_hook(self, module: Any) -> Any:
        """Called when the hook is taken off: the weights come back."""
        weights = self.weights_map or {}
        for name, device in self.original_devices.items():
            if device.type != "meta":
                value = weights.get(name)
                set_module_tensor_to_device(module, name, device, value=value)
        return module


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Any,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedWeights | None = None,
) -> None:
    """Let a module and its parts compute on a device, where they have no hook yet.

    Args:
        module: the module.
        execution_device: the device.
        skip_keys: as of :class:`AlignDevicesHook`.
        preload_module_classes: names of classes in whose modules nothing is hooked.
        tied_params_map: as of :class:`AlignDevicesHook`.
    """
    if not hasattr(module, "_hf_hook") and len(module.state_dict()) > 0:
        hook = AlignDevicesHook(
            execution_device, skip_keys=skip_keys, tied_params_map=tied_params_map
        )
        add_hook_to_module(module, hook)
    if type(module).__name__ in (preload_module_classes or ()):
        return
    for child in module.children():
        attach_execution_device_hook(
            child, execution_device, skip_keys, preload_module_classes, tied_params_map
        )


def attach_align_device_hook(
    module: nn.Module,
    execution_device: Any = None,
    offload: bool = False,
    weights_map: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedWeights | None = None,
) -> None:
    """Put an :class:`AlignDevicesHook` on each part of a module that has tensors itself.

    Args:
        module: the module.
        execution_device: as of the hook, as are what follows and ``skip_keys``.
        offload: the same.
        weights_map: the same, by names from the whole model's.
        offload_buffers: the same.
        module_name: the module's, in the whole model.
        skip_keys: the same.
        preload_module_classes: names of classes whose modules fetch the weights of their parts, too.
        tied_params_map: the same.
    """
    is_whole = offload and type(module).__name__ in (preload_module_classes or ())
    if is_whole or any(True for _ in named_module_tensors(module)):
        prefix = f"{module_name}." if module_name else ""
        own = None if weights_map is None else PrefixedDataset(weights_map, prefix)
        hook = AlignDevicesHook(
            execution_device=execution_device,
            offload=offload,
            weights_map=own,
            offload_buffers=offload_buffers,
            place_submodules=is_whole,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
        )
        add_hook_to_module(module, hook, append=True)
    if is_whole:
        return
    for name, child in module.named_children():
        attach_align_device_hook(
            child,
            execution_device,
            offload,
            weights_map,
            offload_buffers,
            f"{module_name}.{name}" if module_name else name,
            skip_keys,
            preload_module_classes,
            tied_params_map,
        )


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Any = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedWeights | None = None,
) -> None:
    """Put hooks on the parts of a model that a map names, so that each computes on its device.

    Args:
        module: the model.
        execution_device: a device for all of it, or one for each of some parts, by name.
        offload: whether their weights are elsewhere, for all or by name.
        weights_map: as of :class:`AlignDevicesHook`, by names from the whole model's.
        offload_buffers: as of the hook, as are ``skip_keys`` and ``tied_params_map``.
        module_name: the module's, in the whole model.
        skip_keys: the same.
        preload_module_classes: names of classes whose modules fetch the weights of their parts, too.
        tied_params_map: the same.
    """
    common: dict[str, Any] = {
        "skip_keys": skip_keys,
        "tied_params_map": tied_params_map,
    }
    elsewhere: dict[str, Any] = {
        "weights_map": weights_map,
        "offload_buffers": offload_buffers,
        "module_name": module_name,
        "preload_module_classes": preload_module_classes,
    }
    is_map = isinstance(execution_device, Mapping)
    if not is_map and not isinstance(offload, Mapping):
        if offload:
            attach_align_device_hook(
                module, execution_device, True, **elsewhere, **common
            )
            return
        hook = AlignDevicesHook(
            execution_device, io_same_device=True, place_submodules=True, **common
        )
        add_hook_to_module(module, hook)
        return
    devices = execution_device if is_map else dict.fromkeys(offload, execution_device)  # type: ignore[arg-type] # it is a mapping then
    away = offload if isinstance(offload, Mapping) else dict.fromkeys(devices, offload)
    _hook_block(module, devices, away, elsewhere, common)
    for name, child in module.named_children():
        attach_align_device_hook_on_blocks(
            child,
            devices,
            away,
            weights_map,
            offload_buffers,
            f"{module_name}.{name}" if module_name else name,
            skip_keys,
            preload_module_classes,
            tied_params_map,
        )


def _hook_block(
    module: nn.Module,
    devices: Mapping[str, Any],
    away: Mapping[str, bool],
    elsewhere: dict[str, Any],
    common: dict[str, Any],
) -> None:
    """Put hooks on one part of a model, if a map names it; and on the model itself in any case."""
    name = elsewhere["module_name"]
    device = devices.get(name)
    is_model = name == ""
    if name not in devices or name not in away:
        if is_model:
            hook = AlignDevicesHook(device, io_same_device=True, **common)
            add_hook_to_module(module, hook)
        return
    if away[name]:
        attach_align_device_hook(module, device, True, **elsewhere, **common)
        if not hasattr(module, "_hf_hook"):
            hook = AlignDevicesHook(device, io_same_device=is_model, **common)
            add_hook_to_module(module, hook)
        classes = elsewhere["preload_module_classes"]
        attach_execution_device_hook(
            module, device, preload_module_classes=classes, **common
        )
        return
    hook = AlignDevicesHook(
        device,
        io_same_device=is_model,
        offload_buffers=elsewhere["offload_buffers"],
        place_submodules=True,
        **common,
    )
    add_hook_to_module(module, hook)
    attach_execution_device_hook(module, device, **common)


class CpuOffload(ModelHook):
    """Keeps a model on the CPU until it is called. It then stays on the device, until ``init_hook`` is called again.

    Args:
        execution_device: where it computes (default: the accelerator, if there is one).
        prev_module_hook: what :func:`~.dispatch.cpu_offload_with_hook` returned for the model that is called before
            this one, and leaves the device then.
    """

    def __init__(
        self,
        execution_device: Any = None,
        prev_module_hook: UserCpuOffloadHook | None = None,
    ) -> None:
        if execution_device is None:
            execution_device = PartialState().default_device
        self.execution_device = execution_device
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: Any) -> Any:
        """Called when the hook is put on a module: it goes to the CPU."""
        return module.to("cpu")

    @_outside_of_graphs
    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Called before ``forward``: the module comes to the device, and the one before leaves it."""
        before = self.prev_module_hook
        if isinstance(before, UserCpuOffloadHook):
            place = next(before.model.parameters()).device
            if place.type != "cpu":
                before.offload()
                clear_device_cache()
        device = self.execution_device
        if next(module.parameters()).device == device:
            return args, kwargs
        module.to(device)
        return send_to_device(args, device), send_to_device(kwargs, device)


class UserCpuOffloadHook:
    """A model with its :class:`CpuOffload`.

    Args:
        model: the model.
        hook: its hook.
    """

    def __init__(self, model: Any, hook: CpuOffload) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Bring the model to the CPU."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Take the hook off the model."""
        remove_hook_from_module(self.model)


class LayerwiseCastingHook(ModelHook):
    """Keeps a module's weights in a small type, and computes in a larger one.

    Args:
        storage_dtype: in which they are kept.
        compute_dtype: in which it computes.
        non_blocking: do not wait until they are converted.
    """

    def __init__(
        self,
        storage_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        non_blocking: bool,
    ) -> None:
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.non_blocking = non_blocking

    def _cast(self, module: Any, dtype: torch.dtype) -> None:
        module.to(dtype=dtype, non_blocking=self.non_blocking)

    def init_hook(self, module: Any) -> Any:
        """Called when the hook is put on a module."""
        self._cast(module, self.storage_dtype)
        return module

    @_outside_of_graphs
    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Called before ``forward``."""
        self._cast(module, self.compute_dtype)
        return args, kwargs

    @_outside_of_graphs
    def post_forward(self, module: Any, output: Any) -> Any:
        """Called after ``forward``."""
        self._cast(module, self.storage_dtype)
        return output


# Weights that are elsewhere ----------------------------------------------------------------------------------------


def has_offloaded_params(module: Any) -> bool:
    """Whether weights of a module itself are elsewhere between its calls."""
    hook = getattr(module, "_hf_hook", None)
    return isinstance(hook, AlignDevicesHook) and hook.offload


@contextmanager
def align_module_device(module: Any, execution_device: Any = None) -> Iterator[None]:
    """A context in which a module's own parameters are there, wherever they are otherwise.

    Args:
        module: the module.
        execution_device: where (default: where its hook says; without a hook, they stay where they are).
    """
    if has_offloaded_params(module):
        hook = module._hf_hook
        before = hook.execution_device
        hook.execution_device = execution_device or before
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.post_forward(module, None)
            hook.execution_device = before
        return
    devices = {}
    if execution_device is not None:
        own = module.named_parameters(recurse=False)
        devices = {name: parameter.device for name, parameter in own}
    try:
        for name in devices:
            set_module_tensor_to_device(module, name, execution_device)
        yield
    finally:
        for name, device in devices.items():
            set_module_tensor_to_device(module, name, device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of any part of a model are elsewhere between its calls."""
    return any(has_offloaded_params(part) for part in model.modules())


def get_state_dict_offloaded_model(model: nn.Module) -> dict[str, Tensor]:
    """A model's state on the CPU, with the weights that are elsewhere."""
    state: dict[str, Tensor] = {}
    missing: set[str] = set()
    for name, part in model.named_modules():
        if name == "":
            continue
        with align_module_device(part, "cpu"):
            for key, value in part.state_dict().items():
                if value.device.type == "meta":
                    missing.add(f"{name}.{key}")
                else:
                    state[f"{name}.{key}"] = value.to("cpu")
    missing -= set(state)
    if missing:
        _logger.warning(
            f"The following tensors were not saved because they were still on meta device: {missing}"
        )
    return state


def get_state_dict_from_offload(
    module: nn.Module,
    module_name: str,
    state_dict: dict[str, Any],
    device_to_put_offload: Any = "cpu",
) -> dict[str, Any]:
    """Put a module's weights, which may be elsewhere, into a state that has their names.

    Args:
        module: the module.
        module_name: the name of one of its weights, in the whole model.
        state_dict: the state.
        device_to_put_offload: where those are put that are elsewhere.
    """
    root = module_name.rpartition(".")[0]
    device = device_to_put_offload if has_offloaded_params(module) else None
    with align_module_device(module, device):
        for key, value in module.state_dict().items():
            if f"{root}.{key}" in state_dict:
                state_dict[f"{root}.{key}"] = value
    return state_dict
