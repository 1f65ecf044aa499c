# SPDX-License-Identifier: Apache-2.0
"""Blocks to stages: contiguous cuts that make the slowest stage, and the rank with most work, as fast as possible.

The cost of a block is estimated from its parameters: multiplying with a matrix of n entries takes 2 n FLOP a token in
the forward pass and twice that in the backward pass, so weights of Linears and convolutions count in full; embeddings
are looked up and norms and biases applied for next to nothing. What lies outside the blocks (embedding before, norm
and head behind) is work of the first and of the last stage. A block whose parameters do not tell (it multiplies with
another module's matrix, or works on a part of the tokens) says its work itself, as ``pipeline_cost``; then all do, in
one unit. Where costs have been measured, ``measured_cuts`` takes those seconds instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from lightning_zeroprompt.pipeline.costs import Costs
from lightning_zeroprompt.pipeline.schedule import Placement

if TYPE_CHECKING:  # plans are made without torch
    from torch import nn

__all__ = ["balanced_cuts", "block_cost", "measured_cuts", "module_cost"]


def module_cost(module: nn.Module) -> float:
    """Estimated work of a module, in parameters multiplied a token.

    >>> from torch import nn
    >>> module_cost(nn.Sequential(nn.Linear(4, 8), nn.Embedding(100, 4)))
    32.004...
    """
    from torch import nn

    cost = 0.0
    seen: set[int] = set()
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            multiplied = parameter.dim() > 1 and not isinstance(part, nn.Embedding)
            # A little for the rest, so that of two cuts with equal products the one with fewer parameters wins.
            cost += parameter.numel() * (1.0 if multiplied else 1e-5)
    return cost


def block_cost(block: nn.Module) -> float:
    """Estimated work of a block: its ``pipeline_cost`` where it has one, else :func:`module_cost`."""
    own = getattr(block, "pipeline_cost", None)
    return module_cost(block) if own is None else float(own)


_STAGE_WEIGHT = 0.25
"""What an uneven stage counts against an uneven rank: it is waited for while a pipeline fills, not all the time."""


_FEW_CUTS = 2000
"""So many are all tried; steps from cut to cut can end beside the best one."""


def balanced_cuts(
    costs: Sequence[float],
    stages: int,
    *,
    before: float = 0.0,
    behind: float = 0.0,
    rank_of: Callable[[int], int] | None = None,
) -> list[tuple[int, int]]:
    """Cut a row of blocks into stages so that the largest stage cost is least, and among such cuts the most even.

    Ranks with several stages also want equal sums: of few cuts the best is taken; of many, edges are moved from that
    cut on, one or two at a time, as long as that makes the most loaded rank lighter and no stage much heavier.

    Args:
        costs: Of each block.
        stages: How many; each gets at least one block.
        before: Work of the first stage besides its blocks.
        behind: Work of the last stage besides its blocks.
        rank_of: The rank of each stage; None looks at stages alone.

    Returns:
        For each stage its first block and the one behind its last.

    Raises:
        ValueError: If there are fewer blocks than stages.

    >>> balanced_cuts([1, 1, 1, 1], 2, behind=2)
    [(0, 3), (3, 4)]
    """
    count = len(costs)
    if count < stages:
        raise ValueError(
            f"{count} blocks cannot fill {stages} stages: every stage needs one; use fewer ranks or stages_per_rank, "
            "or cut the model into smaller blocks with configure_pipeline()"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, first: int, end: int) -> float:
        extra = (before if stage == 0 else 0.0) + (behind if stage == stages - 1 else 0.0)
        return sums[end] - sums[first] + extra

    # For each end: the largest cost, and the sum of squares, of the first stages over the blocks in front of it.
    edges = np.array(sums)
    costs_of = np.where(np.tri(count + 1, dtype=bool), np.inf, edges[None, :] - edges[:, None])
    largest, squares = np.full(count + 1, np.inf), np.full(count + 1, np.inf)
    largest[0] = squares[0] = 0.0
    starts = []
    for stage in range(stages):
        own = costs_of + cost_of(stage, 0, 0)
        options = np.maximum(largest[:, None], own)
        largest = options.min(0)
        even = np.where(options == largest, squares[:, None] + own * own, np.inf)
        start = even.argmin(0)
        squares = even[start, np.arange(count + 1)]
        # Every stage behind needs a block too.
        largest[count - (stages - stage - 1) + 1 :] = squares[count - (stages - stage - 1) + 1 :] = np.inf
        starts.append(start)
    cuts: list[tuple[int, int]] = []
    end = count
    for start in reversed(starts):
        cuts.insert(0, (int(start[end]), end))
        end = int(start[end])
    if rank_of is None or stages < 3:
        return cuts
    return _even_ranks(cuts, cost_of, [rank_of(stage) for stage in range(stages)])


def measured_cuts(costs: Costs, placement: Placement) -> list[tuple[int, int]]:
    """Cut by measured seconds of F, B and W, what is before and behind the blocks included.

    Args:
        costs: Of the blocks.
        placement: Stages to ranks; ranks with several stages get equal sums.

    Returns:
        For each stage its first block and the one behind its last.

    Raises:
        ValueError: If there are fewer blocks than stages.
    """
    return balanced_cuts(
        [block.work for block in costs.blocks],
        placement.stages,
        before=costs.before.work,
        behind=costs.behind.work,
        rank_of=placement.rank_of,
    )


def _even_ranks(
    cuts: list[tuple[int, int]], cost_of: Callable[[int, int, int], float], owners: list[int]
) -> list[tuple[int, int]]:
    stages = len(cuts)
    per_rank = stages / len(set(owners))

    def loads(edges: Sequence[int]) -> tuple[float, list[float]]:
        of_stages = [cost_of(stage, edges[stage], edges[stage + 1]) for stage in range(stages)]
        of_ranks = [0.0] * (max(owners) + 1)
        for owner, cost in zip(owners, of_stages, strict=True):
            of_ranks[owner] += cost
        return max(of_ranks) / per_rank + _STAGE_WEIGHT * max(of_stages), of_ranks

    def moved(edges: list[int], steps: Sequence[tuple[int, int]]) -> list[int] | None:
        new = list(edges)
        for edge, step in steps:
            new[edge] += step
        return new if all(one < two for one, two in pairwise(new)) else None

    edges = [first for first, _ in cuts] + [cuts[-1][1]]
    count = edges[-1]
    if comb(count - 1, stages - 1) <= _FEW_CUTS:
        every = [[0, *between, count] for between in combinations(range(1, count), stages - 1)]
        least: list[int] = min(every, key=lambda new: loads(new)[0])
        return list(pairwise(least))
    value, of_ranks = loads(edges)
    inner = range(1, stages)
    while True:
        heaviest = of_ranks.index(max(of_ranks))
        near = [edge for edge in inner if heaviest in (owners[edge - 1], owners[edge])]
        ways = [[(edge, step)] for edge in inner for step in (-2, -1, 1, 2)]
        ways += [
            [(one, step), (two, other)]
            for one in near
            for two in inner
            for step in (-1, 1)
            for other in (-1, 1)
            if two != one
        ]
        options = [new for steps in ways if (new := moved(edges, steps)) is not None]
        best = min(options, key=lambda new: loads(new)[0], default=edges)
        if loads(best)[0] >= value * (1 - 1e-9):
            return list(pairwise(edges))
        edges = best
        value, of_ranks = loads(edges)
