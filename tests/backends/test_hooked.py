"""Layers behind hooks that cast or move their weights: cached as one graph, right to the last bit, and left as they were found."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import vdcache
from tests.support.thorough import some
from vdcache.backends.hooked import HookedModel
from vdcache.backends.hooks import hooks_of, streams_of
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions
from vdcache.ir.stand_ins import stored

hooks = pytest.importorskip("diffusers.hooks")
accelerate = pytest.importorskip("accelerate")
CPU, STEPS = torch.device("cpu"), 6


def cast(model: nn.Module) -> None:
    hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "embed"))


def leaves(model: nn.Module) -> None:
    hooks.apply_group_offloading(model, CPU, CPU, "leaf_level")


def blocks(model: nn.Module) -> None:
    hooks.apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=2)


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU)


def cast_leaves(model: nn.Module) -> None:
    cast(model)
    leaves(model)


MODES = [cast, leaves, blocks, sequential, cast_leaves]
FORMS = [cast, sequential, cast_leaves]  # in which the weights arrive in another form than they are stored in


def made(*modes, seed: int = 0, layers: int = 2) -> DemoDiT:
    """As few blocks as a test needs, because Dynamo follows each hooked layer: two show that blocks repeat, one has every kind of layer."""
    torch.manual_seed(seed)
    layers = 3 if blocks in modes else layers  # one whole group of two and one that is not
    model = DemoDiT(DemoConfig(num_layers=layers)).eval().requires_grad_(False)
    for mode in modes:
        mode(model)
    return model


def call(step: int):
    noise = torch.Generator().manual_seed(step)
    x = with_positions(torch.randn(1, 3, 3, 16, 16, generator=noise))
    return x, torch.tensor([1000.0 - 100 * step]), torch.ones(1, 5, 32)


def compiled(model: nn.Module, recipe: str = "every-3", **options):
    return vdcache.compile(model, recipe, num_steps=STEPS, **{"inner": "eager", "strict": True, **options})


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@dataclass
class Used:
    """A model behind hooks that was compiled once, and what was seen of it: compiling one takes seconds."""

    model: nn.Module
    fast: Any
    states: list[Any]  # before the first call, and after it
    equal: list[bool]  # whether a step was the model with its hooks, bit for bit
    brought: list[bool]  # whether hooks brought a weight of a block in a step
    computed: list[int]


@pytest.fixture(scope="module", params=MODES)
def used(request):
    """One generation under each form. Tests look at it and change nothing; Dynamo has forgotten it."""
    mode, brought = request.param, Counter()

    def counts(patch, kind):
        plain = kind.pre_forward

        @torch.compiler.disable  # Dynamo would follow the sum over all parameters of the model
        def pre_forward(self, module, *args, **kwargs):
            bytes_of = sum(p.nbytes for p in module.parameters())
            brought["blocks" if names[module].startswith("blocks") else "others"] += bytes_of
            return plain(self, module, *args, **kwargs)

        patch.setattr(kind, "pre_forward", pre_forward)

    from accelerate.hooks import AlignDevicesHook
    from diffusers.hooks.group_offloading import GroupOffloadingHook
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for kind in (AlignDevicesHook, GroupOffloadingHook, LayerwiseCastingHook):
            counts(patch, kind)
        model = made(mode)
        names = {m: n for n, m in model.named_modules()}
        found = Used(model, compiled(model), [_state(model)], [], [], [])
        for step in range(STEPS):
            brought.clear()
            out = found.fast(*call(step))
            found.brought.append(bool(brought["blocks"]))
            found.states.append(_state(model))
            found.equal.append(torch.equal(out, model(*call(step))))
    found.computed = found.fast.vdcache.history.computed_steps()
    return found


def test_a_computed_step_is_the_model_with_its_hooks_bit_for_bit(used):
    assert used.equal == [step in (0, 3, 5) for step in range(STEPS)]
    assert used.computed == [0, 3, 5] and len(used.fast.vdcache.graphs) == 1


def test_a_reuse_step_brings_no_weight_of_a_block(used):
    """Neither by a hook nor by the graph."""
    assert used.brought == [True] + [False] * (STEPS - 1), "vdcache has watched one forward"
    (graph,) = used.fast.vdcache.graphs
    read = {plan: _weights_read(graph, plan) for plan in graph.variants.plans}
    (reuse,) = filter(None, read)
    in_blocks = [n for n in read[vdcache.Plan()] if "blocks." in n]
    assert len(in_blocks) > 20 and not [n for n in read[reuse] if "blocks." in n]


def _weights_read(graph, plan) -> list[str]:
    """The names of the stored weights that a variant reads."""
    variant = graph.variants[plan].graph.graph
    named = zip(variant.find_nodes(op="placeholder"), graph.guarded.captured.signature.names, strict=False)
    return [name for i, (node, name) in enumerate(named) if i in graph.inputs.static and node.users]


@pytest.mark.parametrize("used", FORMS, indirect=True)
def test_weights_are_brought_right_before_they_are_used(used, request):
    """Else all of them would be there at once, and offloading saves that memory."""
    nodes = list(used.fast.vdcache.graphs[0].variants.recompute.graph.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    casts = [n for n in nodes if n.target is torch.ops.aten._to_copy.default and n.args[0].op == "placeholder"]
    if request.node.callspec.params["used"] is not sequential:  # from the CPU to the CPU there is nothing to do
        assert len(casts) > 20
    assert all(min(at[u] for u in n.users) - at[n] <= 3 for n in casts)
    layers = [n for n in nodes if n.target is torch.ops.aten.linear.default]
    assert len(layers) > 20 and all("demo/model.py" in n.meta["stack_trace"] for n in layers)


def test_the_model_is_left_as_it_was_found(used):
    before, *after = used.states
    assert after == [before] * STEPS


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_fails_leaves_the_model_as_it_was_found(mode):
    model = made(mode, layers=1)
    before = _state(model)
    fast = compiled(model)
    fast(*call(0))
    with pytest.raises(Exception, match=r"shape|size"):
        fast(call(1)[0], call(1)[1], torch.ones(1, 5, 7))
    assert [forward for _, forward, _ in _state(model)] == [forward for _, forward, _ in before]
    assert not any(stored(p) is not None for p in model.parameters())
    fast(*call(1))
    assert fast.vdcache.history[-1].step == 1 and (
        _state(model) == before or mode is sequential
    )  # whose hooks an error leaves halfway


def _state(model: nn.Module) -> list[object]:
    return [
        (n, id(m.__dict__.get("forward")), [(k, p.dtype, p.device) for k, p in m._parameters.items() if p is not None])
        for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("mode", FORMS)
def test_a_weight_changed_between_steps_is_noticed(mode):
    model = made(mode, layers=1)
    fast = compiled(model)
    for step in range(2):
        fast(*call(step))
    assert fast.vdcache.history.computed_steps() == [0]
    layer = model.blocks[0].ffn.net[2]
    (layer._hf_hook.weights_map["weight"] if mode is sequential else layer.weight).copy_(torch.ones(()))
    out = fast(*call(2))
    assert fast.vdcache.history.computed_steps() == [0, 2] and torch.equal(out, model(*call(2)))


# each form by itself; both hooks at once in `make thorough`
@pytest.mark.parametrize("mode", some(FORMS, lambda mode: mode is not cast_leaves))
def test_under_inference_mode_and_at_other_sizes(mode):
    model = made(mode, layers=1)
    fast = compiled(model)
    for size in (16, 32, 24):
        for step in range(STEPS):
            x = with_positions(torch.randn(1, 3, 3, size, size, generator=torch.Generator().manual_seed(step)))
            with torch.inference_mode():
                out, want = fast(x, *call(step)[1:]), model(x, *call(step)[1:])
            assert torch.equal(out, want) == (step in (0, 3, 5))


def test_streams_that_bring_weights_ahead_are_waited_for():
    """Else a graph would read what is still on its way."""

    class Stream:
        waited = 0

        def synchronize(self):
            Stream.waited += 1

    model = made(leaves, layers=1)
    fast = compiled(model, "always")
    fast(*call(0))
    stream = Stream()
    for layer in HookedModel.of(model).layers:
        layer.streams = {stream}
    fast(*call(1))
    assert Stream.waited == 1
    (hook,) = hooks_of(model.blocks[0].ffn.net[2])
    assert streams_of([hook]) == set()
    hook.group.stream = stream
    assert streams_of([hook]) == {stream}


def test_a_call_within_a_call_finds_the_hooks_off():
    model = made(cast, layers=1)
    compiled(model, "always")(*call(0))
    hooked, before = HookedModel.of(model), _state(model)
    with hooked.bare():
        inside = _state(model)
        with HookedModel.of(model).bare():
            assert _state(model) == inside != before
        assert _state(model) == inside
    assert _state(model) == before


@pytest.mark.parametrize("mode", [cast, cast_leaves])
def test_a_first_call_that_fails_spoils_nothing(mode):
    """sequential offloading leaves half of the weights where they were brought, with or without vdcache."""
    model = made(mode, layers=1)
    fast = compiled(model)
    with pytest.raises(Exception, match=r"shape|size"):
        fast(*call(0)[:2], torch.ones(1, 5, 7))
    for step in range(STEPS):
        assert torch.equal(fast(*call(step)), model(*call(step))) == (step in (0, 3, 5))


def test_two_models_of_one_class_do_not_mix():
    models = [made(mode, seed=seed, layers=1) for seed, mode in enumerate((cast, cast, sequential))]
    fast = [compiled(model) for model in models]
    for step in range(2):
        for one, model in zip(fast, models, strict=True):
            assert torch.equal(one(*call(step)), model(*call(step))) == (step == 0)


def test_hooks_that_come_and_go_are_noticed():
    model = made()
    fast = compiled(model, "always")
    assert torch.equal(fast(*call(0)), model(*call(0)))
    sequential(model)
    assert torch.equal(fast(*call(1)), model(*call(1))) and len(HookedModel.of(model).layers) > 20
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(fast(*call(2)), model(*call(2))) and not HookedModel.of(model).layers


def test_a_model_moved_to_another_type_is_looked_at_again():
    model = made(cast, layers=1)
    fast = compiled(model, "always")
    assert torch.equal(fast(*call(0)), model(*call(0)))
    layer = model.blocks[0].ffn.net[2]
    layer.weight.data = layer.weight.data.to(torch.float16)  # the hook casts this to float32 as well
    assert torch.equal(fast(*call(1)), model(*call(1)))


def test_weights_on_the_disk_stay_there(tmp_path):
    from accelerate import disk_offload

    model, same = made(layers=1), made(layers=1)
    disk_offload(model, str(tmp_path), execution_device=CPU)
    fast = compiled(model, strict=False)
    with pytest.warns(vdcache.VdcacheWarning, match="is kept on the disk"):
        for step in range(3):
            assert torch.equal(fast(*call(step)), same(*call(step)))


def test_a_hook_that_vdcache_does_not_know_stays():
    seen = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model = made(cast, layers=1)
    hooks.HookRegistry.check_if_exists_or_initialize(model.blocks[0].ffn.net[2]).register_hook(Counting(), "counting")
    fast = compiled(model, "always", strict=False)
    assert torch.equal(fast(*call(0)), model(*call(0))) and len(seen) == 3  # watched, compiled, and the model itself


@pytest.mark.parametrize("mode", FORMS)
def test_what_dynamo_leaves_to_python_runs_with_its_hooks(mode, monkeypatch):
    """There nothing else brings the weights."""
    model = made(mode, layers=1)
    monkeypatch.setattr(model.blocks[0].ffn, "forward", torch.compiler.disable(model.blocks[0].ffn.forward))
    fast = compiled(model, "always", strict=False)
    for step in range(2):
        assert torch.equal(fast(*call(step)), model(*call(step)))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(fast(*call(0)), model(*call(0)))


def test_hooks_that_change_what_passes_stay_on(monkeypatch):
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    plain = LayerwiseCastingHook.post_forward
    monkeypatch.setattr(LayerwiseCastingHook, "post_forward", lambda self, m, out: plain(self, m, out) + 1)
    model = made(cast, layers=1)
    fast = compiled(model, "always", strict=False)
    with pytest.warns(vdcache.VdcacheWarning, match=r"hooks on inner modules .* stay on.*: blocks\.0.*change what it returns"):
        out = fast(*call(0))
    assert torch.equal(out, model(*call(0)))
    with pytest.raises(vdcache.CaptureError, match="stay on"):
        compiled(made(cast, layers=1))(*call(0))


def test_a_model_that_looks_at_stored_weights_is_not_changed():
    """Outside a layer's forward its weights are of the small type, and a model may go by that."""

    class Looks(DemoDiT):
        def forward(self, x, *rest):
            return super().forward(x.to(self.blocks[0].ffn.net[2].weight.dtype).to(x.dtype), *rest)

    torch.manual_seed(0)
    model = Looks(DemoConfig(num_layers=1)).eval().requires_grad_(False)
    cast(model)
    fast = compiled(model, strict=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            assert torch.equal(fast(*call(step)), model(*call(step)))
    messages = [str(w.message) for w in said if "stay on" in str(w.message)]
    assert len(messages) == 1 and "without them the model computes something else" in messages[0]


# `cast` and `leaves` are both hooks of diffusers
@pytest.mark.parametrize("mode", some([cast, leaves, sequential], lambda mode: mode is not leaves))
def test_the_string_backend_says_what_to_use(mode):
    """Dynamo has cut the model before a backend sees it."""
    model = made(mode, layers=1)
    fast = torch.compile(model, backend="vdcache", options={"recipe": "every-3", "inner": "eager", "num_steps": STEPS})
    with pytest.warns(vdcache.VdcacheWarning, match=r"breaks this model at the hooks .* vdcache.compile\(model\) takes"):
        assert torch.equal(fast(*call(0)), model(*call(0)))


def test_gradients_leave_the_hooks_alone():
    model = made(cast, layers=1).requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compiled(model, strict=False)(*call(0))
    assert out.requires_grad and not HookedModel.of(model).watched


def test_threads_take_turns():
    model = made(sequential, layers=1)
    fast = compiled(model, "always", strict=False)
    want = [model(*call(step)) for step in range(4)]
    got = {}

    def run(step):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got[step] = fast(*call(step))

    run(0)
    threads = [threading.Thread(target=run, args=(step,)) for step in range(1, 4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(got[step], want[step]) for step in range(4))


@torch._functorch.config.patch(enable_autograd_cache=False)
@torch._inductor.config.patch(fx_graph_cache=False)
def test_inductor_takes_the_sizes_of_stored_weights_for_numbers():
    """Else it adds guards that Dynamo cannot read. A graph that it knows adds none, so it is to look at it again."""
    model = made(cast, layers=1)
    fast, plain = compiled(model, inner="inductor"), made(cast, layers=1)
    for step in range(STEPS):
        out = fast(*call(step))
        if step in (0, 3, 5):
            torch.testing.assert_close(out, plain(*call(step)), rtol=1e-3, atol=1e-3)
    assert fast.vdcache.history.computed_steps() == [0, 3, 5]


def test_the_string_backend_is_content_with_a_hook_around_the_model():
    model = made(layers=1)
    accelerate.cpu_offload_with_hook(model, CPU)
    fast = torch.compile(model, backend="vdcache", options={"recipe": "every-3", "inner": "eager", "num_steps": STEPS})
    with warnings.catch_warnings(), vdcache.record() as history:
        warnings.simplefilter("error", vdcache.VdcacheWarning)
        for step in range(STEPS):
            assert torch.equal(fast(*call(step)), model(*call(step))) == (step in (0, 3, 5))
    assert history.computed_steps() == [0, 3, 5]
