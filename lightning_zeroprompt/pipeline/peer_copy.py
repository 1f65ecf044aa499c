# SPDX-License-Identifier: Apache-2.0
"""Messages between the GPUs of one host by their copy engines, while all multiprocessors compute.

NCCL moves a message with kernels on both sides, and each occupies multiprocessors from the moment it is posted until
the other side has come: a matrix product that finds 4 of 132 taken needs one more wave. Here a rank's memory holds a
ring a neighbour, which the neighbour's process has mapped. A sender's stream copies into the ring and then raises a
counter there; a receiver's stream waits for the counter, copies the message out and raises another in the sender's
memory, which says how much of the ring is free again. Copies run on copy engines; waits are the driver's *stream memory
operations*, which occupy nothing. Each pair of ranks and direction is a first-in-first-out queue of its own, so no
message ever waits for one of another queue.

Alternatives: NCCL with one channel still takes a multiprocessor a message; events shared between processes need the
host of the receiver to know that the sender's host has recorded; PyTorch's ``put_signal`` and ``wait_signal`` are
kernels again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.torch_compat import map_peers

__all__ = ["Chunk", "PeerCopies", "Ring"]

_ALIGNMENT = 256
_RING_BYTES = 64 * 2**20
_HEAD_BYTES = 1024
"""In front of the rings: four counters, one for each queue that a rank sends or receives by."""
_FAR = 2**30
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: counters may wrap around


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous part of a message in a ring.

    Attributes:
        index: How many chunks went before.
        offset: Where it begins in the ring, in bytes.
        length: Its bytes.
        behind: How many chunks must have been copied out before it may be written.
    """

    index: int
    offset: int
    length: int
    behind: int


class Ring:
    """Places messages in a ring of bytes; sender and receiver do the same arithmetic and so agree without words.

    Args:
        size: Bytes of the ring, a multiple of 256.

    Attributes:
        count: How many chunks have been placed.

    Example:
        >>> ring = Ring(1024)
        >>> ring.place(300)
        [Chunk(index=0, offset=0, length=300, behind=0)]
        >>> ring.place(512)
        [Chunk(index=1, offset=512, length=512, behind=0)]
        >>> ring.place(700)
        [Chunk(index=2, offset=0, length=512, behind=1), Chunk(index=3, offset=512, length=188, behind=2)]
    """

    def __init__(self, size: int) -> None:
        if size < 2 * _ALIGNMENT or size % _ALIGNMENT:
            raise ValueError(f"size={size}: a ring has a multiple of {_ALIGNMENT} bytes, at least {2 * _ALIGNMENT}")
        self.count = 0
        self._size, self._position, self._behind = size, 0, 0
        self._live: deque[int] = deque()

    def place(self, length: int) -> list[Chunk]:
        """The chunks of the next message.

        Args:
            length: Its bytes.
        """
        chunks = []
        while length:
            offset = self._position % self._size
            # Half a ring at most: the next chunk is written while this one is copied out.
            part = min(length, self._size - offset, self._size // 2)
            padded = -(-part // _ALIGNMENT) * _ALIGNMENT
            while self._live and self._live[0] < self._position + padded - self._size:
                self._live.popleft()
                self._behind += 1
            self._live.append(self._position)
            chunks.append(Chunk(self.count, offset, part, self._behind))
            self.count += 1
            self._position += padded
            length -= part
        return chunks


class _Copy:
    """A message under way, with the methods of ``dist.Work`` that the executor uses."""

    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def is_completed(self) -> bool:
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> bool:
        """Make the current stream wait."""
        torch.cuda.current_stream().wait_event(self._done)
        return True


class _Queue:
    """One direction of one pair of ranks, as one of its two ends."""

    def __init__(self, memory: Tensor, waits_for: int, raises: int, device: torch.device) -> None:
        self.memory, self.waits_for, self.raises = memory, waits_for, raises
        self.ring = Ring(memory.numel())
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, tensor: Tensor, step: Callable[[Chunk, Tensor, Tensor], None]) -> _Copy:
        # Behind what makes the tensor, or whoever had its memory before.
        self.stream.wait_stream(torch.cuda.current_stream())
        parts = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor
        done = 0
        with torch.cuda.stream(self.stream):
            for chunk in self.ring.place(tensor.numel() * tensor.element_size()):
                held = self.memory[chunk.offset : chunk.offset + chunk.length]
                step(chunk, held, parts[done : done + chunk.length])
                done += chunk.length
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return _Copy(event)

    def wait(self, count: int) -> None:
        _call("cuStreamWaitValue32_v2", self.stream.cuda_stream, self.waits_for, count)

    def raise_to(self, count: int) -> None:
        _call("cuStreamWriteValue32_v2", self.stream.cuda_stream, self.raises, count)

    def release(self, stream: torch.cuda.Stream) -> None:
        """End this end's waits, whatever the other end does."""
        _call("cuStreamWriteValue32_v2", stream.cuda_stream, self.waits_for, self.ring.count + _FAR)


class PeerCopies:
    """Sends and receives with this rank's neighbours in a pipeline; every rank of it makes one together.

    Args:
        group: The pipeline's ranks, all on one host, whose GPUs can reach each other (see :meth:`possible`).
        control: The same ranks on the CPU.
        device: This rank's GPU.
        ring_bytes: Memory of each of a rank's two rings. Messages wait in them between their sending and their
            receive; longer ones go in parts.
    """

    def __init__(
        self, group: dist.ProcessGroup, control: dist.ProcessGroup, device: torch.device, ring_bytes: int = _RING_BYTES
    ) -> None:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        mine, self._memory = map_peers(_HEAD_BYTES + 2 * ring_bytes, group, device)
        self._mine = mine
        self._sends: dict[int, _Queue] = {}
        self._receives: dict[int, _Queue] = {}

        def place(owner: int, peer: int) -> int:
            """Which of an owner's two rings a peer writes to."""
            return 0 if peer == (owner - 1) % world else 1

        def counter(owner: int, peer: int, *, free: bool) -> int:
            return self._memory[owner].data_ptr() + 4 * (2 * place(owner, peer) + free)

        def ring(owner: int, peer: int) -> Tensor:
            start = _HEAD_BYTES + place(owner, peer) * ring_bytes
            return self._memory[owner][start : start + ring_bytes]

        for peer in {(rank - 1) % world, (rank + 1) % world} - {rank}:
            there = dist.get_global_rank(group, peer)
            self._sends[there] = _Queue(
                ring(peer, rank), counter(rank, peer, free=True), counter(peer, rank, free=False), device
            )
            self._receives[there] = _Queue(
                ring(rank, peer), counter(rank, peer, free=False), counter(peer, rank, free=True), device
            )
        mine.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group=control)

    def send(self, tensor: Tensor, peer: int) -> _Copy:
        """Send a tensor, contiguous and on this rank's GPU.

        Args:
            tensor: To be kept until the copy is complete.
            peer: A neighbour's rank in the world.
        """
        queue = self._sends[peer]

        def step(chunk: Chunk, held: Tensor, part: Tensor) -> None:
            if chunk.behind:
                queue.wait(chunk.behind)
            held.copy_(part, non_blocking=True)
            queue.raise_to(chunk.index + 1)

        return queue.run(tensor, step)

    def receive(self, tensor: Tensor, peer: int) -> _Copy:
        """Receive a tensor of known shape; messages come in the order in which they were sent.

        Args:
            tensor: Contiguous and on this rank's GPU; to be used once the copy has been waited for.
            peer: A neighbour's rank in the world.
        """
        queue = self._receives[peer]

        def step(chunk: Chunk, held: Tensor, part: Tensor) -> None:
            queue.wait(chunk.index + 1)
            part.copy_(held, non_blocking=True)
            queue.raise_to(chunk.index + 1)

        return queue.run(tensor, step)

    def release(self) -> None:
        """End all waits of this GPU, behind an error: what comes is not to be used, nor is this object.

        A GPU that waits for a rank which has failed would wait for ever, and its process with it.
        """
        stream = torch.cuda.Stream(self._mine.device)  # type: ignore[no-untyped-call]
        for queue in (*self._sends.values(), *self._receives.values()):
            queue.release(stream)

    @staticmethod
    def make(group: dist.ProcessGroup, control: dist.ProcessGroup, device: torch.device) -> PeerCopies | None:
        """Copies for a pipeline whose GPUs reach each other; None for others. All ranks ask together."""
        if not PeerCopies.possible(group, control, device):
            return None
        copies, error = None, None
        try:
            copies = PeerCopies(group, control, device)
        except RuntimeError as raised:
            error = str(raised).splitlines()[0]
        errors: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=control)
        failed = next((text for text in errors if text is not None), None)
        if failed is not None:
            warnings.warn(
                f"GPUs cannot copy to each other ({failed}); messages go by NCCL, which is slower", stacklevel=2
            )
            return None
        return copies

    @staticmethod
    def possible(group: dist.ProcessGroup, control: dist.ProcessGroup, device: torch.device) -> bool:
        """Whether all ranks of a group are on one host and their GPUs reach each other; all of them ask together.

        ``NCCL_P2P_DISABLE=1``, which says that they do not, counts here too.
        """
        own: Any = None
        if device.type == "cuda" and os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0"):
            own = socket.gethostname(), torch.cuda.get_device_properties(device).uuid.__str__()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=control)
        if len(everyone) < 2 or None in everyone or len({host for host, _ in everyone}) > 1:
            return False
        here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        others = [here.get(uuid) for _, uuid in everyone if uuid != own[1]]
        reached = len(others) == len(everyone) - 1 and all(
            other is not None and torch.cuda.can_device_access_peer(device, other) for other in others
        )
        answers: list[Any] = [None] * len(everyone)
        dist.all_gather_object(answers, reached, group=control)
        return all(answers)


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return library


def _call(name: str, stream: int, address: int, value: int) -> None:
    error = getattr(_driver(), name)(stream, address, value & 0xFFFFFFFF, _AT_LEAST)
    if error:
        raise RuntimeError(f"{name} of the CUDA driver failed with error {error}")
