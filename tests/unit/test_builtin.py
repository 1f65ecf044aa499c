# SPDX-License-Identifier: Apache-2.0
"""The built-in source: enough tasks, all different, answers right by an independent reading of the text, no leaks."""

import collections
import itertools
import os
import random
import subprocess
import sys

import pytest

from lightning_zeroprompt.data.sources.builtin import (
    HELDOUT_CATEGORIES,
    NUM_OPTIONS,
    Spec,
    builtin_tasks,
    curriculum_stage,
    list_specs,
)
from lightning_zeroprompt.data.sources.builtin_operations import OPERATIONS
from lightning_zeroprompt.data.sources.builtin_phrases import HELDOUT_PHRASES, PHRASES
from lightning_zeroprompt.data.sources.builtin_scenes import SAMPLERS, kinds_together, partner
from lightning_zeroprompt.data.sources.builtin_wording import FRAMES, HELDOUT_FRAMES
from lightning_zeroprompt.data.sources.builtin_words import DAYS, DOMAINS, LABEL_PAIRS, MONTHS, NAMES, NUMBERS
from lightning_zeroprompt.data.task import TaskError

TASKS = builtin_tasks(examples_per_task=20)
SPECS = {spec.task_id: spec for spec in list_specs()}
TRAIN = [task for task in TASKS if task.role == "train"]
HELDOUT = [task for task in TASKS if task.role == "heldout"]
KIND = {word: kind for kind, words in DOMAINS.items() for word in words}


def number(word):
    return NUMBERS.index(word) + 1


def spell(value):
    return NUMBERS[value - 1]


def reference(operation, domain, text):
    """What the operation's name says, computed from the text alone; written apart from the package's answers."""
    left, _, right = text.partition(" ; ")
    words, asked = left.split(), right.split()
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    dates = DAYS if domain == "day" else MONTHS
    labels = (
        next((p for p in LABEL_PAIRS if list(DOMAINS).index(domain) // 2 % 3 == LABEL_PAIRS.index(p)), None)
        if domain in DOMAINS
        else None
    )
    table = {
        "first": lambda: words[0],
        "second": lambda: words[1],
        "third": lambda: words[2],
        "fourth": lambda: words[3],
        "last": lambda: words[-1],
        "copy": lambda: left,
        "count_words": lambda: spell(len(words)),
        "first_two": lambda: f"{words[0]} {words[1]}",
        "last_two": lambda: f"{words[-2]} {words[-1]}",
        "first_three": lambda: " ".join(words[i] for i in (0, 1, 2)),
        "last_three": lambda: " ".join(words[len(words) - i] for i in (3, 2, 1)),
        "ends": lambda: f"{words[0]} {words[-1]}",
        "after": lambda: words[words.index(asked[0]) + 1],
        "before": lambda: words[words.index(asked[0]) - 1],
        "repeated": lambda: next(w for w in words if words.count(w) > 1),
        "single": lambda: next(w for w in words if words.count(w) == 1),
        "pick": lambda: next(w for w in words if KIND[w] == domain),
        "first_of_kind": lambda: next(w for w in words if KIND[w] == domain),
        "last_of_kind": lambda: next(w for w in reversed(words) if KIND[w] == domain),
        "all_of_kind": lambda: " ".join(w for w in words if KIND[w] == domain),
        "most_kind": lambda: max((KIND[w] for w in words), key=[KIND[w] for w in words].count),
        "least_kind": lambda: min((KIND[w] for w in words), key=[KIND[w] for w in words].count),
        "place_of_kind": lambda: spell(1 + [KIND[w] for w in words].index(domain)),
        "owner_of_kind": lambda: next(k for k, v in pairs.items() if KIND[v] == domain),
        "amount_of_kind": lambda: next(k for k, v in pairs.items() if KIND[v] == domain),
        "shared": lambda: (set(words) & set(asked)).pop(),
        "new": lambda: (set(asked) - set(words)).pop(),
        "value_of": lambda: pairs[asked[0]],
        "key_of": lambda: next(k for k, v in pairs.items() if v == asked[0]),
        "amount_of": lambda: next(k for k, v in pairs.items() if v == asked[0]),
        "count_given": lambda: spell(words.count(asked[0])),
        "count_kind": lambda: spell(sum(KIND[w] == domain for w in words)),
        "reverse": lambda: " ".join(reversed(words)),
        "swap_ends": lambda: " ".join([words[-1], *words[1:-1], words[0]]),
        "first_to_end": lambda: " ".join([*words[1:], words[0]]),
        "last_to_start": lambda: " ".join([words[-1], *words[:-1]]),
        "kind_first": lambda: KIND[words[0]],
        "kind_last": lambda: KIND[words[-1]],
        "odd": lambda: next(w for w in words if [KIND[v] for v in words].count(KIND[w]) == 1),
        "most": lambda: pairs[max(pairs, key=number)],
        "least": lambda: pairs[min(pairs, key=number)],
        "smallest": lambda: min(words, key=number),
        "largest": lambda: max(words, key=number),
        "sort_up": lambda: " ".join(spell(n) for n in sorted(map(number, words))),
        "sort_down": lambda: " ".join(spell(-n) for n in sorted(-number(w) for w in words)),
        "plus": lambda: spell(number(words[0]) + number(words[3])),
        "minus": lambda: spell(number(words[0]) - number(words[3])),
        "next_date": lambda: (dates * 2)[dates.index(words[0]) + 1],
        "previous_date": lambda: dates[dates.index(words[-1]) - 1],
        "earliest": lambda: next(d for d in dates if d in words),
        "latest": lambda: next(d for d in reversed(dates) if d in words),
        "rule_first": lambda: labels[0] if KIND[words[0]] == domain else labels[1],
        "rule_last": lambda: labels[0] if KIND[words[-1]] == domain else labels[1],
        "after_kind": lambda: words[[KIND[w] for w in words].index(domain) + 1],
        "before_kind": lambda: words[[KIND[w] for w in words].index(domain) - 1],
        "if_last": lambda: words[-1] if KIND[words[0]] == domain else words[0],
        "if_second": lambda: words[1] if KIND[words[0]] == domain else words[-1],
        "other": lambda: next(w for w in words if w != asked[0]),
        "replace_first": lambda: " ".join([asked[0], *words[1:]]),
        "replace_last": lambda: " ".join([*words[:-1], asked[0]]),
    }
    return table[operation]()


def test_at_least_1000_training_tasks_in_at_least_12_categories():
    ids = [task.task_id for task in TASKS]
    assert len(set(ids)) == len(ids) == len(SPECS)
    assert len(TRAIN) >= 1000
    counts = collections.Counter(task.category for task in TRAIN)
    assert len(counts) >= 12
    assert counts["verification"] < 0.1 * len(TRAIN)
    learnable = sum(curriculum_stage(task.task_id) < 2 for task in TRAIN)
    assert learnable > 0.6 * len(TRAIN)


def test_every_answer_agrees_with_a_reading_of_the_text():
    checked = collections.Counter()
    for task in TASKS:
        spec = SPECS[task.task_id]
        for row, example in enumerate(task.examples()):
            example.check(task.task_id, row)
            assert example.input == " ".join(example.input.split()).lower()
            if spec.operation in ("present", "absent"):
                words = example.input.partition(" ; ")[0].split()
                if spec.form == "options":
                    inside = [option for option in example.options if option in words]
                    right = inside if spec.operation == "present" else [o for o in example.options if o not in words]
                    assert right == [example.outputs[0]]
                else:
                    assert example.outputs[0] == ("yes" if example.input.split()[-1] in words else "no")
            elif spec.form == "verify":
                text, _, proposed = example.input.rpartition(" ; ")
                assert example.outputs[0] == (
                    "yes" if reference(spec.operation, spec.domain, text) == proposed else "no"
                )
            else:
                assert example.outputs == (reference(spec.operation, spec.domain, example.input),), task.task_id
            checked[spec.operation] += 1
    assert set(checked) == set(OPERATIONS)


def test_options_hold_the_answer_once_at_any_position():
    positions = collections.Counter()
    for task in TASKS:
        if SPECS[task.task_id].form != "options":
            continue
        expected = 2 if SPECS[task.task_id].category == "rules" else NUM_OPTIONS
        for example in task.examples():
            assert len(set(example.options)) == len(example.options) == expected
            if expected == NUM_OPTIONS:
                positions[example.options.index(example.outputs[0])] += 1
    total = sum(positions.values())
    # 10,000 draws: three standard errors are 0.014.
    assert all(abs(count / total - 1 / NUM_OPTIONS) < 0.02 for count in positions.values())


def _groups():
    """Tasks by the input distribution they share, answer forms apart (the options shown are a part of the input)."""
    groups = collections.defaultdict(list)
    for task in TASKS:
        spec = SPECS[task.task_id]
        if spec.task_id not in TRAINED:
            continue
        sampler = OPERATIONS[spec.operation].sampler
        content = spec.domain
        if sampler in ("mixed", "mixed_records", "mixed_amounts"):
            content = kinds_together(spec.domain, spec.length, spec.variant)
        elif sampler == "two_kinds":
            content = tuple(sorted((spec.domain, partner(spec.domain))))
        groups[sampler, content, spec.length, spec.variant, spec.form].append(spec)
    return groups


TRAINED = {task.task_id for task in TRAIN}


def test_tasks_on_one_input_distribution_answer_differently():
    """Distinct means: on shared probe inputs at least 20 % of the answers differ, for every pair of a group."""
    smallest = 1.0
    compared = 0
    for (sampler, _, length, variant, form), specs in _groups().items():
        rng = random.Random(5)
        scenes = [SAMPLERS[sampler](rng, specs[0].domain, length, variant) for _ in range(120)]
        proposals = [rng.choice(scene.items + scene.outside[:1]) for scene in scenes]
        answers = []
        for spec in specs:
            given = [OPERATIONS[spec.operation].answer(scene, spec.domain) for scene in scenes]
            if form == "verify" and spec.operation == "present":
                given = [str(word in scene.items) for word, scene in zip(proposals, scenes, strict=True)]
            elif form == "verify":
                given = [str(word == answer) for word, answer in zip(proposals, given, strict=True)]
            answers.append(given)
        for one, two in itertools.combinations(answers, 2):
            both = [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
            # Records ask for a name or for a word: those two tasks share no input at all.
            if both:
                smallest = min(smallest, sum(a != b for a, b in both) / len(both))
                compared += 1
    assert compared > 1000
    assert smallest >= 0.2


def test_two_tasks_of_equal_input_and_form_are_never_the_same_spec():
    """Between groups inputs differ: by domain, by list length, by the sampler's layout, or by the options shown."""
    keys = collections.Counter(
        (OPERATIONS[s.operation].name, s.domain, s.form, s.length, s.variant) for s in SPECS.values()
    )
    assert max(keys.values()) == 1
    rng = random.Random(0)
    two_kinds = {
        name: {frozenset(SAMPLERS[name](rng, domain, 3, 0).kinds) for domain in DOMAINS}
        for name in ("stranger", "two_kinds")
    }
    assert two_kinds["stranger"].isdisjoint(two_kinds["two_kinds"])
    for length in (2, 3, 4):
        for variant in (0, 1):
            sets = {kinds_together(domain, length, variant) for domain in DOMAINS}
            assert sorted(itertools.chain(*sets)) == sorted(DOMAINS)
        assert {kinds_together(d, length, 0) for d in DOMAINS}.isdisjoint(kinds_together(d, length, 1) for d in DOMAINS)


def test_families_categories_and_compositions_are_held_out():
    trained_families = {task.family for task in TRAIN}
    assert trained_families.isdisjoint(task.family for task in HELDOUT)
    trained_categories = {task.category for task in TRAIN}
    assert trained_categories.isdisjoint(HELDOUT_CATEGORIES)
    compositions = [task for task in HELDOUT if task.category in trained_categories]
    assert {task.category for task in HELDOUT} - trained_categories == set(HELDOUT_CATEGORIES)
    share = len({t.family for t in compositions}) / len({t.family for t in compositions} | trained_families)
    assert 0.10 <= share <= 0.14
    trained_parts = {
        part for task in TRAIN for spec in [SPECS[task.task_id]] for part in (spec.operation, spec.domain, spec.form)
    }
    for task in compositions:
        spec = SPECS[task.task_id]
        assert {spec.operation, spec.domain, spec.form} <= trained_parts


def test_wordings_are_many_and_held_out_ones_use_known_words():
    trained_words = {
        word
        for task in TRAIN
        for template in task.templates
        if template.role == "train"
        for word in template.text.split()
    }
    content = {*KIND, *NAMES, *DAYS, *MONTHS}
    assert trained_words.isdisjoint(content - {"may"})
    input_first = []
    for task in TASKS:
        task.check()
        texts = {role: [t.text for t in task.templates if t.role == role] for role in ("train", "heldout")}
        assert len(set(texts["train"])) == 8
        assert len(set(texts["heldout"])) >= 3
        assert set(texts["train"]).isdisjoint(texts["heldout"])
        for template in task.templates:
            assert template.instruction in template.text
            assert ("options" in template.placeholders()) == (SPECS[task.task_id].form == "options")
            assert set(template.text.split()) <= trained_words, (task.task_id, template.text)
            input_first.append(template.text.startswith("{input}"))
    assert 0.8 < sum(input_first) / len(input_first) < 0.95
    assert set(PHRASES) == set(HELDOUT_PHRASES) == set(OPERATIONS)
    for name in PHRASES:
        assert set(PHRASES[name]).isdisjoint(HELDOUT_PHRASES[name])
    for form in FRAMES:
        assert set(FRAMES[form]).isdisjoint(HELDOUT_FRAMES[form])


def test_different_operations_are_worded_differently():
    """No sentence asks for two different answers of one input distribution and form."""
    meant = {}
    for task in TASKS:
        spec = SPECS[task.task_id]
        layout = (OPERATIONS[spec.operation].sampler, spec.form)
        for template in task.templates:
            key = (*layout, template.instruction, spec.domain)
            assert meant.setdefault(key, spec.operation) == spec.operation, template.instruction


def test_words_belong_to_one_domain_and_stay_few():
    words = [word for domain in DOMAINS.values() for word in domain]
    assert len(set(words)) == len(words) == 120
    assert set(words).isdisjoint({*NAMES, *NUMBERS, *DAYS, *MONTHS, *DOMAINS})
    seen = set()
    for task in TASKS:
        for template in task.templates:
            seen.update(template.text.split())
        for example in task.examples():
            seen.update(example.input.split())
    assert len(seen) < 340


def test_same_answers_in_another_process_with_another_hash_seed():
    code = (
        "import hashlib;from lightning_zeroprompt.data.sources.builtin import builtin_tasks;h=hashlib.sha256();"
        "[h.update(repr((t.task_id,t.role,t.templates,list(t.examples()))).encode()) for t in builtin_tasks(seed=3,"
        "examples_per_task=3)];print(h.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_examples_can_be_read_twice_and_depend_on_the_seed():
    task = TASKS[0]
    assert list(task.examples()) == list(task.examples())
    other = builtin_tasks(seed=1, examples_per_task=20)
    assert [t.role for t in other] == [t.role for t in TASKS]
    assert list(other[0].examples()) != list(task.examples())
    inputs = [example.input for example in builtin_tasks()[0].examples()]
    assert len(set(inputs)) == len(inputs) == 300


def test_small_input_spaces_end():
    task = next(t for t in builtin_tasks(examples_per_task=10_000) if t.task_id == "copy.animal.free.2")
    # 10 x 9 ordered pairs.
    assert 70 <= len(list(task.examples())) <= 90


def test_fewer_tasks_are_nested_and_spread_over_categories():
    ten, hundred = ({task.task_id for task in builtin_tasks(num_tasks=n) if task.role == "train"} for n in (10, 100))
    assert len(ten) == 10
    assert len(hundred) == 100
    assert ten < hundred
    assert len({SPECS[name].category for name in hundred}) >= 12
    assert sum(task.role == "heldout" for task in builtin_tasks(num_tasks=10)) == len(HELDOUT)


def test_categories_can_be_held_out_by_name():
    tasks = builtin_tasks(heldout_categories=("position",), examples_per_task=1)
    assert {t.role for t in tasks if t.category == "position"} == {"heldout"}
    assert any(t.role == "train" for t in tasks if t.category == "exclusion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples_per_task": 0}, "examples_per_task=0"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"num_tasks": 99_999}, "held out"),
        ({"heldout_categories": ("cooking",)}, "cooking"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(TaskError, match=message):
        builtin_tasks(**arguments)


def test_stage_of_an_unknown_task_is_refused():
    with pytest.raises(TaskError, match="not a built-in task"):
        curriculum_stage("boil.egg.free.3")


def test_ids_name_their_parts():
    assert Spec("pick", "city", "free", 3, 1).task_id == "pick.city.free.3.1"
    assert Spec("pick", "city", "verify", 3).category == "verification"
