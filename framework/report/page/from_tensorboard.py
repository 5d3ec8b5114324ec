"""TensorBoard's event files, of any program that writes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .run import Run

# A record is its length (8 bytes), a checksum of it (4), the event, and a checksum of that (4).
_HEAD = 12
_TAIL = 4
# TensorFlow's numbers of types, and how struct calls them.
_TYPES = {1: "f", 2: "d", 3: "i", 9: "q"}
# What other programs log about themselves, as numbers that are no curves.
_NOT_SHOWN = ("_hparams_/", "hp_metric")


def read_events(files: list[Path], run: Run) -> None:
    """Add what is in event files to a run.

    Args:
        files: of one run, in the order in which they were written.
        run: gets scalars, images, texts and histograms' counts. Values that a resumed run has logged again are dropped.
    """
    try:
        from tensorboard.compat.proto import event_pb2
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "event files are read with tensorboard: pip install tensorboard"
        ) from None
    # Their classes are made when the module is imported, and type checkers see none.
    messages: Any = event_pb2
    for file in files:
        for data in _events(file):
            event = messages.Event.FromString(data)
            if event.HasField("summary"):
                for value in event.summary.value:
                    _add(run, value, event.step, event.wall_time)
            elif event.session_log.status == messages.SessionLog.START and event.step:
                for series in run.series.values():
                    series.drop_from(event.step)
                run.media[:] = [
                    entry for entry in run.media if entry["step"] < event.step
                ]
    for name in [name for name in run.series if name.startswith(_NOT_SHOWN)]:
        del run.series[name]
    _take_epochs(run)


def _events(file: Path) -> Iterator[bytes]:
    """Read the records of a file; the last may be cut short."""
    with file.open("rb") as stream:
        while len(head := stream.read(_HEAD)) == _HEAD:
            (length,) = struct.unpack("<Q", head[:8])
            data = stream.read(length + _TAIL)
            if len(data) < length + _TAIL:
                return
            yield data[:length]


def _add(run: Run, value: Any, step: int, time: float) -> None:
    kind = value.WhichOneof("value")
    name = value.tag
    if kind == "simple_value":
        run.add(name, step, value.simple_value, time)
    elif kind == "image":
        data = value.image.encoded_image_string
        run.add_media(step, name, "image", data=data)
    elif kind == "audio":
        data = value.audio.encoded_audio_string
        run.add_media(step, name, "audio", data=data)
    elif kind == "histo":
        counts = _histogram(value.histo)
        run.add_media(step, name, "histogram", value=counts)
    elif kind == "tensor":
        _add_tensor(run, value, step, time)


def _add_tensor(run: Run, value: Any, step: int, time: float) -> None:
    """Add a text, images or a number, as TensorFlow and newer writers keep them."""
    plugin = value.metadata.plugin_data.plugin_name
    name = value.tag
    if plugin == "text":
        texts = [text.decode("utf-8", "replace") for text in value.tensor.string_val]
        name = name.removesuffix("/text_summary")
        run.add_media(step, name, "text", value="\n".join(texts))
    elif plugin == "images":
        # The first two texts are the width and the height.
        for data in value.tensor.string_val[2:]:
            run.add_media(step, name, "image", data=data)
    else:
        number = _scalar(value.tensor)
        if number is not None:
            run.add(name, step, number, time)


def _scalar(tensor: Any) -> float | None:
    """Return the number that a tensor holds; None if it is none."""
    for values in (
        tensor.float_val,
        tensor.double_val,
        tensor.int_val,
        tensor.int64_val,
    ):
        if len(values) == 1:
            return float(values[0])
    code = _TYPES.get(tensor.dtype)
    if code is None or len(tensor.tensor_content) != struct.calcsize(code):
        return None
    return float(struct.unpack(f"<{code}", tensor.tensor_content)[0])


def _histogram(histogram: Any) -> dict[str, Any]:
    """Return counts and edges: TensorBoard keeps the upper limit of each bucket, the last may be infinite."""
    limits = [
        max(min(limit, histogram.max), histogram.min)
        for limit in histogram.bucket_limit
    ]
    return {"counts": list(histogram.bucket), "edges": [histogram.min, *limits]}


def _take_epochs(run: Run) -> None:
    """Read the curve ``epoch``, which Lightning and Loopwright log, as what it is."""
    epochs = run.series.pop("epoch", None)
    if epochs is not None:
        for step, epoch in zip(epochs.steps, epochs.values, strict=True):
            run.note_epoch(epoch, step)
