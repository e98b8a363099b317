"""The pages name files, functions and phases that are there, and code as it is in its file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from polygraft.grafts.runtime.keys import Phase

ROOT = Path(__file__).parents[1]
FOLDERS = "benchmarks|cluster|docs|grafts|k8s|kernels|launch|serving|tests|trainers|tuning"
# What is told there was so when it was written.
HISTORY = ("docs/log.md", "CHANGELOG.md")
# `path` or `path:name`; x in a path stands for the reader's own.
_NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)(?::([\w.]+))?`")
_OWN = re.compile(r"(^|[/_])x([./]|$)")
_CODE = re.compile(r"`(\w+/[\w/]+\.py)`[^`]*:\n+ *```python\n(.+?)```", re.DOTALL)


def test_files_and_functions_that_the_pages_name_are_there() -> None:
    wrong = []
    for page in pages():
        for path, name in _NAMED.findall(page.read_text()):
            if not _OWN.search(path) and not _there(path, name):
                wrong.append(f"{page.relative_to(ROOT)}: {path}{':' if name else ''}{name}")
    assert not wrong, "\n".join(wrong)


def test_the_runtimes_page_has_all_phases_in_their_order() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "runtime.md").read_text(), re.MULTILINE)
    assert rows == [phase.name for phase in Phase]


def test_code_that_a_page_quotes_from_a_file_is_in_it() -> None:
    found = [block for page in pages() for block in _CODE.findall(page.read_text())]
    assert found
    for path, code in found:
        for piece in code.split("\n...\n"):
            assert piece.strip() in (ROOT / path).read_text(), f"{path}: {piece}"


def test_the_glossary_names_a_file_for_every_word() -> None:
    entries = re.split(r"^- ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) > 80
    assert [entry.split(":")[0] for entry in entries if not _NAMED.search(entry)] == []


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "k8s" / "README.md"]
    return sorted(page for page in found if page.relative_to(ROOT).as_posix() not in HISTORY)


def _there(path: str, name: str) -> bool:
    file = ROOT / path
    if not name:
        return file.exists()
    return file.is_file() and name in _names(ast.parse(file.read_text()))


def _names(body: ast.AST, before: str = "") -> Iterator[str]:
    """Functions and classes of a module, methods after their class, and what else a module or class assigns."""
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield before + node.name
            yield from _names(node, f"{before}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (before + target.id for target in targets if isinstance(target, ast.Name))
