"""The page about the architecture agrees with the code."""

from __future__ import annotations

from docs.draw_architecture import PICTURE, draw, import_graph, label_of


def test_the_picture_shows_the_imports_as_they_are():
    assert PICTURE.read_text(encoding="utf-8") == draw(), (
        "imports between rooms have changed: run `python -m docs.draw_architecture`, and look at the picture"
    )


def test_each_room_has_its_paragraph():
    page = PICTURE.with_suffix(".md").read_text(encoding="utf-8")
    missing = [room for room in import_graph() if f"\n**`{label_of(room)}`" not in page]
    assert not missing, f"docs/architecture.md says nothing of {missing}"
