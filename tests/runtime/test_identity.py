"""Which call is this, and whose values may it reuse? Each case was seen to fail once."""

from __future__ import annotations

import dataclasses
import threading
import warnings

import numpy as np
import pytest
import torch

import vdcache
from tests.support.histories import Adapted
from vdcache.runtime.lane_table import LaneTable
from vdcache.runtime.weights_token import WeightsToken, sample
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(recipe: str = "every-2", model: torch.nn.Module | None = None, **more):
    model = TinyDiT(1) if model is None else model
    more.setdefault("num_steps", STEPS)
    return model, vdcache.compile(model, recipe, inner="eager", **more)


def prompt(number: int, rows: int = 1) -> torch.Tensor:
    return latent(number, rows, 3, 4)


def reused(compiled, generation: int = -1) -> list[int]:
    """The steps of a generation in which some lane reused something."""
    return sorted({r.step for r in compiled.vdcache.history.generation(generation) if r.reused})


# ---- messages -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_windows_that_nothing_tells_apart_are_computed_and_said_once():
    model, compiled = made()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4):
            for window in range(2):
                x = latent(10 * step + window)
                assert torch.equal(compiled(x, time_of(step), prompt(1)), model(x, time_of(step), prompt(1)))
    messages = [str(w.message) for w in said if issubclass(w.category, vdcache.VdcacheWarning)]
    assert len(messages) == 1 and "session.lane(name) before each call" in messages[0]
    assert [r.step for r in compiled.vdcache.history] == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
def test_windows_that_the_caller_names_are_cached():
    _, compiled = made()
    session = compiled.vdcache
    session.begin(STEPS)
    for step in range(3):
        session.step()
        for window in range(2):
            session.lane(f"window {window}")
            compiled(latent(10 * step + window), time_of(step), prompt(1))
    assert [bool(r.reused) for r in session.history] == [False, False, True, True, False, False]


@torch.no_grad()
def test_a_queue_of_frames_at_one_vector_of_timesteps_is_named_as_what_it_is():
    """FIFO: every call has the same timesteps, one a frame, and other latents."""
    model, compiled = made(model=TinyDiT(1))
    t = torch.linspace(1000, 100, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in range(6):
            x = latent(call, 4, 6, 4)
            assert torch.equal(compiled(x, t, prompt(1)), model(x, t, prompt(1)))
    assert not any("num_steps=1" in str(w.message) for w in said)


# ---- prompts and lanes ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_that_is_exchanged_computes_its_own_lane_alone():
    model, compiled = made()
    first, second, negative = prompt(1), prompt(2), prompt(3)
    for step in range(STEPS):
        x = latent(step)
        for words in (first if step < 3 else second, negative):
            out = compiled(x, time_of(step), words)
            if step == 3 and words is second:
                assert torch.equal(out, model(x, time_of(step), words))
    at_three = [r for r in compiled.vdcache.history if r.step == 3]
    assert [bool(r.reused) for r in at_three] == [False, True] and at_three[0].why == "its conditioning is new"
    assert reused(compiled) == [1, 3, 5]


@torch.no_grad()
def test_prompts_of_inference_tensors_are_known_by_their_values():
    model, compiled = made()
    with torch.inference_mode():
        words = prompt(1)
        for step in range(STEPS):
            if step == 3:
                words.copy_(prompt(2))
            x = latent(step)
            out = compiled(x, time_of(step), words)
            if step == 3:
                assert torch.equal(out, model(x, time_of(step), words))
    assert reused(compiled) == [1, 5]


@torch.no_grad()
def test_lanes_that_left_keep_no_memory():
    """A prompt that is exchanged again and again."""
    _, compiled = made("every-2", num_steps=40)
    store, held = compiled.vdcache.store, []
    for step in range(40):
        compiled(latent(step), torch.tensor([1000.0 - step]), prompt(step // 4))
        held.append(store.bytes())
    assert max(held) <= 2 * max(held[:3])


@torch.no_grad()
def test_an_input_that_moves_with_the_timestep_is_no_prompt():
    """As a ControlNet's residuals: after one step more of a generation they are known; when they stand still they count again."""

    class Hinted(TinyDiT):
        def forward(self, x, timestep, text, hint):
            return super().forward(x + hint, timestep, text)

    _, compiled = made(model=Hinted(1))
    for generation in range(2):
        for step in range(STEPS):
            compiled(latent(step), time_of(step), prompt(1), 0.1 * latent(100 * generation + step))
    assert reused(compiled, 0) == reused(compiled, 1) == [3, 5], "equal generations compute equal steps"
    hints = [latent(50), latent(51), latent(51), latent(52), latent(52), latent(53)]
    for step, hint in enumerate(hints):
        compiled(latent(step), time_of(step), prompt(1), hint)
    assert reused(compiled) == [], "it moved, stood still, and is exchanged at steps 3 and 5 like a prompt"


@torch.no_grad()
def test_guidance_in_one_batch_that_ends_goes_on_in_the_same_generation():
    _, compiled = made()
    both, one = torch.cat([prompt(1), prompt(2)]), prompt(2)
    for step in range(STEPS):
        x, t = latent(step), time_of(step)
        if step < 4:
            compiled(x.repeat(2, 1, 1), t.repeat(2), both)
        else:
            compiled(x, t, one)
    assert {r.generation for r in compiled.vdcache.history} == {0}
    assert reused(compiled) == [1, 3, 5]


@torch.no_grad()
def test_another_size_of_latent_within_a_generation_computes():
    """As where a second pass at another size goes on with the steps of the first."""
    model, compiled = made()
    compiled.vdcache.begin(STEPS)
    for step, rows in enumerate((6, 6, 6, 8, 8, 8)):
        x = latent(step, 1, rows, 4)
        compiled.vdcache.step()
        out = compiled(x, time_of(step), prompt(1))
        if step == 3:
            assert torch.equal(out, model(x, time_of(step), prompt(1)))
    assert reused(compiled) == [1, 5]


# ---- weights, settings, threads ---------------------------------------------------------------------------------------


def test_a_weight_that_is_moved_is_the_same_and_one_that_is_written_is_not():
    weights = [torch.randn(4, 4), torch.randn(3)]
    token = WeightsToken()
    first, _ = token.check("graph", "kind", weights)
    weights[0] = weights[0].clone()
    assert token.check("graph", "kind", weights) == (first, False)
    weights[1].mul_(2)
    second, gone = token.check("graph", "kind", weights)
    assert second != first and gone
    weights[1] = weights[1] + 1
    third, gone = token.check("graph", "kind", weights)
    assert third not in (first, second) and gone


def test_graphs_of_one_kind_share_their_weights_in_whatever_order():
    weights = [torch.randn(4, 4), torch.randn(3)]
    token = WeightsToken()
    first, _ = token.check("graph", "kind", weights)
    assert token.check("made anew", "kind", weights[::-1]) == (first, False)
    assert token.check("made again", "kind", [w + 1 for w in weights])[0] != first


def test_two_weights_that_change_places_are_others():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    token = WeightsToken()
    first, _ = token.check("graph", "kind", [a, b], 0)
    assert token.check("graph", "kind", [b, a], 1)[0] != first
    assert token.check("graph", "kind", [a.clone(), b.clone()], 2)[0] == first


def test_weights_that_come_back_have_the_number_that_they_had():
    cat, dog = [torch.randn(4, 4)], [torch.randn(4, 4)]
    token = WeightsToken()
    numbers = [token.check("graph", "kind", weights, now)[0] for now in range(3) for weights in (cat, dog)]
    assert numbers == numbers[:2] * 3 and len(set(numbers)) == 2
    dog[0].mul_(2)
    assert token.check("graph", "kind", dog, 3)[0] not in numbers
    assert token.check("graph", "kind", cat, 3) == (numbers[0], False)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64, 64)])
def test_another_object_with_one_other_row_is_another_weight(shape):
    """All bits of a small weight count; of a large one, where a row is more than a thousandth of it."""
    token, weight = WeightsToken(), torch.randn(shape)
    first, _ = token.check("graph", "kind", [weight])
    other = weight.clone()
    other[1] += 1
    assert token.check("graph", "kind", [other])[0] != first


def test_an_address_that_is_used_again_is_no_identity():
    token = WeightsToken()
    weights = [torch.ones(8)]
    numbers = [token.check("graph", "kind", weights)[0]]
    again = 0
    for value in range(2, 12):
        place = id(weights.pop())
        weights.append(torch.full((8,), float(value)))
        again += id(weights[0]) == place
        numbers.append(token.check("graph", "kind", weights)[0])
    assert len(set(numbers)) == len(numbers)
    assert again, "no object lay where the one before had been: this test has shown nothing"


class Switching(TinyDiT):
    """Adds one of two adapters' outputs, times a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("cat", "dog")})
        self.active, self.times, self.extra = "cat", 1, torch.zeros(1, 1, 4)
        self.array = torch.from_numpy(np.zeros((1, 1, 4), np.float32))
        self.bend, self.scale = torch.relu, None

    def forward(self, x, timestep, text):
        x = self.bend(x + self.times * self.adapters[self.active](x) + self.extra + self.array)
        return super().forward(x if self.scale is None else x * self.scale, timestep, text)


def timeless(model: TinyDiT) -> TinyDiT:
    """The model with a timestep that changes nothing."""
    model.time.weight.zero_()
    return model


EXTRAS = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(5)).unbind()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model, of: setattr(model, "active", ("cat", "dog")[of]),
        lambda model, of: setattr(model, "times", 2 + of),
        lambda model, of: setattr(model, "extra", EXTRAS[of]),
        lambda model, of: setattr(model, "extra", EXTRAS[of].clone()),
        lambda model, of: setattr(model, "bend", (torch.relu, torch.tanh)[of]),
        lambda model, of: setattr(model, "scale", (None, EXTRAS[0])[of]),
        lambda model, of: model.array.numpy().__setitem__(slice(None), EXTRAS[of].numpy()),
        lambda model, of: model.adapters["cat"].weight.fill_(float(of)),
    ],
    ids=["adapter", "whole number", "attribute", "new attribute", "function", "with and without", "numpy", "written"],
)
@pytest.mark.parametrize("by_lane", [True, False], ids=["lanes", "steps"])
def test_what_a_model_is_set_to_belongs_to_a_value(change, by_lane, request):
    """Python chooses it, so no input shows it: another adapter, another number, another tensor in an attribute.

    Neither timestep nor latent change anything here, so what is rightly reused is exact.
    """
    model, compiled = made(model=timeless(Switching()))
    x, words = latent(1), prompt(1)
    for step in range(STEPS):
        for lane in range(1 + by_lane):
            change(model, lane if by_lane else step // 2 % 2)
            out = compiled(x, time_of(step), words)
            assert torch.allclose(out, model(x, time_of(step), words), atol=1e-6), f"step {step}, lane {lane}"
    assert bool(reused(compiled)) == ("written" not in request.node.callspec.id), "settings that come back are reused"


@torch.no_grad()
@pytest.mark.parametrize("what", ["written", "adapter"])
def test_other_weights_in_the_middle_of_a_generation_compute_at_once(what):
    model, compiled = made(model=Adapted())
    for step in range(STEPS):
        if step == 3 and what == "written":
            model.mlp[0][0].weight.mul_(1.5)
        elif step == 3:
            model.text.strength = 0.5
        x = latent(step)
        out = compiled(x, time_of(step), prompt(1))
        if step == 3:
            assert torch.equal(out, model(x, time_of(step), prompt(1)))
            assert what == "adapter" or compiled.vdcache.history[-1].why == "the weights changed"
    assert reused(compiled) == [1, 5]


@torch.no_grad()
def test_a_model_that_counts_its_own_calls_does_not_change_its_weights():
    class Counting(TinyDiT):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, timestep, text):
            self.calls += 1
            return super().forward(x, timestep, text)

    model, compiled = made(model=Counting())
    for step in range(STEPS):
        compiled(latent(step), time_of(step), prompt(1))
    assert reused(compiled) == [1, 3, 5] and float(model.calls) == STEPS


@torch.no_grad()
def test_the_string_door_follows_the_recipe_of_the_callable_that_is_called():
    model = TinyDiT(1)
    for again in range(2):
        for recipe, computed in (("every-2", [0, 2, 4, 6, 7]), ("every-4", [0, 4, 7])):
            run = torch.compile(model, backend="vdcache", options={"recipe": recipe, "num_steps": STEPS, "inner": "eager"})
            with vdcache.record() as history:
                for step in range(STEPS):
                    run(latent(step), time_of(step), prompt(1))
            assert history.computed_steps() == computed, f"{recipe}, time {again}"
        torch._dynamo.reset()


@torch.no_grad()
def test_threads_that_call_one_model_at_once_have_sessions_of_their_own():
    model, compiled = made()
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def generate(number: int) -> None:
        barrier.wait()
        with torch.no_grad(), vdcache.record() as history:
            for generation in range(4):
                for step in range(STEPS):
                    x = latent(1000 * number + 10 * generation + step)
                    out = compiled(x, time_of(step), prompt(1))
                    if not history[-1].reused and not torch.equal(out, model(x, time_of(step), prompt(1))):
                        wrong.append(number)
            if reused_of(history) != [1, 3, 5]:
                wrong.append(number)

    def reused_of(history: vdcache.runtime.History) -> list[int]:
        return sorted(r.step for r in history.generation() if r.reused)

    compiled(latent(0), time_of(0), prompt(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=generate, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@torch.no_grad()
def test_after_a_call_that_raises_the_next_one_computes():
    model, compiled = made()
    for step in (0, 1, 2):
        compiled(latent(step), time_of(step), prompt(1))
    program = compiled.vdcache.graphs[0]
    part = program.variants[next(p for p in program.variants.plans if p)]
    real = part.ready

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("on purpose")

    part.ready = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        compiled(latent(3), time_of(3), prompt(1))
    part.ready = real
    x = latent(3)
    assert torch.equal(compiled(x, time_of(3), prompt(1)), model(x, time_of(3), prompt(1)))


# ---- how many steps -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_lengths_that_alternate_are_recalled_by_how_a_run_begins():
    _, compiled = made(num_steps=None)
    for steps in (10, 8, 10, 8, 10):
        for step in range(steps):
            compiled(latent(step), torch.tensor([1000.0 - 1000 * step / steps]), prompt(1))
    assert reused(compiled, 3) == [1, 3, 5] and reused(compiled, 4) == [1, 3, 5, 7]


@torch.no_grad()
def test_a_new_request_in_a_row_of_the_batch_computes():
    model, compiled = made()
    words = torch.cat([prompt(1), prompt(2)])
    for call, t in enumerate(([1000.0, 900.0], [950.0, 850.0], [900.0, 1000.0])):
        x = latent(call, 2, 6, 4)
        out = compiled(x, torch.tensor(t), words)
    assert torch.equal(out, model(x, torch.tensor(t), words))
    assert not any("ended after" in str(w) for w in compiled.vdcache._notices._said)


# ---- the table of lanes by itself ---------------------------------------------------------------------------------------


def test_a_table_knows_lanes_by_identity_by_value_and_not_by_order():
    labels = iter(range(10))
    table = LaneTable(lambda: next(labels))
    cond, uncond = torch.ones(2), torch.zeros(2)

    def lane(step: int, value: torch.Tensor) -> int:
        return table.settle(table.ask([value]), 0, step)[0].label

    assert [lane(0, uncond), lane(0, cond)] == [0, 1]
    assert [lane(1, cond), lane(1, uncond)] == [1, 0]
    assert [lane(2, cond.clone()), lane(3, cond.clone())] == [1, 1]
    cond.add_(1)
    assert lane(4, cond) == 2, "written into: a new conditioning"


def test_a_table_counts_an_input_that_moved_where_it_stands_still():
    labels = iter(range(10))
    table = LaneTable(lambda: next(labels))
    text, hints = torch.ones(2), [torch.full((2,), float(i)) for i in range(5)]

    def lane(step: int, hint: torch.Tensor) -> int:
        return table.settle(table.ask([text, hint]), 0, step)[0].label

    assert [lane(step, hints[step]) for step in range(4)] == [0, 0, 0, 0], "it moves with the timestep"
    assert lane(4, hints[3]) == 0
    assert lane(4, hints[4]) == 1, "in a step in which it stands still it tells lanes apart"


# ---- what stands in objects, in memory that is not torch's, and in the process of several runs -------------------------------


@dataclasses.dataclass
class Condition:
    words: torch.Tensor


class Broken(TinyDiT):
    """Runs as two graphs, of which the second takes the prompt out of an object or looks it up by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"cat": EXTRAS[0] + 0, "dog": EXTRAS[1] + 0}

    def forward(self, x, timestep, condition):
        out = super().forward(x, timestep, EXTRAS[0])
        torch._dynamo.graph_break()
        words = condition.words if isinstance(condition, Condition) else self.table[condition] + 0
        return super().forward(out, timestep, words)


@torch.no_grad()
@pytest.mark.parametrize("what", ["objects", "new objects", "names"])
@pytest.mark.parametrize("by_lane", [True, False], ids=["lanes", "steps"])
def test_a_prompt_inside_an_object_or_behind_a_name_is_told_after_a_graph_break(what, by_lane):
    model, compiled = made(model=timeless(Broken()))
    kept = [Condition(e) for e in EXTRAS]
    given = {
        "objects": lambda of: kept[of],
        "new objects": lambda of: Condition(EXTRAS[of].clone()),
        "names": lambda of: ("cat", "dog")[of],
    }[what]
    x = latent(1)
    for step in range(STEPS):
        for lane in range(1 + by_lane):
            condition = given(lane if by_lane else step // 2 % 2)
            out = compiled(x, time_of(step), condition)
            assert torch.allclose(out, model(x, time_of(step), condition), atol=1e-6), f"step {step}, lane {lane}"
    assert reused(compiled)


@torch.no_grad()
@pytest.mark.parametrize("by_lane", [True, False], ids=["lanes", "steps"])
@pytest.mark.parametrize("as_tensor", [True, False], ids=["from_numpy", "array"])
def test_a_prompt_in_a_numpy_array_that_is_rewritten_is_another_prompt(as_tensor, by_lane):
    class Numpy(TinyDiT):
        def forward(self, x, timestep, words):
            return super().forward(x, timestep, words if isinstance(words, torch.Tensor) else torch.from_numpy(words))

    model, compiled = made("every-4", model=timeless(Numpy(1)))
    array, x = EXTRAS[0].numpy().copy(), latent(1)
    given = torch.from_numpy(array) if as_tensor else array
    for step in range(STEPS):
        for lane in range(1 + by_lane):
            array[:] = EXTRAS[lane if by_lane else step // 2 % 2].numpy()
            out = compiled(x, time_of(step), given)
            assert torch.allclose(out, model(x, time_of(step), given), atol=1e-6), f"step {step}, lane {lane}"
    assert reused(compiled)


@torch.no_grad()
@pytest.mark.parametrize("order", ["a0 a1 b0 a2 b1 c0 a3 b2 c1 a4 b3 c2 a5 b4 c3 b5 c4 c5", "a0 b0 c0 a1 b1 c1 a2 b2 c2 a3"])
def test_requests_that_interleave_are_told_by_their_prompts(order):
    model, compiled = made("every-3", model=timeless(TinyDiT(1)), num_steps=6)
    x, prompts = latent(1), {name: prompt(number) for number, name in enumerate("abc")}
    for call in order.split():
        out = compiled(x, time_of(int(call[1])), prompts[call[0]])
        assert torch.allclose(out, model(x, time_of(int(call[1])), prompts[call[0]]), atol=1e-6), call


@torch.no_grad()
def test_a_warm_up_call_is_no_step_of_the_run_after_it():
    model, compiled = made("every-2", model=timeless(TinyDiT(1)))
    words = prompt(1)
    compiled(latent(9), torch.tensor([0]), words)
    for step in range(STEPS):
        x = latent(1)
        out = compiled(x, torch.tensor([1000 - 100 * step]), words)
        assert torch.allclose(out, model(x, time_of(step), words), atol=1e-6), f"step {step}"
    assert reused(compiled)


@torch.no_grad()
def test_a_model_in_parts_does_not_take_a_prompt_for_its_latent():
    """The first part takes the prompt alone, which differs from the latent in one dimension."""

    class Parts(TinyDiT):
        def forward(self, x, timestep, words):
            words = words + self.time(self.sinusoids(timestep, x.dtype))[:, None, :4] * 0
            torch._dynamo.graph_break()
            return super().forward(x, timestep, words)

    model, compiled = made(model=timeless(Parts(1)))
    x = latent(1)
    for step in range(STEPS):
        for lane in (1, 2):
            out = compiled(x, time_of(step), prompt(lane))
            assert torch.allclose(out, model(x, time_of(step), prompt(lane)), atol=1e-6), f"step {step}, lane {lane}"
    assert reused(compiled)


@torch.no_grad()
def test_hooks_that_come_or_go_change_who_tells_the_time():
    accelerate = pytest.importorskip("accelerate")
    model, compiled = made()
    for change in (None, accelerate.cpu_offload, accelerate.hooks.remove_hook_from_submodules):
        if change is not None:
            change(model)
        for _ in range(2):
            compiled.vdcache.begin()
            for step in range(STEPS):
                compiled(latent(step), time_of(step), prompt(1))
        assert reused(compiled) == [1, 3, 5], change


@torch.no_grad()
def test_a_compiled_model_inside_torch_compile_keeps_its_session():
    _, compiled = made()
    around = torch.compile(lambda *given: compiled(*given) * 2, backend="eager")
    for step in range(STEPS):
        around(latent(step), time_of(step), prompt(1))
    assert reused(compiled) == [1, 3, 5]


def test_a_value_that_was_expanded_is_sampled_like_any():
    """As schedulers expand a timestep to one for each row of the batch."""
    assert torch.equal(sample(torch.tensor(5).expand(1)), sample(torch.tensor([5])))
