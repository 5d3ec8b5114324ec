"""Loaders that give each process a part of the data already: nothing is dealt out twice, or read twice."""

from __future__ import annotations

import argparse
import io
import logging
import tarfile
import threading
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SequentialSampler,
)
from transformers import BatchEncoding

from loopwright.callbacks import Callback
from loopwright.framework import CombinedLoader, Engine, Module
from loopwright.framework.data.shard_detection import fingerprint
from tests.framework.test_loaders import InThread
from tests.samples import as_dataset
from tests.strategies.distributed import in_processes, quiet

SAMPLES = 64


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# -- loaders of other libraries ---------------------------------------------------------------------------------------


def write_litdata(folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=8)
    for number in range(SAMPLES):
        writer.add_item(number, {"number": number})
    writer.done()
    writer.merge()


def write_tars(folder: Path, samples_in_each: int = 8) -> None:
    folder.mkdir(parents=True)
    for first in range(0, SAMPLES, samples_in_each):
        with tarfile.open(folder / f"{first:03}.tar", "w") as tar:
            for number in range(first, first + samples_in_each):
                content = str(number).encode()
                entry = tarfile.TarInfo(f"{number:03}.txt")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def litdata(folder: Path, **arguments: Any) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False)
    return StreamingDataLoader(dataset, batch_size=4, drop_last=False, **arguments)


def hugging_face(folder: Path, split: bool = True) -> Any:
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node

    stream = (
        Dataset.from_dict({"number": range(SAMPLES)})
        .to_iterable_dataset(num_shards=4)
        .shuffle(seed=3)
    )
    return DataLoader(
        as_dataset(
            split_dataset_by_node(stream, rank(), world_size()) if split else stream
        ),
        4,
    )


def web_dataset(folder: Path, splitter: str, **arguments: Any) -> Any:
    import webdataset

    split = (
        webdataset.split_by_node  # type: ignore[attr-defined] # made at run time
        if splitter == "by node"
        else lambda urls: iter(urls)
    )
    tars = sorted(map(str, (folder / "tars").iterdir()))
    dataset = (
        webdataset.WebDataset(  # type: ignore[attr-defined] # as above
            tars, nodesplitter=split, shardshuffle=False
        )
        .decode()
        .to_tuple("txt")
    )
    return DataLoader(dataset.map_tuple(int).batched(4), batch_size=None, **arguments)


# -- loaders of one's own ---------------------------------------------------------------------------------------------


@dataclass
class Labelled:
    number: Tensor
    text: str


class Part(IterableDataset):
    """The numbers of one rank, in batches of a class of one's own; ranks may have any number of them, or none."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Labelled]:
        for first in range(0, len(self.numbers), 4):
            yield Labelled(torch.tensor(self.numbers[first : first + 4]), "text")


class Dicts(Part):
    """The same in dicts, out of which the steps take what they need."""

    def __iter__(self) -> Iterator[Any]:
        return ({"number": batch.number} for batch in super().__iter__())


class OfMyRank(Sampler):
    """One that knows its rank by the names that the field has for it."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names
        setattr(self, names[0], rank())
        setattr(self, names[1], world_size())

    def __len__(self) -> int:
        return len(range(rank(), SAMPLES, world_size()))

    def __iter__(self) -> Iterator[int]:
        return iter(
            range(getattr(self, self.names[0]), SAMPLES, getattr(self, self.names[1]))
        )


class Secretive(Sampler):
    """One that asks for its rank when it is iterated."""

    def __len__(self) -> int:
        return len(range(rank(), SAMPLES, world_size()))

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank(), SAMPLES, world_size()))


class Again:
    """Repeats a batch sampler for ever."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class Kept(DataLoader):
    """Keeps its iterator for all epochs, as timm's and YOLO's do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Again(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield next(self.iterator)


class Endless(DataLoader):
    """Its own iterator, which begins again where it ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = super().__iter__()

    def __iter__(self) -> Iterator[Any]:  # a recipe that is in use
        return self

    def __next__(self) -> Any:
        try:
            return next(self.kept)
        except StopIteration:
            self.kept = super().__iter__()
            return next(self.kept)


class Wrapped(DataLoader):
    """Adds to what torch's own iteration does."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield {"number": batch}


class OfMyBatches(DataLoader):
    """Keeps its rank's batches of those that torch gives; its length tells them, or all."""

    def __init__(self, *args: Any, tells_all: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tells_all = tells_all

    def __len__(self) -> int:
        length = super().__len__()
        return length if self.tells_all else len(range(rank(), length, world_size()))

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), rank(), None, world_size())


class OfMySamples(DataLoader):
    """Keeps its rank's samples of each batch."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch[rank() :: world_size()]


class Noisy(DataLoader):
    """Puts random numbers beside its batches, which nobody has seeded."""

    def __iter__(self) -> Iterator[Any]:
        return (
            {"number": batch, "noise": np.random.default_rng().random()}
            for batch in super().__iter__()
        )


class OfMine:
    """Keeps its rank's batches of those that the loader beside it gives."""

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), rank(), None, world_size())  # type: ignore[misc] # beside a loader


def stateful(kind: type | None = None, **arguments: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    made = (
        StatefulDataLoader
        if kind is None
        else type("OfMyOwn", (kind, StatefulDataLoader), {})
    )
    return made(numbers(), 4, **arguments)


def seeded_by_rank() -> torch.Generator:
    return torch.Generator().manual_seed(rank())


def uneven() -> list[int]:
    """All numbers on the first ranks, none on the last one."""
    ranks = max(1, world_size() - 1)
    return list(range(rank(), SAMPLES, ranks)) if rank() < ranks else []


def numbers() -> Any:
    return torch.arange(SAMPLES)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "litdata": litdata,
    "litdata, workers": lambda folder: litdata(
        folder, num_workers=1, multiprocessing_context="fork"
    ),
    "datasets, split": hugging_face,
    "datasets, whole": lambda folder: hugging_face(folder, split=False),
    "webdataset, split": lambda folder: web_dataset(folder, "by node"),
    "webdataset, split, workers": lambda folder: web_dataset(
        folder, "by node", num_workers=2, multiprocessing_context="fork"
    ),
    "webdataset, whole": lambda folder: web_dataset(folder, ""),
    "uneven parts, one empty": lambda _: DataLoader(Part(uneven()), batch_size=None),
    "one stream of dicts": lambda _: DataLoader(
        Dicts(list(range(SAMPLES))), batch_size=None
    ),
    "uneven lists": lambda _: [
        *Part(list(range(40)) if rank() == 0 else list(range(40, SAMPLES)))
    ],
    "rank and num_replicas": lambda _: DataLoader(
        numbers(), 4, sampler=OfMyRank(("rank", "num_replicas"))
    ),
    "batch sampler of one that knows its rank": lambda _: DataLoader(
        numbers(),
        batch_sampler=BatchSampler(OfMyRank(("_rank", "_world_size")), 4, False),
    ),
    "asks for its rank": lambda _: DataLoader(numbers(), 4, sampler=Secretive()),
    "keeps its iterator": lambda _: Kept(numbers(), batch_size=4, shuffle=True),
    "keeps its iterator, knows its rank": lambda _: Kept(
        numbers(), batch_size=4, sampler=OfMyRank(("rank", "world_size"))
    ),
    "without end": lambda _: Endless(numbers(), batch_size=4, shuffle=True),
    "wrapped": lambda _: Wrapped(numbers(), batch_size=4, shuffle=True),
    "its batches": lambda _: OfMyBatches(numbers(), batch_size=4, tells_all=False),
    "its batches of all": lambda _: OfMyBatches(
        numbers(), batch_size=4, shuffle=False, tells_all=True
    ),
    "its samples": lambda _: OfMySamples(numbers(), batch_size=4),
    "random by itself": lambda _: Noisy(numbers(), batch_size=4, shuffle=True),
    "state of its own, asks for its rank": lambda _: stateful(sampler=Secretive()),
    "state of its own, shuffled": lambda _: stateful(
        shuffle=True, generator=seeded_by_rank()
    ),
    "state of its own, its batches": lambda _: stateful(OfMine),
    "shuffled by rank": lambda _: DataLoader(
        numbers(), 4, shuffle=True, generator=seeded_by_rank()
    ),
    "in a thread": lambda _: InThread(numbers(), 4, shuffle=True, marks_end=True),
    "indices of batches": lambda _: DataLoader(
        numbers(),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(SAMPLES)), 4, False),
    ),
}

# Of loaders that are read together some give a part, and others all of the data; what is under "number" is looked at.
MIXED: dict[str, Callable[[Path], Any]] = {
    "all beside a part": lambda _: CombinedLoader(
        {
            "number": DataLoader(numbers(), 4, shuffle=True),
            "other": DataLoader(Part(part()), None),
        },
        "max_size_cycle",
    ),
    "a part beside all": lambda _: CombinedLoader(
        {
            "number": DataLoader(Part(part()), None),
            "other": DataLoader(numbers(), 4, shuffle=True),
        },
        "max_size_cycle",
    ),
}


def part() -> list[int]:
    return list(range(rank(), SAMPLES, world_size()))


def numbers_in(batch: Any) -> list[int]:
    if isinstance(batch, dict):
        batch = batch.pop("number")
    if isinstance(batch, Labelled):
        batch = batch.number
    elif isinstance(batch, (list, tuple)):
        (batch,) = batch
    return [int(number) for number in batch]


class Net(Module):
    def __init__(self, loader: Callable[[], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.loader = loader
        self.trained: dict[int, list[int]] = {}
        self.steps = 0

    def train_dataloader(self) -> Any:  # here, as the process knows its rank by now
        return self.loader()

    def val_dataloader(self) -> Any:
        return self.loader()

    def predict_dataloader(self) -> Any:
        return self.loader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        if not self.trainer.metrics.is_dummy:  # else it only keeps the peers company
            self.trained.setdefault(self.current_epoch, []).extend(numbers_in(batch))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        found = numbers_in(batch)
        self.log("count", float(len(found)), reduce_fx="sum")
        self.log("sum", float(sum(found)), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> list[int]:
        return numbers_in(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(name: str, folder: Path) -> dict[str, Any]:
    """What all processes read of a loader, in two epochs of a Trainer and of an Engine's loop."""
    torch.manual_seed(7)
    module, trainer = (
        Net(lambda: LOADERS[name](folder)),
        quiet(max_epochs=2, num_sanity_val_steps=1),
    )
    trainer.fit(module)
    gather = trainer.strategy.gather_objects
    steps, trained = gather(module.steps), gather(module.trained)
    found: dict[str, Any] = {
        f"epoch {e}": [n for own in trained for n in own.get(e, [])] for e in (0, 1)
    }
    values = trainer.callback_metrics
    found["evaluated"] = int(values["count"]), int(values["sum"])
    found["steps"] = steps
    predicted: Any = trainer.predict(module, return_predictions="all")
    found["predicted"] = [number for batch in predicted for number in batch]

    engine = Engine(accelerator="cpu")
    given = LOADERS[name](folder)
    loader: Any = engine.prepare(given) if hasattr(given, "dataset") else None
    for epoch in () if loader is None else (0, 1):
        assert loader is not None
        own = [
            number for batch in loader if loader.share for number in numbers_in(batch)
        ]
        found[f"engine, epoch {epoch}"] = [
            number for each in gather(own) for number in each
        ]
    return found


LIBRARIES = [
    "litdata",
    "datasets, split",
    "datasets, whole",
    "webdataset, split",
    "webdataset, whole",
]
# By number of processes, for starting them takes long.
READ = {
    1: LIBRARIES,
    2: list(LOADERS),
    3: [*LIBRARIES, "uneven parts, one empty", "keeps its iterator"],
}


def read_all(names: list[str], folder: Path) -> dict[str, Any]:
    return {name: read(name, folder) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("litdata", "datasets", "webdataset"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("sharding")
    write_litdata(folder / "litdata")
    write_tars(folder / "tars")
    return folder


def in_two(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: read(name, folder) for name in READ[2]}
    found["resumed"] = {name: resumed(name, folder) for name in RESUMED}
    found["asked"] = asked()
    found["refused"] = refused()
    found["said"] = said(folder)
    found["miscounted"] = miscounted()
    found["once"] = once()
    found["fewer"] = fewer()
    return found


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """What two processes come to, which are started once for all tests."""
    return in_processes(2, in_two, folder)


def require_each_once(found: dict[str, Any], name: str) -> None:
    assert found.pop("evaluated") == (SAMPLES, sum(range(SAMPLES))), name
    assert len(set(found.pop("steps"))) == 1, f"{name}: the processes meet in each step"
    for what, read in found.items():
        assert sorted(read) == list(range(SAMPLES)), f"{name}: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_each_sample_is_read_once_whoever_shards(folder: Path, processes: int):
    for name, found in in_processes(
        processes, read_all, READ[processes], folder
    ).items():
        require_each_once(found, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_each_sample_is_read_once_by_two_processes(two: dict[str, Any], name: str):
    require_each_once(dict(two[name]), name)


# -- resuming ---------------------------------------------------------------------------------------------------------

RESUMED = [
    "litdata",
    "webdataset, split",
    "uneven parts, one empty",
    "keeps its iterator",
    "its batches of all",
    "state of its own, shuffled",
    *MIXED,
]


class Cut(Callback):
    """Saves a checkpoint after a step, and ends the run."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def resumed(name: str, folder: Path) -> list[Any]:
    """What each process reads in a run, and in one that is cut inside an epoch and its rest; with an Engine, too."""
    path, read, make = folder / f"{name}.ckpt", [], {**LOADERS, **MIXED}[name]
    for callbacks, ckpt_path in (([], None), ([Cut(path, 3)], None), ([], path)):
        torch.manual_seed(3)
        module, trainer = (
            Net(lambda: make(folder)),
            quiet(callbacks=callbacks, limit_val_batches=0),
        )
        with suppress(InterruptedError):
            trainer.fit(module, ckpt_path=ckpt_path)
        trainer.strategy.barrier()
        read.append(trainer.strategy.gather_objects(module.trained.get(0, [])))
    for cut, state in ((0, None), (3, None), (0, folder / name)):
        torch.manual_seed(3)
        engine = Engine(accelerator="cpu")
        loader, own = engine.prepare(make(folder)), []
        if state is not None:
            engine.load_state(state)
        for batch in loader:
            own += numbers_in(batch) if loader.share else []
            if cut and loader.batches == cut:
                engine.save_state(folder / name)
                break
        read.append(engine.gather_object(own))
    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_an_epoch_that_was_cut_goes_on_where_it_was(two: dict[str, Any], name: str):
    trainer, engine = two["resumed"][name][:3], two["resumed"][name][3:]
    for whole, cut, rest in (trainer, engine):
        assert sorted(number for own in whole for number in own) == list(range(SAMPLES))
        assert [
            before + after for before, after in zip(cut, rest, strict=True)
        ] == whole


# -- what decides, and what is said -----------------------------------------------------------------------------------


def asked() -> dict[str, Any]:
    """How many samples are read where the user has decided."""
    counts = {}
    parts = list(range(rank(), SAMPLES, world_size()))
    for name, numbers in {"parts": parts, "one stream": list(range(SAMPLES))}.items():
        loader = DataLoader(Part(numbers), None)
        for decided in (True, False):
            module, trainer = (
                Net(lambda: None),
                quiet(use_distributed_sampler=decided, limit_val_batches=0),
            )
            trainer.fit(module, loader)
            counts[name, decided] = sum(
                len(own[0]) for own in trainer.strategy.gather_objects(module.trained)
            )
            prepared: Any = Engine(
                accelerator="cpu", use_distributed_sampler=decided
            ).prepare(loader)
            own = sum(len(numbers_in(batch)) for batch in prepared if prepared.share)
            assert sum(trainer.strategy.gather_objects(own)) == counts[name, decided]
    return counts


@pytest.mark.slow
def test_the_user_decides(two: dict[str, Any]):
    assert two["asked"] == {
        ("parts", True): SAMPLES // 2,  # every second batch of each part
        ("parts", False): SAMPLES,
        ("one stream", True): SAMPLES,
        ("one stream", False): 2 * SAMPLES,
    }


class Broken(Part):
    """One whose first batch cannot be read on rank 1."""

    def __iter__(self) -> Iterator[Labelled]:
        if rank() == 1:
            raise OSError("no such shard")
        yield from super().__iter__()


def refused() -> list[dict[str, str]]:
    """What each process says of loaders that cannot be as they are."""
    elsewhere = OfMyRank(("rank", "num_replicas"))
    elsewhere.rank = 0  # type: ignore[attr-defined] # as one that was pickled in another process
    own_part, whole = DataLoader(Part(uneven()), None), DataLoader(numbers(), 4)
    later = [0] * 4 + part()  # a head that all have, and a part of each
    loaders: dict[str, tuple[Any, Any]] = {
        "sampler": (DataLoader(numbers(), 4, sampler=elsewhere), []),
        "broken": (DataLoader(Broken([1, 2]), None), []),
        "both": (whole, CombinedLoader([own_part, whole])),
        "counts": (whole, [whole] * (1 + rank())),
        "later": (whole, [whole, DataLoader(Part(later), None)]),
        "later together": (
            whole,
            CombinedLoader({"number": DataLoader(Part(later), None), "all": whole}),
        ),
        "longer": (whole, DataLoader(Part(list(range(8 + 4 * rank()))), None)),
    }
    said = {}
    for name, (train, val) in loaders.items():
        with pytest.raises((ValueError, RuntimeError, OSError)) as error:
            quiet().fit(Net(lambda: None), train, val)
        said[name] = f"{error.type.__name__}: {error.value}"
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, said)
    return gathered


REFUSED = {
    "sampler": [
        "ValueError: the sampler of the training loader was made for other ranks",
        "rank 1: 0 of 2",
    ],
    "broken": [
        "rank 1 could not read the first batch of the training loader: OSError: no such shard"
    ],
    "both": ["ValueError", "its own part, all of the data"],
    "later": [
        "RuntimeError: the processes read different streams from what should be one validate loader 1 (until now"
    ],
    "later together": [
        "should be one validate loader 0 (until now 9 batches on rank 0, 9 batches on rank 1)"
    ],
    "longer": [
        "should be one validate loader 0 (until now 2 batches on rank 0, 3 batches on rank 1)"
    ],
    "counts": ["ValueError", "different numbers of validate loaders, by rank: [1, 2]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_dealt_out_is_refused_by_all(two: dict[str, Any], name: str):
    for rank, said in enumerate(two["refused"]):
        if (name, rank) == ("broken", 1):
            assert said[name] == "OSError: no such shard"
            continue
        for words in REFUSED[name]:
            assert words in said[name]


class Lines(logging.Handler):
    """Keeps what is logged about sharding."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "loader" in record.getMessage().lower():
            self.lines.append(record.getMessage())


def said(folder: Path) -> dict[str, list[str]]:
    """What is logged while a loader is prepared and read twice."""
    found, logger = {}, logging.getLogger("loopwright")
    for name in (
        "datasets, split",
        "datasets, whole",
        "rank and num_replicas",
        "keeps its iterator",
        "wrapped",
    ):
        logger.addHandler(lines := Lines())
        loader = Engine(accelerator="cpu").prepare(LOADERS[name](folder))
        _ = [*loader, *loader]
        logger.removeHandler(lines)
        found[name] = lines.lines
    logger.addHandler(lines := Lines())
    engine = Engine(accelerator="cpu")
    for name, others in others_of_a_program().items():
        lines.lines = []
        for _ in range(2):
            for given in others:
                assert engine.prepare(given) is given
        found[name] = lines.lines
    logger.removeHandler(lines)
    return found


class Pipeline:
    """Gives batches in a way of its own, as DALI's iterators do."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise StopIteration


class Settings(BaseModel):
    """What can be iterated, and is no loader."""

    width: int = 1


def others_of_a_program() -> dict[str, list[Any]]:
    """What ``prepare`` gives back as it is."""
    from torchdata.nodes import IterableWrapper, Loader
    from webdataset import (
        DataPipeline,  # type: ignore[attr-defined] # made at run time
        WebLoader,  # type: ignore[attr-defined] # as above
    )

    model = nn.Linear(1, 1)
    weights = list(model.parameters())
    configs = [
        Settings(),
        BatchEncoding({"a": 1}),
        {"a": 1},
        Labelled(torch.ones(1), "text"),
        argparse.Namespace(),
    ]
    return {
        "WebLoader": [WebLoader(DataPipeline([1, 2]), batch_size=None)],
        "nodes": [Loader(IterableWrapper([1, 2]))],
        "iterator": [Pipeline(), Pipeline()],
        "no loaders": [
            *configs,
            weights,
            model.parameters(),
            chain(weights),
            np.ones(2),
            "text",
            io.StringIO(),
            Pipeline,
        ],
    }


@pytest.mark.slow
def test_one_line_says_how_a_loader_is_read(two: dict[str, Any]):
    words = {
        "datasets, split": [
            "gives each rank another first batch: it counts as sharded already"
        ],
        "datasets, whole": [
            "gives all 2 ranks the same first batch: it counts as one stream"
        ],
        "rank and num_replicas": ["The sampler of the loader knows its rank"],
        "keeps its iterator": [
            "iterates in a way of its own",
            "it counts as one stream",
        ],
        "wrapped": [],
        "WebLoader": ["a WebLoader comes back as it is"],
        "nodes": ["a Loader comes back as it is"],
        "iterator": ["a Pipeline comes back as it is"],
        "no loaders": [],
    }
    for name, lines in two["said"].items():
        assert len(lines) == len(words[name]), lines
        assert all(part in line for part, line in zip(words[name], lines, strict=True))


# -- the fingerprint of a batch ---------------------------------------------------------------------------------------


class Plain:
    def __init__(self, x: Any, names: set[str]) -> None:
        self.x, self.names = x, names


def batches(number: int) -> dict[str, Any]:
    """Batches of many kinds, equal if made from the same number."""

    @dataclass
    class Local:
        x: Any
        lock: Any = field(default_factory=threading.Lock)  # which nothing pickles

    circle: dict[str, Any] = {"x": torch.tensor(number)}
    circle["itself"] = circle
    return {
        "tensor": torch.arange(6).reshape(2, 3) + number,
        "half": torch.full((2,), number, dtype=torch.bfloat16),
        "one of a column": torch.full((3, 2), number)[:1, 0],
        "conjugate": torch.tensor([number + 1j]).conj(),
        "sparse": torch.full((2,), number + 1.0).to_sparse(),
        "nested": [{"a": (torch.zeros(2), np.full(3, number))}, "text", None],
        "string": [f"line {number}"],
        "mapping with to": BatchEncoding({"input_ids": torch.tensor([[number]])}),
        "user dict": UserDict({"x": number}),
        "dataclass": Labelled(torch.tensor([number]), "text"),
        "plain object": Plain(torch.tensor([number]), {f"{number}", "b"}),
        "object": Local(torch.tensor([number])),
        "sets": [{f"{number}", "b", "c"}, frozenset({1.5, number})],
        "packed": nn.utils.rnn.pack_sequence(
            [torch.full((3,), number), torch.zeros(2)]
        ),
        "circle": circle,
    }


@pytest.mark.parametrize("kind", batches(0))
def test_fingerprints_tell_batches_apart(kind: str):
    assert fingerprint(batches(1)[kind]) == fingerprint(batches(1)[kind])
    assert fingerprint(batches(1)[kind]) != fingerprint(batches(2)[kind])


def test_fingerprints_tell_shapes_and_kinds_apart():
    alike = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.int32),
        [0] * 6,
        (0,) * 6,
    ]
    assert len({fingerprint(batch) for batch in alike}) == len(alike)
    assert fingerprint(torch.arange(4)[::2]) == fingerprint(torch.tensor([0, 2])), (
        "however it lies in memory"
    )


class Miscounted(Sampler):
    """Gives more batches than it tells."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[number] for number in range(SAMPLES)])


def miscounted() -> tuple[list[int], list[str]]:
    """How many samples each process reads of it in two epochs, and what is said."""
    logging.getLogger("loopwright").addHandler(lines := Lines())
    module, trainer = (
        Net(lambda: DataLoader(numbers(), batch_sampler=Miscounted())),
        quiet(max_epochs=2),
    )
    trainer.fit(module, val_dataloaders=[])
    logging.getLogger("loopwright").removeHandler(lines)
    return trainer.strategy.gather_objects(len(module.trained[1])), lines.lines


@pytest.mark.slow
def test_what_a_sampler_gives_beyond_its_length_is_not_left_out_in_silence(
    two: dict[str, Any],
):
    samples, lines = two["miscounted"]
    assert samples == [6, 6]
    (line,) = [line for line in lines if "more than" in line]
    assert "(Miscounted) gives more than the 12 batches" in line


class Unseen(Sampler):
    """Half of the samples, none of which it has given before."""

    def __init__(self, of_my_rank: bool = False) -> None:
        self.left = [
            *range(
                rank() if of_my_rank else 0, SAMPLES, world_size() if of_my_rank else 1
            )
        ]
        self.count = len(self.left) // 2

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.count):
            yield self.left.pop(0)


def once() -> dict[str, list[int]]:
    """What is read in two epochs, and in two evaluations, of samplers that change when they are drawn."""
    read = {}
    for name, of_my_rank in (("dealt", False), ("parts", True)):
        module, trainer = Net(lambda: None), quiet(max_epochs=2)
        trainer.fit(
            module,
            DataLoader(numbers(), 4, sampler=Unseen(of_my_rank)),
            val_dataloaders=[],
        )
        trained = [number for own in module.trained.values() for number in own]
        read[f"trained, {name}"] = [
            *chain.from_iterable(trainer.strategy.gather_objects(trained))
        ]
        loader = DataLoader(numbers(), 4, sampler=Unseen(of_my_rank))
        predicted: list[Any] = [
            trainer.predict(module, loader, return_predictions="all") for _ in range(2)
        ]
        read[f"predicted, {name}"] = [
            number for run in predicted for batch in run for number in batch
        ]
    return read


@pytest.mark.slow
def test_a_sampler_is_drawn_once_in_an_epoch(two: dict[str, Any]):
    for what, read in two["once"].items():
        assert sorted(read) == list(range(SAMPLES)), what


class LeavesOut(DataLoader):
    """Leaves out some batches, and does not tell."""

    def __iter__(self) -> Iterator[Any]:
        return (
            batch
            for batch in super().__iter__()
            if int(batch[0]) not in (4, 24, 28, 32)
        )


def fewer() -> tuple[list[Any], list[Any], list[int]]:
    """What each process reads of it, with the shares, with an Engine and with a Trainer."""
    engine = Engine(accelerator="cpu")
    loader: Any = engine.prepare(LeavesOut(as_dataset(torch.arange(42)), 4))
    own = [
        (numbers_in(batch), round(loader.share, 6))
        for _ in range(2)
        for batch in loader
    ]
    module, trainer = (
        Net(lambda: LeavesOut(as_dataset(torch.arange(42)), 4)),
        quiet(max_epochs=2, limit_val_batches=0),
    )
    trainer.fit(module)
    trained: Any = zip(
        *engine.gather_object((module.trained[1], module.steps)), strict=True
    )
    return engine.gather_object(own), *trained


@pytest.mark.slow
def test_a_loader_may_leave_batches_out(two: dict[str, Any]):
    read, trained, steps = two["fewer"]
    # Of 11 batches, the last of two samples, rank 0 has six, less two; rank 1 five, less two.
    numbers_of = [
        [[first + i for i in range(4)] for first in firsts]
        for firsts in ((0, 8, 16), (12, 20, 36))
    ]
    numbers_of[0].append([40, 41])
    given = [[(numbers, 1.0) for numbers in own] for own in numbers_of]
    given[0][-1] = [40, 41], 2.0
    given[1].append(([36, 37, 38, 39], 0.0))
    assert read == [own * 2 for own in given]
    assert [sorted(own) for own in trained] == [
        [*chain.from_iterable(own)] for own in numbers_of
    ]
    assert steps == (8, 8)
