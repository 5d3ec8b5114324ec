"""What of a report is printed: a traceback without the functions between the user's, and not all of a long text."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from itertools import groupby

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_FOLDERS = ("framework", "callbacks", "loggers", "strategies")
# A frame of a traceback: its place, and the lines of code that Python shows with it.
_FRAME = re.compile(r'  File "(?P<file>.+)", line .*\n(?:    .*\n|  \[Previous .*\n)*')
_MOST_CHARACTERS = 20_000


def readable(text: str) -> str:
    """Return what is printed of a text with tracebacks: a line says what is left out of each."""
    parts: list[str] = []
    end = 0
    for frames in _tracebacks(text):
        parts += text[end : frames[0].start()], _without_internal(frames)
        end = frames[-1].end()
    return shortened("".join((*parts, text[end:])))


def shortened(text: str) -> str:
    """Return a text without its middle, if it is very long."""
    left_out = len(text) - _MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n… {left_out:,} characters …\n{text[-half:]}"


def _tracebacks(text: str) -> Iterator[list[re.Match[str]]]:
    """Give the frames of each traceback in the text."""
    frames: list[re.Match[str]] = []
    for frame in _FRAME.finditer(text):
        if frames and frames[-1].end() != frame.start():
            yield frames
            frames = []
        frames.append(frame)
    if frames:
        yield frames


def _without_internal(frames: list[re.Match[str]]) -> str:
    """Return a traceback's frames up to the user's last one without ours and torch's, and all that come after it."""
    folders = [os.path.join(_ROOT, name, "") for name in _FOLDERS]
    # Whoever only watches from outside imports no torch.
    if torch := sys.modules.get("torch"):
        folders.append(os.path.join(os.path.dirname(str(torch.__file__)), ""))
    internal = [frame["file"].startswith(tuple(folders)) for frame in frames]
    if all(internal):
        return "".join(frame[0] for frame in frames)
    last = len(frames) - 1 - internal[::-1].index(False)
    parts: list[str] = []
    for is_internal, group in groupby(range(last + 1), internal.__getitem__):
        texts = [frames[index][0] for index in group]
        if is_internal:
            calls = "1 call" if len(texts) == 1 else f"{len(texts)} calls"
            texts = [f"  [{calls} inside of loopwright and torch]\n"]
        parts += texts
    parts += (frame[0] for frame in frames[last + 1 :])
    return "".join(parts)
