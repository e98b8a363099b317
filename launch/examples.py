"""Examples that a command is given as a file: tokens within a limit, and what that leaves out said on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from polygraft.grafts.text.jsonl import DataError, read
from polygraft.grafts.text.lengths import Lengths
from polygraft.grafts.text.tokenise import Tokeniser, Tokens
from polygraft.launch.output import Failure, Status


def encoded(examples: Path, backbone: Path, max_length: int | None) -> Sequence[Tokens]:
    """The examples for the backbone of a folder. Raises Failure that names the line."""
    tokeniser, lengths = Tokeniser.load(backbone), Lengths()
    try:
        found = [tokeniser.encode_example(example, max_length) for example in read(examples)]
    except (DataError, OSError) as error:
        raise Failure(f"--examples {examples}: {error}", Status.USAGE) from None
    for one in found:
        lengths = lengths.plus(one)
    if (warning := lengths.warning(max_length)) is not None:
        typer.echo(f"--examples {examples}: {warning}", err=True)
    return found
