"""Checkpoints that earlier versions wrote are resumed as those versions would have.

``format_1.tar.xz`` was made by ``python -m tests.framework.resumed_runs make FOLDER``.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.framework.resumed_runs import resume_all

ARCHIVE = Path(__file__).with_name("format_1.tar.xz")


def close_to(value: Any) -> Any:
    """Equal but for the last bits, in which processors differ."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-4, abs=1e-6)
    if isinstance(value, list):
        return [close_to(part) for part in value]
    if isinstance(value, dict):
        return {key: close_to(part) for key, part in value.items()}
    return value


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_go_on_from_checkpoints_of_format_1(tmp_path: Path, processes: int):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for name, expected, found in resume_all(tmp_path, processes):
        assert found == close_to(expected), name
