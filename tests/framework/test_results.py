"""What `gather_for_metrics` and its like make of results of all shapes, in three processes."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from loopwright.framework import Engine
from loopwright.framework.data.shard_detection import fingerprint
from loopwright.framework.engine.splitting import split
from tests.samples import as_dataset
from tests.strategies.distributed import in_processes

SAMPLES = 7  # with batches of two: the last round of three processes holds one sample


class Pair(NamedTuple):
    texts: list[str]
    numbers: Tensor


@dataclass
class Doubled:
    numbers: Tensor

    def __post_init__(self) -> None:
        self.numbers = self.numbers * 2


def texts(n: list[int]) -> list[str]:
    return [f"sample {i}" for i in n]


def boxes(n: list[int]) -> list[dict[str, Tensor]]:
    """As many boxes in each sample as its number says."""
    return [{"boxes": torch.full((i,), float(i))} for i in n]


# What a step gives for the samples `n`; what all of it is, over the epoch, follows from `n` being all of them.
SHAPES: dict[str, Callable[[list[int]], Any]] = {
    "texts": texts,
    "pair of texts": lambda n: (texts(n), texts(n)),
    "texts in dicts": lambda n: {"inner": {"texts": texts(n)}, "more": texts(n)},
    "boxes": boxes,
    "tensor and boxes": lambda n: (torch.tensor(n), boxes(n)),
    "dict of tensor and boxes": lambda n: {
        "numbers": torch.tensor(n),
        "boxes": boxes(n),
    },
    "sentences": lambda n: [torch.full((i + 1,), i) for i in n],
    "vectors": lambda n: [torch.full((3,), i) for i in n],
    "named tuple": lambda n: Pair(texts(n), torch.tensor(n)),
    "nothing": lambda n: (None, torch.tensor(n)),
}


def joined(parts: list[Any]) -> Any:
    """The rounds' results, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    if isinstance(parts[0], dict):
        return {key: joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], tuple):
        values = [joined(list(values)) for values in zip(*parts, strict=True)]
        return Pair(*values) if isinstance(parts[0], Pair) else tuple(values)
    return parts[0]


class ByRows(dict[str, Any]):
    """A mapping that is iterated by its rows, as a TensorDict is."""

    def __iter__(self) -> Any:
        return iter([ByRows(x=row) for row in self["x"]])


def test_a_mapping_that_is_iterated_by_rows():
    """It is read by its keys."""
    engine = Engine(accelerator="cpu", devices=1)
    data = ByRows(x=torch.arange(4), inner=ByRows(x=torch.ones(4)))
    for batch in engine.prepare(
        DataLoader(as_dataset([0, 1, 2, 3]), 4, collate_fn=lambda _: data)
    ):
        gathered = engine.gather_for_metrics(batch)
        assert type(gathered) is ByRows
        assert gathered["x"].tolist() == [0, 1, 2, 3]
        assert (
            engine.gather_for_metrics((batch, batch))[1]["inner"]["x"].tolist()
            == [1.0] * 4
        )
    assert (
        fingerprint(data)
        == fingerprint(ByRows(data))
        != fingerprint(ByRows(data, x=torch.zeros(4)))
    )
    assert split(data, 1, 2, padding=False)["x"].tolist() == [2, 3]
    assert (
        fingerprint({"x": 1, "y": 2})
        == fingerprint({"y": 2, "x": 1})
        != fingerprint({"x": 2, "y": 1})
    )
    with pytest.raises(ValueError, match="must have one length to be divided"):
        split(ByRows(x=torch.ones(4), y=[1]), 0, 2, padding=False)


def test_what_is_divided_among_processes_keeps_its_kind():
    numbers = numpy.arange(14).reshape(7, 2)
    inputs = {"array": numbers, "queue": deque(range(7)), "range": range(7)}
    parts = [split(inputs, rank, 3, padding=True) for rank in range(3)]
    assert [part["array"].tolist() for part in parts] == [
        numbers[[0, 1, 2]].tolist(), numbers[[3, 4, 5]].tolist(), numbers[[5, 6, 6]].tolist()
    ]  # fmt: skip
    assert [list(part["queue"]) for part in parts] == [
        list(part["range"]) for part in parts
    ]
    assert list(parts[2]["range"]) == [5, 6, 6]


def gathered() -> dict[str, Any]:
    engine = Engine(accelerator="cpu")
    rank = engine.process_index

    def rounds(function: Callable[[list[int]], Any], batch_size: int = 2) -> list[Any]:
        loader = engine.prepare(
            DataLoader(as_dataset(list(range(SAMPLES))), batch_size=batch_size)
        )
        return [engine.gather_for_metrics(function(batch.tolist())) for batch in loader]

    found: dict[str, Any] = {
        name: joined(rounds(function)) for name, function in SHAPES.items()
    }
    found["tuples"] = rounds(lambda n: (tuple(texts(n)), tuple(boxes(n)), 0.5))
    found["dataclass"] = rounds(lambda n: Doubled(torch.tensor(n)))
    found["mixed"] = rounds(
        lambda n: {"x": torch.tensor(n), "late": texts([i for i in n if i > 3])}
    )
    found["columns"] = rounds(
        lambda n: [torch.tensor(n), torch.tensor(n)], batch_size=3
    )
    with warnings.catch_warnings(record=True) as caught:
        found["either"] = rounds(lambda n: [torch.tensor(n), torch.tensor(n)])
    found["warned"] = [str(each.message) for each in caught]
    pairs = DataLoader(
        TensorDataset(torch.arange(SAMPLES), torch.arange(SAMPLES) * 10), batch_size=2
    )
    found["batches"] = [
        engine.gather_for_metrics(batch) for batch in engine.prepare(pairs)
    ]
    for name, data in {
        "widths": torch.ones(1, 1 + rank),
        "types": torch.ones(2, dtype=torch.float64 if rank else torch.int64),
        "lengths": (torch.ones(1),) * (1 + rank % 2),
        "rows": (torch.ones(1, 1 + rank),),
        "names": {"a" if rank else "b": torch.ones(1)},
    }.items():
        with pytest.raises(
            RuntimeError,
            match=r"the processes have different results:\n  rank 0: .*\n  rank 1: ",
        ) as error:
            engine.gather_for_metrics(data)
        found[name] = str(error.value)
    keys = (
        ["pred", "label"] if rank == 1 else ["label", "pred"]
    )  # an order of its own, as from a set
    tensors = {key: torch.full((1 + rank,), len(key)) for key in keys}
    found["orders"] = [
        engine.gather_for_metrics(tensors),
        engine.gather_for_metrics({key: [f"{key} {rank}"] for key in keys}),
        engine.gather({key: torch.full((1,), len(key)) for key in keys}),
        engine.reduce({"inner": {key: len(key) for key in keys}}),
        engine.all_gather({key: len(key) for key in keys}),
        engine.pad_across_processes(
            {key: torch.full((1, len(key)), rank) for key in keys}, dim=1
        ),
    ]
    for call in (
        engine.reduce,
        engine.gather,
        engine.all_gather,
        engine.pad_across_processes,
    ):
        with pytest.raises(
            RuntimeError,
            match=f"{call.__name__}: the processes have different results:",
        ) as error:
            call([{"cat": torch.ones(1)} if rank else {}])
        found[call.__name__] = str(error.value)
    row = torch.arange(6.0).reshape(3, 2)[rank]
    found["sent"] = engine.gather_object([row])
    found["reduced"] = [
        engine.reduce(0.1 * rank),
        engine.reduce(rank, "mean"),
        engine.reduce(rank == 1, "max"),
    ]
    found["reduced"].append(
        engine.reduce({"a": [rank, None], "b": torch.tensor(rank)}, scale=2.0)
    )
    found["numbers"] = engine.gather((0.1 * rank, {"n": rank}))
    found["stacked"] = engine.all_gather({"n": rank, "x": torch.ones(1), "text": "own"})
    for call in (engine.reduce, engine.gather):
        with pytest.raises(
            TypeError, match=f"{call.__name__} takes tensors and numbers.*got a str"
        ):
            call({"a": "text"})
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return in_processes(3, gathered)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("processes", [1, 3])
def test_each_sample_is_there_once_in_the_order_of_the_data(
    results: dict[str, Any], shape: str, processes: int
):
    expected = SHAPES[shape](list(range(SAMPLES)))
    if processes == 3:
        found = results[shape]
    else:
        engine = Engine(accelerator="cpu", devices=1)
        loader = engine.prepare(
            DataLoader(as_dataset(list(range(SAMPLES))), batch_size=2)
        )
        found = joined(
            [
                engine.gather_for_metrics(SHAPES[shape](batch.tolist()))
                for batch in loader
            ]
        )
    assert repr(found) == repr(expected)


def test_tuples_of_samples_and_dicts_that_mix(results: dict[str, Any]):
    names, found, halves = results["tuples"][0]
    assert names == texts(list(range(6)))
    assert repr(found) == repr(boxes(list(range(6))))
    assert halves == [0.5] * 3
    assert results["dataclass"][0].numbers.tolist() == [0, 2, 4, 6, 8, 10]
    assert [each["late"] for each in results["mixed"][0]] == [
        [],
        [],
        ["sample 4", "sample 5"],
    ]
    assert [each["x"].tolist() for each in results["mixed"][1]] == [[6]]


def test_a_list_of_columns_stays_one(results: dict[str, Any]):
    assert [column.tolist() for column in results["columns"][0]] == [
        list(range(SAMPLES))
    ] * 2
    assert [column.tolist() for column in results["batches"][0]] == [
        [0, 1, 2, 3, 4, 5],
        [0, 10, 20, 30, 40, 50],
    ]
    assert [row.tolist() for row in results["either"][0]] == [[0, 1]] * 2 + [
        [2, 3]
    ] * 2 + [[4, 5]] * 2
    assert "is taken for one of samples" in results["warned"][0]


def test_results_that_do_not_fit_together_are_told(results: dict[str, Any]):
    assert results["widths"].count("float32['n', ") == 3
    assert "pad_across_processes(tensor, dim=1)" in results["widths"]
    assert "rank 0: torch.int64['n']\n  rank 1: torch.float64['n']" in results["types"]
    assert results["lengths"].count("float32") == 4
    assert "['n', 3]" in results["rows"]
    assert "{'a': " in results["names"]


def test_keys_are_put_together_in_any_order(results: dict[str, Any]):
    tensors, lists, gathered, reduced, stacked, padded = results["orders"]
    for found in (tensors, lists, gathered, reduced["inner"], stacked, padded):
        assert list(found) == [
            "label",
            "pred",
        ]  # each process's own order; the first one's here
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "label": [5] * 6,
        "pred": [4] * 6,
    }
    assert lists["pred"] == ["pred 0", "pred 1", "pred 2"]
    assert {key: value.tolist() for key, value in gathered.items()} == {
        "label": [5] * 3,
        "pred": [4] * 3,
    }
    assert reduced == {"inner": {"label": 15, "pred": 12}}
    assert {key: value.tolist() for key, value in stacked.items()} == {
        "label": [5] * 3,
        "pred": [4] * 3,
    }
    assert [list(value.shape) for value in padded.values()] == [[1, 5], [1, 4]]
    for call in ("reduce", "gather", "all_gather", "pad_across_processes"):
        assert "rank 0: [{}]\n  rank 1: [{\"'cat'\": None}]" in results[call]


def test_python_numbers_are_reduced_and_gathered(results: dict[str, Any]):
    assert results["reduced"][:3] == [pytest.approx(0.3), 1.0, True]
    assert results["reduced"][3] == {"a": [6, None], "b": torch.tensor(6)}
    halves, numbers = results["numbers"]
    assert halves.tolist() == [0.0, 0.1, 0.2]
    assert numbers["n"].tolist() == results["stacked"]["n"].tolist() == [0, 1, 2]
    assert results["stacked"]["x"].shape == (3, 1)
    assert results["stacked"]["text"] == "own"
    assert [sent.tolist() for (sent,) in results["sent"]] == [[0, 1], [2, 3], [4, 5]]
