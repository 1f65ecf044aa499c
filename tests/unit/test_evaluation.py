# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses

import numpy as np
import pytest
import torch

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.evaluation import (
    EvaluationDataset,
    EvaluationSettings,
    batch_bounds,
    plan_evaluation,
    split_tasks,
)
from lightning_zeroprompt.data.instruction_shuffle import shuffled_templates
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

TRAIN = (0, 1, 2, 3)


def _text(corpus, segment):
    return corpus.tokenizer.decode(corpus.segment(segment).tolist())


def _row(corpus, task, row):
    """Input, outputs and options of a row as texts, read by hand from the documented layout."""
    first = int(corpus.row_first_segment[row])
    outputs = [_text(corpus, first + len(task.fields) + k) for k in range(int(corpus.row_num_outputs[row]))]
    option = int(corpus.row_option_segment[row])
    options = [_text(corpus, option + k) for k in range(int(corpus.row_num_options[row]))] if option >= 0 else None
    return _text(corpus, first), outputs, options


def _items(dataset):
    """Every batch taken apart into one record an item."""
    for step in range(len(dataset)):
        batch = dataset[step]
        decode = dataset.corpus.tokenizer.decode
        for index in range(len(batch["cell"])):
            real = batch["input_segments"][index] == 1
            record = {"cell": batch["cell"][index].item(), "row": batch["row"][index].item(), "kind": batch["kind"]}
            record["ids"] = batch["input_ids"][index][real].tolist()
            assert (batch["input_ids"][index][~real] == 0).all()
            record["text"] = decode(record["ids"])
            if batch["kind"] == "choice":
                mine = batch["option_example"] == index
                labels = batch["option_labels"][mine]
                record["options"] = [decode(row[row >= 0].tolist()) for row in labels]
                assert all(row[row >= 0][-1] == 1 for row in labels)
                record["correct"] = batch["option_correct"][mine].tolist()
            else:
                labels = batch["target_labels"][index]
                assert labels[labels >= 0][-1] == 1
                record["target"] = decode(labels[labels >= 0].tolist())
                record["references"] = batch["references"][index]
                record["max_new_tokens"] = batch["max_new_tokens"]
            yield record


def test_levels_and_wordings(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    level = {(sample.task.task_id, sample.level) for sample in plan.samples}
    assert level == {
        ("seen closed", "task"),
        ("seen free", "task"),
        *((f"new {name}", "category") for name in ("closed", "open", "free", "free 2")),
        *((f"train {name}", "instance") for name in ("closed", "open", "free", "free 2")),
    }
    assert collections.Counter(cell.wording for cell in plan.cells) == {"train": 10, "heldout": 10}
    # Without the training tasks of category b, its held-out task is one of an unseen category.
    less = plan_evaluation(evaluation_corpus, (0, 1))
    assert {s.task.task_id: s.level for s in less.samples}["seen free"] == "category"
    only = plan_evaluation(evaluation_corpus, TRAIN, EvaluationSettings(levels=("task",), heldout_wordings=False))
    assert {cell.wording for cell in only.cells} == {"train"}
    assert {sample.level for sample in only.samples} == {"task"}


def test_instance_rows_are_never_drawn_in_training(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN, EvaluationSettings(examples_per_task=None))
    for sample in plan.samples:
        task = sample.task
        rows = range(task.first_row, task.first_row + task.num_rows)
        if sample.level == "instance":
            # Which of them are left out, because a sibling trains on them, has a test of its own.
            assert 0 < len(sample.rows) <= task.num_heldout_rows
            assert set(sample.rows.tolist()) <= set(list(rows)[task.num_train_rows :])
        else:
            assert sample.rows.tolist() == list(rows)
        assert sample.available == len(sample.rows)


def test_samples_are_seeded_nested_and_independent_of_other_tasks(evaluation_corpus):
    def rows(training=TRAIN, **settings):
        plan = plan_evaluation(evaluation_corpus, training, EvaluationSettings(**settings))
        return {(s.task.task_id, s.level == "instance"): s.rows.tolist() for s in plan.samples}

    small, large = rows(examples_per_task=4), rows(examples_per_task=9)
    assert all(set(small[key]) <= set(large[key]) for key in small)
    assert {key: len(value) for key, value in large.items()}[("new open", False)] == 9
    assert len(large[("seen free", False)]) == 5
    assert rows(examples_per_task=4) == small
    assert rows(examples_per_task=4, seed=1) != small
    assert rows((0,), examples_per_task=4)[("new open", False)] == small[("new open", False)]


def test_templates_of_a_task_share_rows_and_items_follow_cells(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    for cell in plan.cells:
        np.testing.assert_array_equal(plan.item_row[plan.item_cell == cell.index], plan.samples[cell.sample].rows)
    for seed in range(8):
        settings = EvaluationSettings(templates_per_task=1, instance_tasks=2, seed=seed)
        one = plan_evaluation(evaluation_corpus, TRAIN, settings)
        instance = [sample for sample in one.samples if sample.level == "instance"]
        assert {sample.task.category for sample in instance} == {"a", "b"}  # in turn from every category
    sizes = one.sample_sizes()
    assert sizes["instance_tasks"] == 2
    assert sizes["items"] == len(one.item_row)
    assert sizes["task_examples"] == 13


def test_baselines_equal_a_count_by_hand(evaluation_corpus):
    corpus = evaluation_corpus
    for sample in plan_evaluation(corpus, TRAIN).samples:
        rows = [_row(corpus, sample.task, row) for row in sample.rows.tolist()]
        if sample.task.kind == "generation":
            assert (sample.chance, sample.first_option) == (0.0, None)
            first = collections.Counter(outputs[0] for _, outputs, _ in rows).most_common(1)[0][0]
            if sample.task.metric == "exact_match":
                assert sample.majority == pytest.approx(np.mean([first in outputs for _, outputs, _ in rows]))
            continue
        right = [[option in outputs for option in options] for _, outputs, options in rows]
        assert sample.chance == pytest.approx(np.mean([np.mean(flags) for flags in right]))
        assert sample.first_option == pytest.approx(np.mean([flags[0] for flags in right]))
        common = collections.Counter(outputs[0] for _, outputs, _ in rows).most_common(1)[0][1]
        assert sample.majority >= common / len(rows) - 1e-9


def test_batches_hold_every_item_once_as_rendered(evaluation_corpus):
    corpus = evaluation_corpus
    plan = plan_evaluation(corpus, TRAIN)
    dataset = EvaluationDataset(corpus, plan, max_tokens=1500)
    assert len(dataset) > 4
    seen = collections.Counter()
    for item in _items(dataset):
        cell = plan.cells[item["cell"]]
        task = plan.samples[cell.sample].task
        template = corpus.templates[cell.template]
        text, outputs, options = _row(corpus, task, item["row"])
        shown = list(template.verbalizer or options or ())
        expected = template.text.format(input=text, options=template.option_separator.join(shown))
        assert item["text"] == expected
        assert item["ids"][-1] == 1
        if item["kind"] == "choice":
            assert item["options"] == shown
            assert item["correct"] == [option in outputs for option in options]
        else:
            assert item["references"] == outputs
            assert item["target"] == outputs[0]
            assert item["max_new_tokens"] > len(max(outputs, key=len))
        seen[item["cell"], item["row"]] += 1
    assert seen == collections.Counter(zip(plan.item_cell.tolist(), plan.item_row.tolist(), strict=True))
    assert dataset.num_truncated == 0


def test_verbalised_options_are_scored_against_the_original_answer(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN, EvaluationSettings(heldout_wordings=False, levels=("task",)))
    items = [item for item in _items(EvaluationDataset(evaluation_corpus, plan)) if item["kind"] == "choice"]
    assert all(item["options"] == ["agreed", "denied", "open"] and sum(item["correct"]) == 1 for item in items)
    assert len({tuple(item["correct"]) for item in items}) > 1


def test_batches_keep_the_budget_and_are_sorted_by_targets_then_inputs(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    dataset = EvaluationDataset(evaluation_corpus, plan, max_tokens=700)
    keys = collections.defaultdict(list)
    for step in range(len(dataset)):
        batch = dataset[step]
        targets = batch["option_labels"] if batch["kind"] == "choice" else batch["target_labels"]
        assert len(batch["cell"]) == 1 or max(batch["input_ids"].numel(), targets.numel()) <= 700
    for item in _items(EvaluationDataset(evaluation_corpus, plan, max_tokens=700)):
        texts = item["options"] if item["kind"] == "choice" else item["references"]
        longest = max(len(text.encode()) for text in texts) + 1  # bytes and the end mark
        keys[item["kind"]].append((int(np.ceil(np.log2(longest))), len(item["ids"])))
    assert all(values == sorted(values, reverse=True) for values in keys.values())
    assert len({target for target, _ in keys["generation"]}) > 1


def test_bounds_keep_both_budgets_and_fill_them():
    generator = np.random.default_rng(0)
    sizes = [tuple(row) for row in generator.integers(1, 20, size=(300, 3)).tolist()]
    bounds = list(batch_bounds(sizes, 400))
    assert [index for start, end in bounds for index in range(start, end)] == list(range(300))

    def cost(start, end):
        inputs, number, longest = zip(*sizes[start:end], strict=True)
        return max((end - start) * max(inputs), sum(number) * max(longest))

    assert all(cost(start, end) <= 400 for start, end in bounds)
    assert all(cost(start, end + 1) > 400 for start, end in bounds[:-1])
    assert list(batch_bounds([(500, 1, 1), (1, 1, 500)], 400)) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_items_without_overlap_and_in_step(evaluation_corpus, num_ranks):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    whole = EvaluationDataset(evaluation_corpus, plan, max_tokens=900)
    ranks = [whole.for_rank(rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(rank) for rank in ranks}) == 1
    real = [item for rank in ranks for item in _items(rank) if item["cell"] >= 0]
    assert sorted((i["cell"], i["row"]) for i in real) == sorted((i["cell"], i["row"]) for i in _items(whole))
    for step in range(len(ranks[0])):
        batches = [rank[step] for rank in ranks]
        assert len({batch["kind"] for batch in batches}) == 1
        assert len({batch.get("max_new_tokens") for batch in batches}) == 1
    with pytest.raises(IndexError):
        whole[len(whole)]
    with pytest.raises(ValueError, match="rank 2 of 2"):
        whole.for_rank(2, 2)


def test_long_inputs_and_targets_are_cut(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    dataset = EvaluationDataset(
        evaluation_corpus, plan, encoder_length=24, decoder_length=4, max_new_tokens=3, max_tokens=10**6
    )
    assert dataset.num_truncated == len(plan.item_row)
    for step in range(len(dataset)):
        batch = dataset[step]
        assert batch["input_ids"].shape[1] <= 24
        labels = batch["option_labels"] if batch["kind"] == "choice" else batch["target_labels"]
        assert labels.shape[1] == 4
        assert batch.get("max_new_tokens", 3) == 3
    with pytest.raises(ValueError, match="less soft_prompt_length=9 is 1"):
        EvaluationDataset(evaluation_corpus, plan, encoder_length=10, soft_prompt_length=9)


def test_soft_prompts_stand_in_front(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, TRAIN)
    vocabulary = evaluation_corpus.tokenizer.vocab_size
    plain = {(i["cell"], i["row"]): i["ids"] for i in _items(EvaluationDataset(evaluation_corpus, plan))}
    dataset = EvaluationDataset(evaluation_corpus, plan, soft_prompt_length=3, prompt_ids={0: 1, 6: 9})
    numbers = set()
    for step in range(len(dataset)):
        batch = dataset[step]
        for index, cell in enumerate(batch["cell"].tolist()):
            real = batch["input_segments"][index] == 1
            expected = [vocabulary, vocabulary + 1, vocabulary + 2, *plain[cell, batch["row"][index].item()]]
            assert batch["input_ids"][index][real].tolist() == expected
            task = plan.samples[plan.cells[cell].sample].task.index
            number = {0: 1, 6: 9}.get(task, 0)
            torch.testing.assert_close(batch["task_ids"][index], number * batch["input_segments"][index])
            numbers.add(number)
    assert numbers == {0, 1, 9}


def test_shuffled_instructions_come_from_other_tasks_of_the_same_shape(evaluation_corpus):
    corpus = evaluation_corpus
    plain = plan_evaluation(corpus, TRAIN)
    plan = plan_evaluation(corpus, TRAIN, EvaluationSettings(shuffle_instructions=True))
    for cell in plan.cells:
        own, shown = corpus.templates[cell.template], corpus.templates[cell.shown_template]
        assert corpus.tasks[own.task].kind == corpus.tasks[shown.task].kind
        assert own.task != shown.task
        assert own.role == shown.role
        assert ("{options}" in own.text) == ("{options}" in shown.text)
    pairs = {cell.template: cell.shown_template for cell in plan.cells}
    category = {template: corpus.tasks[corpus.templates[template].task].category for template in pairs}
    # Three groups of five templates have three of one category, of which one cannot leave it.
    assert sum(category[own] == category[shown] for own, shown in pairs.items()) == 3
    assert sorted(pairs) == sorted(pairs.values())  # the same wordings are read
    # The verbalised template (its words mean nothing under another instruction) is left out.
    assert plan.unshuffled_cells == 1
    assert len(plan.cells) == len(plain.cells) - 1
    for item in _items(EvaluationDataset(corpus, plan)):
        cell = plan.cells[item["cell"]]
        text, outputs, options = _row(corpus, plan.samples[cell.sample].task, item["row"])
        shown = corpus.templates[cell.shown_template]
        assert item["text"] == shown.text.format(input=text, options=", ".join(options or ()))
        if options:
            assert item["options"] == options
        else:
            assert item["references"] == outputs


def test_shuffle_falls_back_to_tasks_and_leaves_lone_templates(evaluation_corpus):
    corpus = evaluation_corpus
    first = [corpus.tasks[index].first_template + 1 for index in (8, 9)]  # two tasks of one category
    assert shuffled_templates(corpus, first, seed=0) == first[::-1]
    assert shuffled_templates(corpus, first[:1], seed=0) == [None]
    with pytest.raises(ValueError, match=r"1 of them\s+without a partner"):
        plan_evaluation(
            corpus, (0,), EvaluationSettings(levels=("instance",), heldout_wordings=False, shuffle_instructions=True)
        )


def test_split_holds_categories_out_and_names_what_is_wrong(evaluation_corpus):
    tasks = evaluation_corpus.tasks
    assert split_tasks(tasks) == (list(TRAIN), [4, 5, 6, 7, 8, 9])
    train, held = split_tasks(tasks, ["b"])
    assert (train, held[:3]) == ([0, 1], [2, 3, 4])
    plan = plan_evaluation(evaluation_corpus, train, heldout_tasks=held)
    levels = {sample.task.task_id: sample.level for sample in plan.samples}
    assert levels["train free"] == "category"
    with pytest.raises(ValueError, match=r"'cc' is unknown.*did you mean 'c'"):
        split_tasks(tasks, ["cc"])
    shared = [dataclasses.replace(task, family="web") if task.index in (1, 2) else task for task in tasks]
    with pytest.raises(ValueError, match=r"family 'web' has the training task 'train open'.*'train free'"):
        split_tasks(shared, ["b"])
    assert split_tasks(shared, ["b"], drop_shared_families=True)[0] == [0]
    with pytest.raises(ValueError, match="trained on and held out, such as 'train open'"):
        plan_evaluation(evaluation_corpus, TRAIN, heldout_tasks=[1, 5])


def test_settings_refuse_nothing_to_evaluate():
    with pytest.raises(ValueError, match="examples_per_task=0"):
        EvaluationSettings(examples_per_task=0)
    with pytest.raises(ValueError, match="one or more of category, task, instance"):
        EvaluationSettings(levels=())


def test_tasks_trained_on_elsewhere_decide_the_levels_and_lend_no_family(evaluation_corpus):
    held = [task.index for task in evaluation_corpus.tasks if task.role == "heldout"]
    trained = [task for task in evaluation_corpus.tasks if task.role == "train"]
    here = plan_evaluation(evaluation_corpus, [t.index for t in trained], EvaluationSettings(), heldout_tasks=held)
    there = plan_evaluation(evaluation_corpus, [], EvaluationSettings(), heldout_tasks=held, trained_elsewhere=trained)
    levels = {(sample.task.index, sample.level) for sample in here.samples if sample.level != "instance"}
    assert {(sample.task.index, sample.level) for sample in there.samples} == levels
    assert there.num_training_tasks == len(trained)
    clash = dataclasses.replace(trained[0], family=evaluation_corpus.tasks[held[0]].family)
    with pytest.raises(ValueError, match="families are on both sides"):
        plan_evaluation(evaluation_corpus, [], EvaluationSettings(), heldout_tasks=held, trained_elsewhere=[clash])


def test_instances_that_a_sibling_task_trains_on_are_left_out(tmp_path):
    def task(name, inputs):
        examples = [Example(input=text, outputs=(text.upper(),)) for text in inputs]
        return Task(
            task_id=name,
            category="c",
            family=name,
            templates=(PromptTemplate(name="a", text="{input}"),),
            examples=lambda: iter(examples),
        )

    words = [f"word {i:03}" for i in range(60)]
    tasks = [task("a", words), task("b", words), task("c", [f"other {i:03}" for i in range(60)])]
    corpus = compile_tasks(tasks, tmp_path / "c", tokenizer=ByteTokenizer(), heldout_fraction=0.2, progress=False)
    settings = EvaluationSettings(examples_per_task=None, levels=("instance",))

    def rows(first, last):
        return {
            corpus.tokenizer.decode(corpus.segment(corpus.row_first_segment[row]).tolist())
            for row in range(first, last)
        }

    sampled = {sample.task.task_id: sample for sample in plan_evaluation(corpus, [0, 1, 2], settings).samples}
    trained = set()
    for info in corpus.tasks:
        trained |= rows(info.first_row, info.first_row + info.num_train_rows)
    for info in corpus.tasks:
        kept_out = rows(info.first_row + info.num_train_rows, info.first_row + info.num_rows)
        found = {
            text
            for row in (sampled[info.task_id].rows if info.task_id in sampled else [])
            for text in rows(row, row + 1)
        }
        assert found == kept_out - trained
    assert len(sampled["c"].rows) == corpus.tasks[2].num_heldout_rows
    alone = plan_evaluation(corpus, [0, 2], settings).samples
    assert [len(sample.rows) for sample in alone] == [corpus.tasks[index].num_heldout_rows for index in (0, 2)]


@pytest.mark.parametrize(
    ("trained", "kept_out", "is_same"),
    [
        ({"outputs": ("a", "b")}, {"outputs": ("b", "c")}, True),
        ({"outputs": ("a", "b")}, {"outputs": ("c", "d")}, False),
        ({"fields": {"premise": "p"}}, {"fields": {"premise": "p"}}, True),
        ({"fields": {"premise": "p"}}, {"fields": {"premise": "q"}}, False),
        ({"fields": {"premise": "p", "hypothesis": "h"}}, {"fields": {"first": "h", "second": "p"}}, True),
        ({"fields": {"premise": "p"}}, {}, False),
        ({"fields": {"text": "{input}"}}, {}, True),
    ],
)
def test_an_instance_is_compared_as_a_whole(tmp_path, trained, kept_out, is_same):
    def task(name, more):
        def examples():
            for i in range(60):
                fields = {key: value.format(input=f"input {i}") for key, value in more.get("fields", {}).items()}
                yield Example(input=f"input {i}", outputs=more.get("outputs", ("a",)), fields=fields)

        templates = (PromptTemplate(name="a", text="{input}"),)
        return Task(task_id=name, category="c", family=name, templates=templates, examples=examples)

    tasks = [task("one", trained), task("other", kept_out)]
    corpus = compile_tasks(tasks, tmp_path / "c", tokenizer=ByteTokenizer(), heldout_fraction=0.2, progress=False)

    def inputs(rows):
        return {corpus.tokenizer.decode(corpus.segment(corpus.row_first_segment[row]).tolist()) for row in rows}

    one, other = corpus.tasks
    of_one = inputs(range(one.first_row, one.first_row + one.num_train_rows))
    of_other = inputs(range(other.first_row + other.num_train_rows, other.first_row + other.num_rows))
    settings = EvaluationSettings(examples_per_task=None, levels=("instance",))
    samples = {sample.task.task_id: sample.rows for sample in plan_evaluation(corpus, [0, 1], settings).samples}
    assert of_one & of_other
    assert inputs(samples["other"]) == (of_other - of_one if is_same else of_other)
