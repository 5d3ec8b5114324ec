from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from loopwright.callbacks import BasePredictionWriter, PredictionWriter
from loopwright.framework import Module, Trainer
from tests.strategies.distributed import in_processes

SAMPLES = 11


class Doubles(Module):
    """Gives back what it gets, as columns of all kinds."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x = batch[0]
        return {
            "double": 2 * x,
            "text": [f"#{int(value)}" for value in x],
            "inner": {"pair": np.stack([x, x], axis=1)},
        }


class Numbers(Doubles):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[0].bfloat16(), torch.stack([batch[0]] * 3, dim=1)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(SAMPLES))), 2, **options)


def predict(module: Module, loaders: Any, *callbacks: Any, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.predict(module, loaders, return_predictions=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


EXPECTED = [
    {"index": i, "double": 2.0 * i, "text": f"#{i}", "inner.pair": [i, i]}
    for i in range(SAMPLES)
]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(float(i),) for i in range(4)])


class Indices(BasePredictionWriter):
    """Notes each batch with the indices that it is said to have."""

    def __init__(self, interval: str = "batch") -> None:
        super().__init__(interval)
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any,
        batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        self.batches.append((batch[0].tolist(), batch_indices))

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        self.epochs.append((predictions, batch_indices))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True},
        {"num_workers": 2, "shuffle": True},
        {"sampler": WeightedRandomSampler([1.0] * SAMPLES, 30)},
        {"batch_sampler": [[3, 1, 2], [0], [9, 9]], "batch_size": 1},
    ],
    ids=["in order", "shuffled", "workers", "drawn", "own batches"],
)
def test_the_indices_are_those_of_the_batch(options: dict[str, Any]):
    data = TensorDataset(torch.arange(float(SAMPLES)))
    writer = Indices()
    predict(Doubles(), DataLoader(data, **{"batch_size": 2, **options}), writer)
    assert writer.batches
    for values, indices in writer.batches:
        assert values == indices


def test_indices_that_nobody_knows_are_none():
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([[torch.ones(2)]])

    writer = Indices()
    predict(Doubles(), [DataLoader(Stream(), 2), [[torch.ones(1)]], Own(loader().dataset)], writer)  # fmt: skip
    assert len(writer.batches) == 4
    assert all(indices is None for _, indices in writer.batches)


def test_the_end_gets_all_batches_by_loader():
    writer = Indices("batch_and_epoch")
    predict(Doubles(), [loader(), loader()], writer, limit_predict_batches=2)
    ((predictions, indices),) = writer.epochs
    assert indices == [[[0, 1], [2, 3]]] * 2
    texts = [[list(batch["text"]) for batch in each] for each in predictions]
    assert texts == [[["#0", "#1"], ["#2", "#3"]]] * 2
    assert len(writer.batches) == 4


def test_rows_are_in_the_order_of_the_dataset(tmp_path: Path):
    writer = PredictionWriter(tmp_path)
    predict(Doubles(), loader(shuffle=True), writer)
    assert writer.paths == [str(tmp_path / "predictions.jsonl")]
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED
    # Once more, into a folder that is not empty.
    (tmp_path / "mine.txt").touch()
    (tmp_path / "predictions.rank7.jsonl").touch()
    predict(Doubles(), [loader(), loader()], PredictionWriter(tmp_path), limit_predict_batches=1)  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"mine.txt", "predictions-0.jsonl", "predictions-1.jsonl"}
    assert lines(tmp_path / "predictions-1.jsonl") == EXPECTED[:2]
    predict(Doubles(), loader(), PredictionWriter(tmp_path))
    assert not (tmp_path / "predictions.rank7.jsonl").exists()


def test_tables_and_tensors(tmp_path: Path):
    shuffled = loader(shuffle=True)
    predict(Doubles(), shuffled, PredictionWriter(tmp_path, "parquet"))
    assert parquet.read_table(tmp_path / "predictions.parquet").to_pylist() == EXPECTED
    predict(Numbers(), shuffled, PredictionWriter(tmp_path, "safetensors", "x"))
    columns = load_file(tmp_path / "x.safetensors")
    assert columns["index"].tolist() == list(range(SAMPLES))
    assert columns["prediction_0"].dtype == torch.bfloat16
    assert columns["prediction_1"].tolist() == [[i] * 3 for i in range(SAMPLES)]
    predict(Numbers(), shuffled, PredictionWriter(tmp_path, "parquet", "x"))
    row = parquet.read_table(tmp_path / "x.parquet").to_pylist()[5]
    assert row == {"index": 5, "prediction_0": 5.0, "prediction_1": [5.0] * 3}


def test_a_stream_is_written_as_it_comes(tmp_path: Path):
    predict(Doubles(), DataLoader(Stream(), 2), PredictionWriter(tmp_path))
    rows = lines(tmp_path / "predictions.jsonl")
    assert [row["text"] for row in rows] == ["#0", "#1", "#2", "#3"]
    assert "index" not in rows[0]


@pytest.mark.parametrize(
    ("prediction", "file_format", "message"),
    [
        (torch.tensor(1.0), "jsonl", "prediction has no entries in a batch of 2"),
        ({"a": [1, 2, 3]}, "jsonl", "a has 3 entries in a batch of 2 samples"),
        (None, "jsonl", "predict_step returned None"),
        ({}, "jsonl", "returned nothing to write"),
        ({"index": [1, 2]}, "jsonl", "return it under another name"),
        (["a", "b"], "safetensors", "prediction is no tensor of equal entries"),
    ],
)
def test_what_is_no_row_for_each_sample_is_refused_and_nothing_stays(
    tmp_path: Path, prediction: Any, file_format: str, message: str
):
    class Returns(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return prediction

    with pytest.raises(ValueError, match=message):
        predict(Returns(), loader(), PredictionWriter(tmp_path, file_format))
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_no_part_of_a_table(tmp_path: Path):
    class Fails(Doubles):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="on purpose"):
        predict(Fails(), loader(), PredictionWriter(tmp_path, "parquet"))
    assert not list(tmp_path.iterdir())


class WritesIndices(Indices):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        file = self.folder / f"indices-{trainer.global_rank}.json"
        file.write_text(json.dumps(self.batches))


def scenes(folder: Path) -> list[str]:
    """Predict in several processes; returns what the last writer with one file has written."""
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    predict(Doubles(), loader(shuffle=True, num_workers=1), WritesIndices(folder), **two)  # fmt: skip
    for file_format in ("jsonl", "parquet"):
        predict(Doubles(), loader(shuffle=True), PredictionWriter(folder, file_format), **two)  # fmt: skip
    writer = PredictionWriter(folder, "safetensors")
    sampler = DistributedSampler(loader().dataset, shuffle=False)
    predict(Numbers(), loader(sampler=sampler), writer, **two)
    predict(Doubles(), loader(), PredictionWriter(folder, filename="own", merge=False), **two)  # fmt: skip
    predict(Doubles(), DataLoader(Stream(), 1), PredictionWriter(folder, filename="stream"), **two)  # fmt: skip
    return writer.paths


@pytest.mark.slow
def test_several_processes_write_one_file(tmp_path: Path):
    paths = in_processes(2, scenes, tmp_path)
    assert paths == [str(tmp_path / "predictions.safetensors")]
    seen = []
    for rank in range(2):
        for values, indices in json.loads(
            (tmp_path / f"indices-{rank}.json").read_text()
        ):
            assert values == indices
            seen += indices
    assert sorted(seen) == list(range(SAMPLES))
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED
    assert parquet.read_table(tmp_path / "predictions.parquet").to_pylist() == EXPECTED
    # The sampler gives the first sample once more, to fill up.
    assert load_file(tmp_path / "predictions.safetensors")["index"].tolist() == [*range(SAMPLES)]  # fmt: skip
    own = [lines(tmp_path / f"own.rank{rank}.jsonl") for rank in range(2)]
    assert [row["index"] for row in own[1]] == [2, 3, 6, 7, 10]
    assert [row["index"] for row in own[0]] == [0, 1, 4, 5, 8, 9]
    streamed = [lines(tmp_path / f"stream.rank{rank}.jsonl") for rank in range(2)]
    assert [row["text"] for rows in streamed for row in rows] == ["#0", "#2", "#1", "#3"]  # fmt: skip
