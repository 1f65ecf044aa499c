# SPDX-License-Identifier: Apache-2.0
"""Results of prompt searches as files, a picture and a table.

* ``prompts.json``: for every task the prompt to use, frozen: its genome, the manual prompt, where it descends from, the
  scores of both on search, confirm and test, mode, labels used, seeds and counts. :func:`read_prompts` reads it.
* ``prompts.md``: the same for people.
* ``prompts.png``: best, median and manual fitness by generation.

Prompts in these files are data: they are parsed into templates, never run. Cost: 0.5 s, the picture's.
"""

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_zeroprompt.files import json_bytes, write_files
from lightning_zeroprompt.prompts.genome import PromptGenome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["FORMAT", "draw_searches", "prompts_table", "prompts_text", "read_prompts", "write_prompts"]

FORMAT = 1
"""Version of prompts.json."""

_PANELS = 12
_NAMES = {"accuracy": "accuracy", "exact_match": "exact match", "rouge_l": "ROUGE-L"}


def write_prompts(
    folder: str | Path, records: Sequence[Mapping[str, Any]], run: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Write prompts.json, prompts.md and prompts.png into the run folder.

    Args:
        folder: The run folder; made if it is missing.
        records: One a task (:func:`~lightning_zeroprompt.prompts.outcome.search_record`).
        run: Further entries of the JSON's top level, such as the corpus and the checkpoint.

    Returns:
        The written paths by file name.
    """
    picture = io.BytesIO()
    draw_searches(records).savefig(picture, format="png", dpi=120)
    data = {"format": FORMAT, **(run or {}), "tasks": list(records)}
    text = "# Prompts\n\n" + "\n".join(prompts_text(record) for record in records)
    return write_files(
        folder,
        {"prompts.json": json_bytes(data), "prompts.md": text.encode(), "prompts.png": picture.getvalue()},
    )


def read_prompts(path: str | Path) -> dict[str, Any]:
    """Read a prompts.json.

    Args:
        path: The file.

    Returns:
        Its content; in every task's record ``genomes`` is added: ``"prompt"`` and ``"manual"`` as
        :class:`~lightning_zeroprompt.prompts.genome.PromptGenome`.

    Raises:
        ValueError: It is missing, of another version, or holds a prompt that cannot be used.
    """
    path = Path(path)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, records = data["format"], data["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no prompts.json that can be read ({type(error).__name__}: {error}); give the one in the folder "
            "of a search"
        ) from None
    if version != FORMAT:
        raise ValueError(f"{path} has the format {version}, this version reads {FORMAT}; search again with it")
    for record in records:
        record["genomes"] = {name: PromptGenome.from_dict(record[name]["genome"]) for name in ("prompt", "manual")}
    return data


def prompts_text(record: Mapping[str, Any]) -> str:
    """One task's result as Markdown."""
    scores, metric = record["scores"], _NAMES[record["metric"]]
    labels = f"{record['labels_used']} labels" if record["labels_used"] else "no labels"
    rows = record["rows"]
    lines = [
        f"## {record['task']}",
        "",
        _verdict(record),
        f"Mode {record['mode']} ({labels}); rows: {rows['search']} search, {rows['confirm']} confirm, "
        f"{rows['test']} test{'' if record['counted'] else ' (under 128 distinct inputs: not counted)'}; model of step "
        f"{record['model_step']}; {record['scorings']['search']:,} scorings in {record['generations']} generations.",
        "",
        "Prompt to use:",
        "",
        *_quoted(record["prompt"]),
        "",
    ]
    if not record["kept"] and record.get("evolved"):
        lines += ["Best evolved prompt, not kept:", "", *_quoted(record["evolved"]), ""]
    elif record["kept"]:
        lines += ["Best manual prompt:", "", *_quoted(record["manual"]), ""]
    lines += [
        f"| part | manual: fitness | {metric} | evolved: fitness | {metric} | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    for part in ("search", "confirm", "test"):
        found = scores[part] or {}
        evolved = found.get("evolved") or (found.get("prompt") if part == "test" and record["kept"] else None)
        cells = [*_pair(found.get("manual")), *_pair(evolved)]
        p_value = (found.get("evolved") or {}).get("p_adjusted") if part == "confirm" else None
        lines.append(f"| {part} | " + " | ".join([*cells, _p(p_value, 4)]) + " |")
    if scores["test"]:
        test = scores["test"]
        low, high = _signed(test["gain_low"]), _signed(test["gain_high"])
        lines += ["", f"Gain on test: {_signed(test['gain'])} (95 % interval {low} to {high})."]
    lines += ["", "Descent of the prompts above (newest first):", ""]
    for entry in sorted(record["lineage"].values(), key=lambda entry: -entry["generation"]):
        text = PromptGenome.from_dict(entry["genome"]).text
        lines.append(f"* generation {entry['generation']}, {entry['origin']}: {_code(text)}")
    return "\n".join([*lines, ""])


def prompts_table(records: Sequence[Mapping[str, Any]]) -> "Table":
    """Per task: manual prompt, evolved prompt, confirm scores, kept or fell back.

    Args:
        records: One a task.

    Returns:
        A table for ``rich``.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title="Prompt search on held-out tasks",
        caption="on the confirm part: fitness (log-likelihood margin of the right option; of free answers, the "
        "log-likelihood a token), outcome (accuracy, exact match or ROUGE-L), p (one-sided exact test on the outcome, "
        "Holm over the finalists); test: outcome on the test part, of what is used and of the manual prompt",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name in ("task, prompts", "fitness", "outcome", "p", "test"):
        table.add_column(name, justify="left" if name == "task, prompts" else "right", overflow="fold")
    for record in records:
        confirm, test = record["scores"]["confirm"] or {}, record["scores"]["test"] or {}
        table.add_row(
            f"[bold]{_plain(record['task'])}[/bold]: {'[green]kept[/green]' if record['kept'] else 'fell back'}"
        )
        tests = {"manual": test.get("manual"), "evolved": test.get("prompt") if record["kept"] else None}
        for name in ("manual", "evolved"):
            if record.get(name):
                found = confirm.get(name) or {}
                p_value = found.get("p_adjusted")
                table.add_row(
                    f"  {name}: {_plain(json.dumps(record[name]['text'], ensure_ascii=False))}",
                    *_pair(found, ".2f"),
                    _p(p_value, 3),
                    _pair(tests[name], ".2f")[1],
                )
        table.add_section()
    return table


def draw_searches(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """Best, median and manual fitness by generation, one panel a task (the first 12).

    Args:
        records: One a task; only ``task`` and ``history`` are read.

    Returns:
        A figure that belongs to no window.
    """
    from matplotlib.figure import Figure

    drawn = list(records)[:_PANELS]
    columns = min(3, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis, record in zip(axes, drawn, strict=False):
        _draw_history(axis, record)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _draw_history(axis: "Axes", record: Mapping[str, Any]) -> None:
    history = record["history"]
    generations = [entry["generation"] for entry in history]
    for name, style in (("best", "-"), ("median", "--"), ("manual", ":")):
        axis.plot(generations, [entry[name] for entry in history], style, label=f"{name} prompt", linewidth=1.4)
    for before, after in itertools.pairwise(history):
        if before["step"] != after["step"]:
            axis.axvline((before["generation"] + after["generation"]) / 2, color="#cccccc", linewidth=0.8, zorder=0)
    axis.set_title(record["task"], fontsize=8)
    axis.set_xlabel("generation (grey: another model)", fontsize=7)
    axis.set_ylabel("fitness (nats)", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _verdict(record: Mapping[str, Any]) -> str:
    if record["kept"]:
        return "**Kept**: the evolved prompt is better than the best manual prompt on the confirm part."
    return "**Fell back** to the manual prompt: no evolved prompt is significantly better on the confirm part."


def _quoted(prompt: Mapping[str, Any]) -> list[str]:
    return ["```text", prompt["text"].replace("```", "'''"), "```"]


def _code(text: str) -> str:
    return "`" + json.dumps(text, ensure_ascii=False).replace("`", "'") + "`"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _pair(found: Mapping[str, Any] | None, form: str = ".3f") -> list[str]:
    values = [(found or {}).get(name) for name in ("fitness", "outcome")]
    return ["" if value is None else format(value, form) for value in values]


def _signed(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def _p(value: float | None, digits: int) -> str:
    least = 10.0**-digits
    return "" if value is None else f"<{least:.{digits}f}" if value < least else f"{value:.{digits}f}"
