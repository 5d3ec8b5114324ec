"""Which part of a model goes to which device: maps from the parts' names, as Accelerate decides and reads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .checkpoints import convert_file_size_to_int
from .logging import get_logger
from .tensors import (
    compute_module_sizes,
    compute_module_total_buffer_size,
    find_tied_parameters,
)

_logger = get_logger("accelerate.utils.modeling")

DeviceMap = dict[str, Any]
# A part of a model with its name: a module, or a parameter or a buffer.
Part = tuple[str, Any]


def _as_classes(names: str | Collection[str] | None) -> list[str]:
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def _parts_of(module: nn.Module) -> list[Part]:
    return [
        *module.named_parameters(recurse=False),
        *module.named_children(),
        *module.named_buffers(recurse=False),
    ]


def _children_of(name: str, module: Any, whole: Collection[str]) -> list[Part]:
    """What a part can be divided into; nothing for what has no children, or is to stay in one."""
    if not isinstance(module, nn.Module) or type(module).__name__ in whole:
        return []
    children = list(module.named_children())
    if not children:
        return []
    inside = [*module.named_parameters(recurse=False), *children]
    return [(f"{name}.{child}", part) for child, part in inside]


def is_within(name: str, part: str) -> bool:
    """Whether a name is that of a part, or of something in it."""
    return f"{name}.".startswith(f"{part}.")


def get_max_layer_size(
    modules: list[Part],
    module_sizes: Mapping[str, int],
    no_split_module_classes: Collection[str],
) -> tuple[int, list[str]]:
    """The size of the largest layer in parts of a model, and the names of those that are as large.

    Args:
        modules: the parts, by names.
        module_sizes: what :func:`~.tensors.compute_module_sizes` says.
        no_split_module_classes: names of classes whose modules are one layer.
    """
    largest = 0
    names: list[str] = []
    pending = list(modules)
    while pending:
        name, module = pending.pop(0)
        children = (
            list(module.named_children()) if isinstance(module, nn.Module) else []
        )
        if children and type(module).__name__ not in no_split_module_classes:
            pending[:0] = [(f"{name}.{child}", part) for child, part in children]
            continue
        size = module_sizes[name]
        if size > largest:
            largest, names = size, [name]
        elif size == largest:
            names.append(name)
    return largest, names


def calculate_maximum_sizes(model: nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """The size of a model, and that of its largest layer with the names of such layers."""
    sizes = compute_module_sizes(model)
    whole = getattr(model, "_no_split_modules", None) or []
    return sizes[""], get_max_layer_size(_parts_of(model), sizes, whole)


def get_max_memory(max_memory: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """Bytes of each device, and of the CPU.

    Args:
        max_memory: as a program says, such as ``{0: "10GiB", "cpu": "30GiB"}`` (default: what is free).

    Raises:
        ValueError: for a device that there cannot be.
    """
    count = torch.accelerator.device_count()
    if max_memory is None:
        found: dict[Any, Any] = {}
        for index in range(count):
            found[index] = torch.get_device_module().mem_get_info(index)[0]
        found["cpu"] = _free_memory()
        return found
    sizes = {
        device: convert_file_size_to_int(size) if isinstance(size, str) else size
        for device, size in max_memory.items()
    }
    numbers = sorted(device for device in sizes if isinstance(device, int))
    ordered = [*numbers, *(name for name in ("mps", "cpu", "disk") if name in sizes)]
    for device in sizes:
        if device not in ordered:
            raise ValueError(
                f"Device {device} is not recognized, available devices are integers(for GPU/XPU), 'mps', 'cpu' and "
                "'disk'"
            )
    for number in numbers:
        if not 0 <= number < count:
            _logger.warning(
                f"Device {number} is not available, available devices are {list(range(count))}"
            )
    return {device: sizes[device] for device in ordered}


def _free_memory() -> int:
    """Bytes of this machine that are free."""
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return psutil.virtual_memory().available


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    low_zero: bool = False,
) -> dict[Any, Any]:
    """Bytes to use of each device, so that all have about as much of a model; the last one may have more.

    Args:
        model: the model.
        max_memory: as of :func:`get_max_memory`.
        no_split_module_classes: names of classes whose modules stay in one.
        dtype: in which type the model is to be.
        special_dtypes: in which type some of its tensors are to be.
        low_zero: let the first device have as little as can be.
    """
    memory = get_max_memory(max_memory)
    used = sorted(d for d in memory if isinstance(d, int) and memory[d] > 0)
    if not used:
        return memory
    if len(used) == 1:
        low_zero = False
        if max_memory is None:
            # The rest is for what is computed.
            memory[used[0]] *= 0.9
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    share = sizes[""] // (len(used) - low_zero)
    share += _slack(model, sizes, _as_classes(no_split_module_classes))
    for device in used[:-1]:
        is_spared = low_zero and device == 0
        memory[device] = min(memory[0] if is_spared else share, memory[device])
    if low_zero:
        others = sum(memory[device] for device in range(1, len(used)))
        memory[0] = min(max(0, sizes[""] - others), memory[0])
    return memory


def _slack(model: nn.Module, sizes: Mapping[str, int], whole: list[str]) -> int:
    """What a device needs beyond its share, as a layer goes to one device."""
    modules = dict(model.named_modules())
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        kind = type(modules.get(name)).__name__
        if name and kind in whole:
            blocks.setdefault(kind, size)
    # Of the modules with nothing but tensors in them.
    names = [name for name in sizes if name not in _leaves(sizes)]
    layers = _leaves(names)
    mean = int(sum(sizes[name] for name in layers) / max(len(layers), 1))
    return int(1.25 * max([*blocks.values(), mean]))


def _leaves(names: Collection[str]) -> set[str]:
    parents = {name.rpartition(".")[0] for name in names if "." in name}
    return {name for name in names if name and name not in parents}


def get_module_size_with_ties(
    tied_params: list[str],
    module_size: int,
    module_sizes: Mapping[str, int],
    modules_to_treat: list[Part],
) -> tuple[int, list[str], list[Any]]:
    """The size of a part together with the parts that share its parameters, their names, and they themselves.

    Args:
        tied_params: names of these parameters in other parts.
        module_size: that of the part.
        module_sizes: by names.
        modules_to_treat: the other parts.
    """
    names: list[str] = []
    modules: list[Any] = []
    for tied in tied_params:
        holders = (part for part in modules_to_treat if is_within(tied, part[0]))
        name, module = next(holders, (None, None))
        if name is None:
            continue
        names.append(name)
        modules.append(module)
        module_size += module_sizes[name] - module_sizes[tied]
    return module_size, names, modules


class _Placement:
    """Puts a model's parts on devices, one after the other, and divides those for which there is no room.

    Args:
        model: the model.
        memory: bytes of each device, in the order in which they are filled.
        whole: names of classes whose modules stay in one.
        dtypes: the types that the model is to have, as ``(dtype, special_dtypes)``.
        verbose: print what is done.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: dict[Any, Any],
        whole: list[str],
        dtypes: tuple[Any, Any],
        verbose: bool,
    ) -> None:
        self.memory = memory
        self.whole = whole
        self.dtypes = dtypes
        self.verbose = verbose
        self.devices = [*memory]
        if "disk" not in memory:
            self.devices.append("disk")
        self.accelerators = [d for d in self.devices if d not in ("cpu", "disk")]
        self.sizes = compute_module_sizes(model, *dtypes)
        self.ties = find_tied_parameters(model)
        self.pending = _parts_of(model)
        self.used: dict[Any, Any] = dict.fromkeys(self.devices, 0)
        self.map: DeviceMap = {}
        self.buffers: dict[Any, int] = dict.fromkeys(self.devices, 0)
        # What devices would have needed that got nothing.
        self.needed: dict[Any, int] = {}
        self.largest, self.largest_names = get_max_layer_size(
            self.pending, self.sizes, whole
        )

    @property
    def device(self) -> Any:
        """The device that is filled."""
        return self.devices[0]

    @property
    def main_devices(self) -> list[Any]:
        """Those on which room is left for the largest layer, which may come to be computed there."""
        if "mps" in self.accelerators:
            return ["mps"]
        return [*self.accelerators[:1], "cpu"]

    def say(self, words: str) -> None:
        """Print it, if asked to."""
        if self.verbose:
            print(words)

    def run(self, falls_back: bool) -> None:
        """Put all parts somewhere.

        Args:
            falls_back: look for a smaller part when a device would stay empty.
        """
        while self.pending:
            name, module = self.pending.pop(0)
            self._forget_largest(name)
            tied = self._tied_to(name)
            size, names, modules = get_module_size_with_ties(
                tied, self.sizes[name], self.sizes, self.pending
            )
            if self.used[self.device] + size <= self._room():
                self._place(name, module, names, size)
            elif self._divide(name, module, list(zip(names, modules, strict=True))):
                self._look_for_largest()
            elif not (falls_back and self._take_smaller(name, module, size)):
                self._go_on(name, module, size)

    def _room(self) -> float:
        """Bytes of the device that parts may use."""
        if self.device == "disk":
            return float("inf")
        return self.memory[self.device] - self._reserved()

    def _reserved(self) -> int:
        return self.largest if self.device in self.main_devices else 0

    def _forget_largest(self, name: str) -> None:
        self.largest_names = [n for n in self.largest_names if not is_within(n, name)]
        if not self.largest_names:
            self._look_for_largest()

    def _look_for_largest(self) -> None:
        modules = [part for part in self.pending if isinstance(part[1], nn.Module)]
        self.largest, self.largest_names = get_max_layer_size(
            modules, self.sizes, self.whole
        )

    def _tied_to(self, name: str) -> list[str]:
        """Parameters of other parts that are also in this one."""
        found: list[str] = []
        for group in self.ties:
            others = [tied for tied in group if not is_within(tied, name)]
            if len(others) < len(group):
                found += others
        return found

    def _place(self, name: str, module: Any, tied: list[str], size: int) -> None:
        self.say(
            f"Putting {' and '.join([name, *tied])} ({size} bytes) on {self.device}."
        )
        self.used[self.device] += size
        self.map.update(dict.fromkeys([name, *tied], self.device))
        self.pending = [part for part in self.pending if part[0] not in tied]
        if isinstance(module, nn.Module):
            buffers = compute_module_total_buffer_size(module, *self.dtypes)
            self.buffers[self.device] += buffers

    def _divide(self, name: str, module: Any, tied: list[Part]) -> bool:
        """Put what a part consists of in its place; or do so with a part tied to it, if it alone has room."""
        total = self.used[self.device] + self.sizes[name]
        if tied and total <= self._room():
            for other, other_module in tied:
                children = _children_of(other, other_module, self.whole)
                if children:
                    self.say(f"Splitting {other}.")
                    self._replace(other, children)
                    self.pending.insert(0, (name, module))
                    return True
        if total < self._room():
            return False
        children = _children_of(name, module, self.whole)
        if children:
            self.say(f"Not enough space on {self.device} for {name}: splitting it.")
        self.pending[:0] = children
        return bool(children)

    def _replace(self, name: str, children: list[Part]) -> None:
        index = next(i for i, part in enumerate(self.pending) if part[0] == name)
        self.pending[index : index + 1] = children

    def _take_smaller(self, name: str, module: Any, size: int) -> bool:
        """Take a part that comes later first, if this device would stay empty, and there is a part that fits."""
        if self.used[self.device] or self.device == "disk":
            return False
        parts = [(name, module), *self.pending]
        limit = self.memory[self.device] - max(self.largest, size)
        found = self._find_smaller(parts[1:], limit)
        if found is None:
            return False
        # The parts around it are divided until it is one of them.
        self.pending = parts[1:]
        steps = found[0].split(".")
        ends = range(1, len(steps) + 1)
        for outer, inner in pairwise([".".join(steps[:end]) for end in ends]):
            names = [part[0] for part in self.pending]
            if outer in names and inner not in names:
                self._replace(outer, _children_of(outer, dict(self.pending)[outer], ()))
        self.pending = [part for part in self.pending if part[0] != found[0]]
        self.pending[:0] = [found, parts[0]]
        return True

    def _find_smaller(self, parts: list[Part], limit: float) -> Part | None:
        searched = list(parts)
        while searched:
            name, module = searched.pop(0)
            size, _, _ = get_module_size_with_ties(
                self._tied_to(name), self.sizes[name], self.sizes, searched
            )
            if size <= limit:
                return name, module
            searched[:0] = _children_of(name, module, self.whole)
        return None

    def _go_on(self, name: str, module: Any, size: int) -> None:
        """Fill the next device."""
        self.say(f"No room for {name} on {self.device}: going to the next device.")
        if not self.used[self.device]:
            self.needed[self.device] = size + self._reserved()
        self.used[self.device] += self._reserved()
        self.pending.insert(0, (name, module))
        del self.devices[0]

    def warn(self, offload_buffers: bool) -> None:
        """Say what may fail later."""
        outside = self.buffers.get("cpu", 0) + self.buffers["disk"]
        fits = any(
            self.memory[device] >= outside + self.used[device]
            for device in self.accelerators
        )
        if outside and not offload_buffers and self.accelerators and not fits:
            warnings.warn(
                f"Current model requires {outside} bytes of buffer for offloaded layers, which seems does not fit any "
                "GPU's remaining memory. If you are experiencing a OOM later, please consider using "
                "offload_buffers=True.",
                stacklevel=3,
            )
        if self.needed:
            lines = [
                f"  - {device}: {size} bytes" for device, size in self.needed.items()
            ]
            _logger.info(
                "Devices that got no part of the model because of insufficient memory, and what they would have needed "
                "for the next part:\n" + "\n".join(lines)
            )


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Any, Any] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> DeviceMap:
    """Decide where the parts of a model go: the first device is filled, then the next, then CPU and disk.

    Args:
        model: the model, which may be on ``"meta"``.
        max_memory: as of :func:`get_max_memory`.
        no_split_module_classes: names of classes whose modules stay in one.
        dtype: in which type the model is to be.
        special_dtypes: in which type some of its tensors are to be.
        verbose: print what is decided.
        clean_result: name a module where all of its parts go to one device.
        offload_buffers: buffers are to stay outside, too.
        fallback_allocation: look for a smaller part when a device would stay empty.

    Returns:
        Names of parts with ``0``, ``1``, …, ``"cpu"`` or ``"disk"``.
    """
    placement = _Placement(
        model,
        get_max_memory(max_memory),
        _as_classes(no_split_module_classes),
        (dtype, special_dtypes),
        verbose,
    )
    placement.run(fallback_allocation)
    placement.warn(offload_buffers)
    return clean_device_map(placement.map) if clean_result else placement.map


def clean_device_map(device_map: DeviceMap, module_name: str = "") -> DeviceMap:
    """Name a module where all of its parts are on one device.

    Args:
        device_map: by names of parts; it is changed.
        module_name: look at this module only.
    """
    prefix = f"{module_name}." if module_name else ""
    inside = [name for name in device_map if name.startswith(prefix)]
    devices = {device_map[name] for name in inside}
    if len(devices) == 1 and len(inside) > 1:
        for name in inside:
            del device_map[name]
        device_map[module_name] = devices.pop()
        return device_map
    children = {
        prefix + name[len(prefix) :].partition(".")[0] for name in inside if name
    }
    for child in sorted(children):
        clean_device_map(device_map, child)
    return device_map


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Check that a map says of each tensor of a model where it goes.

    Raises:
        ValueError: naming those of which it does not.
    """
    known = {name for name, _ in model.named_modules()}
    unknown = [name for name in device_map if name not in known]
    if unknown:
        warnings.warn(
            f"The following device_map keys do not match any submodules in the model: {unknown}",
            stacklevel=2,
        )
    if "" in device_map:
        return
    missing = [
        name
        for name in model.state_dict()
        if not any(is_within(name, part) for part in device_map)
    ]
    if missing:
        raise ValueError(
            "The device_map provided does not give any device for the following parameters: "
            + ", ".join(missing)
        )


def device_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """The device that a map gives for a tensor.

    Raises:
        ValueError: if it gives none.
    """
    part = name
    while part and part not in device_map:
        part = part.rpartition(".")[0]
    if part not in device_map:
        raise ValueError(f"{name} doesn't have any device set.")
    return device_map[part]


def warn_of_parted_ties(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Warn of parameters that are one, and are to be on several devices."""
    for group in find_tied_parameters(model):
        places = {name: device_of(name, device_map) for name in group}
        if len(set(places.values())) > 1:
            _logger.warning(
                f"Tied parameters are on different devices: {places}. Please modify your custom device map or set "
                "`device_map='auto'`."
            )


def complete_device_map(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    no_split_module_classes: str | Collection[str] | None,
    dtype: Any,
    offload_buffers: bool,
) -> Any:
    """The map that a word such as ``"auto"`` stands for; a map stays as it is.

    Raises:
        ValueError: for another word.
    """
    if not isinstance(device_map, str):
        return device_map
    words = ("auto", "balanced", "balanced_low_0", "sequential")
    if device_map not in words:
        raise ValueError(
            "If passing a string for `device_map`, please choose 'auto', 'balanced', 'balanced_low_0' or 'sequential'."
        )
    if device_map != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory,
            no_split_module_classes,
            dtype,
            low_zero=device_map == "balanced_low_0",
        )
    return infer_auto_device_map(
        model,
        max_memory,
        no_split_module_classes,
        dtype,
        offload_buffers=offload_buffers,
    )
