"""The record of a run: what it holds, that it survives a resume and a disk, and that no secret is in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callbacks import Callback, LambdaCallback, ModelCheckpoint
from loopwright.framework import Trainer
from loopwright.framework.report.monitors import advice
from loopwright.framework.report.page.document import read_runs
from loopwright.framework.report.page.payload import payload
from loopwright.framework.report.record import Record
from loopwright.framework.report.secrets import is_secret
from loopwright.loggers import JSONLinesLogger
from loopwright.loggers.dummy import DummyLogger
from tests.framework.models import Evaluated


class Net(Evaluated):
    """Logs its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


def data(samples: int = 32, batch_size: int = 4) -> DataLoader[Any]:
    x = torch.arange(2.0 * samples).reshape(samples, 2) / samples
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size)


def trainer(folder: Path | str, **options: Any) -> Trainer:
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": folder,
        "logger": "jsonl",
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**usual, **options})


def run_of(trainer: Trainer) -> dict[str, Any]:
    assert trainer.record_dir is not None
    return json.loads((Path(trainer.record_dir) / "run.json").read_text())


def rows_of(trainer: Trainer, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    assert trainer.record_dir is not None
    lines = (Path(trainer.record_dir) / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


class Dies(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("poison")


def test_a_fit_leaves_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A program without a file, as one of pytest's workers, is that of its folder.
    monkeypatch.chdir(Path(__file__).parent)
    # A test before may have compiled something, and then operations are not counted.
    torch._dynamo.reset()
    fit = trainer(tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2)
    fit.fit(Net(), data(), data())
    run = run_of(fit)
    assert run["schema"] == 1
    assert run["config"]["trainer"]["gradient_clip_val"] == 0.5
    assert run["batch"] == {
        "per_device": 4, "processes": 1, "accumulate": 2, "effective": 8, "micro_batch": None,
    }  # fmt: skip
    assert run["model"]["parameters"] == 3
    # The weight's product forward and for its gradient: two operations each for two numbers.
    assert run["model"]["flops_per_sample"] == 8
    assert run["packages"]["numpy"]
    assert run["git"]["commit"]
    assert [epoch["epoch"] for epoch in run["timings"]["epochs"]] == [0, 1]
    assert run["timings"]["run"]["step"] > 0
    assert set(run["timings"]["start"]) == {"program", "setup", "first_batch"}
    assert run["ended"]["why"] == "max_epochs=2"
    kept = [each for each in run["checkpoints"] if not each.get("removed")]
    assert fit.checkpoint_callback is not None
    assert [each["path"] for each in kept] == [fit.checkpoint_callback.best_model_path]
    assert "val_loss" in kept[0]["scores"]
    steps = [row for row in rows_of(fit) if "loss" in row["values"]]
    assert [row["step"] for row in steps] == [*range(1, 9)]
    last = steps[-1]["values"]
    measured = {name.removeprefix("monitor/") for name in last if "monitor/" in name}
    assert {"grad_norm", "lr/SGD", "data_wait", "memory"} <= measured
    assert {"samples_per_second", "steps_per_second"} <= measured


def test_a_resumed_run_has_each_step_once(tmp_path: Path):
    save = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    first = trainer(tmp_path, callbacks=[save, Dies(11)])
    with pytest.raises(RuntimeError, match="poison"):
        first.fit(Net(), data(), data())
    ended = run_of(first)["ended"]
    assert (ended["how"], ended["step"]) == ("failed", 11)
    assert "poison" in ended["why"]
    second = trainer(tmp_path, callbacks=[ModelCheckpoint(every_n_train_steps=3)])
    second.fit(Net(), data(), data(), ckpt_path="last")
    assert second.record_dir == first.record_dir
    rows = rows_of(second)
    losses = [row["step"] for row in rows if "loss" in row["values"]]
    assert losses == [*range(1, 17)]
    assert sum("val_loss" in row["values"] for row in rows) == 2
    run = run_of(second)
    assert [each["first_step"] for each in run["attempts"]] == [0, 9]
    assert run["attempts"][0]["ended"]["how"] == "failed"
    assert run["ended"]["how"] == "finished"


def test_a_function_may_be_a_hook(tmp_path: Path):
    """It has no owner, whose kind tells whether the operations of a batch can be counted."""
    seen: list[Any] = []
    hook = LambdaCallback(on_train_batch_start=lambda *args: seen.append(args[-1]))
    fitted = trainer(tmp_path, callbacks=[hook])
    fitted.fit(Net(), data())
    assert seen == [*range(8)] * 2
    assert run_of(fitted)["ended"]["how"] == "finished"


def test_each_of_two_trainers_has_a_record(tmp_path: Path):
    """In one folder, as that of a logger without one: whoever evaluates later takes nothing from the other one."""

    first, second = (trainer(tmp_path, logger=DummyLogger()) for _ in range(2))
    first.fit(Net(), data())
    second.fit(Net(), data())
    before = rows_of(second)
    first.validate(Net(), data())
    assert rows_of(second) == before
    assert len(list(tmp_path.rglob("run.json"))) == 2


def test_what_is_evaluated_afterwards_leaves_what_is_told_of_the_training(
    tmp_path: Path,
):
    trained = trainer(tmp_path, max_epochs=2)
    module = Net()
    trained.fit(module, data())
    told = run_of(trained)
    trained.validate(module, data())
    run = run_of(trained)
    assert (run["timings"], run["ended"]) == (told["timings"], told["ended"])
    assert run["ended"]["why"] == "max_epochs=2"
    assert [attempt["fn"] for attempt in run["attempts"]] == ["fit", "validate"]
    (page,) = payload(read_runs([str(tmp_path)]), "")["runs"]
    assert [epoch for epoch, _ in page["epoch_ends"]] == [0, 1]
    assert page["seconds"] == pytest.approx(sum(told["timings"]["run"].values()))


def test_there_is_none_where_nobody_wants_it(tmp_path: Path):
    for options in (
        {"enable_record": False}, {"logger": False}, {"fast_dev_run": True}, {"barebones": True, "logger": None},
    ):  # fmt: skip
        fit = trainer(tmp_path, **{"max_steps": 1, **options})
        fit.fit(Net(), data())
        assert fit.record_dir is None
    assert not list(tmp_path.rglob("record"))


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(
        ["git", *names, *arguments], cwd=folder, check=True, capture_output=True
    )


ARGUMENTS = {
    "an option": ("--api_key=k1-aaaa,bbbb;cccc", "k1-aaaa,bbbb;cccc"),
    "an option's value after it": ("--db-password", "s3cret w0rd!"),
    "a token in an address": ("--data=https://h/x?token=t0ken111&y=1", "t0ken111"),
    "a password in an address": ("--url=postgres://me:pgpass99@h/db", "pgpass99"),
    "an option of Hydra's": ("logger.auth.token=hydra1234", "hydra1234"),
    "a header": ("--header=Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
}
ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "HTTPS_PROXY": "http://joe:proxypass1@proxy:3128",
    "TORCH_NCCL_NOTE": "torchs variable hf_abcdefghijklmnopqrstu",
    "MLFLOW_TRACKING_PASSWORD": "mlflowpw1",
    "MY_CREDENTIALS": "c0-red-ent-ials",
}
HYPERPARAMETERS: dict[str, Any] = {
    "api_key": "plain-words-1",
    "db": {"password": 12345678, "user_token": "nested-2"},
    "buckets": ["s3://AKIDX:s3cr3tkey@b/x"],
    "note": f"run with {ENVIRONMENT['WANDB_API_KEY']}",
    "secretKey": "camel-case-3",
}
CHANGES = """
AWS = "AKIAIOSFODNN7EXAMPLE"
HF = "hf_ABCDEFGHIJKLMNOPQRSTUVWX"
GITHUB = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
GITLAB = "glpat-abcdefghij0123456789"
OPENAI = "sk-proj-abcdefghijklmnop0123"
SLACK = "xoxb-123456789012-abcdefABCDEF"
GOOGLE = "AIzaSyA1234567890abcdefghijklmnopqrstuv"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
NPM = "npm_abcdefghijklmnopqrstuvwxyz0123456789"
password = 'correct horse battery'
client_secret: yamlvalue77
HOOK = "https://hooks.slack.com/services/T000/B000/XXXXsecret"
KEY = \"\"\"-----BEGIN RSA PRIVATE KEY-----
MIIEowIBAAKCAQEAuniqueprivatekeyline
-----END RSA PRIVATE KEY-----\"\"\"
"""
HIDDEN_CHANGES = (
    "AKIAIOSFODNN7EXAMPLE", "hf_ABCDEFGHIJKLMNOPQRSTUVWX", "ghp_0123456789", "glpat-abcdefghij", "sk-proj-abcdef",
    "xoxb-123456789012", "AIzaSyA1234567890", "eyJzdWIiOiIxIn0", "npm_abcdefghij", "correct horse battery",
    "yamlvalue77", "XXXXsecret", "uniqueprivatekeyline",
)  # fmt: skip


def test_no_secret_enters_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = tmp_path / "work"
    work.mkdir()
    program = work / "train.py"
    program.write_text("# a program\n")
    git(work, "init")
    git(work, "add", ".")
    git(work, "commit", "-m", "first")
    git(work, "remote", "add", "origin", "https://me:gitpass55@host/x.git")
    program.write_text(CHANGES)
    arguments = [argument for argument, _ in ARGUMENTS.values()]
    arguments.insert(2, "s3cret w0rd!")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *arguments])
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(program), raising=False
    )
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    class Tells(Net):
        def on_train_start(self) -> None:
            self.log_text("note", "signed in with gsk_abcdefghijklmnopqrstuvwx")
            warnings.warn("cannot reach http://u:warnpass1@host", stacklevel=1)
            raise RuntimeError("401 for token=errortoken1")

    net = Tells()
    net.save_hyperparameters(HYPERPARAMETERS)
    fit = trainer(tmp_path / "logs")
    with pytest.raises(RuntimeError, match="401"), pytest.warns(match="reach"):
        fit.fit(net, data())
    assert fit.record_dir is not None
    files = [file for file in Path(fit.record_dir).rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"run.json", "media.jsonl", "changes.diff"}
    text = "".join(file.read_text() for file in files)
    planted = [secret for _, secret in ARGUMENTS.values()]
    planted += [value for name, value in ENVIRONMENT.items() if "KEY" in name]
    planted += ["proxypass1", "hf_abcdefgh", "mlflowpw1", "c0-red-ent-ials"]
    planted += ["plain-words-1", "12345678,", "nested-2", "s3cr3tkey", "camel-case-3"]
    planted += [*HIDDEN_CHANGES, "gitpass55", "gsk_abcdef", "warnpass1", "errortoken1"]
    assert len(planted) >= 30
    assert [secret for secret in planted if secret in text] == []
    page = fit.report(tmp_path / "report.html")
    assert page is not None
    shown = Path(page).read_text()
    assert "401 for token=" in shown
    assert [secret for secret in planted if secret in shown] == []
    # What is no secret stays.
    assert '"seed_everything"' in text
    assert "host/x.git" in text
    assert "+HF = " in text


def test_names_of_language_models_are_no_secrets():
    plain = (
        "max_tokens", "num_tokens", "pad_token_id", "token_type_ids", "eos_token", "tokenizer", "author", "passes",
        "forward_pass", "model_signature", "tokens_per_second", "keyboard", "mask_token", "vocab_tokens", "path",
    )  # fmt: skip
    assert [name for name in plain if is_secret(name)] == []
    secret = (
        "hfToken",
        "API_KEY",
        "my-secret",
        "passwd",
        "accessKey",
        "webhook_url",
        "GITHUB_PAT",
        "token",
    )
    assert [name for name in secret if not is_secret(name)] == []


class RemovesFolder(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            shutil.rmtree(str(trainer.record_dir), ignore_errors=True)


def test_no_disk_ends_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    taken = tmp_path / "loopwright_logs" / "version_0"
    taken.mkdir(parents=True)
    (taken / "record").write_text("a file is where the folder is to be")
    fit = trainer(tmp_path, logger=JSONLinesLogger(tmp_path, version=0))
    fit.fit(Net(), data())
    assert fit.global_step == 16
    said = [line for line in caplog.messages if "record cannot be written" in line]
    assert len(said) == 1, "said once"
    removed = trainer(tmp_path / "other", callbacks=[RemovesFolder()])
    removed.fit(Net(), data())
    assert run_of(removed)["ended"]["how"] == "finished"
    assert rows_of(removed)[-1]["step"] == 16


def test_a_record_may_lie_in_remote_storage():
    fit = trainer("memory://record-test/logs", max_epochs=1)
    fit.fit(Net(), data())
    assert str(fit.record_dir).startswith("memory://")
    files = fsspec.filesystem("memory")
    run = json.loads(files.cat_file(f"{fit.record_dir}/run.json"))
    assert run["ended"]["how"] == "finished"
    lines = files.cat_file(f"{fit.record_dir}/metrics.jsonl").decode().splitlines()
    assert len(lines) == 8


class Waits(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert isinstance(trainer.record, Record)
        # As if each batch took so much longer than its step.
        trainer.record.clock.seconds["data_wait"] += 5.0
        trainer.record.clock.seconds["step"] += 2.0


def test_a_loop_that_waits_for_data_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fit = trainer(tmp_path, callbacks=[Waits()], max_epochs=1)
    fit.fit(Net(), data(samples=80, batch_size=1))
    said = [line for line in caplog.messages if "waited for data" in line]
    assert len(said) == 1
    assert re.search(
        r"for 7[01] % of its time; try num_workers=[1-3] \(it is 0\)", said[0]
    )
    assert any("waited for data" in each["text"] for each in run_of(fit)["warnings"])


def test_advice_goes_by_the_loader():
    many = SimpleNamespace(num_workers=10_000)
    assert "more workers will not help" in advice(many, 5.0, 2.0, 4)
    assert "DataLoader with num_workers" in advice([1, 2], 5.0, 2.0, 4)
    none = SimpleNamespace(num_workers=0)
    assert "try num_workers=3 (it is 0)" in advice(none, 5.0, 2.0, 4)
    assert "try num_workers=1 (it is 0)" in advice(none, 5.0, 2.0, 1)


def test_it_adds_few_calls_to_a_step(tmp_path: Path):
    batch = torch.ones(2, 2), torch.ones(2, 1)

    def calls(num_batches: int, enable_record: bool) -> int:
        fit = trainer(
            tmp_path,
            max_epochs=1,
            log_every_n_steps=1000,
            enable_record=enable_record,
            enable_checkpointing=False,
        )
        count = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        module = Net()
        # What imports and begins for the first time does not count.
        sys.setprofile(profile)
        try:
            fit.fit(module, [batch] * num_batches)
        finally:
            sys.setprofile(None)
        return count

    calls(1, True)
    added = [calls(300, kept) - calls(100, kept) for kept in (True, False)]
    assert (added[0] - added[1]) / 200 <= 8
