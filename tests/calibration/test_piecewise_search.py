"""The search in pieces: what it finds is what a search all at once finds, what it costs a generation is bounded, and the user's generations
are those of the schedules that are followed."""

from __future__ import annotations

import gc
import json
import math
import threading
import weakref
from collections import Counter

import pytest
import torch

import vdcache
from tests.calibration.samplers import OTHER, TEXT, ancestral, by_hand, generate, kept, psnr, quiet, said, small
from vdcache.calibration import Calibration
from vdcache.calibration.choose import BUDGET
from vdcache.calibration.schedule import Schedule
from vdcache.calibration.trajectory_replay import Rerun
from vdcache.errors import ConfigError
from vdcache.runtime.session import Session
from vdcache.testing import TinyDiT

STEPS = 20


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Nothing is known yet."""
    torch._dynamo.reset()
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "schedules"


@pytest.fixture
def ran(monkeypatch):
    """Steps that were run again, by the generation of the user's in which they ran."""
    counts: Counter[int] = Counter()
    counts.now = 0
    step = Rerun.step

    def counted(self):
        counts[counts.now] += 1
        step(self)

    monkeypatch.setattr(Rerun, "step", counted)
    return counts


def made(model, share=0.1, **options):
    return vdcache.compile(model, inner="eager", search_share=share, **{"num_steps": STEPS, **options})


def schedule_of(fast):
    rule = fast.vdcache.rule
    return Schedule(STEPS, tuple(fast.vdcache.history.computed_steps()), power=0.0 if rule is None else rule.power)


def generations(fast, model, many, texts=(TEXT,), counts=None):
    """Generations until the search is over, each compared with the arithmetic of the schedule that it followed; the schedules."""
    followed = []
    for seed in range(many):
        if counts is not None:
            counts.now = seed
        result = quiet(generate, fast, seed, STEPS, texts=texts)
        followed.append(schedule_of(fast).computed)
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS, texts=texts))
        if not fast.vdcache.calibration.tentative:
            return followed
    raise AssertionError(f"the search is not over after {many} generations")


@pytest.mark.parametrize("goal", [{}, {"speedup": 2.5}, {"quality_db": 40.0}], ids=str)
@pytest.mark.parametrize("texts", [(TEXT,), (TEXT, OTHER)], ids=["one lane", "two lanes"])
def test_it_finds_what_a_search_all_at_once_finds(goal, texts, ran, folder):
    model = small()
    followed = generations(made(model, **goal), model, 40, texts, ran)
    ran.now = -1
    (found,) = kept(folder)
    (folder / found.path.name).unlink()
    torch._dynamo.reset()
    whole = made(small(), math.inf, **goal)
    quiet(generate, whole, 0, STEPS, texts=texts)
    at_once = whole.vdcache.calibration
    assert (found.schedule, found.tried, found.note) == (at_once.schedule, at_once.tried, "") and len(found.tried) > 1
    assert followed[0] == tuple(range(STEPS)) and len(followed) > 5
    assert not ran[0] and max(ran[g] for g in range(len(followed))) < STEPS


def test_a_generation_has_at_most_its_share_of_the_search(ran, monkeypatch):
    """In computed steps: the share of a generation, or one step; nothing in the first; two generations in all."""
    spent: Counter[int] = Counter()
    advance = vdcache.calibration.piecewise_search.PiecewiseSearch.advance

    def measured(self, allowed):
        before = self._allowed.left
        ended = advance(self, allowed)
        spent[ran.now] += before - self._allowed.left
        return ended

    monkeypatch.setattr("vdcache.calibration.piecewise_search.PiecewiseSearch.advance", measured)
    for share, most in ((0.1, 2.0), (0.04, 1.0), (0.5, 10.0)):
        spent.clear()
        model = small(int(100 * share))
        followed = generations(made(model, share), model, 120, counts=ran)
        assert spent[0] == 0 and max(spent.values()) <= most + 1e-6
        assert most / 2 < max(spent.values()) and sum(spent.values()) <= BUDGET * STEPS
        assert len(set(followed)) > 1


def test_each_replacement_is_said_and_nothing_else(folder):
    model, fast = small(), made(small(), quality_db=40.0)
    heard, followed = [], []
    for seed in range(40):
        _, more = said(generate, fast, seed, STEPS)
        heard += more
        followed.append(len(fast.vdcache.history.computed_steps()))
        if not fast.vdcache.calibration.tentative:
            break
    changes = sum(
        a != b for a, b in zip(followed, [*followed[1:], len(fast.vdcache.calibration.schedule.computed)], strict=True)
    )
    assert followed[0] == followed[1] == STEPS and followed == sorted(
        followed, reverse=True
    )  # only running tells what keeps 40 dB
    assert sum("another schedule is followed from the next generation on" in h for h in heard) == changes > 0
    assert sum("this generation is computed in full" in h for h in heard) == 1
    assert any("at most 10% of one within each" in h for h in heard)
    result, more = said(generate, fast, 50, STEPS)
    assert not more and psnr(result, generate(model, 50, STEPS)) > 35


def test_what_is_frozen_stays(folder, ran):
    model, fast = small(), made(small())
    for seed in range(3):
        quiet(generate, fast, seed, STEPS)
    before, tried = schedule_of(fast), sum(ran.values())
    assert fast.vdcache.calibration.tentative and tried
    fast.vdcache.freeze()
    for seed in range(6):
        result, heard = said(generate, fast, seed, STEPS)
        assert schedule_of(fast) == before and not heard
        torch.testing.assert_close(result, by_hand(model, before, seed, STEPS))
    assert torch.equal(
        quiet(generate, fast, 0, STEPS, tokens=5), generate(model, 0, STEPS, tokens=5)
    )  # nothing is known for it
    assert torch.equal(quiet(generate, fast, 1, STEPS, tokens=5), generate(model, 1, STEPS, tokens=5))
    assert sum(ran.values()) == tried and len(kept(folder)) == 1


def test_another_process_goes_on(folder):
    """From a generation that follows what was found so far: nothing is computed in full for it."""
    model, fast = small(), made(small(), speedup=2.0)
    quiet(generate, fast, 0, STEPS)
    (found,) = kept(folder)
    assert found.tentative and len(found.schedule.computed) < STEPS
    torch._dynamo.reset()
    again = made(small(), speedup=2.0)
    followed = generations(again, model, 80)
    assert followed[0] == found.schedule.computed
    (ended,) = kept(folder)
    assert not ended.tentative and len(ended.tried) > 1 and ended.schedule.psnr >= 30


def test_a_file_of_before_is_over(folder):
    fast = made(small(), math.inf)
    quiet(generate, fast, 0, STEPS)
    text = fast.vdcache.calibration.to_json().replace('"tentative": false, ', "")
    assert "tentative" not in text and Calibration.from_json(text) == fast.vdcache.calibration


def test_no_weight_is_held(ran):
    fast = made(small())
    for seed in range(2):
        quiet(generate, fast, seed, STEPS)
    session, parts = fast.vdcache, [weakref.ref(p) for p in fast.vdcache_original.parameters()]
    assert sum(ran.values()) and session.recorder._searches
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert not any(p() is not None for p in parts)


def test_a_model_whose_weights_are_replaced_meanwhile_is_run_with_those_it_has(folder):
    """Equal weights in other places, as offloading leaves them: the search goes on with these."""
    model, fast = small(), made(small())
    quiet(generate, fast, 0, STEPS)
    for seed in range(1, 40):
        for module in fast.vdcache_original.modules():
            for name, p in [*module._parameters.items()]:
                module._parameters[name] = torch.nn.Parameter(p.detach().clone(), requires_grad=False)
        result = quiet(generate, fast, seed, STEPS)
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS))
        if not fast.vdcache.calibration.tentative:
            break
    whole = made(small(), math.inf)
    fast.vdcache.calibration.path.unlink()
    quiet(generate, whole, 0, STEPS)
    assert fast.vdcache.calibration.tried == whole.vdcache.calibration.tried


def test_what_comes_between_belongs_to_other_searches(folder):
    """Sizes and shifts in turn: each is searched within its own generations, and what was run for it is what alone is run."""
    model, fast = small(), made(small(), 0.3)
    for seed in range(60):
        kind = {} if seed % 3 else ({"tokens": 5} if seed % 2 else {"shift": 3.0})
        quiet(generate, fast, seed if seed > 3 else 0, STEPS, **kind)
    found = {(c.key.sizes, round(c.key.times[1])): c for c in kept(folder)}
    assert len(found) == 3
    ours = next(c for (sizes, t), c in found.items() if "1×6×4" in sizes and t == 950)
    assert not ours.tentative
    for path in folder.glob("*.json"):
        path.unlink()
    torch._dynamo.reset()
    whole = made(small(), math.inf)
    quiet(generate, whole, 0, STEPS)
    assert whole.vdcache.calibration.schedule.computed == ours.schedule.computed
    result = quiet(generate, fast, 70, STEPS)
    torch.testing.assert_close(result, by_hand(model, ours.schedule, 70, STEPS))


@pytest.mark.parametrize("passes", [True, False])
def test_trouble_in_a_piece_costs_no_generation(passes, monkeypatch, folder):
    model, fast = small(), made(small())
    for seed in range(2):
        quiet(generate, fast, seed, STEPS)
    followed, step = schedule_of(fast), Rerun.step

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Rerun, "step", full)
    result, heard = said(generate, fast, 2, STEPS)
    torch.testing.assert_close(result, by_hand(model, followed, 2, STEPS))
    assert any("OutOfMemoryError" in h and "the schedule that is known is followed" in h for h in heard)
    if passes:
        monkeypatch.setattr(Rerun, "step", step)
    for seed in range(3, 80):
        result = quiet(generate, fast, seed, STEPS)
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS))
        if not fast.vdcache.calibration.tentative:
            break
    (found,) = kept(folder)
    assert not found.tentative, fast.vdcache.recorder._tries
    assert found.note == ("" if passes else "chosen by the table of steps alone, because OutOfMemoryError: CUDA out of memory.")


def test_a_sampler_that_cannot_be_run_again_has_its_schedule_at_once(folder):
    model, fast = small(), made(small(), speedup=2.0)
    quiet(generate, fast, 0, STEPS, sampler=ancestral)
    (found,) = kept(folder)
    assert not found.tentative and "chosen by the table of steps alone" in found.note
    torch.testing.assert_close(
        quiet(generate, fast, 1, STEPS, sampler=ancestral), by_hand(model, found.schedule, 1, STEPS, sampler=ancestral)
    )


def test_a_goal_out_of_reach_ends_in_full_and_leaves_nothing(folder):
    model, fast = small(), made(small(), quality_db=149.0)
    heard = []
    for seed in range(40):
        result, more = said(generate, fast, seed, STEPS)
        assert torch.equal(result, generate(model, seed, STEPS))
        heard += more
    assert (
        sum("no schedule was found, and every step is computed: no schedule of 20 steps reaches 149 dB" in h for h in heard)
        == 1
    )
    assert not kept(folder)


def test_random_numbers_and_the_history_are_the_users():
    fast = made(small(), 0.5)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with vdcache.record() as history:
        for seed in range(4):
            quiet(generate, fast, seed, STEPS)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = [(g, s) for g in range(4) for s in range(STEPS)]
    assert [(r.generation, r.step) for r in fast.vdcache.history] == [(r.generation, r.step) for r in history] == expected


def test_sixteen_bit_latents_are_run_again_whole_first(folder, ran):
    """What they hide of the end is seen by one run with every step computed."""
    model = small().bfloat16()
    fast = made(model)
    for seed in range(60):
        ran.now = seed
        quiet(generate, fast, seed, STEPS, dtype=torch.bfloat16)
        if not fast.vdcache.calibration.tentative:
            break
    (found,) = kept(folder)
    assert not found.tentative and found.schedule.psnr is not None


@pytest.mark.parametrize("share", [0, -1, math.nan, "much", None])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="search_share is a"):
        made(TinyDiT(blocks=1), share)


# --- found by a hostile user ---------------------------------------------------------------------------------------------------


def test_a_search_that_ended_elsewhere_is_taken_and_never_overwritten(folder):
    model, slow, quick = small(), made(small()), made(small())
    quiet(generate, quick, 0, STEPS)
    for seed in range(3):
        quiet(generate, slow, seed, STEPS)
    generations(quick, model, 60)
    (ended,) = kept(folder)
    assert not ended.tentative
    for seed in range(5):
        quiet(generate, slow, seed, STEPS)
        assert kept(folder) == [ended]
    assert slow.vdcache.calibration == ended and schedule_of(slow).computed == ended.schedule.computed


@pytest.mark.parametrize("goal", [{"speedup": 2.0}, {}], ids=str)
def test_sessions_that_are_too_short_search_three_times(goal, folder, ran):
    """Then the schedule stays; one that computes every step is searched at once."""
    for session in range(6):
        torch._dynamo.reset()
        ran.clear()
        fast = made(small(), **goal)
        for seed in range(4):
            quiet(generate, fast, seed, STEPS)
        assert bool(ran) == (session < (3 if goal else 4)), session
    (found,) = kept(folder)
    assert not found.tentative and len(found.schedule.computed) < STEPS
    if goal:
        assert "none was long enough: vdcache.calibrate" in found.note
    else:
        assert found.schedule.psnr > 30


def test_weights_that_change_end_a_search(folder, ran):
    """In the middle of a weight too, where the key of the calibration does not look."""
    model, fast = small(), made(small(), speedup=2.0)
    for seed in range(4):
        quiet(generate, fast, seed, STEPS)
    before = fast.vdcache.recorder._searches
    (search,) = before.values()
    for one in (model, fast.vdcache_original):
        noise = torch.Generator().manual_seed(3)
        for p in one.parameters():
            p.view(-1)[1:-1].add_(torch.randn(p.numel() - 2, generator=noise) if p.numel() > 2 else 0.0)
    result = quiet(generate, fast, 5, STEPS)
    assert search not in before.values()
    torch.testing.assert_close(result, by_hand(model, schedule_of(fast), 5, STEPS))


def test_searches_are_bounded():
    fast = made(small(), speedup=2.0)
    for scale in range(8):
        for p in fast.vdcache_original.parameters():
            p.add_(0.01 * scale)
        for seed in range(2):
            quiet(generate, fast, seed, STEPS)
    assert 1 < len(fast.vdcache.recorder._searches) <= 4


def test_a_model_that_counts_in_a_buffer_is_not_run_again(folder):
    class Counting(TinyDiT):
        def __init__(self):
            super().__init__(1, 8)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x, timestep, text):
            self.count.add_(1.0)
            return super().forward(x, timestep, text) + 0.01 * self.count

    model = Counting()
    fast = made(model, speedup=2.0)
    for seed in range(3):
        model.count.zero_()
        quiet(generate, fast, seed, STEPS)
        assert model.count == STEPS
    assert "the model writes into its own buffers" in fast.vdcache.calibration.note


def test_what_is_frozen_follows_nothing_that_comes_later(folder):
    model, fast = small(), made(small())
    fast.vdcache.freeze()
    quiet(generate, fast, 0, STEPS)
    torch._dynamo.reset()
    quiet(generate, made(small(), math.inf), 0, STEPS)
    assert len(kept(folder)) == 1
    assert torch.equal(quiet(generate, fast, 1, STEPS), generate(model, 1, STEPS))


def test_the_session_of_another_thread_is_frozen_too(folder):
    fast = made(small(), speedup=2.0)
    for seed in range(2):
        quiet(generate, fast, seed, STEPS)
    session, known = fast.vdcache, fast.vdcache.calibration
    session.freeze()
    assert session._turn.take()  # as a thread does in the middle of a call
    seen = []

    def other():
        quiet(generate, fast, 7, STEPS)
        seen.append(session._turn.own.session)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    session._turn.give()
    (theirs,) = seen
    assert theirs is not session and theirs.recorder.frozen
    assert theirs.history.computed_steps() == list(known.schedule.computed)


@pytest.mark.parametrize("where", [1, 30])
def test_an_interrupt_in_a_piece_begins_its_run_again(where, monkeypatch, folder):
    """Without it half a step would count as one, and every score after it would be of something else."""
    model, fast = small(), made(small(), speedup=2.0)
    calls, run = 0, Session.watch

    def interrupted(self, *args):
        nonlocal calls
        calls += self.name == "rerun"
        if calls == where and self.name == "rerun":
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Session, "watch", interrupted)
    stopped = 0
    for seed in range(80):
        try:
            result = quiet(generate, fast, seed, STEPS)
        except KeyboardInterrupt:
            stopped += 1
            continue
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS))
        if not fast.vdcache.calibration.tentative:
            break
    monkeypatch.setattr(Session, "watch", run)
    (found,) = kept(folder)
    (folder / found.path.name).unlink()
    torch._dynamo.reset()
    whole = made(small(), math.inf, speedup=2.0)
    quiet(generate, whole, 0, STEPS)
    assert stopped == 1 and found.tried == whole.vdcache.calibration.tried


@pytest.mark.parametrize(
    "change", [{"products": []}, {"products": [[[1.0]]]}, {"latent": "1×²×4:float32"}, {"latent": "×"}, "[" * 10_000], ids=str
)
def test_files_that_are_not_whole_harm_no_generation(change, folder):
    model = small()
    quiet(generate, made(model, speedup=2.0), 0, STEPS)
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text())
    if isinstance(change, dict):
        (data["key"] if "latent" in change else data).update(change)
    path.write_text(change if isinstance(change, str) else json.dumps(data))
    torch._dynamo.reset()
    fast = made(small(), speedup=2.0)
    for seed, tokens in ((0, 6), (1, 5), (2, 6)):
        result = quiet(generate, fast, seed, STEPS, tokens=tokens)
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS, tokens=tokens))


def test_shifts_in_turn_are_followed_each(folder):
    """Both begin at one timestep, so that the second step tells which schedule it is."""
    model, fast = small(), made(small(), math.inf)
    for shift in (1.0, 1.0, 3.0, 3.0, 3.0):
        quiet(generate, fast, 0, STEPS, shift=shift)
    for seed, shift in enumerate((1.0, 3.0, 1.0, 3.0)):
        result, heard = said(generate, fast, seed, STEPS, shift=shift)
        assert len(fast.vdcache.history.computed_steps()) < STEPS and not heard
        torch.testing.assert_close(result, by_hand(model, schedule_of(fast), seed, STEPS, shift=shift))


def test_what_a_model_draws_in_a_piece_is_given_back():
    class Drawing(TinyDiT):
        def forward(self, x, timestep, text):
            return super().forward(x, timestep, text) + 1e-3 * torch.randn_like(x)

    def generated(model):
        torch.manual_seed(4)
        return quiet(generate, model, 1, STEPS)

    fast = made(Drawing(1, 8), 1.0, quality_db=149.0)
    quiet(generate, fast, 0, STEPS)
    for _ in range(2):
        assert torch.equal(generated(fast), generated(Drawing(1, 8)))


def test_a_near_size_that_cannot_be_run_again_keeps_the_schedule(folder):
    fast = made(small(), math.inf, speedup=2.0)
    quiet(generate, fast, 0, STEPS)
    first = fast.vdcache.calibration.schedule
    quiet(generate, fast, 1, STEPS, tokens=5, sampler=ancestral)
    found = fast.vdcache.calibration
    assert found.schedule.computed == first.computed and not found.tentative and "it stays as it was, because" in found.note


def test_numbers_in_a_model_tell_calibrations_apart(folder):
    class Scaled(TinyDiT):
        strength = 0.125

        def forward(self, x, timestep, text):
            return super().forward(x, timestep, text) * self.strength

    for strength in (0.125, 2.5):
        torch._dynamo.reset()  # else Dynamo makes the second number an input, as it has seen another one
        model = Scaled(1, 8)
        model.strength = strength
        assert torch.equal(quiet(generate, made(model), 0, STEPS), generate(model, 0, STEPS))
    assert len({c.key.model for c in kept(folder)}) == 2


def test_a_goal_out_of_reach_in_a_folder_that_cannot_be_written(folder, monkeypatch):
    def denied(self, missing_ok=False):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.unlink", denied)
    model, fast = small(), made(small(), quality_db=149.0)
    for seed in range(40):
        assert torch.equal(quiet(generate, fast, seed, STEPS), generate(model, seed, STEPS))
