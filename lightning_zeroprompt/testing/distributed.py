# SPDX-License-Identifier: Apache-2.0
"""Run a function on several ranks of one machine, as a launcher would start it.

Each rank is a fresh process (no thread or lock of the parent is copied) with the environment variables that torchrun
and Lightning read, so inside it ``Trainer(devices=N, accelerator="cpu")`` or ``init_process_group("gloo")`` simply
work. Ranks stand in for GPUs: gloo has the same collectives. Cost: one process's imports, some 5 s, at the first call.
"""

from collections.abc import Callable
from typing import Any

from lightning_zeroprompt.testing.pool import RankPool

__all__ = ["run_distributed"]


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, threads: int = 1
) -> list[Any]:
    """Call ``function(*args)`` on every rank and return what the ranks returned.

    Args:
        function: A function of a module (it is pickled by name); reads its rank from the environment.
        world_size: Number of ranks.
        *args: Its arguments, pickled.
        timeout: Seconds that all ranks together may take.
        threads: Threads of torch in every rank.

    Returns:
        One value a rank, in rank order; values are pickled.

    Raises:
        RuntimeError: A rank raised or died; the message holds its traceback, and the other ranks are stopped.
        TimeoutError: Ranks were still running after ``timeout`` seconds; they are stopped.
    """
    with RankPool(threads) as ranks:
        return ranks.run(function, world_size, *args, timeout=timeout)
