"""What must hold for every pipeline, and each other mode on one of them; the table in the documentation is the recorded one.

`python -m tests.pipelines.modes` checks every mode on every pipeline and records it.
"""

from __future__ import annotations

import json

import pytest

from tests.pipelines.modes import MODES, PAGE, RESULTS, result, table, written
from tests.pipelines.tiny import PIPELINES
from tests.support.thorough import THOROUGH, some

pytest.importorskip("diffusers")

MUST = ("always", "called again", "after an error")  # the second also takes vdcache off and looks at the steps
OTHERS = [m for m in MODES if m not in MUST]
QUICK = ("CogVideoX", "PixArt", "LTX", "Sana")  # each mode on one of these
COMPILES = ("LoRA", "int8 weights", "dynamic shapes", "several prompts")  # again and again: on the one with the fewest layers
ON = {m: QUICK[i % len(QUICK)] for i, m in enumerate(OTHERS)} | dict.fromkeys(COMPILES, "CogVideoX")


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RESULTS.read_text())


# Wan's and Wan 2.2's loop with another timestep, and PixArt's with frames
@pytest.mark.parametrize("name", some(PIPELINES, lambda name: name not in ("Wan 2.2 TI2V", "Allegro")))
def test_every_pipeline(name):
    """A recipe that reuses nothing compiles everything again, so `make test` has it on a few."""
    checks = [m for m in MUST if m != "always" or THOROUGH or name in QUICK]
    assert [result(name, check) for check in checks] == ["yes"] * len(checks)


@pytest.mark.parametrize(("check", "name"), ON.items())
def test_every_mode(check, name):
    assert result(name, check) == recorded()[name][check]


def test_the_record_is_of_all_pipelines_and_modes_and_nothing_failed():
    rows = recorded()
    assert list(rows) == list(PIPELINES) and all(list(row) == list(MODES) for row in rows.values())
    assert not [cell for row in rows.values() for cell in row.values() if "FAILED" in cell]


def test_the_page_shows_what_was_recorded():
    page = PAGE.read_text()
    assert table(recorded()) in page and written(page, recorded()) == page
