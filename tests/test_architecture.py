"""The house rules that a machine can hold: imports point one way, no names decide, importing costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vdcache

ROOT = Path(vdcache.__file__).parent
ALLOWED = {
    "errors": set(),
    "renamed": set(),
    "ir": {"ir", "errors", "renamed"},
    "patterns": {"ir", "patterns"},
    "passes": {"ir", "patterns", "passes", "renamed"},
    "runtime": {"errors", "ir", "runtime"},
    "backends": {"ir", "patterns", "passes", "runtime", "backends", "recipe", "methods", "scheduling"},
    "recipe": {"ir", "passes", "runtime", "renamed"},
    "methods": {"ir", "passes", "runtime", "recipe", "scheduling", "methods"},
    "report": {"runtime"},
    "profiling": {
        "ir",
        "patterns",
        "passes",
        "runtime",
        "backends",
        "recipe",
        "methods",
        "scheduling",
        "api",
        "profiling",
        "renamed",
    },
    "scheduling": {"ir", "passes", "runtime", "recipe", "scheduling"},
    "exporting": {
        *("errors", "ir", "passes", "runtime", "backends", "recipe", "methods", "api", "profiling", "scheduling", "exporting"),
        "runtime_onnx",
    },
    "runtime_onnx": {"errors", "exporting"},
    "pipelines": {"ir", "runtime", "backends", "recipe", "api", "report", "pipelines"},
    "quality": {"ir", "quality"},
    "explanation": {"ir", "patterns", "passes", "runtime", "backends", "recipe", "methods", "scheduling", "explanation"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path, at_top_only: bool = False) -> set[str]:
    """The rooms of vdcache that a file imports."""
    tree = ast.parse(path.read_text())
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vdcache" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in ALLOWED], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    # what is imported when it is asked for: the summary table, and the readers of other libraries' configurations
    late = {"runtime": {"report"}, "recipe": {"methods"}}.get(room(path), set())
    assert imported(path) <= ALLOWED[room(path)] | late


@pytest.mark.parametrize(
    "path",
    [
        f
        for f in FILES
        if room(f)
        in (
            *("ir", "patterns", "passes", "runtime", "backends", "explanation", "profiling", "scheduling", "exporting"),
            "pipelines",
        )
    ],
    ids=lambda p: p.name,
)
def test_no_model_is_named_in_code(path):
    names = re.compile(r"\b(wan|hunyuan|cogvideo|flux|latte|pixart|mochi|ltx|sd3|opensora|diffusers)", re.IGNORECASE)
    for node in ast.walk(ast.parse(path.read_text())):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        assert not (is_text and len(node.value) < 60 and names.search(node.value)), node.value
        assert not (isinstance(node, ast.Name) and names.fullmatch(node.id))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_names_stay_in_their_room(path):
    homes = {"ir/capture.py", "ir/composites.py", "ir/fakes.py", "backends/inductor.py"}
    private = re.compile(r"torch\._(functorch|export|subclasses|inductor\.compile_fx|guards)|_export\.utils")
    if str(path.relative_to(ROOT)) not in homes:
        assert not private.search(path.read_text())


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "testing"], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_testing_kit_is_for_tests_alone(path):
    assert "testing" not in imported(path) or path.name == "cli.py"  # `vdcache try`


def test_importing_vdcache_imports_no_torch():
    code = "import sys, vdcache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_are_there():
    for name in vdcache.__all__:
        assert getattr(vdcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        vdcache.nope  # noqa: B018


def _always_true(test: ast.expr) -> bool:
    if isinstance(test, ast.BoolOp):
        return (any if isinstance(test.op, ast.Or) else all)(map(_always_true, test.values))
    return isinstance(test, ast.Constant | ast.Tuple) and bool(getattr(test, "value", True))


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_every_assertion_can_fail(path):
    asserts = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    programs = [
        n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert not [f"{path.name}:{n.lineno}" for n in asserts if _always_true(n.test)]
    # and in the programs that tests hand to a fresh process
    assert not [p for p in programs if re.search(r"^\s*assert .* or True$", p, re.MULTILINE)]
