"""Searching masks and looking at tiles, against whole models that are run by hand with one attention changed at a time."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from torch import nn

import vdcache
from tests.support.block_lists import Stack
from tests.support.tile_masks import written_out
from vdcache import Recipe
from vdcache.attention.autotune import TuningResult
from vdcache.attention.masks import parse_mask
from vdcache.calibration import MaskPlan, TileReport
from vdcache.calibration import graph_replay as replaying
from vdcache.calibration import mask_search as search
from vdcache.calibration.graph_replay import final_states, record
from vdcache.calibration.mask_search import _Search, _Table
from vdcache.calibration.tile_report import _overlap
from vdcache.errors import CacheStateError, ConfigError
from vdcache.passes.tile_attention import TileAttention
from vdcache.patterns.cost import flops
from vdcache.testing import TinyDiT, latent, time_of

BLOCKS, STEPS, GRID = 3, 3, (4, 2, 2)
MASKS = ("frames:2", "frames:1", "frames:0")  # from dense to sparse
QUIET = Console(quiet=True)


def call(step, seed=0):
    x = latent(seed, 1, 4, *GRID) + 0.1 * step * latent(50 + seed, 1, 4, *GRID)
    return x, time_of(step), latent(9, 1, 3, 4)


def generate(model, seed=0, steps=STEPS):
    with torch.no_grad():
        return [model(*call(step, seed))[0] for step in range(steps)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def stack(two=True):
    """With attention that is not almost even, so that masks matter."""
    model = Stack(two, blocks=BLOCKS)
    for block in model.qkv:
        for layer in block:
            layer.weight[:16].mul_(4)
    return model


def by_hand(model, args, masks, text):
    """The final hidden states, and the weights of every attention, where the i-th has the i-th mask."""
    keeps = [written_out(parse_mask(m), GRID, 0, text) for m in masks]
    weights, hidden = [], []

    def attend(q, k, v):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keeps[len(weights)], -torch.inf)
        weights.append(scores.softmax(-1))
        return weights[-1] @ v

    hook = model.out.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        with torch.no_grad():
            model(*args)
    finally:
        F.scaled_dot_product_attention = before
        hook.remove()
    return hidden[0], weights


def loss_by_hand(model, masks, text, seeds=(0,), steps=STEPS, base=()):
    """The largest mean squared error of all calls."""
    dense = ["dense"] * BLOCKS
    calls = [call(step, seed) for seed in seeds for step in range(steps)]
    pairs = [(by_hand(model, c, masks, text)[0], by_hand(model, c, dense, text)[0]) for c in calls]
    return max(float((a - b).square().mean()) for a, b in pairs)


@pytest.fixture(scope="module")
def replay():
    """All calls of one run, for tests of what comes after recording."""
    torch._dynamo.reset()
    return record(stack(), generate, None, "a test", keep=STEPS)


@pytest.fixture
def recorded(replay, monkeypatch):
    monkeypatch.setattr(search, "record", lambda *_, **__: replay)


def searched(model=None, masks=MASKS, run=generate, **options):
    return vdcache.search_masks(stack() if model is None else model, run, masks, console=QUIET, timesteps=STEPS, **options)


def everything(model=None, **options):
    """Every loss, and no times."""
    return searched(model, budget=1.0, cost="weights", **options)


def whole_graph(model):
    torch._dynamo.reset()
    one = record(model, generate, None, "a test", keep=1)
    return one._needed


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("two", "prompts"), [(False, None), (True, (0, 3))])
def test_a_loss_is_that_of_the_whole_model_with_one_attention_under_its_mask(two, prompts, monkeypatch):
    model, text = stack(two), 3 * two
    done, evaluate = [], replaying._evaluate
    monkeypatch.setattr(
        replaying, "_evaluate", lambda graph, node, given: (done.append(flops(node)), evaluate(graph, node, given))[1]
    )
    run = generate if prompts is None else lambda m, seed: generate(m, seed)
    plan = everything(model, masks=["frames:0", "dense", "frames:2", "frames:1"], run=run, prompts=prompts)
    assert plan.options == ("dense", *MASKS), "densest first"
    calls = STEPS * len(prompts or (0,))
    assert 1 < plan.work <= BLOCKS * len(MASKS) * calls * sum(map(flops, whole_graph(model))) / sum(done)
    assert plan.densities == ((1.0, *(parse_mask(m).density(*GRID, text=text) for m in MASKS)),) * BLOCKS
    for i, row in enumerate(plan.losses):
        want = [loss_by_hand(model, ["dense"] * i + [m] + ["dense"] * (BLOCKS - 1 - i), text, prompts or (0,)) for m in MASKS]
        assert row == (0.0, *(pytest.approx(w, rel=1e-4) for w in want)) and min(want) > 1e-6
    assert plan.masks == ("dense",) * BLOCKS and plan.seconds == () and plan.speedup is None and plan.density == 1.0
    assert plan.sites == tuple(f"scaled_dot_product_attention{n}" for n in ("", "_1", "_2")) and len(plan.modules) == BLOCKS


def test_later_attentions_see_the_masks_of_earlier_ones_where_that_is_asked_for(recorded):
    """Line 17 of algorithm 1, with the whole model run once for each loss."""
    model = stack()
    alone = everything(model).losses
    threshold = sorted(v for row in alone for v in row)[-3]
    want, table = [], []
    for i in range(BLOCKS):
        best, row = "dense", [0.0, None, None, None]
        for j, mask in enumerate(MASKS, start=1):
            row[j] = loss_by_hand(model, [*want, mask, *["dense"] * (BLOCKS - 1 - i)], 3)
            if not row[j] < threshold:
                break
            best = mask
        want.append(best)
        table.append(row)
    plan = searched(model, threshold=threshold, cumulative=True)
    assert plan.masks == tuple(want) and len(set(want)) > 1 and plan.rule == f"loss below {threshold:g}, cumulative"
    for got, row in zip(plan.losses, table, strict=True):
        assert got == tuple(v if v is None else pytest.approx(v, rel=1e-4) for v in row)
    assert plan.losses[1][1] != pytest.approx(alone[1][1], rel=1e-4), "the first attention has its mask by then"


class Parallel(Stack):
    """Two attentions of a block read the same values."""

    def block(self, i, streams):
        (h,) = streams
        qkv = [self.qkv[i][s](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4) for s in range(2)]
        for q, k, v in qkv:
            h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return [h + self.mlp[i][0](h)]


def test_the_losses_of_attentions_that_stand_side_by_side():
    model = Parallel(False, blocks=1)
    plan = everything(model)
    assert len(plan.sites) == 2
    for i, row in enumerate(plan.losses):
        masks = [["dense"] * i + [m] + ["dense"] * (1 - i) for m in MASKS]
        calls = [call(step) for step in range(STEPS)]
        want = [
            max(float((by_hand(model, c, m, 0)[0] - by_hand(model, c, ["dense"] * 2, 0)[0]).square().mean()) for c in calls)
            for m in masks
        ]
        assert row[1:] == tuple(pytest.approx(w, rel=1e-4) for w in want)


# ---- one replay, many tables -----------------------------------------------------------------------------------------


def algorithm_1(table, threshold):
    """Of each layer the sparsest mask before the first whose loss is not below r (Efficient-vDiT, listing 1)."""
    chosen = []
    for row in table:
        good = list(itertools.takewhile(lambda loss: loss < threshold, row))
        chosen.append(("dense", *MASKS)[len(good)])
    return chosen


values = st.sampled_from([0.0, 0.125, 0.25, 0.5, float("nan"), float("inf")])
tables = st.lists(st.tuples(values, values, values), min_size=BLOCKS, max_size=BLOCKS)


@given(table=tables, threshold=st.sampled_from([0.125, 0.25, 0.3]), known=st.sets(st.tuples(*[st.integers(0, 2)] * 2)))
@settings(deadline=None, max_examples=40)
def test_algorithm_1(replay, table, threshold, known):
    """Strictly below r, whatever is known already; nothing is measured that the choice does not need."""
    held = _Table(None, replay, ("dense", *MASKS), False)
    for i, j in known:
        held.put(i, j + 1, table[i][j])
    one, asked = _Search(replay, ("dense", *MASKS), held), []
    at = {site: i for i, site in enumerate(replay.sites)}

    def loss(site, run, want, option):
        asked.append((at[site], MASKS.index(option)))
        return table[at[site]][MASKS.index(option)]

    one._loss = loss
    with Progress(console=QUIET) as progress:
        assert one.losses(progress, threshold, False) == algorithm_1(table, threshold)
    needed = {(i, j) for i, row in enumerate(table) for j in range(3) if all(v < threshold for v in row[:j])}
    assert set(asked) == needed - known and len(asked) == len(set(asked)) * len(replay.calls)


def test_what_one_loss_costs(replay, monkeypatch):
    """What lies before an attention, and what no attention changes, is computed once for all masks."""
    done, evaluate = [], replaying._evaluate
    monkeypatch.setattr(replaying, "_evaluate", lambda graph, node, given: (done.append(node), evaluate(graph, node, given))[1])

    def spent():
        count = sum(map(flops, done))
        assert len(done) == len(set(done)), "nothing is computed twice"
        done.clear()
        return count

    end = replay.start(replay.calls[0]).finish()
    assert spent() == replay.flops_after(None)
    one = replay.start(replay.calls[0])
    for site in replay.sites:
        one.until(site)
        value = one.compute(site)
        done.clear()
        for _ in range(2):
            assert torch.equal(one.end_with(site, value), end)
            assert spent() == replay.flops_after(site) - flops(site)
        one.put(site, value)
    assert torch.equal(one.finish(), end) and torch.equal(final_states(replay)[0], end)


def test_what_nothing_reads_any_more_is_forgotten(replay):
    one = replay.start(replay.calls[0])
    first, second = replay.sites[:2]
    one.until(first)
    one.put(first, one.compute(first))
    one.until(second)
    place = replay.places[first]
    assert not {place.query, place.key, place.value} & set(one.values)


def test_calls_are_kept_at_random_and_are_copies():
    seen = []

    def run(model, seed):
        x, _, text = call(0, seed)
        with torch.no_grad():
            for step in range(8):
                x.copy_(call(step, seed)[0])
                model(x, time_of(step), text)
                seen.append(x.clone())

    def kept(draw):
        torch._dynamo.reset()
        seen.clear()
        found = record(stack(), run, [0, 3], "a test", keep=3, seed=draw)
        place = next(i for i, v in enumerate(found.calls[0].inputs) if isinstance(v, torch.Tensor) and v.shape == seen[0].shape)
        numbers = [next(n for n, x in enumerate(seen) if torch.equal(x, c.inputs[place])) for c in found.calls]
        assert [c.prompt for c in found.calls] == [0] * 3 + [1] * 3 and len(set(numbers)) == 6
        assert [n // 8 for n in numbers] == [0] * 3 + [1] * 3
        return numbers, found.fingerprint()

    first, again, other = kept(0), kept(0), kept(1)
    assert first == again and first[0] != other[0] and first[1] != other[1]


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_of_weights(recorded):
    plan = searched(budget=0.7, cost="weights")
    best = min(
        (sum(row[c] for row, c in zip(plan.losses, choice, strict=True)), choice)
        for choice in itertools.product(range(4), repeat=BLOCKS)
        if sum(row[c] for row, c in zip(plan.densities, choice, strict=True)) <= 0.7 * BLOCKS
    )
    assert plan.masks == tuple(plan.options[c] for c in best[1]) and plan.bound == pytest.approx(best[0])
    assert plan.density <= 0.7 and plan.rule == "70% of the weights of dense attention, least sum of losses, dynamic"
    lagrangian = searched(budget=0.7, cost="weights", solver="lagrangian")
    assert lagrangian.losses == plan.losses and lagrangian.density <= 0.7 and lagrangian.bound <= best[0] * (1 + 1e-9)
    worst = searched(budget=0.7, cost="weights", objective="max")
    assert worst.density <= 0.7 and "least max of losses" in worst.rule
    assert max(worst._of(worst.losses)) <= max(plan._of(plan.losses))


def test_a_budget_of_time(recorded, monkeypatch):
    """Times are ratios to dense attention that were taken side by side; where nothing was measured, weights count."""
    seconds = {"frames:2": (2.0, 1.8), "frames:1": (1.0, 0.5), "frames:0": None}

    def answer(query, key, value, bias, on, scale):
        pair = seconds[str(on.mask)]
        return TuningResult("gather", {} if pair is None else {"dense": pair[0], "gather": pair[1]}, on.density)

    monkeypatch.setattr(search, "autotune", answer)
    plan = searched(budget=0.6)
    least = parse_mask("frames:0").density(*GRID, text=3)
    assert plan.seconds == ((2.0, pytest.approx(1.8), pytest.approx(1.0), pytest.approx(2 * least)),) * BLOCKS
    taken = sum(row[plan.options.index(m)] for row, m in zip(plan.seconds, plan.masks, strict=True))
    assert taken <= 0.6 * 2.0 * BLOCKS and plan.speedup == pytest.approx(2.0 * BLOCKS / taken)
    assert plan.rule.startswith("60% of the time of dense attention") and f"{plan.speedup:.2f}× as fast here" in str(plan)
    monkeypatch.setitem(seconds, "frames:0", (1.0, 4.0))
    with pytest.raises(ConfigError, match=r"takes 20.0% of the time of dense attention; the least is 50.0%: .*cost='weights'"):
        searched(budget=0.2)


def test_a_budget_that_cannot_be_met_names_the_least(recorded):
    least = parse_mask("frames:0").density(*GRID, text=3)
    message = (
        f"no plan of these masks takes 30.0% of the weights of dense attention; the least is {least:.1%}: allow more, or give"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        searched(budget=0.3, cost="weights")
    assert searched(budget=least * 1.0001, cost="weights").masks == ("frames:0",) * BLOCKS


# ---- the table on the disk -------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("cumulative", "after"), [(False, 4), (True, 1)])
def test_an_interrupted_search_goes_on_where_it_was(recorded, tmp_path, monkeypatch, cumulative, after):
    table, real, asked = tmp_path / "new" / "table.json", _Search._loss, []
    options = {"threshold": 1e9, "cumulative": cumulative, "table": table}

    def counted(self, site, one, want, option):
        if len(asked) == after * STEPS:
            raise Interrupted
        asked.append((site.name, option))
        return real(self, site, one, want, option)

    monkeypatch.setattr(_Search, "_loss", counted)
    with pytest.raises(Interrupted):
        searched(**options)
    first = list(asked)
    assert len(json.loads(table.read_text())["losses"]) == after
    after = 1000
    again = searched(**options)
    rest = asked[len(first) :]
    assert not set(first) & set(rest) and len(first + rest) == BLOCKS * len(MASKS) * STEPS
    assert replace(searched(**options | {"table": None}), work=again.work) == again
    assert again.masks == ("frames:0",) * BLOCKS
    asked.clear()
    known = searched(**options | {"threshold": 1e-9})
    assert not asked and known.masks == ("dense",) * BLOCKS, "another threshold needs no other losses"
    assert [p.name for p in table.parent.iterdir()] == ["table.json"]


def test_the_table_of_another_search_is_refused(tmp_path):
    table = tmp_path / "table.json"
    everything(table=table)
    written = table.read_text()
    run = lambda m: generate(m, seed=5)  # noqa: E731
    other = stack()
    other.qkv[0][0].weight[0, 0] += 1e-3
    for options, what in (
        ({"masks": MASKS[:2]}, "options"),
        ({"run": run}, "inputs"),
        ({"model": other}, "inputs"),
    ):
        with pytest.raises(ConfigError, match=rf"is the table of another search \({what} differ\): give another file"):
            everything(table=table, **options)
    with pytest.raises(ConfigError, match=r"is the table of another search \(cumulative differ\)"):
        searched(threshold=1.0, cumulative=True, table=table)
    assert table.read_text() == written


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"losses": 3}', '{"losses": {"0,1": "a"}}', '{"losses": {"0,1": null}}']
)
def test_a_file_that_is_no_table_is_refused(recorded, tmp_path, content):
    table = tmp_path / "table.json"
    table.write_text(content)
    with pytest.raises(
        ConfigError, match=r"table.json is no table of losses of search_masks; give another file, or move it away"
    ):
        everything(table=table)
    assert table.read_text() == content


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(recorded):
    return searched(threshold=sorted(v for row in everything().losses for v in row[1:])[4])


def test_a_plan_is_read_back(plan, tmp_path):
    assert MaskPlan.from_json(plan.to_json()) == plan and None in sum(plan.losses, ())
    plan.to_json(tmp_path / "plan.json")
    assert MaskPlan.from_json(tmp_path / "plan.json") == plan
    timed = replace(plan, seconds=((2.0, 1.5, 1.0, 0.5),) * BLOCKS, bound=0.25)
    assert MaskPlan.from_json(timed.to_json()) == timed
    for text in ("", "[]", "{}", "3", '{"masks": []}', plan.to_json().replace('"rule"', '"rules"')):
        with pytest.raises(ConfigError, match=r"this is no plan of masks: it was not written by MaskPlan.to_json"):
            MaskPlan.from_json(text)


def test_a_plan_prints_and_is_drawn(plan, tmp_path):
    lines = str(plan).splitlines()
    assert lines[0] == f"{plan.rule}: {plan.density:.0%} of the weights" and len(lines) == 1 + BLOCKS
    for i, (line, mask) in enumerate(zip(lines[1:], plan.masks, strict=True)):
        assert line.split()[:2] == [str(i), mask] and line.endswith(plan.modules[i])
    assert plan.figure(tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_a_plan_gives_each_attention_its_mask(plan):
    model, c = stack(), call(1)
    masked = Recipe("masked", vdcache.policies.Always()).with_masks(plan)
    assert masked.passes[0] == TileAttention(plan.masks) and len(set(plan.masks)) > 1
    assert Recipe.from_json(masked.to_json()) == masked
    got = vdcache.compile(model, masked, inner="eager", strict=True)(*c)[0]
    hidden, _ = by_hand(model, c, plan.masks, 3)
    torch.testing.assert_close(got, model.out(hidden).mT.reshape(got.shape), rtol=1e-5, atol=1e-5)


# ---- what cannot be --------------------------------------------------------------------------------------------------

ONE = "takes a threshold of the loss, or a budget of time: one of the two"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, ONE),
        ({"threshold": 1.0, "budget": 0.5}, ONE),
        ({"threshold": 0}, "threshold is a loss above 0; got 0"),
        ({"threshold": -1.0}, "threshold is a loss above 0; got -1.0"),
        ({"threshold": float("nan")}, "threshold is a loss above 0; got nan"),
        ({"threshold": "1"}, "threshold is the largest loss; got '1'"),
        ({"budget": 0}, "budget is a share of the cost without masks, above 0 and at most 1; got 0"),
        ({"budget": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"budget": True}, "budget is a share of the cost without masks; got True"),
        ({"budget": 0.5, "cumulative": True}, "cumulative goes with a threshold"),
        ({"budget": 0.5, "solver": "greedy"}, "solver is dynamic or lagrangian, .*; got 'greedy', 'sum', 'time'"),
        ({"budget": 0.5, "objective": "mean"}, "objective sum or max, .*; got 'dynamic', 'mean', 'time'"),
        ({"budget": 0.5, "cost": "flops"}, "cost time or weights; got 'dynamic', 'sum', 'flops'"),
        ({"budget": 0.5, "solver": "lagrangian", "objective": "max"}, "objective='max' goes with solver='dynamic'"),
        ({"threshold": 1.0, "timesteps": 0}, "timesteps, the calls kept of a prompt, is a whole number of at least 1; got 0"),
        ({"threshold": 1.0, "masks": []}, "search_masks needs at least one mask besides dense attention"),
        ({"threshold": 1.0, "masks": ["dense"]}, "search_masks needs at least one mask besides dense attention"),
        ({"threshold": 1.0, "masks": ["frame:1"]}, "no mask is called 'frame'"),
        ({"threshold": 1.0, "masks": [None]}, "a mask is a value or its text"),
        ({"threshold": 1.0, "prompts": "cat"}, r"prompts is a list of prompts; got 'cat': give \['cat'\]"),
        ({"threshold": 1.0, "prompts": []}, "search_masks: prompts is empty"),
    ],
    ids=str,
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        vdcache.search_masks(stack(), generate, **{"masks": MASKS, **options})


@pytest.mark.filterwarnings("ignore:vdcache:vdcache.VdcacheWarning")
def test_models_that_cannot_be_searched_say_why():
    with pytest.raises(CacheStateError, match=r"search_masks: run\(model\) did not call the model that it was given"):
        searched(run=lambda m: None, threshold=1.0)
    with pytest.raises(
        ConfigError, match=r"search_masks: 'scaled_dot_product_attention' \(.*\): frames:9 has 9 reference frames, .* has 4"
    ):
        searched(masks="frames:9", threshold=1.0)

    def run(model):
        with torch.no_grad():
            model(latent(1), time_of(2), latent(9, 1, 3, 4))

    with pytest.raises(ConfigError, match=r"no attention of this model can have a mask: the graph does not show .*give grid="):
        searched(TinyDiT(), run=run, threshold=1.0)
    given = searched(TinyDiT(), masks="frames:1", run=run, threshold=1e9, grid=(2, 1, 2), text=(0, 2))
    assert given.masks == ("frames:1",) * 2 and given.options == ("dense", "frames:1")

    class Plain(nn.Module):
        def forward(self, x):
            return torch.relu(x @ torch.ones(4, 4))

    with pytest.raises(ConfigError, match="search_masks: no attention over video tokens is found in Plain"):
        searched(Plain(), run=lambda m: m(latent(1)), threshold=1.0)


def test_a_model_is_the_plain_one_after_a_search():
    model, held = stack(), []

    def run(m):
        held.append(m)
        return generate(m)

    searched(model, run=run, threshold=1.0)
    assert all(torch.equal(a, b) for a, b in zip(generate(held[0]), generate(model), strict=True))
    assert len(held[0].vdcache.history) == STEPS


# ---- tiles -----------------------------------------------------------------------------------------------------------


def looked_at(model=None, run=generate, **options):
    return vdcache.calibration.tiles(stack() if model is None else model, run, timesteps=STEPS, **options)


@pytest.mark.parametrize("two", [False, True])
def test_the_mass_of_every_frame(two):
    """Against the weights themselves, in float64; rows add up to one less what goes to text."""
    model, text = stack(two), 3 * two
    report = looked_at(model)
    for i in range(BLOCKS):
        found = [by_hand(model, call(step), ["dense"] * BLOCKS, text)[1][i] for step in range(STEPS)]
        weights = torch.stack(found).double().mean((0, 1, 2))[:16]
        mass = weights[:, :16].reshape(4, 4, 4, 4).sum(3).mean(1)
        torch.testing.assert_close(torch.tensor(report.mass[i], dtype=torch.float64), mass, rtol=1e-5, atol=1e-6)
        assert report.text[i] == pytest.approx(float(weights[:, 16:].sum(1).mean()), abs=1e-6)
        assert report.text[i] + float(torch.tensor(report.mass[i]).sum()) / 4 == pytest.approx(1.0, abs=1e-5)
        own = mass.diagonal().mean()
        assert report.diagonal[i] == pytest.approx(float(own / ((mass.sum() - own * 4) / 12)), rel=1e-4)
        decay = [float(torch.cat([mass.diagonal(d), mass.diagonal(-d)]).mean()) for d in range(4)]
        assert report.decay[i] == pytest.approx(decay, rel=1e-4)
    assert (report.frames, report.calls, report.overlap, len(report.modules)) == (4, STEPS, None, BLOCKS)
    assert bool(any(report.text)) == two and (min(report.text) > 0) == two


def test_important_positions_that_prompts_share(tmp_path):
    same = looked_at(run=lambda m, seed: generate(m, seed), prompts=[3, 3, 3])
    assert same.overlap == (1.0,) * BLOCKS and same.calls == 3 * STEPS
    model, top = stack(), 0.2
    report = looked_at(model, run=lambda m, seed: generate(m, seed), prompts=[0, 3], top=top)
    for i in range(BLOCKS):
        important = []
        for seed in (0, 3):
            found = [by_hand(model, call(step, seed), ["dense"] * BLOCKS, 3)[1][i] for step in range(STEPS)]
            map_ = torch.stack(found).double().mean((0, 1, 2))[:16, :16].flatten()
            important.append(set(map_.argsort(descending=True)[: round(top * 256)].tolist()))
        assert report.overlap[i] == pytest.approx(len(important[0] & important[1]) / round(top * 256))
    assert len(set(report.overlap)) == BLOCKS and min(report.overlap) > 0 and max(report.overlap) < 1
    assert report.figure(tmp_path / "tiles.png").read_bytes().startswith(b"\x89PNG")


def test_overlap_by_hand():
    a, b, c = torch.tensor([4.0, 3, 2, 1]), torch.tensor([4.0, 1, 3, 2]), torch.tensor([1.0, 2, 3, 4])
    assert _overlap([a, b], 0.5) == 0.5 and _overlap([a, c], 0.5) == 0.0
    assert _overlap([a, b, c], 0.5) == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    assert _overlap([a, b], 0.01) == 1.0, "at least one position counts"


def test_a_report_is_read_back_and_prints(tmp_path):
    report = looked_at(run=lambda m, seed: generate(m, seed), prompts=[0, 3])
    report.to_json(tmp_path / "tiles.json")
    assert TileReport.from_json(report.to_json()) == TileReport.from_json(tmp_path / "tiles.json") == report
    assert replace(report, overlap=None) == TileReport.from_json(replace(report, overlap=None).to_json())
    lines = str(report).splitlines()
    assert lines[0] == f"attention among 4 latent frames, {2 * STEPS} calls" and len(lines) == 2 + BLOCKS
    assert f"{report.text[0]:.0%} to text  {report.overlap[0]:.0%} of important positions shared" in lines[1]
    for text in ("", "[]", "{}", "3", '{"mass": 1}'):
        with pytest.raises(ConfigError, match=r"this is no report on tiles: it was not written by TileReport.to_json"):
            TileReport.from_json(text)


def test_weights_of_many_tokens_are_summed_in_chunks(monkeypatch):
    from vdcache.calibration import tile_report as tiles

    whole = looked_at()
    torch._dynamo.reset()
    monkeypatch.setattr(tiles, "CHUNK", 100)  # two queries at a time
    chunks = looked_at()
    torch.testing.assert_close(torch.tensor(chunks.mass), torch.tensor(whole.mass))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 0}, "timesteps, the calls kept of a prompt, is a whole number of at least 1; got 0"),
        ({"top": 0.0}, "top is a share of the positions, between 0 and 1; got 0.0"),
        ({"top": 1}, "top is a share of the positions, between 0 and 1; got 1"),
        ({"top": "0.1"}, "top is a share of the positions, between 0 and 1; got '0.1'"),
        ({"prompts": "cat"}, r"prompts is a list of prompts; got 'cat': give \['cat'\]"),
        ({"prompts": []}, "tiles: prompts is empty"),
        ({"run": lambda m: None}, "tiles: run.model. did not call the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_of_tiles(options, message):
    with pytest.raises((ConfigError, CacheStateError), match=message):
        vdcache.calibration.tiles(stack(), **{"run": generate, **options})
