"""A program that trains by Ray Train: ``python -m tests.clusters.ray_program ADDRESS FOLDER``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Ray is installed beside the environment, by the script that starts this program.
# pyright: reportMissingImports=false
import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from loopwright.callbacks import Callback
from loopwright.framework import Module, Trainer
from tests.clusters.program import train


class ReportToRay(Callback):
    """Gives Ray the losses and a checkpoint at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        path = self.folder / f"for_ray_{trainer.current_epoch}"
        trainer.save_checkpoint(path)
        metrics = {
            "loss": float(trainer.callback_metrics["loss"]),
            "step": trainer.global_step,
        }
        # All workers report; one of them hands the checkpoint over.
        checkpoint = None
        if trainer.is_global_zero:
            checkpoint = Checkpoint.from_directory(path)
        ray.train.report(metrics, checkpoint=checkpoint)


def train_loop(options: dict[str, Any]) -> None:
    """What each worker runs."""
    folder = Path(options["folder"])
    checkpoint = ray.train.get_checkpoint()
    # Ray takes a second to hear of a checkpoint. Who was killed in it goes on from the run's own.
    ckpt_path = "last" if checkpoint is None else checkpoint.path
    train(
        folder,
        options["fail_at"],
        callbacks=[ReportToRay(folder)],
        ckpt_path=ckpt_path,
    )


def main() -> None:
    """Begin a cluster, train in two workers, and write down what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--max-failures", type=int, default=0)
    arguments = parser.parse_args()
    # A worker that is started again goes on in the run of this name: Ray does not tell it that it was there before.
    named = {"LOOPWRIGHT_JOB": str(arguments.folder)}
    ray.init(arguments.address, runtime_env={"env_vars": named})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "folder": str(arguments.folder),
            "fail_at": arguments.fail_at,
        },
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="job",
            storage_path=str(arguments.folder / "storage"),
            failure_config=FailureConfig(max_failures=arguments.max_failures),
        ),
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    state = json.loads((Path(result.checkpoint.path) / "state.json").read_text())
    summary = {
        "metrics": result.metrics,
        "checkpoint": state["global_step"],
    }
    (arguments.folder / "result.json").write_text(json.dumps(summary))
    ray.shutdown()


if __name__ == "__main__":
    main()
