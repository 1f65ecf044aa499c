# SPDX-License-Identifier: Apache-2.0
import csv
import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from lightning_zeroprompt.data.evaluation_plan import EvaluationSettings, plan_evaluation
from lightning_zeroprompt.metrics.summary import summarise
from lightning_zeroprompt.metrics.task_scores import CellScores
from lightning_zeroprompt.models.scoring import SCORES
from lightning_zeroprompt.report import draw_results, results_table, write_results

CHOICE = ("accuracy_sum", "accuracy_mean", "accuracy_pmi", "margin", "nll")
FREE = ("exact_match", "rouge_l", "nll")


@pytest.fixture(scope="module")
def plan(evaluation_corpus):
    return plan_evaluation(evaluation_corpus, (0, 1, 2, 3), EvaluationSettings(examples_per_task=6))


def _table(plan, skill, seed=0):
    """Random 0/1 scores whose mean rises with skill from chance."""
    generator = np.random.default_rng(seed)
    shape = (len(plan.cells), len(SCORES))
    counts, sums, squares = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    for cell in plan.cells:
        sample = plan.samples[cell.sample]
        rate = sample.chance + (1 - sample.chance) * skill
        for name in CHOICE if sample.task.kind == "choice" else FREE:
            values = (generator.random(len(sample.rows)) < rate).astype(float)
            place = cell.index, SCORES.index(name)
            counts[place], sums[place], squares[place] = len(values), values.sum(), (values**2).sum()
    return CellScores(names=SCORES, counts=counts, sums=sums, squares=squares)


@pytest.fixture(scope="module")
def trained(plan):
    return summarise(plan, _table(plan, 0.7), resamples=300)


@pytest.fixture(scope="module")
def untrained(plan):
    return summarise(plan, _table(plan, 0.0, seed=1), resamples=300)


def test_task_scores_are_medians_over_templates(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, (0, 1, 2, 3), EvaluationSettings(levels=("task", "category")))
    table = _table(plan, 0.5)
    # Give the two templates of every task one wording, so that a task has a median of two.
    plan = dataclasses.replace(plan, cells=tuple(dataclasses.replace(cell, wording="train") for cell in plan.cells))
    for task in summarise(plan, table, choice_score="accuracy_mean", resamples=2).tasks:
        cells = [cell for cell in plan.cells if plan.samples[cell.sample].task.task_id == task.task_id]
        name = "accuracy_mean" if task.kind == "choice" else task.metric
        values = [table.sums[c.index, SCORES.index(name)] / table.counts[c.index, SCORES.index(name)] for c in cells]
        assert len(values) == 2
        assert task.templates == pytest.approx(dict(zip(("t0", "t1"), values, strict=True)))
        assert (task.median, task.mean) == pytest.approx((np.median(values), np.mean(values)))
        assert (task.minimum, task.maximum, task.std) == pytest.approx((min(values), max(values), np.std(values)))
        chance = plan.samples[cells[0].sample].chance
        assert task.normalised == pytest.approx((task.median - chance) / (1 - chance))
        assert set(task.others) == set(CHOICE if task.kind == "choice" else FREE)


def test_macro_scores_are_means_over_tasks(trained):
    for macro in trained.macro:
        group = [
            task
            for task in trained.tasks
            if (task.level == macro.level or (macro.level == "heldout" and task.level != "instance"))
            and task.wording == macro.wording
            and macro.category in (None, task.category)
            and macro.kind in (None, task.kind)
        ]
        assert macro.tasks == len(group) > 0
        assert macro.examples == sum(task.examples for task in group)
        assert macro.score == pytest.approx(np.mean([task.median for task in group]))
        assert macro.normalised == pytest.approx(np.mean([task.normalised for task in group]))
        assert macro.chance == pytest.approx(np.mean([task.chance for task in group]))
        assert (macro.first_option is None) == any(task.kind == "generation" for task in group)
        assert macro.low <= macro.high
        assert macro.normalised_low <= macro.normalised_high
    keys = [(m.level, m.wording, m.category, m.kind) for m in trained.macro]
    assert len(set(keys)) == len(keys)
    assert trained.find("heldout").tasks == 6
    assert trained.find("category", wording="heldout", category="c", kind="choice").tasks == 2
    assert trained.find("task", category="d") is None
    scalars = trained.scalars()
    assert scalars["heldout/train"] == trained.find("heldout").normalised
    assert scalars["instance/heldout/choice/plain"] == trained.find("instance", wording="heldout", kind="choice").score
    assert {name for name in scalars if name.startswith("categories/")} == {f"categories/{name}" for name in "abcd"}


def _interval(plan, table, **more):
    macro = summarise(plan, table, **more).find("heldout")
    return macro.score, macro.low, macro.high


def test_intervals_cover_the_truth_about_as_often_as_they_say(plan):
    # 60 evaluations of the same skill (not the same draws): the careful interval covers at least nearly 90 %.
    truth = np.mean([s.chance + (1 - s.chance) * 0.6 for s in plan.samples if s.level != "instance"])
    hits = 0
    for seed in range(60):
        _, low, high = _interval(plan, _table(plan, 0.6, seed=seed), resamples=200, confidence=0.9)
        hits += low <= truth <= high
    assert hits >= 51


def test_intervals_are_seeded_and_shrink_with_examples(evaluation_corpus, plan):
    table = _table(plan, 0.6)
    assert _interval(plan, table, resamples=100) == _interval(plan, table, resamples=100)
    assert _interval(plan, table, resamples=100) != _interval(plan, table, resamples=100, seed=1)
    # One task: only the examples are redrawn; four times the examples halve the width.
    macro = summarise(plan, table, resamples=4000).find("category", category="d")
    more = CellScores(names=SCORES, counts=table.counts * 4, sums=table.sums * 4, squares=table.squares * 4)
    wide = dataclasses.replace(plan, item_cell=np.repeat(plan.item_cell, 4))
    narrow = summarise(wide, more, resamples=4000).find("category", category="d")
    assert narrow.score == macro.score
    assert narrow.high - narrow.low < macro.high - macro.low


def test_example_redraws_have_the_error_of_the_mean(plan):
    # A single task of accuracy 1/2 in 6 examples: standard error sqrt(.3 / 6), 68 % interval of about two of them.
    one = next(s for s in plan.samples if s.task.task_id == "seen closed")
    cells = tuple(c for c in plan.cells if c.sample == one.index and c.wording == "train")
    small = dataclasses.replace(
        plan, cells=(dataclasses.replace(cells[0], index=0),), item_cell=np.zeros(6, dtype=np.int64)
    )
    values = np.zeros((1, len(SCORES)))
    values[0, 0] = 3
    table = CellScores(names=SCORES, counts=np.full((1, len(SCORES)), 6), sums=values, squares=values)
    macro = summarise(small, table, resamples=20000, confidence=0.6827).find("task")
    assert macro.high - macro.low == pytest.approx(2 * np.sqrt(0.3 / 6), rel=0.05)


def test_task_redraws_have_the_error_of_the_mean_over_tasks(plan):
    # Every task all right or all wrong, so examples add nothing: six tasks, half of them right, have sqrt(.25 / 6).
    counts = np.repeat([[len(plan.samples[cell.sample].rows)] for cell in plan.cells], len(SCORES), axis=1)
    held = [sample.index for sample in plan.samples if sample.level != "instance"]
    right = np.array([cell.sample in held[::2] for cell in plan.cells])
    sums = np.where(right[:, None], counts, 0).astype(float)
    table = CellScores(names=SCORES, counts=counts, sums=sums, squares=sums)
    macro = summarise(plan, table, resamples=20000).find("heldout")
    assert macro.score == 0.5
    drawn = np.random.default_rng(0).binomial(6, 0.5, size=200000) / 6
    assert (macro.low, macro.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-9)


def test_unfinished_tables_are_refused(plan):
    table = _table(plan, 0.5)
    short = dataclasses.replace(table, counts=table.counts // 2)
    with pytest.raises(ValueError, match=f"the plan has {len(plan.item_row)} in {len(plan.cells)}"):
        summarise(plan, short)
    with pytest.raises(ValueError, match="confidence=95"):
        summarise(plan, table, confidence=95)


def test_files_hold_the_scores(plan, trained, untrained, tmp_path):
    run = {"model": "nano", "seeds": {"data": 0}, "loss": float("nan")}
    paths = write_results(tmp_path / "run", plan, trained, untrained=untrained, shuffled=untrained, run=run)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(paths)

    data = json.loads(paths["results.json"].read_text(), parse_constant=pytest.fail)
    assert (data["num_tasks"], data["model"], data["loss"]) == (4, "nano", None)
    assert data["heldout_score"] == trained.find("heldout").score
    assert data["sample_sizes"] == plan.sample_sizes()
    assert data["evaluation"]["examples_per_task"] == 6
    assert len(data["macro"]) == len(trained.macro)
    whole = next(m for m in data["macro"] if m["level"] == "heldout" and not m["category"] and not m["kind"])
    assert whole["untrained"]["score"] == untrained.find("heldout").score < whole["score"]

    with paths["results.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task_id"] for row in rows] == [task.task_id for task in trained.tasks]
    for row, task, before in zip(rows, trained.tasks, untrained.tasks, strict=True):
        assert float(row["median"]) == task.median
        assert float(row["untrained"]) == before.median
        assert row["first_option"] == ("" if task.first_option is None else str(task.first_option))
        assert row["rouge_l"] == ("" if task.kind == "choice" else str(task.others["rouge_l"]))
    entries = json.loads(paths["results_tasks.json"].read_text())
    assert entries[0]["templates"] == dict(trained.tasks[0].templates)
    assert paths["results.png"].read_bytes().startswith(b"\x89PNG")


def test_a_failing_write_leaves_the_old_file(plan, trained, tmp_path, monkeypatch):
    write_results(tmp_path, plan, trained)
    old = (tmp_path / "results.csv").read_bytes()
    with pytest.raises(ValueError, match=r"entries \['macro'\]"):
        write_results(tmp_path, plan, trained, run={"macro": 1})
    assert (tmp_path / "results.csv").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 4


def _printed(table, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_table_names_levels_categories_and_baselines(trained, untrained):
    text = _printed(results_table(trained, untrained=untrained, shuffled=untrained))
    lines = text.splitlines()
    assert "\u2026" not in text  # nothing is cut at 100 columns
    assert sum(line.startswith(" unseen category") for line in lines) == 4  # two kinds of answers, two wordings
    assert sum(line.startswith("   c ") for line in lines) == 1
    closed = next(line for line in lines if line.startswith(" unseen task ") and "choice" in line)
    macro, before = trained.find("task", kind="choice"), untrained.find("task", kind="choice")
    for value in (f"{macro.score:.3f}", f"{macro.chance:.2f}", f"{macro.first_option:.2f}", f"{before.score:.2f}"):
        assert value in closed
    assert "shuf." not in _printed(results_table(trained))


def test_star_means_above_every_baseline(plan):
    high = summarise(plan, _table(plan, 1.0), resamples=50)
    low = summarise(plan, _table(plan, 0.0), resamples=50)
    assert "1.000*" in _printed(results_table(high, untrained=low))
    assert "*" not in _printed(results_table(low)).split("score:")[0]
    assert "*" not in _printed(results_table(high, untrained=high)).split("score:")[0]


def test_picture_has_a_line_a_category_and_every_mark(plan, trained, untrained):
    figure = draw_results(trained, untrained=untrained)
    labels = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes]
    assert [sorted(names) for names in labels] == [["c (2)", "d (2)"], ["a (1)", "b (1)"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "trained model", "the same in new wordings", "chance", "untrained model",
    ]  # fmt: skip
    chances = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_color() == "#c03028"]
    assert sorted(chances) == pytest.approx(
        sorted(trained.find("category", category=name).chance for name in ("c", "d"))
    )
    only = summarise(plan, _table(plan, 0.5), resamples=2)
    only = dataclasses.replace(only, macro=tuple(macro for macro in only.macro if macro.level == "instance"))
    assert len(draw_results(only).axes) == 1
