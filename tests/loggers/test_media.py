"""Images, texts, tables, histograms and sounds: one call on the module, read back from each logger's files."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loopwright.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from loopwright.loggers.media import as_media
from tests.callbacks.scripted import Scripted, fit

PIXELS = torch.arange(48.0).reshape(3, 4, 4) / 47
TONE = torch.sin(torch.arange(80.0))


class Showing(Scripted):
    """Logs one of each kind after its first step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step != 1:
            return
        self.log_image("image", PIXELS)
        self.log_text("text", "a | b")
        self.log_table("table", {"x": [1, 2], "y": ["c", "d"]})
        self.log_histogram("histogram", torch.arange(8.0), bins=4)
        self.log_audio("audio", TONE, sample_rate=8000)


def test_what_a_module_shows(caplog: pytest.LogCaptureFixture):
    board, lines = TensorBoardLogger("board"), JSONLinesLogger("lines")
    fit(module=Showing(), logger=[board, lines, CSVLogger("csv")], max_epochs=2)
    said = [r.message for r in caplog.records if "cannot log images" in r.message]
    assert said == ["CSVLogger cannot log images, and leaves it out: image"]
    text = Path(lines.metrics_file_path).read_text().splitlines()
    rows = {name: row for row in map(json.loads, text) for name in row}
    assert rows["table"] == {
        "step": 1,
        "table": {"columns": ["x", "y"], "rows": [[1, "c"], [2, "d"]]},
    }
    assert rows["histogram"]["histogram"]["counts"] == [2, 2, 2, 2]
    folder = Path(lines.log_dir)
    with Image.open(folder / rows["image"]["image"][0]) as image:
        expected = (PIXELS * 255).round().byte().permute(1, 2, 0)
        assert np.array_equal(np.asarray(image), expected)
    with wave.open(str(folder / rows["audio"]["audio"][0])) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (8000, 80)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir).Reload()
    (image,) = events.Images("image")
    assert (image.step, image.width, image.height) == (1, 4, 4)
    assert events.Audio("audio")[0].length_frames == 80
    assert events.Histograms("histogram")[0].histogram_value.bucket == [2.0] * 4
    assert b"| 1 | c |" in events.Tensors("table/text_summary")[0].tensor_proto.string_val[0]  # fmt: skip


def decoded(value: Any) -> Any:
    (png,) = as_media("image", "x", value)["png"]
    return np.asarray(Image.open(io.BytesIO(png)))


def test_images_of_any_kind(tmp_path: Path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(decoded(grey), grey)
    assert np.array_equal(decoded(Image.fromarray(grey)), grey)
    assert decoded(torch.ones(5, 6, 3, dtype=torch.bfloat16)).shape == (5, 6, 3)
    # A tensor has its channels first, an array last, where both are possible.
    assert decoded(torch.zeros(3, 7, 4)).shape == (7, 4, 3)
    assert decoded(np.zeros((3, 7, 4))).shape == (3, 7, 4)
    assert decoded(torch.eye(2, dtype=torch.bool)).tolist() == [[255, 0], [0, 255]]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert decoded(tmp_path / "grey.png").shape == (3, 4, 4)

    # A batch is several images.
    batch = torch.rand(2, 3, 4, 4)
    assert as_media("image", "x", batch) == as_media("image", "x", [*batch])

    figures = pytest.importorskip("matplotlib.figure")
    assert decoded(figures.Figure(figsize=(1, 1), dpi=20)).shape == (20, 20, 4)


@pytest.mark.parametrize(
    ("kind", "value", "options", "message"),
    [
        ("image", torch.zeros(5), {}, r"log_image\('x', …\): an image is"),
        ("image", torch.zeros(2, 5, 5), {}, "1, 3 or 4 channels"),
        ("image", [torch.zeros(5, 5)], {"caption": ["a", "b"]}, "2 captions"),
        ("table", [[1, 2]], {}, "a table takes a dict of columns"),
        ("table", [[1, 2]], {"columns": ["a"]}, "each row must have 1 values"),
        ("audio", torch.zeros(1, 1, 1), {}, "sound is"),
    ],
)
def test_what_cannot_be_shown(
    kind: str, value: Any, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        as_media(kind, "x", value, **options)


def test_tables_of_any_kind():
    expected = {"columns": ["a", "b"], "rows": [[1, 2.0], [3, None]]}
    rows = [{"a": torch.tensor(1), "b": np.float64(2)}, {"a": 3}]
    assert as_media("table", "x", rows) == expected
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 3], "b": [2.0, 4.0]})
    assert as_media("table", "x", frame)["rows"] == [[1, 2.0], [3, 4.0]]
