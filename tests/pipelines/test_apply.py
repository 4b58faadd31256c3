"""`vdcache.apply`: what it touches, what it follows, what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

import vdcache
from tests.pipelines.modes import Stop, cached, computed, due, stopping
from tests.pipelines.tiny import generator, made, sample, short, text
from tests.support.logs import informed
from tests.support.thorough import some
from tests.zoo import build
from vdcache.backends.variants import VariantCompiler
from vdcache.pipelines.denoiser import ForwardWrapper, here
from vdcache.pipelines.pipeline_cache import applied_to

pytest.importorskip("diffusers")
NAME = "CogVideoX"  # the quickest to compile


def session(pipe, name="transformer"):
    return applied_to(pipe).denoisers[name].session


@pytest.fixture(scope="module")
def pipe():
    """One pipeline for tests that leave it as they find it."""
    return cached(made(NAME))


# ---- nothing is touched ----------------------------------------------------------------------------------------------


def test_everything_is_where_it_was():
    pipe = made(NAME)
    kind, parts, inside = type(pipe), dict(pipe.components), set(pipe.__dict__)
    in_model = dict(pipe.transformer.__dict__)
    before = {k: getattr(pipe.scheduler, k) for k in ("step", "set_timesteps")}
    assert cached(pipe) is pipe
    sample(pipe, NAME, 3)
    assert type(pipe) is kind and all(pipe.components[n] is p for n, p in parts.items())
    assert pipe.scheduler.step == before["step"] and "step" not in pipe.scheduler.__dict__
    vdcache.remove(pipe)
    assert set(pipe.__dict__) - inside <= {"_progress_bar_config"} | {k for k in pipe.__dict__ if k.startswith("_")}
    assert "progress_bar" not in pipe.__dict__
    assert {k for k in pipe.transformer.__dict__ if k != "_diffusers_hook"} == set(in_model)
    assert all(pipe.transformer.__dict__[k] is v for k, v in in_model.items())
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_what_the_user_had_put_there_is_put_back():
    pipe = made(NAME)
    plain = sample(pipe, NAME, 3)
    calls = []
    own = pipe.transformer.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    def bar(iterable=None, total=None):
        return type(pipe).progress_bar(pipe, iterable, total)

    pipe.transformer.forward, pipe.progress_bar = forward, bar
    assert torch.equal(sample(cached(pipe, "always"), NAME, 3), plain)
    vdcache.remove(pipe)
    assert pipe.transformer.forward is forward and pipe.progress_bar is bar
    assert calls and torch.equal(sample(pipe, NAME, 3), plain)


def test_outside_the_pipeline_a_denoiser_runs_as_ever(pipe):
    model, count = pipe.transformer, len(session(pipe).history)
    call = {
        "hidden_states": text(1, 3, 4, 8, 8),
        "encoder_hidden_states": text(1, 6, 12),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    assert torch.equal(model(**call)[0], type(model).forward(model, **call)[0])
    assert len(session(pipe).history) == count


def test_hooks_before_and_after_stay_where_they_are():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, calls = made(NAME), []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    add_hook_to_module(pipe.transformer, Counting())
    hooked = pipe.transformer.forward
    cached(pipe)
    assert pipe.transformer.forward is hooked
    sample(pipe, NAME, 3)
    assert len(calls) == 3 and computed(pipe) == [due(3)]
    remove_hook_from_module(pipe.transformer)
    assert isinstance(pipe.transformer.forward, ForwardWrapper)
    add_hook_to_module(pipe.transformer, Counting())
    sample(pipe, NAME, 3)
    vdcache.remove(pipe)
    assert ForwardWrapper.on(pipe.transformer) is None
    remove_hook_from_module(pipe.transformer)
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_saving_and_loading(tmp_path):
    from diffusers import CogVideoXPipeline

    pipe = made(NAME)
    plain = sample(pipe, NAME, 3)
    cached(pipe).save_pretrained(tmp_path)
    loaded = CogVideoXPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, NAME, 3), plain)
    with pytest.raises(vdcache.errors.ConfigError, match="not applied"):
        vdcache.remove(loaded)


def test_a_pipeline_that_is_let_go_of_is_freed():
    pipe = cached(made(NAME))
    sample(pipe, NAME, 3)
    gone = weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(session(pipe))
    del pipe
    gc.collect()
    assert [g() for g in gone] == [None] * 3


def test_no_global_setting_is_changed():
    import torch._dynamo.config as dynamo

    before = dynamo.recompile_limit, torch.is_grad_enabled(), torch.backends.cudnn.benchmark
    sample(cached(made(NAME)), NAME, 3)
    assert (dynamo.recompile_limit, torch.is_grad_enabled(), torch.backends.cudnn.benchmark) == before


# ---- where a call stands ---------------------------------------------------------------------------------------------


def test_lanes_have_the_names_that_the_pipeline_gives_them(pipe):
    sample(pipe, NAME, 4)
    assert {r.lane for r in session(pipe).history.generation()} == {"cond_uncond"}
    wan = cached(made("Wan"))
    sample(wan, "Wan", 4)
    records = session(wan).history.generation()
    assert [r.lane for r in records] == ["cond", "uncond"] * 4
    assert [r.timestep for r in records[::2]] == wan.scheduler.timesteps.tolist()


def test_two_denoisers_know_their_own_steps():
    """Half of the steps each, by the boundary; a schedule that is bound to a number of steps can be followed."""
    pipe = cached(made("Wan 2.2"))
    sample(pipe, "Wan 2.2", 12)
    own = [session(pipe, n).num_steps for n in ("transformer", "transformer_2")]
    times = pipe.scheduler.timesteps.tolist()
    assert own == [sum(t >= 875 for t in times), sum(t < 875 for t in times)] and min(own) > 2
    assert computed(pipe) == [due(n) for n in own]


def test_a_boundary_that_nobody_tells_is_learned():
    pipe = made("Wan 2.2")
    kind = type(pipe)

    class Silent(kind):
        """Its boundary is no configuration."""

        def __call__(self, *args, **kwargs):
            self.register_to_config(boundary_ratio=0.875)
            bar = self.progress_bar

            def quiet(*args, **kwargs):
                self.register_to_config(boundary_ratio=None)
                return bar(*args, **kwargs)

            self.__dict__["progress_bar"] = quiet
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:
                self.__dict__["progress_bar"] = bar

    pipe.__class__ = Silent
    cached(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(pipe, "Wan 2.2", 12)
        first = session(pipe).num_steps, session(pipe, "transformer_2").num_steps
        sample(pipe, "Wan 2.2", 12)
    times = pipe.scheduler.timesteps.tolist()
    high = sum(t >= 875 for t in times)
    assert first == (12, 12 - high)
    assert (session(pipe).num_steps, session(pipe, "transformer_2").num_steps) == (high, 12 - high)


def test_image_to_image_has_the_steps_that_are_left():
    from diffusers import AutoencoderKL, FluxImg2ImgPipeline
    from PIL import Image

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=1, shift_factor=0.0, scaling_factor=1.0
    ).eval()
    parts = {**made("Flux").components, "vae": vae}
    pipe = FluxImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    cached(pipe)
    image = Image.new("RGB", (8, 8), (200, 60, 20))
    call = {
        "prompt_embeds": text(1, 6, 12),
        "pooled_prompt_embeds": text(1, 8),
        "height": 8,
        "width": 8,
        "output_type": "latent",
    }
    pipe(**call, image=image, strength=0.5, num_inference_steps=12, generator=generator())
    assert session(pipe).num_steps == 6 and computed(pipe) == [due(6)]


def test_memory_is_freed_when_the_loop_ends(pipe):
    for at in (1, 99):
        call = stopping(NAME, at)
        if at == 1:
            with pytest.raises(Stop):
                sample(pipe, NAME, 5, **call)
        else:
            sample(pipe, NAME, 5, **call)
        assert len(session(pipe).store) == 0 and session(pipe).store.peak_bytes > 0
    assert not here.loops


def test_no_step_but_the_first_one_waits_for_a_compiler(monkeypatch):
    pipe = cached(made(NAME), "every-5")  # nothing of it is compiled yet
    found, real = [], VariantCompiler.compile

    def compile(self, graph, inputs):
        found.append((session(pipe).history[-1].step, len(session(pipe).history)) if len(session(pipe).history) else (0, 0))
        return real(self, graph, inputs)

    monkeypatch.setattr(VariantCompiler, "compile", compile)
    for _ in range(2):
        sample(pipe, NAME, 6)
    assert found == [(0, 0), (0, 1)], "what computes, then what reuses, when the first call of the first step has run"


def test_components_may_be_exchanged(pipe):
    pipe = cached(made(NAME))
    first = sample(pipe, NAME, 4)
    old = pipe.transformer
    pipe.transformer = short("cogvideox", seed=3)
    other = sample(pipe, NAME, 4)
    assert not torch.equal(first, other) and computed(pipe) == [due(4)]
    assert old.forward.__func__ is type(old).forward
    pipe.transformer = old
    assert torch.equal(sample(pipe, NAME, 4), first)


def test_a_recipe_for_each_component():
    pipe = vdcache.apply(made("Wan 2.2"), {"transformer_2": "every-3"}, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(pipe, "Wan 2.2", 10)
    assert list(applied_to(pipe).denoisers) == ["transformer_2"]
    assert computed(pipe) == [due(session(pipe, "transformer_2").num_steps, 3)]
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_a_module_whose_result_another_one_takes_is_left_alone():
    """As a ControlNet's is: it is no denoiser."""
    pipe = made(NAME)
    kind = type(pipe)

    class Helper(nn.Module):
        """Adds something to the text, with a timestep and branches of its own."""

        def __init__(self):
            super().__init__()
            self.net = short("cogvideox", seed=5)

        def forward(self, hidden_states, encoder_hidden_states, timestep):
            out = self.net(hidden_states, encoder_hidden_states, timestep, return_dict=False)[0]
            return encoder_hidden_states + out.mean()

    class Helped(kind):
        def __call__(self, **kwargs):
            plain = self.transformer.forward

            def forward(**given):
                words = self.helper(given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
                return plain(**{**given, "encoder_hidden_states": words})

            self.transformer.__dict__["call"] = forward
            denoiser, self.transformer = self.transformer, Calls(self.transformer, forward)
            try:
                return kind.__call__(self, **kwargs)
            finally:
                self.transformer = denoiser

        @property
        def components(self):
            return {**super().components, "helper": self.helper, "transformer": self.__dict__["main"]}

    class Calls:
        """The denoiser, called by way of the helper."""

        def __init__(self, model, forward):
            self.model, self.call = model, forward

        def __getattr__(self, name):
            return getattr(self.model, name)

        def __call__(self, **given):
            return self.call(**given)

    pipe.__class__ = Helped
    pipe.__dict__["helper"] = Helper().eval().requires_grad_(False)
    pipe.__dict__["main"] = pipe.transformer
    cached(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = sample(pipe, NAME, 5)
        assert applied_to(pipe).denoisers["helper"].helper and not applied_to(pipe).denoisers["transformer"].helper
        assert session(pipe).history.computed_steps() == due(5)
        assert torch.equal(sample(pipe, NAME, 5), first)
    out = io.StringIO()
    vdcache.summary(pipe, file=out)
    assert "left alone, because another denoiser takes what it returns: helper" in out.getvalue()


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_without_a_recipe_the_steps_are_found_on_the_pipeline(monkeypatch, tmp_path):
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path))
    pipe = made(NAME)
    plain, again = sample(pipe, NAME, 8), sample(pipe, NAME, 8, seed=1)
    vdcache.apply(pipe, inner="eager", speedup=1.5, search_share=math.inf)
    with informed() as told:
        assert torch.equal(sample(pipe, NAME, 8), plain)
    assert ["computed in full" in t for t in told] == [True, False]
    found = session(pipe).calibration
    cached = sample(pipe, NAME, 8, seed=1)
    assert (
        session(pipe).history.computed_steps() == list(found.schedule.computed)
        and len(found.schedule.computed) < found.schedule.steps
    )
    assert not found.note and not torch.equal(cached, again)
    vdcache.remove(pipe)
    vdcache.apply(pipe, inner="eager", speedup=1.5, search_share=math.inf)  # as another process would
    assert torch.equal(sample(pipe, NAME, 8, seed=1), cached)
    vdcache.remove(pipe)
    with pytest.raises(vdcache.errors.ConfigError, match="a goal stands there"):
        vdcache.apply(pipe, {"transformer": "vdcache-auto"}, speedup=2.0)


def test_the_search_in_pieces_on_a_pipeline_finds_the_same(monkeypatch, tmp_path):
    pipe, found = made(NAME), []
    for share in (math.inf, 0.25):
        monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / str(share)))
        vdcache.apply(pipe, inner="eager", speedup=1.5, search_share=share)
        for seed in range(30):
            sample(pipe, NAME, 8, seed=seed)
            if not session(pipe).calibration.tentative:
                break
        found.append((session(pipe).calibration.schedule, session(pipe).calibration.tried))
        vdcache.remove(pipe)
    assert found[0] == found[1] and seed > 3


def test_summary(pipe, capsys):
    sample(pipe, NAME, 4)
    vdcache.summary(pipe)
    printed = capsys.readouterr().out
    assert "transformer (CogVideoXTransformer3DModel)" in printed and "2 of 4 steps" not in printed
    assert "3 of 4 steps computed" in printed and "MiB of cache at most" in printed and "cond" not in printed.split("\n")[0]
    vdcache.summary(cached(made(NAME)))
    assert "no loop has run yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1, "1 step, so the first step has nothing to reuse: 'every-2' reuses at most 0 of 1$"),
        (4, r"4 steps, so little can be skipped: 'every-2' reuses at most 1 of 4 \(steps 1, counted from 0\)"),
    ],
)
def test_few_steps_leave_little_to_skip(pipe, steps, message):
    fresh = cached(made(NAME))
    with pytest.warns(vdcache.VdcacheWarning, match=f"transformer: {message}") as said:
        sample(fresh, NAME, steps)
    assert {w.filename for w in said} == {sample.__code__.co_filename}, "the line that calls the pipeline"
    assert computed(fresh) == [due(steps)]


def test_a_schedule_for_another_number_of_steps_computes_everything_and_says_so():
    table = vdcache.Recipe("table", vdcache.policies.PlanTable(((), ("all",), ())))
    pipe = cached(made(NAME), table)
    with pytest.warns(vdcache.VdcacheWarning, match="transformer: 'table' cannot be followed for 5 steps.*is for 3 steps"):
        got = sample(pipe, NAME, 5)
    assert torch.equal(got, sample(made(NAME), NAME, 5))
    assert not torch.equal(sample(pipe, NAME, 3), sample(made(NAME), NAME, 3))
    strict = cached(made(NAME), table, strict=True)
    with pytest.raises(vdcache.errors.ConfigError, match="is for 3 steps"):
        sample(strict, NAME, 5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(match, *args, **kwargs):
    with pytest.raises(vdcache.errors.ConfigError, match=match):
        vdcache.apply(*args, **kwargs)


def test_no_pipeline():
    from diffusers import WanPipeline

    refused(r"got the model Linear, for which there is vdcache\.compile", nn.Linear(2, 2))
    refused("takes a diffusers pipeline .* got str", "wan")
    refused("not the class", WanPipeline)


def test_no_denoiser():
    pipe = made(NAME)
    pipe.transformer = None
    refused(r"CogVideoXPipeline holds no denoiser.*scheduler \(CogVideoXDDIMScheduler\)", pipe)


def test_no_scheduler():
    pipe = made(NAME)
    pipe.scheduler = None
    refused("holds no scheduler", pipe)


def test_no_loop():
    from diffusers import DiffusionPipeline

    class Bare(DiffusionPipeline):
        def __init__(self, transformer, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        def __call__(self):
            return self.transformer

    parts = made(NAME).components
    refused(r"Bare never asks for self\.progress_bar", Bare(parts["transformer"], parts["scheduler"]))


def test_twice(pipe):
    refused(r"applied to this pipeline already, with 'every-2'; .*vdcache\.remove\(pipe\)", pipe, "adacache-fast")


def test_removed_twice():
    pipe = cached(made(NAME))
    vdcache.remove(pipe)
    with pytest.raises(vdcache.errors.ConfigError, match=r"not applied to this CogVideoXPipeline; vdcache\.apply"):
        vdcache.remove(pipe)
    with pytest.raises(vdcache.errors.ConfigError, match="not applied"):
        vdcache.summary(pipe)


def test_options():
    pipe = made(NAME)
    refused("no recipe is called 'adacache-fats'; did you mean adacache-fast", pipe, "adacache-fats")
    refused("unknown argument 'ful_graph'; did you mean 'fullgraph'", pipe, "every-2", ful_graph=True)
    refused("inner is inductor, eager or auto", pipe, "every-2", inner="fast")
    refused("no denoiser called 'unet'; its modules are transformer", pipe, {"unet": "every-2"})
    assert "progress_bar" not in pipe.__dict__


def test_a_cache_of_somebody_elses():
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    pipe = made(NAME)
    pipe.transformer = build("cogvideox")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    refused(r"transformer has a cache enabled already.*: pipe\.transformer\.disable_cache\(\)", pipe)
    pipe.transformer.disable_cache()
    plain = sample(cached(pipe), NAME, 4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    count = len(session(pipe).history)
    with pytest.warns(vdcache.VdcacheWarning, match=r"another cache enabled, so vdcache leaves it alone.*disable_cache"):
        sample(pipe, NAME, 4)
    assert len(session(pipe).history) == count
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, NAME, 4), plain)
    other = made(NAME)
    other.transformer = build("cogvideox")
    apply_first_block_cache(other.transformer, FirstBlockCacheConfig())
    refused("turn it off first: .*remove_hook", other)


def test_cache_dit_is_named_by_its_own_line():
    pipe = made(NAME)
    pipe.transformer._is_cached = True
    refused(r"cache_dit\.disable_cache\(pipe\)", pipe)


def test_compiled_already():
    pipe = made(NAME)
    model = pipe.transformer
    pipe.transformer = torch.compile(model, backend="eager")
    refused(r"compiled already.*pipe\.transformer = pipe\.transformer\._orig_mod", pipe)
    pipe.transformer = model
    model.compile(backend="eager")
    refused(r"compiled in place already", pipe)


@pytest.mark.parametrize("strict", [False, True])
def test_a_recipe_that_finds_no_slot_in_one_of_two_transformers(strict):
    """The second expert has one block, and the recipe reuses all but the first two."""
    from vdcache.testing.architectures import _wan

    pipe = made("Wan 2.2")
    pipe.transformer, pipe.transformer_2 = build("wan"), _wan(num_layers=1).eval().requires_grad_(False)
    recipe = vdcache.methods.dbcache(2, 0, 0.5, warm_up=1)
    cached(pipe, recipe, strict=strict)
    if strict:
        with pytest.raises(vdcache.errors.CaptureError, match=r"no slot|nothing to probe"):
            sample(pipe, "Wan 2.2", 12)
        return
    with pytest.warns(
        vdcache.VdcacheWarning, match=r"finds no slot in transformer_2 .*every step of it is computed; transformer is cached"
    ):
        sample(pipe, "Wan 2.2", 12)
    assert not torch.equal(sample(pipe, "Wan 2.2", 12), torch.zeros(1))


def test_running_in_two_threads_is_refused():
    """A pipeline has one scheduler; two loops at once would mix its steps."""
    import threading

    pipe, errors = cached(made(NAME)), []

    def second(*args, **kwargs):
        def call():
            try:
                sample(pipe, NAME, 3)
            except vdcache.errors.CacheStateError as error:
                errors.append(str(error))

        if not errors:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        return {}

    want = sample(cached(made(NAME)), NAME, 4)
    got = sample(pipe, NAME, 4, callback_on_step_end=second)
    assert errors and "is running in another thread" in errors[0]
    assert got.shape == want.shape


# ---- wrapped and compiled transformers -------------------------------------------------------------------------------


class Forwarding(nn.Module):
    """A wrapper that hands on every attribute of what it wraps, as PEFT's, DDP's and torch.compile's do."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))


WRAPPERS = {
    "wrapper": Forwarding,
    "two wrappers": lambda model: Forwarding(Forwarding(model)),
    "PeftModel": adapted,
    "wrapper of a compiled model": lambda model: Forwarding(torch.compile(model, backend="eager")),
}


# two wrappers hand on what one does
@pytest.mark.parametrize("kind", some(WRAPPERS, lambda kind: kind != "wrapper"))
def test_a_wrapped_transformer_is_cached_and_its_lanes_are_heard(kind):
    """`cache_context` was looked for in the wrapper's class."""
    pipe = made("Wan")
    inner = pipe.transformer
    pipe.transformer = WRAPPERS[kind](inner)
    plain = sample(pipe, "Wan", 4)
    held = set(vars(inner)), set(vars(pipe.transformer))
    assert torch.equal(sample(cached(pipe, "always"), "Wan", 4), plain)
    vdcache.remove(pipe)
    cached(pipe)
    assert not torch.equal(sample(pipe, "Wan", 4), plain)
    assert computed(pipe) == [due(4)] and {r.lane for r in session(pipe).history} == {"cond", "uncond"}
    other = copy.deepcopy(pipe)
    assert torch.equal(sample(other, "Wan", 4), sample(pipe, "Wan", 4))
    assert {r.lane for r in session(other).history} == {"cond", "uncond"}, "a copy hears its lanes as well"
    vdcache.remove(pipe)
    assert (set(vars(inner)), set(vars(pipe.transformer))) == held and torch.equal(sample(pipe, "Wan", 4), plain)


def test_a_transformer_that_is_compiled_in_place_later_is_not_gone_past():
    pipe = cached(made(NAME))
    want = sample(pipe, NAME, 3)
    ran = []

    def backend(graph, inputs):
        ran.append(1)
        return graph.forward

    pipe.transformer.compile(backend=backend, fullgraph=True)
    own = pipe.transformer._compiled_call_impl
    with pytest.warns(vdcache.VdcacheWarning, match=r"transformer was compiled in place.* after vdcache\.apply") as said:
        assert torch.equal(sample(pipe, NAME, 3), want) and torch.equal(sample(pipe, NAME, 3), want)
    assert len([w for w in said if "vdcache" in str(w.message)]) == 1, [str(w.message) for w in said]
    assert computed(pipe) == [due(3)] and not ran
    call = {
        "hidden_states": text(1, 3, 4, 8, 8),
        "encoder_hidden_states": text(1, 6, 12),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    with torch.no_grad():
        pipe.transformer(**call)
    assert ran, "outside the pipeline it is the user's compilation that runs"
    vdcache.remove(pipe)
    assert pipe.transformer._compiled_call_impl is own


def test_a_transformer_that_is_exchanged_for_a_compiled_one_is_cached():
    pipe = cached(made(NAME))
    want = sample(pipe, NAME, 3)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(sample(pipe, NAME, 3), want) and computed(pipe) == [due(3)]


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_said_of_a_helper_without_a_slot(strict):
    """Of a ControlNet, which is left alone anyway, every refusal was listed."""
    from diffusers import CogVideoXPipeline

    class Hints(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(12, 12).requires_grad_(False)

        def forward(self, words):
            return self.lin(words).tanh()

    class Helped(CogVideoXPipeline):
        @property
        def components(self):
            return {**super().components, "hints": self.hints}

    pipe = made(NAME)
    hints, model = Hints(), pipe.transformer
    pipe.__class__ = Helped
    pipe.__dict__["hints"] = hints
    scale = pipe.scheduler.scale_model_input

    def scaled(*args, **kwargs):  # the loop calls this before each call of the transformer
        words.append(hints(text(2, 6, 12)))
        return scale(*args, **kwargs)

    words: list = []

    def hinted(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": words[-1]}

    pipe.scheduler.scale_model_input = scaled
    handle = model.register_forward_pre_hook(hinted, with_kwargs=True)
    cached(pipe, strict=strict)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sample(pipe, NAME, 4)
    handle.remove()
    assert session(pipe).history.computed_steps() == due(4) and applied_to(pipe).denoisers["hints"].helper
    assert not [str(w.message) for w in said if "hints" in str(w.message)]


def test_hooks_that_stay_on_single_layers_are_named(request):
    """Three messages said the same."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Breaking(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            torch._dynamo.graph_break()
            return args, kwargs

    request.addfinalizer(torch._dynamo.reset)  # Dynamo leaves the class alone for the process where hooks break its forward
    pipe = made(NAME)
    for module in pipe.transformer.modules():
        if isinstance(module, nn.Linear):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Breaking(), "breaking")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sample(cached(pipe), NAME, 6)
    (message,) = [str(w.message) for w in said if "vdcache" in str(w.message)]
    assert "single layers (Breaking)" in message and "take the others off" in message


def test_an_offloaded_and_cast_denoiser_is_cached_and_left_as_it_was():
    """Both at once, under the hook that group offloading puts in front of the whole model."""
    pipe = made(NAME)
    model = pipe.transformer
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    plain = sample(pipe, NAME, 5)
    before = [m.__dict__.get("forward") for m in model.modules() if m is not model]
    assert torch.equal(sample(cached(pipe, "always"), NAME, 5), plain)
    vdcache.remove(pipe)
    sample(cached(pipe), NAME, 5)
    assert session(pipe).history.computed_steps() == due(5) and len(session(pipe).graphs) == 1
    vdcache.remove(pipe)
    assert [m.__dict__.get("forward") for m in model.modules() if m is not model] == before
    assert torch.equal(sample(pipe, NAME, 5), plain)


def test_a_model_that_was_compiled_block_by_block_is_cached_as_a_whole():
    pipe = made("Wan")
    pipe.transformer.compile_repeated_blocks(backend="vdcache", options={"recipe": "every-2", "inner": "eager"})
    with pytest.warns(vdcache.VdcacheWarning, match="compile the whole of it"):
        plain = sample(pipe, "Wan", 5)
    assert torch.equal(plain, sample(made("Wan"), "Wan", 5))
    assert not torch.equal(sample(cached(pipe), "Wan", 5), plain)
    assert session(pipe).history.computed_steps() == due(5) and len(session(pipe).graphs) == 1
