"""What `accelerate launch` asks for holds, is refused, or is said to have no effect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loopwright.framework import Engine, Trainer
from loopwright.framework.engine import accelerate_launch
from loopwright.strategies import DDPStrategy
from tests.programs import run_program


@pytest.fixture(autouse=True)
def said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """What is said, once for each test."""
    for name in os.environ:
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    accelerate_launch._say.cache_clear()
    return caplog


def test_its_settings_are_those_of_an_engine_and_of_a_trainer(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    for name, value in {
        "MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4", "DEBUG_MODE": "true", "USE_CPU": "True",
        "DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": "default", "DYNAMO_USE_DYNAMIC": "False",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    # Twice, as what is said is said once.
    (engine, trainer), _ = [(Engine(), Trainer(barebones=True)) for _ in range(2)]
    assert (engine.precision.name, trainer.precision) == ("bf16-mixed", "bf16-mixed")
    assert (engine.gradient_accumulation_steps, trainer.accumulate_grad_batches) == (
        4,
        4,
    )
    assert (engine.device.type, trainer.strategy.device.type) == ("cpu", "cpu")
    assert engine._debug
    for text in (
        "precision='bf16-mixed', as",
        "gradient_accumulation_steps=4, as",
        "accumulate_grad_batches=4, as",
    ):
        assert said.text.count(text) == 1
    assert said.text.count("no effect here: ACCELERATE_DYNAMO_BACKEND=INDUCTOR\n") == 1


def test_what_is_passed_wins_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    engine = Engine(
        "cpu", precision="32-true", gradient_accumulation_steps=2, debug=False
    )
    assert (engine.precision.name, engine.gradient_accumulation_steps) == ("32-true", 2)
    assert (
        "ACCELERATE_MIXED_PRECISION=fp16 is ignored: precision='32-true' was passed"
        in said.text
    )
    assert "STEPS=4 is ignored: gradient_accumulation_steps=2 was passed" in said.text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MIXED_PRECISION", "fp8", "accelerate launch asks for mixed_precision='fp8'"),
        (
            "USE_FSDP",
            "true",
            r'asks for FSDP \(ACCELERATE_USE_FSDP\): pass strategy="fsdp"',
        ),
        ("USE_DEEPSPEED", "true", 'asks for DeepSpeed .*: pass strategy="deepspeed"'),
        ("USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
    ],
)
def test_another_way_to_train_is_refused(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for make in (Engine, lambda accelerator: Trainer(accelerator=accelerator)):
        with pytest.raises(ValueError, match=words):
            make("cpu")


def test_options_of_another_way_are_named(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    Engine("cpu", strategy=DDPStrategy())
    assert (
        "no effect here: ACCELERATE_USE_FSDP=true, FSDP_OFFLOAD_PARAMS=true"
        in said.text
    )


PROGRAM = """
from loopwright.framework import Engine

engine = Engine()
print("RESULT", engine.precision.name, engine._debug, engine.device, engine.num_processes)
"""


@pytest.mark.slow
def test_a_config_file_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "bf16", "debug": True,
        "use_cpu": True, "num_machines": 1, "num_processes": 1,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in config.items())
    )
    command = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        tmp_path / "config.yaml",
        tmp_path / "program.py",
    )
    ended = run_program(*command, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "RESULT bf16-mixed True cpu 1" in ended.stdout
    assert "precision='bf16-mixed', as accelerate launch asks for" in ended.stderr
