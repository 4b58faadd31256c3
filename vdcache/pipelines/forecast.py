"""How much a policy can skip at best, known before anything runs."""

from __future__ import annotations

from vdcache.runtime.measures import Measured
from vdcache.runtime.policies import Auto, Deciding, Policy

__all__ = ["most_reused"]


def most_reused(policy: Policy, num_steps: int) -> list[int]:
    """The steps that a policy reuses something in when nothing ever changes."""
    if isinstance(policy, Auto):
        return list(range(1, num_steps))
    groups = sorted({g for plan in policy.plans() for g in plan.reuse})
    still = [Measured(group, 0.0, 0.0, 1.0, 0.0, 0.0) for group in groups]
    # an input that moves and an output that does not, for policies that look at the whole model
    still += [Measured("observed.input", 0.0, 1.0, 1.0), Measured("observed.output", 0.0, 0.0, 1.0)]
    state, reused = policy.start(num_steps), []
    for step in range(num_steps):
        plan = policy.plan(state, step)
        if plan is None:
            assert isinstance(policy, Deciding)
            state, plan = policy.decide(state, step, still if step else None)
        if plan:
            reused.append(step)
        state = policy.observe(state, step, plan, still if step else None)
    return reused
