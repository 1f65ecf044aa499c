# SPDX-License-Identifier: Apache-2.0
"""What FSDP takes around its collectives, by a clock that gathers and reductions move by what they hold."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lightning_zeroprompt.pipeline import shard_profile
from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.shard_profile import measure_sharding


def measured():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    now = [0.0]
    time.perf_counter, real = lambda: now[0], time.perf_counter
    unshard, reshard, reduce = FSDPModule.unshard, FSDPModule.reshard, shard_profile.reduce_gradients

    def slow_unshard(self, *args, **keywords):
        now[0] += 3.0 + 0.5 * len(list(self.parameters()))
        return unshard(self, *args, **keywords)

    def slow_reshard(self):
        now[0] += 1.0
        return reshard(self)

    def slow_reduce(stage):
        now[0] += 7.0 + 0.25 * len(list(stage.parameters()))
        reduce(stage)
        assert all(p.grad is not None for p in stage.parameters(recurse=False)), "nothing was reduced"

    FSDPModule.unshard, FSDPModule.reshard, shard_profile.reduce_gradients = slow_unshard, slow_reshard, slow_reduce
    try:
        return measure_sharding(Link(1e-5, 1e9), Link(2e-5, 2e9, 1.5), torch.device("cpu"), mesh, torch.float32)
    finally:
        time.perf_counter = real
        FSDPModule.unshard, FSDPModule.reshard, shard_profile.reduce_gradients = unshard, reshard, reduce


def test_the_hosts_time_of_a_call_and_of_a_tensor(run_ranks):
    for gather, reduce in run_ranks(measured, 2):
        assert (gather.host, gather.host_tensor) == pytest.approx((4.0, 0.5))
        assert (reduce.host, reduce.host_tensor) == pytest.approx((7.0, 0.25))
        assert (gather.latency, reduce.slowdown, gather.copy, reduce.copy) == (1e-5, 1.5, 0, 0)
