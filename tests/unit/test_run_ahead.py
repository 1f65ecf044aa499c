# SPDX-License-Identifier: Apache-2.0
"""Measurements on a GPU whose host and clock are the test's own, so that what has to come out is known."""

import random
import time

import pytest
import torch

from lightning_zeroprompt.pipeline import link_profile, meters, run_ahead

CUDA = torch.device("cuda", 0)
KERNELS = (1e-3, 2e-3, 0.5e-3)
"""Seconds of each phase's kernels on the device; a phase has four of them."""


class Gpu:
    """A host that launches, and a device that does what was launched, in order, on two streams."""

    def __init__(self, hosts, contention=1.0):
        self.now, self.busy, self.free = 0.0, 0.0, {"work": 0.0, "side": 0.0}
        self.stream, self.hosts, self.contention, self.transfers = "work", hosts, contention, []
        self.draw = random.Random(0)

    def launch(self, seconds, kernels=4):
        for _ in range(kernels):
            self.now += self.hosts(self.draw)
            begin = max(self.free["work"], self.now)
            self.free["work"] = self._slowed(begin, seconds)
            self.busy += seconds

    def _slowed(self, begin, seconds):
        for start, stop in self.transfers:
            if stop <= begin or start >= begin + seconds:
                continue
            alone = max(0.0, start - begin)
            begin, seconds = begin + alone, seconds - alone
            beside = min(seconds, (stop - begin) / self.contention)
            begin, seconds = begin + beside * self.contention, seconds - beside
        return begin + seconds

    def transfer(self, seconds):
        begin = max(self.free["side"], self.now)
        self.free["side"] = begin + seconds
        self.transfers.append((begin, begin + seconds))

    def keep_busy(self, seconds):
        self.free["work"] = max(self.free["work"], self.now) + seconds

    def synchronize(self, device=None):
        self.now = max(self.now, *self.free.values())

    def use(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = max(gpu.free[gpu.stream], gpu.now)

            def query(self):
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Side:
            def wait_event(self, event):
                gpu.free["side"] = max(gpu.free["side"], event.at)

            def __enter__(self):
                gpu.stream = "side"

            def __exit__(self, *error):
                gpu.stream = "work"

        fakes = {"Event": Event, "synchronize": self.synchronize, "Stream": lambda device: Side()}
        fakes |= {"stream": lambda stream: stream, "reset_peak_memory_stats": lambda device: None}
        fakes |= {"memory_allocated": lambda device: 10, "max_memory_allocated": lambda device: 15}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for module in (link_profile, meters, run_ahead):
            monkeypatch.setattr(module, "keep_busy", self.keep_busy)
        return self

    @property
    def phases(self):
        return [lambda seconds=seconds: self.launch(seconds) for seconds in KERNELS]


HOSTS = {
    "quick": lambda draw: 1e-5,
    "as quick as the device": lambda draw: 1e-3,
    "slow": lambda draw: 2e-3,
    "uneven": lambda draw: draw.expovariate(1e3),
    "stalls for longer than a device is kept busy": lambda draw: 0.15 if draw.random() < 0.2 else 1e-5,
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_phase_takes_what_its_kernels_take_whatever_the_host(host, monkeypatch):
    gpu = Gpu(HOSTS[host]).use(monkeypatch)
    spans = run_ahead.run_ahead(gpu.phases, CUDA, rounds=20, seconds=0.5)
    assert {span.phase for span in spans if span.ahead} == {0, 1, 2}
    for span in (span for span in spans if span.ahead):
        assert span.seconds == pytest.approx(4 * KERNELS[span.phase])
    assert gpu.now > 0.5
    # A host that is quick enough lets the device do nothing but work.
    share = gpu.busy / gpu.now
    assert share > {"quick": 0.99, "stalls": 0}.get(host.split()[0], 0.25)


@pytest.mark.parametrize("host", HOSTS)
def test_a_meter_sees_the_devices_time(host, monkeypatch):
    gpu = Gpu(HOSTS[host]).use(monkeypatch)
    meter = meters.DeviceMeter(CUDA, repeats=5, load=0.3 if host == "quick" else 10.0)
    for phase, seconds in zip(meter.measure(gpu.phases, 0), KERNELS, strict=True):
        assert phase.seconds == pytest.approx(4 * seconds)
        assert phase.workspace == 5
        if host.split()[0] not in ("uneven", "stalls"):
            assert phase.host == pytest.approx(4 * HOSTS[host](None))
    loaded = meter.under_load(gpu.phases)
    assert [phase.seconds for phase in loaded] == pytest.approx([4 * seconds for seconds in KERNELS])
    if host.split()[0] not in ("uneven", "stalls"):
        assert [phase.host for phase in loaded] == pytest.approx([4 * HOSTS[host](None)] * 3)


def test_a_device_that_slows_down_is_measured_when_it_has(monkeypatch):
    gpu = Gpu(lambda draw: 1e-3).use(monkeypatch)

    def hot():
        gpu.launch(1e-3 if gpu.now < 0.6 else 1.5e-3)

    assert meters.DeviceMeter(CUDA, load=1.0).under_load([hot])[0].seconds == pytest.approx(6e-3)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("seconds", "contention"), [(0.2e-3, 1.3), (3e-3, 1.3), (30e-3, 1.1), (3e-3, 1.0)])
def test_contention_is_what_work_loses_while_transfers_run(host, seconds, contention, monkeypatch):
    gpu = Gpu(HOSTS[host], contention).use(monkeypatch)
    sizes = (1000, 1_000_000)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: zeros(*shape, **more))
    monkeypatch.setattr(torch.Tensor, "device", property(lambda tensor: CUDA))

    def transfer(tensor):
        took = 1e-5 + seconds * tensor.numel() / sizes[1]
        (gpu.transfer if gpu.stream == "side" else gpu.keep_busy)(took)

    link = link_profile.measure_link(transfer, CUDA, sizes, work=gpu.phases)
    assert link.bandwidth == pytest.approx(sizes[1] / seconds, rel=1e-3)
    assert link.slowdown == pytest.approx(1, abs=0.01)
    assert link.contention == pytest.approx(contention, abs=0.02)
