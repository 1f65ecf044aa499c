# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: schedules as data, split backward passes, and an executor. Nothing here imports Lightning."""

from lightning_zeroprompt.pipeline.catalogue import SCHEDULES, build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link
from lightning_zeroprompt.pipeline.lowering import add_transfers
from lightning_zeroprompt.pipeline.planner import Candidate, Plan, plan
from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Schedule, Task, parse_tasks
from lightning_zeroprompt.pipeline.simulator import Simulation, Simulator, simulate
from lightning_zeroprompt.pipeline.timeline import Cause, Lane, TaskSpan, Timeline, WaitSpan

__all__ = [
    "SCHEDULES",
    "BlockCosts",
    "Candidate",
    "Cause",
    "Costs",
    "Kind",
    "Lane",
    "Link",
    "Placement",
    "Plan",
    "Schedule",
    "Simulation",
    "Simulator",
    "Task",
    "TaskSpan",
    "Timeline",
    "WaitSpan",
    "add_transfers",
    "build_schedule",
    "parse_tasks",
    "plan",
    "simulate",
]
