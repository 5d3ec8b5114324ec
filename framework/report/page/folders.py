"""Finds the runs in folders, and reads each from the best source that it has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..secrets import Secrets
from .from_rows import json_lines, read_csv, read_json_lines, read_trainer_state
from .from_tensorboard import read_events
from .run import Run

RECORD = "record"
EVENTS = "events.out.tfevents.*"
# The first that there is, is read: a run that has several logged the same to each.
ROWS = {
    "metrics.csv": ("csv", read_csv),
    "metrics.jsonl": ("jsonl", read_json_lines),
    "trainer_state.json": ("trainer_state", read_trainer_state),
    "log.csv": ("csv", read_csv),
    "progress.csv": ("csv", read_csv),
    "training.log": ("csv", read_csv),
}
HPARAMS = ("hparams.json", "hparams.yaml", "params.json", "config.yaml")
# Runs are looked for so many folders deep.
DEPTH = 4
# Folders with many files, none of which is a run.
SKIPPED_SUFFIXES = (".ckpt", ".git", ".venv")


def find_runs(paths: list[str]) -> list[Path]:
    """Find the runs' folders that paths mean.

    Args:
        paths: each a run's folder, its ``record``, a file of metrics, or a folder with runs somewhere inside.

    Raises:
        FileNotFoundError: if a path does not exist, or has no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if "://" in path:
            raise ValueError(
                f"runs are read from local folders; copy {path!r} to one, and name that"
            )
        folder = Path(path).expanduser().resolve()
        if not folder.exists():
            raise FileNotFoundError(f"there is no file or folder {path!r}")
        if folder.is_file() or (folder.name == RECORD and _is_record(folder)):
            folder = folder.parent
        runs = _runs_in(folder, DEPTH)
        if not runs:
            raise FileNotFoundError(
                f"{path!r} holds no run: no record/run.json, event files of TensorBoard, {', '.join(ROWS)}"
            )
        found.update(dict.fromkeys(runs))
    return list(found)


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if source_of(folder):
        return [folder]
    if depth == 0:
        return []
    try:
        inside = sorted(folder.iterdir(), key=_by_number)
    except OSError:
        return []
    return [
        run
        for each in inside
        if each.is_dir() and not each.name.endswith(SKIPPED_SUFFIXES)
        for run in _runs_in(each, depth - 1)
    ]


def _by_number(path: Path) -> tuple[str, int]:
    """Sort ``version_10`` behind ``version_9``."""
    head = path.name.rstrip("0123456789")
    digits = path.name[len(head) :]
    return head, int(digits or 0)


def _is_record(folder: Path) -> bool:
    return (folder / "run.json").is_file() or (folder / "metrics.jsonl").is_file()


def source_of(folder: Path) -> str:
    """Say which kind of run a folder is; ``""`` if it is none."""
    if _is_record(folder / RECORD):
        return "record"
    if any(folder.glob(EVENTS)):
        return "tensorboard"
    for name, (source, _) in ROWS.items():
        if (folder / name).is_file():
            return source
    return ""


def names_of(folders: list[Path]) -> list[str]:
    """Name runs by the last parts of their paths: as many as tell them apart, two at least."""
    for count in range(2, 12):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read a run.

    Args:
        folder: as :func:`find_runs` returns it.
        name: under which it is shown.
    """
    written = max(map(_time_of, files_of(folder)), default=0.0)
    run = Run(folder, name, source_of(folder), written=written)
    if run.source == "record":
        _read_record(folder / RECORD, run)
    if not run.series:
        _read_others(folder, run)
    failure = _read_json(folder / "failure.json", run)
    config = run.record.get("config") or _read_hparams(folder, run)
    # What loggers have left, and errors as they were raised, may hold some. Of media, only what is shown is looked at.
    secrets = Secrets(os.environ)
    run.failure.update(secrets.clean_value(failure))
    run.config.update(secrets.clean_value(config))
    return run


def files_of(folder: Path) -> list[Path]:
    """Return the files that a run is read from, which tell whether it went on."""
    record = folder / RECORD
    names = ("run.json", "metrics.jsonl", "media.jsonl")
    files = [*(record / name for name in names), *(folder / name for name in ROWS)]
    files.append(folder / "failure.json")
    return [file for file in [*files, *folder.glob(EVENTS)] if file.is_file()]


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _read_record(record: Path, run: Run) -> None:
    run.record.update(_read_json(record / "run.json", run))
    metrics = record / "metrics.jsonl"
    media = record / "media.jsonl"
    if metrics.is_file():
        read_json_lines(metrics, run)
    if media.is_file():
        for entry in json_lines(media, run.problems):
            files = entry.get("file")
            for file in files if isinstance(files, list) else [files]:
                run.media.append({**entry, "file": file and f"{RECORD}/{file}"})


def _read_others(folder: Path, run: Run) -> None:
    """Read what loggers have left, where there is no record or none of metrics."""
    events = sorted(folder.glob(EVENTS))
    if events:
        read_events(events, run)
    for name, (_, read) in ROWS.items():
        if not run.series and (folder / name).is_file():
            read(folder / name, run)


def _read_json(file: Path, run: Run) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        run.problems.append(f"{file.name} cannot be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _read_hparams(folder: Path, run: Run) -> dict[str, Any]:
    for name in HPARAMS:
        file = folder / name
        if file.suffix == ".json" and file.is_file():
            return _read_json(file, run)
        if file.is_file():
            return _read_yaml(file, run)
    return {}


def _read_yaml(file: Path, run: Run) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        import yaml

        class Loader(yaml.SafeLoader):
            """Reads the tags of Python's objects, which Lightning writes, as their texts."""

        Loader.add_multi_constructor("tag:", lambda _, name, node: name)
        content = yaml.load(text, Loader)
    except ModuleNotFoundError:
        run.problems.append(f"{file.name} is read with PyYAML: pip install pyyaml")
        return {}
    except Exception as error:
        run.problems.append(f"{file.name} cannot be read: {type(error).__name__}")
        return {}
    return content if isinstance(content, dict) else {}
