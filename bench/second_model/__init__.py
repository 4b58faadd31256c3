"""A second trained model, of another kind than the shipped one: an MMDiT on images, epsilon-prediction, a cosine schedule.

It was fixed, down to the threshold of its quality check, in a commit before it was trained or measured:

- data: `scenes`, drawn on the spot; one scene of sixteen is held out.
- architecture, schedule and solvers: `network`. The class is diffusers' own.
- training budget: `train`.
- quality check, and what it must reach: `classifier`.

The weights lie in bench/assets, not in the wheel. Nothing of vdcache takes part in any of this.
"""
