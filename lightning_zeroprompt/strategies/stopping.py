# SPDX-License-Identifier: Apache-2.0
"""SIGTERM on one rank or on all: training stops on every rank behind the same step; told again, a rank ends at once.

Lightning 2.6 broadcasts from rank 0 inside its signal handler. That call waits for the other ranks, which wait for this
one's messages of the same step: a pipeline hangs until the collective's timeout, half an hour by default. So its
handler is replaced by one that notes the signal and returns. Ranks vote once a step, on the CPU and without waiting:
the vote is cast before a step and read before the next one, so all ranks raise Lightning's ``SIGTERMException`` before
the same step, at most two after the signal, and callbacks can still save a checkpoint together.

A second signal ends the rank by that signal, with the processes that it has started; the others fail when they miss it.
Not so within ``GRACE`` seconds of the first: a launcher passes on what its workers have got themselves, if the signal
went to a process group. Outside of training there is no step to vote before: there the first signal ends the rank.

Python runs handlers between its own instructions: a rank that waits in a collective for one that never answers hears
nothing before the strategy's ``timeout``; launchers send SIGKILL then (torchrun after 30 s). Alternative: all ranks
end at the first signal, without a checkpoint. ``trainer.received_sigterm`` stays False.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["GRACE", "StopSignals"]

GRACE = 2.0
"""Seconds in which another signal counts as the same one."""

_LIGHTNINGS = "lightning.pytorch.trainer.connectors.signal_connector"


class StopSignals:
    """SIGTERM during one run of a Trainer; made before Lightning installs its handler.

    Args:
        group: All ranks, on the CPU.
        end_children: Kills the processes that this rank has started.
    """

    def __init__(self, group: dist.ProcessGroup, end_children: Callable[[], None]) -> None:
        self._group, self._end_children = group, end_children
        self._before = signal.getsignal(signal.SIGTERM)
        self._told: float | None = None
        self._votes = False
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def listen(self, *, training: bool) -> None:
        """Take Lightning's handler's place, where that is installed; a user's own stays.

        Args:
            training: Whether training steps will follow.
        """
        self._votes = training
        if type(signal.getsignal(signal.SIGTERM)).__module__ == _LIGHTNINGS:
            # Lightning puts back what was there before its own when the run ends.
            signal.signal(signal.SIGTERM, self._told_to_stop)

    def vote(self) -> None:
        """Read the vote that was cast before the last step, and cast the next; all ranks call this before each step.

        Raises:
            SIGTERMException: On every rank, if one was told to stop.
        """
        if self._vote is not None:
            told, work = self._vote
            work.wait()
            if told.item():
                rank_zero_info(f"zeropp: {int(told)} of {self._group.size()} ranks told to stop: training ends here")
                raise SIGTERMException
        mine = torch.tensor(int(self._told is not None))
        work = dist.all_reduce(mine, group=self._group, async_op=True)
        self._vote = None if work is None else (mine, work)

    def _told_to_stop(self, number: int, frame: FrameType | None) -> None:
        again = self._told is not None and time.monotonic() - self._told > GRACE
        if again or not self._votes:
            self._end(number, "again " if again else "")
        if self._told is None:
            self._told = time.monotonic()
            self._say(number, "all ranks stop within two steps. Told again, this one ends at once")
            if callable(self._before):
                self._before(number, frame)

    def _end(self, number: int, again: str) -> None:
        self._say(number, f"told {again}to stop, it ends at once, and the others when they miss it")
        self._end_children()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _say(self, number: int, what: str) -> None:
        # Not through a stream or a logger, which this may have interrupted.
        os.write(2, f"zeropp: rank {dist.get_rank()} got {signal.Signals(number).name}: {what}\n".encode())
