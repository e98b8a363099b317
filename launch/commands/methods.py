"""methods: what a graft can be made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.policy.budget import state_bytes
from polygraft.grafts.catalogue import LLAMA_7B, Entry, entry
from polygraft.grafts.methods.declare import Method
from polygraft.grafts.methods.description import describe
from polygraft.grafts.methods.refused import NAMED_TWICE
from polygraft.grafts.methods.registry import find, layouts
from polygraft.grafts.methods.registry import methods as table
from polygraft.grafts.s4 import s4
from polygraft.grafts.sites import ModelShape
from polygraft.grafts.spec import SpecError
from polygraft.launch.commands.common import Json
from polygraft.launch.output import Failure, JsonOut, Status, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command()(methods)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all when not given.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="A backbone's config.json to count parameters on.")] = None,
    budget: Annotated[
        int | None, typer.Option("--s4", help="Print S4's union with at most so many trainable parameters, for --peft.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods a graft can be made of, with their arguments and what follows from their slots; of one method
    say what it does, how it differs from its paper and when to choose it.

    Parameters, and the memory that a job of them takes in training beside the backbone and its activations, are those
    of the defaults on Llama 7B, or on the backbone of --config.
    """
    try:
        known = [*table().values()] if name is None else [find(name)]
    except SpecError as error:
        raise typer.BadParameter(str(error).removeprefix("peft: ")) from None
    try:
        shape = LLAMA_7B if config is None else ModelShape.from_config(json.loads(config.read_text()))
    except (OSError, ValueError) as error:
        raise Failure(f"--config {config}: {error}", Status.USAGE) from None
    if budget is not None:
        try:
            typer.echo(s4(shape, budget))
        except SpecError as error:
            raise Failure(f"--s4: {error}", Status.USAGE) from None
        return
    if as_json:
        print_json([_json(method, entry(method, shape)) for method in known])
        return
    print_table(
        ("method", "kind", "#parameters", "#training", "merges", "#learning rate", "paper"),
        (
            (
                escape(_usage(method)),
                line.kind,
                f"{line.parameters:,}",
                f"{state_bytes(line.parameters, line.frozen) / 1e6:,.1f} MB",
                "yes" if line.mergeable else "",
                f"{method.learning_rate:g}",
                escape(method.paper),
            )
            for method, line in ((method, entry(method, shape)) for method in known)
        ),
        empty="",
    )
    if name is not None:
        _tell(known[0])


def _tell(method: Method) -> None:
    """The method's words, and what else its name may mean."""
    words = describe(method)
    twice = f"Here {method.name} is {NAMED_TWICE[method.name]}." if method.name in NAMED_TWICE else ""
    for text in (words.summary, words.arguments, twice):
        if text:
            typer.echo(f"\n{text}")
    typer.echo(f"\nDeviations from the paper: {words.deviations}")
    typer.echo(f"\nChoose it when: {words.choose}")


def _usage(method: Method) -> str:
    """As it is written in --peft, with the defaults."""
    arguments = (
        name if argument.default is argument.empty else f"{name}={argument.default}"
        for name, argument in method.arguments.items()
    )
    return f"{method.name}({', '.join(arguments)})" if method.arguments else method.name


def _json(method: Method, line: Entry) -> dict[str, JsonOut]:
    arguments = {
        name: {
            "type": getattr(argument.annotation, "__name__", str(argument.annotation)),
            "default": None if argument.default is argument.empty else argument.default,
        }
        for name, argument in method.arguments.items()
    }
    return {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(line).items()},
        "training_bytes": state_bytes(line.parameters, line.frozen),
        "arguments": arguments,
        "peft": list(dict.fromkeys(layout.kind for layout in layouts() if layout.method == method.name)),
        "learning_rate": method.learning_rate,
    }
