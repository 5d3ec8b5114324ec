"""Command lines of programs: what they read, what they make of it, what they write, and what they refuse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.callbacks import (
    Callback,
    EarlyStopping,
    GarbageCollection,
    ModelCheckpoint,
    SimpleProfiler,
)
from loopwright.framework import (
    CheckpointError,
    DataModule,
    LoopwrightCLI,
    Module,
    Trainer,
)
from loopwright.framework.checkpoint.class_paths import instantiate_module
from loopwright.framework.cli import LoopwrightArgumentParser, SaveConfigCallback
from loopwright.loggers import CSVLogger
from loopwright.strategies import DDPStrategy, Precision
from tests.programs import run_program

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Net(Module):
    """A linear layer, and an activation that a configuration names by its class."""

    def __init__(
        self,
        width: int = 4,
        activation: nn.Module | None = None,
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
        | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width
        self.activation = nn.ReLU() if activation is None else activation
        self.make_optimizer = make_optimizer
        self.layer = nn.Linear(4, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.activation(self.layer(batch)).square().mean()
        self.log("loss", loss)
        return loss

    test_step = validation_step = training_step

    def configure_optimizers(self) -> Any:
        make = self.make_optimizer or torch.optim.SGD
        return make(self.parameters())


class LateNet(Net):
    """Makes its layer when the run begins."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def configure_model(self) -> None:
        self.layer = nn.Linear(4, self.width)


class Data(DataModule):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.features = 3

    def loader(self) -> DataLoader:
        return DataLoader(torch.ones(self.size, 4).split(1)[0].repeat(self.size, 1), 4)  # type: ignore[arg-type] # torch takes tensors

    train_dataloader = val_dataloader = test_dataloader = loader


class Says(Callback):
    """A callback that a command line names by its path."""

    def __init__(self, words: list[str], times: int = 1) -> None:
        self.words = words * times


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOOPWRIGHT_SEED", raising=False)


QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "log_every_n_steps": 1,
}


def cli(*args: str, kind: type[LoopwrightCLI] = LoopwrightCLI, **kwargs: Any) -> Any:
    classes = [kwargs.pop("model", Net), kwargs.pop("data", Data)]
    defaults = {**QUIET, **kwargs.pop("trainer_defaults", {})}
    return kind(*classes, args=list(args), trainer_defaults=defaults, **kwargs)


def refusal(capsys: pytest.CaptureFixture[str], *args: str, **kwargs: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        cli(*args, **kwargs)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_misspelt_option_is_refused_with_the_one_that_is_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(capsys, "fit", "--trainer.max_epoch=3")
    assert "--trainer.max_epoch=3; did you mean 'max_epochs'?" in said
    assert len(said.splitlines()) < 5
    assert "did you mean 'model.width'?" in refusal(capsys, "fit", "--model.widht", "3")
    assert 'accelerator="gpu"' in refusal(capsys, "fit", "--trainer.gpus=1")
    # Where Lightning's names are imported, too, a class of a name that both have is named by its path.
    collects = "--trainer.callbacks=GarbageCollection"
    option = "--trainer.callbacks.generatio=1"
    assert "did you mean 'generation'?" in refusal(capsys, "fit", collects, option)
    for option, meant in (
        ("--trainer.callbacks=EarlyStoping", "EarlyStopping"),
        ("--optimizer=AdmW", "AdamW"),
    ):
        assert f"did you mean {meant!r}?" in refusal(capsys, "fit", option)
    for text, meant in (
        ("trainer: {max_epoch: 3}", "max_epochs"),
        ("traner: {max_epochs: 3}", "trainer.max_epochs"),
        ("model: {widht: 3}", "model.width"),
    ):
        Path("config.yaml").write_text(text)
        said = refusal(capsys, "fit", "--config=config.yaml")
        assert f"did you mean {meant!r}?" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("devices=auto", "auto"),
        ("devices=[0, 1]", [0, 1]),
        ("num_nodes=auto", "auto"),
        ("precision=bf16-mixed", "bf16-mixed"),
        ("strategy=ddp", "ddp"),
        ("logger=false", False),
        ("logger=csv", "csv"),
        ("logger=[csv, tensorboard]", ["csv", "tensorboard"]),
        ("fast_dev_run=3", 3),
        ("max_epochs=null", None),
        ("max_time=00:01:00:00", "00:01:00:00"),
        ("max_time={hours: 2}", {"hours": 2}),
        ("limit_train_batches=0.5", 0.5),
        ("limit_val_batches=5", 5),
        ("overfit_batches=2", 2),
        ("val_check_interval=0.25", 0.25),
        ("check_val_every_n_epoch=null", None),
        ("micro_batch=auto", "auto"),
        ("gradient_clip_val=1", 1),
        ("deterministic=warn", "warn"),
        ("use_distributed_sampler=false", False),
        ("profiler=simple", "simple"),
        ("compile={mode: default}", {"mode": "default"}),
    ],
)
def test_an_option_takes_what_the_trainer_takes(
    option: str, value: Any, parser: Any
) -> None:
    name = option.partition("=")[0]
    read = parser.parse_args([f"--trainer.{option}"]).trainer[name]
    assert read == value
    assert type(read) is type(value)


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LoopwrightArgumentParser()
    parser.add_loopwright_class_args(Trainer, "trainer")
    return parser


def test_objects_are_named_by_their_classes() -> None:
    made = cli(
        "--trainer.strategy=loopwright.strategies.DDPStrategy",
        "--trainer.profiler=loopwright.callbacks.SimpleProfiler",
        "--trainer.devices=1",
        "--trainer.logger=loopwright.loggers.CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.logger.name=mine",
        "--trainer.precision.class_path=loopwright.strategies.Precision",
        "--trainer.precision.init_args.name=mine",
        "--trainer.callbacks+=loopwright.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks+=GarbageCollection",
        "--trainer.callbacks.generation=1",
        f"--trainer.callbacks+={__name__}.Says",
        "--trainer.callbacks.words=[a, b]",
        "--model.activation=torch.nn.LeakyReLU",
        "--model.activation.negative_slope=0.3",
        run=False,
    )
    trainer = made.trainer
    assert type(trainer.strategy) is DDPStrategy
    assert isinstance(trainer.profiler, SimpleProfiler)
    assert isinstance(trainer.logger, CSVLogger)
    assert trainer.logger.root_dir == "logs/mine"
    assert isinstance(trainer.engine.precision, Precision)
    assert trainer.precision == "mine"
    assert trainer.early_stopping_callback.monitor == "loss"
    collects = [c for c in trainer.callbacks if isinstance(c, GarbageCollection)]
    assert [c.generation for c in collects] == [1]
    assert [c.words for c in trainer.callbacks if isinstance(c, Says)] == [["a", "b"]]
    assert made.model.activation.negative_slope == 0.3
    # What a checkpoint is to hold is what was read, and can be written as JSON.
    assert made.model.hparams["activation"] == {
        "class_path": "torch.nn.LeakyReLU",
        "init_args": {"negative_slope": 0.3, "inplace": False},
    }


def test_what_was_read_stands_in_the_runs_folder_and_makes_the_same_run() -> None:
    Path("activation.yaml").write_text("class_path: torch.nn.Tanh")
    Path("fit.yaml").write_text(
        "seed_everything: 7\nmodel: {width: 3, activation: activation.yaml}\n"
        "trainer: {limit_train_batches: 1}"
    )
    first = cli("fit", "--config=fit.yaml", "--data.size=4")
    saved = Path(first.trainer.log_dir, "config.yaml")
    text = saved.read_text()
    assert text.startswith("# loopwright==")
    read = yaml.safe_load(text)
    assert read["trainer"]["limit_train_batches"] == 1
    assert read["trainer"]["max_epochs"] == 1
    assert read["data"] == {"size": 4}
    assert read["model"]["activation"]["class_path"] == "torch.nn.Tanh"
    second = cli("fit", f"--config={saved}")
    assert second.trainer.log_dir != first.trainer.log_dir
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_parts_of_a_configuration_stay_in_files_of_their_own() -> None:
    Path("model.yaml").write_text("width: 3")
    Path("fit.yaml").write_text("model: model.yaml")
    made = cli("fit", "--config=fit.yaml", save_config_kwargs={"multifile": True})
    folder = Path(made.trainer.log_dir)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == "model.yaml"
    assert yaml.safe_load((folder / "model.yaml").read_text())["width"] == 3


def test_the_configuration_of_another_run_is_not_replaced() -> None:
    nowhere = {"logger": False}
    cli("fit", trainer_defaults=nowhere)
    written = Path("config.yaml").read_text()
    with pytest.raises(RuntimeError, match=r"config\.yaml exists already"):
        cli("fit", "--model.width=3", trainer_defaults=nowhere)
    assert Path("config.yaml").read_text() == written
    cli("fit", trainer_defaults=nowhere, save_config_callback=None)
    replaces = {"overwrite": True}
    cli("fit", "--model.width=3", trainer_defaults=nowhere, save_config_kwargs=replaces)
    assert Path("config.yaml").read_text() != written


def test_a_resumed_run_writes_its_configuration_beside_the_first_ones() -> None:
    first = cli("fit")
    folder = Path(first.trainer.log_dir)
    before = (folder / "config.yaml").read_text()
    for epochs in (2, 2, 3):
        resumed = cli("fit", f"--trainer.max_epochs={epochs}", "--ckpt_path=last")
        assert resumed.trainer.current_epoch == epochs
        assert Path(resumed.trainer.log_dir) == folder
    assert (folder / "config.yaml").read_text() == before
    # The second time that it was resumed, nothing was different.
    assert sorted(path.name for path in folder.glob("config*")) == [
        "config.1.yaml",
        "config.2.yaml",
        "config.yaml",
    ]


def test_a_subclass_saves_the_configuration_elsewhere() -> None:
    class Elsewhere(SaveConfigCallback):
        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            Path(f"{stage}.txt").write_text(self.parser.dump(self.config))

    with pytest.raises(ValueError, match="save_to_log_dir"):
        SaveConfigCallback(None, None, save_to_log_dir=False)  # type: ignore[arg-type] # neither is used
    cli(
        "validate",
        save_config_callback=Elsewhere,
        save_config_kwargs={"save_to_log_dir": False},
    )
    assert "width: 4" in Path("validate.txt").read_text()
    assert not list(Path().rglob("config.yaml"))


def test_an_optimizer_and_a_schedule_are_named_on_the_command_line() -> None:
    plateau = [
        "--optimizer=Adam",
        "--optimizer.lr=0.25",
        "--lr_scheduler=ReduceLROnPlateau",
        "--lr_scheduler.monitor=loss",
    ]
    with pytest.warns(UserWarning, match="will be overridden"):
        made = cli("fit", *plateau, model=LateNet)
    (optimizer,) = made.trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert made.trainer.lr_scheduler_configs[0].monitor == "loss"
    # It has the parameters that the module makes late.
    assert len(optimizer.param_groups[0]["params"]) == 2

    class Fixed(LoopwrightCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_optimizer_args(torch.optim.AdamW)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.StepLR)

    with pytest.warns(UserWarning, match="will be overridden"):
        made = cli(
            "--optimizer.lr=0.5", "--lr_scheduler.step_size=3", kind=Fixed, run=False
        )
    (optimizer,), (scheduler,) = made.model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert scheduler.step_size == 3


def test_an_optimizer_that_is_linked_reaches_the_model_as_its_path() -> None:
    class TwoNets(Net):
        def __init__(self, first: dict[str, Any], second: dict[str, Any]) -> None:
            super().__init__()
            self.made = [first, second]

    class Linked(LoopwrightCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_optimizer_args(torch.optim.SGD, "a", link_to="model.first")
            parser.add_optimizer_args(
                (torch.optim.Optimizer,), "b", link_to="model.second"
            )

    made = cli("--a.lr=0.5", "--b=Adam", kind=Linked, model=TwoNets, run=False)
    first, second = made.model.made
    assert first["class_path"].endswith("SGD")
    assert first["init_args"]["lr"] == 0.5
    assert second["class_path"] == "torch.optim.Adam"


def test_arguments_are_linked() -> None:
    class Linked(LoopwrightCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_loopwright_class_args(EarlyStopping, "stop")
            parser.set_defaults({"stop.monitor": "loss", "stop.patience": 9})
            parser.link_arguments(
                "data.features",
                "model.width",
                compute_fn=lambda features: 2 * features,
                apply_on="instantiate",
            )
            parser.link_arguments("stop.patience", "data.size")

    made = cli("--stop.patience=6", kind=Linked, run=False)
    assert made.model.width == 6
    assert made.model.hparams.width == 6
    assert made.datamodule.size == 6
    assert made.trainer.early_stopping_callback.patience == 6


@pytest.mark.parametrize(
    "named",
    [
        {"class_path": "unknown_to_it.Part"},
        "unknown_to_it.Part",
        '{"class_path": "unknown_to_it.Part"}',
        '{"class_\\u0070ath": "\\u0075nknown_to_it.Part"}',
    ],
)
def test_hyperparameters_make_no_program_import_what_it_has_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Any
) -> None:
    """However a checkpoint names it."""
    text = "from pathlib import Path\nPath('imported').touch()\nfrom torch import nn\nclass Part(nn.Module): pass\n"
    (tmp_path / "unknown_to_it.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="would import unknown_to_it"):
        instantiate_module(Net, {"_instantiator": "x", "activation": named})
    assert not Path("imported").exists()
    # Nothing is left in the way of imports.
    assert instantiate_module(Net, {"_instantiator": "x", "width": 3}).width == 3


def test_a_module_that_a_command_line_has_made_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cli(
        "fit",
        f"--model={__name__}.Net",
        "--model.width=3",
        "--model.activation=torch.nn.LeakyReLU",
        "--model.activation.negative_slope=0.3",
        "--model.make_optimizer=torch.optim.Adam",
        model=Module,
        subclass_mode_model=True,
    )
    path = made.trainer.checkpoint_callback.best_model_path
    for loaded in (Net.load_from_checkpoint(path), Module.load_from_checkpoint(path)):
        assert type(loaded) is Net
        assert loaded.activation.negative_slope == 0.3
        assert type(loaded.configure_optimizers()) is torch.optim.Adam
        assert torch.equal(loaded.layer.weight, made.model.layer.weight)
        # It can be trained and saved again.
        assert loaded.hparams == made.model.hparams
    assert Net.load_from_checkpoint(path, activation=nn.Tanh()).width == 3
    # A checkpoint makes no program import what it has not imported.
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(CheckpointError, match=rf"would import {__name__}"):
        Module.load_from_checkpoint(path)


def test_a_module_inside_another_keeps_its_own_hyperparameters() -> None:
    class Outer(Module):
        def __init__(self, inner: Module, depth: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.inner, self.made_here = inner, Net(width=depth)

    made = cli(
        f"--model.inner={__name__}.Net", "--model.inner.width=7", model=Outer, run=False
    )
    assert made.model.hparams["inner"]["init_args"]["width"] == 7
    assert made.model.inner.hparams.width == 7
    assert made.model.made_here.hparams.width == 1


def test_a_checkpoints_hyperparameters_are_the_models_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = cli("fit", "--model.width=3", "--model.activation=torch.nn.Tanh")
    path = trained.trainer.checkpoint_callback.best_model_path
    made = cli("test", f"--ckpt_path={path}")
    assert made.model.width == 3
    assert isinstance(made.model.activation, nn.Tanh)
    # What is said explicitly counts: here, so that the checkpoint does not fit.
    with pytest.raises(CheckpointError, match="another architecture"):
        cli("test", f"--ckpt_path={path}", "--model.width=5")
    said = refusal(capsys, "test", f"--ckpt_path={path}", model=LateNet)
    assert "Parsing of ckpt_path hyperparameters failed" in said


def test_variables_and_dicts_are_read_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_MODEL__WIDTH", "5")
    monkeypatch.setenv("LOOPWRIGHT_TRAINER__MAX_EPOCHS", "2")
    assert cli(run=False).model.width == 4
    made = cli(run=False, parser_kwargs={"default_env": True})
    assert (made.model.width, made.trainer.max_epochs) == (5, 2)
    read = {"model": {"width": 6}, "trainer": {"logger": False}}
    assert LoopwrightCLI(Net, Data, args=read, run=False).model.width == 6
    sys.argv.append("--model.width=7")
    assert LoopwrightCLI(Net, run=False).model.width == 7
    with pytest.warns(UserWarning, match="args parameter counts"):
        assert LoopwrightCLI(Net, args=["--model.width=8"], run=False).model.width == 8


def test_a_seed_is_kept_with_the_configuration() -> None:
    for default, option, seed in (
        (False, [], False),
        (True, [], 0),
        (11, [], 11),
        (11, ["--seed_everything=false"], False),
        (False, ["--seed_everything=5"], 5),
    ):
        os.environ.pop("LOOPWRIGHT_SEED", None)
        made = cli(*option, seed_everything_default=default, run=False)
        assert made.config.seed_everything == seed


def test_a_subcommand_of_ones_own_has_its_arguments() -> None:
    class Mine(Trainer):
        def explain(self, model: Module, times: int = 1) -> None:
            """Explain the model.

            Args:
                model: the model.
                times: how often.
            """
            said.append(f"explain {times}")

    class Explains(LoopwrightCLI):
        trainer_type = Mine

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LoopwrightCLI.subcommands(), "explain": {"model"}}

        def before_explain(self) -> None:
            said.append("before")

        def after_explain(self) -> None:
            said.append("after")

        def test(self, model: Module, **kwargs: Any) -> None:
            said.append("tested otherwise")

    said: list[str] = []
    Explains(Net, args=["explain", "--times=3"])
    assert said == ["before", "explain 3", "after"]
    Explains(Net, args=["test"])
    assert said[-1] == "tested otherwise"


def test_functions_make_what_is_no_class() -> None:
    def small(width: int = 2) -> Net:
        return Net(width, nn.Identity())

    always = Says(["always"])
    made = cli(
        "--model.width=3",
        model=small,
        run=False,
        trainer_defaults={"callbacks": always},
    )
    assert made.model.width == 3
    assert always in made.trainer.callbacks
    again = made.instantiate_trainer(max_epochs=12)
    assert again.max_epochs == 12
    assert [c for c in again.callbacks if isinstance(c, ModelCheckpoint)]


INTERRUPTS = """
import os, signal
from loopwright.callbacks import Callback


class Interrupts(Callback):
    '''Ends the program after a step, as a scheduler does whose time is over.'''

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and trainer.ckpt_path is None:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
def test_the_digits_are_trained_from_a_file_and_resumed_in_two_processes(
    tmp_path: Path,
) -> None:
    (tmp_path / "interrupts.py").write_text(INTERRUPTS)
    path = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))

    def fit(*options: str) -> Any:
        return run_program(
            EXAMPLES / "digits_cli.py",
            "fit",
            f"--config={EXAMPLES / 'digits_cli.yaml'}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
            "--trainer.max_epochs=2",
            *options,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
        )

    refused = fit("--trainer.max_epoch=2")
    assert refused.returncode == 2
    assert "did you mean 'max_epochs'?" in refused.stderr
    stops = "--trainer.callbacks+=interrupts.Interrupts"
    interrupted = fit(stops, "--trainer.callbacks.step=7")
    assert interrupted.returncode == 143, interrupted.stderr
    resumed = fit("--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    # The processes write one folder, and one configuration for each run.
    (folder,) = (tmp_path / "logs" / "digits_cli").iterdir()
    names = sorted(path.name for path in folder.glob("config*"))
    assert names == ["config.1.yaml", "config.yaml"]
    best = (folder / "checkpoints" / "best.ckpt").read_text()
    assert "epoch=1" in best


HYDRA = """
import hydra
import torch
from loopwright.framework import Module, Trainer


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@hydra.main(version_base=None, config_path=None)
def main(config):
    folder = hydra.core.hydra_config.HydraConfig.get().runtime.output_dir
    trainer = Trainer(accelerator="cpu", devices=2, max_epochs=1, default_root_dir=folder, enable_progress_bar=False)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(8, 2), 2))
    print("IN", folder)


main()
"""


@pytest.mark.slow
def test_a_program_of_hydra_has_one_folder_with_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("hydra")
    (tmp_path / "train.py").write_text(HYDRA)
    # A name by the microsecond, which two processes never have alike.
    name = "hydra.run.dir=outputs/${now:%H-%M-%S-%f}"
    ended = run_program("train.py", name, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert ended.stdout.count(f"IN {folder}") == 2
    assert (folder / "loopwright_logs").is_dir()
