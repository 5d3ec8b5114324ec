"""Lightning's accelerators: names for kinds of devices."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch

from ....strategies.accelerator import select_devices
from .utilities import MisconfigurationException

__all__ = [
    "_IS_INTERACTIVE",
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "XLAAccelerator",
    "_AcceleratorConnector",
    "find_usable_cuda_devices",
    "get_cpu_stats",
    "is_cuda_available",
    "num_cuda_devices",
]


_IS_INTERACTIVE = hasattr(sys, "ps1") or bool(sys.flags.interactive)


class Accelerator:
    """A kind of device, for ``Trainer(accelerator=…)``.

    Attributes:
        device_type: torch's name for it.
    """

    device_type: ClassVar[str] = ""

    @classmethod
    def is_available(cls) -> bool:
        """Whether this machine has such a device."""
        return cls.auto_device_count() > 0

    @classmethod
    def auto_device_count(cls) -> int:
        """How many this machine has."""
        return 0

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        """The devices with these indices, or the first so many."""
        indices = range(devices) if isinstance(devices, int) else devices
        return [torch.device(cls.device_type, index) for index in indices]

    @classmethod
    def name(cls) -> str:
        """What ``Trainer(accelerator=…)`` calls it."""
        return cls.device_type

    @classmethod
    def parse_devices(cls, devices: Any) -> Any:
        """The count or the indices that the Trainer's ``devices`` names."""
        return devices

    def setup(self, trainer: Any) -> None:
        """Does nothing: the strategy prepares the device."""

    def setup_device(self, device: torch.device) -> None:
        """Does nothing: the strategy prepares the device.

        Raises:
            MisconfigurationException: for a device of another kind.
        """
        if self.device_type and device.type != self.device_type:
            raise MisconfigurationException(
                f"Device should be {self.device_type.upper()}, got {device} instead."
            )

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Figures about a device's load, by name."""
        return {}

    def teardown(self) -> None:
        """Does nothing."""


class CPUAccelerator(Accelerator):
    """The CPU."""

    device_type = "cpu"

    @classmethod
    def auto_device_count(cls) -> int:
        """One."""
        return 1

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        """The CPU, once for each process."""
        count = devices if isinstance(devices, int) else len(devices)
        return [torch.device("cpu")] * count

    @classmethod
    def parse_devices(cls, devices: Any) -> int:
        """The number of processes that the Trainer's ``devices`` asks for.

        Raises:
            TypeError: if it is no number above 0.
        """
        count = devices
        if isinstance(devices, str) and devices.strip().isdecimal():
            count = int(devices)
        if not isinstance(count, int) or count < 1:
            raise TypeError(
                "`devices` selected with `CPUAccelerator` should be an int > 0."
            )
        return count

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """How much of the processors, the memory and the swap is in use, in percent."""
        return get_cpu_stats()


class CUDAAccelerator(Accelerator):
    """CUDA devices."""

    device_type = "cuda"

    @classmethod
    def auto_device_count(cls) -> int:
        """How many this machine has."""
        return torch.cuda.device_count()


class MPSAccelerator(Accelerator):
    """Apple's devices."""

    device_type = "mps"

    @classmethod
    def auto_device_count(cls) -> int:
        """One, if there is one."""
        return int(torch.backends.mps.is_available())


class XLAAccelerator(Accelerator):
    """TPUs, of which Loopwright knows none."""

    device_type = "xla"


def get_cpu_stats() -> dict[str, float]:
    """How much of the processors, the memory and the swap is in use, in percent.

    Raises:
        ModuleNotFoundError: without psutil.
    """
    import psutil

    return {
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_percent": psutil.cpu_percent(),
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


class _Registry(dict[str, dict[str, Any]]):
    """Accelerators by name; those that packages add are known by name only."""

    def register(
        self,
        name: str,
        accelerator: Any = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Add one, or be a decorator that does.

        Args:
            name: of the accelerator.
            accelerator: its class; without it, this is a decorator.
            description: what it is.
            override: whether the name may be taken.
            **init_params: the class's arguments.

        Raises:
            MisconfigurationException: if the name is taken.
        """

        def add(kind: Any) -> Any:
            if name in self and not override:
                raise MisconfigurationException(
                    f"'{name}' is already present in the registry. HINT: Use `override=True`."
                )
            self[name] = {
                "accelerator": kind,
                "description": description,
                "init_params": init_params,
            }
            return kind

        return add if accelerator is None else add(accelerator)

    def get(self, name: str, default: Any = None) -> Any:
        """A new accelerator of this name; ``default`` if there is none."""
        entry = dict.get(self, name)
        if entry is None:
            return default
        return entry["accelerator"](**entry["init_params"])

    def remove(self, name: str) -> None:
        """Forget a name."""
        del self[name]

    def available_accelerators(self) -> set[str]:
        """All names."""
        return set(self)


AcceleratorRegistry = _Registry()
AcceleratorRegistry.register("cpu", CPUAccelerator)
AcceleratorRegistry.register("cuda", CUDAAccelerator)
AcceleratorRegistry.register("mps", MPSAccelerator)
AcceleratorRegistry.register("tpu", XLAAccelerator)


class _AcceleratorConnector:
    """Answers what packages ask of the object that chooses Lightning's devices: which kind, and how many.

    Args:
        devices: as the Trainer takes it.
        accelerator: as the Trainer takes it.
        **others: the Trainer's other arguments, which do not matter here.
    """

    def __init__(
        self, devices: Any = "auto", accelerator: Any = "auto", **others: Any
    ) -> None:
        if isinstance(accelerator, Accelerator):
            accelerator = accelerator.name()
        self._parallel_devices = select_devices(accelerator, devices)
        self._accelerator_flag = self._parallel_devices[0].type
        self._devices_flag: Any = len(self._parallel_devices)
        if self._accelerator_flag != "cpu":
            self._devices_flag = [device.index for device in self._parallel_devices]

    @staticmethod
    def _choose_auto_accelerator(*_: Any) -> str:
        """The kind of device that ``accelerator="auto"`` means on this machine."""
        return select_devices("auto", "auto")[0].type

    def _choose_strategy(self) -> str:
        """The name of a strategy. Packages replace it for devices that Loopwright chooses by itself."""
        return "auto"

    def _check_and_init_precision(self) -> str:
        """The name of a precision. Packages replace it like :meth:`_choose_strategy`."""
        return "32-true"


def num_cuda_devices() -> int:
    """How many CUDA devices there are."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Whether there is a CUDA device."""
    return num_cuda_devices() > 0


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """The indices of CUDA devices, for ``Trainer(devices=…)``.

    Args:
        num_devices: how many; -1 for all.

    Raises:
        RuntimeError: if there are not as many.
    """
    present = num_cuda_devices()
    if num_devices > present:
        raise RuntimeError(
            f"num_devices must be at most {present}, the number of CUDA devices; got {num_devices}"
        )
    return list(range(present if num_devices == -1 else num_devices))
