"""Which devices there are, and what torch.accelerator does not offer: seeds, RNG states, memory."""

from __future__ import annotations

from typing import Any

import torch

from .launch.environment import ClusterEnvironment, check_environment

# The Trainer's names and the torch device types behind them; "auto" and "gpu" mean whatever this machine has.
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "xpu")


def accelerator_type() -> str:
    """The type of this machine's accelerator, or ``"cpu"``."""
    accelerator = torch.accelerator.current_accelerator()
    return (
        accelerator.type
        if accelerator is not None and torch.accelerator.is_available()
        else "cpu"
    )


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
        environment: what a launcher told this process, if a launcher has started it; then its count holds.

    Raises:
        ValueError: for an accelerator that is unknown or not there, for more devices than there are, or for another
            number than the launcher's.
    """
    kind = _device_type(accelerator)
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    wanted = _parse_devices(devices)
    if environment is not None:
        check_environment(
            environment, len(wanted) if isinstance(wanted, list) else wanted, None
        )
        if not isinstance(wanted, list):
            wanted = environment.local_world_size
            if count == 1:  # the launcher has given each process a device of its own
                return [torch.device(kind, 0)] * wanted
    if kind == "cpu":
        if isinstance(wanted, list):
            raise ValueError(
                f"devices={devices!r}: the CPU has no indices; pass a number of processes, e.g. devices=1"
            )
        return [torch.device("cpu")] * (wanted or 1)
    if isinstance(wanted, list):
        for index in wanted:
            if not 0 <= index < count:
                raise ValueError(
                    f"devices={devices!r}: index {index} is not below the {count} devices of this machine"
                )
        return [torch.device(kind, index) for index in wanted]
    if wanted is not None and wanted > count:
        raise ValueError(
            f"devices={devices!r}: this machine has {count} of type {kind!r}"
        )
    return [torch.device(kind, index) for index in range(wanted or count)]


def _device_type(accelerator: str) -> str:
    """The torch device type that an accelerator's name means on this machine."""
    if accelerator not in ACCELERATORS:
        raise ValueError(
            f"accelerator must be one of {', '.join(ACCELERATORS)}; got {accelerator!r}"
        )
    present = accelerator_type()
    if accelerator == "auto":
        return present
    if accelerator == "gpu":
        if present == "cpu":
            raise ValueError(
                'accelerator="gpu": no accelerator was found; use accelerator="cpu" or "auto"'
            )
        return present
    if accelerator not in ("cpu", present):
        raise ValueError(
            f'accelerator={accelerator!r}: this machine has {present!r} only; use accelerator="auto"'
        )
    return accelerator


def _parse_devices(devices: Any) -> int | list[int] | None:
    """A count, indices, or None for all."""
    wanted = devices
    if isinstance(wanted, str) and wanted != "auto":
        try:
            numbers = [int(part) for part in wanted.split(",") if part.strip()]
        except ValueError:
            numbers = []
        wanted = numbers if "," in wanted else (numbers[0] if numbers else None)
    if wanted in ("auto", -1):
        return None
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
        return wanted
    if (
        isinstance(wanted, (list, tuple))
        and wanted
        and all(isinstance(i, int) for i in wanted)
    ):
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"devices={devices!r} names a device twice")
        return list(wanted)
    raise ValueError(
        f'devices must be a count from 1, a list of indices, "auto" or -1; got {devices!r}'
    )


def device_rng_state(device: torch.device) -> torch.Tensor | None:
    """The RNG state of an accelerator, or None for the CPU."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return (
        module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    )


def set_device_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Set what :func:`device_rng_state` returned."""
    module = torch.get_device_module(device)
    module.set_rng_state(state.cpu()) if device.type == "mps" else module.set_rng_state(
        state.cpu(), device
    )
