# SPDX-License-Identifier: Apache-2.0
import collections
import itertools
import math

import numpy as np
import pytest
from genomes import EXAMPLE, TEXTS
from hypothesis import given
from hypothesis import strategies as st

from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate, TaskError
from lightning_zeroprompt.prompts import PromptGenome
from lightning_zeroprompt.prompts.neighbours import (
    format_degree,
    nearest_tasks,
    profile_corpus_task,
    profile_examples,
    profile_task,
)
from lightning_zeroprompt.prompts.operators import Candidate
from lightning_zeroprompt.prompts.population import gather_donors, gather_material, start_population


def profile(task_id, options, text="some text", outputs=("a",)):
    """A profile of two examples; ``options`` holds those of each."""
    examples = [Example(input=text, outputs=outputs, options=shown) for shown in options]
    return profile_examples(task_id, examples, [])


YES_NO = profile("yes no", [("yes", "no")] * 2)
NO_YES = profile("no yes", [("No", "YES")] * 2)
TRUE_FALSE = profile("true false", [("true", "false")] * 2)
THREE = profile("three", [("a", "b", "c")] * 2)
VARYING = profile("varying", [("a", "b"), ("a", "c")])
WORD = profile("word", [None, None])
WORDS = profile("words", [None, None], outputs=("a b",))
SENTENCE = profile("sentence", [None, None], outputs=("a b c d e",))


@pytest.mark.parametrize(
    ("one", "other", "degree"),
    [
        (YES_NO, NO_YES, 4),
        (YES_NO, TRUE_FALSE, 3),
        (YES_NO, THREE, 2),
        (VARYING, VARYING, 2),
        (YES_NO, VARYING, 1),
        (YES_NO, WORD, 0),
        (WORD, WORDS, 4),
        (WORDS, SENTENCE, 2),
    ],
)
def test_how_far_formats_match(one, other, degree):
    assert format_degree(one, other) == format_degree(other, one) == degree


def test_format_comes_before_text():
    target = profile("target", [("yes", "no")] * 2, "is the film good")
    candidates = [
        profile("same text", [None, None], "is the film good"),
        profile("same labels", [("yes", "no")] * 2, "the parliament has met"),
        profile("same labels and words", [("yes", "no")] * 2, "was the film bad"),
        profile("b", [("true", "false")] * 2, "zzzz"),
        profile("a", [("true", "false")] * 2, "zzzz"),
        target,
    ]
    found = nearest_tasks(target, candidates, 5)
    assert [near.task_id for near in found] == ["same labels and words", "same labels", "a", "b", "same text"]
    assert [near.degree for near in found] == [4, 4, 3, 3, 0]
    assert nearest_tasks(target, candidates, 2) == found[:2]
    assert nearest_tasks(target, [target], 2) == []
    with pytest.raises(ValueError, match="count=0"):
        nearest_tasks(target, candidates, 0)
    with pytest.raises(TaskError, match="'none' has no example"):
        profile_examples("none", [], ["do it"])


def test_similarity_is_the_cosine_of_tf_idf():
    texts = [
        "the film was good and the film was long",
        "was the film bad",
        "\u8fd9\u90e8\u7535\u5f71\u5f88\u597d",
        "abc",
    ]
    profiles = [profile(str(number), [None, None], text) for number, text in enumerate(texts)]

    def grams(text):
        data = f" {text} ".encode()
        # Each profile holds its text twice.
        return collections.Counter(data[i : i + 4] for i in range(len(data) - 3) for _ in range(2))

    counted = [grams(text) for text in texts]
    everywhere = collections.Counter(itertools.chain.from_iterable(counted))
    idf = {gram: math.log(5 / (1 + sum(gram in one for one in counted))) for gram in everywhere}
    vectors = [np.array([math.log1p(one[gram]) * idf[gram] for gram in idf]) for one in counted]
    found = {near.task_id: near.similarity for near in nearest_tasks(profiles[0], profiles, 9)}
    for number in range(1, 4):
        expected = vectors[0] @ vectors[number] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[number])
        # Of some 70 strings in 4,096 buckets, a few may share one.
        # Without instructions, only the inputs' half of the mean is there.
        assert 2 * found[str(number)] == pytest.approx(expected, abs=0.03)
    assert found["1"] > 0.05 > found["2"]


def test_built_in_tasks_find_their_kind():
    """Most of the nearest training tasks of a held-out composition ask for the same operation."""
    tasks = builtin_tasks(num_tasks=300, examples_per_task=16)
    profiles = {task.task_id: profile_task(task) for task in tasks}
    trained = [profiles[task.task_id] for task in tasks if task.role == "train"]
    heldout = [task for task in tasks if task.role == "heldout" and task.task_id.startswith(("first.", "count_words."))]
    assert len(heldout) > 5
    for task in heldout:
        found = nearest_tasks(profiles[task.task_id], trained, 5)
        form = task.task_id.split(".")[2]
        assert all(near.degree == (2 if form == "options" else 4) for near in found)
    same = [
        near.task_id.split(".")[0] == task.task_id.split(".")[0]
        for task in heldout
        for near in nearest_tasks(profiles[task.task_id], trained, 3)
    ]
    assert np.mean(same) > 0.3, "a random training task asks for the same operation in under 5 % of cases"


def test_a_compiled_task_has_the_profile_of_its_source(evaluation_corpus):
    """The corpus of the evaluation's tests: bytes, so that every text comes back as it was."""
    profiles = {
        info.task_id: profile_corpus_task(evaluation_corpus, info.index, num_examples=1000)
        for info in evaluation_corpus.tasks
    }
    assert profiles["train closed"].labels == {"yes", "no", "unsure"}
    assert (profiles["train open"].labels, profiles["train open"].has_options) == (None, True)
    assert (profiles["train free"].has_options, profiles["train free"].answer_words) == (False, 1)
    candidates = [profiles[info.task_id] for info in evaluation_corpus.tasks if info.role == "train"]
    assert nearest_tasks(profiles["new closed"], candidates, 1)[0].task_id == "train closed"
    assert nearest_tasks(profiles["new open"], candidates, 1)[0].task_id == "train open"
    assert {near.task_id for near in nearest_tasks(profiles["new free"], candidates, 2)} == {
        "train free",
        "train free 2",
    }


def template(name, text, **changes):
    return PromptTemplate(name=name, text=text, **changes)


OWN = (
    template("a", "{input} : give the word : {options}", verbalizer=("yes", "no")),
    template("b", "Read {premise}\nWhy is that?\n{input}"),
)


def test_donors_come_one_of_each_task_in_turn():
    donors = gather_donors(
        {
            "near": [template("x", "Do one.\n{input}"), template("y", "Do two.\n{input}")],
            "far": [template("x", "Do  one.\n{input}"), template("z", "Do three.\n{input}")],
            "heldout": [template("x", "Do four.\n{input}", role="heldout")],
        }
    )
    assert [(donor.origin, donor.genome.instruction) for donor in donors] == [
        ("near", "Do one."),
        ("near", "Do two."),
        ("far", "Do three."),
    ]


def test_a_population_starts_from_own_templates_and_borrowed_instructions():
    donors = gather_donors(
        {f"task {number}": [template("x", f"Do {number} times.\n{{input}}")] for number in range(4)}
        | {"silent": [template("x", "{input}")], "same": [template("x", "give the word\n{input}")]}
    )
    population = start_population(OWN, donors, 5, soft_prompt="mean")
    assert [candidate.origin for candidate in population] == [
        "template a",
        "template b",
        "instruction of task 0",
        "instruction of task 1",
        "instruction of task 2",
    ]
    assert [candidate.genome.text for candidate in population[:3]] == [
        OWN[0].text,
        OWN[1].text,
        "{input} : Do 0 times. : {options}",
    ]
    assert set(population[3].genome.placeholders()) == {"premise", "input"}
    assert "Do 1 times." in population[3].genome.text
    assert {candidate.genome.soft_prompt for candidate in population} == {"mean"}
    assert [candidate.parents for candidate in population[2:4]] == [
        (population[0].genome.fingerprint,),
        (population[1].genome.fingerprint,),
    ]
    assert len(start_population(OWN, donors, 100)) == 6, "an instruction in its own frame is no other prompt"
    assert start_population(OWN, donors, 1) == start_population(OWN, [], 100), "all own templates are kept"
    with pytest.raises(ValueError, match="size=0"):
        start_population(OWN, donors, 0)
    with pytest.raises(TaskError, match="no template to start from"):
        start_population([], donors, 5)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, max_size=6), st.integers(1, 8))
def test_first_prompts_render_and_differ(own, lent, size):
    templates = [template(f"t{number}", text) for number, text in enumerate(own)]
    donors = gather_donors({str(number): [template("x", text)] for number, text in enumerate(lent)})
    population = start_population(templates, donors, size)
    fingerprints = [candidate.genome.fingerprint for candidate in population]
    assert len(set(fingerprints)) == len(fingerprints)
    assert len(fingerprints) <= max(size, len(templates))
    for candidate in population:
        candidate.genome.template("t").render(EXAMPLE)
    for number, given_template in enumerate(templates):
        assert PromptGenome.from_template(given_template).fingerprint in fingerprints, number


def test_material_holds_what_a_task_has():
    own = start_population(OWN, [], 2)
    donors = [Candidate(PromptGenome(instruction="Do it."), "near")]
    material = gather_material(own, donors, labels=("True", "False"), soft_prompts=("", "mean"), has_options=True)
    assert material.verbalizers == (None, ("true", "false"), ("yes", "no"), ("Yes", "No"))
    assert material.founders == tuple(candidate.genome for candidate in own)
    assert material.donors == (donors[0].genome,)
    assert (material.soft_prompts, material.has_options) == (("", "mean"), True)
    assert gather_material(own, donors).verbalizers == ()
    assert gather_material(own[1:], [], labels=("a", "A")).verbalizers == (None,), "one word for two labels"
