"""Programs that were written for Accelerate compute what they do there, and what they cannot have is said by name."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard as TheirShard
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from loopwright.accelerate import (
    Accelerator,
    PartialState,
    load_checkpoint_in_model,
)
from loopwright.accelerate.data_loader import BatchSamplerShard
from loopwright.accelerate.logging import get_logger
from loopwright.accelerate.state import AcceleratorState, GradientState
from loopwright.accelerate.tracking import GeneralTracker
from loopwright.accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradScalerKwargs,
    MegatronLMPlugin,
    ProjectConfiguration,
    is_deepspeed_available,
    patch_environment,
)
from loopwright.framework import Engine, launch
from loopwright.loggers import CSVLogger
from tests.framework.compat.accelerate_programs import PROGRAMS
from tests.programs import run_program

FILE = Path(__file__).with_name("accelerate_programs.py")
# Those that show most in one process; the rest differ in several.
ALONE = ("cv_example", "checkpointing", "gradient_accumulation", "streams")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.fixture(autouse=True)
def _fresh_states() -> Iterator[None]:
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


def run_both(folder: Path, launcher: tuple[str, ...], *names: str) -> list[Any]:
    """The results of the programs on Accelerate, and on what stands for it."""
    found = []
    for option in ((), ("--install",)):
        place = folder / "".join(("at", *option))
        place.mkdir()
        output = place / "results.json"
        done = run_program(*launcher, FILE, *option, place, output, *names, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(json.loads(output.read_text()))
    return found


def is_close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and one.keys() == other.keys():
        return all(is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and len(one) == len(other):
        return all(map(is_close, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return one == other


@pytest.mark.slow
def test_programs_compute_the_same_as_on_accelerate(tmp_path: Path):
    theirs, ours = run_both(tmp_path, (), *ALONE)
    differ = [name for name in ALONE if not is_close(theirs[name], ours[name])]
    assert not differ, {name: (theirs[name], ours[name]) for name in differ}


@pytest.mark.slow
def test_programs_compute_the_same_as_on_accelerate_in_two_processes(tmp_path: Path):
    theirs, ours = run_both(tmp_path, TORCHRUN)
    # Accelerate counts repeated samples of streams that each process reads; there are 26.
    for split in (False, True):
        rows, sizes = ours["streams"].pop(f"False {split}")
        assert [number for row in rows for number in row] == list(range(26))
        assert sizes == theirs["streams"].pop(f"False {split}")[1]
    differ = [name for name in PROGRAMS if not is_close(theirs[name], ours[name])]
    assert not differ, {name: (theirs[name], ours[name]) for name in differ}


def test_install_answers_imports_once_and_refuses_when_it_is_too_late():
    program = (
        "import loopwright.accelerate as ours\n"
        "ours.install(); ours.install()\n"
        "import accelerate.utils.operations, accelerate\n"
        "from accelerate.utils import gather, is_wandb_available\n"
        "from accelerate import Accelerator\n"
        "assert accelerate is ours and accelerate.utils.gather is gather\n"
        "import loopwright.accelerate.utils as utils\n"
        "assert utils.__spec__.name == 'loopwright.accelerate.utils'\n"
        "try: import accelerate.commands.launch\n"
        "except ImportError as error: print(error)\n"
    )
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr
    assert "No module named 'accelerate.commands.launch'" in done.stdout
    assert done.stderr.count("Imports of accelerate are answered by") == 1
    late = "import accelerate, loopwright.accelerate as ours\nours.install()\n"
    done = run_program("-c", late)
    assert "accelerate has been imported before" in done.stderr


@pytest.mark.parametrize("length", [1, 3, 8, 10, 12, 21])
@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
def test_the_batches_of_a_process_are_accelerates(
    length: int,
    batch_size: int,
    drop_last: bool,
    split_batches: bool,
    even_batches: bool,
):
    for rank in range(2):
        given = BatchSampler(range(length), batch_size, drop_last)
        options = {"split_batches": split_batches, "even_batches": even_batches}
        theirs = TheirShard(given, 2, rank, **options)
        ours = BatchSamplerShard(given, 2, rank, **options)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


def test_states_are_shared_and_can_be_forgotten():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert AcceleratorState().mixed_precision == "bf16"
    assert accelerator.state.__dict__ is AcceleratorState().__dict__
    assert PartialState().device == accelerator.device
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(mixed_precision="fp16")
    accelerator.gradient_accumulation_steps = 4
    assert GradientState().num_steps == 4
    accelerator.sync_gradients = False
    assert GradientState().sync_gradients is False
    copied = pickle.loads(pickle.dumps(accelerator))
    assert copied.mixed_precision == "bf16"
    AcceleratorState._reset_state()
    with pytest.raises(AttributeError, match=r"AcceleratorState\._reset_state"):
        accelerator.prepare(nn.Linear(1, 1))


def test_what_accelerate_launch_asks_for():
    asked = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
        "ACCELERATE_USE_CPU": "yes",
    }
    with patch_environment(**asked):
        accelerator = Accelerator()
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.device.type == "cpu"


def test_options_of_precision():
    handlers = [GradScalerKwargs(init_scale=8.0), AutocastKwargs(enabled=False)]
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=handlers)
    assert accelerator.scaler is not None
    assert accelerator.scaler.get_scale() == 8.0
    model = accelerator.prepare(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).dtype == torch.float32
    with accelerator.autocast(AutocastKwargs(enabled=True)):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mixed_precision": "fp8"}, 'use "bf16"'),
        ({"megatron_lm_plugin": object()}, "megatron_lm_plugin"),
        ({"log_with": "aim"}, "GeneralTracker of your own"),
    ],
)
def test_what_is_not_served_is_said_by_name(arguments: dict[str, Any], words: str):
    with pytest.raises(NotImplementedError, match=words):
        Accelerator(cpu=True, **arguments)


def test_wrong_arguments_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="only pass one `AutocastKwargs`"):
        Accelerator(kwargs_handlers=[AutocastKwargs(), AutocastKwargs()])
    with pytest.raises(ValueError, match="requires a `logging_dir`"):
        Accelerator(log_with="tensorboard")
    with pytest.raises(ValueError, match="Unsupported logging capability"):
        Accelerator(log_with="paper")
    accelerator = Accelerator()
    with pytest.raises(ValueError, match="folder does not exist"):
        accelerator.load_state(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs an output_dir"):
        accelerator.save_state()
    with pytest.raises(ValueError, match="Item at index 1"):
        accelerator.register_for_checkpointing(nn.Linear(1, 1), 5)
    with pytest.raises(NotImplementedError, match="MegatronLMPlugin of Accelerate"):
        MegatronLMPlugin()
    with pytest.raises(ValueError, match="NO_SHARD"):
        FullyShardedDataParallelPlugin(sharding_strategy="NO_SHARD").strategy({})


def test_prepared_objects_say_so_and_are_forgotten():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(TensorDataset(torch.arange(3.0)), batch_size=2)
    prepared = accelerator.prepare(model, optimizer, schedule, loader, None)
    assert all(item._is_accelerate_prepared for item in prepared[:4])
    assert prepared[4] is None
    assert isinstance(prepared[3], DataLoader)
    assert prepared[3] in accelerator._dataloaders
    assert is_deepspeed_available() in (True, False)
    accelerator.free_memory()
    assert not accelerator._models
    assert not accelerator._optimizers


def test_a_position_is_kept_only_if_it_is_asked_for(tmp_path: Path):
    for keeps in (False, True):
        config = DataLoaderConfiguration(use_stateful_dataloader=keeps)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        loader = accelerator.prepare(
            DataLoader(TensorDataset(torch.arange(6)), batch_size=1)
        )
        for number, _ in enumerate(loader):
            if number == 2:
                accelerator.save_state(tmp_path / str(keeps))
        accelerator.load_state(tmp_path / str(keeps))
        assert [int(batch[0]) for batch in loader] == (
            [3, 4, 5] if keeps else [0, 1, 2, 3, 4, 5]
        )


def test_hooks_may_save_and_load_a_model_themselves(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 2))

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        torch.save(models[0].state_dict(), Path(folder) / "own.pt")
        weights.pop()

    def load(models: list[Any], folder: str) -> None:
        models.pop().load_state_dict(torch.load(Path(folder) / "own.pt"))

    handles = [
        accelerator.register_save_state_pre_hook(save),
        accelerator.register_load_state_pre_hook(load),
    ]
    accelerator.save_state(tmp_path / "state")
    before = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.weight, before)
    assert load_file(tmp_path / "state" / "model" / "model.safetensors") == {}
    for handle in handles:
        handle.remove()
    accelerator.save_state(tmp_path / "state")
    nn.init.zeros_(model.weight)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.weight, before)


def test_models_in_several_files_are_read_again(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for safe in (True, False):
        accelerator.save_model(
            model, tmp_path, max_shard_size=70, safe_serialization=safe
        )
        read = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        read[1].weight = read[0].weight
        load_checkpoint_in_model(read, tmp_path)
        for one, other in zip(model.parameters(), read.parameters(), strict=True):
            assert torch.equal(one, other)
        accelerator.save_model(model, tmp_path, safe_serialization=safe)
        left = sorted(file.name for file in tmp_path.iterdir())
        assert left == ["model.safetensors" if safe else "pytorch_model.bin"]
        for file in tmp_path.iterdir():
            file.unlink()


def test_trackers(tmp_path: Path):
    rows = []

    class Own(GeneralTracker):
        name = "own"
        requires_logging_directory = False
        tracker = rows

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            rows.append(values)

        def log(self, values: dict[str, Any], step: Any = None, **options: Any) -> None:
            rows.append((values, step, options))

    class Lacking(GeneralTracker):
        name = "lacking"

    with pytest.raises(NotImplementedError, match="requires_logging_directory"):
        Lacking()
    accelerator = Accelerator(log_with=["tensorboard", Own()], project_dir=tmp_path)
    accelerator.init_trackers("name", {"lr": 1})
    accelerator.log({"loss": 1.0}, step=3, log_kwargs={"own": {"more": 1}})
    assert rows == [{"lr": 1}, ({"loss": 1.0}, 3, {"more": 1})]
    assert accelerator.get_tracker("own", unwrap=True) is rows
    assert accelerator.get_tracker("tensorboard").name == "tensorboard"
    assert list((tmp_path / "name").glob("events*"))
    with pytest.raises(ValueError, match="wandb is not an available tracker"):
        accelerator.get_tracker("wandb")
    accelerator.end_training()


@pytest.mark.slow
def test_trackio_and_comet_get_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    accelerator = Accelerator(log_with=["trackio", "comet_ml"])
    quiet = {"auto_log_cpu": False, "auto_log_gpu": False}
    accelerator.init_trackers(
        "project", {"lr": 1}, {"trackio": quiet, "comet_ml": {"online": False}}
    )
    for step in (1, 2):
        accelerator.log({"loss": step / 2, "parts": {"a": 1.0}}, step=step)
    accelerator.end_training()

    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records("project")
    rows = SQLiteStorage.get_logs("project", run["name"])
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0)]
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        lines = file.read("messages.json").decode().splitlines()
    points = [
        (found["step"], found["metricName"], found["metricValue"])
        for line in lines
        if (found := json.loads(line)["payload"].get("metric"))
        # Comet adds what it measures of the machine.
        and not found["metricName"].startswith("sys.")
    ]
    assert points == [
        (1, "loss", 0.5), (1, "a", 1.0), (2, "loss", 1.0), (2, "a", 1.0),
    ]  # fmt: skip


def test_checkpoints_are_named_by_their_number(tmp_path: Path):
    project = ProjectConfiguration(
        str(tmp_path), automatic_checkpoint_naming=True, total_limit=1
    )
    accelerator = Accelerator(project_config=project)
    paths = [Path(accelerator.save_state()).name for _ in range(3)]
    assert paths == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == paths[-1:]
    accelerator.load_state()
    project.iteration = 2
    with pytest.raises(ValueError, match="save_iteration"):
        accelerator.save_state()


def test_messages_have_no_rank_before_them(caplog: pytest.LogCaptureFixture):
    logger = get_logger("of.a.program", "INFO")
    with caplog.at_level("INFO"):
        logger.info("once", main_process_only=False)
    assert caplog.messages == ["once"]


# What is the Engine's own -----------------------------------------------------------------------------------------


def test_an_engine_gives_its_loggers_by_name_and_its_models_whole(tmp_path: Path):
    logger = CSVLogger(tmp_path, name="run")
    engine = Engine(accelerator="cpu", devices=1, logger=logger)
    assert engine.get_tracker("csv") is logger
    assert engine.get_tracker("run") is logger
    with pytest.raises(ValueError, match="no logger 'wandb'"):
        engine.get_tracker("wandb")
    model = engine.prepare(nn.Linear(2, 1))
    assert sorted(engine.get_state_dict(model)) == ["bias", "weight"]
    # Former names of arguments.
    assert engine.gather(data=torch.ones(2)).tolist() == [1, 1]
    assert engine.reduce(tensor=2, reduction="sum") == 2
    with engine.no_sync(model=model), engine.autocast(AutocastKwargs(enabled=False)):
        pass


def _pace() -> list[Any]:
    import logging

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("loopwright").addHandler(handler)
    logging.getLogger("loopwright").setLevel("INFO")
    engine = Engine(accelerator="cpu", devices="auto")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, schedule = engine.prepare(model, optimizer, schedule)
    for _ in range(2):
        engine.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        schedule.step()
    said = [text for text in records if "counts one step" in text]
    return [schedule.get_last_lr(), len(said), *_pace_of_an_accelerator()]


def _pace_of_an_accelerator() -> list[Any]:
    handler = DistributedDataParallelKwargs(bucket_cap_mb=15)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    model: Any = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    schedule.step()
    is_module = model.module is accelerator.unwrap_model(model)
    # Accelerate refuses texts among what the main process reads for all.
    loader = accelerator.prepare(DataLoader(Texts(), batch_size=2))
    texts = accelerator.gather_for_metrics([batch["text"] for batch in loader])
    return [
        schedule.get_last_lr(),
        model.bucket_bytes_cap // 2**20,
        is_module,
        texts,
    ]


class Texts(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        for letter in "abcdefgh":
            yield {"number": torch.ones(1), "text": letter}


@pytest.mark.slow
def test_what_a_schedule_counts_is_said_by_an_engine_and_is_accelerates_under_its_names():
    found = launch(_pace, num_processes=2)
    texts = [["a", "b"], ["e", "f"], ["c", "d"], ["g", "h"]]
    assert found == [[0.25], 1, [0.25], 15, True, texts]


@pytest.mark.parametrize("keeps_position", [False, True])
def test_loaders_are_made_of_a_dataset_and_are_torchs(keeps_position: bool):
    from torchdata.stateful_dataloader import StatefulDataLoader

    from loopwright.accelerate.data_loader import (
        DataLoaderDispatcher,
        DataLoaderShard,
        SkipDataLoader,
    )

    options: dict[str, Any] = {
        "batch_size": 4,
        "use_stateful_dataloader": keeps_position,
    }
    for kind in (DataLoaderShard, DataLoaderDispatcher):
        loader = kind(list(range(16)), **options)
        assert [len(batch) for batch in loader] == [4] * 4
        assert isinstance(loader, DataLoader)
        assert isinstance(loader, StatefulDataLoader) == keeps_position
        assert loader.end_of_dataloader
    skipping = SkipDataLoader(list(range(16)), skip_batches=3, **options)
    assert [batch.tolist() for batch in skipping] == [[12, 13, 14, 15]]


def test_a_tracker_of_ones_own_is_found_by_its_name():
    from loopwright.accelerate.tracking import (
        LOGGER_TYPE_TO_CLASS,
        register_tracker_class,
    )

    class Mine(GeneralTracker):
        name = "mine"
        requires_logging_directory = False

        def __init__(self, project: str) -> None:
            super().__init__()
            self.project = project
            self.values: dict[str, Any] = {}

        @property
        def tracker(self) -> Any:
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.values |= values

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:  # fmt: skip
            self.values |= values

    register_tracker_class(Mine)
    try:
        accelerator = Accelerator(log_with="mine")
        accelerator.init_trackers("project", {"lr": 0.1})
        accelerator.log({"loss": 1.0})
        tracker: Any = accelerator.get_tracker("mine")
        assert (tracker.project, tracker.values) == ("project", {"lr": 0.1, "loss": 1.0})  # fmt: skip
        with pytest.warns(UserWarning, match="'mine' is replaced"):
            register_tracker_class(Mine)
        with pytest.raises(ValueError, match="subclass of GeneralTracker"):
            register_tracker_class(dict)  # type: ignore[arg-type]
    finally:
        del LOGGER_TYPE_TO_CLASS["mine"]


def test_a_schedule_of_a_fixed_length_stays_at_its_end():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for _ in range(4):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        schedule.step()
    # Another step raises, of torch's own.
    assert schedule.scheduler.last_epoch == 2


def test_a_name_is_found_in_whichever_module_it_is_asked_of():
    from loopwright.accelerate.data_loader import (
        DistributedType,
        broadcast,
    )
    from loopwright.accelerate.utils import DistributedType as Same

    assert DistributedType is Same
    assert callable(broadcast)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from loopwright.accelerate.data_loader import nothing  # noqa: F401


def test_batches_of_any_size_are_dealt_out_and_the_last_round_is_filled_with_whole_ones():
    batches: Any = [[0], [1, 2], [3, 4, 5], [6], [7, 8], [9, 10, 11], [12, 13]]
    shards: list[Any] = [BatchSamplerShard(batches, 3, index) for index in range(3)]
    theirs: list[Any] = [TheirShard(batches, 3, index) for index in range(3)]
    assert [list(shard) for shard in shards] == [list(shard) for shard in theirs]
    assert list(shards[2]) == [[3, 4, 5], [9, 10, 11], [1, 2]]
    with pytest.raises(ValueError, match="split_batches=True needs a batch sampler"):
        BatchSamplerShard(batches, 3, 0, split_batches=True)
