# SPDX-License-Identifier: Apache-2.0
"""Runs lowered schedules, stricter than any backend: sends block too, until the other rank stands at the receive.

What runs to the end so has one global order of all messages that all ranks' lists agree with. It follows that it runs
with asynchronous sends, that each rank pair sends and receives in one order per direction, and that NCCL, which runs
all of a rank's messages on one stream in list order, cannot hang.
"""

from lightning_zeroprompt.pipeline import Kind, Schedule, Task

F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT
OTHER_END = {Kind.SEND_F: (Kind.RECV_F, 1), Kind.SEND_B: (Kind.RECV_B, -1)}
OTHER_END |= {Kind.RECV_F: (Kind.SEND_F, -1), Kind.RECV_B: (Kind.SEND_B, 1)}


def run(schedule: Schedule) -> None:
    """Run all lists with blocking sends and receives; every task must find its inputs on its rank."""
    placement, last = schedule.placement, schedule.stages - 1
    rank_of = [placement.rank_of(stage) for stage in range(schedule.stages)]
    lists = schedule.tasks
    position = [0] * schedule.ranks
    here: list[set[tuple[Kind, int, int]]] = [set() for _ in lists]  # results on each rank, by who made them
    todo = list(range(schedule.ranks))
    while todo:
        rank = todo.pop()
        tasks, held = lists[rank], here[rank]
        while position[rank] < len(tasks):
            task = tasks[position[rank]]
            kind, stage, m = task.kind, task.stage, task.micro_batch
            if kind in OTHER_END:
                other_kind, step = OTHER_END[kind]
                peer = rank_of[stage + step]
                assert peer != rank, f"rank {rank} sends to itself: {task}"
                if position[peer] == len(lists[peer]) or lists[peer][position[peer]] != Task(
                    other_kind, stage + step, m
                ):
                    break
                made = kind if kind in (Kind.SEND_F, Kind.SEND_B) else other_kind
                sender, receiver, source = (rank, peer, stage) if made is kind else (peer, rank, stage + step)
                result = (F if made is Kind.SEND_F else B, source, m)
                assert result in here[sender], f"rank {sender} sends what it does not have: {result}"
                assert result not in here[receiver], f"received twice: {result}"
                here[receiver].add(result)
                position[peer] += 1
                todo.append(peer)
            elif kind is F:
                assert stage == 0 or (F, stage - 1, m) in held, f"rank {rank}: input of {task} is missing"
                held.add((F, stage, m))
            elif kind is B:
                assert (F, stage, m) in held, f"rank {rank}: {task} before its forward"
                assert stage == last or (B, stage + 1, m) in held, f"rank {rank}: input of {task} is missing"
                held.add((B, stage, m))
            elif kind is W:
                assert (B, stage, m) in held, f"rank {rank}: {task} before its backward"
            position[rank] += 1
    stuck = [f"rank {r} at {lists[r][p]}" for r, p in enumerate(position) if p < len(lists[r])]
    assert not stuck, f"waits for ever: {stuck}"
