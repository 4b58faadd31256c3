"""Where there is no GPU, Triton is interpreted: that must be said before it is imported, and torch imports it. What is kept on disk is
kept for one run of the tests alone."""

import os
import shutil
import tempfile

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["VDCACHE_CACHE_DIR"] = tempfile.mkdtemp(prefix="vdcache-tests-")
