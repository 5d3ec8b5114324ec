"""Hugging Face models that are trained: the folders that from_pretrained reads, and text that they generate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopwright.callbacks import EMAWeightAveraging, ModelCheckpoint, SavePretrained
from tests.callbacks.language import Language, batches, train
from tests.framework.models import quiet
from tests.programs import run_program

transformers = pytest.importorskip("transformers")


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


def test_a_trained_model_is_read_by_from_pretrained(tmp_path: Path) -> None:
    module = Language()
    saves = SavePretrained(
        tmp_path / "gpt", tokenizer=Tokenizer(), every_checkpoint=True
    )
    keeps = ModelCheckpoint(tmp_path / "runs", every_n_train_steps=1)
    quiet(saves, keeps).fit(module, batches(), batches())
    assert len(module.texts[0]) > 8
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt")
    assert type(read) is transformers.GPT2LMHeadModel
    for name, value in module.model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    assert (tmp_path / "gpt" / "tokenizer.json").is_file()
    first = tmp_path / "gpt" / "epoch=0-step=1"
    earlier = transformers.AutoModelForCausalLM.from_pretrained(first)
    assert not torch.equal(earlier.lm_head.weight, read.lm_head.weight)
    assert not list(tmp_path.rglob("*.partial"))


def test_averaged_weights_are_written_if_asked_for(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    saves = SavePretrained(tmp_path / "gpt", weight_set="ema")
    trainer = quiet(average, saves)
    trainer.fit(Language(), batches())
    trainer.export(tmp_path / "ema.safetensors", weight_set="ema")
    averaged = load_file(tmp_path / "ema.safetensors")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt")
    for name, value in read.transformer.named_parameters():
        assert torch.equal(averaged[f"model.transformer.{name}"], value), name


def test_of_a_peft_model_the_adapters_alone_are_written(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = Language().model
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    module = Language(peft.get_peft_model(base, lora))
    quiet(SavePretrained(tmp_path)).fit(module, batches())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights
    assert all("lora" in name for name in weights)
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(Language().model, tmp_path)
    trained = {k: v for k, v in module.model.state_dict().items() if "lora" in k}
    for name, value in trained.items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_hub_that_cannot_be_reached_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    trainer = quiet(SavePretrained(tmp_path, push_to_hub="me/mine"))
    trainer.fit(Language(), batches())
    assert trainer.state.finished
    assert "not uploaded to me/mine" in caplog.text
    with pytest.raises(ValueError, match="no submodule 'net'"):
        quiet(SavePretrained(tmp_path, model="net")).fit(Language(), batches())


SHARDED = """
import sys
from tests.callbacks.language import train

module = train("fsdp", 2, sys.argv[1])
print("TEXTS", [len(text) for text in module.texts])
"""


@pytest.mark.slow
def test_a_sharded_model_generates_and_is_written_whole(tmp_path: Path) -> None:
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join((root, os.environ["PYTHONPATH"]))
    environment = {**os.environ, "PYTHONPATH": path}
    folder = tmp_path / "sharded"
    ended = run_program(program, folder, cwd=tmp_path, env=environment, timeout=170)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("TEXTS") == 2
    module = train("single", 1, tmp_path / "whole")
    assert len(module.texts) == 3
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read.config.architectures == ["GPT2LMHeadModel"]
    for name, value in module.model.state_dict().items():
        assert torch.allclose(read.state_dict()[name], value, atol=1e-6), name
