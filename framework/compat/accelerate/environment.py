"""Accelerate's questions about the machine: which packages and devices there are, and what the environment says."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from .logging import get_logger
from .options import is_true
from .state import PartialState

_logger = get_logger("accelerate.utils.environment")

# Packages, by the names in Accelerate's functions `is_…_available`.
_PACKAGES = {
    "4bit_bnb": "bitsandbytes",
    "8bit_bnb": "bitsandbytes",
    "aim": "aim",
    "bitsandbytes_multi_backend": "bitsandbytes",
    "bnb": "bitsandbytes",
    "boto3": "boto3",
    "ccl": "oneccl_bindings_for_pytorch",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "dvclive": "dvclive",
    "import_timer": "import_timer",
    "ipex": "intel_extension_for_pytorch",
    "lomo": "lomo_optim",
    "matplotlib": "matplotlib",
    "megatron_lm": "megatron",
    "mlflow": "mlflow",
    "msamp": "msamp",
    "pandas": "pandas",
    "peft": "peft",
    "pippy": "pippy",
    "pynvml": "pynvml",
    "pytest": "pytest",
    "rich": "rich",
    "sagemaker": "sagemaker",
    "schedulefree": "schedulefree",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchao": "torchao",
    "torchdata": "torchdata",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "trackio": "trackio",
    "transformer_engine": "transformer_engine",
    "transformer_engine_mxfp8": "transformer_engine",
    "transformers": "transformers",
    "triton": "triton",
    "wandb": "wandb",
    "amdsmi": "amdsmi",
}
# What no Accelerator here uses.
_NEVER = (
    "habana_gaudi1",
    "hpu",
    "mlu",
    "musa",
    "neuron",
    "npu",
    "rocm",
    "sdaa",
    "torch_xla",
    "fp8",
)


def _has_package(package: str) -> Callable[..., bool]:
    def is_available(*args: Any, **kwargs: Any) -> bool:
        return find_spec(package) is not None

    is_available.__doc__ = f"Whether {package} is installed."
    return is_available


def _says_no(name: str) -> Callable[..., bool]:
    def is_available(*args: Any, **kwargs: Any) -> bool:
        return False

    is_available.__doc__ = f"Whether {name} is used: not here."
    return is_available


def availability() -> dict[str, Callable[..., bool]]:
    """Accelerate's functions that tell what there is, by name."""
    functions: dict[str, Callable[..., bool]] = {
        f"is_{name}_available": _has_package(package)
        for name, package in _PACKAGES.items()
    }
    for name in _NEVER:
        functions[f"is_{name}_available"] = _says_no(name)
    functions["is_habana_gaudi1"] = functions.pop("is_habana_gaudi1_available")
    functions |= {
        "is_cuda_available": lambda: torch.cuda.is_available(),
        "is_mps_available": lambda min_version="": torch.backends.mps.is_available(),
        "is_xpu_available": lambda check_device=False: torch.xpu.is_available(),
        "is_xccl_available": lambda: torch.distributed.is_xccl_available(),
        "is_bf16_available": _has_bf16,
        "is_fp16_available": lambda: True,
        "is_weights_only_available": lambda: True,
        "is_torchdata_stateful_dataloader_available": _has_package("torchdata"),
    }
    return functions


def _has_bf16(ignore_tpu: bool = False) -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return not torch.backends.mps.is_available()


def check_cuda_fp8_capability() -> bool:
    """Whether the GPU computes in fp8: no Accelerator here does."""
    return False


def check_cuda_p2p_ib_support() -> bool:
    """Whether GPUs reach each other directly, as all but a few kinds do."""
    return True


def get_current_device_type() -> tuple[str, str]:
    """The kind of device, and the kind of distributed program with several of them."""
    kind = PartialState().default_device.type
    return kind, "MULTI_GPU" if kind == "cuda" else f"MULTI_{kind.upper()}"


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those libraries of these that have been imported."""
    return [name for name in library_names if name in sys.modules]


def convert_dict_to_env_variables(current_env: dict[str, Any]) -> list[str]:
    """Lines ``NAME=value``, of names and values that a shell reads as they are; a warning names the others."""
    bad = set(";\n<> ")
    lines = []
    for name, value in current_env.items():
        if name and value and not bad & set(f"{name}{value}"):
            lines.append(f"{name}={value}\n")
        else:
            _logger.warning(
                "Left out %s=%r: it is empty, or a shell would not read it as it is",
                name,
                value,
                main_process_only=False,
            )
    return lines


def set_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Nothing: which cores a process uses is the launcher's business."""


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """1 or 0 for a word that says yes or no; True or False with ``to_bool``.

    Raises:
        ValueError: for another word.
    """
    answer = is_true(value)
    return answer if to_bool else int(answer)


def get_int_from_env(env_keys: list[str], default: int) -> int:
    """The number in the first of these variables that has one from 0."""
    for name in env_keys:
        number = int(os.environ.get(name, -1))
        if number >= 0:
            return number
    return default


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Whether a variable says yes."""
    return is_true(os.environ.get(key, str(default)))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """A variable's value."""
    return os.environ.get(key, str(default))


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorate a function, or all tests of a class and its subclasses, to leave Accelerate's variables as they were."""
    if isinstance(func_or_cls, type):
        _purge_after_tests(func_or_cls)
        _purge_subclasses(func_or_cls)
        return func_or_cls

    @wraps(func_or_cls)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _variables_kept():
            return func_or_cls(*args, **kwargs)

    return run


def _purge_after_tests(cls: type) -> None:
    for name, value in list(vars(cls).items()):
        if name.startswith("test") and callable(value):
            setattr(cls, name, purge_accelerate_environment(value))


def _purge_subclasses(cls: Any) -> None:
    """Do the same with the tests of classes that are derived from this one later."""
    before = cls.__init_subclass__

    @classmethod
    def purge_too(derived: type, **options: Any) -> None:
        # The class's own, which is bound to it, is called for the derived one.
        own = getattr(before, "__func__", None)
        if own is not None:
            own(derived, **options)
        _purge_after_tests(derived)

    cls.__init_subclass__ = purge_too


def _accelerates_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("ACCELERATE_")
    }


@contextmanager
def _variables_kept() -> Any:
    before = _accelerates_variables()
    try:
        yield
    finally:
        for name in set(_accelerates_variables()) - set(before):
            del os.environ[name]
        os.environ.update(before)


@cache
def _version_of(package: str) -> list[int]:
    try:
        return _numbers(version(package))
    except PackageNotFoundError:
        return [0]


def _numbers(version: Any) -> list[int]:
    """A version's numbers, without what says that it is a build or a candidate of its own."""
    release = re.match(r"[0-9.]*", str(version))
    numbers = [int(part) for part in (release[0] if release else "").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def compare_versions(
    library_or_version: Any, operation: str, requirement_version: str
) -> bool:
    """Compare a library's version, such as ``compare_versions("torch", ">=", "2.0")``.

    Raises:
        ValueError: for an operation that there is not.
    """
    is_library = isinstance(library_or_version, str)
    found = (_version_of if is_library else _numbers)(library_or_version)
    wanted = _numbers(requirement_version)
    answers = {
        "<": found < wanted,
        "<=": found <= wanted,
        "==": found == wanted,
        "!=": found != wanted,
        ">=": found >= wanted,
        ">": found > wanted,
    }
    if operation not in answers:
        raise ValueError(f"operation must be one of {list(answers)}; got {operation!r}")
    return answers[operation]


def is_torch_version(operation: str, version: str) -> bool:
    """Compare torch's version."""
    return compare_versions("torch", operation, version)


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """The progress bar of the package tqdm, once on each machine.

    Args:
        *args: its arguments.
        main_process_only: False shows one for each process.
        **kwargs: its arguments.

    Raises:
        ValueError: for arguments of an older version.
    """
    from tqdm.auto import tqdm as bar

    if args and isinstance(args[0], bool):
        raise ValueError(
            "Passing `True` or `False` as the first argument to Accelerate's `tqdm` wrapper is unsupported. Please use "
            "the `main_process_only` keyword argument instead."
        )
    hidden = main_process_only and PartialState().local_process_index != 0
    kwargs["disable"] = kwargs.get("disable", False) or hidden
    return bar(*args, **kwargs)
