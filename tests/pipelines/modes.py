"""What happens to a pipeline between and within calls, checked on every pipeline: `python -m tests.pipelines.modes` writes
the table of docs/pipelines.md (names of pipelines and modes as arguments: those alone).

Each check brings a pipeline that has run before into a mode and compares it, bit for bit, with one that was made and
cached in that mode: nothing of what was before may be left. It answers "" where the mode holds, else why there is no such mode.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
import pickle
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vdcache
from tests.pipelines.tiny import PIPELINES, generator, made, sample
from vdcache.pipelines.pipeline_cache import applied_to

RECIPE, STEPS = "every-2", 5
RESULTS = Path(__file__).with_name("modes.json")
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
MODES: dict[str, Callable[[str], str]] = {}


def mode(check: Callable[[str], str]) -> Callable[[str], str]:
    MODES[check.__name__.removeprefix("_").replace("_", " ")] = check
    return check


# ---- what the checks share -------------------------------------------------------------------------------------------


def cached(pipe: Any, recipe: Any = RECIPE, **options: Any) -> Any:
    return vdcache.apply(pipe, recipe, inner="eager", **options)


@functools.cache
def kept(name: str) -> Any:
    """One cached pipeline of each kind stays alive, and with it what is compiled."""
    return cached(made(name))


def used(name: str, **options: Any) -> Any:
    """A cached pipeline that has run."""
    kept(name)
    pipe = cached(made(name), **options)
    sample(pipe, name, STEPS)
    return pipe


def denoisers(pipe: Any) -> list[nn.Module]:
    return [m for n, m in pipe.components.items() if isinstance(m, nn.Module) and n.startswith("transformer")]


def computed(pipe: Any) -> list[list[int]]:
    """The computed steps of every denoiser in its last generation."""
    return [d.session.history.computed_steps() for d in applied_to(pipe).denoisers.values()]


def generations(pipe: Any) -> int:
    """How many generations there are in the history of the denoisers."""
    return sum(d.session.history[-1].generation + 1 for d in applied_to(pipe).denoisers.values())


def due(steps: int, every: int = 2) -> list[int]:
    return [s for s in range(steps) if s % every == 0 or s == steps - 1]


def on_schedule(pipe: Any, steps: int) -> bool:
    """Whether every denoiser computed what its schedule says of the steps that were its own, and they are all steps."""
    own = [
        len({r.step for r in d.session.history.generation() if r.generation == d.session.history[-1].generation})
        for d in applied_to(pipe).denoisers.values()
    ]
    return sum(own) == steps and computed(pipe) == [due(n) for n in own]


def holds(name: str, change: Callable[[Any], Any] = lambda pipe: None, steps: int = STEPS, **call: Any) -> str:
    """A used pipeline after `change`, called with `call`, equals a fresh one; and without vdcache both are the plain one."""
    pipe, fresh = used(name), made(name)
    change(pipe)
    change(fresh)
    try:
        plain = sample(fresh, name, steps, **call)
    except RuntimeError:
        return "the pipeline itself cannot do that"
    want = sample(cached(fresh), name, steps, **call)
    before = generations(pipe)
    got = sample(pipe, name, steps, **call)
    assert torch.equal(got, want), "a used pipeline differs from a fresh one"
    assert got.isfinite().all()
    assert generations(pipe) > before, "vdcache was gone past"
    assert on_schedule(pipe, steps), f"computed {computed(pipe)} of {steps} steps"
    assert not torch.equal(got, plain), "nothing was reused"
    vdcache.remove(pipe)
    assert torch.equal(sample(pipe, name, steps, **call), plain), "removed is not plain"
    return ""


def takes(name: str, *arguments: str) -> str | None:
    parameters = inspect.signature(type(kept(name)).__call__).parameters
    return next((a for a in arguments if a in parameters), None)


def twice(value: Any) -> Any:
    return torch.cat([value, value.flip(1) if value.ndim > 2 else value]) if isinstance(value, Tensor) else value


class Stop(Exception):
    """What a caller's own callback raises."""


def stopping(name: str, at: int) -> dict[str, Any]:
    """Arguments of a call that raises after a step."""
    seen = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > at:
            raise Stop
        return {}

    return {takes(name, "callback_on_step_end", "callback") or "callback": stop}


# ---- the modes -------------------------------------------------------------------------------------------------------


@mode
def _always(name: str) -> str:
    pipe = made(name)
    plain = sample(pipe, name, STEPS)
    assert torch.equal(sample(cached(pipe, "always"), name, STEPS), plain)
    return ""


@mode
def _called_again(name: str) -> str:
    return holds(name)


@mode
def _after_an_error(name: str) -> str:
    def change(pipe: Any) -> None:
        try:
            sample(pipe, name, STEPS, **stopping(name, at=2))
        except Stop:
            return
        raise AssertionError("the callback was not called")

    return holds(name, change)


@mode
def _interrupted(name: str) -> str:
    if not hasattr(type(kept(name)), "interrupt"):
        return "this pipeline cannot be interrupted"

    def change(pipe: Any) -> None:
        def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
            pipe._interrupt = i >= 2
            return {}

        sample(pipe, name, STEPS, callback_on_step_end=stop)

    return holds(name, change)


@mode
def _callbacks(name: str) -> str:
    if (argument := takes(name, "callback_on_step_end")) is None:
        argument = "callback"
    seen: list[int] = []

    def look(*args: Any, **kwargs: Any) -> dict:
        seen.append(1)
        return {}

    holds(name, **{argument: look})
    assert len(seen) == 4 * STEPS, len(seen)  # plain, fresh, used, and without vdcache again
    return ""


@mode
def _guidance_by_callback(name: str) -> str:
    if takes(name, "callback_on_step_end") is None or takes(name, "negative_prompt_embeds") is None:
        return "its callback cannot change the guidance"
    if "negative_prompt_embeds" not in PIPELINES[name].call():
        return "no second lane of guidance"
    if "self.do_classifier_free_guidance" not in inspect.getsource(type(kept(name)).__call__).split("progress_bar", 1)[1]:
        return "guidance is fixed before the loop"

    def off(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        pipe._guidance_scale = 1.0 if i == 1 else 5.0
        return {}

    pipe, fresh = used(name), cached(made(name))
    names = {"callback_on_step_end": off}
    try:
        plain = sample(made(name), name, STEPS, **names)
    except RuntimeError:
        return "the pipeline itself cannot change its batch on the way"
    assert torch.equal(sample(pipe, name, STEPS, **names), sample(fresh, name, STEPS, **names))
    assert torch.equal(sample(cached(made(name), "always"), name, STEPS, **names), plain)
    return ""


@mode
def _several_prompts(name: str) -> str:
    given = PIPELINES[name].call()
    more = {k: twice(v) for k, v in given.items() if "embeds" in k or "mask" in k}
    return holds(name, **more)


@mode
def _several_images(name: str) -> str:
    argument = takes(name, "num_videos_per_prompt", "num_images_per_prompt")
    return holds(name, **{argument: 2}) if argument else "one image a prompt"


@mode
def _other_size(name: str) -> str:
    given = PIPELINES[name].call()
    return holds(name, height=given["height"], width=given["width"] // 2)


@mode
def _other_frames(name: str) -> str:
    argument = takes(name, "num_frames", "video_length")
    if argument is None:
        return "pictures have no frames"
    if name == "Mochi":
        return holds(name, **{argument: 13})
    return holds(name, **{argument: {9: 5, 5: 9, 3: 2, 8: 16}[PIPELINES[name].call()[argument]]})


@mode
def _other_steps(name: str) -> str:
    return holds(name, steps=8)


@mode
def _bf16(name: str) -> str:
    return holds(name, lambda pipe: pipe.to(torch.bfloat16), **_cast(name, torch.bfloat16))


@mode
def _fp16(name: str) -> str:
    return holds(name, lambda pipe: pipe.to(torch.float16), **_cast(name, torch.float16))


def _cast(name: str, dtype: torch.dtype) -> dict[str, Any]:
    call = PIPELINES[name].call()
    return {k: v.to(dtype) for k, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _lora(model: nn.Module, seed: int) -> None:
    """An adapter with weights of its own on every projection of attention."""
    from peft import LoraConfig

    own = f"own{seed}"
    model.add_adapter(LoraConfig(r=2, target_modules=r".*(to_q|to_k|to_v)", init_lora_weights=False), own)
    draw = generator(seed)
    for key, p in model.named_parameters():
        if own in key:
            p.requires_grad_(False)
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    model.set_adapter(own)


@mode
def _LoRA(name: str) -> str:
    """Loaded after a run, exchanged for another one between runs, fused."""
    if not all(hasattr(m, "add_adapter") for m in denoisers(kept(name))):
        return "the class takes no adapter"
    pipe = used(name)
    outputs = []
    for seed in (1, 2):
        fresh = made(name)
        for one in (pipe, fresh):
            for model in denoisers(one):
                _lora(model, seed)
        want = sample(cached(fresh), name, STEPS)
        got = sample(pipe, name, STEPS)
        assert torch.equal(got, want), f"adapter {seed}: a used pipeline differs from a fresh one"
        outputs.append(got)
    assert not torch.equal(*outputs)
    for one in (pipe, fresh):
        for model in denoisers(one):
            model.set_adapter("own2")
            model.fuse_lora()
    assert torch.equal(sample(pipe, name, STEPS), sample(fresh, name, STEPS)), "fused"
    vdcache.remove(pipe)
    vdcache.remove(fresh)
    assert torch.equal(sample(pipe, name, STEPS), sample(fresh, name, STEPS))
    return ""


@mode
def _model_offload(name: str) -> str:
    from accelerate import cpu_offload_with_hook

    return holds(name, lambda pipe: [cpu_offload_with_hook(m, torch.device("cpu")) for m in denoisers(pipe)])


@mode
def _sequential_offload(name: str) -> str:
    """accelerate puts other parameter objects in the place of weights at every forward."""
    from accelerate import cpu_offload

    def change(pipe: Any) -> None:
        for m in pipe.components.values():
            if isinstance(m, nn.Module):
                cpu_offload(m, torch.device("cpu"))

    return holds(name, change)


def _grouped(name: str, **kind: Any) -> str:
    cpu = torch.device("cpu")
    return holds(name, lambda pipe: [m.enable_group_offload(cpu, cpu, **kind) for m in denoisers(pipe)])


@mode
def _group_offload(name: str) -> str:
    return _grouped(name, offload_type="block_level", num_blocks_per_group=1)


@mode
def _leaf_offload(name: str) -> str:
    return _grouped(name, offload_type="leaf_level")


@mode
def _layerwise_casting(name: str) -> str:
    """Weights of 8 bits, cast before their layer and after it."""
    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    return holds(name, lambda pipe: [m.enable_layerwise_casting(**types) for m in denoisers(pipe)])


@mode
def _int8_weights(name: str) -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return holds(name, lambda pipe: [quantize_(m, Int8WeightOnlyConfig()) for m in denoisers(pipe)])


@mode
def _dynamic_shapes(name: str) -> str:
    plain = sample(made(name), name, STEPS)
    pipe = cached(made(name), "always", dynamic=True)
    got = sample(pipe, name, STEPS)
    assert torch.allclose(got, plain, atol=1e-5)
    return ""


@mode
def _checkpointing_flag(name: str) -> str:
    if not all(m._supports_gradient_checkpointing for m in denoisers(kept(name))):
        return "the class has no such flag"
    return holds(name, lambda pipe: [m.enable_gradient_checkpointing() for m in denoisers(pipe)])


@mode
def _other_scheduler(name: str) -> str:
    """Exchanged after vdcache was applied; of second order where the pipeline takes one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

    flow = isinstance(kept(name).scheduler, FlowMatchEulerDiscreteScheduler) or "flow" in str(kept(name).scheduler.config)
    if flow and takes(name, "sigmas"):
        return "it takes only schedulers that are given sigmas"
    new = FlowMatchHeunDiscreteScheduler if flow else HeunDiscreteScheduler
    evaluations = 2 * STEPS - 1

    def change(pipe: Any) -> None:
        pipe.scheduler = new()

    pipe, fresh = used(name), made(name)
    change(pipe)
    change(fresh)
    try:
        plain = sample(fresh, name, STEPS)
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return f"it takes no {new.__name__}"
    want = sample(cached(fresh), name, STEPS)
    assert torch.equal(sample(pipe, name, STEPS), want)
    assert on_schedule(pipe, evaluations), computed(pipe)
    vdcache.remove(pipe)
    assert torch.equal(sample(pipe, name, STEPS), plain)
    return ""


@mode
def _copied(name: str) -> str:
    """A copy of the pipeline has a state of its own; copies and pickles of its parts are plain parts."""
    pipe = used(name)
    want = sample(pipe, name, STEPS)
    other = copy.deepcopy(pipe)
    assert torch.equal(sample(other, name, STEPS), want)
    assert on_schedule(other, STEPS)
    assert applied_to(other) is not applied_to(pipe)
    vdcache.remove(other)
    plain = sample(other, name, STEPS)
    assert torch.equal(plain, sample(made(name), name, STEPS))
    for part, module in [
        (n, m) for n, m in pipe.components.items() if isinstance(m, nn.Module) and n.startswith("transformer")
    ]:
        setattr(other, part, pickle.loads(pickle.dumps(module)))
    assert torch.equal(sample(other, name, STEPS), plain)
    assert torch.equal(sample(pipe, name, STEPS), want)
    return ""


# ---- the table -------------------------------------------------------------------------------------------------------


def result(name: str, check: str) -> str:
    """A cell: "yes", or why there is no such mode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return MODES[check](name) or "yes"
    finally:
        if "offload" in check or "casting" in check:  # hooks within a model leave traces in what Dynamo knows of its class
            kept.cache_clear()
            torch._dynamo.reset()


def table(results: dict[str, dict[str, str]]) -> str:
    """The table as the page has it, with a note for every mode that a pipeline does not have."""
    names = list(next(iter(results.values())))
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names)]
    for pipeline, row in results.items():
        cells = ["✓" if row[n] == "yes" else f"– ({notes.setdefault(row[n], len(notes) + 1)})" for n in names]
        lines.append(f"| {pipeline} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({number}) {note}  " for note, number in notes.items())]).rstrip()


def written(page: str, results: dict[str, dict[str, str]]) -> str:
    """The page with its table replaced."""
    return re.sub(r"(<!-- modes -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(results)}\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    wanted = [a for a in sys.argv[1:] if a in PIPELINES] or list(PIPELINES)
    checks = [a for a in sys.argv[1:] if a in MODES] or list(MODES)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = 0
    for name in wanted:
        began = time.perf_counter()
        for check in checks:
            try:
                results.setdefault(name, {})[check] = result(name, check)
            except Exception as error:  # noqa: BLE001
                failed += 1
                results[name][check] = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
                print(name, check, results[name][check])
        results[name] = {m: results[name][m] for m in MODES if m in results[name]}
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        kept.cache_clear()
        torch._dynamo.reset()
        gc.collect()
    ordered = {n: results[n] for n in PIPELINES if n in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    if PAGE.exists():
        PAGE.write_text(written(PAGE.read_text(), ordered))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
