"""How a command answers: tables for people, JSON for programs, errors on stderr, and what its exit status means."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

JsonOut = bool | int | float | str | None | Sequence["JsonOut"] | Mapping[str, "JsonOut"]

_PIPE_WIDTH = 240  # a program that reads a table wants a row in one line

screen = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
errors = Console(stderr=True)


class Status(IntEnum):
    """Exit statuses of every command (2 is typer's own)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    NOT_FOUND = 4


class Failure(Exception):
    """A command cannot do what it was asked; the message says what to do."""

    def __init__(self, message: str, status: Status = Status.FAILED) -> None:
        super().__init__(message)
        self.status = status


def print_json(value: JsonOut | BaseModel | Iterable[BaseModel]) -> None:
    """One JSON document on stdout, and nothing else."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif not isinstance(value, str | Mapping | Sequence) and isinstance(value, Iterable):
        value = [one.model_dump(mode="json") for one in value]
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table; a column whose name begins with "#" is numbers, flushed right. Without columns it has no header."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    for column in columns:
        table.add_column(
            column.removeprefix("#"), justify="right" if column.startswith("#") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    screen.print(table if table.row_count else f"[dim]{empty}[/]")


def print_error(message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def ago(at: float | None) -> str | None:
    """Time since `at`, for a person."""
    if at is None:
        return None
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def count(number: int | None) -> str | None:
    """A large number, for a person."""
    if number is None:
        return None
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
