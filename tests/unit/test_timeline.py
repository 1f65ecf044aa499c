# SPDX-License-Identifier: Apache-2.0
"""Timelines against hand-made ones and the published start times of a small ZeroPP schedule. Exact up to rounding."""

import io
import json
import random

import pytest

from lightning_zeroprompt.pipeline import Cause, Lane, TaskSpan, Timeline, WaitSpan, build_schedule, parse_tasks
from lightning_zeroprompt.pipeline.render import chrome_trace, draw_timeline, print_timeline, timeline_text
from lightning_zeroprompt.pipeline.schedule import COMPUTE
from lightning_zeroprompt.pipeline.timeline import align


def lane(text, waits=(), peak=None):
    """``"F0.0@0-2 B0.0@4-6"``, and waits such as ``("receive", 2, 4)``."""
    spans = []
    for entry in text.split():
        word, _, times = entry.partition("@")
        start, _, end = times.partition("-")
        spans.append(TaskSpan(parse_tasks(word)[0], float(start), float(end)))
    return Lane(tuple(spans), tuple(WaitSpan(Cause(cause), start, end) for cause, start, end in waits), peak)


def small():
    return Timeline(
        (
            lane("F0.0@0-2 F0.1@2-4 B0.0@6-8 B0.1@8-10 W0.0@10-11 W0.1@11-12", [("receive", 4, 6)], 4096),
            lane("F1.0@2-4 B1.0@4-6 F1.1@6-7 B1.1@7-9 W1.0@9-10", [("receive", 0, 2), ("reduce", 10, 10.5)], 2048),
        )
    )


def test_idle_time_by_cause():
    timeline = small()
    assert timeline.duration == 12
    # 10 of rank 0's 12 seconds and 8 of rank 1's are in tasks.
    assert timeline.bubble_share == pytest.approx(1 - 18 / 24)
    assert timeline.idle(0) == pytest.approx({"receive": 2, "gather": 0, "reduce": 0, "end": 0, "other": 0})
    assert timeline.idle(1) == pytest.approx({"receive": 2, "gather": 0, "reduce": 0.5, "end": 1.5, "other": 0})
    assert sum(timeline.idle_shares().values()) == pytest.approx(timeline.bubble_share)


def test_gaps_without_a_known_cause_are_other():
    timeline = Timeline((lane("F0.0@1-2 B0.0@5-6 W0.0@8-9", [("gather", 2.5, 3), ("receive", 3, 5)]),))
    assert timeline.idle(0) == pytest.approx({"receive": 2, "gather": 0.5, "reduce": 0, "end": 0, "other": 3.5})


def test_the_bubble_of_strict_zeropp():
    """P=2, V=2, U=2, M=4 and equal times: 26 units of time, of which each rank computes 24."""
    starts = [
        "0 1 2 3 5 6 7 8 9 10 11 12 13 14 15 16 18 19 20 21 22 23 24 25",
        "1 2 3 4 5 6 7 8 9 10 11 12 14 15 16 17 18 19 20 21 22 23 24 25",
    ]
    schedule = build_schedule("zeropp", ranks=2, stages_per_rank=2, micro_batches=4, unit=2)
    timeline = Timeline(
        tuple(
            Lane(tuple(TaskSpan(task, float(at), float(at) + 1) for task, at in zip(tasks, at.split(), strict=True)))
            for tasks, at in zip(schedule.only(COMPUTE).tasks, starts, strict=True)
        )
    )
    assert timeline.duration == 26
    assert timeline.bubble_share == pytest.approx(2 / 26)


@pytest.mark.parametrize("text", ["F0.0@2-1", "F0.0@0-2 F0.1@1-3"])
def test_what_no_rank_can_have_done_is_refused(text):
    with pytest.raises(ValueError, match=r"rank 0: .*one thing at a time"):
        Timeline((lane(text),))


def test_ranks_of_a_machine_keep_their_distance():
    part = lane("F0.0@0-1", [("reduce", 1, 2)], 7)
    timeline = align([("a", 100.25, part), ("b", 5.0, part), ("a", 100.0, part)])
    assert [one.tasks[0].start for one in timeline.lanes] == [0.25, 0, 0]
    assert [one.waits[0].end for one in timeline.lanes] == [2.25, 2, 2]
    assert timeline.lanes[0].peak_bytes == 7


def test_text():
    assert timeline_text(small(), width=52).splitlines() == [
        "step 12.00 s, bubble 25.0%: receive 16.7%, reduce 2.1%, end 6.2%",
        "0 |F0.0----F0.1----<<<<<<<<B0.0----B0.1----W0.0W0.1|",
        "1 |<<<<<<<<F1.0----B1.0----F1.1B1.1----W1.0rr      |",
        "F forward  B input gradient  W weight gradient  < waits for a receive  g waits for a gather  "
        "r waits for a reduction",
    ]


def test_a_task_without_room_is_its_letter():
    assert timeline_text(small(), width=16).splitlines()[1] == "0 |F-F-<<B-B-WW|"


def test_a_line_is_as_wide_as_asked_whatever_the_times():
    generator = random.Random(0)
    for _ in range(50):
        clock, spans = 0.0, []
        for task in parse_tasks("F0.0 F0.10 F1.0 B1.0 W1.0 B0.0 W0.0"):
            clock += generator.choice([0, generator.expovariate(3)])
            spans.append(TaskSpan(task, clock, clock := clock + generator.expovariate(1)))
        width = generator.randrange(20, 200)
        lines = timeline_text(Timeline((Lane(tuple(spans)),)), width).splitlines()
        assert len(lines[1]) == width, lines[1]


def test_no_colours_where_there_is_no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    print_timeline(small(), file)
    assert "\x1b" not in file.getvalue()
    assert [line[:6] for line in file.getvalue().splitlines()[1:3]] == ["0 |F0.", "1 |<<<"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    print_timeline(small(), file)
    assert "\x1b[" in file.getvalue()


def test_chrome_trace():
    events = json.loads(chrome_trace(small()))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 6 + 1 + 5 + 2
    assert {event["tid"] for event in spans} == {0, 1}
    one = next(event for event in spans if event["name"] == "B1.1")
    assert (one["tid"], one["ts"], one["dur"]) == (1, 7e6, 2e6)
    assert one["args"] == {"stage": 1, "micro_batch": 1}


def test_picture(tmp_path):
    from matplotlib.image import imread

    draw_timeline(small(), "step 3").savefig(tmp_path / "timeline.png")
    pixels = imread(tmp_path / "timeline.png")
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 1000
    # Drawn, not blank: the colour of a forward task is there.
    assert (abs(pixels[..., :3] - [0x3F / 255, 0x7F / 255, 0xC1 / 255]).max(-1) < 0.01).sum() > 1000
