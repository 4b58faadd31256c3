"""Where there is no GPU, Triton is interpreted: that must be said before it is imported, and torch imports it. What is kept on disk is
kept for one run of the tests alone."""

import gc
import importlib
import os
import shutil
import sys
import tempfile

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["VDCACHE_CACHE_DIR"] = tempfile.mkdtemp(prefix="vdcache-tests-")
# Dynamo looks for garbage after each graph that it compiles, among all of torch: a test that needs it collected says so.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")


def pytest_collection_modifyitems(config, items):
    """Tests that are marked thorough are left to `make thorough`."""
    from tests.support.thorough import THOROUGH

    left = [] if THOROUGH else [item for item in items if item.get_closest_marker("thorough")]
    if left:
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter):
    """Workers do not report how many tests they were told to leave out."""
    from tests.support.thorough import THOROUGH

    if not THOROUGH:
        terminalreporter.write_line("Sampled; `make thorough` (VDCACHE_THOROUGH=1) also runs the tests marked thorough.")


def pytest_collection_finish():
    """What was imported stays, so it is no longer looked through for garbage; graphs are many small objects, most of them kept."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(500_000, 20, 20)
    if "torch" in sys.modules:
        from torch._dynamo import guards

        if hasattr(
            guards, "profile_guard_manager"
        ):  # for a log it flushes the processor's caches after each graph: a tenth of the time
            guards.profile_guard_manager = lambda *args: 0.0
        # What one test captures is not taken for what another one would.
        importlib.import_module("vdcache.ir.capture").captures_folder = lambda: None


def pytest_unconfigure():
    """Modules that count their objects at exit find them gone."""
    gc.unfreeze()
