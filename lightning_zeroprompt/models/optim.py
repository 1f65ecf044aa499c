# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules of the text-to-text module.

T0 and T5 finetune with Adafactor at a constant 1e-3; small models trained from nothing do better with AdamW, a short
warm-up and a decay. Both optimisers are torch's own. A schedule is a pure function of the step, so that it can be
drawn, tested and resumed without state.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

__all__ = ["OptimizerSettings", "build_optimizer", "learning_rate_factor"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How the parameters are updated.

    Attributes:
        name: ``"adamw"`` or ``"adafactor"``.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) are left alone.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        schedule: Shape after the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"`` down to ``final_fraction``, or
            ``"rsqrt"`` (T5's inverse square root).
        warmup_steps: Linear warm-up, in optimiser steps; a value below 1 is a fraction of all steps.
        final_fraction: Learning rate at the last step, as a fraction of the peak.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "linear"
    warmup_steps: float = 0.03
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that would only show themselves as a run that does not learn.

        Raises:
            ValueError: With the value, its range and what to use.
        """
        if self.name not in ("adamw", "adafactor"):
            raise ValueError(f"optimizer name {self.name!r} is unknown; use 'adamw' or 'adafactor'")
        if self.schedule not in ("constant", "linear", "cosine", "rsqrt"):
            raise ValueError(f"schedule {self.schedule!r} is unknown; use 'constant', 'linear', 'cosine' or 'rsqrt'")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; give 0 or more steps, or a fraction below 1")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction is {self.final_fraction}; it is a fraction of the peak, between 0 and 1")


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate at ``step`` as a fraction of the peak.

    Args:
        step: Optimiser steps done so far.
        total_steps: Steps of the whole run; the decay ends there.
        settings: The shape.

    Returns:
        A value between 0 and 1.

    Example:
        >>> s = OptimizerSettings(schedule="linear", warmup_steps=10)
        >>> [learning_rate_factor(i, 110, s) for i in (0, 9, 60, 110)]
        [0.1, 1.0, 0.5, 0.0]
    """
    warmup = round(settings.warmup_steps * total_steps) if settings.warmup_steps < 1 else int(settings.warmup_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "rsqrt":
        return math.sqrt(max(warmup, 1) / max(step + 1, 1))
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_fraction + (1 - settings.final_fraction) * shape


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW or Adafactor over two groups: matrices with weight decay, everything else without.

    Args:
        named_parameters: Parameters to train; those without ``requires_grad`` are left out.
        settings: Name and numbers.
        fused: Whether AdamW may run as one kernel over all parameters.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    fused = fused and all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=fused)
