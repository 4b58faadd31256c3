"""The store owns what it keeps; the history says what happened."""

import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import vdcache
from vdcache.policies import Plan
from vdcache.policies.metrics import MetricSpec, measured
from vdcache.policies.plan import RECOMPUTE
from vdcache.runtime import History, Record, Store
from vdcache.runtime.history import any_computed
from vdcache.runtime.summary import timeline
from vdcache.testing import TinyDiT, latent, time_of


def test_values_that_others_hold_are_copied():
    store, buffer = Store(), torch.zeros(10)
    output, own = torch.ones(4), torch.ones(4)
    store.put("k", ["view", "output", "own"], [buffer[2:6], output, own], [output])
    buffer.fill_(7)
    output.fill_(7)
    view, out, mine = store.get("k", ["view", "output", "own"])
    assert view.sum() == 0 and out.sum() == 4
    assert mine.data_ptr() == own.data_ptr(), "a value of its own is not copied"
    assert store.bytes() == 3 * 16


def test_a_replayed_buffer_does_not_reach_the_store():
    """CUDA graphs write the outputs of every replay into the same memory."""
    pool, store = torch.zeros(2, 4), Store()
    for replay in range(3):
        pool.fill_(replay)
        store.put(replay, ["a"], [pool[0]], [])
    assert [store.get(i, ["a"])[0][0].item() for i in range(3)] == [0, 1, 2]


def test_keys_do_not_meet():
    store = Store()
    store.put("a", ["s"], [torch.ones(2)], [])
    assert store.get("b", ["s"]) is None and store.get("a", ["s", "t"]) is None
    store.drop("a")
    assert store.get("a", ["s"]) is None and store.bytes() == 0


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine", "magnitude"])
def test_lanes_add_up_to_one_batch(distance):
    p, r = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)

    def sums(p, r):
        if distance == "cosine":
            return [(p * r).sum(), (p * p).sum(), (r * r).sum()]
        if distance == "magnitude":
            ratio = r.norm(dim=-1) / p.norm(dim=-1)
            return [ratio.sum(), ratio.square().sum(), torch.tensor(ratio.numel())]
        f = torch.abs if distance == "l1" else torch.square
        return [f(p - r).sum(), f(p).sum(), f(r).sum()]

    layout = MetricSpec("x", distance)
    both = [float(s) for s in sums(p, r)]
    lanes = [float(a + b) for a, b in zip(sums(p[:1], r[:1]), sums(p[1:], r[1:]), strict=True)]
    assert measured(layout, both, 48).change == pytest.approx(measured(layout, lanes, 48).change)
    norm = {"l1": (p - r).abs().sum() / p.abs().sum(), "l2": (p - r).norm() / p.norm()}
    norm["magnitude"] = ((r.norm(dim=-1) / p.norm(dim=-1)).mean() - 1).abs()
    size = {"l1": r.abs().mean(), "magnitude": (r.norm(dim=-1) / p.norm(dim=-1)).mean()}
    assert measured(layout, both, 48).size == pytest.approx(float(size.get(distance, r.square().mean().sqrt())))
    cosine = 1 - torch.nn.functional.cosine_similarity(p.flatten(), r.flatten(), dim=0)
    assert measured(layout, both, 48).change == pytest.approx(float(norm.get(distance, cosine)))


def test_a_closed_gate_is_no_change():
    assert measured(MetricSpec("x", "l1"), [0.0, 0.0, 0.0], 4).change == 0.0
    assert measured(MetricSpec("x", "l1"), [1.0, 0.0, 1.0], 4).change == float("inf")


@torch.no_grad()
def ran():
    torch._dynamo.reset()
    model = vdcache.compile(TinyDiT(1), vdcache.methods.adacache([(1e9, 3)]), num_steps=8, inner="eager")
    for step in range(8):
        for lane in range(2):
            model(latent(step), time_of(step), latent(lane, 1, 3, 4))
    return model.vdcache


def test_history_survives_json(tmp_path):
    session = ran()
    session.history.to_json(tmp_path / "h.json")
    again = History.from_json(tmp_path / "h.json")
    assert again.rows() == session.history.rows()
    record = again[4]
    assert (record.generation, record.step, record.lane, record.timestep) == (0, 2, 0, 900.0)
    assert record.plan and record.reused == ("all/run.0",) and record.seconds > 0
    assert again.computed_steps() == [0, 1, 4, 6, 7]
    assert {len(r.measures) for r in again if r.step in (1, 4)} == {1}, "what was measured stands with its step"


def test_a_history_replays_its_policy():
    session = ran()
    state = session.policy.start(8)
    for step in range(8):
        records = [r for r in session.history if r.step == step]
        assert session.policy.plan(state, step) == records[0].plan
        state = session.policy.observe(state, step, records[0].plan, records[0].measures or None)


def test_a_history_prints_a_line_a_generation():
    history = ran().history
    assert repr(history) == f"<History of {len(history)} calls in 1 generation>"
    assert str(history).splitlines()[1].endswith("5 of 8 steps computed: 0, 1, 4, 6, 7")
    long = History([replace(r, generation=g) for g in range(50) for r in history])
    assert "… 42 earlier" in str(long) and "generation 49" in str(long) and len(str(long)) < 1000
    assert repr(History()) == str(History()) == "<History of 0 calls in 0 generations>"


def test_one_summary_for_every_handle(capsys):
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=3, inner="eager")
    with torch.no_grad():
        for step in range(3):
            model(latent(step), time_of(step), latent(9, 1, 3, 4))
    printed = []
    for handle in (model, model.vdcache):
        vdcache.summary(handle)
        printed.append(capsys.readouterr().out.split())
    print(model.vdcache.summary())
    assert printed[0] == printed[1] == capsys.readouterr().out.split() and "computed" in printed[0]


def test_a_summary_prints_itself():
    text = str(ran().summary())
    assert "generation" in text.splitlines()[0] and "computed" in text and "steps computed" in text


def test_the_summary_says_what_was_computed():
    console = Console(record=True, width=120)
    console.print(ran().summary())
    text = console.export_text()
    assert "5 of 8 steps computed" in text and "reused" in text and "MiB" in text


def heads(session):
    return [str(c.header) for c in session.summary().columns]


def test_a_column_that_says_nothing_is_left_out():
    """Explicit control knows no timestep, every-2 measures nothing, and a schedule needs no reason."""
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=3, inner="eager")
    session = model.vdcache
    session.begin()
    with torch.no_grad():
        for step in range(3):
            session.step()
            model(latent(step), time_of(step), latent(9, 1, 3, 4))
        assert heads(session) == ["step", "lanes", "", "ms"]
        session.begin()
        for step in range(4):  # one more than was announced: a reason
            session.step(1000.0 - step)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(latent(step), time_of(step), latent(9, 1, 3, 4))
    assert heads(session) == ["step", "timestep", "lanes", "", "ms", "why"]
    assert "beyond the 3 steps that were announced" in str(session.summary())
    assert {"change"} < set(heads(ran()))


def test_parts_that_are_reused_apart_are_named():
    halves = vdcache.methods.profilingdit([0], [1], reuse="alternate", when=[0, 2, 4])
    model = vdcache.compile(TinyDiT(), halves, num_steps=5, inner="eager")
    with torch.no_grad():
        for step in range(5):
            model(latent(step), time_of(step), latent(9, 1, 3, 4))
    cells = [*model.vdcache.summary().columns[3].cells]
    assert cells == [
        "[bold]computed[/bold]",
        "[dim]reused background[/dim]",
        "[bold]computed[/bold]",
        "[dim]reused foreground[/dim]",
        "[bold]computed[/bold]",
    ]


def test_a_compiler_that_was_waited_for_slows_no_summary():
    session = ran()
    for record in session.history:
        record.seconds = 1.0 if record.computed else 0.25
    next(r for r in session.history if r.reused).seconds = 100.0
    # 5 of 8 steps of two lanes: 8 / (5 + 3 / 4)
    assert "5 of 8 steps computed\n1.39× over computing every step\n" in str(session.summary())


def test_the_timeline_is_a_picture(tmp_path):
    session = ran()
    timeline({"a": session.history.generation(), "b": session.history.generation()}, tmp_path / "t.png")
    import imageio.v3 as iio

    picture = iio.imread(tmp_path / "t.png")[..., :3]
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert (0x2B, 0x6C, 0xB0) in colours and (0xE2, 0xE8, 0xF0) in colours, "computed and reused cells are there"


def test_a_step_of_several_graphs_is_computed_where_none_of_them_reused_anything():

    def record(lane, *reused):
        return Record(0, 1, lane, None, Plan.of(["all"]), reused)

    assert any_computed([record(0), record(0)])
    assert not any_computed([record(0), record(0, "all/a")])
    assert any_computed([record(0, "all/a"), record(1)]) and not any_computed(
        [record(0, "all/a"), record(1, "all/a"), record(1)]
    )


@torch.no_grad()
def test_seconds_are_the_devices_and_are_read_when_they_are_asked_for(monkeypatch):
    """A GPU works on after the call: its events are asked once somebody looks, or once they are done anyway."""
    from vdcache.runtime.device_time import DeviceTime

    class Events:
        asked = 0

        def __init__(self) -> None:
            self.ready = False

        def stop(self) -> None: ...
        def restart(self) -> None: ...

        def done(self) -> bool:
            return self.ready

        def seconds(self) -> float:
            Events.asked += 1
            return 42.0

    made: list[Events] = []
    monkeypatch.setattr(DeviceTime, "of", staticmethod(lambda inputs, positions: made.append(Events()) or made[-1]))
    compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, inner="eager")
    for step in range(3):
        compiled(latent(step), time_of(step), latent(9))
    assert Events.asked == 0
    made[0].ready = made[1].ready = True
    compiled(latent(3), time_of(3), latent(9))
    assert Events.asked == 2, "what is done is read without waiting, so that events do not pile up"
    records = list(compiled.vdcache.history)
    assert [r.seconds for r in records] == [42.0] * 4 and Events.asked == 4
    assert all(0 < r.host_seconds < 42 for r in records)
    assert compiled.vdcache.history.rows()[3]["seconds"] == 42.0


@torch.no_grad()
def test_what_a_computed_step_replaces_is_freed_before_it_runs():
    compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=6, inner="eager")
    store = compiled.vdcache.store
    held: list[int] = []
    for step in range(3):
        if step == 2:
            program = compiled.vdcache.graphs[0]
            part = program.variants[RECOMPUTE]
            real = part.ready

            def ready(inputs, real=real):
                held.append(store.bytes())
                return real(inputs)

            part.ready = ready
        compiled(latent(step), time_of(step), latent(9))
    assert held == [0] and store.bytes() > 0
