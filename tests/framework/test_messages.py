"""What the framework says, beside the handlers of other libraries."""

from __future__ import annotations

import logging
import sys

import pytest

from loopwright.framework import messages


def test_a_line_is_written_once_whoever_sets_up_logging_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(messages.log, "handlers", [])
    messages.configure()
    messages.log.warning("alone")
    # As `logging.warning` of any library does.
    root.addHandler(logging.StreamHandler(sys.stderr))
    messages.log.warning("beside it")
    # One that does not show it.
    root.handlers[0].setLevel(logging.ERROR)
    messages.log.warning("not shown there")
    said = capsys.readouterr().err.splitlines()
    assert said == ["alone", "beside it", "not shown there"]
