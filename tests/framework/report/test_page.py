"""The page of runs: what is read from where, and what a page holds."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from loopwright.framework import Module, Trainer
from loopwright.framework.command_line.main import main
from loopwright.framework.report.page.document import (
    ASSETS,
    PROGRAMS,
    STYLES,
    as_json,
    document,
    read_runs,
)
from loopwright.framework.report.page.payload import status_of
from loopwright.framework.report.page.series import Series, curve
from loopwright.loggers import CSVLogger, JSONLinesLogger
from tests.import_graph import ROOT

from .sample_runs import FINISHED, add_media, add_rows, write_run


def data_of(html: str) -> dict:
    """The values in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert found
    return json.loads(found[1])


def values_of(run) -> dict[str, list[tuple[float, float]]]:
    """Pairs of a step and a value, by metric."""
    return {
        name: list(zip(series.steps, series.values, strict=True))
        for name, series in run.series.items()
    }


def test_a_long_curve_keeps_its_extremes_its_ends_and_what_is_not_finite():
    series = Series()
    for step in range(100_000):
        series.add(step, math.sin(step / 300))
    series.values[54_321], series.values[70_000] = 99.0, -77.0
    series.values[12_345], series.values[90_001] = math.nan, math.inf
    shown = curve(series, 0.0, 2000)
    assert len(shown["x"]) <= 2100
    points = dict(zip(shown["x"], shown["y"], strict=True))
    assert points[54_321] == 99.0
    assert points[70_000] == -77.0
    assert {0, 99_999} <= set(points)
    assert {shown["x"][at]: what for at, what in shown["odd"]} == {
        12_345: "nan",
        90_001: "inf",
    }
    assert (shown["max"], shown["min"]) == ([99.0, 54_321], [-77.0, 70_000])
    assert shown["count"] == 100_000
    # Smoothing goes by means, which extremes do not bend.
    assert max(y for y in shown["mean"]["y"] if y is not None) < 2


def test_what_users_wrote_cannot_end_the_script_that_holds_it(tmp_path: Path):
    evil = "</script><script>alert(1)</script><!--\u2028 & \ud83d"
    run = write_run(tmp_path / "run", ended={"how": "failed", "why": evil})
    add_rows(run, [{"step": 1, "values": {evil: 1.0}}])
    add_media(run)
    html = document(read_runs([str(run)]))
    assert "alert(1)</script>" not in html
    assert html.count("</script>") == 2
    (shown,) = data_of(html)["runs"]
    assert any("</script><script>alert(1)" in name for name in shown["series"])
    assert json.loads(as_json("<\u2028>")) == "<\u2028>"


def test_the_page_holds_what_the_record_knows(tmp_path: Path):
    run = write_run(tmp_path / "run", ended=FINISHED)
    add_media(run)
    (shown,) = data_of(document(read_runs([str(run)])))["runs"]
    assert shown["status"] == {"state": "finished", "text": "max_epochs=8"}
    assert shown["config"]["hyperparameters.learning_rate"] == 3e-3
    assert [one["step"] for one in shown["checkpoints"]] == [120, 480, 840]
    assert shown["timings"]["epochs"][3]["epoch"] == 3
    assert dict(shown["facts"])["batch"] == 64
    assert shown["epoch_ends"][-1] == [7, 960]
    pictures = next(one for one in shown["media"] if one["kind"] == "image")
    assert [step for step, _ in pictures["steps"]] == [120, 240, 360]
    assert pictures["steps"][0][1][2]["source"].startswith("data:image/png;base64,")


def test_media_outside_of_the_run_are_not_taken_into_its_page(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    run = write_run(tmp_path / "run", ended=FINISHED)
    entry = {"step": 1, "name": "x", "kind": "image", "file": "../../secret.png"}
    (run / "record" / "media.jsonl").write_text(json.dumps(entry))
    (shown,) = data_of(document(read_runs([str(run)])))["runs"]
    assert "outside" in shown["media"][0]["steps"][0][1][0]["error"]


def test_a_run_without_an_ending_runs_or_was_killed(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (run,) = read_runs([str(folder)])
    assert status_of(run)["state"] == "running"
    run.written -= 3600
    assert status_of(run)["state"] == "killed"


def test_a_failure_is_told_by_its_report(tmp_path: Path):
    folder = write_run(tmp_path / "run", ended={"how": "failed", "why": "…"})
    (folder / "record" / "metrics.jsonl").write_text("")
    failure = {
        "summary": "rank 1 failed",
        "ranks": [{"rank": 1, "kind": "failed", "trace": "Traceback: boom"}],
    }
    (folder / "failure.json").write_text(json.dumps(failure))
    (shown,) = data_of(document(read_runs([str(folder)])))["runs"]
    assert shown["status"] == {"state": "failed", "text": "rank 1 failed"}
    assert shown["failure"]["ranks"][0]["trace"] == "Traceback: boom"
    assert shown["series"] == {}


def test_event_files_of_any_program_are_read_and_a_resumed_run_has_each_step_once(
    tmp_path: Path,
):
    for begin, end, purge in ((0, 8, None), (5, 10, 5)):
        with SummaryWriter(
            str(tmp_path), purge_step=purge, filename_suffix=f".{begin}"
        ) as writer:
            for step in range(begin, end):
                writer.add_scalar(
                    "train/loss",
                    10.0 - step + begin / 100,
                    step,
                    new_style=step % 2 == 0,
                )
            writer.add_text("note", "hello", 9)
            writer.add_histogram(
                "weights", torch.tensor([1.0, 2.0, 2.0]), 9, bins="auto"
            )
    with (next(tmp_path.glob("*.5"))).open("ab") as file:
        # As a kill leaves it.
        file.write(b"\x20\0\0\0\0\0\0\0half")
    (run,) = read_runs([str(tmp_path)])
    steps = [step for step, _ in values_of(run)["train/loss"]]
    assert steps == list(range(10))
    assert values_of(run)["train/loss"][5][1] == pytest.approx(5.05)
    kinds = {entry["kind"] for entry in run.media}
    assert kinds == {"text", "histogram"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "lightning", "huggingface", "keras"])
def test_rows_of_other_loggers_are_read(tmp_path: Path, kind: str):
    rows = [
        {"step": step, "epoch": step // 2, "loss": 1 / (step + 1)} for step in range(4)
    ]
    folder = tmp_path / "run"
    if kind in ("csv", "jsonl"):
        logger = {"csv": CSVLogger, "jsonl": JSONLinesLogger}[kind](tmp_path, "", "run")
        for step, row in enumerate(rows):
            logger.log_metrics({"epoch": row["epoch"], "loss": row["loss"]}, step)
        logger.finalize("success")
    else:
        folder.mkdir()
    if kind == "lightning":
        lines = [
            "epoch,step,loss,val_loss",
            *(f"{r['epoch']},{r['step']},{r['loss']}," for r in rows),
            "1,3,,0.5",
        ]
        (folder / "metrics.csv").write_text("\n".join(lines))
        (folder / "hparams.yaml").write_text(
            "lr: 0.1\nmodel: !!python/object:x.Y\n  a: 1\napi_key: of-somebody\n"
        )
    if kind == "huggingface":
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    if kind == "keras":
        lines = ["epoch,loss", *(f"{r['step']},{r['loss']}" for r in rows)]
        (folder / "training.log").write_text("\n".join(lines))
    (run,) = read_runs([str(tmp_path)])
    assert values_of(run)["loss"] == [
        (r["step"], pytest.approx(r["loss"])) for r in rows
    ]
    if kind == "lightning":
        assert values_of(run)["val_loss"] == [(3, 0.5)]
        assert run.config["lr"] == 0.1
        assert run.config["api_key"] == "***"


class Line(Module):
    """Logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("train_loss", loss)
        return loss


def test_the_trainer_writes_the_page_of_its_run(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    trainer = Trainer(max_epochs=1, logger=logger, log_every_n_steps=1, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Line(), [torch.ones(4, 2)] * 3)
    file = trainer.report()
    assert file
    assert file == str(Path(trainer.log_dir).resolve() / "report.html")
    assert "train_loss" in Path(file).read_text()


def test_the_command_writes_one_page_of_all_runs_in_a_folder_without_torch(
    tmp_path: Path,
):
    for name in ("version_2", "version_10"):
        write_run(tmp_path / "logs" / name, epochs=1, ended=FINISHED)
    program = (
        "import sys; from loopwright.framework.command_line.main import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    command = [
        "report",
        str(tmp_path / "logs"),
        "--output",
        str(tmp_path / "page.html"),
    ]
    told = subprocess.check_output([sys.executable, "-c", program, *command], text=True)
    assert told.split() == [str(tmp_path / "page.html"), "False"]
    runs = data_of((tmp_path / "page.html").read_text())["runs"]
    assert [run["name"] for run in runs] == ["logs/version_2", "logs/version_10"]


def test_the_command_says_what_is_no_run(tmp_path: Path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_the_terminal_shows_the_same_curves(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run = write_run(tmp_path / "run", ended=FINISHED)
    assert main(["report", str(run), "--tui"]) == 0
    told = capsys.readouterr().out
    assert "train_loss" in told
    assert "finished, step 960" in told
    assert any("\u2800" < sign <= "\u28ff" for sign in told)


def test_a_wheel_has_the_page_with_the_licence_of_what_draws_its_curves():
    line = '"loopwright.framework.report.page" = ["assets/*"]'
    assert line in (ROOT / "pyproject.toml").read_text()
    shipped = {file.name for file in ASSETS.parent.glob("assets/*")}
    assert {*STYLES, *PROGRAMS, "page.html", "uPlot-LICENSE.txt"} <= shipped
    assert "MIT" in (ASSETS / "uPlot-LICENSE.txt").read_text()


def test_tokens_are_added_up_from_what_the_monitors_measured(tmp_path: Path):
    folder = write_run(tmp_path / "run", ended=FINISHED)
    lines = [
        {
            "step": step,
            "epoch": 0,
            "values": {
                "monitor/tokens_per_second": 500.0 * step,
                "monitor/steps_per_second": 0.5 * step,
            },
        }
        for step in (10, 20, 30)
    ]
    (folder / "record" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (shown,) = data_of(document(read_runs([str(folder)])))["runs"]
    assert shown["tokens"] == [[10, 10_000], [20, 20_000], [30, 30_000]]
