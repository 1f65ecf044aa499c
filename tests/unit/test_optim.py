# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_zeroprompt.models.optim import OptimizerSettings, build_optimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "rsqrt"])
def test_schedules_warm_up_peak_and_never_leave_zero_to_one(schedule):
    settings = OptimizerSettings(schedule=schedule, warmup_steps=20)
    factors = [learning_rate_factor(step, 200, settings) for step in range(220)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert max(factors) == pytest.approx(1.0)
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[20:]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_cosine_and_linear_end_at_the_final_fraction():
    for schedule in ("linear", "cosine"):
        settings = OptimizerSettings(schedule=schedule, warmup_steps=0, final_fraction=0.1)
        assert learning_rate_factor(100, 100, settings) == pytest.approx(0.1)
        assert learning_rate_factor(50, 100, settings) == pytest.approx(0.55)


def test_rsqrt_is_the_inverse_square_root_after_the_warm_up():
    settings = OptimizerSettings(schedule="rsqrt", warmup_steps=100)
    assert learning_rate_factor(399, 1000, settings) == pytest.approx(math.sqrt(100 / 400))


def test_a_warm_up_below_one_is_a_fraction_of_the_run():
    settings = OptimizerSettings(warmup_steps=0.1)
    assert learning_rate_factor(9, 100, settings) == 1.0
    assert learning_rate_factor(4, 100, settings) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "'sgd' is unknown"),
        ({"schedule": "step"}, "'step' is unknown"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"warmup_steps": -1}, "0 or more steps"),
        ({"final_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**changes)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_only_matrices_decay_and_frozen_parameters_are_left_out(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), OptimizerSettings(name=name, weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert len(plain["params"]) == 4
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, True, True, False, True]
