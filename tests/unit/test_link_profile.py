# SPDX-License-Identifier: Apache-2.0
"""Links measured by a clock that only transfers move, so that what has to come out is known."""

import math
import time

import pytest
import torch

from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.link_profile import measure_link, slowest_link


@pytest.mark.parametrize(("latency", "bandwidth"), [(2e-5, 1e9), (0.0, 3e11)])
def test_latency_and_bandwidth_are_those_of_the_transfers(latency, bandwidth, monkeypatch):
    now, moved = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def transfer(tensor):
        # The first transfer of a size makes connections and buffers; every third one meets something else.
        late = 1.0 if tensor.numel() not in moved else 0.1 * (len(moved) % 3 == 2)
        moved.append(tensor.numel())
        now[0] += latency + tensor.numel() / bandwidth + late

    link = measure_link(transfer, torch.device("cpu"), sizes=(1000, 1_000_000), repeats=5)
    assert set(moved) == {1000, 1_000_000}
    assert link.latency == pytest.approx(latency, abs=1e-9)
    assert link.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert (link.slowdown, link.contention) == (1.0, 1.0)


def test_a_link_without_noise_below_its_clock():
    link = measure_link(lambda tensor: None, torch.device("cpu"), sizes=(1, 2), repeats=1)
    assert link.bandwidth > 0
    assert math.isfinite(link.latency)


def test_the_slowest_rank_counts():
    fast, slow = Link(1e-6, 4e11, 1.0, 1.2), Link(2e-6, 3e11, 1.1, 1.0)
    assert slowest_link([fast, slow]) == slowest_link([slow, fast]) == Link(2e-6, 3e11, 1.1, 1.2)
