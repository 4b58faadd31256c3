"""What happened: one record a call. Everything that a person sees is made from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from vdcache.errors import ConfigError
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan

__all__ = ["History", "Record", "any_computed", "by_generation", "record", "unused"]


class Timer(Protocol):
    """A clock of the device, as `DeviceTime` is one. Packages run where there is no torch, so this file knows no more of it."""

    def done(self) -> bool: ...
    def seconds(self) -> float: ...


@dataclass
class Record:
    """One call of the model's graph.

    Args:
        generation, step, lane: where in the run, each counted from 0; `lane` is a name where the user gave one. Before any step is known,
            generation and step are −1.
        timestep: the timestep (the largest one of a batch), None under explicit control.
        plan: what the step was meant to reuse.
        reused: slots that were really reused in this call.
        measures: what was observed at this step over all its lanes, filled in when the next step is planned.
        seconds: time of the call on its device. On a GPU it is read when somebody asks for it, which waits for the call to end there.
        why: the reason for recomputing where the plan says reuse, or for a plan that the policy did not choose.
        syncs: how many times the call waited for a device value.
        probe: what was measured at this step before its plan was chosen, by policies that decide so.
        host_seconds: host time of the call. A GPU may still be working when it ends.
    """

    generation: int
    step: int
    lane: int | str
    timestep: float | None
    plan: Plan
    reused: tuple[str, ...]
    measures: tuple[MetricValue, ...] = ()
    seconds: float = 0.0
    why: str = ""
    syncs: int = 0
    probe: tuple[MetricValue, ...] = ()
    host_seconds: float = 0.0

    @property
    def computed(self) -> bool:
        return not self.reused

    def timed(self, device: Timer | None, host_seconds: float) -> None:
        """How long the call took: on the host, and by its device's events where it has them."""
        self.host_seconds = self._seconds = host_seconds  # type: ignore[misc]
        self._device = device  # type: ignore[misc]

    def settle(self) -> bool:
        """Take the time from the device's events if nothing needs to be waited for. Whether it is known now."""
        if self._device is not None and self._device.done():
            self.seconds  # noqa: B018 — reading it is what settles it
        return self._device is None

    # Class variables to the dataclass, which makes no fields of them; every record has its own.
    _device: ClassVar[Timer | None] = None
    _seconds: ClassVar[float] = 0.0


def _seconds(record: Record) -> float:
    if record._device is not None:
        _set_seconds(record, record._device.seconds())
    return record._seconds


def _set_seconds(record: Record, seconds: float) -> None:
    record._seconds, record._device = seconds, None  # type: ignore[misc]


Record.seconds = property(_seconds, _set_seconds)  # type: ignore[assignment,method-assign]  # a field whose value may come late


SHOWN = 8  # generations that `print(history)` has a line for


@dataclass(repr=False)
class History:
    """Records in order of calls. At most `limit` are kept, the oldest go first. Prints as a line a generation."""

    records: list[Record] = field(default_factory=list)
    limit: int = 100_000

    def add(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) > self.limit:
            del self.records[: self.limit // 10]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: int) -> Record:
        return self.records[at]

    def __repr__(self) -> str:
        generations = len({r.generation for r in self.records})
        return f"<History of {len(self.records)} calls in {generations} generation{'s' * (generations != 1)}>"

    def __str__(self) -> str:
        found: dict[int, list[Record]] = {}
        for record in self.records:
            found.setdefault(record.generation, []).append(record)
        lines = [repr(self)]
        if len(found) > SHOWN:
            lines.append(f"  … {len(found) - SHOWN} earlier")
        for number, records in [*found.items()][-SHOWN:]:
            if all(r.step < 0 for r in records):
                calls = f"{len(records)} call{'s' * (len(records) != 1)}"
                lines.append(f"  {calls} before any step was known, computed")
                continue
            steps, lanes = len({r.step for r in records}), len({r.lane for r in records})
            computed = self.computed_steps(number)
            which = f": {', '.join(map(str, computed))}" if len(computed) < steps else ""
            guidance = f", {lanes} lanes" if lanes > 1 else ""
            lines.append(f"  generation {number}{guidance}: {len(computed)} of {steps} steps computed{which}")
        return "\n".join(lines)

    def generation(self, number: int = -1) -> list[Record]:
        """The records of one generation, the last one by default."""
        if number < 0 and self.records:
            number = self.records[-1].generation + 1 + number
        return [r for r in self.records if r.generation == number]

    def computed_steps(self, generation: int = -1) -> list[int]:
        """The steps of a generation in which at least one lane was computed; not what ran before any step was known."""
        steps: dict[int, list[Record]] = {}
        for record in (r for r in self.generation(generation) if r.step >= 0):
            steps.setdefault(record.step, []).append(record)
        return sorted(step for step, records in steps.items() if any_computed(records))

    def rows(self) -> list[dict[str, Any]]:
        """Plain records, as `to_json` writes them."""
        return [
            {
                **asdict(r),
                "plan": sorted(r.plan.reuse),
                "measures": [asdict(m) for m in r.measures],
                "probe": [asdict(m) for m in r.probe],
            }
            for r in self.records
        ]

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.rows(), indent=1))

    @staticmethod
    def from_json(path: str | Path) -> History:
        records = []
        for row in json.loads(Path(path).read_text()):
            row["plan"] = Plan.of(row["plan"]) if row["plan"] else RECOMPUTE
            for kind in ("measures", "probe"):
                row[kind] = tuple(MetricValue(**m) for m in row.get(kind, ()))
            row["reused"] = tuple(row["reused"])
            records.append(Record(**row))
        return History(records)


def any_computed(step: Iterable[Record]) -> bool:
    """Whether at least one lane of a step was computed: none of the graphs that its forward consists of reused anything."""
    reused: dict[int | str, bool] = {}
    for record in step:
        reused[record.lane] = reused.get(record.lane, False) or not record.computed
    return not all(reused.values())


def by_generation(records: Iterable[Record], what: str) -> list[dict[int, list[Record]]]:
    """Records by generation and step: whole generations of equal length, as whatever is derived from them needs.

    Raises:
        ConfigError: no record, steps that are missing, generations of unequal length.
    """
    found: dict[int, dict[int, list[Record]]] = {}
    for r in records:
        found.setdefault(r.generation, {}).setdefault(r.step, []).append(r)
    if not found:
        raise ConfigError(f"{what} is derived from at least one generation, and this history holds no call")
    lengths = {len(steps) for steps in found.values()}
    if len(lengths) > 1 or any(set(steps) != set(range(len(steps))) for steps in found.values()):
        raise ConfigError(f"{what} is derived from whole generations of one length; these have {sorted(lengths)} steps")
    return list(found.values())


_recorders: ContextVar[tuple[History, ...]] = ContextVar("vdcache_recorders", default=())


@contextlib.contextmanager
def record() -> Iterator[History]:
    """Collect the records of every call inside, of all models: what the string door of torch.compile has instead of a handle.

    Generations are counted a model, so give each model a `with` of its own where several run.
    """
    history = History()
    token = _recorders.set((*_recorders.get(), history))
    try:
        yield history
    finally:
        _recorders.reset(token)


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Calls inside are vdcache's own, and nobody who is recording is told of them."""
    token = _recorders.set(())
    try:
        yield
    finally:
        _recorders.reset(token)


def tell(entry: Record) -> None:
    """Hand a record to everybody who is recording."""
    for history in _recorders.get():
        history.add(entry)
