"""Where there is no GPU, Triton is interpreted. That must be said before it is imported, and torch imports it."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
