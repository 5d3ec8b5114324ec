"""`loopwright migrate`: what it makes of programs in many styles, and what it tells of them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loopwright.framework import Engine, Trainer
from loopwright.framework.command_line.migrate import findings, keywords
from loopwright.framework.command_line.migrate.main import main

ROOT = Path(__file__).resolve().parents[2]

# Programs in the styles that are in use: the text, and what it becomes under the faces' names.
FACES = {
    "a short name": (
        """
# Trains a network.
import torch
import pytorch_lightning as pl  # the trainer


class Net(pl.LightningModule):
    pass


trainer = pl.Trainer(max_epochs=1, callbacks=[pl.callbacks.EarlyStopping("loss")])
""",
        """
# Trains a network.
import torch
import loopwright.lightning as pl  # the trainer


class Net(pl.LightningModule):
    pass


trainer = pl.Trainer(max_epochs=1, callbacks=[pl.callbacks.EarlyStopping("loss")])
""",
    ),
    "lightning as L": (
        """
import lightning as L, os
from lightning import pytorch as pl

fabric = L.fabric.Fabric()
trainer = L.pytorch.Trainer(logger=L.pytorch.loggers.CSVLogger("logs"))
model = L.LightningModule()
pl.seed_everything(1)
""",
        """
import loopwright.lightning as L, os
from loopwright import lightning as pl

fabric = L.fabric.Fabric()
trainer = L.Trainer(logger=L.loggers.CSVLogger("logs"))
model = L.LightningModule()
pl.seed_everything(1)
""",
    ),
    "full names": (
        """
import pytorch_lightning
import lightning.pytorch.callbacks
import lightning_fabric.utilities

pytorch_lightning.Trainer(callbacks=lightning.pytorch.callbacks.Timer())
lightning_fabric.utilities.move_data_to_device([], "cpu")
""",
        """
import loopwright.lightning
import loopwright.lightning.callbacks
import loopwright.lightning.fabric.utilities

loopwright.lightning.Trainer(callbacks=loopwright.lightning.callbacks.Timer())
loopwright.lightning.fabric.utilities.move_data_to_device([], "cpu")
""",
    ),
    "parts of a package": (
        """
import lightning.pytorch
import pytorch_lightning.callbacks


def f(lightning):
    return lightning.Trainer


lightning.fabric.seed_everything(1)
lightning.LightningModule().to("cpu")
pytorch_lightning.Trainer(callbacks=pytorch_lightning.callbacks.Timer())
""",
        """
import loopwright.lightning
import loopwright.lightning.callbacks


def f(lightning):
    return lightning.Trainer


loopwright.lightning.fabric.seed_everything(1)
loopwright.lightning.LightningModule().to("cpu")
loopwright.lightning.Trainer(callbacks=loopwright.lightning.callbacks.Timer())
""",
    ),
    "names in brackets": (
        """
from pytorch_lightning.callbacks import (
    EarlyStopping,  # stops
    ModelCheckpoint as Saver,
)
from lightning.pytorch import Trainer, LightningModule, \\
    seed_everything
from pytorch_lightning.callbacks.early_stopping import EarlyStopping
""",
        """
from loopwright.lightning.callbacks import (
    EarlyStopping,  # stops
    ModelCheckpoint as Saver,
)
from loopwright.lightning import Trainer, LightningModule, \\
    seed_everything
from loopwright.lightning.callbacks.early_stopping import EarlyStopping
""",
    ),
    "imports anywhere": (
        """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl


def make() -> "Trainer":
    from pytorch_lightning.loggers import CSVLogger; import accelerate

    return pl.Trainer(logger=CSVLogger("x")), accelerate.Accelerator
""",
        """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopwright.lightning import Trainer
try:
    import loopwright.lightning as pl
except ImportError:
    import loopwright.lightning as pl


def make() -> "Trainer":
    from loopwright.lightning.loggers import CSVLogger; import loopwright.accelerate

    return pl.Trainer(logger=CSVLogger("x")), loopwright.accelerate.Accelerator
""",
    ),
    "somebody else's names": (
        """
import pytorch_lightning
from accelerator import Accelerator
from .lightning import Trainer
from my.pytorch_lightning import Timer


def f(pytorch_lightning, accelerate):
    return pytorch_lightning.Trainer, accelerate.Accelerator, self.pytorch_lightning.Trainer
""",
        """
import loopwright.lightning
from accelerator import Accelerator
from .lightning import Trainer
from my.pytorch_lightning import Timer


def f(pytorch_lightning, accelerate):
    return pytorch_lightning.Trainer, accelerate.Accelerator, self.pytorch_lightning.Trainer
""",
    ),
    "Lightning 1": (
        """
import pytorch_lightning as pl
from pytorch_lightning.core.lightning import LightningModule
from pytorch_lightning.profiler import SimpleProfiler
from pytorch_lightning.utilities.distributed import rank_zero_only
from pytorch_lightning.utilities.seed import seed_everything

trainer = pl.Trainer(
    gpus=2,
    distributed_backend='ddp',  # one process each
    checkpoint_callback=False,
    progress_bar_refresh_rate=0,
    weights_summary=None,
)
cpu = pl.Trainer(gpus=0)
many = pl.Trainer(max_epochs=2, gpus=[0, 1], accelerator="ddp")
trainer.fit(net, train_dataloader=loader)
trainer.test(net, test_dataloaders=loader)
""",
        """
import loopwright.lightning as pl
from loopwright.lightning.core.module import LightningModule
from loopwright.lightning.profilers import SimpleProfiler
from loopwright.lightning.utilities.rank_zero import rank_zero_only
from loopwright.lightning import seed_everything

trainer = pl.Trainer(
    accelerator="gpu",
    devices=2,
    strategy="ddp",  # one process each
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
cpu = pl.Trainer(accelerator="cpu")
many = pl.Trainer(max_epochs=2, accelerator="gpu", devices=[0, 1], strategy="ddp")
trainer.fit(net, train_dataloaders=loader)
trainer.test(net, dataloaders=loader)
""",
    ),
    "accelerate": (
        """
import accelerate
from accelerate import Accelerator, DistributedDataParallelKwargs as DDPKwargs
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed

logger = get_logger(__name__)
accelerator = Accelerator(mixed_precision="fp16", log_with="tensorboard", kwargs_handlers=[DDPKwargs()])
with accelerate.init_empty_weights():
    pass
""",
        """
import loopwright.accelerate
from loopwright.accelerate import Accelerator, DistributedDataParallelKwargs as DDPKwargs
from loopwright.accelerate.logging import get_logger
from loopwright.accelerate.utils import ProjectConfiguration, set_seed

logger = get_logger(__name__)
accelerator = Accelerator(mixed_precision="fp16", log_with="tensorboard", kwargs_handlers=[DDPKwargs()])
with loopwright.accelerate.init_empty_weights():
    pass
""",
    ),
    "a star": (
        "from pytorch_lightning.callbacks import *\nx = EarlyStopping('loss')\n",
        "from loopwright.lightning.callbacks import *\nx = EarlyStopping('loss')\n",
    ),
    "other line ends": (
        "import accelerate\r\nx = accelerate.Accelerator()",
        "import loopwright.accelerate\r\nx = loopwright.accelerate.Accelerator()",
    ),
}

NATIVE = {
    "Lightning": (
        """
import pytorch_lightning as pl
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar


class Net(LightningModule):
    pass


class Data(pl.LightningDataModule):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module=pl_module)


trainer = Trainer(strategy="ddp_spawn", callbacks=[pl.callbacks.Timer(), TQDMProgressBar()])
trainer.fit_loop.max_epochs = 3
""",
        """
import loopwright as pl
from loopwright import DataModule, Module, Trainer
from loopwright.callbacks import ModelCheckpoint, TQDMProgressBar


class Net(Module):
    pass


class Data(pl.DataModule):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module=pl_module)


trainer = Trainer(strategy="ddp", callbacks=[pl.callbacks.Timer(), TQDMProgressBar()])
trainer.max_epochs = 3
""",
    ),
    "a name that is taken": (
        """
from torch.nn import Module
from pytorch_lightning import LightningModule, Trainer

x: "Trainer" = None


class Net(LightningModule):
    layer: Module
""",
        """
from torch.nn import Module
from loopwright import Module as LightningModule, Trainer

x: "Trainer" = None


class Net(LightningModule):
    layer: Module
""",
    ),
    "a name that stands in a text": (
        """
from lightning.pytorch import LightningModule

__all__ = ["LightningModule"]
""",
        """
from loopwright import Module as LightningModule

__all__ = ["LightningModule"]
""",
    ),
    "names without one of our own": (
        """
import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    CustomProgress,  # slow
    EarlyStopping,  # soon
    ModelCheckpoint as Saver,
    MetricsTextColumn
)
from lightning import pytorch, Fabric


fabric = Fabric()


@pl.utilities.rank_zero_only
def f():
    return pytorch.Trainer
""",
        """
import loopwright as pl
import loopwright.lightning.utilities
from loopwright.lightning.callbacks import (
    CustomProgress,  # slow
    MetricsTextColumn
)
from loopwright.callbacks import (
    EarlyStopping,  # soon
    ModelCheckpoint as Saver
)
import loopwright
from loopwright.lightning import Fabric


fabric = Fabric()


@loopwright.lightning.utilities.rank_zero_only
def f():
    return loopwright.Trainer
""",
    ),
    "Accelerate": (
        """
from accelerate import Accelerator, notebook_launcher
from accelerate.utils import gather_object, set_seed

set_seed(3)
accelerator = Accelerator(
    cpu=False,
    mixed_precision="bf16",
    gradient_accumulation_steps=2,
)
on_cpu = Accelerator(mixed_precision='no', cpu=True)
if not accelerator.optimizer_step_was_skipped:
    gather_object([1])
""",
        """
from loopwright import Engine, launch
from loopwright.accelerate.utils import gather_object
from loopwright import seed_everything

seed_everything(3)
accelerator = Engine(
    precision="bf16-mixed",
    gradient_accumulation_steps=2,
)
on_cpu = Engine(precision="32-true", accelerator="cpu")
if not accelerator.step_was_skipped:
    gather_object([1])
""",
    ),
}

Migrate = Callable[..., str]


@pytest.fixture
def migrate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Migrate:
    """A function that rewrites a program and returns its text; what is told is in its attribute."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *options: str, name: str = "program.py") -> str:
        Path(name).write_bytes(text.encode())
        assert main([name, "--write", *options]) == 0
        run.told = capsys.readouterr().err  # type: ignore[attr-defined] # read by tests
        return Path(name).read_bytes().decode()

    return run


@pytest.mark.parametrize("style", FACES)
def test_a_program_moves_to_the_faces(style: str, migrate: Migrate) -> None:
    before, after = FACES[style]
    assert migrate(before) == after
    # What has been rewritten stays.
    assert migrate(after) == after


@pytest.mark.parametrize("style", NATIVE)
def test_a_program_moves_to_names_of_our_own(style: str, migrate: Migrate) -> None:
    before, after = NATIVE[style]
    assert migrate(before, "--to", "native") == after
    assert migrate(after, "--to", "native") == after


def test_only_one_of_the_two_may_be_rewritten(migrate: Migrate) -> None:
    text = "import accelerate\nimport pytorch_lightning as pl\n"
    assert migrate(text, "--from", "accelerate") == (
        "import loopwright.accelerate\nimport pytorch_lightning as pl\n"
    )
    assert migrate(text, "--from", "lightning") == (
        "import accelerate\nimport loopwright.lightning as pl\n"
    )


TOLD = """
import importlib
import logging

import lightning.app
import pytorch_lightning as pl
from accelerate import Accelerator
from lightning.pytorch.callbacks import *


class Net(pl.LightningModule):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        pass

    def validation_epoch_end(self, outputs):
        pass

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.log("loss", 1.0, sync_dist=True)
        self.model = self.trainer.strategy.model


settings = {"class_path": "pytorch_lightning.callbacks.Timer"}
text = '''
- _target_: pytorch_lightning.Trainer
'''
importlib.import_module("pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(0)
trainer = pl.Trainer(gpus=count, plugins=[], resume_from_checkpoint="x.ckpt")
torch.load(trainer.checkpoint_callback.best_model_path)
accelerator = Accelerator(mixed_precision=args.precision, log_with="wandb")
lr_scheduler.step()
accelerator.init_trackers("x")
stage = accelerator.state.deepspeed_plugin.zero_stage
trainer.fit_loop.epoch_loop.batch_progress
accelerator.split_batches, accelerator.num_processes
"""


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (
            "face",
            [
                "5: lightning.app stays as it is: ",
                "8: from lightning.pytorch.callbacks import *: ",
                "12: optimizer_step(): ",
                "15: validation_epoch_end(): here that is on_validation_epoch_end",
                "18: training_step(optimizer_idx): ",
                "20: strategy.model: ",
                "23: pytorch_lightning.callbacks.Timer stands in a text: write loopwright.lightning.callbacks.Timer",
                "25: pytorch_lightning.Trainer stands in a text: write loopwright.lightning.Trainer",
                "27: pytorch_lightning stands in a text: write loopwright.lightning",
                '28: the logger of messages is called "loopwright"',
                '29: gpus=: here that is devices=…, with accelerator="gpu"',
                "29: resume_from_checkpoint=: here that is ckpt_path=… of fit",
            ],
        ),
        (
            "native",
            [
                "19: log(sync_dist=…): ",
                "23: pytorch_lightning.callbacks.Timer stands in a text: write loopwright.callbacks.Timer",
                "29: Trainer(plugins=…): pass a Strategy or a Precision instead",
                "30: torch.load of a checkpoint: ",
                "31: mixed_precision=: here that is precision=",
                "31: log_with=: here that is logger=",
                "32: scheduler.step(): ",
                "33: accelerator.init_trackers(): ",
                "36: accelerator.split_batches: the Engine has no split_batches",
                "34: state.deepspeed_plugin: ",
                "35: fit_loop: ",
            ],
        ),
    ],
)
def test_what_behaves_otherwise_is_told_by_line(
    target: str, told: list[str], migrate: Migrate
) -> None:
    migrate(TOLD, "--to", target)
    lines = migrate.told.splitlines()  # type: ignore[attr-defined] # set by the fixture
    for words in told:
        found = [line for line in lines if line.startswith(f"program.py:{words}")]
        assert len(found) == 1, (words, lines)


def test_names_that_are_not_there_are_told(migrate: Migrate) -> None:
    text = (
        "import pytorch_lightning as pl\n"
        "from lightning.pytorch.callbacks import CustomProgress, EarlyStopping, StopsEarly\n"
        "from pytorch_lightning.somewhere import X\n"
        "pl.callbacks.EarlyStopping.check_on_train_epoch_end\n"
        "pl.callbacks.NoCallback()\n"
    )
    migrate(text)
    told = re.findall(r"^program.py:(.*)$", migrate.told, re.M)  # type: ignore[attr-defined] # set by the fixture
    start = "2: loopwright.lightning.callbacks.CustomProgress can be imported, and does nothing: "
    assert told[1].startswith(start)
    assert told[:1] + told[2:] == [
        "2: loopwright.lightning.callbacks has no StopsEarly",
        "3: loopwright.lightning has no somewhere",
        "5: loopwright.lightning.callbacks has no NoCallback",
    ]


@pytest.mark.parametrize(
    ("callee", "ours"), [("Trainer", Trainer), ("Accelerator", Engine)]
)
def test_arguments_become_such_as_there_are(callee: str, ours: type) -> None:
    taken = set(inspect.signature(ours).parameters)
    for name, keyword in keywords.TABLES[callee].items():
        values = ("0", "True", "None", '"top"', '"ddp"', '"ddp_spawn"', '"fp16"')
        made = [keyword.make(value) or {} for value in values]
        new = {argument for arguments in made for argument in arguments}
        assert new, name
        assert new <= taken, name
    gone = keywords.GONE[callee]
    assert not taken & set(gone), "these are taken now: no advice is needed"


def test_a_plain_program_is_told_nothing(migrate: Migrate) -> None:
    text = "import torch\n\nscheduler.step()\ntrainer.fit_loop\nx = 'lightning'\n"
    assert migrate(text, "--to", "native") == text
    assert "To look at" not in migrate.told  # type: ignore[attr-defined] # set by the fixture


def headings(page: str) -> set[tuple[str, ...]]:
    """The headings of a page, each with the one above it."""
    found: set[tuple[str, ...]] = set()
    above = ""
    for marks, title in re.findall(r"^(##+) (.*)$", page, re.MULTILINE):
        if marks == "##":
            above = title
            found.add((title,))
        else:
            found.add((above, title))
    return found


def test_the_sections_that_are_named_are_there() -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    named = {pattern.section for pattern in findings.PATTERNS}
    assert named <= headings(page), "write the section, or name another one"


NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# pytorch_lightning é\n"]},
        {
            "cell_type": "code", "execution_count": 3, "metadata": {"tags": []}, "outputs": [],
            "source": ["!pip install lightning\n", "import pytorch_lightning, torch\n", "files = !ls\n",
                       "if files:\n", "    %timeit 1"],
        },
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [],
         "source": ["%%bash\n", "python -m pytorch_lightning"]},
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [],
         "source": "trainer = pytorch_lightning.Trainer(gpus=n)\ntrainer.fit?"},
    ],
    "metadata": {}, "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


def test_a_notebook_is_one_program(migrate: Migrate) -> None:
    before = json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"
    after = migrate(before, name="notebook.ipynb")
    # Only the two lines of code are other ones.
    expected = before.replace(
        "import pytorch_lightning, torch", "import loopwright.lightning, torch"
    ).replace(
        "trainer = pytorch_lightning.Trainer", "trainer = loopwright.lightning.Trainer"
    )
    assert after == expected
    assert "notebook.ipynb[cell 3]:1: gpus=: " in migrate.told  # type: ignore[attr-defined] # set by the fixture


def test_without_write_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    (project / ".venv").mkdir(parents=True)
    (project / "env").mkdir()
    (project / "env" / "pyvenv.cfg").write_text("")
    text = "# -*- coding: latin-1 -*-\nimport accelerate  # é\n"
    for name in ("a.py", ".venv/b.py", "env/c.py"):
        (project / name).write_text(text, encoding="latin-1")
    (project / "d.py").write_text("import torch\n")
    (project / "old.py").write_text("import accelerate\nprint 'x'\n")
    (project / "config.yaml").write_text(
        "a:\n  class_path: lightning.pytorch.Trainer\n"
    )
    assert main([str(project), "--check"]) == 1
    checked = capsys.readouterr()
    assert main([str(project)]) == 0
    shown = capsys.readouterr()
    assert checked.out == ""
    changes = [line for line in shown.out.splitlines() if line[:1] in "+-"]
    assert changes == [
        f"--- {project / 'a.py'}", f"+++ {project / 'a.py'}",
        "-import accelerate  # é", "+import loopwright.accelerate  # é",
    ]  # fmt: skip
    for told in (
        "old.py:2: cannot be parsed as Python 3",
        "config.yaml:2: lightning.pytorch.Trainer stands in a text: write loopwright.lightning.Trainer",
        "1 file would be rewritten; --write does it",
    ):
        assert told in shown.err
    assert (project / "a.py").read_text(encoding="latin-1") == text
    assert main([str(project), "--write"]) == 0
    assert (project / "a.py").read_text(encoding="latin-1") == text.replace(
        "import accelerate", "import loopwright.accelerate"
    )
    assert main([str(project), "--check"]) == 0


def test_what_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["no/such/folder"])
    assert ended.value.code == 2
    assert "there is nothing at no/such/folder" in capsys.readouterr().err


def test_without_libcst_it_says_how_to_get_it(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.meta_path.insert(0, type('None', (), {'find_spec': staticmethod(lambda name, *_: None)}))\n"
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from loopwright.framework.command_line.migrate.main import main\n"
        "main(['.'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'loopwright[migrate]'" in done.stderr
