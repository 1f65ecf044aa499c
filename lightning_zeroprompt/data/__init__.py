# SPDX-License-Identifier: Apache-2.0
"""Tasks, their compilation to a corpus, and the balanced, resumable stream of training batches.

The public names are loaded when they are first used, so importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_zeroprompt.data.compile import compile_tasks
    from lightning_zeroprompt.data.datamodule import TaskDataModule
    from lightning_zeroprompt.data.mixture import Mixture
    from lightning_zeroprompt.data.task import Task

__all__ = ["Mixture", "Task", "TaskDataModule", "compile_tasks"]

_HOMES = {"Mixture": "mixture", "Task": "task", "TaskDataModule": "datamodule", "compile_tasks": "compile"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
