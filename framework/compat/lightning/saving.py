"""Lightning's files of hyperparameters."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ...checkpoint.configs import AttributeDict
from .core import load_module_or_data
from .files import as_literal, yaml_module
from .utilities import get_filesystem, rank_zero_warn

__all__ = [
    "CHECKPOINT_PAST_HPARAMS_KEYS",
    "_load_from_checkpoint",
    "get_filesystem",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
    "update_hparams",
]

# Keys of hyperparameters in checkpoints of old versions.
CHECKPOINT_PAST_HPARAMS_KEYS = ("hparams", "module_arguments")
_load_from_checkpoint = load_module_or_data


def update_hparams(hparams: dict[str, Any], updates: Mapping[str, Any]) -> None:
    """Change hyperparameters in place, and those inside of them.

    Args:
        hparams: to be changed.
        updates: the new values; a mapping changes what it names of a mapping, and leaves the rest.
    """
    for name, value in updates.items():
        if isinstance(value, Mapping):
            changed = hparams.get(name, {})
            update_hparams(changed, value)
            value = changed
        hparams[name] = value


def load_hparams_from_yaml(
    config_yaml: Any, use_omegaconf: bool = True
) -> dict[str, Any]:
    """The hyperparameters in a YAML file.

    Args:
        config_yaml: its path. Where there is no such file, a warning says so, and there are none.
        use_omegaconf: give a ``DictConfig``, if OmegaConf is installed.
    """
    system = get_filesystem(config_yaml)
    if not system.exists(str(config_yaml)):
        rank_zero_warn(f"Missing Tags: {config_yaml}.", category=RuntimeWarning)
        return {}
    with system.open(str(config_yaml), "r") as file:
        hparams = yaml_module().full_load(file)
    if use_omegaconf:
        try:
            from omegaconf import OmegaConf
        except ModuleNotFoundError:
            return hparams
        return OmegaConf.create(hparams)
    return hparams


def save_hparams_to_yaml(
    config_yaml: Any, hparams: Any, use_omegaconf: bool = True
) -> None:
    """Write hyperparameters to a YAML file.

    Args:
        config_yaml: its path, in a folder that exists.
        hparams: a mapping, ``Namespace`` or OmegaConf object. What YAML cannot write is left out, with a warning.
        use_omegaconf: accepted for familiarity.

    Raises:
        RuntimeError: if there is no such folder.
        TypeError: if these are no hyperparameters.
    """
    system = get_filesystem(config_yaml)
    folder = os.path.dirname(str(config_yaml))
    if folder and not system.isdir(folder):
        raise RuntimeError(f"Missing folder: {folder}.")
    values = _plain(hparams)
    yaml = yaml_module()
    kept = {}
    for name, value in values.items():
        value = value.name if isinstance(value, Enum) else value
        try:
            value = dict(value) if isinstance(value, AttributeDict) else value
            yaml.dump(value)
        except (TypeError, ValueError, yaml.YAMLError):
            rank_zero_warn(
                f"Skipping '{name}' parameter because it is not possible to safely dump to YAML."
            )
            continue
        kept[name] = value
    with system.open(str(config_yaml), "w", newline="") as file:
        yaml.dump(kept, file)


def _plain(hparams: Any) -> dict[str, Any]:
    """Hyperparameters as a dict."""
    if isinstance(hparams, Namespace):
        return dict(vars(hparams))
    # OmegaConf's objects know how to become plain ones; their own class may not be installed.
    if type(hparams).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(hparams, resolve=True)  # type: ignore[return-value] # a mapping's is a dict
    if isinstance(hparams, Mapping):
        return dict(hparams)
    raise TypeError(f"hparams must be a mapping or a Namespace; got {hparams!r}")


def load_hparams_from_tags_csv(tags_csv: Any) -> dict[str, Any]:
    """The hyperparameters in a CSV file with the columns ``key`` and ``value``.

    Args:
        tags_csv: its path. Where there is no such file, a warning says so, and there are none.
    """
    system = get_filesystem(tags_csv)
    if not system.exists(str(tags_csv)):
        rank_zero_warn(f"Missing Tags: {tags_csv}.", category=RuntimeWarning)
        return {}
    with system.open(str(tags_csv), "r", newline="") as file:
        return {row["key"]: as_literal(row["value"]) for row in csv.DictReader(file)}


def save_hparams_to_tags_csv(tags_csv: Any, hparams: Any) -> None:
    """Write hyperparameters to a CSV file with the columns ``key`` and ``value``.

    Args:
        tags_csv: its path, in a folder that exists.
        hparams: a mapping or ``Namespace``.

    Raises:
        RuntimeError: if there is no such folder.
    """
    system = get_filesystem(tags_csv)
    folder = os.path.dirname(str(tags_csv))
    if folder and not system.isdir(folder):
        raise RuntimeError(f"Missing folder: {folder}.")
    with system.open(str(tags_csv), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "value"))
        writer.writerows(_plain(hparams).items())
