"""``loopwright env``: what is installed, on which devices, and what a launcher has set; for reports of bugs."""

from __future__ import annotations

import json
import os
import platform
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# What a run depends on, and what it uses where it is installed.
_REQUIRED = (
    "torchmetrics",
    "tensorboard",
    "fsspec",
    "rich",
    "safetensors",
    "cloudpickle",
    "numpy",
)
_OPTIONAL = (
    "accelerate",
    "datasets",
    "deepspeed",
    "jsonargparse",
    "libcst",
    "lightning",
    "litdata",
    "mlflow",
    "mlflow-skinny",
    "omegaconf",
    "pytorch-lightning",
    "pyyaml",
    "s3fs",
    "torchdata",
    "torchvision",
    "transformers",
    "wandb",
    "webdataset",
)
# Variables whose values are numbers or words of launchers and libraries.
_SHOWN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_PORT",
    "SLURM_NTASKS",
    "SLURM_NNODES",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "LOOPWRIGHT_LAUNCH",
    "LOOPWRIGHT_DEBUG",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
    "TORCH_DISTRIBUTED_DEBUG",
)
# Of other variables that begin like this, the names are told.
_PREFIXES = (
    "ACCELERATE_",
    "CUDA_",
    "FSDP_",
    "GLOO_",
    "LOOPWRIGHT_",
    "MASTER_",
    "NCCL_",
    "OMPI_",
    "PMI_",
    "SLURM_",
    "TORCH_",
    "TORCHELASTIC_",
)

Section = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Run ``loopwright env``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="loopwright env",
        description="Tell what is installed, the devices, the backends and the launcher, to paste into a report.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    sections = describe()
    if options.json:
        print(json.dumps(sections, indent=2))
        return 0
    for title, section in sections.items():
        print(title)
        for name, value in section.items():
            print(f"  {name + ':':<28} {_text(value)}")
    return 0


def describe() -> dict[str, Section]:
    """Return what is to be told, by section and name."""
    return {
        "versions": _versions(),
        "optional packages": _packages(_OPTIONAL),
        "machine": _machine(),
        "devices": _devices(),
        "distributed": _distributed(),
        "environment variables": _variables(),
    }


def _text(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return str(value)


def _versions() -> Section:
    import torch

    build = torch.version
    return {
        "loopwright": version("loopwright"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "torch's build": {
            "CUDA": build.cuda or "no",
            "ROCm": build.hip or "no",
            "debug": build.debug,
            "git": build.git_version[:10] if build.git_version else "unknown",
        },
        **_packages(_REQUIRED),
    }


def _packages(names: tuple[str, ...]) -> Section:
    return {name: _version_of(name) for name in names}


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> Section:
    import torch

    from ...strategies.launch.machine import usable_cpus

    return {
        "system": platform.platform(),
        "CPU": platform.processor() or platform.machine(),
        "CPU cores": os.cpu_count(),
        "usable by this process": usable_cpus(),
        "memory": _memory(),
        "torch's threads": torch.get_num_threads(),
        "torch's threads between operations": torch.get_num_interop_threads(),
        "file descriptors": _limit_of_files(),
        "shared memory": _free("/dev/shm"),
    }


def _memory() -> str:
    from ...strategies.launch.machine import total_memory

    size = total_memory()
    return "unknown" if size is None else _gigabytes(size)


def _free(folder: str) -> str:
    try:
        found = os.statvfs(folder)
    except OSError:
        return "none"
    free = _gigabytes(found.f_bavail * found.f_frsize)
    return f"{free} free of {_gigabytes(found.f_blocks * found.f_frsize)}"


def _limit_of_files() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _devices() -> Section:
    """Return the accelerators with their memory."""
    import torch

    device = torch.accelerator.current_accelerator()
    if device is None:
        return {"accelerators": "none: the CPU computes"}
    count = torch.accelerator.device_count()
    found: Section = {"accelerators": f"{count} × {device.type}"}
    module = torch.get_device_module(device)
    for index in range(count):
        found[f"{device.type}:{index}"] = _device(module, index)
    return found


def _device(module: Any, index: int) -> str:
    if not hasattr(module, "get_device_properties"):
        return "no details"
    properties = module.get_device_properties(index)
    words = [properties.name, _gigabytes(properties.total_memory)]
    if hasattr(module, "mem_get_info"):
        words.append(f"{_gigabytes(module.mem_get_info(index)[0])} free")
    if hasattr(properties, "major"):
        words.append(f"capability {properties.major}.{properties.minor}")
    return ", ".join(words)


def _distributed() -> Section:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return {"torch.distributed": "not in this build"}
    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
    }
    found: Section = {
        "backends": [name for name, available in backends.items() if available]
    }
    if backends["nccl"] and torch.cuda.is_available():
        from torch.cuda import nccl

        found["NCCL"] = ".".join(map(str, nccl.version()))
    from ...strategies.launch.environment import detect_environment

    try:
        environment = detect_environment()
    except ValueError as error:
        found["launcher"] = f"its variables contradict each other: {error}"
        return found
    found["launcher"] = "none"
    if environment is not None:
        found["launcher"] = (
            f"{environment.launcher}: rank {environment.rank} of {environment.world_size}"
        )
    return found


def _variables() -> Section:
    """Return values that cannot be secret, and the names of what else may matter."""
    found: Section = {name: os.environ[name] for name in _SHOWN if name in os.environ}
    found["also set"] = sorted(
        name for name in os.environ if name.startswith(_PREFIXES) and name not in _SHOWN
    )
    return found
