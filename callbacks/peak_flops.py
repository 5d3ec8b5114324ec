"""How many floating-point operations a second a device could do at most."""

from __future__ import annotations

import torch

# Vendors' figures for dense matrices, in 10¹² operations a second: for 16-bit floats, TF32 and 32-bit floats; None
# where there is no such arithmetic. Sources: NVIDIA's data sheets of each chip (where they count sparse matrices, half
# of that), AMD's of the MI series.
_PEAKS: dict[str, tuple[float, float | None, float | None]] = {
    "b200": (2250, 1125, 75),
    "h200 nvl": (835.5, 417.5, 60),
    "h200": (989.4, 494.7, 66.9),
    "h100 nvl": (835.5, 417.5, 60),
    "h100 pcie": (756, 378, 51.2),
    "h100": (989.4, 494.7, 66.9),
    "a100": (312, 156, 19.5),
    "a10g": (70, 35, 35),
    "a10": (125, 62.5, 31.2),
    "a30": (165, 82, 10.3),
    "a40": (149.7, 74.8, 37.4),
    "rtx a6000": (154.8, 77.4, 38.7),
    "l40s": (362, 183, 91.6),
    "l40": (181, 90.5, 90.5),
    "l4": (121, 60, 30.3),
    "rtx 4090": (165.2, 82.6, 82.6),
    "rtx 3090": (71, 35.6, 35.6),
    "v100": (125, None, 15.7),
    "t4": (65, None, 8.1),
    "mi300x": (1307.4, 653.7, 163.4),
    "mi250x": (383, None, 47.9),
}
# These compute with 16-bit floats of one kind only.
_WITHOUT_BFLOAT16 = ("v100", "t4")


def available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The operations a second that a device's maker tells, for products of large dense matrices.

    Args:
        device: the device.
        dtype: with which it computes. 32-bit floats count as TF32 where ``torch.set_float32_matmul_precision`` lets
            torch use that.

    Returns:
        The number; None if it is not known here.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """As :func:`available_flops`, of the device that torch calls ``name``."""
    words = f" {name.lower().replace('-', ' ')} "
    # A chip comes before those whose name is the beginning of its own; "H100 80GB HBM3 NVL" has its words apart.
    chips = (
        chip for chip in _PEAKS if all(f" {word} " in words for word in chip.split())
    )
    chip = next(chips, None)
    if chip is None or " laptop " in words:
        return None
    half, tensor_float, single = _PEAKS[chip]
    peak = None
    if dtype in (torch.float16, torch.bfloat16):
        is_known = dtype is torch.float16 or chip not in _WITHOUT_BFLOAT16
        peak = half if is_known else None
    elif dtype is torch.float32:
        may_round = torch.get_float32_matmul_precision() != "highest"
        peak = tensor_float if may_round and tensor_float else single
    return None if peak is None else peak * 1e12
