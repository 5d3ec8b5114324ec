"""What the helpers of tests promise."""

from __future__ import annotations

import pytest

from tests.programs import run_program


def test_a_program_that_hangs_is_shown_with_the_stacks_of_all_its_processes():
    program = "import os, signal\ndef stuck():\n    signal.pause()\nprint('begun', flush=True)\nos.fork()\nstuck()"
    with pytest.raises(pytest.fail.Exception) as failed:
        run_program("-c", program, timeout=1)
    text = str(failed.value)
    assert "did not end within 1 s" in text
    assert "begun" in text
    assert text.count("line 3 in stuck") == 2
