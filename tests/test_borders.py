"""The house's rules: imports go one way, backends and TRL are imported in one place, and deepspeed/ shadows nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launching import ROOT, run

SOURCE = ROOT / "src" / "refkl"
LAYERS = {
    "messages": set(),
    "versions": set(),
    "files": set(),
    "yaml_files": set(),
    "output_folder": {"files"},
    "types": set(),
    "kl": {"types", "messages"},
    "freezing": {"messages"},
    "config": {"kl", "messages"},
    "origins": {"types"},
    "penalty": {"types", "kl", "config", "origins"},
    "backend": {"types", "messages"},
    "loading": {"messages", "backend", "types"},
    "scoring": {"types", "kl", "backend"},
    "reference": {"types", "kl", "backend", "scoring", "config", "loading", "messages", "versions", "files"},
    "checks": {"types", "kl", "messages", "backend", "scoring", "reference"},
    "checkpoint": {"messages", "reference", "files"},
    "sync": {"types", "kl", "config", "backend", "scoring", "reference", "checkpoint"},
    "hf": {
        "files",
        "output_folder",
        "types",
        "kl",
        "config",
        "messages",
        "backend",
        "freezing",
        "checks",
        "penalty",
        "scoring",
        "reference",
        "checkpoint",
        "sync",
    },
    "trl": {
        "hf",
        "types",
        "kl",
        "config",
        "messages",
        "backend",
        "freezing",
        "checks",
        "penalty",
        "scoring",
        "reference",
        "checkpoint",
        "sync",
    },
    "planner": {"config", "freezing", "messages", "backend", "reference"},
    "compare": {"types", "kl", "config", "backend", "loading", "scoring", "reference", "yaml_files"},
    "rewards": {"messages", "backend"},
    "demo": {"rewards"},
    "cli": {
        "files",
        "output_folder",
        "yaml_files",
        "rewards",
        "config",
        "messages",
        "freezing",
        "loading",
        "checks",
        "types",
        "backend",
        "planner",
        "compare",
        "checkpoint",
        "trl",
        "versions",
        "__init__",
    },
}


MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def _run_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`, which are not run."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def _modules(path: Path) -> set[str]:
    """Modules imported, those of refkl in full: "refkl.part.module"."""
    found = set()
    for node in _run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) | ({node.module} if inside - MODULES.keys() else set())
    return found


def _imports(path: Path) -> set[str]:
    """Top-level modules imported, those of refkl as "refkl.part"."""
    parts = (name.split(".") for name in _modules(path))
    return {".".join([*p, "__init__"][:2]) if p[0] == "refkl" else p[0] for p in parts}


def test_no_module_is_in_an_import_circle() -> None:
    graph = {name: (_modules(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for name in leaves:
            del graph[name]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"in a circle, or needing one: {sorted(graph)}"


def test_every_module_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts - {"__main__"} == set(LAYERS)


def test_files_and_classes_stay_small() -> None:
    for name, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name
        classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
        large = {node.name for node in classes if (node.end_lineno or 0) - node.lineno >= 250}
        assert not large, f"{name}: {large}"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    files = [SOURCE / f"{layer}.py"] if (SOURCE / f"{layer}.py").is_file() else (SOURCE / layer).rglob("*.py")
    for path in files:
        own = {name.split(".")[1] for name in _imports(path) if name.startswith("refkl.")}
        assert own - {layer} <= LAYERS[layer], f"{path.name} imports {own - {layer} - LAYERS[layer]}"


def test_trl_and_deepspeed_are_imported_in_one_place() -> None:
    for path in SOURCE.rglob("*.py"):
        imports, place = _imports(path), path.relative_to(SOURCE).parts
        assert "deepspeed" not in imports or place == ("backend", "zero.py"), path
        # The command line reads TRL's configuration classes: they are what `trainer:` holds.
        assert "trl" not in imports or place[0] == "trl" or place == ("cli", "settings.py"), path


def test_kl_sees_tensors_alone() -> None:
    for path in (SOURCE / "kl").rglob("*.py"):
        assert _imports(path) <= {
            "__future__",
            "collections",
            "dataclasses",
            "functools",
            "math",
            "psutil",
            "typing",
            "torch",
            "refkl.kl",
            "refkl.types",
            "refkl.messages",
        }, path


def test_the_deepspeed_folder_holds_json_alone() -> None:
    assert {p.suffix for p in (ROOT / "deepspeed").iterdir()} == {".json"}


def test_refkl_runs_from_the_repository_root_with_deepspeed_installed() -> None:
    code = "import refkl, refkl.trl, deepspeed; print(deepspeed.__file__)"
    assert "site-packages" in run([sys.executable, "-c", code])


def test_refkl_runs_from_the_repository_root_without_deepspeed() -> None:
    """There, `import deepspeed` would succeed as an empty namespace: only accelerate's check tells."""
    hide = (
        "import sys, importlib.abc, importlib.util\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'deepspeed' and path is None:\n"
        "            import importlib.machinery as m\n"
        "            return m.PathFinder.find_spec(name, [p for p in ['.']])\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import importlib.metadata as md\n"
        "real = md.distribution\n"
        "def distribution(name):\n"
        "    if name == 'deepspeed': raise md.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "md.distribution = distribution; md.metadata = lambda name: distribution(name).metadata\n"
    )
    code = hide + (
        "import deepspeed; assert getattr(deepspeed, '__file__', None) is None\n"
        "import sys; sys.path.insert(0, 'tests')\n"
        "from support.models import llama, batch\n"
        "import refkl\n"
        "reference = refkl.build_reference(llama()); print(reference.strategy, reference.score(batch()).logp.sum() < 0)"
    )
    assert "clone tensor(True)" in run([sys.executable, "-c", code])


def test_version_of_the_command_line() -> None:
    result = subprocess.run([sys.executable, "-m", "refkl", "--version"], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "0.1.0"
