# SPDX-License-Identifier: Apache-2.0
"""Results of a run as files, a picture and a table.

* ``results.json``: what was evaluated (number of training tasks, seeds, sample sizes) and every macro score with its
  interval, beside its baselines: chance, majority answer, first option, the untrained model, exchanged instructions.
* ``results.csv``, ``results_tasks.json``: one entry a task, hold-out level and kind of wording; the JSON has the
  score of every template too.
* ``results.png``: held-out scores by category, with chance and the untrained model marked.

Everything is written to a temporary name and renamed, so a killed run leaves old results or new ones, never halves.
JSON has no NaN; a missing number is null. Cost: 0.1 s for the tables, 1 s for the picture.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_zeroprompt.data.evaluation_plan import EvaluationPlan
from lightning_zeroprompt.files import json_bytes, write_files
from lightning_zeroprompt.metrics.summary import EvaluationSummary, MacroScore, TaskScore

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["FORMAT", "draw_results", "results_data", "results_table", "write_results"]

FORMAT = 1
"""Version of results.json."""

# What is new to the model; "task": the category has trained tasks, "instance": the task itself was trained.
_LEVELS = {
    "category": "unseen category",
    "task": "unseen task",
    "instance": "unseen examples",
}
_MARKS = ("trained model", "the same in new wordings", "chance", "untrained model")
_COLUMNS = (
    "task_id", "category", "family", "level", "wording", "kind", "metric", "examples", "chance", "majority",
    "first_option", "median", "mean", "minimum", "maximum", "std", "normalised",
)  # fmt: skip


def results_data(
    plan: EvaluationPlan,
    summary: EvaluationSummary,
    *,
    untrained: EvaluationSummary | None = None,
    shuffled: EvaluationSummary | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Content of results.json.

    Args:
        plan: What was evaluated.
        summary: The model's scores.
        untrained: Scores of the same model before training, under the same plan.
        shuffled: Scores of the trained model with instructions exchanged between tasks.
        run: Further entries of the top level, such as the model, the steps and the corpus' fingerprint.

    Returns:
        JSON-like data. ``macro`` lists all groups; ``heldout_score`` and ``heldout_normalised`` repeat those of all
        held-out tasks under known wordings (null without held-out tasks).

    Raises:
        ValueError: ``run`` has an entry that is written here.
    """
    headline = summary.find("heldout")
    data: dict[str, Any] = {
        "format": FORMAT,
        "num_tasks": plan.num_training_tasks,
        "heldout_score": headline and headline.score,
        "heldout_normalised": headline and headline.normalised,
        "sample_sizes": plan.sample_sizes(),
        "unshuffled_cells": plan.unshuffled_cells,
        "evaluation": dataclasses.asdict(plan.settings),
        "confidence": summary.confidence,
        "macro": [_with_peers(macro, untrained, shuffled) for macro in summary.macro],
    }
    taken = sorted(data.keys() & (run or {}).keys())
    if taken:
        raise ValueError(f"run has the entries {taken}, which results.json has already; rename them")
    return {**data, **(run or {})}


def write_results(
    folder: str | Path,
    plan: EvaluationPlan,
    summary: EvaluationSummary,
    *,
    untrained: EvaluationSummary | None = None,
    shuffled: EvaluationSummary | None = None,
    run: Mapping[str, Any] | None = None,
    title: str = "Zero-shot scores",
) -> dict[str, Path]:
    """Write all result files into the run folder.

    Args:
        folder: The run folder; made if it is missing.
        plan: What was evaluated.
        summary: The model's scores.
        untrained: Scores of the same model before training.
        shuffled: Scores with instructions exchanged between tasks.
        run: Further entries of results.json.
        title: Of the picture.

    Returns:
        The written paths by file name.

    Raises:
        ValueError: ``run`` has an entry that results.json has already.
    """
    picture = io.BytesIO()
    draw_results(summary, untrained=untrained, title=title).savefig(picture, format="png", dpi=150)
    rows = [dataclasses.asdict(task) for task in summary.tasks]
    content = {
        "results.json": json_bytes(results_data(plan, summary, untrained=untrained, shuffled=shuffled, run=run)),
        "results.csv": _csv(summary.tasks, {"untrained": untrained, "shuffled": shuffled}),
        "results_tasks.json": json_bytes(rows),
        "results.png": picture.getvalue(),
    }
    return write_files(folder, content)


def results_table(
    summary: EvaluationSummary,
    *,
    untrained: EvaluationSummary | None = None,
    shuffled: EvaluationSummary | None = None,
) -> "Table":
    """Held-out results by hold-out level, kind of answer and category, beside the baselines.

    Args:
        summary: The model's scores.
        untrained: Scores of the same model before training.
        shuffled: Scores with instructions exchanged between tasks.

    Returns:
        A table for ``rich``. Rows of whole levels come first, by kind of answer and wording; categories follow for
        held-out tasks under known wordings. A score is marked ``*`` where its interval lies above chance, the first
        option and the untrained model's interval.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title="Zero-shot results",
        caption=f"score: mean over tasks of the median over templates, with its {summary.confidence:.0%} interval;\n"
        "*: interval above chance, first option and untrained model; gain: (score - chance) / (1 - chance);\n"
        "major.: always the most frequent answer; first: always the first option; untr.: the model before training"
        + ("; shuf.: with the instructions of other tasks" if shuffled else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("hold-out level, category", no_wrap=True)
    table.add_column("answers", no_wrap=True)
    for name in ("tasks", "score", "interval", "gain", "chance", "major.", "first", "untr.", "shuf."):
        if name != "shuf." or shuffled:
            table.add_column(name, justify="right", no_wrap=True)
    for level, words in _LEVELS.items():
        mine = [macro for macro in summary.macro if macro.level == level and macro.kind]
        totals = [macro for macro in mine if macro.category is None]
        parts = [macro for macro in mine if macro.category and macro.wording == "train" and level != "instance"]
        totals.sort(key=lambda macro: (macro.kind or "", macro.wording != "train"))
        parts.sort(key=lambda macro: (macro.kind or "", -macro.normalised))
        for macro in totals:
            wording = "" if macro.wording == "train" else ", new wording"
            table.add_row(f"{words}{wording}", *_row(macro, untrained, shuffled), style="bold")
        for macro in parts:
            table.add_row(f"  {macro.category}", *_row(macro, untrained, shuffled))
        if mine:
            table.add_section()
    return table


def draw_results(
    summary: EvaluationSummary, *, untrained: EvaluationSummary | None = None, title: str = "Zero-shot scores"
) -> "Figure":
    """Picture of the held-out scores by category: one panel a hold-out level, one line a category.

    Args:
        summary: The model's scores.
        untrained: Scores of the same model before training, drawn as circles.
        title: Of the picture.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    from matplotlib.figure import Figure

    drawn = [macro for macro in summary.macro if macro.category and macro.kind is None]
    # Trained tasks would fill most of the picture; they are drawn only where nothing else was evaluated.
    drawn = [macro for macro in drawn if macro.level in ("category", "task")] or drawn
    panels = [(words, [macro for macro in drawn if macro.level == level]) for level, words in _LEVELS.items()]
    panels = [(words, macros) for words, macros in panels if macros]
    heights = [len({macro.category for macro in macros}) + 1.2 for _, macros in panels]
    figure = Figure(figsize=(9, 0.3 * sum(heights) + 1.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    handles: dict[str, Artist] = {}
    for axis, (words, macros) in zip(axes, panels, strict=True):
        _draw_panel(axis, words, macros, untrained)
        found, labels = axis.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True)) | handles
    axes[-1].set_xlabel(
        f"accuracy of choices, exact match or ROUGE-L of free answers (lines: {summary.confidence:.0%} intervals)"
    )
    names = [name for name in _MARKS if name in handles]
    figure.suptitle(title)
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_panel(axis: "Axes", words: str, macros: Sequence[MacroScore], untrained: EvaluationSummary | None) -> None:
    known = {macro.category: macro for macro in macros if macro.wording == "train"}
    unseen = {macro.category: macro for macro in macros if macro.wording == "heldout"}
    names = sorted({**known, **unseen}, key=lambda name: (known.get(name) or unseen[name]).score)
    place = {name: position for position, name in enumerate(names)}
    for macro in known.values():
        y = place[macro.category]
        axis.barh(y, macro.score, height=0.62, color="#4878a8", label=_once(axis, _MARKS[0]))
        axis.plot([macro.low, macro.high], [y, y], color="#1d3550", linewidth=1.6, solid_capstyle="butt")
    for macro in unseen.values():
        y = place[macro.category]
        axis.plot(macro.score, y, "D", color="#e08a2e", markersize=5, label=_once(axis, _MARKS[1]), zorder=4)
    for name in names:
        macro = known.get(name) or unseen[name]
        y = place[name]
        axis.plot(
            [macro.chance] * 2,
            [y - 0.4, y + 0.4],
            color="#c03028",
            linewidth=2.2,
            label=_once(axis, _MARKS[2]),
            zorder=3,
        )
        before = _peer(macro, untrained)
        if before is not None:
            axis.plot(before.score, y, "o", markerfacecolor="white", markeredgecolor="black", markersize=5.5,
                      label=_once(axis, _MARKS[3]), zorder=5)  # fmt: skip
    counts = {name: (known.get(name) or unseen[name]).tasks for name in names}
    axis.set_yticks(range(len(names)), [f"{name} ({counts[name]})" for name in names], fontsize=9)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_xlim(-0.008, 1.008)
    axis.set_title(f"{words} (number of tasks in brackets)", loc="left", fontsize=10)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _once(axis: "Axes", label: str) -> str:
    return "_nolegend_" if label in axis.get_legend_handles_labels()[1] else label


def _peer(macro: MacroScore, other: EvaluationSummary | None) -> MacroScore | None:
    keys = (macro.level, macro.wording, macro.category, macro.kind)
    found = (m for m in (other.macro if other else ()) if (m.level, m.wording, m.category, m.kind) == keys)
    return next(found, None)


def _with_peers(
    macro: MacroScore, untrained: EvaluationSummary | None, shuffled: EvaluationSummary | None
) -> dict[str, Any]:
    data = dataclasses.asdict(macro)
    for name, other in (("untrained", untrained), ("shuffled", shuffled)):
        peer = _peer(macro, other)
        keys = ("tasks", "score", "low", "high", "normalised", "normalised_low", "normalised_high", "nll")
        data[name] = peer and {key: getattr(peer, key) for key in keys}
    return data


def _row(macro: MacroScore, untrained: EvaluationSummary | None, shuffled: EvaluationSummary | None) -> list[str]:
    before, mixed = _peer(macro, untrained), _peer(macro, shuffled)
    floor = max(macro.chance, macro.first_option or 0.0, before.high if before else 0.0)
    cells = [
        "free" if macro.kind == "generation" else macro.kind or "",
        f"{macro.tasks:,}",
        f"[green]{macro.score:.3f}*[/green]" if macro.low > floor else f"{macro.score:.3f} ",
        f"{macro.low:.2f}-{macro.high:.2f}",
        f"{macro.normalised:+.2f}",
        f"{macro.chance:.2f}",
        f"{macro.majority:.2f}",
        "" if macro.first_option is None else f"{macro.first_option:.2f}",
        "" if before is None else f"{before.score:.2f}",
    ]
    if shuffled:
        cells.append("" if mixed is None else f"{mixed.score:.2f}")
    return cells


def _csv(tasks: Sequence[TaskScore], others: Mapping[str, EvaluationSummary | None]) -> bytes:
    extra = list(dict.fromkeys(name for task in tasks for name in task.others))
    medians = {
        name: {(task.task_id, task.level, task.wording): task.median for task in other.tasks}
        for name, other in others.items()
        if other is not None
    }
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, "templates", *extra, *medians])
    for task in tasks:
        key = (task.task_id, task.level, task.wording)
        values = [getattr(task, name) for name in _COLUMNS]
        values += [len(task.templates), *(task.others.get(name) for name in extra)]
        values += [median.get(key) for median in medians.values()]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue().encode("utf-8")
