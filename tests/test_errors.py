"""Where vdcache's warnings point, and what is information and no warning."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch

import vdcache
from tests.support.logs import informed
from vdcache.errors import inform_once, warn_once
from vdcache.testing import TinyDiT, latent, time_of

LIBRARY = "/somewhere/lib/python3/site-packages/pipelines/pipeline.py"


def heard(call):
    """The warnings of vdcache as (file, line)."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [(w.filename, w.lineno) for w in found if issubclass(w.category, vdcache.VdcacheWarning)]


def library(source: str, name: str = "pipelines.pipeline", file: str = LIBRARY):
    """The function `call` of a module that stands among installed packages."""
    scope = {"__name__": name}
    exec(compile(textwrap.dedent(source), file, "exec"), scope)
    return scope["call"]


def here() -> tuple[str, int]:
    frame = inspect.currentframe().f_back
    return frame.f_code.co_filename, frame.f_lineno


class Around(torch.nn.Module):
    """A model of the user's own file, whose forward runs within the compiled call."""

    def __init__(self):
        super().__init__()
        self.inner = TinyDiT()

    def forward(self, x, t, text):
        return self.inner(x, t, text) * 1.0


@torch.no_grad()
@pytest.mark.parametrize("door", ["compile", "string", "in place"])
def test_warnings_point_at_the_line_that_calls_the_model(door):
    torch._dynamo.reset()
    options = {"recipe": "fora-2", "num_steps": 2, "inner": "eager"}
    model = Around()
    if door == "compile":
        call = vdcache.compile(model, **options)
    elif door == "string":
        call = torch.compile(model, backend="vdcache", options=options)
    else:
        model.compile(backend="vdcache", options=options)
        call = model
    places = []

    def loop():
        for step in range(3):  # one more than was announced
            places.append((__file__, here()[1] + 1))
            call(latent(step), time_of(step), latent(9, 1, 3, 4))

    found = heard(loop)
    assert found and set(found) == set(places), found
    pipeline = library("def call(run, *args): return run(*args)")

    def through_a_library():
        places.append((__file__, here()[1] + 1))
        pipeline(call, latent(9), time_of(9), latent(9, 1, 3, 4))

    torch._dynamo.reset()
    call = vdcache.compile(torch.nn.Linear(4, 4), **options)
    pipeline = library("def call(run, *args): return run(args[0])")
    assert heard(through_a_library) == places[-1:]


def test_where_nothing_is_the_users_the_library_is_named():
    says = library("def call(): warn_once(set(), 'a message')")
    says.__globals__["warn_once"] = warn_once

    def threaded(run):  # a thread's stack holds nothing but Python's own library and what it runs
        worker = threading.Thread(target=run)
        worker.start()
        worker.join()

    assert [file for file, _ in heard(lambda: threaded(says))] == [LIBRARY]
    alone = functools.partial(warn_once, set(), "another message")
    assert [file for file, _ in heard(lambda: threaded(alone))] == ["sys"]  # Python's word for no file


def printed(code: str, *flags: str) -> str:
    """What a program writes on standard error."""
    ran = subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


INFORM = "from vdcache.errors import inform_once; said = set(); [inform_once(said, 'vdcache: calibrated') for _ in range(2)]"


@pytest.mark.parametrize(
    ("before", "seen"),
    [
        ("", ["vdcache: calibrated"]),
        (
            "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s')",
            ["vdcache INFO vdcache: calibrated"],
        ),
        ("import logging; logging.getLogger('vdcache').setLevel(logging.WARNING)", []),
        ("import logging; logging.disable(logging.INFO)", []),
    ],
    ids=["as it comes", "logging set up", "level set", "disabled"],
)
def test_information_is_seen_once_and_logging_rules_it(before, seen):
    assert printed(f"{before}\n{INFORM}", "-W", "error").splitlines() == seen


def test_information_is_a_record_of_the_logger():
    with informed() as told:
        said: set[str] = set()
        inform_once(said, "one", key="k")
        inform_once(said, "two", key="k")
    assert told == ["one"]
