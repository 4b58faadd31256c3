"""Fields of a dataclass, held to their annotations."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest

from vdcache.errors import ConfigError
from vdcache.util.fields import Bound, Checked, Group, VideoGrid, above, ascending, at_least, between, one_of, some


@dataclass(frozen=True)
class Plain(Checked):
    count: Annotated[int, at_least(1)] = 1
    share: Annotated[float, between(0, 1)] = 0.5
    factor: Annotated[float, above(0)] | None = None
    gate: Annotated[str, one_of("post", "pre")] = "post"
    kind: Annotated[str, one_of("mlp", empty="all kinds")] = ""
    steps: Annotated[tuple[Annotated[int, at_least(0)], ...], some, ascending] = (0,)
    window: tuple[int, float] = (1, 2.0)
    names: frozenset[str] = frozenset()
    group: Group = "all"
    grid: VideoGrid = ()
    start: int | Annotated[float, between(-1, 1, "a share")] = 0
    odd: Annotated[int, Bound(lambda v: v % 2, noun="an odd number")] = 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "Plain: count is a whole number of at least 1; got 0"),
        ({"count": True}, "Plain: count is a whole number of at least 1; got True"),
        ({"count": 1.0}, "Plain: count is a whole number of at least 1; got 1.0"),
        ({"share": math.nan}, "Plain: share is a number between 0 and 1; got nan"),
        ({"factor": math.inf}, "Plain: factor is a number above 0 or none; got inf"),
        ({"gate": "mid"}, "Plain: gate is 'post' or 'pre'; got 'mid'"),
        ({"kind": "conv"}, "Plain: kind is 'mlp', or empty for all kinds; got 'conv'"),
        ({"steps": ()}, "Plain: steps is a list of whole numbers of at least 0, at least one, in ascending order; got ()"),
        (
            {"steps": (2, 1)},
            "Plain: steps is a list of whole numbers of at least 0, at least one, in ascending order; got (2, 1)",
        ),
        ({"steps": "12"}, "Plain: steps is a list of whole numbers of at least 0, at least one, in ascending order; got '12'"),
        ({"window": (1,)}, "Plain: window is a list of 2 whole numbers; got (1,)"),
        ({"names": [1]}, "Plain: names is a list of words; got [1]"),
        ({"group": "a/b"}, "Plain: group is a name of letters, digits and dots; got 'a/b'"),
        (
            {"grid": (1, 2)},
            "Plain: grid is (frames, height, width) of the video tokens, three whole numbers of at least 1; got (1, 2)",
        ),
        ({"start": 1.5}, "Plain: start is a whole number or a share between -1 and 1; got 1.5"),
        ({"odd": 2}, "Plain: odd is an odd number; got 2"),
    ],
    ids=str,
)
def test_a_value_that_is_not_what_its_field_says(given, message):
    with pytest.raises(ConfigError) as found:
        Plain(**given)
    assert str(found.value) == message


def test_sequences_and_numbers_take_the_form_of_the_annotation():
    made = Plain(count=np.int64(3), steps=np.arange(3), names=["a", "b"], share=np.float32(0.5), window=[1, 2])
    assert made == Plain(3, 0.5, steps=(0, 1, 2), names=frozenset("ab"), window=(1, 2))
    assert [type(v) for v in (made.count, made.share, *made.steps)] == [int, float, int, int, int]


def test_annotations_that_only_a_type_checker_sees_are_not_held_to():
    @dataclass(frozen=True)
    class Loose(Checked):
        value: "Nowhere" = 1  # noqa: F821

    assert Loose("x").value == "x"
