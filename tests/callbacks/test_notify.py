"""Messages to a webhook, which a real local server takes, or does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopwright.callbacks import Callback, ModelCheckpoint, Notify
from tests.callbacks.webhook import Service, serving
from tests.framework.models import Linear, loader, quiet


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


class Fails(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise ZeroDivisionError("no loss")


class Logs(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log("bad", float("nan"))
        return loss


def test_the_end_of_a_training_is_told(service: Service, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    notify = Notify(service.url, on_checkpoint=True, name="mine")
    trainer = quiet(notify, saves)
    trainer.fit(Logs(), loader())
    (ended,) = (m for m in service.messages if m["event"] == "finished")
    saved = {m["global_step"] for m in service.messages if m != ended}
    assert saved == {2, 4}
    assert ended["text"] == ended["content"]
    assert "mine" in ended["text"]
    assert "step 4" in ended["text"]
    assert ended["rank"] == 0
    assert ended["metrics"]["bad"] == "nan"
    assert ended["metrics"]["loss"] == pytest.approx(
        float(trainer.callback_metrics["loss"])
    )


def test_a_failure_is_told_with_its_exception_and_step(service: Service) -> None:
    with pytest.raises(ZeroDivisionError):
        quiet(Notify(service.url), Fails()).fit(Linear(), loader())
    (message,) = service.messages
    assert message["event"] == "failed"
    assert message["exception"] == "ZeroDivisionError: no loss"
    assert message["global_step"] == 2


def test_a_service_that_does_not_answer_ends_nothing(
    service: Service, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    service.answers.clear()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    hangs = Notify(service.url, on_checkpoint=True, timeout=0.3)
    quiet(hangs, saves).fit(Linear(), loader())
    service.answers.set()
    closed = Service()
    closed.server_close()
    trainer = quiet(Notify(closed.url))
    trainer.fit(Linear(), loader())
    assert trainer.state.finished
    assert "127.0.0.1 has not" in caplog.text
    assert "has not taken a message" in caplog.text
    # Whoever knows a webhook's path can write to it.
    assert "secret" not in caplog.text
    with pytest.raises(ValueError, match="webhook"):
        Notify("hooks.example.com/secret")
    # As of a variable that is not set.
    with pytest.raises(ValueError, match=r"webhook.*got None"):
        Notify(os.environ.get("NO_SUCH_WEBHOOK"))  # type: ignore[arg-type]


FAILS = """
import os, signal, sys
import torch
from loopwright import Module, Notify, Trainer


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        if self.global_step == 3 and self.global_rank == 0:
            if sys.argv[2] == "raise":
                raise ZeroDivisionError("no loss")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = torch.utils.data.DataLoader(torch.ones(400, 2), 2)
Trainer(
    accelerator="cpu", devices=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, max_epochs=1, callbacks=[Notify(sys.argv[1])],
).fit(Net(), data)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rank", "status"), [("kill", 1, -9), ("raise", 0, 1)])
def test_one_process_tells_of_a_failure_though_the_main_one_has_died(
    service: Service, tmp_path: Path, how: str, rank: int, status: int
) -> None:
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Processes of a launcher that lets them end by themselves.
    processes = []
    for index in "01":
        variables = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **variables, **place, "TMPDIR": str(tmp_path)}
        environment["LOCAL_WORLD_SIZE"] = "2"
        command = [sys.executable, str(program), service.url, how]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
    main, other = (process.wait(100) for process in processes)
    assert main == status
    assert other not in (0, None)
    (message,) = service.messages
    assert message["rank"] == rank
    assert message["event"] == "failed"
    assert message["global_step"] == 3
