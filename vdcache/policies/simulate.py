"""What a policy decides in a generation, without a model; and the most that it can reuse, known before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from vdcache.errors import ConfigError
from vdcache.policies.adacache import AdaCache, Codebook
from vdcache.policies.base import Deciding, Policy
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import Plan
from vdcache.policies.scheduled import CombinedPolicy, PlanTable
from vdcache.policies.thresholds import Threshold
from vdcache.policies.windows import BroadcastWindow, TimestepWindow

__all__ = ["best_plans", "lowest", "simulate"]


def simulate(
    policy: Policy,
    num_steps: int,
    *,
    times: Sequence[float] = (),
    probed: Callable[[int], Sequence[MetricValue] | None] = lambda step: None,
    observed: Callable[[int, Plan], Sequence[MetricValue] | None] = lambda step, plan: None,
    narrow: Callable[[Plan], Plan] = lambda plan: plan,
) -> list[Plan]:
    """The plan of each step of one generation.

    Args:
        times: the timesteps of all steps, where they are known.
        probed: what a step measures before its plan is chosen, for a policy that decides inside a step.
        observed: what a step with a plan measures. Default: nothing comparable.
        narrow: what really runs of a plan. Default: all of it.

    Raises:
        ConfigError: the policy leaves a step to `decide` and has no such method.
    """
    state, plans = policy.start(num_steps), []
    for step in range(num_steps):
        plan = policy.plan(state, step, times[: step + 1])
        if plan is None:
            if not isinstance(policy, Deciding):
                raise ConfigError(f"{policy} leaves step {step} to 'decide', and has no such method")
            state, plan = policy.decide(state, step, probed(step))
        plans.append(narrow(plan))
        state = policy.observe(state, step, plans[-1], observed(step, plans[-1]))
    return plans


def best_plans(policy: Policy, num_steps: int) -> list[Plan]:
    """The plan of each step where everything measured is what lets the policy reuse most.

    vdcache's own policies reuse in no generation of so many steps more often. Policies of others are shown changes of nothing.
    """
    policy = _at_best(policy, num_steps)
    groups = sorted({g for plan in policy.plans() for g in plan.reuse})
    still = [MetricValue(group, 0.0, 0.0, 1.0, 0.0, 0.0) for group in groups]
    # an input that moves and an output that does not, for policies that look at the whole model
    still += [MetricValue("observed.input", 0.0, 1.0, 1.0), MetricValue("observed.output", 0.0, 0.0, 1.0)]
    return simulate(
        policy,
        num_steps,
        probed=lambda step: still if step else None,
        observed=lambda step, plan: still if step else None,
    )


def _at_best(policy: Policy, num_steps: int) -> Policy:
    """A policy that does for a change of nothing what this one does at most."""
    if isinstance(policy, CombinedPolicy):
        return CombinedPolicy(tuple(_at_best(p, num_steps) for p in policy.policies))
    if isinstance(policy, AdaCache):  # rates need not fall with the change, and motion scales it by anything
        most = max(rate for _, rate in policy.codebook.entries)
        return replace(policy, codebook=Codebook(((1.0, most),)), moreg=None)
    if isinstance(policy, Threshold) and policy.polynomial:  # p(0) need not be its least value
        return replace(policy, polynomial=(lowest(policy.polynomial),))
    if isinstance(policy, TimestepWindow):  # a solver may take all its steps within the window
        return replace(policy, window=(-1.0, 1001.0))
    if isinstance(policy, BroadcastWindow):  # and its first steps at the keys
        starts = [i * (policy.skip + 1) for i in range(len(policy.keys))]
        reused = {s + i for s in starts for i in range(1, policy.skip + 1)}
        return PlanTable(tuple((policy.group,) if s in reused else () for s in range(num_steps)))
    return policy


def lowest(coefficients: Sequence[float]) -> float:
    """The least value of a polynomial over all changes, which are 0 or more; of one that falls for ever, a very low number.

    Args:
        coefficients: the highest power first.
    """
    first = next((i for i, c in enumerate(coefficients) if c), len(coefficients))
    terms = list(coefficients[first:])
    if len(terms) < 2:
        return terms[0] if terms else 0.0
    if terms[0] < 0:
        return -1e100
    slope = _derivative(terms)
    far = 1 + max(abs(c / slope[0]) for c in slope)  # Cauchy's bound: the slope has no zero beyond
    return min(_value(terms, x) for x in (0.0, *_zeros(slope, far)))


def _zeros(terms: list[float], far: float) -> list[float]:
    """Where a polynomial changes its sign between 0 and `far`: between two zeros of its slope it rises or falls throughout."""
    if len(terms) < 2:
        return []
    found = []
    for low, high in pairwise([0.0, *_zeros(_derivative(terms), far), far]):
        if _value(terms, low) * _value(terms, high) > 0:
            continue
        rises = _value(terms, high) > _value(terms, low)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if (_value(terms, middle) > 0) == rises else (middle, high)
        found.append((low + high) / 2)
    return found


def _derivative(terms: Sequence[float]) -> list[float]:
    degree = len(terms) - 1
    return [c * (degree - i) for i, c in enumerate(terms[:-1])]


def _value(terms: Sequence[float], x: float) -> float:
    total = 0.0
    for c in terms:
        total = total * x + c
    return total
