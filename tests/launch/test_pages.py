"""What the pages show a user to type and to write is taken as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command

from polygraft.cluster.settings import load
from polygraft.launch.commands.search_file import read_search_file
from polygraft.launch.main import app
from polygraft.tuning.request import SearchRequest
from tests.launch.test_search_commands import Uploads
from tests.test_docs import ROOT, pages
from tests.tuning.standin import SHAPE

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\$ )?polygraft (.+)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and text of what it has between fences."""
    return _BLOCK.findall(page.read_text())


def commands() -> list[list[str]]:
    """Words after `polygraft`, but for drawings."""
    lines = [line for page in pages() for _, text in blocks(page) for line in _COMMAND.findall(text)]
    return [shlex.split(line, comments=True) for line in lines if "──" not in line]


def test_every_command_that_a_page_shows_is_one() -> None:
    """Read as far as carrying it out, which raises for a command, an option or an argument that there is not."""
    found = commands()
    assert len(found) > 30
    for words in found:
        command = get_command(app)
        context = command.make_context("polygraft", list(words))
        while isinstance(command, TyperGroup):
            name, inner, left = command.resolve_command(context, [*context._protected_args, *context.args])
            assert name is not None and inner is not None
            command, context = inner, inner.make_context(name, left, parent=context)


def written(page: str, first: str) -> str:
    """The YAML of the page that begins with this word."""
    (found,) = [text for kind, text in blocks(ROOT / "docs" / page) if kind == "yaml" and text.startswith(first)]
    return found


def test_the_search_that_is_begun_on_its_page_is_one(tmp_path: Path) -> None:
    text = written("search.md", "name:")
    files = dict(re.findall(r"^(\w+_file): (\S+)$", text, re.MULTILINE))
    for name, value in files.items():
        (tmp_path / value).write_text(name)
    (tmp_path / "search.yaml").write_text(text)
    body = read_search_file(tmp_path / "search.yaml").body(client := Uploads())
    assert sorted(content.decode() for _, content in client.sent) == sorted(files) and len(files) == 3
    plan = SearchRequest.model_validate(body).plan(backbone="tiny", shape=SHAPE)
    assert (plan.trials, plan.pruner, plan.seeds, plan.choose, plan.promote) == (24, "early-exit", 3, "knee", True)


def test_the_settings_of_the_operator_s_page_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(written("operations.md", "serve:"))
    settings = load(home=tmp_path)
    assert (settings.serve.max_replicas, settings.serve.idle_s, settings.pack.bytes) == (4, 600, 4_000_000_000)
