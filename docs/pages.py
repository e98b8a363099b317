"""What `mkdocs build` does beside its own: pages that lie outside docs/, folders of pages, links to source files."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages that have their place elsewhere in the repository, by their names in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "k8s/README.md": "kubernetes.md",
}
_LOG = logging.getLogger("mkdocs.hooks.pages")  # a warning there ends a strict build
_LINK = re.compile(r"\[([^][]+)\]\(([^()\s]+)\)")
_BLOCK = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A name in the nav that ends in / becomes the pages of that folder, by name."""
    config.nav = _listed(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to pages of the site; those to other files of the repository, which must exist, become their text."""
    uri = page.file.src_uri
    path = next((path for path, named in ELSEWHERE.items() if named == uri), f"docs/{uri}")
    parts = _BLOCK.split(markdown)  # every second one is a block of code
    return "".join(part if index % 2 else _linked(part, path, uri) for index, part in enumerate(parts))


def _linked(text: str, path: str, uri: str) -> str:
    def link(found: re.Match[str]) -> str:
        told, target = found[1], urlsplit(found[2])
        if target.scheme or not target.path:
            return found[0]
        to = os.path.normpath(Path(path).parent / target.path)
        if not (ROOT / to).exists():
            _LOG.warning("%s: the link to %s leads nowhere", path, found[2])
        place = ELSEWHERE.get(to) or (to.removeprefix("docs/") if re.fullmatch(r"docs/.+\.(md|png)", to) else None)
        if place is None:
            return told
        anchor = f"#{target.fragment}" if target.fragment else ""
        return f"[{told}]({os.path.relpath(place, Path(uri).parent)}{anchor})"

    return _LINK.sub(link, text)


def _listed(nav: Any, docs: Path) -> Any:
    match nav:
        case str() if nav.endswith("/"):
            return [path.relative_to(docs).as_posix() for path in sorted((docs / nav).glob("*.md"))]
        case list():
            return [_listed(one, docs) for one in nav]
        case dict():
            return {name: _listed(one, docs) for name, one in nav.items()}
        case _:
            return nav
