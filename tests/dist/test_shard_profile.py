# SPDX-License-Identifier: Apache-2.0
"""What FSDP takes around its collectives, by a clock that they move by what they hold; passes without its hooks."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_zeroprompt.pipeline import shard_profile
from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.shard_profile import measure_sharding
from lightning_zeroprompt.pipeline.torch_compat import OneGroup, finish_reductions, gather_stage, reduce_gradients


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


def passes_without_hooks():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    plain, row = nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4, bias=False))
    row[0].load_state_dict(plain.state_dict())
    assert OneGroup.of(row) is None, "it is not sharded"
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    stage = fully_shard(row, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    stage.set_requires_gradient_sync(False)
    stage.set_reshard_after_backward(False)
    called = []
    row.register_forward_pre_hook(lambda *_: called.append("a hook of the module"))
    group = OneGroup.of(row)
    gather_stage(stage)
    for _ in range(3):
        x = torch.randn(2, 4).bfloat16()
        group.forward(x).float().sum().backward()
        group.backward_done()
        plain.bfloat16()(x).float().sum().backward()
        plain.float()
        # Nothing is left where the next pass would be summed in bfloat16.
        assert row[0].weight.grad is None
    reduce_gradients(stage)
    finish_reductions(stage)
    stage.reshard()
    nested = nn.Sequential(fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh))
    assert OneGroup.of(fully_shard(nested, mesh=mesh)) is None, "a part is a group of its own"
    found = row[0].weight.grad.full_tensor()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain.weight.grad, rtol=2e-2, atol=2e-2)
    return called


def test_one_group_runs_without_hooks_and_sums_in_the_reductions_type(run_ranks):
    assert run_ranks(passes_without_hooks, 2) == [[], []]
