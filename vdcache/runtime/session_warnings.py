"""What a session has to say, once each: words apart from what decides that they are due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vdcache.errors import inform_once, warn_once
from vdcache.policies.plan import Plan
from vdcache.runtime.history import Record

__all__ = ["SessionWarnings"]


class SessionWarnings:
    """The notices of one session.

    Args:
        name: of the recipe.
    """

    def __init__(self, name: str) -> None:
        self._name, self._said = name, set[str]()

    def _warn(self, key: str, message: str) -> None:
        warn_once(self._said, f"vdcache: {message}", key=key)

    def learnt(self, steps: int) -> None:
        """Information: it is as announced from here on."""
        inform_once(
            self._said,
            f"vdcache: the first generation had {steps} steps and was computed in full; from now on '{self._name}' "
            "reuses. Pass num_steps to reuse from the first generation on.",
            key="learnt",
        )

    def other_length(self, steps: int, before: int | None) -> None:
        message = f"a generation had {steps} steps, not {before} as the one before it; taking {steps}."
        self._warn(message, message)

    def short(self, steps: int, given: int | None) -> None:
        self._warn(
            "short",
            f"a generation ended after {steps} of {given} steps. If this is its real number, pass num_steps={steps}; a pinned schedule needs one "
            "that was made for it. If it is not, several runs share this model: tell them apart with begin() and step().",
        )

    def long(self, step: int, steps: int | None) -> None:
        """Args: `step` counts from 1."""
        self._warn(
            "long",
            f"step {step} of a generation of {steps} steps: computed in full. Solvers of second order evaluate the model twice a step; "
            "num_steps counts evaluations.",
        )

    def not_followed(self, error: Exception) -> None:
        message = f"'{self._name}' cannot be followed, and every step is computed: {error}"
        self._warn(message, message)

    def unlisted(self, plan: Plan, listed: Iterable[Plan]) -> None:
        there = ", ".join(map(str, listed))
        self._warn(
            f"unlisted {plan}",
            f"the policy of '{self._name}' returned {plan}, which its plans() does not list ({there}), so the step is computed in full.",
        )

    def nothing_reused(self, steps: int | None, records: Iterable[Record], unobserved: Sequence[str] = ()) -> None:
        """A whole generation in which nothing was reused: nobody should have to look for that.

        Args:
            unobserved: why what the policy goes by was not measured.
        """
        records = list(records)
        if unobserved and not any(r.measures or r.probe for r in records):
            self._warn(
                "no hit",
                f"'{self._name}' reused nothing in a generation of {steps} steps, because nothing was measured: {'; '.join(unobserved)}. "
                "Observe another value of this model.",
            )
            return
        reasons = Counter(r.why for r in records if r.why).most_common(1)
        changes = [m.change for r in records for m in (*r.measures, *r.probe)]
        reason = f": {reasons[0][0]}" if reasons else ""
        if changes:
            reason += f"; what it observes changed by {min(changes):.3g} to {max(changes):.3g} between computed steps"
        self._warn(
            "no hit",
            f"'{self._name}' reused nothing in a generation of {steps} steps{reason}. Few steps leave little to skip; with many, other "
            "thresholds or another recipe may. vdcache.summary(…) of the pipeline or the compiled model shows every step.",
        )

    def outside(self) -> None:
        self._warn(
            "outside",
            "a call ran outside the compiled graphs, so nothing was reused. Either gradients were enabled, or Dynamo gave up "
            "recompiling (torch._dynamo.config.recompile_limit): vary fewer shapes and Python values, or compile with dynamic=True.",
        )

    def threads(self) -> None:
        self._warn(
            "threads",
            "several threads call one compiled model at once. Each has its own session from now on, with its own generations and cached "
            "values; `vdcache.record()` inside a thread shows that thread's calls.",
        )

    def several_latents(self) -> None:
        self._warn(
            "several latents",
            "the model is called several times at one timestep with different latents, and nothing else in its inputs tells the calls apart "
            "(windows of frames, tiles, or requests in turn), so nothing is reused for them. Say which is which: "
            "session.begin(steps), session.step() at each denoising step, and session.lane(name) before each call.",
        )

    def no_timestep(self, broken: str = "") -> None:
        """Args: `broken` says why the forward has several graphs, where that is known."""
        ran = "a graph with cacheable branches ran before any timestep was seen, so it is computed in full"
        if broken:
            # Once of a break, and once more where a call went wrong after that was said.
            self._warn(f"no timestep {broken.partition(' ')[0]}", f"{ran}. {broken}")
            return
        self._warn(
            "no timestep",
            f"{ran}. A timestep "
            "is a tensor that reaches a sine or cosine and then a layer (a Python float reaches none: pass a tensor). If the model embeds its "
            "time otherwise, say where each step begins with session.begin() and session.step().",
        )

    def no_lanes(self) -> None:
        self._warn(
            "no lanes",
            f"'{self._name}' predicts one lane of guidance from the other, and the two halves of this batch are no lanes: their latents "
            "differ. Both are computed. For two calls a step say MarkLanes(mode='calls').",
        )

    def probe_is_no_number(self) -> None:
        self._warn(
            "nan probe",
            "what the policy looks at within the step is not a number (NaN or infinite), so the step is computed. Look at the "
            "model's input and its first blocks: caching cannot have caused this after a computed step.",
        )

    def observed_is_no_number(self) -> None:
        self._warn(
            "nan",
            "the observed branch is not a number (NaN or infinite), so every step is computed until it is one again. "
            "Look at the model's output: caching cannot have caused this at a computed step.",
        )
