# SPDX-License-Identifier: Apache-2.0
"""Better cuts for a given order: the first stages a little smaller, later ones larger.

Equal stages make every rank's sum equal, which decides long steps. Short steps are decided by filling and draining the
pipeline: rank r waits until the stages before its own have run once, so small first stages start everybody sooner, and
what they lose goes to later stages of the same ranks. No closed rule is known to us for which stages that is best, so
neighbouring cuts are tried: a run of edges moves by a few blocks together, which changes two stages and leaves those
between as large as they were. The first that makes the simulated order shorter is taken.

With 64 half-layers a model at P=2 gains 1 % (M=4) to 5 % (M=2) of the step, at P=4, M=8, V=2 4 %; long steps nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from lightning_zeroprompt.pipeline.drafts import Setting
from lightning_zeroprompt.pipeline.local_search import Numbers

__all__ = ["recut"]

_STEPS = (-1, 1, -2, 2, -4, 4)
_CLIMBS = 4
_GAIN = 1e-4
"""Share of the step below which a shorter one is no gain."""


def recut(setting: Setting, order: Numbers, *, resident: int, tries: int, seed: int = 0) -> Setting:
    """Move cuts as long as that makes an order's makespan shorter and the memory limit is kept.

    Args:
        setting: With the cuts to begin from.
        order: What is judged.
        resident: K, for the memory that is left to activations.
        tries: How many cuts to judge at most.
        seed: Of the order in which cuts are tried.

    Returns:
        The setting with the best cuts found; the same object if there are none.
    """
    stages = setting.placement.stages
    moves = [(*run, step) for run in itertools.combinations(range(1, stages + 1), 2) for step in _STEPS]
    start = best = _makespan(setting, order, resident), setting
    draw = random.Random(seed)
    for _ in range(_CLIMBS):
        if tries <= 0:
            break
        # Where a climb ends depends on what it tries first.
        draw.shuffle(moves)
        seconds, found, left = _climb(*start, order, moves, resident, tries)
        tries = left
        if seconds < best[0]:
            best = seconds, found
    return best[1]


def _climb(
    seconds: float,
    setting: Setting,
    order: Numbers,
    moves: Sequence[tuple[int, int, int]],
    resident: int,
    tries: int,
) -> tuple[float, Setting, int]:
    """Take moves that help until none does; also returns the tries that are left."""
    since = 0
    for first, end, step in itertools.cycle(moves):
        if since == len(moves) or tries <= 0:
            break
        since += 1
        edges = [start for start, _ in setting.cuts] + [setting.cuts[-1][1]]
        for edge in range(first, end):
            edges[edge] += step
        cuts = tuple(itertools.pairwise(edges))
        if any(start >= stop for start, stop in cuts):
            continue
        tries -= 1
        moved = replace(setting, cuts=cuts)
        shorter = _makespan(moved, order, resident)
        if shorter < seconds * (1 - _GAIN):
            setting, seconds, since = moved, shorter, 0
    return seconds, setting, tries


def _makespan(setting: Setting, order: Numbers, resident: int) -> float:
    """Of an order under the setting's cuts; infinite where a rank's memory does not hold it."""
    orders = setting.orders(keep=False, resident=resident)
    seconds = orders.judge(order)[0]
    fits = all(orders.fits(rank, numbers) for rank, numbers in enumerate(order))
    return seconds if fits else float("inf")
