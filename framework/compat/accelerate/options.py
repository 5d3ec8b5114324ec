"""Accelerate's enumerations, and the dataclasses that its Accelerator takes."""

from __future__ import annotations

import copy
import enum
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch


class _EnumWithContains(enum.EnumMeta):
    """Lets ``in`` look for values, too."""

    def __contains__(cls, item: object) -> bool:
        try:
            cls(item)
        except ValueError:
            return False
        return True


class BaseEnum(enum.Enum, metaclass=_EnumWithContains):
    """An enumeration whose members are printed as their values."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def list(cls) -> list[str]:
        """All values."""
        return [str(member) for member in cls]


class DistributedType(str, enum.Enum):
    """How the processes work together. Of these, an Accelerator here has NO, MULTI_*, FSDP and DEEPSPEED."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"


class SageMakerDistributedType(str, enum.Enum):
    """How processes work together on SageMaker; looked at by programs only."""

    NO = "NO"
    DATA_PARALLEL = "DATA_PARALLEL"
    MODEL_PARALLEL = "MODEL_PARALLEL"


class ComputeEnvironment(str, enum.Enum):
    """Where a program runs."""

    LOCAL_MACHINE = "LOCAL_MACHINE"
    AMAZON_SAGEMAKER = "AMAZON_SAGEMAKER"


class DDPCommunicationHookType(BaseEnum):
    """How DDP's gradients are communicated."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


class DynamoBackend(str, BaseEnum):
    """A backend of ``torch.compile``."""

    NO = "NO"
    EAGER = "EAGER"
    AOT_EAGER = "AOT_EAGER"
    INDUCTOR = "INDUCTOR"
    AOT_TS_NVFUSER = "AOT_TS_NVFUSER"
    NVPRIMS_NVFUSER = "NVPRIMS_NVFUSER"
    CUDAGRAPHS = "CUDAGRAPHS"
    OFI = "OFI"
    FX2TRT = "FX2TRT"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"
    AOT_TORCHXLA_TRACE_ONCE = "AOT_TORCHXLA_TRACE_ONCE"
    TORCHXLA_TRACE_ONCE = "TORCHXLA_TRACE_ONCE"
    TVM = "TVM"
    HPU_BACKEND = "HPU_BACKEND"
    NEURON = "NEURON"


class LoggerType(BaseEnum):
    """A tracker that Accelerate knows; tracking.py says which ones are served here."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"


class PrecisionType(str, BaseEnum):
    """In which numbers a model computes."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class RNGType(BaseEnum):
    """A generator of random numbers."""

    TORCH = "torch"
    CUDA = "cuda"
    MLU = "mlu"
    SDAA = "sdaa"
    MUSA = "musa"
    NPU = "npu"
    XLA = "xla"
    XPU = "xpu"
    HPU = "hpu"
    NEURON = "neuron"
    GENERATOR = "generator"


class CustomDtype(enum.Enum):
    """Types of numbers that torch has no name for."""

    FP8 = "fp8"
    INT4 = "int4"
    INT2 = "int2"


class Options:
    """A dataclass that tells which of its fields are not as they are by default."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        # What the environment says is no default.
        with clear_environment():
            defaults = type(self)().to_dict()
        given = self.to_dict()
        return {name: given[name] for name in given if given[name] != defaults[name]}


@contextmanager
def clear_environment() -> Iterator[None]:
    """A context without any variable in the environment."""
    variables = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)


KwargsHandler = Options


@dataclass
class AutocastKwargs(Options):
    """How ``torch.autocast`` behaves.

    Attributes:
        enabled: whether it does anything.
        cache_enabled: whether it keeps weights that it has cast (default: torch's).
    """

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(Options):
    """Arguments of ``DistributedDataParallel``, as of :class:`~loopwright.strategies.DDPStrategy`.

    Attributes:
        dim, broadcast_buffers, bucket_cap_mb, find_unused_parameters, check_reduction, gradient_as_bucket_view,
            static_graph: torch's.
        comm_hook: how gradients are communicated.
        comm_wrapper: in which numbers.
        comm_state_option: arguments of the state of PowerSGD.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def to_dict(
        self,
        ignore_keys: tuple[str, ...] = (
            "comm_hook",
            "comm_wrapper",
            "comm_state_option",
        ),
    ) -> dict[str, Any]:
        """All fields but ``ignore_keys``."""
        fields = super().to_dict()
        return {name: fields[name] for name in fields if name not in ignore_keys}


@dataclass
class GradScalerKwargs(Options):
    """The loss scale of half precision, as of :class:`~loopwright.strategies.Precision`.

    Attributes:
        init_scale: at the beginning.
        growth_factor: by which it is multiplied after ``growth_interval`` steps without an overflow.
        backoff_factor: by which it is multiplied after an overflow.
        growth_interval: in optimizer steps.
        enabled: whether there is one.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class InitProcessGroupKwargs(Options):
    """How the processes meet.

    Attributes:
        backend: of torch's process group.
        init_method: where they meet; here a launcher says so.
        timeout: how long a collective waits for the slowest one (default: 10 minutes with NCCL, else 30).
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.timeout is None:
            self.timeout = timedelta(minutes=10 if self.backend == "nccl" else 30)


@dataclass
class ProfileKwargs(Options):
    """Arguments of ``torch.profiler.profile``.

    Attributes:
        activities: ``"cpu"``, ``"cuda"`` or ``"xpu"``.
        schedule_option: arguments of ``torch.profiler.schedule``.
        on_trace_ready: called with the profiler after each cycle of the schedule.
        record_shapes, profile_memory, with_stack, with_flops, with_modules: torch's.
        output_trace_dir: where each process writes its trace.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """Make the profiler.

        Raises:
            ValueError: for an activity that torch cannot profile.
        """
        known = {
            activity.name.lower(): activity
            for activity in torch.profiler.ProfilerActivity.__members__.values()
        }
        unknown = [name for name in self.activities or () if name not in known]
        if unknown:
            raise ValueError(
                f"activities must be among {', '.join(known)}; got {unknown[0]!r}"
            )
        schedule = self.schedule_option
        return torch.profiler.profile(
            activities=[known[name] for name in self.activities or ()] or None,
            schedule=None if schedule is None else torch.profiler.schedule(**schedule),
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


@dataclass
class DataLoaderConfiguration:
    """How loaders are prepared.

    Attributes:
        split_batches: divide each batch among the processes, instead of dealing out batches.
        dispatch_batches: read in the main process, and send the others their parts (default: for iterable datasets).
        even_batches: fill the last round with samples from the beginning, so that all processes have as many.
        use_seedable_sampler: draw the order of a shuffled loader from a seed and the epoch.
        data_seed: that seed (default: torch's).
        non_blocking: do not wait for batches to reach the device.
        use_stateful_dataloader: read with torchdata's ``StatefulDataLoader``, so that ``load_state`` goes on inside an
            epoch.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False


@dataclass
class GradientAccumulationPlugin(Options):
    """How gradients are accumulated.

    Attributes:
        num_steps: batches for each optimizer step.
        adjust_scheduler: count steps of a scheduler inside a window.
        sync_with_dataloader: end a window with the loader.
        sync_each_batch: average gradients after each batch, which takes less memory under FSDP.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False


@dataclass
class ProjectConfiguration:
    """Where a project keeps its files.

    Attributes:
        project_dir: its folder.
        logging_dir: that of trackers (default: ``project_dir``).
        automatic_checkpoint_naming: let ``save_state()`` name its folders ``checkpoints/checkpoint_0`` and so on.
        total_limit: how many of those to keep.
        iteration: the number of the next one.
        save_on_each_node: write in the main process of each machine, and not of one only.
    """

    project_dir: str | None = None
    logging_dir: str | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def set_directories(self, project_dir: str | None = None) -> None:
        """Set ``project_dir``, and ``logging_dir`` if there is none."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def count_checkpoint(self) -> None:
        """A checkpoint was written: the next one has the next number."""
        self.iteration += 1


@dataclass
class TorchDynamoPlugin(Options):
    """Arguments of ``torch.compile``, which is called on each prepared model unless the backend is NO.

    Attributes:
        backend: a :class:`DynamoBackend`.
        mode, fullgraph, dynamic, options, disable: torch's.
        use_regional_compilation: compile repeated blocks alone; here the whole model is compiled.
    """

    backend: DynamoBackend | str | None = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        prefix = "ACCELERATE_DYNAMO_"
        backend = self.backend or os.environ.get(prefix + "BACKEND", "no")
        self.backend = DynamoBackend(str(backend).upper())
        if self.mode is None:
            self.mode = os.environ.get(prefix + "MODE", "default")
        if self.fullgraph is None:
            self.fullgraph = is_true(os.environ.get(prefix + "USE_FULLGRAPH", "False"))
        if self.dynamic is None and prefix + "USE_DYNAMIC" in os.environ:
            self.dynamic = is_true(os.environ[prefix + "USE_DYNAMIC"])

    def to_dict(self) -> dict[str, Any]:
        """The arguments of ``torch.compile``."""
        fields = super().to_dict()
        fields["backend"] = str(fields["backend"].value).lower()
        del fields["use_regional_compilation"]
        return fields


@dataclass
class TensorInformation:
    """What must be known of a tensor to make room for it.

    Attributes:
        shape: its shape.
        dtype: its type.
    """

    shape: torch.Size
    dtype: torch.dtype


def is_true(value: str) -> bool:
    """Whether a variable's value says yes.

    Raises:
        ValueError: if it says neither yes nor no.
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"must be one of yes, no, true, false, 1 and 0; got {value!r}")
