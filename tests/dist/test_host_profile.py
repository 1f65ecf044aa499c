# SPDX-License-Identifier: Apache-2.0
"""Host time an entry, by a clock that the executor's own work moves: every forward pass of a stage takes a second."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_zeroprompt.pipeline.host_profile import measure_host_action
from lightning_zeroprompt.pipeline.stage import StageModule


def measured(alone):
    dist.init_process_group("gloo")
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    now = [0.0]
    time.perf_counter, real = lambda: now[0], time.perf_counter
    forward = StageModule.forward

    def slow(self, *stream, **keywords):
        now[0] += 1.0
        return forward(self, *stream, **keywords)

    StageModule.forward = slow
    try:
        return measure_host_action(torch.device("cpu"), groups[dist.get_rank()] if alone else dist.group.WORLD)
    finally:
        StageModule.forward, time.perf_counter = forward, real


def test_what_more_entries_take(run_ranks):
    # One entry in three is a forward pass.
    assert run_ranks(measured, 2, True) == pytest.approx([1 / 3] * 2)


def test_a_group_of_several_ranks_is_refused(run_ranks):
    with pytest.raises(RuntimeError, match="a group of 2 ranks: give one with this rank alone"):
        run_ranks(measured, 2, False)
