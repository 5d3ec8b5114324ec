"""Images, texts, tables, histograms and sounds, as plain values that every logger can write."""

from __future__ import annotations

import io
import os
import struct
import wave
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Media = dict[str, Any]
"""What :func:`as_media` returns: by the kind, these keys.

- ``image``: ``png``, a list of files as bytes, and ``caption``, a list of texts or None.
- ``text``: ``text``.
- ``table``: ``columns``, names, and ``rows``, lists.
- ``histogram``: ``counts``, and ``edges``, one more of them.
- ``audio``: ``wav``, a file as bytes.
"""


def as_media(kind: str, name: str, value: Any, **options: Any) -> Media:
    """A value as plain numbers, texts and bytes, copied.

    Args:
        kind: ``"image"``, ``"text"``, ``"table"``, ``"histogram"`` or ``"audio"``.
        name: what it is called, for errors.
        value: see ``Module.log_image`` and its siblings.
        **options: as of these.

    Raises:
        TypeError, ValueError: if the value is none of that kind.
    """
    try:
        return _MAKERS[kind](value, **options)
    except (TypeError, ValueError, KeyError) as error:
        raise type(error)(f"log_{kind}({name!r}, …): {error}") from error


def _image(value: Any, caption: Any = None) -> Media:
    is_batch = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4
    values = list(value) if is_batch else [value]
    captions = [caption] if isinstance(caption, str) else caption
    if captions is not None and len(captions) != len(values):
        raise ValueError(f"{len(values)} images have {len(captions)} captions")
    return {"png": [_png_of(each) for each in values], "caption": captions}


def _text(value: Any) -> Media:
    return {"text": str(value)}


def _table(value: Any, columns: Sequence[str] | None = None) -> Media:
    names, rows = _rows_of(value)
    columns = columns or names
    if columns is None:
        raise ValueError(
            "a table takes a dict of columns, a list of dicts, a data frame, or rows and columns=[names]"
        )
    plain = [[_plain(cell) for cell in row] for row in rows]
    if any(len(row) != len(columns) for row in plain):
        raise ValueError(f"each row must have {len(columns)} values: {columns}")
    return {"columns": list(columns), "rows": plain}


def _rows_of(value: Any) -> tuple[list[str] | None, list[Any]]:
    """The names of a table's columns, if it has names, and its rows."""
    if isinstance(value, Mapping) or hasattr(value, "columns"):
        # A dict of columns, or a data frame of pandas or polars.
        names = value if isinstance(value, Mapping) else value.columns
        columns = [value[name] for name in names]
        return [str(name) for name in names], list(zip(*columns, strict=True))
    rows = list(value)
    if rows and isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(key for row in rows for key in row))
        return names, [[row.get(name) for name in names] for row in rows]
    return None, rows


def _histogram(value: Any, bins: int = 64) -> Media:
    numbers = _array(value).astype(np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    counts, edges = np.histogram(finite, bins=bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _audio(value: Any, sample_rate: int = 44100) -> Media:
    if isinstance(value, (str, os.PathLike)):
        with open(value, "rb") as file:
            return {"wav": file.read()}
    samples = _array(value)
    if samples.ndim > 2:
        raise ValueError(
            f"sound is (samples,) or (channels, samples); got {samples.shape}"
        )
    # (channels, samples)
    samples = np.atleast_2d(samples)
    if samples.dtype != np.int16:
        samples = (np.clip(samples, -1, 1) * 32767).round().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(len(samples))
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        # A frame has one sample of each channel.
        sound.writeframes(samples.T.tobytes())
    return {"wav": file.getvalue()}


_MAKERS = {
    "image": _image,
    "text": _text,
    "table": _table,
    "histogram": _histogram,
    "audio": _audio,
}


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _png_of(value: Any) -> bytes:
    if isinstance(value, (str, os.PathLike)):
        from PIL import Image

        with Image.open(value) as image:
            return _png(np.asarray(image.convert("RGBA")))
    if hasattr(value, "savefig"):
        # A figure of matplotlib.
        file = io.BytesIO()
        value.savefig(file, format="png")
        return file.getvalue()
    pixels = _array(value)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3:
        raise ValueError(
            f"an image is (height, width), (channels, height, width) or (height, width, channels); got {pixels.shape}"
        )
    first = pixels.shape[0] in (1, 3, 4)
    last = pixels.shape[2] in (1, 3, 4)
    if first and (isinstance(value, Tensor) or not last):
        pixels = pixels.transpose(1, 2, 0)
    elif not last:
        raise ValueError(f"an image has 1, 3 or 4 channels; got {pixels.shape}")
    if pixels.dtype == np.bool_ or np.issubdtype(pixels.dtype, np.floating):
        # From 0 to 1.
        pixels = (np.nan_to_num(pixels.astype(np.float64)).clip(0, 1) * 255).round()
    return _png(pixels.astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of (height, width, 1, 3 or 4) bytes."""
    from PIL import Image

    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def middles(histogram: Media) -> list[float]:
    """The middles of a histogram's bins; it knows no more of the values."""
    return [(low + high) / 2 for low, high in pairwise(histogram["edges"])]


def png_size(png: bytes) -> tuple[int, int]:
    """Height and width of a PNG file."""
    width, height = struct.unpack(">II", png[16:24])
    return height, width


def wav_format(wav: bytes) -> tuple[int, int, int]:
    """Frames a second, channels, and number of frames of a WAV file."""
    with wave.open(io.BytesIO(wav)) as sound:
        return sound.getframerate(), sound.getnchannels(), sound.getnframes()


def file_names(name: str, step: int, kind: str, media: Media) -> dict[str, bytes]:
    """The files of an image or sound, by names under which they can be kept."""
    stem = name.replace("/", "_").replace(os.sep, "_")
    if kind == "audio":
        return {f"{stem}-{step}.wav": media["wav"]}
    files = media["png"]
    if len(files) == 1:
        return {f"{stem}-{step}.png": files[0]}
    return {f"{stem}-{step}-{i}.png": png for i, png in enumerate(files)}


def markdown(media: Media) -> str:
    """A table in Markdown."""
    lines = [media["columns"], ["---"] * len(media["columns"]), *media["rows"]]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )
