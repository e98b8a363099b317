"""classify: what label a graft with a classifier gives to texts, computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polygraft.grafts.text.labelled import Labelled
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.commands.grafts import OnBackbone, folder_of, load_backbone, usage_errors
from polygraft.launch.output import Failure, JsonOut, Status, print_json, print_table

_BATCH = 256


def register(app: typer.Typer) -> None:
    app.command()(classify)


def classify(
    context: typer.Context,
    graft: Annotated[str, typer.Argument(help="A graft of the service, name or name@version, or a graft's folder.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts, if no --file is given.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="Texts, a line each.")] = None,
    backbone: OnBackbone = None,
    as_json: Json = False,
) -> None:
    """Say which label each text has, and how likely it is."""
    from polygraft.grafts.formats.backbone_files import BackboneFiles
    from polygraft.grafts.formats.check import FormatError
    from polygraft.grafts.formats.read import read
    from polygraft.grafts.text.tokenise import Tokeniser
    from polygraft.launch.commands.grafts import grown_on
    from polygraft.trainers.evaluate import probabilities
    from polygraft.trainers.job import Sample

    asked = _texts(texts or [], file)
    with usage_errors(), folder_of(flags(context), graft) as source:
        loaded = load_backbone(flags(context), backbone, grown_on(source))
        bound, values = read(source, BackboneFiles(loaded.folder), loaded.fingerprint)
        head = bound.spec.head
        if head is None:
            raise FormatError(f"{graft}: has no classifier; train one with polygraft submit --type classification")
        tokeniser, limit = Tokeniser.load(loaded.folder), loaded.shape.length_limit(None, bound.context_length)
        tokens = [tokeniser.encode_labelled(Labelled(text, ""), limit, last=head.reads_last) for text in asked]
        samples = [Sample.labelled(one.ids, 0, head) for one in tokens]
        found = [
            row
            for first in range(0, len(samples), _BATCH)
            for row in probabilities(loaded, bound, values, samples[first : first + _BATCH]).tolist()
        ]
    rows = [dict(zip(head.labels, row, strict=True)) for row in found]
    if as_json:
        told: list[JsonOut] = [
            {"text": text, "label": _best(row), "probabilities": {**row}} for text, row in zip(asked, rows, strict=True)
        ]
        print_json(told)
        return
    lines = ((_best(row), f"{row[_best(row)]:.3f}", text) for text, row in zip(asked, rows, strict=True))
    print_table(("label", "#probability", "text"), lines, empty="no texts")


def _best(row: dict[str, float]) -> str:
    return max(row, key=lambda label: row[label])


def _texts(texts: list[str], file: Path | None) -> list[str]:
    if bool(texts) == (file is not None):
        raise Failure("give texts, or --file with a text a line", Status.USAGE)
    if file is None:
        return texts
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--file {file}: {error}", Status.USAGE) from None
