"""vdcache from scratch: the idea in some 300 lines of torch alone. Run it: `python docs/from_scratch.py`.

A denoising loop calls one network many times on an input that changes slowly. What its residual branches add changes slowly too, so
some steps may take it from an earlier step. We do that to a model that knows nothing of it: find the branches in the traced graph,
mark them, cut one small static graph for each plan, and let a policy choose the plan of every step.

Each section adds one part and checks it. The parts have the names that they have in vdcache, where each handles what is left out here.
"""

import operator
import time

import torch
import torch.nn.functional as F
from torch import fx, nn

torch.manual_seed(0)

# ---- 1. A model ------------------------------------------------------------------------------------------------------
# The smallest diffusion transformer: tokens; a timestep that becomes a sinusoidal embedding and then gates; blocks that add to a stream.


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        x = x + gates[..., :1] * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + gates[..., 1:] * self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class Denoiser(nn.Module):
    def __init__(self, blocks: int = 4, dim: int = 64) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, dim), nn.Linear(dim, 8)
        self.time, self.blocks = nn.Linear(16, 2), nn.ModuleList(Block(dim) for _ in range(blocks))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sinusoids = timestep[:, None] * torch.exp(-torch.arange(8) / 2)
        gates = self.time(torch.cat([sinusoids.sin(), sinusoids.cos()], -1))
        x = self.enter(latent)
        for block in self.blocks:
            x = block(x, gates[:, None])
        return self.leave(x)


STEPS = 20
model = Denoiser().eval().requires_grad_(False)


def timestep_of(step: int) -> torch.Tensor:
    return torch.tensor([1.0 - step / STEPS])


def generate(network) -> torch.Tensor:
    """A denoising loop: the network says where to go, the sampler goes there a little."""
    latent = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(7))
    for step in range(STEPS):
        latent = latent - 0.05 * network(latent, timestep_of(step))
    return latent


# ---- 2. Its graph ----------------------------------------------------------------------------------------------------
# torch.compile hands the traced graph to a backend, parameters among its inputs. (vdcache brings it into functional ATen first, so that
# one spelling is left of everything, and mutation, autocast and graph breaks are dealt with.)


def graph_of(network, *inputs) -> tuple[fx.GraphModule, list]:
    found = []

    def backend(graph, example_inputs):
        found.append((graph, example_inputs))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(network, backend=backend)(*inputs)
    return found[0]


example = torch.randn(1, 64, 8), timestep_of(0)
graph, inputs = graph_of(model, *example)
assert torch.equal(graph(*inputs)[0], model(*example))
print(f"2. the graph has {len(graph.graph.nodes)} nodes")


# ---- 3. Patterns: what is a residual branch? -------------------------------------------------------------------------
# Structure decides, never a name: `add(a, b)` where b is computed from a, with real work in between. A gate, a norm or a cast inside
# needs no rule of its own. A pattern answers with a match or with the reason why it is none.

ADDS = (operator.add, operator.iadd, torch.add)
WORK = (F.linear, torch._C._nn.linear, F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention, torch.matmul)


def ancestors(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """Everything that `node` is computed from, not looking behind `stop`."""
    seen, todo = set(), [node]
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                if parent is not stop:
                    todo.append(parent)
    return seen


def match_branch(node: fx.Node) -> tuple[fx.Node, fx.Node] | str:
    """(base, contribution) of the residual sum at `node`, or why it is none."""
    if node.target not in ADDS or len(node.all_input_nodes) != 2:
        return "it is no sum of two values"
    for base, other in (node.args, node.args[::-1]):
        above = ancestors(other, stop=base)
        if base in above and base.op != "placeholder":
            # between: computed from the base, so not a parameter and not the timestep's own way
            between = {n for n in above | {other} if n is not base and base in ancestors(n)}
            if any(n.target in WORK for n in between):
                return base, other
            return "no work lies between the stream and what is added"
    return "neither operand is computed from the other"


found = [n for n in graph.graph.nodes if isinstance(match_branch(n), tuple)]
assert len(found) == 8, "4 blocks of attention and MLP"
print(f"3. {len(found)} residual branches")


# ---- 4. A pass: mark the branches with cache guards ------------------------------------------------------------------------
# A cache guard is an identity. It names a value (a slot) that a later step MAY take from an earlier one; the graph still computes what it did.


def cache_guard(new: torch.Tensor, slot: str) -> torch.Tensor:
    return new


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, nodes)


def mark_branches(graph: fx.GraphModule) -> fx.GraphModule:
    graph = copy_of(graph)
    for node in list(graph.graph.nodes):
        if isinstance(found := match_branch(node), tuple):
            _, contribution = found
            with graph.graph.inserting_after(contribution):
                mark = graph.graph.call_function(cache_guard, (contribution, f"branch.{node.name}"))
            node.replace_input_with(contribution, mark)
    graph.recompile()
    return graph


marked = mark_branches(graph)
slots = [n.args[1] for n in marked.graph.nodes if n.target is cache_guard]
assert len(slots) == 8
assert torch.equal(marked(*inputs)[0], graph(*inputs)[0]), "a cache guard changes no bit"
print(f"4. marked; one slot is '{slots[0]}'")


# ---- 5. The oracle: may this really be skipped? ----------------------------------------------------------------------
# Run the graph with the recorded values of the slots, and NaN in the place of everything that only the slots need.
# If the output stays the same, nothing that was skipped is needed.


class Poison(fx.Interpreter):
    def __init__(self, graph, cached, dead):
        super().__init__(graph)
        self.cached, self.dead = cached, dead

    def run_node(self, n):
        if n.target is cache_guard:
            if self.cached.get(n.args[1]) is not None:
                return self.cached[n.args[1]]
            self.cached[n.args[1]] = self.env[n.args[0]]
        result = super().run_node(n)
        return (
            result * torch.nan if n in self.dead and isinstance(result, torch.Tensor) and result.is_floating_point() else result
        )


def needed_when_reusing(graph: fx.GraphModule) -> set[fx.Node]:
    live, todo = set(), [graph.graph.output_node()]
    while todo:
        node = todo.pop()
        live.add(node)
        todo += [p for p in node.all_input_nodes if p not in live] if node.target is not cache_guard else []
    return live


cached: dict = {}
want = Poison(marked, cached, set()).run(*inputs)[0]  # the first run records
dead = {n for n in marked.graph.nodes if n.op != "placeholder"} - needed_when_reusing(marked)
assert torch.equal(Poison(marked, cached, dead).run(*inputs)[0], want)
print(f"5. {len(dead)} nodes may be left out")


# ---- 6. Specialise: one static graph for each plan -------------------------------------------------------------------
# A plan says which slots are reused. Reused: the cache guard becomes an input, and what only it needed is dead code. Computed: the value
# becomes an output as well, to be cached. No graph decides anything when it runs, so each can be compiled as a whole.


def specialise(graph: fx.GraphModule, reuse: bool) -> fx.GraphModule:
    graph = copy_of(graph)
    last = graph.graph.find_nodes(op="placeholder")[-1]
    saved = []
    for mark in [n for n in graph.graph.nodes if n.target is cache_guard]:
        if reuse:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"cached_{mark.name}")
            mark.replace_all_uses_with(last)
        else:
            saved.append(mark.args[0])
            mark.replace_all_uses_with(mark.args[0])
        graph.graph.erase_node(mark)
    output = graph.graph.output_node()
    output.args = ((*output.args[0], *saved),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def size(graph: fx.GraphModule) -> int:
    return len([n for n in graph.graph.nodes if n.op != "placeholder"])


full, small = specialise(marked, reuse=False), specialise(marked, reuse=True)
result, *values = full(*inputs)
assert torch.equal(result, want), "computing everything is the model itself, bit for bit"
assert torch.equal(small(*inputs, *values)[0], want), "reusing what this very step left gives this very step"
assert not any(n.target in WORK[2:4] for n in small.graph.nodes), "skipped means gone"
print(f"6. computing takes {size(full)} nodes, reusing {size(small)}")


# ---- 7. Merge: one tensor instead of eight ---------------------------------------------------------------------------
# All branches are reused together, so only their sum matters: put one cache guard on the stream's difference from its start to its end.


def guarded_difference(new: torch.Tensor, slot: str, base: torch.Tensor) -> torch.Tensor:
    return new


def merge(graph: fx.GraphModule) -> fx.GraphModule:
    graph = copy_of(graph)
    marks = [n for n in graph.graph.nodes if n.target is cache_guard]
    sums = [next(iter(m.users)) for m in marks]
    start = next(a for a in sums[0].args if a is not marks[0])
    for mark in marks:
        mark.replace_all_uses_with(mark.args[0])
        graph.graph.erase_node(mark)
    end = sums[-1]
    with graph.graph.inserting_after(end):
        mark = graph.graph.call_function(guarded_difference, ())
    end.replace_all_uses_with(mark)
    mark.args = (end, "run", start)
    graph.recompile()
    return graph


def specialise_merged(graph: fx.GraphModule, reuse: bool) -> fx.GraphModule:
    graph = copy_of(graph)
    mark = graph.graph.find_nodes(op="call_function", target=guarded_difference)[0]
    new, _, base = mark.args
    with graph.graph.inserting_before(mark):
        if reuse:
            with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
                given = graph.graph.placeholder("cached")
            value, extra = graph.graph.call_function(torch.add, (base, given)), ()
        else:
            value, extra = new, (graph.graph.call_function(torch.sub, (new, base)),)
    mark.replace_all_uses_with(value)
    graph.graph.erase_node(mark)
    output = graph.graph.output_node()
    output.args = ((*output.args[0], *extra),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


merged = merge(marked)
full, small = specialise_merged(merged, False), specialise_merged(merged, True)
result, difference = full(*inputs)
assert torch.equal(result, want)
torch.testing.assert_close(small(*inputs, difference)[0], want)  # adding and subtracting rounds once
print("7. one cached tensor instead of 8")


# ---- 8. Step tracker and policy: which step is this, and is it computed? ---------------------------------------------
# The timestep is the input that reaches a sine. A timestep that moves on begins a new step. One that jumps back
# begins a new generation, and the cache is cleared. A policy is a pure function of the step: it never touches a tensor.


def timestep_input(graph: fx.GraphModule) -> int:
    given = graph.graph.find_nodes(op="placeholder")
    sinusoids = [n for n in graph.graph.nodes if n.target in ("sin", torch.sin)]
    return next(
        i for i, n in enumerate(given) if any(n in ancestors(w) for w in sinusoids) and n.meta["example_value"].numel() == 1
    )


def every(n: int):
    return lambda step: step % n == 0 or step == STEPS - 1


class Session:
    """The state of one model: its place in the run, and its cached tensor."""

    def __init__(self, computes) -> None:
        self.computes, self.cached, self.step, self.before, self.history = computes, None, -1, None, []

    def tick(self, timestep: float) -> bool:
        """Whether this call is computed."""
        again = self.before is None or timestep > self.before
        self.step, self.before = 0 if again else self.step + 1, timestep
        if again:
            self.cached = None  # nothing crosses generations
        computed = self.cached is None or self.computes(self.step)
        self.history.append(computed)
        return computed


# ---- 9. A backend for torch.compile ----------------------------------------------------------------------------------


def backend_for(session: Session):
    def backend(graph, example_inputs):
        merged = merge(mark_branches(graph))
        full, small = specialise_merged(merged, False), specialise_merged(merged, True)  # a real one hands both to Inductor
        position = timestep_input(graph)

        def run(*inputs):
            if session.tick(float(inputs[position])):
                *outputs, session.cached = full(*inputs)
                return outputs
            return small(*inputs, session.cached)

        return run

    return backend


def cached_model(computes) -> tuple:
    torch._dynamo.reset()
    session = Session(computes)
    return torch.compile(model, backend=backend_for(session)), session


exact, session = cached_model(every(1))
plain = generate(model)
assert torch.equal(generate(exact), plain), "computing every step is the untouched model, bit for bit"

fast, session = cached_model(every(4))
first = generate(fast)
assert torch.equal(generate(fast), first), "the second generation starts clean"
assert session.history == [every(4)(step) for step in range(STEPS)] * 2
error = (first - plain).norm() / plain.norm()
assert 0 < error < 0.05

times = []
for network in (exact, fast):
    generate(network)  # compile first
    began = time.perf_counter()
    generate(network)
    times.append(time.perf_counter() - began)
print(
    f"9. {sum(session.history[:STEPS])} of {STEPS} steps computed, error {error:.1%}, {times[0] / times[1]:.1f} times as fast"
)

# What is left to do fills vdcache: streams that are cast, scaled or concatenated; branches in other branches; values that leak; lanes of
# guidance, second-order solvers and 16-bit timesteps that collide; dynamic shapes; policies that measure; predictors; probes; masks.
