# SPDX-License-Identifier: Apache-2.0
"""Ranks that outlive a test: torch and Lightning are imported once, not once a test and rank.

A rank is a process that waits for tasks. It is forked from a server that has imported and done nothing else, so that no
thread or lock of the parent is copied; where there are no such servers it is spawned. Each task finds what a
launcher would give it: the environment variables that torchrun and Lightning read, with a port of its own, on top of
the caller's environment and folder. Behind it process groups are destroyed and types, threads and random numbers put
back. What a task changes in modules (a patched function, a registry) stays: patch and unpatch in the task itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

__all__ = ["RankPool"]

_IMPORTED = ("lightning.pytorch", "lightning_zeroprompt.strategies", "lightning_zeroprompt.models.module")
"""What the server imports for all ranks."""


class RankPool:
    """Processes that run functions as the ranks of one machine; gloo ranks stand in for GPUs.

    They start with the first task that needs them. A context manager; ``close`` ends them.

    Args:
        threads: Threads of torch in every rank.

    Example::

        with RankPool() as ranks:
            first = ranks.run(train, 2, "zeropp")  # starts two processes
            second = ranks.run(train, 2, "ddp")  # uses them again
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``function(*args)`` on every rank and return what the ranks returned.

        Args:
            function: A function of a module (it is pickled by name); reads its rank from the environment.
            world_size: Number of ranks.
            *args: Its arguments, pickled.
            timeout: Seconds that all ranks together may take.

        Returns:
            One value a rank, in rank order; values are pickled.

        Raises:
            RuntimeError: A rank raised or died; the message holds its traceback. All ranks are stopped.
            TimeoutError: Ranks were still running after ``timeout`` seconds, and have written where they were to
                stderr. All ranks are stopped.
        """
        deadline = time.monotonic() + timeout
        task = pickle.dumps((function, args))
        environment = {
            **os.environ,
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(self._threads),
        }
        self._start(world_size)
        for rank, (_, connection) in enumerate(self._ranks[:world_size]):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            connection.send((own, os.getcwd(), list(sys.path), task))
        try:
            values = self._collect(world_size, deadline, timeout)
        except BaseException:
            self.close()
            raise
        for _, connection in self._ranks[:world_size]:
            # Only now: a rank may still have talked to another that was done.
            connection.send(None)
        return values

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._ranks:
            process.kill()
        for process, connection in self._ranks:
            process.join()
            connection.close()
        self._ranks = []

    def _start(self, world_size: int) -> None:
        context: Any
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(_IMPORTED))
        else:
            context = multiprocessing.get_context("spawn")
        while len(self._ranks) < world_size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._threads), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def _collect(self, world_size: int, deadline: float, timeout: float) -> list[Any]:
        values: dict[int, Any] = {}
        while len(values) < world_size:
            missing = [rank for rank in range(world_size) if rank not in values]
            ready = wait([self._ranks[rank][1] for rank in missing], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._tell_where(missing)
                raise TimeoutError(f"ranks {missing} of {world_size} had not finished after {timeout:.0f} s")
            for rank in missing:
                process, connection = self._ranks[rank]
                if connection not in ready:
                    continue
                try:
                    value, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise RuntimeError(f"rank {rank} of {world_size} died with exit code {process.exitcode}") from None
                if error is not None:
                    raise RuntimeError(f"rank {rank} of {world_size} raised:\n{error}")
                values[rank] = pickle.loads(value)  # noqa: S301 - from a process that this one started
        return [values[rank] for rank in range(world_size)]

    def _tell_where(self, ranks: list[int]) -> None:
        """Let ranks write their tracebacks to stderr."""
        for rank in ranks:
            os.kill(self._ranks[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _serve(connection: Connection, threads: int) -> None:
    """Run tasks until the other end of the connection is closed."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1)
    clean: _State | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            if clean is not None:
                clean.restore()
            continue
        environment, folder, path, task = message
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        try:
            function, args = pickle.loads(task)  # noqa: S301 - from the process that started this one
            if clean is None:
                clean = _State(threads)
            # Pickled here and not when it is sent, where an error would have no traceback of the task.
            answer: tuple[bytes | None, str | None] = pickle.dumps(function(*args)), None
        except BaseException:
            answer = None, traceback.format_exc()
        connection.send(answer)


class _State:
    """What a process starts with, to be put back behind each task."""

    def __init__(self, threads: int) -> None:
        import numpy as np
        import torch

        torch.set_num_threads(threads)
        self._threads = threads
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        import numpy as np
        import torch

        from lightning_zeroprompt.pipeline.torch_compat import forget_process_groups

        forget_process_groups()
        torch.set_num_threads(self._threads)
        torch.set_default_dtype(self._dtype)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        gc.collect()
