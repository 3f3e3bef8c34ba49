"""Imports only point down, and some things are imported late or never: found by reading the code, not by running it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blagpt_pl"
BOTTOM = {"errors", "seeding", "ruler", "sampling", "resume", "devices", "window", "sharding"}
TRAINING = {"nn", "losses", "optim"}

# What each layer may import of blagpt_pl besides itself. A layer is a folder or a file directly in the package.
ALLOWED = {
    "__init__": set(),
    **{name: {"errors"} - {name} for name in BOTTOM},
    "sampling": {"nn"},
    "nn": {"errors"},
    "testing": {"nn", "optim"},
    "losses": {"nn", "errors"},
    "optim": {"errors", "seeding"},
    "data": {"errors", "seeding"},
    "lm": TRAINING | BOTTOM,
    "token_model": {"lm", "nn", "losses"},
    "models": {"lm", "token_model", "nn", "losses", "errors", "sampling"},
    "callbacks": {"lm", "nn", "optim"} | BOTTOM,
    "lab": {"lm", "token_model", "models", "callbacks", "data", "testing"} | TRAINING | BOTTOM,
}
ALLOWED["cli"] = ALLOWED["__main__"] = {*ALLOWED}
WITHOUT_LIGHTNING = {"nn", "losses", "optim", "testing", "errors", "seeding", "sampling"}
WITH_TRAINER = {f"blagpt_pl.testing.{name}" for name in ("running", "training", "resuming", "updates")}  # imported late
NN_MAY_USE = {"torch", "blagpt_pl", *sys.stdlib_module_names}


def imports(path: Path) -> set[str]:
    """Every module named by an import of a file, wherever it stands, and only for type checking too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" if module == "blagpt_pl" else module for alias in node.names}
    return found


def layer(module: str) -> str:
    """The layer of a module of the package: blagpt_pl.nn.base -> nn."""
    name = [*module.split("."), "__init__"][1]
    known = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if known else "__init__"  # a name defined in the package itself, such as __version__


def files() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def inside(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "blagpt_pl"}


@pytest.mark.parametrize("module", files())
def test_imports_point_down(module: str) -> None:
    here = layer(module)
    assert here in ALLOWED, f"{module}: a layer that ALLOWED does not know; say what it may import"
    wrong = {name for name in inside(files()[module]) if layer(name) not in ALLOWED[here] | {here, "__init__"}}
    assert not wrong, f"{module} imports {sorted(wrong)}; {here} may import {sorted(ALLOWED[here])} and itself"


def test_the_layers_have_an_order() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [
            name for name in ALLOWED if name not in order and ALLOWED[name] - {name, "cli", "__main__"} <= set(order)
        ]
        assert ready, f"a circle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


def test_models_never_import_one_another() -> None:
    for module, path in files().items():
        if layer(module) == "models":
            others = {name for name in inside(path) if layer(name) == "models"} - {module}
            assert not others, f"{module} imports {sorted(others)}; what two models share moves down to nn"


def test_nn_is_plain_torch() -> None:
    for module, path in files().items():
        if layer(module) == "nn":
            foreign = {name.split(".")[0] for name in imports(path)} - NN_MAY_USE
            assert not foreign, f"{module} imports {sorted(foreign)}"


def test_lightning_stays_above() -> None:
    for module, path in files().items():
        if layer(module) in WITHOUT_LIGHTNING and module not in WITH_TRAINER:
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"lightning", "pytorch_lightning", "jsonargparse"}, module


def test_nothing_circles_between_modules() -> None:
    """A file may only import files that can be imported before it."""
    graph = {module.removesuffix(".__init__"): inside(path) for module, path in files().items()}
    graph = {name: {other for other in used if other in graph and other != name} for name, used in graph.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, used in graph.items() if name not in done and used <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_every_module_says_what_it_is() -> None:
    for module, path in files().items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{module}: no docstring"


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, blagpt_pl; print(any(m in sys.modules for m in ('torch', 'lightning', 'numpy')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"


def test_checking_a_part_imports_no_lightning() -> None:
    code = "import sys, blagpt_pl.testing; print('lightning' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import blagpt_pl.lm", {"blagpt_pl.lm"}),
        ("from blagpt_pl import lm, ruler as r", {"blagpt_pl.lm", "blagpt_pl.ruler"}),
        ("from blagpt_pl.models.blagpt import BlaGPT", {"blagpt_pl.models.blagpt"}),
        ("def f():\n    from blagpt_pl.data import x", {"blagpt_pl.data"}),
        ("from .base import Site", {"blagpt_pl.nn.base"}),
        ("from ..lm import LanguageModel", {"blagpt_pl.lm"}),
    ],
)
def test_the_reader_sees_every_form(
    source: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    path = tmp_path / "blagpt_pl" / "nn" / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert imports(path) == expected
