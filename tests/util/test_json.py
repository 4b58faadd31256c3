"""Dataclasses to JSON and back: what is written, what is read, and each way of being something else."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from vdcache.errors import ConfigError
from vdcache.util.fields import at_least
from vdcache.util.json import from_plain, read_json, write_json


@dataclass(frozen=True)
class Inner:
    name: str
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    steps: int
    rows: tuple[tuple[float, ...], ...]
    inner: Inner
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    exact: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps is at least 1; got {self.steps}")


ONE = Outer(3, ((1, 2.5), (math.inf,)), Inner("a"), (Inner("b", 0.5),), {"k": (1, 2)}, {"torch": "2"}, True)


def test_there_and_back(tmp_path):
    text = write_json(ONE, tmp_path / "one.json", indent=1)
    assert (tmp_path / "one.json").read_text() == text
    assert read_json(Outer, text, "thing") == read_json(Outer, tmp_path / "one.json", "thing") == ONE
    assert read_json(Outer, str(tmp_path / "one.json"), "thing") == ONE


def test_fields_with_defaults_may_be_missing_unless_all_are_asked_for():
    data = {"steps": 1, "rows": [], "inner": {"name": "a"}}
    assert from_plain(Outer, data, "outer") == Outer(1, (), Inner("a"))
    with pytest.raises(ConfigError, match="'outer' has no field 'by_name'"):
        from_plain(Outer, data, "outer", complete=True)


def test_what_is_left_out_and_what_is_added_for_readers():
    text = write_json(ONE, without=["many", "by_name"], also={"total": 7})
    assert json.loads(text)["total"] == 7 and "many" not in json.loads(text)
    assert read_json(Outer, text, "thing", without=["total"]).many == ()
    with pytest.raises(ConfigError, match="unknown field 'total'"):
        read_json(Outer, text, "thing")


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"steps": "3"}, "'thing.steps' is '3', not int"),
        ({"steps": True}, "'thing.steps' is True, not int"),
        ({"steps": 0}, "steps is at least 1; got 0"),
        ({"exact": 1}, "'thing.exact' is 1, not bool"),
        ({"rows": [[1, None]]}, "'thing.rows[0][1]' is None, not float"),
        ({"rows": 3}, "'thing.rows' is 3, not tuple[tuple[float, ...], ...]"),
        ({"inner": 3}, "'thing.inner' is 3, not an object"),
        ({"inner": {}}, "'thing.inner' has no field 'name'"),
        ({"many": [{"name": "b", "more": 1}]}, "'thing.many[0]' has an unknown field 'more'"),
        ({"by_name": {"k": [0.5]}}, "'thing.by_name.k[0]' is 0.5, not int"),
    ],
)
def test_something_else(change, detail):
    text = json.dumps({**json.loads(write_json(ONE)), **change})
    with pytest.raises(ConfigError, match=re.escape(f"this is no thing: it was not written by Outer.to_json ({detail})")):
        read_json(Outer, text, "thing")


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "3", "{", "null"])
def test_text_that_is_no_object_of_json(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    for source in (text, tmp_path / "x.json"):
        with pytest.raises(ConfigError, match=r"this is no thing: it was not written by Outer\.to_json"):
            read_json(Outer, source, "thing")


@dataclass(frozen=True)
class Bounded:
    count: Annotated[int, at_least(1)] | None = None


@pytest.mark.parametrize("count", [None, 3])
def test_a_field_with_a_bound_may_be_none(count):
    assert read_json(Bounded, write_json(Bounded(count)), "bounded") == Bounded(count)
