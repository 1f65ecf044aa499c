# SPDX-License-Identifier: Apache-2.0
"""What the cases of ``pipeline.py`` share: the model, this rank's groups and settings, and the clock."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_zeroprompt.pipeline.chain import Chain
from lightning_zeroprompt.pipeline.costs import Costs
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups

__all__ = ["Bench", "Clock", "Gpt", "Measured", "Step", "loss_of"]

Part = TypeVar("Part", bound=nn.Module)


# -- model ------------------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, width // head)
        self.norm = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        # Small, so that an untrained model's loss is near that of guessing and a wrong step shows in it.
        nn.init.normal_(self.weight, std=0.02)


class Gpt(nn.Module):
    """Embedding, layers (whole or as two half-blocks each) and head in one row of blocks."""

    blocks: nn.Sequential

    def __init__(self, args: argparse.Namespace, *, halves: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(args.layers):
            halved = [_Attention(args.width, args.head), _Mlp(args.width)]
            layers += halved if halves else [nn.Sequential(*halved)]
        embedding = _Embedding(args.vocabulary, args.width)
        head = nn.Linear(args.width, args.vocabulary, bias=False)
        self.blocks = nn.Sequential(embedding, *layers, head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens."""
        logits: Tensor = self.blocks(tokens)
        return logits


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


# -- running ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """Of one rank."""

    seconds: list[float]
    loss: float | None
    held: tuple[int, int] | None = None
    peaks: tuple[int, int] | None = None
    predicted: tuple[float, int] | None = None
    """Seconds of a step and the most bytes of a rank, from costs."""


Step = Callable[[], Tensor | None]


class Bench:
    """This rank's device, groups and settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = args.device == "cuda"
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.cuda else "gloo",
            device_id=self.device if self.cuda else None,
            timeout=timedelta(seconds=args.timeout_s),
        )
        # Small objects travel on the CPU, whatever a failed case has left of NCCL.
        self.control = dist.new_group(backend="gloo")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.costs: Costs | None = None
        self.peaks: dict[tuple[str, int], int] = {}
        """Bytes of the rank with most, of cases that have run, by name and micro-batches."""
        self._groups: dict[Layout, ProcessGroups] = {}

    def groups(self, pipeline: int) -> ProcessGroups:
        """One set of communicators a layout for all cases: they hold GPU memory of their own."""
        layout = Layout(pipeline, self.world // pipeline)
        if layout not in self._groups:
            self._groups[layout] = ProcessGroups(layout, self.device.type)
        return self._groups[layout]

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def synchronize(self) -> None:
        """Wait for all ranks and their devices."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.control)

    def model(self, *, halves: bool | None = None) -> Gpt:
        """On the meta device, in the type it runs in; its first values are drawn anew from one seed a rank."""
        torch.manual_seed(self.rank)
        with torch.device("meta"):
            gpt = Gpt(self.args, halves=self.args.blocks == "half" if halves is None else halves).to(self.dtype)
        if self.args.compile:
            for layer in gpt.blocks[1:-1]:
                layer.compile()
        return gpt

    def materialize(self, module: Part) -> Part:
        """Give memory and first values to a module on the meta device."""
        module.to_empty(device=self.device)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        return module

    def chain(self, model: nn.Module) -> Chain:
        """A model's blocks, to be compiled by stages where that was asked for."""
        chain = find_chain(model)
        if self.args.compile_stages:
            chain.compile_rows()
        return chain

    def tokens(self, micro_batches: int) -> Tensor:
        """Random tokens, (micro-batches x rows, length), the same on all ranks."""
        shape = (micro_batches * self.args.rows, self.args.length)
        return torch.randint(self.args.vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def memory(self) -> tuple[int, int]:
        """Bytes held now, and the most since the last reset; on a CPU what live tensors hold, twice."""
        if self.cuda:
            return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        gc.unfreeze()  # or they would not be found
        gc.collect()
        tensors = [part for part in gc.get_objects() if type(part) in (Tensor, nn.Parameter) and not part.is_meta]
        # Compilers leave wrappers that hold nothing.
        tensors = [part for part in tensors if not torch._is_functional_tensor(part)]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}
        return sum(storages.values()), sum(storages.values())

    def heat(self) -> None:
        """Bring a GPU to the clocks that it has after seconds of training, which are lower than its first ones."""
        if self.cuda:
            _keep_working(self.device, self.args.heat_s)
            self.synchronize()

    def reset_peak(self) -> None:
        """Begin anew to look for the most memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def time(self, step: Step) -> Measured:
        """Warm up, then time steps."""
        # As the strategy does: collections would walk over every object of all modules in the midst of a step.
        gc.collect()
        gc.freeze()
        self.heat()
        for _ in range(self.args.warmup):
            step()
        self.synchronize()
        self.reset_peak()
        clock = Clock(self)
        for _ in range(self.args.steps):
            clock.start()
            loss = step()
            clock.stop()
        gc.unfreeze()
        return clock.measured(None if loss is None else float(loss))


def _keep_working(device: torch.device, seconds: float) -> None:
    """Let a GPU multiply matrices for about so long, while the host goes on: its clocks stay where work puts them.

    Args:
        device: A GPU.
        seconds: At least.
    """
    factor = torch.randn(4096, 4096, dtype=torch.float16, device=device)
    product = torch.empty_like(factor)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.mm(factor, factor, out=product)
    first.record()
    torch.mm(factor, factor, out=product)
    last.record()
    last.synchronize()
    for _ in range(math.ceil(1e3 * seconds / max(1e-2, first.elapsed_time(last)))):
        torch.mm(factor, factor, out=product)


class Clock:
    """Times steps, and looks at memory after a tenth of them and after all."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._since = bench, 0.0
        self._seconds: list[float] = []
        self._early: tuple[int, int] | None = None

    def start(self) -> None:
        """A step begins."""
        self._bench.synchronize()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """It ends."""
        self._bench.synchronize()
        self._seconds.append(time.perf_counter() - self._since)
        if len(self._seconds) == max(1, self._bench.args.steps // 10):
            self._early = self._bench.memory()

    def measured(self, loss: float | None) -> Measured:
        """What was measured."""
        late = self._bench.memory()
        early = self._early or late
        return Measured(self._seconds, loss, (early[0], late[0]), (early[1], late[1]))
