"""The house rules that a machine can hold: imports point one way, no names decide, importing costs nothing."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import networkx
import pytest

import vdcache

ROOT = Path(vdcache.__file__).parent
# What each room may import of vdcache, itself aside. A dotted name is one module of a room.
MAY_IMPORT = {
    "errors": "",
    "util": "errors",
    "ir": "errors util",
    "attention": "errors util",
    "patterns": "errors util ir attention",
    "passes": "errors util ir attention patterns policies",
    "policies": "errors util",
    "runtime": "errors util policies",
    "methods": "errors util attention passes policies runtime.history",
    "backends": "errors util ir attention patterns passes policies runtime methods.recipe",
    "calibration": "errors util ir attention patterns passes policies runtime methods backends",
    "distributed": "errors runtime.agreement",
    "quality": "errors",
    "api": "errors util policies runtime methods backends calibration distributed",
    "pipelines": "errors util ir.capture ir.capture_cache policies runtime methods.recipe backends api",
    "explanation": "errors util ir patterns passes policies methods backends",
    "exporting": "errors util ir passes policies runtime methods backends calibration api runtime_onnx",
    "runtime_onnx": "errors exporting.manifest exporting.running exporting.weights",
    "masks": "attention",
    "predictors": "passes policies",
    "demo": "errors util policies runtime methods calibration exporting runtime_onnx",
    "testing": "errors util ir passes policies methods backends api demo",
    "cli": "*",
    "__init__": "util",
    "__main__": "cli",
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str]]:
    """The modules of vdcache that a file imports, and how: "at the top", "for types", "in a function"."""
    found = []

    def look(node: ast.AST, how: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = how
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "in a function"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "for types"
            elif isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "vdcache":
                found.extend((module_of(f"{child.module}.{a.name}"), how) for a in child.names)
            elif isinstance(child, ast.Import):
                found.extend((a.name, how) for a in child.names if a.name.startswith("vdcache."))
            look(child, inner)

    look(ast.parse(path.read_text()), "at the top")
    return found


def dotted(path: Path) -> str:
    return ".".join(("vdcache", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {dotted(f): f for f in FILES}


def module_of(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def test_every_room_has_a_line():
    assert {room(f) for f in FILES} == set(MAY_IMPORT)
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    table = page[page.index("| room of `vdcache/` |") :].partition("\n\n")[0]
    told = set(re.findall(r"`(\w+)(?:\.py)?`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert told == set(MAY_IMPORT) - {"__init__", "__main__"}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT[room(path)].split()
    for module, _ in imports(path):
        own, _, inner = module.removeprefix("vdcache").removeprefix(".").partition(".")
        if own and own != room(path):
            assert "*" in allowed or own in allowed or f"{own}.{inner}" in allowed, module


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "cli"], ids=dotted)
def test_imports_stand_at_the_top(path):
    """In a function stands only what needs a package that may be missing."""
    needs = {
        "attention.block_sparse",
        "runtime_onnx",
        *(f"exporting.{m}" for m in ("to_torch", "inside", "onnx_plans", "onnx_single", "onnx_unrolled")),
    }
    for module, how in imports(path):
        assert how == "at the top" or (how == "in a function" and module.removeprefix("vdcache.") in needs), (module, how)


def test_no_file_is_part_of_a_cycle():
    graph = networkx.DiGraph((name, module) for name, path in MODULES.items() for module, _ in imports(path) if module != name)
    assert not [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]


@pytest.mark.parametrize(
    "path",
    [
        f
        for f in FILES
        if room(f)
        in (
            *(
                "ir",
                "attention",
                "patterns",
                "passes",
                "policies",
                "runtime",
                "backends",
                "explanation",
                "calibration",
                "exporting",
            ),
            "pipelines",
        )
    ],
    ids=lambda p: p.name,
)
def test_no_model_is_named_in_code(path):
    packages = "" if path.name == "hooks.py" else "|diffusers"  # it names classes of hooks, which know no model
    names = re.compile(rf"\b(wan|hunyuan|cogvideo|flux|latte|pixart|mochi|ltx|sd3|opensora{packages})", re.IGNORECASE)
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
    assert room(path) == "cli" or not [m for m, _ in imports(path) if m.startswith("vdcache.testing")]  # `vdcache try`


@pytest.mark.parametrize("module", ["vdcache", "vdcache.policies", "vdcache.runtime_onnx"])
def test_importing_it_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
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


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_no_test_imports_another_one(path):
    """What tests share is in tests/support, or beside them under a name that does not begin with test."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = (getattr(node, "module", "") or "") if named else ""
        assert not [n for n in named if re.search(r"(^|\.)test_", f"{module}.{n}")], f"{path.name}:{node.lineno}"


def test_what_a_plain_installation_imports_is_declared():
    """`pip install .` brings it, though a developer's environment has it anyway."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", r)[0].replace("-", "_").lower() for r in requirements}

    brought = {"sympy", "onnx_ir", "markupsafe"}  # by torch, onnxscript and jinja2, whose types they are
    known = names([*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]) | brought
    undeclared: dict[str, str] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (name.partition(".")[0].lower() for name in found):
                if top not in known | set(sys.stdlib_module_names) | {"vdcache"}:
                    undeclared[top] = str(file.relative_to(ROOT))
    assert undeclared.keys() <= OTHERS, undeclared


# Looked for where they may be: nothing is installed for them.
OTHERS = {
    "diffusers",
    "accelerate",
    "peft",
    "torchao",
    "cache_dit",
    "transformers",
    "xformers",
    "torchvision",
    "pil",
    "skimage",
    "imageio",
}
