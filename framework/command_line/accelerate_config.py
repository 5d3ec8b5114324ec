"""The file that ``accelerate config`` writes, read for ``loopwright launch --config_file``."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .options import options_by_name

# What the file's kinds of jobs ask for.
_KINDS = {"FSDP": "--use-fsdp", "DEEPSPEED": "--use-deepspeed"}
_PLAIN_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU")
# Keys that say nothing that a program could miss.
_NEEDLESS = (
    "compute_environment",
    "distributed_type",
    "downcast_bf16",
    "main_training_function",
    "deepspeed_multinode_launcher",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_env",
    "deepspeed_hostfile",
)
# Words that ask for nothing; "static" is how machines meet where nothing else is said.
_NOTHING = ("", "no", "false", "all", "static")


def read_config(
    path: str, options: Namespace, parser: ArgumentParser
) -> tuple[Namespace, list[str]]:
    """Fill in what the command line leaves open from a file.

    Args:
        path: of the file.
        options: the launcher's.
        parser: of these options.

    Returns:
        The options, and those of the file's keys that have no effect.
    """
    values = _flat(_load(path, parser))
    kind = str(values.get("distributed_type", "NO")).upper()
    if kind not in (*_KINDS, *_PLAIN_KINDS):
        parser.error(f"{path}: distributed_type {kind} cannot be served")
    arguments = [_KINDS[kind]] if kind in _KINDS else []
    ignored: list[str] = []
    known = options_by_name()
    for key, value in values.items():
        name = f"--{key.replace('_', '-')}"
        text = "" if value is None else str(value)
        if isinstance(value, bool):
            text = text.lower()
        if text.lower() in _NOTHING or key in _NEEDLESS:
            continue
        if key == "num_processes" and options.processes is not None:
            # The file counts the processes of all machines, the command line those of this one.
            continue
        if name not in known:
            ignored.append(key)
        elif known[name].kind is None:
            arguments.append(name)
        else:
            arguments.append(f"{name}={text}")
    from_file = parser.parse_args(arguments)
    for name, value in vars(from_file).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options, ignored


def _load(path: str, parser: ArgumentParser) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        parser.error(f"--config_file: {error}")
    if path.endswith(".json"):
        content = json.loads(text)
    else:
        try:
            import yaml
        except ImportError:
            parser.error("--config_file needs PyYAML: pip install 'loopwright[launch]'")
        content = yaml.safe_load(text)
    if not isinstance(content, dict):
        parser.error(f"{path} holds no settings of accelerate config")
    return content


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of sections, such as ``fsdp_config``, beside the others."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found.update(value)
        else:
            found[key] = value
    return found
