"""Lightning's small functions: ranks, nestings of tensors, memory, models, files."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....strategies.launch.machine import usable_cpus
from ...checkpoint.configs import AttributeDict
from ...data.device_input import move_batch
from .availability import package_available
from .combined_loader import CombinedLoader
from .model_helpers import is_overridden
from .parsing import get_init_args, is_picklable
from .samplers import DistributedSamplerWrapper
from .seed import isolate_rng, seed_everything
from .states import LightningEnum

__all__ = [
    "FLOAT16_EPSILON",
    "FLOAT32_EPSILON",
    "FLOAT64_EPSILON",
    "AttributeDict",
    "CombinedLoader",
    "DistributedSamplerWrapper",
    "GradClipAlgorithmType",
    "LightningDeprecationWarning",
    "LightningEnum",
    "MisconfigurationException",
    "PossibleUserWarning",
    "ReduceOp",
    "SIGTERMException",
    "WarningCache",
    "_DeviceDtypeModuleMixin",
    "_TunerExitException",
    "_atomic_save",
    "_augment_message",
    "_check_data_type",
    "_check_unique",
    "_destroy_dist_connection",
    "_distributed_is_initialized",
    "_get_rank",
    "_is_dir",
    "_is_local_file_protocol",
    "_jit_is_scripting",
    "_load",
    "_normalize_parse_gpu_string_input",
    "_register_classes",
    "apply_to_collection",
    "convert_tensors_to_scalars",
    "convert_to_tensors",
    "disable_possible_user_warnings",
    "find_free_network_port",
    "find_shared_parameters",
    "garbage_collection_cuda",
    "get_a_var",
    "get_filesystem",
    "get_init_args",
    "grad_norm",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "is_overridden",
    "is_param_in_hook_signature",
    "is_picklable",
    "is_shared_filesystem",
    "isolate_rng",
    "measure_flops",
    "migrate_checkpoint",
    "module_available",
    "move_data_to_device",
    "package_available",
    "pl_legacy_patch",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "recursive_detach",
    "seed_everything",
    "set_shared_parameters",
    "suggested_max_num_workers",
]

log = logging.getLogger("loopwright")

ReduceOp = torch.distributed.ReduceOp

FLOAT16_EPSILON = torch.finfo(torch.float16).eps
FLOAT32_EPSILON = torch.finfo(torch.float32).eps
FLOAT64_EPSILON = torch.finfo(torch.float64).eps

module_available = package_available


class MisconfigurationException(Exception):
    """Programs raise it where their arguments do not fit together."""


class MisconfiguredValue(MisconfigurationException, ValueError):
    """The same where Loopwright raises a ValueError."""


@contextmanager
def misconfigured_values() -> Iterator[None]:
    """Raise ValueErrors as a MisconfigurationException, too, which Lightning's programs catch."""
    try:
        yield
    except ValueError as error:
        raise MisconfiguredValue(str(error)) from error


class PossibleUserWarning(UserWarning):
    """A warning about what a user may not have meant."""


class LightningDeprecationWarning(DeprecationWarning):
    """A warning about what will go."""


class SIGTERMException(SystemExit):
    """A signal has asked the program to end."""


class _TunerExitException(Exception):
    """A tuner has found what it looked for."""


def _augment_message(exception: BaseException, pattern: str, new_message: str) -> None:
    """Replace those texts of an exception that match a pattern."""
    exception.args = tuple(
        new_message
        if isinstance(text, str) and re.match(pattern, text, re.DOTALL)
        else text
        for text in exception.args
    )


class GradClipAlgorithmType(LightningEnum):
    """How gradients are clipped."""

    VALUE = "value"
    NORM = "norm"

    @classmethod
    def supported_types(cls) -> list[str]:
        """All of them."""
        return [member.value for member in cls]


# Ranks.

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class _RankZeroOnly:
    """A decorator: the function runs in the main process only, and returns ``default`` in the others."""

    def __init__(self) -> None:
        self._rank: int | None = None

    @property
    def rank(self) -> int:
        """This process's index among all."""
        if self._rank is not None:
            return self._rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        for variable in _RANK_VARIABLES:
            if variable in os.environ:
                return int(os.environ[variable])
        return 0

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._rank = rank

    def __call__(
        self, function: Callable[..., Any], default: Any = None
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def in_main_process(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self.rank == 0 else default

        return in_main_process


rank_zero_only = _RankZeroOnly()


@rank_zero_only
def rank_zero_debug(message: object, *args: Any, **kwargs: Any) -> None:
    """Log for debugging, in the main process only."""
    log.debug(message, *args, **_with_caller(kwargs))


@rank_zero_only
def rank_zero_info(message: object, *args: Any, **kwargs: Any) -> None:
    """Log information, in the main process only."""
    log.info(message, *args, **_with_caller(kwargs))


@rank_zero_only
def rank_zero_warn(
    message: Warning | str,
    category: type[Warning] = UserWarning,
    stacklevel: int = 4,
    **kwargs: Any,
) -> None:
    """Warn, in the main process only.

    Args:
        message: the warning.
        category: its class.
        stacklevel: whose line to name, counted as in Lightning.
        **kwargs: of ``warnings.warn``.
    """
    # Two frames are this function and its decorator, as they are there.
    warnings.warn(message, category, stacklevel=stacklevel, **kwargs)


def rank_zero_deprecation(
    message: Warning | str, stacklevel: int = 5, **kwargs: Any
) -> None:
    """Warn of what will go, in the main process only."""
    rank_zero_warn(message, DeprecationWarning, stacklevel=stacklevel, **kwargs)


class WarningCache(set[str]):
    """Says each text once."""

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Warn, as :func:`rank_zero_warn` does."""
        if message not in self:
            self.add(message)
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        """Warn of what will go, as :func:`rank_zero_deprecation` does."""
        if message not in self:
            self.add(message)
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, **kwargs: Any) -> None:
        """Log information, as :func:`rank_zero_info` does."""
        if message not in self:
            self.add(message)
            rank_zero_info(message, **kwargs)


def _with_caller(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let a log record name the line that called, two frames above."""
    return {"stacklevel": 3, **kwargs}


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """The message with the process's rank before it."""
    return message if rank is None else f"[rank: {rank}] {message}"


def _distributed_is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def disable_possible_user_warnings(module: str = "") -> None:
    """Ignore warnings of the kind :class:`PossibleUserWarning`."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


# Nestings of tensors.


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Move all tensors of a batch to a device."""
    return move_batch(batch, torch.device(device))


def apply_to_collection(
    data: Any,
    dtype: type | tuple[type, ...],
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: type | tuple[type, ...] | None = None,
    include_none: bool = True,
    **kwargs: Any,
) -> Any:
    """Call a function on all objects of a kind in a nesting of mappings, sequences and dataclasses.

    Args:
        data: the nesting.
        dtype: the kind.
        function: called with each of them.
        *args: for the function.
        wrong_dtype: kinds to leave alone.
        include_none: keep a None that the function returns.
        **kwargs: for the function.

    Returns:
        The nesting with the results in their places.
    """

    def apply(item: Any) -> Any:
        is_left_alone = wrong_dtype is not None and isinstance(item, wrong_dtype)
        if isinstance(item, dtype) and not is_left_alone:
            return function(item, *args, **kwargs)
        if isinstance(item, Mapping):
            values = {key: apply(value) for key, value in item.items()}
            kept = {k: v for k, v in values.items() if include_none or v is not None}
            return _like_mapping(item, kept)
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*map(apply, item))
        if isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
            results = [apply(value) for value in item]
            kept_items = [v for v in results if include_none or v is not None]
            return tuple(kept_items) if isinstance(item, tuple) else kept_items
        return item

    return apply(data)


def _like_mapping(item: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same class, where it can be made of a dict."""
    if type(item) is dict:
        return values
    default_factory = getattr(item, "default_factory", None)
    if default_factory is not None:
        return type(item)(default_factory, values)  # type: ignore[call-arg]
    try:
        return type(item)(values)  # type: ignore[call-arg]
    except TypeError:
        return values


def convert_to_tensors(data: Any, device: Any) -> Any:
    """A nesting whose numbers and arrays are tensors on a device."""

    def convert(value: Any) -> Tensor:
        return torch.as_tensor(value).to(device)

    kinds: tuple[Any, ...] = (bool, int, float, Tensor)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kinds = (*kinds, numpy.ndarray)
    return apply_to_collection(data, kinds, convert)


def convert_tensors_to_scalars(data: Any) -> Any:
    """A nesting whose tensors are numbers.

    Raises:
        ValueError: for a tensor of several elements.
    """

    def convert(tensor: Tensor) -> Any:
        if tensor.numel() != 1:
            raise ValueError(
                f"The metric `{tensor}` does not contain a single element, thus it cannot be converted to a scalar."
            )
        return tensor.item()

    return apply_to_collection(data, Tensor, convert)


# Models.


class _DeviceDtypeModuleMixin(nn.Module):
    """A module that knows the device and the dtype of its first parameter or buffer."""

    @property
    def device(self) -> torch.device:
        """The device; the CPU without parameters."""
        return _first_tensor(self).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return _first_tensor(self).dtype


def _first_tensor(module: nn.Module) -> Tensor:
    tensors = chain(module.parameters(), module.buffers())
    return next(tensors, torch.empty(0))


def grad_norm(
    module: nn.Module, norm_type: float | int | str, group_separator: str = "/"
) -> dict[str, float]:
    """The norms of the parameters' gradients, and of all of them together.

    Args:
        module: whose parameters.
        norm_type: the order of the norm; ``"inf"`` for the largest value.
        group_separator: stands between ``grad_2.0_norm`` and the parameter's name.

    Returns:
        The norms by ``grad_<order>_norm/<name>``, and ``grad_<order>_norm_total``. Empty without gradients.

    Raises:
        ValueError: if ``norm_type`` is not positive.
    """
    order = float(norm_type)
    if order <= 0:
        raise ValueError(
            f"`norm_type` must be a positive number or 'inf' (infinity norm); got {norm_type!r}"
        )
    norms = {
        f"grad_{order}_norm{group_separator}{name}": parameter.grad.data.norm(order)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        total = torch.tensor(list(norms.values())).norm(order)
        norms[f"grad_{order}_norm_total"] = total
    return norms  # type: ignore[return-value] # tensors, as there


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """The names of parameters that are one, in a list for each."""
    names: dict[Tensor, list[str]] = {}
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(prefix, recurse=False):
            names.setdefault(parameter, []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def set_shared_parameters(
    module: nn.Module, shared_params: list[list[str]]
) -> nn.Module:
    """Let the parameters of each list of names be one: the first of it."""
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
    return module


def measure_flops(
    model: nn.Module,
    forward_fn: Callable[[], Any],
    loss_fn: Callable[[Any], Tensor] | None = None,
    display: bool = False,
) -> int:
    """Count the floating-point operations of a forward pass, and of its backward pass.

    Args:
        model: the model that ``forward_fn`` calls.
        forward_fn: runs the forward pass.
        loss_fn: makes a loss of its result; without it, there is no backward pass.
        display: print a table.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=display)
    with counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return counter.get_total_flops()


def is_param_in_hook_signature(
    hook_fx: Callable[..., Any],
    param: str,
    explicit: bool = False,
    min_args: int | None = None,
) -> bool:
    """Whether a hook takes an argument.

    Args:
        hook_fx: the hook.
        param: name of the argument.
        explicit: whether ``*args`` counts not.
        min_args: how many arguments, at least, count as taking it.
    """
    names = inspect.getfullargspec(inspect.unwrap(hook_fx))
    takes_all = not explicit and names.varargs is not None
    takes_enough = min_args is not None and len(names.args) - 1 >= min_args
    return param in names.args or takes_all or takes_enough


def _jit_is_scripting() -> bool:
    return torch.jit.is_scripting()  # type: ignore[attr-defined] # public, though torch does not list it


# Memory and machines.


def is_oom_error(exception: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has no memory left."""
    text = str(exception)
    return (
        isinstance(exception, torch.OutOfMemoryError)
        or "CUDNN_STATUS_NOT_SUPPORTED" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "out of memory" in text
    )


is_cuda_out_of_memory = is_oom_error


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether an exception says that cuDNN supports an operation not, as it does where memory is short."""
    return "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." in str(exception)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether an exception says that the machine has no memory left."""
    return "DefaultCPUAllocator: can't allocate memory" in str(exception)


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """A nesting whose tensors have no graph.

    Args:
        in_dict: the nesting.
        to_cpu: also move them to the CPU.
    """

    def detach(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        return detached.cpu() if to_cpu else detached

    return apply_to_collection(in_dict, Tensor, detach)


def garbage_collection_cuda() -> None:
    """Collect garbage, and give the accelerator's unused memory back."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many workers a loader may have, if each process of this machine has one.

    Args:
        local_world_size: number of processes on this machine.

    Raises:
        ValueError: if it is less than 1.
    """
    if local_world_size < 1:
        raise ValueError(
            f"local_world_size must be at least 1; got {local_world_size!r}"
        )
    return max(1, usable_cpus() // local_world_size - 1)


def is_shared_filesystem(
    strategy: Any, path: str | Path | None = None, timeout: int = 3
) -> bool:
    """Whether all machines of a job see the same folder.

    Args:
        strategy: of the job.
        path: the folder. Default: the working directory.
        timeout: accepted for familiarity; the processes wait for each other instead.
    """
    folder = Path.cwd() if path is None else Path(path)
    if "://" in str(path) or strategy.world_size == 1:
        return True
    name = f".shared-{os.getpid()}-{socket.gethostname()}"
    mark = folder / strategy.broadcast(name)
    if strategy.is_global_zero:
        mark.touch()
    strategy.barrier()
    seen = mark.exists()
    all_seen = all(strategy.gather_objects(seen))
    if strategy.is_global_zero:
        mark.unlink()
    return all_seen


# Files and packages.


def get_filesystem(path: Any, **kwargs: Any) -> Any:
    """The fsspec file system of a path or URL."""
    from fsspec.core import url_to_fs

    return url_to_fs(str(path), **kwargs)[0]


def _load(
    path_or_url: Any, map_location: Any = None, weights_only: bool | None = None
) -> Any:
    """Open a file that ``torch.save`` has written; ``weights_only=False`` lets it hold objects, which can run code."""
    weights_only = weights_only is not False
    if not isinstance(path_or_url, (str, Path)):
        return torch.load(path_or_url, map_location, weights_only=weights_only)
    if str(path_or_url).startswith("http"):
        return torch.hub.load_state_dict_from_url(
            str(path_or_url), map_location=map_location, weights_only=weights_only
        )
    with get_filesystem(path_or_url).open(str(path_or_url), "rb") as file:
        return torch.load(file, map_location, weights_only=weights_only)


def _is_local_file_protocol(path: Any) -> bool:
    """Whether a path is one of this machine's."""
    return "://" not in str(path) or str(path).startswith(("file://", "local://"))


def _is_dir(fs: Any, path: Any, strict: bool = False) -> bool:
    """Whether a path is a folder; of stores that have none, with ``strict``, whether something is below it."""
    return fs.isdir(str(path)) or (strict and bool(fs.ls(str(path))))


def _atomic_save(checkpoint: dict[str, Any], filepath: Any) -> None:
    """Write a file with ``torch.save``, whole or not at all."""
    fs = get_filesystem(filepath)
    with fs.transaction, fs.open(str(filepath), "wb") as file:
        torch.save(checkpoint, file)


def find_free_network_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _destroy_dist_connection() -> None:
    """Leave the processes' group, if there is one."""
    if _distributed_is_initialized():
        torch.distributed.destroy_process_group()


def _get_rank() -> int | None:
    """This process's index among all, or None if nothing says it."""
    given = [name for name in _RANK_VARIABLES if name in os.environ]
    return int(os.environ[given[0]]) if given else None


def migrate_checkpoint(checkpoint: dict[str, Any], *_: Any) -> tuple[Any, Any]:
    """The checkpoint of an older version as it is, and no migrations: ``ckpt_path`` takes those of Lightning 2."""
    return checkpoint, {}


@contextmanager
def pl_legacy_patch() -> Iterator[None]:
    """Does nothing: files of older versions are read without their modules."""
    yield


def get_a_var(obj: Any) -> Tensor | None:
    """The first tensor of a nesting, or None."""
    if isinstance(obj, Tensor):
        return obj
    values: Any = ()
    if isinstance(obj, Mapping):
        values = obj.values()
    elif isinstance(obj, (list, tuple)):
        values = obj
    found = (get_a_var(value) for value in values)
    return next((tensor for tensor in found if tensor is not None), None)


# What packages use to tell Lightning of their own kinds of devices.


def _check_data_type(devices: Any) -> None:
    """Raise unless this can be the Trainer's ``devices``."""
    listed = devices if isinstance(devices, (list, tuple)) else [devices]
    for device in listed:
        is_index = isinstance(device, (int, str)) and not isinstance(device, bool)
        if device is not None and not is_index:
            raise TypeError(
                f"devices must be a count, indices or a text; got {devices!r}"
            )


def _check_unique(device_ids: list[int]) -> None:
    """Raise if a device is named twice."""
    if len(set(device_ids)) < len(device_ids):
        raise MisconfigurationException(f"devices={device_ids} names a device twice")


def _normalize_parse_gpu_string_input(devices: Any) -> Any:
    """The count or the indices in a text such as ``"2"`` or ``"0,2"``; anything else as it is."""
    if not isinstance(devices, str):
        return devices
    numbers = [int(number) for number in devices.split(",") if number.strip()]
    return numbers if "," in devices else numbers[0]


def _register_classes(registry: Any, method: str, module: Any, parent: type) -> None:
    """Let all classes of a module that derive from ``parent`` register themselves."""
    for value in vars(module).values():
        is_kind = isinstance(value, type) and issubclass(value, parent)
        if is_kind and hasattr(value, method):
            getattr(value, method)(registry)
