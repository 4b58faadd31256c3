"""Looking at passes while they run: what each changed and refused, how long it took, and a file for one that failed.

`VDCACHE_DEBUG=changed,refusals,timing,verify,dump:DIR` in the environment, or the same words of `vdcache.debug` around some code.
`TORCH_LOGS="vdcache"` (or "+vdcache" for more) logs every pass through Python's logging, as torch's own parts do.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir.dump import dump, numbers
from vdcache.ir.edit import copy_graph
from vdcache.ir.graph_files import save_graph
from vdcache.passes.base import Pass, PassRecord
from vdcache.passes.catalogue import readable

__all__ = ["WORDS", "Debug", "PassRun", "current", "debug", "listening", "refusals_text"]

WORDS = ("changed", "refusals", "timing", "verify", "dump:DIR")
_LOG = logging.getLogger(__name__)
_COUNT = itertools.count()


@dataclass(frozen=True)
class Debug:
    """What is looked at.

    Args:
        changed: print what each pass that changed something changed.
        refusals: print what each pass left alone, and why.
        timing: print how long each pass took.
        verify: check every fact after every pass, whoever runs the pipeline.
        dump: write the graph before the first pass and after each into this folder; "" for none.
    """

    changed: bool = False
    refusals: bool = False
    timing: bool = False
    verify: bool = False
    dump: str = ""

    @staticmethod
    def of(words: str) -> Debug:
        """From words with commas between them.

        Raises:
            ConfigError: a word that does not exist.
        """
        found = Debug()
        for word in filter(None, (w.strip() for w in words.split(","))):
            name, colon, folder = word.partition(":")
            if name == "dump" and folder:
                found |= Debug(dump=folder)
            elif name in WORDS and not colon:
                found |= Debug(**{name: True})  # type: ignore[arg-type]
            else:
                raise ConfigError(f"vdcache's debugging has no word {word!r}; there are {', '.join(WORDS)}")
        return found

    def __or__(self, other: Debug) -> Debug:
        return Debug(
            self.changed or other.changed,
            self.refusals or other.refusals,
            self.timing or other.timing,
            self.verify or other.verify,
            other.dump or self.dump,
        )


@dataclass(frozen=True)
class PassRun:
    """One pass that ran: the graph before it and after it (copies), and what it said."""

    a_pass: Pass
    before: fx.GraphModule
    after: fx.GraphModule
    step: PassRecord


_NOTHING = Debug()
_asked: ContextVar[Debug] = ContextVar("vdcache_debug", default=_NOTHING)
_listeners: ContextVar[tuple[Callable[[PassRun], None], ...]] = ContextVar("vdcache_listeners", default=())


def current() -> Debug:
    """What is looked at here and now: the environment's words and those of `debug` around this code.

    Raises:
        ConfigError: VDCACHE_DEBUG holds a word that does not exist.
    """
    return Debug.of(os.environ.get("VDCACHE_DEBUG", "")) | _asked.get()


@contextlib.contextmanager
def debug(*words: str) -> Iterator[None]:
    """Look at every pass that runs inside, on standard error: `with vdcache.debug("changed", "dump:graphs"): …`.

    Args:
        words: "changed" (the lines of the graph that a pass changed), "refusals", "timing", "verify" (check every fact after every
            pass), "dump:DIR" (write every graph).

    Raises:
        ConfigError: a word that does not exist.
    """
    token = _asked.set(_asked.get() | Debug.of(",".join(words)))
    try:
        yield
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def listening(listener: Callable[[PassRun], None]) -> Iterator[None]:
    """Call `listener` after every pass that runs inside."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


class PipelineObserver:
    """One run of a pipeline under the eyes of `debug`, of listeners and of the log."""

    def __init__(self, graph: fx.GraphModule, text: str) -> None:
        self.debug, self._listeners, self._text = current(), _listeners.get(), text
        self._writes = self.debug.changed or _LOG.isEnabledFor(logging.DEBUG)
        self._before: Any = None
        self._folder = Path(self.debug.dump) / f"{os.getpid()}_{next(_COUNT):03d}" if self.debug.dump else None
        if self._folder is not None:
            save_graph(self._folder / "00_before.txt", graph, comment=f"before {text}")

    def before(self, graph: fx.GraphModule) -> None:
        text = dump(graph) if self._writes or self._folder is not None else ""
        self._before = text, copy_graph(graph) if self._listeners or self._folder is not None else None

    def after(self, a_pass: Pass, step: PassRecord, graph: fx.GraphModule, index: int) -> None:
        text, copied = self._before
        _LOG.info("%s: %d rewrites, %d refusals, %.1f ms", step.text, step.rewrites, len(step.refusals), step.seconds * 1e3)
        if self._writes and step.rewrites:
            changes = changes_text(text, dump(graph))
            _LOG.debug("%s changed\n%s", step.text, changes)
            if self.debug.changed:
                _say(f"vdcache: {step.text} changed\n{changes}")
        if self.debug.refusals and step.refusals:
            _say(f"vdcache: {step.text} left alone\n{refusals_text(step, graph)}")
        if self.debug.timing:
            _say(f"vdcache: {step.seconds * 1e3:8.1f} ms  {step.rewrites:4d} rewrites  {step.text}")
        if self._folder is not None:
            save_graph(self._folder / f"{index + 1:02d}_{a_pass.name}.txt", graph, comment=f"after {step.text}")
        if self._listeners:
            seen = PassRun(a_pass, copied, copy_graph(graph), step)
            for listener in self._listeners:
                listener(seen)

    def failed(self, a_pass: Pass, error: Exception) -> None:
        """Write what reproduces the failure, where files are asked for."""
        if self._folder is None:
            return
        path = self._folder / f"failed_{a_pass.name}.txt"
        save_graph(path, self._before[1], comment=f"{type(error).__name__}: {error}", pipeline=readable(a_pass))
        error.add_note(f"to see it again: vdcache opt {path}")


def changes_text(before: str, after: str) -> str:
    """The lines that differ."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1)
    return "\n".join(lines) or "(nothing that the text shows)"


def refusals_text(step: PassRecord, graph: fx.GraphModule) -> str:
    """Every refusal with its reasons, and the number that its node has in the text of the graph."""
    number = {n.name: i for n, i in numbers(graph.graph).items()}
    lines = []
    for refusal in step.refusals:
        place = f"%{number[refusal.node]} ({refusal.node})" if refusal.node in number else refusal.node
        lines += [f"  {place}: {reason}" for reason in refusal.reasons]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
