"""The files that predictions are written to: JSON lines, Parquet and safetensors."""

from __future__ import annotations

import heapq
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of a Parquet file that are written at once.
_ROWS = 4096


@dataclass
class Part:
    """What a process has written.

    Attributes:
        path: its file.
        has_indices: whether it has a column ``index``.
        is_sorted: whether that grows from row to row.
    """

    path: str
    has_indices: bool = True
    is_sorted: bool = True
    last_index: int = -1

    def note(self, indices: Sequence[int] | None) -> None:
        """Take note of further rows."""
        if indices is None:
            self.has_indices = False
            return
        for index in indices:
            self.is_sorted &= index > self.last_index
            self.last_index = index


class PredictionFile(ABC):
    """A file that a process writes its predictions to, batch by batch, and how those of all become one.

    Args:
        path: that of the file of all, a path or an fsspec URL without its ending.
        rank: this process's index.

    Attributes:
        ending: of the file's name.
        part: what this process has written; None if nothing.
    """

    ending = ""

    def __init__(self, path: str, rank: int) -> None:
        from fsspec.core import url_to_fs

        self._system, plain = url_to_fs(path, use_listings_cache=False)
        self._plain = str(plain)
        self._own_path = f"{self._plain}.rank{rank}.{self.ending}"
        self._file: Any = None
        self.part: Part | None = None

    @property
    def path(self) -> str:
        """The file of all processes."""
        return f"{self._plain}.{self.ending}"

    def has(self, part: Part) -> bool:
        """Whether this process can read the file of another one."""
        return self._system.exists(part.path)

    def remove_old(self) -> None:
        """Remove what an earlier run has left under these names."""
        folder = self._plain.rpartition("/")[0]
        self._system.makedirs(folder, exist_ok=True)
        for old in [
            self.path,
            *self._system.glob(f"{self._plain}.rank*.{self.ending}"),
        ]:
            if self._system.exists(old):
                self._system.rm(old)

    def write(self, columns: dict[str, Any], indices: Sequence[int] | None) -> None:
        """Add the rows of a batch.

        Args:
            columns: by name, an entry for each row.
            indices: the rows' samples, if they are known.
        """
        if self.part is None:
            self.part = Part(self._own_path)
            self._open(self._own_path)
        self.part.note(indices)
        if indices is not None:
            columns = {"index": list(indices), **columns}
        self._add(columns)

    def _open(self, path: str) -> None:
        self._file = self._system.open(path, "wb")

    @abstractmethod
    def _add(self, columns: dict[str, Any]) -> None:
        """Write rows to the file that is open."""

    def close(self) -> None:
        """End this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Remove this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.part is not None:
            self._system.rm(self.part.path)

    def merge(self, parts: Sequence[Part]) -> str:
        """Put files together, by their column ``index``; returns the path of what comes of it."""
        first = parts[0]
        if len(parts) == 1 and (first.is_sorted or not first.has_indices):
            self._system.mv(first.path, self.path)
            return self.path
        self._merge(parts)
        for part in parts:
            self._system.rm(part.path)
        return self.path

    @abstractmethod
    def _merge(self, parts: Sequence[Part]) -> None:
        """Write all rows of other files, sorted, without those whose index was there before."""


class JSONLines(PredictionFile):
    """A JSON object in each line."""

    ending = "jsonl"

    def _add(self, columns: dict[str, Any]) -> None:
        plain = {name: _listed(column) for name, column in columns.items()}
        for row in zip(*plain.values(), strict=True):
            line = json.dumps(dict(zip(plain, row, strict=True)))
            self._file.write(f"{line}\n".encode())

    def _merge(self, parts: Sequence[Part]) -> None:
        last = None
        with self._system.open(self.path, "wb") as file:
            # Sorted files are read side by side, and never all at once.
            for index, line in heapq.merge(*map(self._lines, parts)):
                if index != last:
                    file.write(line)
                last = index

    def _lines(self, part: Part) -> Iterable[tuple[int, bytes]]:
        lines = self._read(part.path)
        return lines if part.is_sorted else sorted(lines)

    def _read(self, path: str) -> Iterator[tuple[int, bytes]]:
        with self._system.open(path, "rb") as file:
            for line in file:
                yield json.loads(line)["index"], line


class Parquet(PredictionFile):
    """A table of Apache Parquet."""

    ending = "parquet"

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, rank)
        try:
            import pyarrow.parquet  # noqa: F401 # to see that it is there before anything is predicted
        except ImportError as error:
            raise ImportError(
                "PredictionWriter(file_format='parquet') needs pyarrow: pip install 'loopwright[parquet]'"
            ) from error
        self._writer: Any = None
        self._waiting: list[Any] = []

    def _add(self, columns: dict[str, Any]) -> None:
        import pyarrow as pa

        plain = {name: _listed(column) for name, column in columns.items()}
        self._waiting.append(pa.table(plain))
        if sum(table.num_rows for table in self._waiting) >= _ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting, promote_options="permissive")
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table.cast(self._writer.schema))
        self._waiting = []

    def close(self) -> None:
        self._write_waiting()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        super().close()

    def abandon(self) -> None:
        self._waiting = []
        self.close()
        super().abandon()

    def _merge(self, parts: Sequence[Part]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        tables = []
        for part in parts:
            with self._system.open(part.path, "rb") as file:
                tables.append(parquet.read_table(file))
        table = pa.concat_tables(tables, promote_options="permissive").sort_by("index")
        kept = _first_rows(torch.tensor(table.column("index").to_pylist()))
        with self._system.open(self.path, "wb") as file:
            parquet.write_table(table.take(kept.numpy()), file)


class Safetensors(PredictionFile):
    """A tensor for each column."""

    ending = "safetensors"

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, rank)
        self._columns: dict[str, list[Tensor]] = {}

    def _add(self, columns: dict[str, Any]) -> None:
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(_as_tensor(name, column))

    def close(self) -> None:
        if self._file is not None:
            joined = {
                name: _joined(name, parts) for name, parts in self._columns.items()
            }
            self._write(self._file, joined)
        self._columns = {}
        super().close()

    def _write(self, file: Any, columns: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        contiguous = {name: column.contiguous() for name, column in columns.items()}
        file.write(save(contiguous, metadata={"format": "pt"}))

    def _merge(self, parts: Sequence[Part]) -> None:
        from safetensors.torch import load

        read = [load(self._system.cat_file(part.path)) for part in parts]
        columns = {name: _joined(name, [one[name] for one in read]) for name in read[0]}
        index, order = columns["index"].sort(stable=True)
        order = order[_first_rows(index)]
        with self._system.open(self.path, "wb") as file:
            self._write(file, {name: column[order] for name, column in columns.items()})


FORMATS = {"jsonl": JSONLines, "parquet": Parquet, "safetensors": Safetensors}


def _first_rows(indices: Tensor) -> Tensor:
    """The numbers of the rows whose index is not that of the row before."""
    is_first = torch.ones(len(indices), dtype=torch.bool)
    is_first[1:] = indices[1:] != indices[:-1]
    return is_first.nonzero()[:, 0]


def _listed(column: Any) -> list[Any]:
    """A column as a list of what JSON can hold: numbers, texts, and lists and dicts of them."""
    listed = _plain(column)
    return listed if isinstance(listed, list) else list(listed)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        # Tensors, arrays and NumPy's numbers.
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _as_tensor(name: str, column: Any) -> Tensor:
    try:
        if isinstance(column, (list, tuple)) and isinstance(column[0], Tensor):
            return torch.stack(list(column))
        return torch.as_tensor(column)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"PredictionWriter: the column {name} is no tensor of equal entries ({error}); file_format='jsonl' and "
            "'parquet' hold texts and entries of different sizes"
        ) from error


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat(list(parts))
    except RuntimeError as error:
        raise ValueError(
            f"PredictionWriter: the batches of column {name} do not fit together ({error}); file_format='jsonl' and "
            "'parquet' hold entries of different sizes"
        ) from error
