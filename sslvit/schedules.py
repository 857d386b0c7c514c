"""Learning rates, decays, temperatures and momenta as pure functions of the step. Nothing here remembers anything.

Sources: DINO (arXiv:2104.14294) `cosine_scheduler` of its released code; the value at every step is the published one.
"""

from __future__ import annotations

import math

__all__ = ["cosine", "linear_warmup", "momentum_from_half_life"]


def cosine(step: int, total: int, start: float, end: float, warmup_steps: int = 0, warmup_from: float = 0.0) -> float:
    """Linear from `warmup_from` to `start` over `warmup_steps`, then half a cosine from `start` to `end`.

    step counts from 0; at and after `total` the value is `end`. As published, the warm-up reaches `start` at its last
    step, and the cosine starts there again.
    """
    if step >= total:
        return end
    if step < warmup_steps:
        return linear_warmup(step, warmup_from, start, warmup_steps)
    phase = (step - warmup_steps) / (total - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * phase))


def linear_warmup(step: int, start: float, end: float, warmup_steps: int) -> float:
    """From `start` at step 0 to `end` at step `warmup_steps` - 1 (numpy's linspace), then `end`."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / max(1, warmup_steps - 1)


def momentum_from_half_life(half_life: float, batch_size: int) -> float:
    """The momentum per step with which a weight's influence halves every `half_life` images."""
    return 0.5 ** (batch_size / half_life)
