"""What Lightning's tests, and those of programs, ask of the machine before they run a test."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from packaging.version import Version

from .availability import package_available

__all__ = ["_SKLEARN_AVAILABLE", "_runif_reasons"]

_SKLEARN_AVAILABLE = package_available("sklearn")

# The package that a condition asks for, and its name in the reason.
_PACKAGES = {
    "deepspeed": ("deepspeed", "Deepspeed"),
    "omegaconf": ("omegaconf", "omegaconf"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnxscript"),
    "psutil": ("psutil", "psutil"),
    "rich": ("rich", "Rich"),
    "sklearn": ("sklearn", "scikit-learn"),
    "tensorrt": ("torch_tensorrt", "torch-tensorrt"),
}


def _runif_reasons(
    *,
    min_cuda_gpus: int = 0,
    min_torch: str | None = None,
    max_torch: str | None = None,
    min_python: str | None = None,
    bf16_cuda: bool = False,
    tpu: bool = False,
    mps: bool | None = None,
    skip_windows: bool = False,
    standalone: bool = False,
    linux_only: bool = False,
    dynamo: bool = False,
    **packages: bool,
) -> tuple[list[str], dict[str, bool]]:
    """Why a test cannot run here, and which of the conditions a test run selects tests by.

    Args:
        min_cuda_gpus: how many GPUs it needs.
        min_torch: the oldest torch that will do.
        max_torch: the first torch that is too new.
        min_python: the oldest Python that will do.
        bf16_cuda: whether it needs a GPU with bfloat16.
        tpu: whether it needs a TPU.
        mps: whether there must be Apple's GPU, or must not; None if that does not matter.
        skip_windows: whether it cannot run on Windows.
        standalone: whether it needs a process of its own, as ``PL_RUN_STANDALONE_TESTS=1`` promises.
        linux_only: whether it runs on Linux only.
        dynamo: whether it compiles, which works wherever this torch does.
        packages: packages that it needs, by name.

    Returns:
        Reasons, and the conditions that were asked for among ``min_cuda_gpus``, ``tpu`` and ``standalone``.

    Raises:
        TypeError: for a package that nothing knows of.
    """
    unknown = packages.keys() - _PACKAGES.keys()
    if unknown:
        raise TypeError(f"_runif_reasons knows no {sorted(unknown)}")
    has_mps = torch.backends.mps.is_available()
    unmet: dict[str, Any] = {
        f"GPUs>={min_cuda_gpus}": torch.cuda.device_count() < min_cuda_gpus,
        f"torch>={min_torch}": min_torch and _torch() < Version(min_torch),
        f"torch<{max_torch}": max_torch and _torch() >= Version(max_torch),
        f"python>={min_python}": min_python and _python() < Version(min_python),
        "CUDA device bf16": bf16_cuda and not _has_bf16(),
        "TPU": tpu,
        "MPS": mps is True and not has_mps,
        "not MPS": mps is False and has_mps,
        "unimplemented on Windows": skip_windows and sys.platform == "win32",
        "Standalone execution": standalone and not _is_standalone(),
        "only linux": linux_only and sys.platform != "linux",
    }
    for name, is_needed in packages.items():
        package, reason = _PACKAGES[name]
        unmet[reason] = is_needed and not package_available(package)
    asked = {"min_cuda_gpus": min_cuda_gpus, "tpu": tpu, "standalone": standalone}
    return (
        [reason for reason, is_unmet in unmet.items() if is_unmet],
        {name: True for name, is_asked in asked.items() if is_asked},
    )


def _torch() -> Version:
    return Version(Version(torch.__version__).base_version)


def _python() -> Version:
    return Version(".".join(map(str, sys.version_info[:3])))


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _is_standalone() -> bool:
    return os.environ.get("PL_RUN_STANDALONE_TESTS", "0") == "1"
