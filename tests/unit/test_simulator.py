# SPDX-License-Identifier: Apache-2.0
"""The simulator against equations solved by iteration, closed forms, and steps worked out by hand.

Times are equal up to rounding, bytes exactly.
"""

import itertools
import random
from collections import defaultdict
from dataclasses import replace

import pytest

from lightning_zeroprompt.pipeline import SCHEDULES, Cause, Kind, Placement, Schedule, build_schedule, parse_tasks
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link, stage_costs
from lightning_zeroprompt.pipeline.lowering import add_transfers
from lightning_zeroprompt.pipeline.memory import most_held
from lightning_zeroprompt.pipeline.simulator import Simulator, simulate

ONE_EACH = {"forward": 1.0, "backward": 1.0, "weight": 1.0}


def cuts_of(stages, blocks=None):
    """The first stage gets the blocks that are left over."""
    extra = (blocks or stages) - stages
    edges = [0, *range(1 + extra, stages + 1 + extra)]
    return list(itertools.pairwise(edges))


def random_costs(rng, blocks, transport):
    def block():
        return BlockCosts(
            forward=rng.uniform(0.5, 2),
            backward=rng.uniform(0.5, 3),
            weight=rng.uniform(0.2, 1),
            optimizer=rng.uniform(0, 1),
            host_forward=rng.choice([0.0, rng.uniform(0, 2)]),
            host_backward=rng.choice([0.0, rng.uniform(0, 2)]),
            host_weight=rng.uniform(0, 0.2),
            parameters=rng.randrange(100),
            gradients=rng.randrange(100),
            output=rng.randrange(1, 100),
        )

    links = [Link(rng.uniform(0, 0.1), rng.uniform(50, 1000), slowdown=rng.uniform(1, 2)) for _ in range(3)]
    return Costs(
        tuple(block() for _ in range(blocks)), *links, block(), block(), rng.uniform(0, 0.05), transport=transport
    )


def solved(schedule, costs, cuts, data_parallel):
    """The step's length as the least solution of one equation an entry, by iteration from zero."""
    stages, placement, last = stage_costs(costs, cuts), schedule.placement, schedule.stages - 1
    share = (data_parallel - 1) / data_parallel
    lists = add_transfers(schedule).tasks
    times = {
        Kind.FORWARD: lambda s: (s.forward, s.host_forward),
        Kind.BACKWARD: lambda s: (s.backward, s.host_backward),
        Kind.WEIGHT: lambda s: (s.weight, s.host_weight),
    }
    transfers = (Kind.SEND_F, Kind.SEND_B, Kind.RECV_F, Kind.RECV_B)

    def message(task):
        """A message's name, its size, and its other end."""
        if task.kind in (Kind.SEND_F, Kind.RECV_F):
            source = task.stage - (task.kind is Kind.RECV_F)
            return ("F", source, task.micro_batch), stages[source].output
        source = task.stage + (task.kind is Kind.RECV_B)
        return ("B", source, task.micro_batch), stages[source - 1].output

    value = defaultdict(float)
    while True:
        before = dict(value)
        ends = []
        for rank, tasks in enumerate(lists):
            clock = host = collectives = stream = 0.0
            weights, queues = {}, defaultdict(float)
            for task in tasks:
                begin, stage = max(clock, host), stages[task.stage]
                host += costs.host_action
                if task.kind in times:
                    seconds, launching = times[task.kind](stage)
                    host += launching
                    needed = None
                    if task.kind is Kind.FORWARD and task.stage:
                        needed = "F", task.stage - 1, task.micro_batch
                    elif task.kind is Kind.BACKWARD and task.stage < last:
                        needed = "B", task.stage + 1, task.micro_batch
                    if needed and placement.rank_of(needed[1]) != rank:
                        begin = max(begin, value["arrival", needed])
                    if task.kind is not Kind.WEIGHT:
                        begin = max(begin, weights.get(task.stage, 0.0))
                    clock = max(begin + seconds, host)
                elif task.kind in transfers:
                    name, size = message(task)
                    sends = task.kind in (Kind.SEND_F, Kind.SEND_B)
                    value["ready", name, sends] = begin
                    if costs.transport == "nccl":
                        value["stream", name, sends] = stream
                        start = max(value[what, name, side] for what in ("ready", "stream") for side in (True, False))
                        stream = value["arrival", name] = start + costs.message.seconds(size)
                    elif sends:
                        step = 1 if task.kind is Kind.SEND_F else -1
                        peer = placement.rank_of(task.stage + step)
                        queues[peer] = value["copied", name] = max(begin, queues[peer]) + costs.message.seconds(size)
                    else:
                        value["arrival", name] = max(value["copied", name], begin + costs.message.latency)
                elif data_parallel > 1 and task.kind is not Kind.RELEASE:
                    link, size = (
                        (costs.gather, stage.parameters)
                        if task.kind is Kind.GATHER
                        else (costs.reduce, stage.gradients)
                    )
                    collectives = max(begin, collectives) + link.seconds(round(share * size))
                    if task.kind is Kind.GATHER:
                        weights[task.stage] = collectives
            tail = sum(stages[s].optimizer for s in placement.stages_of(rank)) / data_parallel
            ends.append(max(clock, host, collectives) + tail)
        if value == before:
            return max(ends)


@pytest.mark.parametrize("transport", ["copy_engine", "nccl"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_is_the_least_solution_of_its_equations(name, transport):
    rng = random.Random(name + transport)
    per_rank = {"1f1b": 1, "zb_h1": 1, "zbv": 2}.get(name)
    for _ in range(6):
        ranks, micro_batches = rng.randint(1, 4), rng.randint(1, 7)
        schedule = build_schedule(
            name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=per_rank or rng.randint(1, 3)
        )
        costs = random_costs(rng, schedule.stages + 2, transport)
        cuts = cuts_of(schedule.stages, schedule.stages + 2)
        for data_parallel in (1, 4):
            step = simulate(schedule, costs, cuts, data_parallel=data_parallel)
            assert step.seconds == pytest.approx(solved(schedule, costs, cuts, data_parallel), rel=1e-9)


@pytest.mark.parametrize(("ranks", "per_rank", "unit", "micro_batches"), [(2, 2, 4, 8), (4, 2, 8, 16), (4, 4, 8, 24)])
def test_the_bubble_of_strict_zeropp(ranks, per_rank, unit, micro_batches):
    """(P - 1) T a step for U >= 2P and equal times."""
    schedule = build_schedule("zeropp", ranks=ranks, stages_per_rank=per_rank, unit=unit, micro_batches=micro_batches)
    step = simulate(schedule, Costs.uniform(schedule.stages, **ONE_EACH), cuts_of(schedule.stages))
    assert step.seconds == pytest.approx(3 * per_rank * micro_batches + ranks - 1)
    assert step.bubble_share == pytest.approx((ranks - 1) / step.seconds)


def test_lists_that_are_lowered_already_are_taken_as_they_are():
    schedule = build_schedule("zeropp", ranks=3, stages_per_rank=2, micro_batches=5)
    costs = Costs.uniform(6, **ONE_EACH, output=3, message=Link(0.1, 10))
    lowered = add_transfers(schedule)
    simulator = Simulator(lowered, costs, cuts_of(6))
    assert simulator.schedule is lowered
    assert simulator.run().seconds == simulate(schedule, costs, cuts_of(6)).seconds


def made(lists, stages_per_rank=1, micro_batches=1):
    tasks = tuple(parse_tasks(text) for text in lists)
    return Schedule("made", Placement(len(lists), stages_per_rank), micro_batches, micro_batches, 1, tasks)


def test_a_late_host_is_waited_for_and_hidden_by_long_tasks():
    schedule = made(["F0.0 B0.0 W0.0"])
    # Launched at 0-3, 3-4, 4-5: the forward pass ends with its last launch, the rest computes 3-8 and 8-9.
    costs = Costs.uniform(1, forward=1.0, backward=5.0, weight=1.0, host_forward=3.0, host_backward=1.0, host_weight=1)
    step = simulate(schedule, costs, [(0, 1)])
    assert [(span.start, span.end) for span in step.timeline.lanes[0].tasks] == [(0, 3), (3, 8), (8, 9)]


def test_messages_wait_for_their_queue_and_for_the_receiver():
    lists = ["F0.0 SF0.0 F0.1 SF0.1 RB0.0 B0.0 W0.0", "RF1.0 RF1.1 F1.0 F1.1 B1.0 W1.0 SB1.0"]
    costs = Costs.uniform(2, **ONE_EACH, output=30, message=Link(0.0, 10.0))
    step = simulate(made(lists, micro_batches=2), costs, [(0, 1), (1, 2)])
    # Copies leave at 1 and, the queue being busy until then, at 4; the gradient leaves behind W at 10.
    lanes = step.timeline.lanes
    assert [(span.start, span.end) for span in lanes[1].tasks] == [(4, 5), (7, 8), (8, 9), (9, 10)]
    assert [(span.start, span.end) for span in lanes[0].tasks] == [(0, 1), (1, 2), (13, 14), (14, 15)]
    assert [(wait.cause, wait.start, wait.end) for wait in lanes[0].waits] == [(Cause.RECEIVE, 2, 13)]
    assert step.message_bytes == 90
    assert step.seconds == 15
    # A rank has one NCCL stream: the second message leaves at 4 as well, and the gradient behind it.
    ordered = simulate(made(lists, micro_batches=2), replace(costs, transport="nccl"), [(0, 1), (1, 2)])
    assert ordered.seconds == 15


def test_one_stream_of_messages_is_slower_than_a_queue_each():
    schedule = build_schedule("interleaved_1f1b", ranks=4, stages_per_rank=2, micro_batches=8)
    costs = Costs.uniform(8, **ONE_EACH, output=10, message=Link(0.0, 20.0))
    copies, stream = (
        simulate(schedule, replace(costs, transport=transport), cuts_of(8)).seconds
        for transport in ("copy_engine", "nccl")
    )
    assert stream > copies * 1.02


def test_gathers_are_waited_for_and_contention_stretches_what_runs_beside_them():
    schedule = made(["AG0 F0.0 AG1 F1.0 RSH0 B1.0 RSH1 AG0 B0.0 RSH0 W1.0 RS1 W0.0 RS0"], stages_per_rank=2)
    block = {"parameters": 40, "gradients": 80, "optimizer": 2.0}
    costs = Costs.uniform(2, **ONE_EACH, **block, gather=Link(0.0, 40.0), reduce=Link(0.0, 40.0))
    step = simulate(schedule, costs, cuts_of(2), data_parallel=2)
    # Half of the bytes come from the other rank: gathers take 0.5, reductions 1.
    lane = step.timeline.lanes[0]
    spans = [(span.start, span.end) for span in lane.tasks]
    assert spans == [(0.5, 1.5), (2, 3), (3, 4), (4.5, 5.5), (5.5, 6.5), (6.5, 7.5)]
    assert lane.waited(Cause.GATHER) == pytest.approx(1.5)
    # The last reduction ends at 8.5, and each of two stages' optimizer has half of its shards.
    assert step.seconds == pytest.approx(10.5)
    assert step.collective_bytes == 3 * 20 + 2 * 40

    # W0.0 runs all of its time beside the reduction of stage 1, from 6.5 on.
    slower = simulate(schedule, replace(costs, reduce=Link(0.0, 40.0, contention=1.5)), cuts_of(2), data_parallel=2)
    assert slower.timeline.lanes[0].tasks[-1].end == pytest.approx(8.0)
    assert [span.end for span in slower.timeline.lanes[0].tasks[:-1]] == [end for _, end in spans[:-1]]
    # Nothing is sharded on one rank, so nothing is gathered or reduced.
    alone = simulate(schedule, costs, cuts_of(2))
    assert (alone.seconds, alone.collective_bytes) == (6 + 4, 0)


def test_what_fsdp_does_around_its_collectives():
    schedule = made(["AG0 F0.0 F0.1 B0.0 B0.1 RSH0 W0.0 W0.1 RS0"], micro_batches=2)
    costs = Costs.uniform(1, **ONE_EACH, parameters=40, gradients=80, tensors=3)
    bare = replace(costs, gather=Link(0.0, 10.0), reduce=Link(0.0, 10.0))
    lane = simulate(schedule, bare, cuts_of(1), data_parallel=2).timeline.lanes[0]
    assert [span.start for span in lane.tasks] == [2, 3, 4, 5, 6, 7]

    # Half of the weights are packed, all are unpacked, once; then all gradients are packed.
    packed = replace(costs, gather=Link(0.0, 10.0, copy=0.01), reduce=Link(0.0, 10.0, copy=0.025))
    step = simulate(schedule, packed, cuts_of(1), data_parallel=2)
    assert [span.start for span in step.timeline.lanes[0].tasks] == pytest.approx([2.6, 3.6, 4.6, 5.6, 6.6, 7.6])
    assert step.seconds == pytest.approx(8.6 + 0.025 * 80 + 4)

    # A host that is late with the gather, and with what comes behind the reduction.
    launched = replace(costs, gather=Link(0.0, 10.0, host=1.5, host_tensor=0.5), reduce=Link(0.0, 10.0, host=20.0))
    step = simulate(schedule, launched, cuts_of(1), data_parallel=2)
    assert step.timeline.lanes[0].tasks[0].start == pytest.approx(3)
    assert step.seconds == pytest.approx(3 + 20)
    slow = Simulator(schedule, launched, cuts_of(1), data_parallel=2).run(slower_hosts=2.0)
    assert slow.seconds == pytest.approx(2 * (3 + 20))


def test_contention_of_messages_is_nccls_alone():
    schedule = build_schedule("zeropp", ranks=2, stages_per_rank=2, micro_batches=8)
    costs = Costs.uniform(4, **ONE_EACH, output=1, message=Link(0.0, 10.0, contention=1.2))
    free = replace(costs, message=Link(0.0, 10.0))
    assert simulate(schedule, costs, cuts_of(4)).seconds == simulate(schedule, free, cuts_of(4)).seconds
    shared = simulate(schedule, replace(costs, transport="nccl"), cuts_of(4))
    alone = simulate(schedule, replace(free, transport="nccl"), cuts_of(4))
    assert alone.seconds * 1.01 < shared.seconds < alone.seconds * 1.2


@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_are_counted_like_activations(name):
    per_rank = {"1f1b": 1, "zb_h1": 1}.get(name, 2)
    schedule = build_schedule(name, ranks=3, stages_per_rank=per_rank, micro_batches=7)
    stages = 3 * per_rank
    costs = Costs.uniform(stages, **ONE_EACH, activations=1000, weight_inputs=0, state=10**6)
    for rank, peak in enumerate(simulate(schedule, costs, cuts_of(stages)).peak_bytes):
        assert peak == 1000 * most_held(schedule, rank).activations + per_rank * 10**6
    weights = Costs.uniform(stages, **ONE_EACH, parameters=10, state=12)
    for rank, peak in enumerate(simulate(schedule, weights, cuts_of(stages), data_parallel=4).peak_bytes):
        assert peak == 10 * most_held(schedule, rank).gathered + 3 * per_rank
    gradients = Costs.uniform(stages, **ONE_EACH, gradients=10)
    for rank, peak in enumerate(simulate(schedule, gradients, cuts_of(stages), data_parallel=4).peak_bytes):
        assert peak == 10 * most_held(schedule, rank).gradients


def test_peak_bytes_by_hand():
    lists = ["F0.0 SF0.0 RB0.0 B0.0 W0.0", "RF1.0 F1.0 B1.0 SB1.0 W1.0"]
    blocks = (BlockCosts(1, 1, 1, activations=50, weight_inputs=20, output=7, workspace=3),) * 2
    costs = replace(Costs.uniform(2, **ONE_EACH), blocks=blocks)
    # Rank 0: 50 held and a gradient of 7 received when B takes 3 more. Rank 1: its 7 are part of the 50.
    assert simulate(made(lists), costs, cuts_of(2)).peak_bytes == (60, 53)


def test_jitter_is_repeatable_and_costs_time():
    schedule = build_schedule("zbv", ranks=4, stages_per_rank=2, micro_batches=16)
    simulator = Simulator(schedule, Costs.uniform(8, **ONE_EACH), cuts_of(8))
    steady = simulator.run()
    seconds = [simulator.run(jitter=0.1, seed=seed).seconds for seed in range(20)]
    assert simulator.run(jitter=0.1, seed=3).seconds == seconds[3]
    assert len(set(seconds)) == 20
    assert steady.seconds < sum(seconds) / 20 < 1.1 * steady.seconds


def test_idle_time_has_its_causes():
    schedule = build_schedule("1f1b", ranks=4, micro_batches=8)
    costs = Costs.uniform(4, **ONE_EACH, message=Link(0.05, 1e3), output=10, parameters=100, gather=Link(0.1, 1e3))
    step = simulate(schedule, costs, cuts_of(4), data_parallel=2)
    shares = step.timeline.idle_shares()
    assert sum(shares.values()) == pytest.approx(step.bubble_share)
    assert shares["receive"] > 10 * shares["gather"] > 0
    assert shares["other"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["RB0.0 B0.0 F0.0 SF0.0 W0.0", "RF1.0 F1.0 B1.0 SB1.0 W1.0"], r"rank 0 at B0.0 \(entry 2 of 5\)"),
        (["F0.0 SF0.0 B0.0 W0.0", "RF1.0 F1.0 B1.0 W1.0"], r"rank 0 at B0.0 \(entry 3 of 4\)"),
    ],
)
@pytest.mark.parametrize("transport", ["copy_engine", "nccl"])
def test_lists_that_wait_for_themselves(lists, message, transport):
    costs = replace(Costs.uniform(2, **ONE_EACH), transport=transport)
    with pytest.raises(ValueError, match=f"'made' waits for itself: .*{message}"):
        simulate(made(lists), costs, cuts_of(2))


def test_settings_that_do_not_fit():
    schedule = build_schedule("1f1b", ranks=2, micro_batches=2)
    costs = Costs.uniform(3, **ONE_EACH)
    with pytest.raises(ValueError, match="3 cuts for the 2 stages of schedule '1f1b'"):
        simulate(schedule, costs, cuts_of(3))
    with pytest.raises(ValueError, match="cover 3 blocks"):
        simulate(schedule, costs, cuts_of(2))
    with pytest.raises(ValueError, match="data_parallel=0"):
        simulate(schedule, costs, cuts_of(2, 3), data_parallel=0)
