# SPDX-License-Identifier: Apache-2.0
"""Ranks that run one task after another: nothing of a task is left for the next, and failures start them anew."""

import os
import random

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_zeroprompt.testing import RankPool


def change_everything(value):
    """A world with a mesh, and every setting changed; returns what it found first."""
    found = {
        "types": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "numbers": (random.random(), torch.rand(1).item()),
        "left": os.environ.get("LEFT"),
        "initialized": dist.is_initialized(),
        "pid": os.getpid(),
    }
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = distribute_tensor(torch.arange(8.0) + value, mesh, [Shard(0)])
    found["sum"] = (tensor * 2).sum().redistribute(placements=[Replicate()]).to_local().item()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    os.environ["LEFT"] = "something"
    return found


class Sharded(BoringModel):
    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


def train_with(strategy):
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=ModelParallelStrategy() if strategy == "fsdp2" else strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sharded() if strategy == "fsdp2" else BoringModel())
    return trainer.global_step, trainer.world_size, trainer.global_rank


def test_a_task_finds_a_rank_as_it_was_when_it_started(run_ranks):
    runs = [run_ranks(change_everything, size, size) for size in (2, 3, 2)]
    for size, found in zip((2, 3, 2), runs, strict=True):
        for rank, one in enumerate(found):
            assert one == {
                **runs[0][0],
                "types": "torch.float32",
                "threads": 1,
                "grad": True,
                "left": None,
                "initialized": False,
                "pid": runs[1][rank]["pid"],
                "sum": 2.0 * (28 + 8 * size),
            } | {"numbers": one["numbers"]}
            assert one["numbers"] == runs[0][rank % 2]["numbers"] or rank == 2


def test_trainers_follow_one_another(run_ranks):
    for size, strategy in [(2, "ddp"), (1, "auto"), (2, "fsdp2"), (2, "ddp")]:
        assert run_ranks(train_with, size, strategy) == [(2, size, rank) for rank in range(size)]


def test_behind_a_failure_tasks_get_new_ranks():
    with RankPool() as pool:
        before = pool.run(os.getpid, 2)
        assert pool.run(os.getpid, 2) == before
        with pytest.raises(RuntimeError, match=r"(?s)rank [01] of 2 raised.*ValueError: invalid literal for int"):
            pool.run(int, 2, "no number")
        assert not set(before) & set(pool.run(os.getpid, 2))


def test_ranks_are_forked_from_one_server_that_is_not_the_caller(run_ranks):
    """What it has imported is then there for all; a parent's threads and locks are not."""
    parents = set(run_ranks(os.getppid, 2))
    assert len(parents) == 1
    assert os.getpid() not in parents
