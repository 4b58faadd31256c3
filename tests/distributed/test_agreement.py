"""Ranks that run one model together, in real processes: two of them for nearly all tests here."""

from __future__ import annotations

import pytest

from tests.support.ranks import RankProcesses

PROGRAMS = "tests.support.rank_programs:"
EDGES = list(range(10))  # seeds of each recipe; `make thorough` runs 250
FAULTS = ("a metric after it was agreed", "nothing is stored", "no capture")


@pytest.fixture(scope="module")
def pair():
    with RankProcesses(2) as processes:
        yield processes


def test_ranks_with_their_own_requests_exchange_nothing(pair):
    assert pair.run(f"{PROGRAMS}alone_in_data") == [[None, False, [*range(4)]], [None, False, [*range(7)]]]


@pytest.mark.parametrize(("recipe", "size"), [("every-3", 12), ("fbcache-0.3", 8)])  # fbcache communicates before it decides
def test_a_spread_model_gives_what_one_process_gives(pair, recipe, size):
    """Also with unequal shards: 9 tokens are 5 and 4."""
    first, second = pair.run(f"{PROGRAMS}generation", recipe, 6, size, 1 + (size == 8))
    for own in (first, second):
        assert own["error"] <= 1e-5
        alone, spread = own["plans"]
        assert alone == spread and len(spread) < 6
        assert own["metrics"][1] == pytest.approx(own["metrics"][0], rel=1e-5)
        assert own["exchanges"] <= 12
    whole = first["bytes"][0]
    if size == 12:
        assert [first["bytes"][1], second["bytes"][1]] == [whole * 5 // 9, whole * 4 // 9]


def test_a_reused_step_holds_no_collective(pair):
    first, second = pair.run(f"{PROGRAMS}collectives", "every-3")
    assert first == second and first["computed"] == [0, 3, 5]
    assert first["collectives"] == {"recompute": 12, "reuse{all}": 0}


@pytest.mark.parametrize("kind", ["adacache", "teacache"])
def test_plans_are_equal_where_a_metric_is_at_the_threshold(pair, kind):
    first, second = pair.run(f"{PROGRAMS}at_the_edge", kind, EDGES)
    assert first["plans"] == second["plans"] and not first["apart"]
    assert any(len(plan) < 8 for plan in first["plans"])
    assert first["own metrics that differ"] == len(first["plans"]) > 0, "each rank alone would measure something else"


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_on_one_rank_makes_no_other_plan(pair, name):
    first, second = pair.run(f"{PROGRAMS}fault", name)
    assert first["error"] == second["error"] == "" and first["seconds"] < 5
    assert first["reused"] == second["reused"]
    assert any("rank" in why for why in first["why"])


def test_weights_that_are_spread_are_exact_and_a_reused_step_communicates_nothing(pair):
    """Weights that are DTensors: the ranks of their mesh agree, so they skip their collectives together."""
    for found in pair.run("tests.support.parallel_library:tensor_parallel"):
        assert found["computed"] == [0, 3, 5] and found["flops"] < 0.2
        assert found["exact"] == [step in found["computed"] for step in range(6)]
        assert found["exchanged"][0] > 0 and found["exchanged"][1] == 0


def test_all_ranks_follow_the_first_one_s_calibration(pair, tmp_path):
    first, second = pair.run(f"{PROGRAMS}calibrated", str(tmp_path / "kept"), 6)
    assert first["schedule"] == second["schedule"] and first["tried"] == second["tried"] != []
    assert first["plans"] == second["plans"] and first["plans"][0] == [*range(6)] and len(first["plans"][1]) < 6
    assert first["files"] and not second["files"] and not first["apart"]


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["context_parallel", "fsdp"])
@pytest.mark.filterwarnings("ignore")
def test_parallelism_of_others_passes_through(pair, how):
    """diffusers' Ulysses and FSDP2, on a class of diffusers. Dynamo breaks the model at their hooks, so it is several graphs."""
    pytest.importorskip("diffusers")
    first, second = pair.run(f"tests.support.parallel_library:{how}")
    assert first == second and first["error"] <= 1e-5 and not first["apart"]
    assert first["computed"] == [0, 3, 5] and any(first["slots"])
    for graph in first["collectives"]:
        assert not graph.get("reuse{all}")
    assert any(graph["recompute"] for graph in first["collectives"]) == (how == "context_parallel")


def test_a_rank_that_is_killed_is_named(pair):
    """The last test of this pair."""
    first, second = pair.run(f"{PROGRAMS}fault", "killed within the call", timeout=60)
    assert second is None
    assert "RankError: rank 1" in first["error"] and "step 4 of generation 1" in first["error"] and first["seconds"] < 5
