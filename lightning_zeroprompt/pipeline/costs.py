# SPDX-License-Identifier: Apache-2.0
"""What a model's blocks and a machine's links cost: numbers that are measured, edited, or invented, and kept as JSON.

A block has three times for one micro-batch (F, B, W) and a handful of sizes; the parts outside the blocks (embedding
in front, norm and head behind) are written like one more block each. Messages and collectives are a latency and a
bandwidth. A stage's costs are the sums over its blocks, so one set of costs serves every cut, placement and schedule.

Choices: latency and bandwidth instead of a table by size, because the sizes of a plan are those of a few stages and a
line through two measured sizes is within the noise of the measurement there; times as plain seconds, because a file
that people edit has no use for units. All numbers are checked when they are read: a NaN that is found in a plan has
cost somebody an hour.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["BlockCosts", "Costs", "Link", "Transport", "costs_of_ranks", "stage_costs"]

Transport = Literal["copy_engine", "nccl"]
"""How messages travel: a queue a direction and pair of ranks (copy engines), or one ordered stream a rank (NCCL)."""

_TRANSPORTS = ("copy_engine", "nccl")
_FORMAT = 1


def _check_number(name: str, value: Any, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"costs: {name}={value!r} is no number; give a measured one, or measure again")
    if not math.isfinite(value):
        raise ValueError(f"costs: {name}={value} is no finite number; measure again, or edit it")
    if value < 0 or (positive and value == 0):
        least = "above 0" if positive else "at least 0"
        raise ValueError(f"costs: {name}={value} has to be {least}; measure again, or edit it")


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """What one block costs, for one micro-batch where it says nothing else.

    Attributes:
        forward: Seconds of F on the device.
        backward: Seconds of B.
        weight: Seconds of W.
        full_backward: Seconds of B and W in one ordinary backward pass; None is their sum.
        optimizer: Seconds of the optimizer's step, once a step, with nothing sharded.
        host_forward: Seconds in which the host launches F; it may be longer than F itself.
        host_backward: Likewise B.
        host_weight: Likewise W.
        parameters: Bytes of the weights as they are computed with.
        gradients: Bytes of whole, unreduced gradients where weights are sharded.
        state: Bytes held all the time with nothing sharded: weights, gradients, the optimizer's moments.
        activations: Bytes held from F to B, the block's input included.
        shared: Bytes held from F to B that the blocks of a stage make once, such as a mask; 0 for a whole stage.
        shared_forward: Seconds in which F makes that; 0 for a whole stage.
        weight_inputs: Bytes held from B to W.
        output: Bytes of what goes to the next block, and of its gradient.
        workspace: Bytes that a task of the block takes while it runs, on top.
        tensors: Parameters, as many as there are tensors.
    """

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    full_backward: float | None = None
    optimizer: float = 0.0
    host_forward: float = 0.0
    host_backward: float = 0.0
    host_weight: float = 0.0
    parameters: int = 0
    gradients: int = 0
    state: int = 0
    activations: int = 0
    weight_inputs: int = 0
    output: int = 0
    workspace: int = 0
    tensors: int = 0
    shared: int = 0
    shared_forward: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of F, B and W."""
        return self.forward + self.backward + self.weight

    @property
    def whole_backward(self) -> float:
        """Seconds of an ordinary backward pass."""
        return self.backward + self.weight if self.full_backward is None else self.full_backward

    def check(self, name: str, *, computes: bool) -> None:
        """Refuse numbers that cannot be.

        Args:
            name: Of the block, for the error.
            computes: Whether F and B must take time.

        Raises:
            ValueError: Naming the field.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.name == "full_backward":
                continue
            _check_number(f"{name}.{entry.name}", value, positive=computes and entry.name in ("forward", "backward"))


_NOT_SUMMED = ("full_backward", "output", "workspace", "shared", "shared_forward")
_SUMMED = tuple(entry.name for entry in fields(BlockCosts) if entry.name not in _NOT_SUMMED)


@dataclass(frozen=True, slots=True)
class Link:
    """How long bytes take.

    Attributes:
        latency: Seconds of an empty transfer.
        bandwidth: Bytes a second, while nothing computes. Of a collective: of its whole ring ("bus bandwidth").
        slowdown: How many times as long a transfer takes while its rank computes, which is nearly always.
        contention: How many times as long a rank computes while the transfer runs on it.
        host: Seconds in which the host launches a collective of FSDP, besides walking its entry.
        host_tensor: Seconds more for each of the stage's tensors.
        copy: Seconds a byte in which the computing stream copies what goes into a collective and comes out of it.
    """

    latency: float
    bandwidth: float
    slowdown: float = 1.0
    contention: float = 1.0
    host: float = 0.0
    host_tensor: float = 0.0
    copy: float = 0.0

    def seconds(self, size: float) -> float:
        """Of a transfer beside computations; nothing takes no time.

        Args:
            size: Bytes.

        >>> Link(1e-5, 1e9, slowdown=2.0).seconds(1e6)
        0.00201
        """
        return self.latency + self.slowdown * size / self.bandwidth if size else 0.0

    def check(self, name: str) -> None:
        """Refuse numbers that cannot be.

        Raises:
            ValueError: Naming the field.
        """
        for entry in fields(self):
            _check_number(f"{name}.{entry.name}", getattr(self, entry.name), positive=entry.name == "bandwidth")
        for factor in ("slowdown", "contention"):
            if getattr(self, factor) < 1:
                raise ValueError(f"costs: {name}.{factor}={getattr(self, factor)} is below 1; 1 is no loss at all")


@dataclass(frozen=True, slots=True)
class Costs:
    """All that a plan is made from.

    Attributes:
        blocks: The chain's blocks, in order.
        message: Between neighbouring pipeline ranks.
        gather: All-gathers of a stage's weights over the data-parallel ranks.
        reduce: Reduce-scatters of its gradients.
        before: What the first stage does besides its blocks.
        behind: What the last stage does besides its blocks, the loss included.
        host_action: Seconds in which the host walks one entry of a rank's list, whatever it is.
        transport: How messages travel.
        model: Fingerprint of the model and its micro-batch; empty is unknown.
        machine: Fingerprint of the machine and its software; empty is unknown.

    Raises:
        ValueError: If a number is missing, negative, NaN or infinite, or zero where that cannot be, naming the field.

    >>> costs = Costs.uniform(4, forward=1e-3, backward=1.4e-3, weight=0.8e-3)
    >>> Costs.from_json(costs.to_json()) == costs
    True
    """

    blocks: tuple[BlockCosts, ...]
    message: Link
    gather: Link
    reduce: Link
    before: BlockCosts = field(default_factory=BlockCosts)
    behind: BlockCosts = field(default_factory=BlockCosts)
    host_action: float = 0.0
    transport: Transport = "copy_engine"
    model: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("costs: blocks is empty; a pipeline needs at least one block")
        for index, block in enumerate(self.blocks):
            block.check(f"blocks[{index}]", computes=True)
        self.before.check("before", computes=False)
        self.behind.check("behind", computes=False)
        for name in ("message", "gather", "reduce"):
            getattr(self, name).check(name)
        _check_number("host_action", self.host_action)
        if self.transport not in _TRANSPORTS:
            raise ValueError(f"costs: transport={self.transport!r} is unknown; there are {', '.join(_TRANSPORTS)}")

    @classmethod
    def uniform(
        cls,
        blocks: int,
        *,
        message: Link = Link(0.0, 1e12),
        gather: Link = Link(0.0, 1e12),
        reduce: Link = Link(0.0, 1e12),
        before: BlockCosts = BlockCosts(),
        behind: BlockCosts = BlockCosts(),
        host_action: float = 0.0,
        transport: Transport = "copy_engine",
        **block: float,
    ) -> Costs:
        """Costs of equal blocks, for a machine that one does not have.

        Args:
            blocks: How many.
            message: See the class.
            gather: See the class.
            reduce: See the class.
            before: See the class.
            behind: See the class.
            host_action: See the class.
            transport: See the class.
            **block: Of each block; see :class:`BlockCosts`.
        """
        one = BlockCosts(**block)  # type: ignore[arg-type]
        return cls((one,) * blocks, message, gather, reduce, before, behind, host_action, transport)

    def ideal_seconds(self, gpus: int, micro_batches: int) -> float:
        """A step without bubbles and communication: all work, in ordinary backward passes, spread evenly.

        Args:
            gpus: P.
            micro_batches: M of the pipeline.
        """
        [whole] = stage_costs(self, [(0, len(self.blocks))])
        return micro_batches * (whole.forward + whole.whole_backward) / gpus

    def recomputed(self) -> Costs:
        """The same with every block under activation checkpointing: inputs alone are held, and B runs F once more."""

        def again(block: BlockCosts, held: int) -> BlockCosts:
            # Each block runs by itself, and makes anew what others of its stage make, too.
            forward = block.forward + block.shared_forward
            return replace(
                block,
                activations=min(held, block.activations),
                forward=forward,
                backward=block.backward + forward,
                host_backward=block.host_backward + block.host_forward,
                full_backward=block.whole_backward + forward,
                workspace=block.workspace + block.activations + block.shared,
                shared=0,
                shared_forward=0.0,
            )

        inputs = [self.blocks[0].output, *(block.output for block in self.blocks[:-1])]
        blocks = tuple(again(block, held) for block, held in zip(self.blocks, inputs, strict=True))
        return replace(self, blocks=blocks)

    def check_matches(self, *, model: str, machine: str) -> None:
        """Refuse costs of something else.

        Args:
            model: Fingerprint of the model in use.
            machine: Fingerprint of the machine in use.

        Raises:
            ValueError: If either is known here and differs.
        """
        for what, here, wanted in (("model", self.model, model), ("machine", self.machine, machine)):
            if here and here != wanted:
                raise ValueError(
                    f"costs: they were measured for {what} {here!r}, this is {wanted!r}: measure again, or set "
                    f'"{what}" to "" in the file to use them all the same'
                )

    def to_json(self) -> str:
        """As text that people can edit; equal runs of blocks are written once."""
        data = dataclasses.asdict(self)
        runs: list[dict[str, Any]] = []
        for block in data["blocks"]:
            if runs and {**runs[-1], "count": 1} == {"count": 1, **block}:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, **block})
        return json.dumps({"format": _FORMAT, **data, "blocks": runs}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """Read what :meth:`to_json` wrote, or a person.

        Raises:
            ValueError: If it is no JSON, or a field is missing, unknown or out of range, naming it.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"costs: this is no JSON ({error}); measure again") from None
        if not isinstance(data, dict):
            raise ValueError(f"costs: JSON of a {type(data).__name__} instead of an object; measure again")
        found = data.pop("format", None)
        if found != _FORMAT:
            raise ValueError(f"costs: format={found!r}, this version reads {_FORMAT}; measure again")
        runs = data.get("blocks")
        if not isinstance(runs, list):
            raise ValueError("costs: blocks is missing or no list; measure again")
        blocks: list[BlockCosts] = []
        for index, run in enumerate(runs):
            entry = dict(_object(f"blocks[{index}]", run))
            count = entry.pop("count", 1)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"costs: blocks[{index}].count={count!r}: a run has at least 1 block")
            blocks += [_read(BlockCosts, f"blocks[{index}]", entry, complete=True)] * count
        values = {**_known(cls, "", data, required=("message", "gather", "reduce")), "blocks": tuple(blocks)}
        for name in ("message", "gather", "reduce"):
            values[name] = _read(Link, name, values[name])
        for name in ("before", "behind"):
            if name in values:
                values[name] = _read(BlockCosts, name, values[name])
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write a file; it is there as a whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        partial.write_text(self.to_json())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read a file.

        Raises:
            ValueError: As :meth:`from_json`, with the file's name.
        """
        try:
            return cls.from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


_TIMES_AND_SIZES = ("forward", "backward", "weight", "state", "activations", "weight_inputs", "output")
"""What a block in a file must say; the rest is 0 where it is left out."""


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"costs: {name} is a {type(value).__name__} instead of an object")
    return value


def _known(kind: type[Any], name: str, values: Mapping[str, Any], required: Iterable[str]) -> dict[str, Any]:
    """The values, if none is unknown and none of those that are required is missing."""
    prefix = f"{name}." if name else ""
    names = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in names:
            raise ValueError(f"costs: {prefix}{key} is unknown; there are {', '.join(names)}")
    for key in required:
        if key not in values:
            raise ValueError(f"costs: {prefix}{key} is missing; measure again, or add it")
    return dict(values)


def _read(kind: type[Any], name: str, value: Any, *, complete: bool = False) -> Any:
    required = _TIMES_AND_SIZES if complete else ("latency", "bandwidth") if kind is Link else ()
    return kind(**_known(kind, name, _object(name, value), required))


def costs_of_ranks(measured: Sequence[Costs]) -> Costs:
    """One set of costs from what all ranks measured of one model at the same time.

    Args:
        measured: Of each rank. Devices' times are averaged, since every rank has some of the blocks; of hosts the
            slowest counts, since the others wait for it. Sizes, links and names are the first one's.
    """

    def joined(blocks: Sequence[BlockCosts]) -> BlockCosts:
        values: dict[str, float | None] = {}
        for name in ("forward", "shared_forward", "backward", "weight", "full_backward", "optimizer"):
            times = [value for value in (getattr(block, name) for block in blocks) if value is not None]
            values[name] = math.fsum(times) / len(times) if times else None
        for name in ("host_forward", "host_backward", "host_weight"):
            values[name] = max(getattr(block, name) for block in blocks)
        return replace(blocks[0], **values)  # type: ignore[arg-type]

    first = measured[0]
    return replace(
        first,
        blocks=tuple(map(joined, zip(*(costs.blocks for costs in measured), strict=True))),
        before=joined([costs.before for costs in measured]),
        behind=joined([costs.behind for costs in measured]),
        host_action=max(costs.host_action for costs in measured),
    )


def stage_costs(costs: Costs, cuts: Sequence[tuple[int, int]]) -> list[BlockCosts]:
    """Costs of whole stages: sums over their blocks, and what is in front of the first and behind the last.

    Args:
        costs: Of the blocks.
        cuts: For each stage its first block and the one behind its last.

    Returns:
        One for each stage; ``output`` is that of its last block, ``workspace`` the largest of its parts, and
        ``activations`` and ``forward`` have what its blocks share.

    Raises:
        ValueError: If the cuts do not cover all blocks, each once and in order.

    >>> costs = Costs.uniform(3, forward=1.0, backward=1.0, weight=1.0, behind=BlockCosts(forward=0.5))
    >>> [stage.forward for stage in stage_costs(costs, [(0, 2), (2, 3)])]
    [2.0, 1.5]
    """
    edges = [0, *(end for _, end in cuts)]
    if [first for first, _ in cuts] != edges[:-1] or edges[-1] != len(costs.blocks) or any(a >= b for a, b in cuts):
        raise ValueError(f"cuts={list(cuts)}: they have to cover {len(costs.blocks)} blocks, each once and in order")
    stages = []
    for index, (first, end) in enumerate(cuts):
        parts = list(costs.blocks[first:end])
        if index == 0:
            parts.insert(0, costs.before)
        if index == len(cuts) - 1:
            parts.append(costs.behind)
        sums = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
        sums["activations"] += max(part.shared for part in parts)
        sums["forward"] += max(part.shared_forward for part in parts)
        stages.append(
            BlockCosts(
                **sums,
                full_backward=sum(part.whole_backward for part in parts),
                output=costs.blocks[end - 1].output,
                workspace=max(part.workspace for part in parts),
            )
        )
    return stages
