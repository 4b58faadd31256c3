"""A package of its own beside vdcache: it is listed, its parts work by name, its own tests pass, and a broken one breaks nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.thorough import THOROUGH

ROOT = Path(__file__).parents[2]
# of all small models, one whose attention is bare, and one where it runs over time
A_FEW = () if THOROUGH else ("-k", "not test_on_small_models or tiny or latte")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it; nothing is asked of any index."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(
        ROOT / "examples" / "plugin", folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
    ]
    subprocess.run([*command, "--target", folder / "site", folder / "source"], check=True, capture_output=True, text=True)
    return folder


def python(installed, *args):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed / 'site'}", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, cwd=installed / "source")
    return done.returncode, done.stdout, done.stderr


def test_it_is_listed_and_found_by_name(installed):
    code, out, err = python(
        installed,
        "-c",
        "from vdcache.cli.main import app\n"
        "for words in (['passes'], ['recipes'], ['recipes', 'window-residual-3']): app(words, standalone_mode=False)\n",
    )
    assert code == 0, err
    for text in (
        "keep-window-residual",
        "vdcache-window 0.1.0",
        "window-residual-N",
        "Reused steps attend in a window of N tokens",
        "Doubling",
        "Damped",
        "keep-window-residual{window=3}: keep what full attention has besides",
    ):
        assert text in out, out


def test_its_own_tests_pass(installed):
    """Written with vdcache.testing alone, run against the installed package."""
    code, out, err = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", *A_FEW, "tests")
    assert code == 0, out + err
    assert "passed" in out and "failed" not in out


def test_a_broken_package_is_said_once_and_passed_over(installed, tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vdcache.passes]\ngone = no_such_module:Pass\nmark-branches = vdcache.passes:MarkBranches\nnumber = math:pi\n"
        "[vdcache.recipes]\nalways = math:sin\nthree = math:pi\n"
    )
    program = (
        f"import sys, warnings; sys.path.append({str(tmp_path)!r})\n"
        "import vdcache\nfrom vdcache.passes.catalogue import known_passes\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): print(sorted(known_passes())[-1], len(vdcache.recipes()), str(vdcache.Pipeline.parse('canonicalise')))\n"
        "for w in said: print(w.category.__name__, w.message)\n"
    )
    code, out, err = python(installed, "-c", program)
    assert code == 0, err
    assert out.count("VdcacheWarning") == 5, out
    for text in (
        "vdcache passes over 'gone' of broken 1.0 (entry point in vdcache.passes): no_such_module:Pass cannot be imported",
        "'mark-branches' of broken 1.0 (entry point in vdcache.passes): vdcache has a pass 'mark-branches' of its own",
        "3.141592653589793 is no class of passes",
        "vdcache has a recipe 'always' of its own",
        "3.141592653589793 is no recipe, and no function that makes one",
    ):
        assert text in out, out
    assert "window-attention" in out.splitlines()[0]
