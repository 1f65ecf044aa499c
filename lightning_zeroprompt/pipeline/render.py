# SPDX-License-Identifier: Apache-2.0
"""Timelines to look at: blocks in a terminal, a picture, a Chrome trace.

The trace opens in chrome://tracing and in https://ui.perfetto.dev.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning_zeroprompt.pipeline.schedule import Kind
from lightning_zeroprompt.pipeline.timeline import Cause, Lane, TaskSpan, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chrome_trace", "draw_timeline", "print_timeline", "timeline_text", "write_timeline"]

_WAITS = {Cause.RECEIVE: "<", Cause.GATHER: "g", Cause.REDUCE: "r"}
_WORDS: dict[Kind | Cause, str] = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "input gradient",
    Kind.WEIGHT: "weight gradient",
    Cause.RECEIVE: "waits for a receive",
    Cause.GATHER: "waits for a gather",
    Cause.REDUCE: "waits for a reduction",
}
_COLOURS = {
    Kind.FORWARD: "#3f7fc1",
    Kind.BACKWARD: "#e08a2e",
    Kind.WEIGHT: "#5a9e56",
    Cause.RECEIVE: "#f4dcdc",
    Cause.GATHER: "#d9b3e6",
    Cause.REDUCE: "#b8a07a",
}
_STYLES = {
    Kind.FORWARD: "white on blue",
    Kind.BACKWARD: "black on yellow",
    Kind.WEIGHT: "black on green",
    Cause.RECEIVE: "red",
    Cause.GATHER: "magenta",
    Cause.REDUCE: "cyan",
}

_Piece = tuple[str, Kind | Cause | None]
"""Some text and what it stands for."""


def _summary(timeline: Timeline) -> str:
    idle = ", ".join(f"{name} {share:.1%}" for name, share in timeline.idle_shares().items() if share >= 0.0005)
    return f"step {_time(timeline.duration)}, bubble {timeline.bubble_share:.1%}" + (f": {idle}" if idle else "")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _row(lane: Lane, width: int, duration: float) -> list[_Piece]:
    """A lane as pieces of text that are ``width`` characters long together."""

    def cell(seconds: float) -> int:
        return round(seconds / duration * width) if duration else 0

    pieces: list[_Piece] = []
    position = 0
    for span in lane.spans:
        first, last = max(cell(span.start), position), cell(span.end)
        if last <= first:
            continue
        pieces.append((" " * (first - position), None))
        length = last - first
        if isinstance(span, TaskSpan):
            label = str(span.task) if len(str(span.task)) <= length else str(span.task.kind)
            pieces.append((label.ljust(length, "-"), span.task.kind))
        else:
            pieces.append((_WAITS[span.cause] * length, span.cause))
        position = last
    pieces.append((" " * (width - position), None))
    return [piece for piece in pieces if piece[0]]


def _legend() -> list[_Piece]:
    parts: list[_Piece] = []
    for what, words in _WORDS.items():
        space = "  " if parts else ""
        parts += [(space, None), (_WAITS[what] if isinstance(what, Cause) else str(what), what), (f" {words}", None)]
    return parts


def _lines(timeline: Timeline, width: int) -> list[list[_Piece]]:
    lines: list[list[_Piece]] = [[(_summary(timeline), None)]]
    digits = len(str(len(timeline.lanes) - 1))
    room = max(10, width - digits - 3)
    for rank, lane in enumerate(timeline.lanes):
        lines.append([(f"{rank:>{digits}} |", None), *_row(lane, room, timeline.duration), ("|", None)])
    return [*lines, _legend()]


def timeline_text(timeline: Timeline, width: int = 100) -> str:
    """A timeline as plain text: a line a rank, each task from its first letter to where the next begins.

    Args:
        timeline: What to draw.
        width: Characters of a rank's line.

    >>> from lightning_zeroprompt.pipeline.schedule import parse_tasks
    >>> from lightning_zeroprompt.pipeline.timeline import TaskSpan, WaitSpan
    >>> f, b = parse_tasks("F0.0 B0.0")
    >>> line = Timeline((Lane((TaskSpan(f, 0, 1), TaskSpan(b, 2, 4)), (WaitSpan(Cause.RECEIVE, 1, 2),)),))
    >>> print(timeline_text(line, 20).splitlines()[1])
    0 |F0.0<<<<B0.0----|
    """
    return "\n".join("".join(text for text, _ in line) for line in _lines(timeline, width))


def print_timeline(timeline: Timeline, file: IO[str] | None = None) -> None:
    """Print a timeline: coloured on a terminal, plain elsewhere.

    Args:
        timeline: What to draw.
        file: Where to; None is standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file)
    for line in _lines(timeline, console.width):
        text = Text(no_wrap=True, overflow="ignore")
        for part, what in line:
            text.append(part, style=_STYLES[what] if what is not None else "")
        console.print(text, soft_wrap=True)


def draw_timeline(timeline: Timeline, title: str = "") -> Figure:
    """A timeline as a picture: a row a rank, the micro-batch in each task, later stages of a rank darker.

    Args:
        timeline: What to draw.
        title: Of the picture; the step's time and its idle shares stand below it.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(timeline.lanes)
    unit = ("s", 1.0) if timeline.duration >= 1 else ("ms", 1e3)
    figure = Figure(figsize=(14, 1.6 + 0.55 * max(ranks, 2)), dpi=130, layout="constrained")
    axis = figure.subplots()
    for rank, lane in enumerate(timeline.lanes):
        stages = sorted({span.task.stage for span in lane.tasks})
        for wait in lane.waits:
            axis.broken_barh(
                [(wait.start * unit[1], (wait.end - wait.start) * unit[1])],
                (rank - 0.3, 0.6),
                facecolor=_COLOURS[wait.cause],
            )
        for span in lane.tasks:
            tint = 0.45 * (1 - (stages.index(span.task.stage) + 1) / len(stages))
            colour = tuple(channel + (1 - channel) * tint for channel in to_rgb(_COLOURS[span.task.kind]))
            start, length = span.start * unit[1], (span.end - span.start) * unit[1]
            axis.broken_barh([(start, length)], (rank - 0.42, 0.84), facecolor=colour, edgecolor="white", linewidth=0.6)
            if span.end - span.start > 0.008 * timeline.duration * len(str(span.task.micro_batch)):
                axis.text(
                    start + length / 2, rank, str(span.task.micro_batch), ha="center", va="center", fontsize=7,
                    color="white",
                )  # fmt: skip
    axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axis.set_ylim(ranks - 0.4, -0.6)
    axis.set_xlim(0, timeline.duration * unit[1] or 1)
    axis.set_xlabel(f"{unit[0]} from the start of the step (number: micro-batch; darker: later stage of the rank)")
    axis.set_title(f"{title}\n{_summary(timeline)}" if title else _summary(timeline), loc="left", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    seen = {span.task.kind for lane in timeline.lanes for span in lane.tasks}
    waits = {span.cause for lane in timeline.lanes for span in lane.waits}
    figure.legend(
        handles=[Patch(color=_COLOURS[w], label=words) for w, words in _WORDS.items() if w in seen or w in waits],
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    return figure


def chrome_trace(timeline: Timeline) -> str:
    """A timeline in the trace event format of Chrome, one lane a rank.

    Returns:
        JSON; times are microseconds, as the format has them.
    """
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "pipeline"}}]
    for rank, lane in enumerate(timeline.lanes):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        place = {"ph": "X", "pid": 0, "tid": rank}
        for span in lane.tasks:
            task = span.task
            events.append(
                {
                    **place,
                    "name": str(task),
                    "cat": _WORDS[task.kind],
                    "ts": span.start * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "args": {"stage": task.stage, "micro_batch": task.micro_batch},
                }
            )
        for wait in lane.waits:
            times = {"ts": wait.start * 1e6, "dur": (wait.end - wait.start) * 1e6}
            events.append({**place, "name": _WORDS[wait.cause], "cat": "wait", **times})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def write_timeline(timeline: Timeline, folder: Path, name: str, title: str = "") -> tuple[Path, Path]:
    """Write a timeline's picture and trace; each is whole or absent.

    Args:
        timeline: What to write.
        folder: Where to; made if it is missing.
        name: Of the files, without ``.png`` and ``.json``.
        title: Of the picture.

    Returns:
        The paths of the picture and of the trace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    draw_timeline(timeline, title).savefig(picture, format="png")
    paths = folder / f"{name}.png", folder / f"{name}.json"
    for path, content in zip(paths, (picture.getvalue(), chrome_trace(timeline).encode()), strict=True):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
    return paths
