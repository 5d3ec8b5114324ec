"""The options of ``loopwright launch``: torchrun's and ``accelerate launch``'s, in either spelling."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .unknown import no_such


@dataclass(frozen=True)
class Option:
    """One option, under the names that different launchers have for it.

    Attributes:
        names: with hyphens; underscores are taken, too.
        help: what it asks for.
        kind: makes its value; None for a flag.
        choices: of values.
        variable: an environment variable that passes the value on to the programs.
        repeated: whether it may be given several times, for a list.
    """

    names: tuple[str, ...]
    help: str
    kind: Callable[[str], Any] | None = str
    choices: tuple[str, ...] | None = None
    variable: str = ""
    repeated: bool = False

    @property
    def name(self) -> str:
        """Under which its value is kept."""
        return self.names[0].lstrip("-").replace("-", "_")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return what makes an integer from ``minimum`` of a text."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError
        return value

    # What argparse calls the type in its errors.
    integer.__name__ = f"integer from {minimum}"
    return integer


def count_of_processes(text: str) -> int | str:
    """Return a number from 1, or a word for as many as there are devices."""
    return text if text in ("auto", "gpu", "cpu") else at_least(1)(text)


count_of_processes.__name__ = "integer from 1, auto, gpu or cpu:"

OPTIONS = (
    Option(
        ("--processes", "--nproc-per-node"),
        "processes on this machine; auto, the default: one for each accelerator, or one",
        count_of_processes,
    ),
    Option(
        ("--num-processes",),
        "processes on all machines together, as accelerate counts them",
        at_least(1),
    ),
    Option(
        ("--nnodes", "--num-machines"),
        "machines; least:most if they may come and go; default: 1",
    ),
    Option(("--node-rank", "--machine-rank"), "this machine's index", at_least(0)),
    Option(
        ("--master-addr", "--main-process-ip"),
        "where the machines meet: the address of the one with index 0",
    ),
    Option(
        ("--master-port", "--main-process-port"),
        "where they meet there; default: 29500",
        at_least(0),
    ),
    Option(("--rdzv-backend",), "c10d (the default) or static"),
    Option(("--rdzv-endpoint",), "where the machines meet, as host:port"),
    Option(("--rdzv-id",), "a name of the job, the same on all machines"),
    Option(("--rdzv-conf",), "further settings, as key=value,key=value"),
    Option(
        ("--local-addr",),
        "this machine's address for the others, where its host name is not one",
    ),
    Option(
        ("--max-restarts",),
        "how often all processes are started again when one fails; default: 0",
        at_least(0),
    ),
    Option(
        ("--mixed-precision",),
        "the precision, where the program passes none",
        choices=("no", "fp16", "bf16"),
        variable="ACCELERATE_MIXED_PRECISION",
    ),
    Option(
        ("--gradient-accumulation-steps",),
        "micro-batches of an optimizer step, where the program passes none",
        at_least(1),
        variable="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    ),
    Option(
        ("--cpu", "--use-cpu"),
        "use no accelerator",
        None,
        variable="ACCELERATE_USE_CPU",
    ),
    Option(
        ("--debug",),
        "compare collective calls between processes",
        None,
        variable="ACCELERATE_DEBUG_MODE",
    ),
    Option(
        ("--gpu-ids",),
        "indices of the GPUs to use, with commas",
        variable="CUDA_VISIBLE_DEVICES",
    ),
    Option(
        ("--num-cpu-threads-per-process",),
        "threads of each process",
        at_least(1),
        variable="OMP_NUM_THREADS",
    ),
    Option(("--config-file",), "a file of accelerate config (YAML or JSON)"),
    Option(("--module", "-m"), "the program is a module, as in python -m", None),
    Option(("--no-python",), "the program is run as it is, without python", None),
)

# Options of `accelerate launch` that ask for another way to train: they reach the program as they do there, and its
# Engine or Accelerator serves them, or says what to use.
PASSED_ON = tuple(
    Option((f"--{name}",), SUPPRESS, kind, variable=variable)
    for name, kind, variable in (
        ("use-fsdp", None, "ACCELERATE_USE_FSDP"),
        ("fsdp-version", str, "FSDP_VERSION"),
        ("fsdp-sharding-strategy", str, "FSDP_SHARDING_STRATEGY"),
        ("fsdp-reshard-after-forward", str, "FSDP_RESHARD_AFTER_FORWARD"),
        ("fsdp-offload-params", str, "FSDP_OFFLOAD_PARAMS"),
        ("fsdp-min-num-params", str, "FSDP_MIN_NUM_PARAMS"),
        ("fsdp-auto-wrap-policy", str, "FSDP_AUTO_WRAP_POLICY"),
        ("fsdp-transformer-layer-cls-to-wrap", str, "FSDP_TRANSFORMER_CLS_TO_WRAP"),
        ("fsdp-backward-prefetch", str, "FSDP_BACKWARD_PREFETCH"),
        ("fsdp-state-dict-type", str, "FSDP_STATE_DICT_TYPE"),
        ("fsdp-forward-prefetch", str, "FSDP_FORWARD_PREFETCH"),
        ("fsdp-use-orig-params", str, "FSDP_USE_ORIG_PARAMS"),
        ("fsdp-cpu-ram-efficient-loading", str, "FSDP_CPU_RAM_EFFICIENT_LOADING"),
        ("fsdp-sync-module-states", str, "FSDP_SYNC_MODULE_STATES"),
        ("fsdp-activation-checkpointing", str, "FSDP_ACTIVATION_CHECKPOINTING"),
        ("use-deepspeed", None, "ACCELERATE_USE_DEEPSPEED"),
        ("zero-stage", str, "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        ("gradient-clipping", str, "ACCELERATE_GRADIENT_CLIPPING"),
        ("deepspeed-config-file", str, "ACCELERATE_DEEPSPEED_CONFIG_FILE"),
        (
            "offload-optimizer-device",
            str,
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        ),
        ("offload-param-device", str, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
        ("zero3-init-flag", str, "ACCELERATE_DEEPSPEED_ZERO3_INIT"),
        ("zero3-save-16bit-model", str, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"),
        ("dynamo-backend", str, "ACCELERATE_DYNAMO_BACKEND"),
    )
)

# What several processes on one or more machines need not be told here.
NEEDLESS = tuple(
    Option((f"--{name}",), SUPPRESS, None)
    for name in ("multi-gpu", "same-network", "standalone")
)

_OUTPUT = "all processes write to this terminal: send that to a file, or have the program write files by rank"
_OTHERS = (
    "launch with torchrun or accelerate launch, whose processes a program joins as well"
)
# Options of torchrun and of `accelerate launch` that have nothing to act on here, and what to do instead.
REFUSED = {
    "--tee": _OUTPUT,
    "-t": _OUTPUT,
    "--redirects": _OUTPUT,
    "-r": _OUTPUT,
    "--log-dir": _OUTPUT,
    "--local-ranks-filter": _OUTPUT,
    "--run-path": "name the file, or --module",
    "--role": _OTHERS,
    "--monitor-interval": _OTHERS,
    "--start-method": _OTHERS,
    "--numa-binding": _OTHERS,
    "--virtual-local-rank": _OTHERS,
    "--signals-to-handle": _OTHERS,
    "--shutdown-timeout": _OTHERS,
    "--mpirun-hostfile": "start the program with mpirun: its processes are joined",
    "--deepspeed-hostfile": "run loopwright launch on each machine, with --nnodes and --node-rank",
    "--use-megatron-lm": 'pass strategy="fsdp" in the program',
    "--use-parallelism-config": "pass strategy=FSDPStrategy(tensor_parallel_size=…) in the program",
    "--tpu": "there is no support of TPUs",
    "--enable-cpu-affinity": "numactl in front of the command",
}


def options_by_name(
    options: Sequence[Option] = (*OPTIONS, *PASSED_ON, *NEEDLESS),
) -> dict[str, Option]:
    """Return options by each of their names; by default those that the launcher takes."""
    found: dict[str, Option] = {}
    for option in options:
        found.update(dict.fromkeys(option.names, option))
    return found


def split_arguments(
    arguments: Sequence[str],
    fail: Callable[[str], NoReturn],
    options: Mapping[str, Option],
    refused: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Divide a command line into a command's options, and the program with its arguments.

    Args:
        arguments: of the command line.
        fail: called with what is wrong.
        options: those that the command takes, by name.
        refused: names of others, and what to do instead.

    Returns:
        Both parts; the options in our spelling.
    """
    own: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        written, equals, value = rest.pop(0).partition("=")
        if written == "--":
            break
        name = written.replace("_", "-")
        if name in ("-h", "--help"):
            return ["--help"], []
        if name in refused:
            fail(f"{written} has no effect here: {refused[name]}")
        if name not in options:
            fail(no_such("option", name, options))
        own.append(name + equals + value)
        if options[name].kind is not None and not equals:
            if not rest:
                fail(f"{written} needs a value")
            own[-1] += f"={rest.pop(0)}"
    return own, rest


def make_parser() -> ArgumentParser:
    """Return the parser of the launcher's own part."""
    parser = ArgumentParser(
        prog="loopwright launch",
        usage="loopwright launch [options] program.py [its arguments]",
        description="Start a program in several processes, which end together, and tell which one failed first. "
        "Options may be spelled with underscores, too.",
        allow_abbrev=False,
    )
    add_options(parser, (*OPTIONS, *PASSED_ON, *NEEDLESS))
    return parser


def add_options(parser: ArgumentParser, options: Sequence[Option]) -> None:
    """Let a parser take these options."""
    for option in options:
        if option.kind is None:
            parser.add_argument(
                *option.names,
                dest=option.name,
                help=option.help,
                action="store_const",
                const=True,
            )
        else:
            parser.add_argument(
                *option.names,
                dest=option.name,
                help=option.help,
                type=option.kind,
                choices=option.choices,
                action="append" if option.repeated else "store",
                metavar=option.name.rpartition("_")[2].upper(),
            )


def variables_of(options: Namespace) -> dict[str, str]:
    """Return the environment variables that pass options on to the programs."""
    found: dict[str, str] = {}
    for option in (*OPTIONS, *PASSED_ON):
        value = getattr(options, option.name)
        if option.variable and value is not None:
            found[option.variable] = "true" if value is True else str(value)
    return found
