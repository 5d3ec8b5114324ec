"""Where a program runs and what it is made of: its command, commit, packages, machine and launcher."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ...strategies.launch.machine import total_memory, usable_cpus
from ...strategies.launch.processes import status_of
from .secrets import Secrets

DIFF_FILE = "changes.diff"

# git is asked for so long at most, in seconds, for each of its answers.
_GIT_SECONDS = 3.0
# Of what differs from the commit, in bytes.
_LONGEST_DIFF = 1 << 18
_MOST_UNTRACKED = 100
# Fits of one program that follow within so many seconds do not ask git again.
_GIT_AGE_SECONDS = 60.0
# Variables that launchers, torch and its libraries read; no others are kept.
_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES|"
    r"CUDA_DEVICE_ORDER|CUBLAS_WORKSPACE_CONFIG|PYTHONHASHSEED|TOKENIZERS_PARALLELISM|TRANSFORMERS_OFFLINE|"
    r"HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|MALLOC_\w+|OMP_\w+|MKL_\w+|KMP_\w+|GOMP_\w+|NCCL_\w+|GLOO_\w+|TORCH_\w+|"
    r"TORCHELASTIC_\w+|PYTORCH_\w+|LOOPWRIGHT_\w+|XLA_\w+|SLURM_(JOB_ID|JOB_NAME|JOB_PARTITION|JOB_NUM_NODES|NTASKS|"
    r"NNODES|NODEID|PROCID|LOCALID|RESTART_COUNT|ARRAY_JOB_ID|ARRAY_TASK_ID|CLUSTER_NAME|CPUS_PER_TASK|GPUS|"
    r"STEP_NUM_TASKS)|OMPI_COMM_WORLD_\w+|PMI_\w+)"
)


def command(secrets: Secrets) -> dict[str, Any]:
    """How the program was called: what was typed, and in which folder.

    Args:
        secrets: what not to tell.
    """
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    module = getattr(getattr(main, "__spec__", None), "name", None)
    return {
        "argv": secrets.clean_arguments(sys.argv),
        "executable": sys.executable,
        "orig_argv": secrets.clean_arguments(sys.orig_argv),
        "script": os.path.abspath(script) if script else None,
        "module": module,
        "cwd": os.getcwd(),
        "pid": os.getpid(),
    }


def packages() -> dict[str, str]:
    """Versions of all installed packages, by name: those of the folders from which this program imports."""
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            match = re.fullmatch(r"(.+?)-([^-]+)(?:-py\S+)?\.(?:dist|egg)-info", name)
            if match:
                # The first folder's is the one that is imported.
                found.setdefault(match[1].lower().replace("_", "-"), match[2])
    return dict(sorted(found.items()))


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine of the main process, and its device."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory": total_memory(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory": properties.total_memory,
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return facts


def seconds_of_program() -> float | None:
    """How long this process has been running; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        started = int(status_of(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return None


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        # All processors of a machine are alike.
        text = file.read(4096).decode(errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1]
    return platform.processor()


def launcher(environment: Any, world_size: int) -> dict[str, Any]:
    """Who has started the processes, with the variables that say so."""
    kept = {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name)
    }
    return {
        "name": None if environment is None else environment.launcher,
        "world_size": world_size,
        "num_nodes": 1 if environment is None else environment.num_nodes,
        "environment": kept,
    }


def git(secrets: Secrets, write: Callable[[str, bytes], None]) -> dict[str, Any] | None:
    """The commit of the program's folder, and what differs from it.

    Args:
        secrets: what not to tell.
        write: takes the name of a file of the record and what it is to hold.

    Returns:
        The facts; None if that folder is in no repository, or there is no git.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folder = os.path.dirname(os.path.abspath(main)) if main else os.getcwd()
    asked = _asked.get(folder)
    if asked is None or time.monotonic() - asked[0] > _GIT_AGE_SECONDS:
        asked = time.monotonic(), *_look_at(folder)
        _asked[folder] = asked
    _, facts, diff = asked
    if facts is None:
        return None
    if diff:
        write(DIFF_FILE, secrets.clean(diff).encode())
    return secrets.clean_value(facts)


# When git was asked about a folder, and what :func:`_look_at` has found.
_asked: dict[str, tuple[float, dict[str, Any] | None, str]] = {}


def _look_at(folder: str) -> tuple[dict[str, Any] | None, str]:
    """The facts, and what differs from the commit; secrets are still in them."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, ""
    status = _ask_git(folder, "status", "--porcelain", "--untracked-files=normal") or ""
    lines = status.splitlines()
    untracked = [line[3:] for line in lines if line.startswith("??")]
    changed = [line[3:] for line in lines if not line.startswith("??")]
    remote = _ask_git(folder, "config", "--get", "remote.origin.url")
    facts: dict[str, Any] = {
        "commit": commit,
        "branch": _ask_git(folder, "symbolic-ref", "--short", "-q", "HEAD"),
        "subject": _ask_git(folder, "log", "-1", "--format=%s"),
        "root": _ask_git(folder, "rev-parse", "--show-toplevel"),
        "remote": remote,
        "is_dirty": bool(changed),
        "changed": changed[:_MOST_UNTRACKED],
        "untracked": untracked[:_MOST_UNTRACKED],
        "diff": None,
    }
    if not changed:
        return facts, ""
    options = ("--no-ext-diff", "--no-textconv", "--no-color")
    diff = _ask_git(folder, "diff", "HEAD", *options) or ""
    if len(diff) > _LONGEST_DIFF:
        left = len(diff) - _LONGEST_DIFF
        diff = f"{diff[:_LONGEST_DIFF]}\n… {left} more characters\n"
    facts["diff"] = DIFF_FILE
    return facts, diff


def _ask_git(folder: str, *arguments: str) -> str | None:
    """What git answers; None if it does not."""
    # It neither asks for a password nor locks the repository, nor starts programs that the repository names.
    environment = {
        **os.environ,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
    }
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", folder, *arguments],
            capture_output=True,
            timeout=_GIT_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return None
    return done.stdout.decode(errors="replace").strip("\n")
