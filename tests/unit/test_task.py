# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_zeroprompt.data.task import Example, PromptTemplate, Task, TaskError

EXAMPLE = Example(input="in", outputs=("b",), options=("a", "b"), fields={"title": "T"})


@given(st.text(), st.text(), st.text())
def test_any_instruction_survives_as_literal_text(instruction, text, option):
    template = PromptTemplate.from_instruction(instruction, name="a", with_options=True)
    example = Example(input=text, outputs=("x",), options=("x", option))
    assert template.render(example) == f"{instruction.strip()}\n{text}\nOptions: x, {option}"


@given(st.lists(st.sampled_from(["{input}", "{title}", "{{", "}}", "x", " "]), max_size=12))
def test_segments_render_as_str_format_does(pieces):
    text = "".join(pieces)
    template = PromptTemplate(name="a", text=text)
    assert template.render(EXAMPLE) == text.format(input="in", title="T")
    kinds = [segment.is_placeholder for segment in template.segments()]
    assert all(a or b for a, b in itertools.pairwise(kinds)), "two neighbouring literals were not merged"


@pytest.mark.parametrize(
    "text", ["{input", "input}", "{}", "{0}", "{input.x}", "{input[0]}", "{input!r}", "{input:>9}"]
)
def test_anything_but_a_plain_placeholder_is_refused(text):
    with pytest.raises(TaskError, match="template 'bad'"):
        PromptTemplate(name="bad", text=text).segments()


def test_an_unknown_placeholder_names_what_there_is():
    with pytest.raises(TaskError, match=r"unknown placeholder 'titel'.*input, options, title"):
        PromptTemplate(name="a", text="{titel}").render(EXAMPLE)


def test_options_without_options_are_refused():
    with pytest.raises(TaskError, match="shows options but the example has none"):
        PromptTemplate(name="a", text="{options}").render(Example(input="x", outputs=("y",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ()}, "no output"),
        ({"outputs": (" ",)}, "an output is empty"),
        ({"options": ("b",)}, "1 option"),
        ({"options": ("a", "c")}, "do not contain the answer 'b'"),
    ],
)
def test_unusable_examples_are_refused_by_task_and_row(changes, message):
    fields = {"input": "in", "outputs": ("b",), "options": ("a", "b"), **changes}
    with pytest.raises(TaskError, match=f"task 't', example 3: .*{message}|task 't', example 3: {message}"):
        Example(**fields).check("t", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_id": " "}, "empty id"),
        ({"templates": ()}, "has no template"),
        ({"templates": (PromptTemplate(name="a", text="{input}"),) * 2}, "two templates of one name"),
        ({"templates": (PromptTemplate(name="a", text="hello"),)}, "has no placeholder"),
        ({"role": "test"}, "'t' has the role 'test'; give one of train, heldout"),
        ({"metric": "bleu"}, "'t' has the metric 'bleu'; give one of exact_match, rouge_l"),
        ({"origin": "web"}, "'t' has the origin 'web'; give one of academic"),
        ({"templates": (PromptTemplate(name="a", text="{input}", role="x"),)}, "template 'a' has the role 'x'"),
        ({"training_allowed": False}, "may not be used for training"),
        ({"source": "github google/BIG-bench"}, "may not be used for training"),
        ({"benchmark": "big_bench"}, "may not be used for training"),
    ],
)
def test_unusable_tasks_are_refused(changes, message):
    fields = {
        "task_id": "t",
        "category": "c",
        "family": "f",
        "templates": (PromptTemplate(name="a", text="{input}"),),
        "examples": lambda: iter(()),
        **changes,
    }
    with pytest.raises(TaskError, match=message):
        Task(**fields).check()
