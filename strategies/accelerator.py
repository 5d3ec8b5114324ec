"""Which devices there are, and the states of their random generators, which torch.accelerator does not offer."""

from __future__ import annotations

from typing import Any

import torch

from .launch.environment import ClusterEnvironment, check_environment

# The Trainer's names and the torch device types behind them; "auto" and "gpu" mean whatever this machine has.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "xpu")


def accelerator_type() -> str:
    """Return the type of this machine's accelerator, or ``"cpu"``."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return "cpu"
    return accelerator.type


def select_devices(
    accelerator: str,
    devices: int | str | list[int],
    environment: ClusterEnvironment | None = None,
) -> list[torch.device]:
    """Return the devices that the arguments ask for: one for each process of this machine.

    Args:
        accelerator: one of :data:`ACCELERATORS`.
        devices: a count, a list of indices, ``"auto"`` or -1 (all of them; one for the CPU), or
            a string such as ``"2"`` (a count) or ``"0,2"`` (indices).
        environment: what a launcher told this process, if one has started it; then its count holds.

    Raises:
        ValueError: for an accelerator that is unknown or not there, for more devices than there are, or for another
            number than the launcher's.
    """
    kind = _device_type(accelerator)
    requested = _parse_devices(devices)
    present = 0 if kind == "cpu" else torch.accelerator.device_count()
    if environment is not None:
        count = len(requested) if isinstance(requested, list) else requested
        check_environment(environment, count, None)
    if isinstance(requested, list):
        _check_indices(requested, kind, present)
        return [torch.device(kind, index) for index in requested]
    if environment is not None:
        requested = environment.local_world_size
    if kind == "cpu":
        return [torch.device("cpu")] * (requested or 1)
    if environment is not None and present == 1:
        # The launcher has given each process a device of its own.
        return [torch.device(kind, 0)] * environment.local_world_size
    if requested is not None and requested > present:
        raise ValueError(
            f"devices={devices!r}: this machine has {present} of type {kind!r}"
        )
    return [torch.device(kind, index) for index in range(requested or present)]


def _check_indices(indices: list[int], kind: str, present: int) -> None:
    """Raise for indices of devices of which ``present`` are there."""
    if kind == "cpu":
        raise ValueError(
            f"devices={indices}: the CPU has no indices; pass a number of processes, e.g. devices=1"
        )
    for index in indices:
        if not 0 <= index < present:
            raise ValueError(
                f"devices={indices}: index {index} is not below the {present} devices of this machine"
            )


def _device_type(accelerator: str) -> str:
    """Return the torch device type that an accelerator's name means on this machine."""
    if accelerator not in ACCELERATORS:
        raise ValueError(
            f"accelerator must be one of {', '.join(ACCELERATORS)}; got {accelerator!r}"
        )
    present = accelerator_type()
    if accelerator == "gpu" and present == "cpu":
        raise ValueError(
            'accelerator="gpu": no accelerator was found; use accelerator="cpu" or "auto"'
        )
    if accelerator in ("auto", "gpu"):
        return present
    if accelerator not in ("cpu", present):
        raise ValueError(
            f'accelerator={accelerator!r}: this machine has {present!r} only; use accelerator="auto"'
        )
    return accelerator


def _parse_devices(devices: Any) -> int | list[int] | None:
    """Return a count, indices, or None for all."""
    requested: Any = devices
    if isinstance(devices, str):
        requested = _parse_text(devices)
    if requested in ("auto", -1):
        return None
    # True would pass for 1.
    if type(requested) is int and requested >= 1:
        return requested
    indices = list(requested) if isinstance(requested, (list, tuple)) else []
    if indices and all(isinstance(index, int) for index in indices):
        if len(set(indices)) < len(indices):
            raise ValueError(f"devices={devices!r} names a device twice")
        return indices
    raise ValueError(
        f'devices must be a count from 1, a list of indices, "auto" or -1; got {devices!r}'
    )


def _parse_text(devices: str) -> Any:
    """Return the count or the indices in a string such as ``"2"`` or ``"0,2"``; None if there are none."""
    if devices == "auto":
        return devices
    try:
        numbers = [int(number) for number in devices.split(",") if number.strip()]
    except ValueError:
        return None
    if "," in devices:
        return numbers
    return numbers[0] if numbers else None


def device_rng_state(device: torch.device) -> torch.Tensor | None:
    """Return the RNG state of an accelerator, or None for the CPU."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if device.type == "mps":
        return module.get_rng_state()
    return module.get_rng_state(device)


def set_device_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Set what :func:`device_rng_state` returned."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state.cpu())
    else:
        module.set_rng_state(state.cpu(), device)
