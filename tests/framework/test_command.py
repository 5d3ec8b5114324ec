"""The command `loopwright` itself, and `loopwright env`."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import loopwright
from loopwright.framework.command_line.environment import main as env
from loopwright.framework.command_line.main import main
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def test_help_waits_for_no_torch() -> None:
    program = (
        "import sys\n"
        "from loopwright.__main__ import main\n"
        "for arguments in ([], *([name, '--help'] for name in ('launch', 'migrate', 'env', 'submit', 'diff'))):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as error:\n"
        "        print('CODE', error.code)\n"
        "print('HEAVY', sorted({'torch', 'libcst', 'yaml'} & sys.modules.keys()))\n"
    )
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CODE 0") == 6
    assert "HEAVY []" in done.stdout
    for usage in ("launch [", "env [", "migrate [", "submit --slurm"):
        assert f"loopwright {usage}" in done.stdout


def test_the_module_and_the_script_are_one() -> None:
    done = run_program("-m", "loopwright", "--version")
    assert done.stdout == f"{loopwright.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    script = re.search(r'^loopwright = "([\w.]+):(\w+)"$', project, re.MULTILINE)
    assert script is not None
    assert getattr(import_module(script[1]), script[2]) is main


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("lanch", "there is no command 'lanch'; did you mean 'launch'?"),
        ("train.py", "there is no command 'train.py'; --help lists them"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_what_is_no_command_is_an_error(
    argument: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([argument])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_env_tells_what_a_report_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JWT", "a secret")
    monkeypatch.setenv("WANDB_API_KEY", "another secret")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for line in (
        rf"loopwright: +{re.escape(loopwright.__version__)}",
        rf"torch: +{re.escape(torch.__version__)}",
        r"torch's build: +CUDA .*, debug no",
        r"torchmetrics: +\d",
        r"accelerate: +\d",
        r"CPU cores: +\d",
        r"torch's threads: +\d",
        r"accelerators: +\w",
        r"backends: +gloo",
        r"SLURM_NTASKS: +4",
        r"also set: +.*SLURM_JWT",
    ):
        assert re.search(rf"^  {line}", text, re.MULTILINE), (line, text)
    assert "secret" not in text
    assert "WANDB" not in text


def test_env_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert env(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["loopwright"] == loopwright.__version__
    assert told["optional packages"]["lightning"]
    assert told["machine"]["CPU cores"] >= 1
    assert "gloo" in told["distributed"]["backends"]
