"""One verdict for a model: what its graphs hold, judged together when its forward has run, and why Dynamo broke it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

from vdcache.backends.inductor import graph_breaks, modes_in_force
from vdcache.backends.settings import Settings
from vdcache.errors import CaptureError
from vdcache.ir.capture import first_line

__all__ = ["Verdict", "breaks_since"]

# Of a forward's code, which Dynamo leaves alone for the process where its first call went wrong: what went wrong.
_spoilt: weakref.WeakKeyDictionary[CodeType, str] = weakref.WeakKeyDictionary()


class Verdict:
    """What was found in the graphs of one model, and in which it was not.

    Args:
        settings: who says it, and whether what is missing is an error.
        model: the module or function whose forward it is.
    """

    def __init__(self, settings: Settings, model: Callable[..., Any]) -> None:
        self._settings = settings
        self._code = getattr(getattr(model, "forward", model), "__code__", None)
        self._before = graph_breaks()
        self._found: set[str] = set()
        self._lacking: dict[str, tuple[int, str]] = {}
        self.settled = False  # some call was cached, or the next steps' may be
        self.ends = ""  # why a graph ended where it did, with the user's line

    def has(self, what: str) -> None:
        """A graph holds it: "slot", "probe" or "mask"."""
        self._found.add(what)

    def lacks(self, what: str, size: int, message: str) -> None:
        """A graph of so many operations does not hold it; of several the largest one speaks."""
        if size >= self._lacking.get(what, (-1, ""))[0]:
            self._lacking[what] = size, message

    def why(self, what: str) -> str:
        """Why nothing of this model holds it; "" where something does, or nobody looked."""
        if what in self._found or what not in self._lacking:
            return ""
        because = self.because("Compiled as one graph, it may be cached.")
        return self._lacking[what][1] + (f"\n{because}" if because else "")

    def judge(self, placed: bool, but: tuple[str, ...] = ()) -> None:
        """A call has ended: say once what no graph of the model holds.

        Args:
            placed: whether it is known which step the call belongs to.
            but: what somebody else says.

        Raises:
            CaptureError: under `strict`, what no graph of the model holds.
        """
        if placed and "slot" in self._found and not self.settled:
            self.settled = True
            if self._code is not None:
                _spoilt.pop(self._code, None)
        for what in [w for w in self._lacking if w not in but]:
            if message := self.why(what):
                if self._settings.strict:
                    raise CaptureError(message)
                aside = "" if what == "mask" else "vdcache steps aside, the model runs as plain torch.compile would run it: "
                self._settings.warn_once(f"lacks {what}", f"{aside or 'vdcache: '}{message}")

    # ---- what went wrong before --------------------------------------------------------------------------------------

    def runs(self) -> None:
        """A call begins: note what keeps Dynamo from compiling it."""
        if (modes := modes_in_force()) and self._code is not None:
            _spoilt[self._code] = f"a call of this model ran under {modes}, where Dynamo does not compile all of it"

    def failed(self, error: BaseException) -> None:
        """A call ended in an error of the user's."""
        if self._code is not None and not self.settled:
            _spoilt[self._code] = f"a call of this model failed ({type(error).__name__}: {first_line(error)})"

    def because(self, advice: str = "") -> str:
        """Why Dynamo breaks the forward or leaves it alone, in sentences; "" where nothing is known.

        Args:
            advice: what to do about a break.
        """
        if self._code is not None and (cause := _spoilt.get(self._code)):
            return (
                f"Before, {cause}, and Dynamo leaves alone for the rest of the process what it could not compile then: "
                "torch._dynamo.reset() makes it try again."
            )
        reason = self.ends or next(iter(breaks_since(self._before)), "")
        return f"Dynamo breaks the forward into several graphs: {reason.rstrip('.')}. {advice}".strip() if reason else ""


def breaks_since(before: dict[str, int]) -> list[str]:
    """Why Dynamo has broken forwards since it had counted these breaks, the last one first."""
    return [_short(reason) for reason, n in reversed(graph_breaks().items()) if n > before.get(reason, 0)]


def _short(reason: str) -> str:
    """What Dynamo says first, and which function it leaves uncompiled because the break stands in a loop."""
    skipped = re.search(r"frame skipped: (\S+) \((.+) line (\d+)\)", reason)
    return first_line(reason) + (f" (in a loop of {skipped[1]}, {skipped[2]}:{skipped[3]})" if skipped else "")
