"""How much a policy can skip at best, known before anything runs."""

from __future__ import annotations

from vdcache.policies.base import Policy
from vdcache.policies.simulate import best_plans

__all__ = ["most_reused"]


def most_reused(policy: Policy, num_steps: int) -> list[int]:
    """The steps that a policy reuses something in where it reuses most."""
    return [step for step, plan in enumerate(best_plans(policy, num_steps)) if plan]
