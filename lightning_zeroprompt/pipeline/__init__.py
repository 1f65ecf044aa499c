# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: schedules as data, split backward passes, and an executor. Nothing here imports Lightning."""

from lightning_zeroprompt.pipeline.catalogue import SCHEDULES, build_schedule
from lightning_zeroprompt.pipeline.lowering import add_transfers
from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Schedule, Task, parse_tasks

__all__ = ["SCHEDULES", "Kind", "Placement", "Schedule", "Task", "add_transfers", "build_schedule", "parse_tasks"]
