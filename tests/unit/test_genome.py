# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
from genomes import EXAMPLE, GENOMES, TEXTS
from hypothesis import given
from hypothesis import strategies as st

from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.task import PromptTemplate, TaskError
from lightning_zeroprompt.prompts import SLOTS, LiteralPart, PromptGenome, option_permutation


@given(TEXTS, st.sampled_from(["", "word", "Is it true or false?", "Is it true"]))
def test_any_template_comes_back_as_it_was(text, instruction):
    template = PromptTemplate(
        name="t", text=text, verbalizer=("no", "yes"), option_separator=" / ", instruction=instruction
    )
    genome = PromptGenome.from_template(template)
    again = genome.template("other")
    assert again.render(EXAMPLE) == template.render(EXAMPLE)
    assert again.segments() == template.segments()
    assert (again.verbalizer, again.option_separator) == (template.verbalizer, " / ")
    assert PromptGenome.from_dict(json.loads(json.dumps(genome.to_dict()))) == genome


def test_built_in_templates_are_cut_where_they_were_made():
    """The sentence of each wording is the instruction, and each frame holds a placeholder alone."""
    for task in builtin_tasks(num_tasks=60):
        for template in task.templates:
            genome = PromptGenome.from_template(template)
            assert genome.template(template.name, template.role) == template
            assert (genome.instruction, genome.input_frame) == (template.instruction, "{input}")
            assert genome.option_frame == ("{options}" if "{options}" in template.text else "")
            unstated = PromptGenome.from_template(dataclasses.replace(template, instruction=""))
            assert unstated == genome, "the sentence was not found without being told"


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("Is it {{good}}?\n{input}\nOptions: {options}", ("Is it {good}?", "{input}", "Options: {options}", "")),
        ("Translate to French: {input}", ("Translate to French:", "{input}", "", "")),
        ("Question: {input}\nAnswer:", ("", "Question: {input}", "", "Answer:")),
        (
            'Suppose "{premise}" Can we infer that "{input}"? Yes, no, or maybe?',
            ("Yes, no, or maybe?", 'Suppose "{premise}" Can we infer that "{input}"?', "", ""),
        ),
        (
            "{options}\nChoose the word that fits.\nText: {input}\nThe answer:",
            ("Choose the word that fits.", "Text: {input}", "{options}", "The answer:"),
        ),
        ("{premise} {options} {input} : why ?", ("why ?", "{premise} {options} {input}", "", "")),
    ],
)
def test_where_templates_are_cut(text, slots):
    genome = PromptGenome.from_template(PromptTemplate(name="t", text=text))
    assert tuple(getattr(genome, slot) for slot in SLOTS) == slots


def test_a_slot_that_was_empty_finds_its_place():
    genome = PromptGenome.from_template(PromptTemplate(name="t", text="{input} : what is first ?"))
    changed = dataclasses.replace(genome, option_frame="{options}", answer_cue="answer")
    assert changed.text == "{input} : what is first ? : {options} : answer"
    assert dataclasses.replace(changed, instruction="").text == "{input} : {options} : answer"
    assert dataclasses.replace(changed, input_frame="").text == "what is first ? : {options} : answer"


def test_options_are_never_shown_twice():
    between = PromptGenome(input_frame="{premise} {options} {input}", option_frame="{options}")
    assert between.placeholders() == ("premise", "options", "input")


@given(GENOMES, st.text(), st.data())
def test_any_text_in_a_literal_place_stays_literal(genome, text, data):
    for part in genome.literals():
        assert part.text
    if genome.literals():
        part = data.draw(st.sampled_from(genome.literals()))
        changed = genome.with_literal(part, text)
        assert changed.placeholders() == genome.placeholders()
        changed.template("t").render(EXAMPLE)
        assert changed.with_literal(LiteralPart(part.slot, part.index, text), part.text) == genome if text else True


def test_a_literal_part_of_another_prompt_is_refused():
    with pytest.raises(TaskError, match="has no literal text 'why'"):
        PromptGenome(instruction="what").with_literal(LiteralPart("instruction", 0, "why"), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_frame": "{input"}, "expected '}'"),
        ({"option_frame": "{options.x}"}, "not a plain name"),
        ({"layout": "{instruction}{input_frame}"}, "has to name each"),
        ({"layout": "{instruction}{input_frame}{option_frame}{answer_cue}."}, "has to name each"),
        ({"option_order": "shuffled:x"}, "option order 'shuffled:x'"),
        ({"option_order": "sorted"}, "option order 'sorted'"),
    ],
)
def test_what_is_no_genome(changes, message):
    with pytest.raises(TaskError, match=message):
        PromptGenome(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": 3}, "instruction is 3; give text"),
        ({"verbalizer": ["a", 1]}, "give a list of words"),
        ({"demos": ""}, "unknown slots .'demos'."),
    ],
)
def test_a_record_from_outside_is_checked(changes, message):
    with pytest.raises(TaskError, match=message):
        PromptGenome.from_dict(PromptGenome().to_dict() | changes)


def test_fingerprints_are_equal_for_prompts_that_read_the_same():
    base = PromptGenome(instruction="Is it true?", answer_cue="Answer:")
    moved = PromptGenome(
        instruction="", input_frame="Is  it true?\n{input} ", answer_cue="Answer: ", layout=base.layout
    )
    assert base.fingerprint == moved.fingerprint
    unseen = dataclasses.replace(base, option_order="reversed", option_separator="|", option_frame="")
    assert base.fingerprint == unseen.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"instruction": "is it true?"},
        {"instruction": "Is it\ntrue?"},
        {"input_frame": "{premise}"},
        {"option_frame": "-{options}"},
        {"option_frame": "- {options}"},
        {"instruction": "Is it true? {options}", "option_frame": ""},
        {"verbalizer": ("a", "b")},
        {"option_order": "reversed"},
        {"option_separator": " or "},
        {"soft_prompt": "mean"},
        {"layout": "{input_frame}\n{instruction}\n{option_frame}\n{answer_cue}"},
    ],
)
def test_fingerprints_tell_apart_what_a_model_can(changes):
    base = PromptGenome(instruction="Is it true?", option_frame="{options}")
    assert dataclasses.replace(base, **changes).fingerprint != base.fingerprint


def test_blank_space_beside_a_placeholder_is_read():
    glued, apart, below = (PromptGenome(input_frame=f"Text:{blank}{{input}}") for blank in ("", "  ", " \n"))
    assert len({genome.fingerprint for genome in (glued, apart, below)}) == 3
    assert apart.fingerprint == PromptGenome(input_frame="Text: {input}").fingerprint


def test_reasons_to_discard_a_prompt():
    def length(text):
        return len(text.split())

    good = PromptGenome(instruction="Is it true?", verbalizer=("no", "yes"))
    assert good.check(required=["input"], fields=["input"], num_labels=2, count_tokens=length, max_tokens=3) == ()
    assert good.check(num_labels=2, count_tokens=length, max_tokens=2) == ("too long: 3 tokens of 2",)
    assert good.check(required=["premise"], fields=["premise"], num_labels=2) == (
        "lost placeholder premise",
        "unknown placeholder input",
    )
    assert good.check() == ("verbalizer of 2 words for 0 labels",)
    assert PromptGenome(verbalizer=("a", "a", " ")).check(num_labels=3) == (
        "empty word in the verbalizer",
        "one word for two labels",
    )
    assert PromptGenome(instruction=" ", input_frame="").check(required=["input"]) == ("empty",)
    with pytest.raises(ValueError, match="needs count_tokens"):
        good.check(max_tokens=3)


def test_orders_of_options():
    assert option_permutation("given", 3, 0) == (0, 1, 2)
    assert option_permutation("reversed", 3, 0) == (2, 1, 0)
    orders = [option_permutation("shuffled:5", 3, key) for key in range(3000)]
    assert orders == [option_permutation("shuffled:5", 3, key) for key in range(3000)]
    counts = {order: orders.count(order) for order in set(orders)}
    # Six orders with an expected 500 each; 110 is over five standard deviations.
    assert len(counts) == 6
    assert all(abs(count - 500) < 110 for count in counts.values())
    assert orders != [option_permutation("shuffled:6", 3, key) for key in range(3000)]
    assert option_permutation("shuffled:5", 4, -1) == option_permutation("shuffled:5", 4, 2**64 - 1)
