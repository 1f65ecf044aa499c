# SPDX-License-Identifier: Apache-2.0
"""Run a function on several ranks of one machine, as a launcher would start it.

Each rank is a fresh process (spawned, so that no thread or lock of the parent is copied) with the environment
variables that torchrun and Lightning read, so inside it ``Trainer(devices=N, accelerator="cpu")`` or
``init_process_group("gloo")`` simply work. Ranks stand in for GPUs: gloo has the same collectives. Cost: the imports
of one process a rank, some 5 s.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

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
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_run, args=(function, args, rank, world_size, port, threads, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    values: dict[int, Any] = {}
    ended: set[int] = set()
    deadline = time.monotonic() + timeout
    try:
        while len(values) < world_size:
            try:
                rank, value, error = results.get(timeout=0.2)
            except queue.Empty:
                # What a rank has sent is in the queue before it ends: one that had ended before this wait sent nothing.
                _check(ranks, ended, deadline, timeout, [rank for rank in range(world_size) if rank not in values])
                ended = {rank for rank, process in enumerate(ranks) if process.exitcode is not None} - values.keys()
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world_size} raised:\n{error}")
            values[rank] = pickle.loads(value)  # noqa: S301 - from a process that this one started
            ended.discard(rank)
    finally:
        for process in ranks:
            process.join(timeout=10 if len(values) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [values[rank] for rank in range(world_size)]


def _check(ranks: list[Any], ended: set[int], deadline: float, timeout: float, missing: list[int]) -> None:
    """Raise where a rank has died without a word, or time is up."""
    for rank in sorted(ended):
        raise RuntimeError(f"rank {rank} of {len(ranks)} died with exit code {ranks[rank].exitcode}")
    if time.monotonic() > deadline:
        raise TimeoutError(f"ranks {missing} of {len(ranks)} had not finished after {timeout:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    results: Any,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )
    try:
        import torch

        torch.set_num_threads(threads)
        # Pickled here and not in the queue's thread, where an error would be lost.
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
