# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import random

import pytest
from genomes import EXAMPLE, GENOMES
from hypothesis import given
from hypothesis import strategies as st

from lightning_zeroprompt.data.task import PromptTemplate
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.operators import (
    DEFAULT_WEIGHTS,
    OPERATORS,
    Candidate,
    Couple,
    Material,
    Operator,
    OperatorSet,
    Pending,
)
from lightning_zeroprompt.prompts.phrases import split_phrases

GENES = [field.name for field in dataclasses.fields(PromptGenome)]
SENTENCE = "Read the list, then give the word that comes last."
ALL = {operator.name: 1.0 for operator in OPERATORS}
BY_NAME = {operator.name: operator for operator in OPERATORS}


class Echo:
    """A text model that answers each request with the given texts, and remembers its calls."""

    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def __call__(self, requests, *, seed):
        self.calls.append((list(requests), seed))
        return [list(self.texts) for _ in requests]


def generators(*texts):
    return {name: Echo(*texts) for name in ("infilling", "continuation", "back_translation")}


def material(*founders, donors=()):
    return Material(
        founders=founders,
        donors=donors or (PromptGenome(instruction="Do {it}", option_frame="one of {options}", answer_cue="A:"),),
        verbalizers=(None, ("no", "yes"), ("a", "b")),
        soft_prompts=("", "mean"),
        has_options=True,
    )


def genome(text="{input} : " + SENTENCE, **changes):
    return dataclasses.replace(PromptGenome.from_template(PromptTemplate(name="t", text=text)), **changes)


@given(st.text(alphabet=st.sampled_from("ab,.? \n\u3002\u5f88\u5feb\uac00{}'")), st.data())
def test_phrases_join_to_the_text_they_were_cut_from(text, data):
    phrases = split_phrases(text)
    assert phrases.text() == text
    assert all(part and part == part.strip() for part in phrases.parts)
    assert not "".join(phrases.gaps).strip()
    kept = collections.Counter(text.replace(" ", "").replace("\n", ""))

    def letters(changed):
        return collections.Counter("".join(changed.split()))

    place = data.draw(st.integers(0, len(phrases)))
    assert letters(phrases.inserted("xx", place)) == kept + collections.Counter("xx")
    if len(phrases):
        index = data.draw(st.integers(0, len(phrases) - 1))
        other = data.draw(st.integers(0, len(phrases) - 1))
        assert letters(phrases.without(index)) == kept - collections.Counter(phrases.parts[index])
        assert letters(phrases.swapped(index, other)) == kept
        before, behind = phrases.around(index, index + 1)
        assert before + phrases.parts[index] + behind == text


def test_edits_of_phrases_keep_the_words_apart():
    phrases = split_phrases(SENTENCE)
    assert phrases.parts == ("Read the list,", "then give the word", "that comes last.")
    assert phrases.without(0) == "then give the word that comes last."
    assert phrases.without(2) == "Read the list, then give the word"
    assert phrases.swapped(0, 2) == "that comes last. then give the word Read the list,"
    assert phrases.inserted("now", 0) == f"now {SENTENCE}"
    assert phrases.inserted("now", 3) == f"{SENTENCE} now"
    lines = split_phrases("One.\nTwo. Three.")
    assert [lines.without(index) for index in range(3)] == ["Two. Three.", "One. Three.", "One.\nTwo."]
    assert split_phrases("\u9009\u62e9").inserted("\u5feb", 1) == "\u9009\u62e9\u5feb"


@given(GENOMES, GENOMES, st.integers(), st.text(max_size=8))
def test_children_are_prompts_whatever_happens_to_them(mother, father, seed, text):
    """Thirty generations of all operators: each child renders, keeps its frame's placeholders, and differs."""
    rng = random.Random(seed)
    operators = OperatorSet(ALL, generators=generators(text))
    mine = material(mother, father)
    frames = {mother.input_frame, father.input_frame}
    inputs = {PromptGenome(input_frame=frame).placeholders() for frame in frames}
    shown = {*mother.placeholders(), *father.placeholders(), "options"}
    population = [mother, father]
    for _ in range(30):
        parents = tuple(rng.sample(population, 2))
        (child,) = operators.breed([Couple(parents, mine)], rng)
        if child is None:
            continue
        assert child.genome.fingerprint not in {parent.fingerprint for parent in parents}
        assert set(child.parents) <= {parent.fingerprint for parent in parents}
        assert PromptGenome(input_frame=child.genome.input_frame).placeholders() in inputs
        assert set(child.genome.placeholders()) <= shown
        child.genome.template("child").render(EXAMPLE)
        assert PromptGenome.from_dict(child.genome.to_dict()) == child.genome
        population.append(child.genome)


@given(GENOMES, GENOMES, st.integers())
def test_a_crossover_takes_every_slot_from_a_parent(mother, father, seed):
    child = BY_NAME["crossover"].change((mother, father), Material(), random.Random(seed))
    if child is None:
        assert sum(getattr(mother, name) != getattr(father, name) for name in GENES) < 2
        return
    assert all(getattr(child, name) in (getattr(mother, name), getattr(father, name)) for name in GENES)
    assert child not in (mother, father)


def test_a_crossover_can_take_any_slot_from_either_parent():
    mother = genome(option_order="reversed", answer_cue="A:", option_frame="{options}", verbalizer=("a", "b"))
    father = genome("Why?\n{premise}\nPick: {options}", option_separator=" / ", soft_prompt="mean", answer_cue="B:")
    rng = random.Random(0)
    children = [BY_NAME["crossover"].change((mother, father), Material(), rng) for _ in range(200)]
    for name in GENES:
        assert {getattr(child, name) for child in children} == {getattr(mother, name), getattr(father, name)}


def test_the_same_seed_breeds_the_same_children():
    couples = [Couple((genome(), genome("Why?\n{input}\nPick: {options}")), material(genome()))] * 40
    first, again, other = (
        OperatorSet(ALL, generators=generators("new words")).breed(couples, random.Random(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len({child.origin for child in first}) > 6


def test_breeding_leaves_the_global_random_numbers_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    couples = [Couple((genome(), genome("Why?\n{input}")), material(genome()))] * 20
    OperatorSet(ALL, generators=generators("new")).breed(couples, random.Random(0))
    assert random.random() == expected


def test_what_each_operator_does():
    parent = genome("{input} : " + SENTENCE + " : {options}")
    founder = genome("Say quickly\n{input}")
    mine = material(founder)
    rng = random.Random(3)

    def children(name, parents=(parent,)):
        drawn = [BY_NAME[name].change(parents, mine, rng) for _ in range(60)]
        return [child for child in drawn if child is not None]

    words = collections.Counter(SENTENCE.split())
    for child in children("delete_phrase"):
        assert collections.Counter(child.instruction.split()) < words
    for child in children("swap_phrases"):
        assert collections.Counter(child.instruction.split()) == words
    for child in children("duplicate_phrase"):
        assert collections.Counter(child.instruction.split()) > words
    assert {len(child.instruction.split()) - sum(words.values()) for child in children("reinsert_phrase")} == {2}
    borrowed = children("borrow_slot")
    assert {child.instruction for child in borrowed} == {SENTENCE, "Do {it}"}
    assert {(child.option_frame, child.option_separator) for child in borrowed} == {
        ("{options}", ", "),
        ("one of {options}", ", "),
    }
    assert {child.verbalizer for child in children("change_verbalizer")} == {("no", "yes"), ("a", "b")}
    assert {child.option_order.partition(":")[0] for child in children("change_option_order")} == {
        "reversed",
        "shuffled",
    }
    assert {child.soft_prompt for child in children("change_soft_prompt")} == {"mean"}
    assert BY_NAME["change_option_order"].change((founder,), mine, rng) is None, "no options are shown"
    for name in ("continue_sentence", "back_translate"):
        pending = children(name)[0]
        assert isinstance(pending, Pending)
        assert pending.request.text == SENTENCE
        assert pending.finish("{x} anew").instruction == "{x} anew"
    gaps = children("infill_span")
    for pending in gaps:
        filled = pending.finish("[new]").instruction
        assert filled == pending.request.text + "[new]" + pending.request.behind
        assert filled.split().count("[new]") == 1, "the filling is glued to its neighbours"
    lengths = {len((pending.request.text + pending.request.behind).split()) for pending in gaps}
    assert max(lengths) == sum(words.values())
    assert min(lengths) < max(lengths)


def test_what_stands_between_placeholders_is_rewritten_too():
    parent = genome('Suppose "{premise}" Can we infer that "{input}"?')
    pending = BY_NAME["continue_sentence"].change((parent,), Material(), random.Random(0))
    assert pending.request.text == "Can we infer that"
    assert pending.finish("so").text == 'Suppose "{premise}" so "{input}"?'


def test_text_models_are_called_once_for_all_couples():
    models = generators("words of the model")
    operators = OperatorSet(
        {"infill_span": 1, "continue_sentence": 1, "delete_phrase": 1, "back_translate": 1}, generators=models
    )
    couples = [Couple((genome(),), material())] * 50
    children = operators.breed(couples, random.Random(0))
    counts = collections.Counter(child.origin for child in children)
    assert [len(model.calls) for model in models.values()] == [1, 1, 1]
    assert len({model.calls[0][1] for model in models.values()}) == 3, "two models got one seed"
    for name, model in models.items():
        (operator,) = [o.name for o in OPERATORS if o.needs_model == name]
        assert len(model.calls[0][0]) == counts[operator]
    for child in children:
        assert ("words of the model" in child.genome.text) == (child.origin != "delete_phrase")


def test_texts_that_change_nothing_are_passed_over():
    parent = genome("{input} : give it")
    operators = OperatorSet({"continue_sentence": 1}, generators={"continuation": Echo("give  it", " ", "give it now")})
    (child,) = operators.breed([Couple((parent,), Material())], random.Random(0))
    assert child == Candidate(
        dataclasses.replace(parent, instruction="give it now"), "continue_sentence", (parent.fingerprint,)
    )
    nothing = OperatorSet({"continue_sentence": 1}, generators={"continuation": Echo("give it")})
    assert nothing.breed([Couple((parent,), Material())], random.Random(0)) == [None]


def test_an_operator_that_does_not_apply_gives_way():
    parent = genome("{input} : give it")
    operators = OperatorSet({"change_verbalizer": 1000, "crossover": 1000, "duplicate_phrase": 1})
    (child,) = operators.breed([Couple((parent,), Material())], random.Random(0))
    assert child.origin == "duplicate_phrase"
    assert OperatorSet({"crossover": 1}).breed([Couple((parent, parent), Material())], random.Random(0)) == [None]


def test_weights_are_the_shares_of_the_operators():
    couples = [Couple((genome(option_frame="{options}"),), material())] * 2000
    operators = OperatorSet({"change_option_order": 3, "change_soft_prompt": 1})
    counts = collections.Counter(child.origin for child in operators.breed(couples, random.Random(0)))
    # 1,500 expected; 100 is five standard deviations.
    assert abs(counts["change_option_order"] - 1500) < 100


def test_ones_own_operator_is_used():
    def shout(parents, material, rng):
        return dataclasses.replace(parents[0], instruction=parents[0].instruction.upper())

    operators = OperatorSet({"shout": 1}, operators=[*OPERATORS, Operator("shout", 1, shout)])
    (child,) = operators.breed([Couple((genome(),), Material())], random.Random(0))
    assert child.genome.instruction == SENTENCE.upper()
    assert operators.names == ("shout",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"mutate": 1}, "unknown operators mutate; there are: crossover"),
        ({"crossover": -1}, "at least 0"),
        ({"crossover": float("nan")}, "at least 0"),
        ({"crossover": 0}, "no operator has a weight above 0"),
        ({}, "no operator has a weight above 0"),
        (DEFAULT_WEIGHTS, "'infill_span' has the weight 1.0 but needs a text model for 'infilling'"),
        ({"continue_sentence": 1}, "needs a text model for 'continuation'"),
    ],
)
def test_weights_that_no_search_can_use_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        OperatorSet(weights)
    assert OperatorSet(DEFAULT_WEIGHTS | {"infill_span": 0}).names


def test_two_operators_of_one_name_are_refused():
    with pytest.raises(ValueError, match="one name"):
        OperatorSet({"crossover": 1}, operators=[*OPERATORS, OPERATORS[0]])
