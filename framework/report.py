"""Printing an evaluation's results."""

from __future__ import annotations


def print_results(stage: str, results: list[dict[str, float]]) -> None:
    """Print a table of values, a column for each loader."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(f"{stage} metric")
    several = len(results) > 1
    for index in range(len(results)):
        table.add_column(f"loader {index}" if several else "value", justify="right")
    bare = [{name.split("/dataloader_idx_")[0]: value for name, value in result.items()} for result in results]
    for name in dict.fromkeys(name for result in bare for name in result):
        table.add_row(name, *(f"{result[name]:.6g}" if name in result else "" for result in bare))
    Console().print(table)
