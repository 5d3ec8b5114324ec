"""Lightning's small functions: ranks, nestings of tensors, memory, models, files."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....strategies.launch.machine import usable_cpus
from ...checkpoint.configs import AttributeDict
from ...data.batches import batch_size_of
from ...data.combined import CombinedLoader as NativeCombinedLoader
from ...data.device_input import move_batch
from ...seed import isolated_rng, seed_everything
from ...subclasses import overrides
from .states import LightningEnum

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "MisconfigurationException",
    "PossibleUserWarning",
    "ReduceOp",
    "_check_data_type",
    "_check_unique",
    "_distributed_is_initialized",
    "_jit_is_scripting",
    "_load",
    "_normalize_parse_gpu_string_input",
    "_register_classes",
    "apply_to_collection",
    "disable_possible_user_warnings",
    "extract_batch_size",
    "find_shared_parameters",
    "garbage_collection_cuda",
    "get_a_var",
    "get_filesystem",
    "get_init_args",
    "grad_norm",
    "is_cuda_out_of_memory",
    "is_oom_error",
    "is_overridden",
    "is_param_in_hook_signature",
    "is_picklable",
    "is_shared_filesystem",
    "isolate_rng",
    "measure_flops",
    "move_data_to_device",
    "package_available",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
    "set_shared_parameters",
    "suggested_max_num_workers",
]

log = logging.getLogger("loopwright")

isolate_rng = isolated_rng
ReduceOp = torch.distributed.ReduceOp


class CombinedLoader(NativeCombinedLoader):
    """A :class:`~loopwright.framework.CombinedLoader` that gives, read by hand, each batch with two indices.

    They are the batch's and, with ``mode="sequential"``, its loader's; otherwise that is 0. A run gets batches alone.
    """

    def for_runs(self) -> NativeCombinedLoader:
        """The same, which gives batches alone."""
        return NativeCombinedLoader(self.iterables, self.mode)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        loaders = [super().__iter__()]
        if self.mode == "sequential":
            loaders = self.flattened
        for loader_idx, loader in enumerate(loaders):
            for batch_idx, batch in enumerate(loader):
                yield batch, batch_idx, loader_idx


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


def extract_batch_size(batch: Any) -> int:
    """The first dimension of a batch's tensors."""
    return batch_size_of(batch)


# Models.


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
        raise ValueError(f"norm_type must be a positive number; got {norm_type!r}")
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


def is_overridden(method_name: str, instance: Any = None, parent: Any = None) -> bool:
    """Whether an object has a method of its own.

    Args:
        method_name: of the method.
        instance: the object; nothing is overridden in None.
        parent: the class whose method does not count. Default: that of Loopwright which it derives from.
    """
    if instance is None:
        return False
    if parent is None:
        parent = _contract_of(instance)
    if not hasattr(parent, method_name):
        raise ValueError(f"{parent.__name__} has no method {method_name!r}")
    return overrides(instance, method_name, parent)


def _contract_of(instance: Any) -> type:
    """The outermost class of Loopwright that an object's class derives from."""
    for kind in type(instance).__mro__:
        if kind.__module__.startswith("loopwright."):
            return kind
    raise ValueError(f"{type(instance).__name__} derives from no class of the trainer")


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


def get_init_args(frame: Any) -> dict[str, Any]:
    """The arguments of a constructor, from its frame."""
    information = inspect.getargvalues(frame)
    arguments = {name: information.locals[name] for name in information.args[1:]}
    if information.keywords:
        arguments.update(information.locals[information.keywords])
    return arguments


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


def is_picklable(obj: object) -> bool:
    """Whether an object can be pickled."""
    try:
        pickle.dumps(obj)
    except Exception:
        return False
    return True


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
    """Open a file that ``torch.save`` has written."""
    if not isinstance(path_or_url, (str, Path)):
        return torch.load(path_or_url, map_location, weights_only=weights_only)
    if str(path_or_url).startswith("http"):
        return torch.hub.load_state_dict_from_url(
            str(path_or_url), map_location=map_location, weights_only=bool(weights_only)
        )
    with get_filesystem(path_or_url).open(str(path_or_url), "rb") as file:
        return torch.load(file, map_location, weights_only=weights_only)


def package_available(name: str) -> bool:
    """Whether a package can be imported."""
    from importlib.util import find_spec

    return find_spec(name) is not None


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
