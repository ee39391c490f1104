"""The optimizer of the experiments on texts, tables and mixers: AdamW under a schedule, every number of it traced."""

from __future__ import annotations

from typing import Any

import optax

from jaxhpo.tasks import schedules

DEFAULTS: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 1e-2, "one_minus_beta1": 0.1, "warmup": 0.1}


def adamw(hparams: Any, num_steps: int) -> optax.GradientTransformation:
    """AdamW with a linear warmup over the share ``warmup`` of the steps and a cosine down to zero.

    What the space leaves out has its value in ``DEFAULTS``. ``eps_root`` lets hypergradients through weights without a
    gradient, such as those of words that have not occurred yet.
    """
    known = {**DEFAULTS, **hparams}
    rate = schedules.warmup_cosine(0.0, known["learning_rate"], known["warmup"] * num_steps, num_steps)
    return optax.adamw(rate, b1=1 - known["one_minus_beta1"], weight_decay=known["weight_decay"], eps_root=1e-16)
