"""Draws architecture.svg: the rooms of the code, and who imports whom.

`python -m docs.draw_architecture` draws it anew.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

from tests.import_graph import LEAVES, arrows, room_of, sources

PICTURE = Path(__file__).with_name("architecture.svg")

# In pixels.
BOX_WIDTH = 150
BOX_HEIGHT = 32
FLOOR_HEIGHT = 78
GAP = 18
WAYPOINT_WIDTH = 8
MARGIN = 12

COLOURS = {"folder": "#dbe9f8", "file": "#f4f4f4", "leaf": "#e2f2df"}
ROUNDS = 12  # of sorting the floors; later ones change nothing

Graph = dict[str, set[str]]


def import_graph() -> Graph:
    """Which rooms each room imports."""
    graph: Graph = {room_of(name): set() for name in sources()}
    for name, target, _ in arrows():
        if room_of(name) != room_of(target):
            graph[room_of(name)].add(room_of(target))
    return graph


def reachable(graph: Graph, room: str) -> set[str]:
    """All rooms below one."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def without_shortcuts(graph: Graph) -> Graph:
    """Leave out the arrows whose target can be reached through other rooms."""
    below = {room: reachable(graph, room) for room in graph}
    return {
        room: {
            target
            for target in targets
            if not any(target in below[other] for other in targets - {target})
        }
        for room, targets in graph.items()
    }


def importers_of(graph: Graph) -> Graph:
    """Which rooms import each room."""
    found: Graph = {room: set() for room in graph}
    for room, targets in graph.items():
        for target in targets:
            found[target].add(room)
    return found


def floors_of(graph: Graph) -> dict[str, int]:
    """On which floor each room stands: above all that it imports, and right below the lowest that imports it."""

    @cache
    def lowest(room: str) -> int:
        return 1 + max(map(lowest, graph[room]), default=-1)

    importers = importers_of(graph)
    floors: dict[str, int] = {}
    for room in sorted(graph, key=lowest, reverse=True):
        above = [floors[importer] for importer in importers[room]]
        floors[room] = min(above) - 1 if above else lowest(room)
    return floors


def with_waypoints(graph: Graph, floors: dict[str, int]) -> Graph:
    """Cut arrows over several floors into arrows from floor to floor; what is between has a space in its name."""
    cut: Graph = {room: set() for room in graph}
    for room, targets in graph.items():
        for target in targets:
            before = room
            for floor in range(floors[room] - 1, floors[target], -1):
                waypoint = f"{room} {target} {floor}"
                floors[waypoint] = floor
                cut[before].add(waypoint)
                cut[waypoint] = set()
                before = waypoint
            cut[before].add(target)
    return cut


def is_waypoint(name: str) -> bool:
    return " " in name


def arrange(graph: Graph, floors: dict[str, int]) -> list[list[str]]:
    """Sort the rooms of each floor, from the top floor down, so that few arrows cross.

    Each goes to the mean position of those that it is joined with on the floor above, then on the floor below.
    """
    above = importers_of(graph)
    rows: list[list[str]] = [
        sorted(name for name in graph if floors[name] == floor)
        for floor in range(max(floors.values()), -1, -1)
    ]
    for _ in range(ROUNDS):
        for neighbours, order in ((above, rows), (graph, rows[::-1])):
            for before, row in pairwise(order):
                places = centres(before)

                def mean(name: str, places=places, neighbours=neighbours) -> float:
                    found = [places[n] for n in sorted(neighbours[name]) if n in places]
                    return sum(found) / len(found) if found else 0.0

                row.sort(key=mean)
    return rows


def width_of(name: str) -> int:
    return WAYPOINT_WIDTH if is_waypoint(name) else BOX_WIDTH


def length_of(row: list[str]) -> int:
    return sum(map(width_of, row)) + GAP * (len(row) - 1)


def centres(row: list[str]) -> dict[str, float]:
    """Where the middle of each box of a floor is, from the middle of the floor."""
    found = {}
    left = -length_of(row) / 2
    for name in row:
        found[name] = left + width_of(name) / 2
        left += width_of(name) + GAP
    return found


def kind_of(room: str) -> str:
    if room in LEAVES:
        return "leaf"
    return "folder" if file_of(room).name == "__init__.py" else "file"


def file_of(room: str) -> Path:
    """The file of a room, or the first of its folder."""
    is_own_folder = room in LEAVES or room == "framework"
    return sources()[room if is_own_folder else f"framework.{room}"]


def label_of(room: str) -> str:
    return f"{room}.py" if kind_of(room) == "file" else f"{room}/"


def draw() -> str:
    """The picture, as the text of an SVG file."""
    graph = without_shortcuts(import_graph())
    floors = floors_of(graph)
    graph = with_waypoints(graph, floors)
    rows = arrange(graph, floors)

    width = max(map(length_of, rows)) + 2 * MARGIN
    height = FLOOR_HEIGHT * (len(rows) - 1) + BOX_HEIGHT + 2 * MARGIN
    x: dict[str, float] = {}
    y: dict[str, float] = {}
    for number, row in enumerate(rows):
        for name, centre in centres(row).items():
            x[name] = width / 2 + centre
            y[name] = MARGIN + FLOOR_HEIGHT * number

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="DejaVu Sans Mono, Menlo, monospace" font-size="13">',
        "<title>Rooms of the code, each above those that it imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for room in sorted(graph):
        if is_waypoint(room):
            continue
        for target in sorted(graph[room]):
            lines.append(curve(way(graph, room, target), x, y))
    for room in sorted(graph):
        if is_waypoint(room):
            continue
        left = x[room] - BOX_WIDTH / 2
        lines += [
            f'<rect x="{left:g}" y="{y[room]:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{COLOURS[kind_of(room)]}" stroke="#667"/>',
            f'<text x="{x[room]:g}" y="{y[room] + 21:g}" text-anchor="middle">{label_of(room)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def way(graph: Graph, room: str, first: str) -> list[str]:
    """The stops of an arrow: its room, the waypoints, and the room that it leads to."""
    stops = [room, first]
    while is_waypoint(stops[-1]):
        stops += graph[stops[-1]]
    return stops


def curve(stops: list[str], x: dict[str, float], y: dict[str, float]) -> str:
    """An arrow through its stops, upright where it passes a floor."""
    path = f"M{x[stops[0]]:g} {y[stops[0]] + BOX_HEIGHT:g}"
    for before, stop in pairwise(stops):
        top = y[before] + BOX_HEIGHT
        middle = (top + y[stop]) / 2
        path += (
            f"C{x[before]:g} {middle:g} {x[stop]:g} {middle:g} {x[stop]:g} {y[stop]:g}"
        )
        if is_waypoint(stop):
            path += f"V{y[stop] + BOX_HEIGHT:g}"
    return f'<path d="{path}" fill="none" stroke="#667" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
