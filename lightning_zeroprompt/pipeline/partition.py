# SPDX-License-Identifier: Apache-2.0
"""Blocks to stages: contiguous cuts that make the slowest stage as fast as possible.

The cost of a block is estimated from its parameters: multiplying with a matrix of n entries takes 2 n FLOP a token in
the forward pass and twice that in the backward pass, so weights of Linears and convolutions count in full; embeddings
are looked up and norms and biases applied for next to nothing. What lies outside the blocks (embedding before, norm
and head behind) is work of the first and of the last stage. A block whose parameters do not tell (it multiplies with
another module's matrix, or works on a part of the tokens) says its work itself, as ``pipeline_cost``; then all do, in
one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["balanced_cuts", "block_cost", "module_cost"]


def module_cost(module: nn.Module) -> float:
    """Estimated work of a module, in parameters multiplied a token.

    >>> module_cost(nn.Sequential(nn.Linear(4, 8), nn.Embedding(100, 4)))
    32.004...
    """
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


def balanced_cuts(
    costs: Sequence[float], stages: int, *, before: float = 0.0, behind: float = 0.0
) -> list[tuple[int, int]]:
    """Cut a row of blocks into stages so that the largest stage cost is least, and among such cuts the most even.

    Args:
        costs: Of each block.
        stages: How many; each gets at least one block.
        before: Work of the first stage besides its blocks.
        behind: Work of the last stage besides its blocks.

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

    # best[end]: (largest cost, sum of squares, cuts) of the first stages over the first `end` blocks.
    best: dict[int, tuple[float, float, list[tuple[int, int]]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        following: dict[int, tuple[float, float, list[tuple[int, int]]]] = {}
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            options = []
            for first in range(stage, end):
                if first in best:
                    largest, squares, cuts = best[first]
                    cost = cost_of(stage, first, end)
                    options.append((max(largest, cost), squares + cost * cost, [*cuts, (first, end)]))
            following[end] = min(options, key=lambda option: option[:2])
        best = following
    return best[count][2]
