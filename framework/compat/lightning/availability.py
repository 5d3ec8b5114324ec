"""Lightning's names for which packages there are, and in which versions."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from packaging.version import Version

__all__ = [
    "_IS_INTERACTIVE",
    "_IS_WINDOWS",
    "_NUMPY_AVAILABLE",
    "_OMEGACONF_AVAILABLE",
    "_PYTHON_GREATER_EQUAL_3_10_0",
    "_PYTHON_GREATER_EQUAL_3_11_0",
    "_RICH_AVAILABLE",
    "_TORCHMETRICS_GREATER_EQUAL_0_8_0",
    "_TORCHMETRICS_GREATER_EQUAL_0_9_1",
    "_TORCHMETRICS_GREATER_EQUAL_0_11",
    "_TORCHMETRICS_GREATER_EQUAL_1_0_0",
    "_TORCHVISION_AVAILABLE",
    "_TORCH_EQUAL_2_4_0",
    "_TORCH_EQUAL_2_8",
    "_TORCH_EQUAL_2_9",
    "_TORCH_GREATER_EQUAL_2_2",
    "_TORCH_GREATER_EQUAL_2_3",
    "_TORCH_GREATER_EQUAL_2_4",
    "_TORCH_GREATER_EQUAL_2_4_1",
    "_TORCH_GREATER_EQUAL_2_5",
    "_TORCH_GREATER_EQUAL_2_6",
    "_TORCH_GREATER_EQUAL_2_8",
    "_TORCH_LESS_EQUAL_2_6",
    "package_available",
]


def package_available(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


_IS_INTERACTIVE = hasattr(sys, "ps1") or bool(sys.flags.interactive)
_IS_WINDOWS = sys.platform == "win32"
_NUMPY_AVAILABLE = package_available("numpy")
_OMEGACONF_AVAILABLE = package_available("omegaconf")
_RICH_AVAILABLE = package_available("rich")
_TORCHVISION_AVAILABLE = package_available("torchvision")

_PYTHON_GREATER_EQUAL_3_10_0 = sys.version_info >= (3, 10)
_PYTHON_GREATER_EQUAL_3_11_0 = sys.version_info >= (3, 11)

# Without the builds' own suffixes.
_TORCH = Version(Version(torch.__version__).base_version)
_TORCH_EQUAL_2_4_0 = Version("2.4.0") == _TORCH
_TORCH_EQUAL_2_8 = _TORCH.release[:2] == (2, 8)
_TORCH_EQUAL_2_9 = _TORCH.release[:2] == (2, 9)
_TORCH_GREATER_EQUAL_2_2 = Version("2.2") <= _TORCH
_TORCH_GREATER_EQUAL_2_3 = Version("2.3") <= _TORCH
_TORCH_GREATER_EQUAL_2_4 = Version("2.4") <= _TORCH
_TORCH_GREATER_EQUAL_2_4_1 = Version("2.4.1") <= _TORCH
_TORCH_GREATER_EQUAL_2_5 = Version("2.5") <= _TORCH
_TORCH_GREATER_EQUAL_2_6 = Version("2.6") <= _TORCH
_TORCH_GREATER_EQUAL_2_8 = Version("2.8") <= _TORCH
_TORCH_LESS_EQUAL_2_6 = _TORCH.release[:2] <= (2, 6)

# Any torchmetrics that runs with this torch is newer.
_TORCHMETRICS_GREATER_EQUAL_0_8_0 = True
_TORCHMETRICS_GREATER_EQUAL_0_9_1 = True
_TORCHMETRICS_GREATER_EQUAL_0_11 = True
_TORCHMETRICS_GREATER_EQUAL_1_0_0 = True
