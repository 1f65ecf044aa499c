# SPDX-License-Identifier: Apache-2.0
"""The promptsource source against direct rendering, on made-up files and on the templates of the T0 evaluation sets."""

import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.sources.promptsource import JinjaTemplate, load_templates, promptsource_tasks
from lightning_zeroprompt.data.task import TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

DATA = Path(os.environ.get("ZEROPROMPT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ROWS = [
    {
        "premise": f"p{i}.",
        "hypothesis": f"h {{{i}}} ||| x",
        "a": f"first {i}",
        "b": f"second {i}",
        "label": i % 2,
        "n": i,
    }
    for i in range(6)
]
ANSWER = "||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}"


def write(tmp_path, templates, rows=ROWS, name="set"):
    text = "dataset: set\ntemplates:\n"
    for number, entry in enumerate(templates):
        entry = {"jinja": entry} if isinstance(entry, str) else dict(entry)
        original = entry.pop("original_task", True)
        text += f"  id{number}: !Template\n"
        for key, value in ({"name": f"t{number}", "answer_choices": "Yes ||| No"} | entry).items():
            text += f"    {key}: {yaml.dump(value, default_style=chr(34)).strip()}\n"
        text += f"    metadata: !TemplateMetadata\n      original_task: {str(original).lower()}\n"
    (tmp_path / "templates").mkdir(exist_ok=True)
    (tmp_path / "templates" / f"{name}.yaml").write_text(text)
    (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / name / "validation.parquet")
    return promptsource_tasks(tmp_path / "templates", tmp_path / "data")


def direct(jinja, choices, rows):
    """Promptsource's own rendering, without a sandbox (Apache-2.0, promptsource/templates.py, Template.apply)."""
    environment = jinja2.Environment(autoescape=False)
    escape = "3ed2dface8203c4c9dfb1a5dc58e41e0"
    template = environment.from_string(jinja)
    word_template = None if choices is None else environment.from_string(choices)
    for row in rows:
        escaped = {k: v.replace("|||", escape) if isinstance(v, str) else v for k, v in row.items()}
        words = None
        if word_template is not None:
            words = [part.strip().replace(escape, "|||") for part in word_template.render(**escaped).split("|||")]
        rendered = template.render(**escaped, answer_choices=words)
        yield [part.replace(escape, "|||").strip() for part in rendered.split("|||")], words


def test_plain_templates_stay_editable_and_others_are_rendered(tmp_path):
    (task,) = write(
        tmp_path,
        [
            f'{{{{premise}}}} Is it true that "{{{{ hypothesis }}}}"?\n\n {ANSWER}',
            f"{{{{premise.lower()}}}} or {{{{answer_choices[0]}}}} {{% if n > 2 %}}many{{% endif %}} {ANSWER}",
            f"Braces {{ }} {{{{premise}}}} {ANSWER}",
        ],
    )
    texts = [template.text for template in task.templates]
    assert texts == ['{premise} Is it true that "{hypothesis}"?', "{rendered_1}", "Braces {{ }} {premise}"]
    examples = list(task.examples())
    assert [e.outputs[0] for e in examples] == ["Yes", "No"] * 3
    assert task.templates[0].render(examples[3]) == 'p3. Is it true that "h {3} ||| x"?'
    assert task.templates[1].render(examples[3]) == "p3. or Yes many"
    assert (task.task_id, task.role, task.benchmark, task.family) == (
        "promptsource/set",
        "heldout",
        "t0",
        "promptsource/set",
    )


def test_other_words_become_verbalizers_also_in_another_order(tmp_path):
    flipped = "{{premise}} ||| {{ answer_choices[1 - label] }}"
    (task,) = write(
        tmp_path,
        [
            f"{{{{premise}}}}? {ANSWER}",
            {"jinja": f"{{{{premise}}}}! {ANSWER}", "answer_choices": "True ||| False"},
            {"jinja": flipped, "answer_choices": "bad ||| good"},
        ],
    )
    assert [t.verbalizer for t in task.templates] == [None, ("True", "False"), ("good", "bad")]
    corpus = compile_tasks([task], tmp_path / "c", tokenizer=ByteTokenizer(), progress=False)
    assert corpus.tasks[0].labels == ("Yes", "No")


def test_choices_of_each_row_and_conditional_templates_make_their_own_tasks(tmp_path):
    of_row = "{{a}} ||| {{b}}"
    some = f"{{% if label == 1 %}}{{{{premise}}}} {ANSWER}{{% endif %}}"
    tasks = write(
        tmp_path,
        [
            {"jinja": f"Choose: {{{{premise}}}} {ANSWER}", "answer_choices": of_row},
            {"jinja": some, "answer_choices": of_row},
            {"jinja": f"Again: {{{{premise}}}} {ANSWER}", "answer_choices": of_row},
            {"jinja": "Say {{a}} ||| {{b}}", "answer_choices": None},
        ],
    )
    assert [t.task_id for t in tasks] == ["promptsource/set", "promptsource/set/2", "promptsource/set/3"]
    whole, part, free = (list(task.examples()) for task in tasks)
    assert (len(whole), len(part), len(free)) == (6, 3, 6)
    assert [t.name for t in tasks[0].templates] == ["t0", "t2"]
    assert whole[1].options == ("first 1", "second 1")
    assert whole[1].outputs == ("second 1",)
    assert {e.outputs[0] for e in part} == {"second 1", "second 3", "second 5"}
    assert (free[0].options, free[0].outputs) == (None, ("second 0",))


def test_rows_without_a_label_are_left_out(tmp_path):
    rows = [{**row, "label": -1} if row["n"] < 2 else row for row in ROWS]
    (task,) = write(tmp_path, [f"{{{{premise}}}} {ANSWER}"], rows)
    assert len(list(task.examples())) == 4


def test_templates_for_other_tasks_are_left_out_unless_asked_for(tmp_path):
    given = [f"{{{{premise}}}} {ANSWER}", {"jinja": f"Other {{{{a}}}} {ANSWER}", "original_task": False}]
    (task,) = write(tmp_path, given)
    assert [t.name for t in task.templates] == ["t0"]
    (task,) = promptsource_tasks(tmp_path / "templates", tmp_path / "data", original_tasks_only=False)
    assert [t.name for t in task.templates] == ["t0", "t1"]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{nothing}} ||| x", "unknown variable nothing; the dataset has: premise"),
        ("{{premise.nothing}} ||| x", "unknown variable"),
        ("{{ premise.__class__.__mro__ }} ||| x", "is unsafe|unknown variable"),
        ("{{ ''.__class__.__base__.__subclasses__() }} ||| x", "is unsafe"),
        ("{{ premise.__init__.__globals__ }} ||| x", "is unsafe"),
        ("{{ 'a' * 99999999999 }} ||| x", r"is unsafe: the operator '\*'"),
        ("{{ range(99999999) | list }} ||| x", "could not be rendered"),
        ("{{ premise | xmlattr }} ||| x", "could not be rendered"),
        ("{% include 'x' %} ||| x", "could not be rendered"),
        ("{{ premise ||| x", "is not valid Jinja"),
        ("{{ premise | nothing }} ||| x", "is not valid Jinja"),
        ("{{ premise }}", "renders 1 parts"),
        ("{{ premise }} ||| x ||| y", "renders 3 parts"),
        ("{{ premise }} ||| Perhaps", "'Perhaps', which is none of its choices"),
        ("{{ premise }} ||| {{ answer_choices[7] }}", "unknown variable"),
    ],
)
def test_bad_templates_are_explained(tmp_path, jinja, message):
    with pytest.raises(TaskError, match=f"template 't0' .*({message})"):
        write(tmp_path, [jinja])


WIDE = "the width .* is over the limit of 1,000"
LONG = "builds a text or list of .* or more, over the limit of 1,000,000"


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ '%999999999d' % 1 }}", WIDE),
        ("{{ '%(a)-999999999d' % {'a': 1} }}", WIDE),
        ("{{ '%.*f' % (999999999, 1.5) }}", WIDE),
        ("{{ '%.999999999f' | format(1.5) }}", WIDE),
        ("{{ '{:>999999999}'.format(1) }}", WIDE),
        ("{{ '{:>{w}}'.format_map({'': 1, 'w': 999999999}) }}", "could not be rendered"),
        ("{{ '{0:>{1}}'.format(1, 999999999) }}", WIDE),
        ("{{ a.center(999999999) }}", WIDE),
        ("{{ a.ljust(999999999) }}", WIDE),
        ("{{ a.zfill(999999999) }}", WIDE),
        ("{{ '\t'.expandtabs(999999999) }}", WIDE),
        ("{{ (1).to_bytes(999999999, 'big') }}", WIDE),
        ("{{ a | center(999999999) }}", WIDE),
        ("{{ a | center(width=999999999) }}", WIDE),
        ("{{ a | indent(999999999, True) }}", WIDE),
        ("{{ [a] | map('center', 999999999) | list }}", WIDE),
        ("{{ [a] | batch(999999999, 0) | list }}", WIDE),
        ("{{ [a] | tojson(indent=999999999) }}", WIDE),
        ("{% set b = range(9999) | join %}{{ a | wordwrap(1, wrapstring=b) }}", "a filter is given"),
        ("{% set b = range(99999) | join %}{{ b.replace('', b) }}", LONG),
        ("{% set b = range(99999) | join %}{{ b | replace('', b) }}", LONG),
        ("{% set b = range(99999) | join %}{{ b.join(['', '', '', '']) }}", LONG),
        ("{% set b = range(99999) | join %}{{ range(99999) | join(b) }}", LONG),
        ("{% set b = range(99999) | join %}{{ b ~ b ~ b }}", LONG),
        ("{% set b = range(99999) | join %}{{ b + b + b }}", LONG),
        ("{% set b = range(99999) | list %}{% set c = b + b + b + b + b + b %}{{ (c + c) | length }}", LONG),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", LONG),
        ("{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set b = range(99999) | join %}{{ m(m(b)) | length }}", LONG),
        ("{{ a.translate({102: 'x'}) }}", "access to attribute 'translate'"),
    ],
)
def test_templates_cannot_build_long_texts(jinja, message):
    with pytest.raises(TaskError, match=message):
        JinjaTemplate("t", jinja + " ||| x").render({"a": "first"})


def test_formats_joins_and_paddings_of_usual_size_work():
    for jinja, expected in (
        ("{{ '%05.1f' % n }} {{ '%s %s' | format(n, a) }} {{ 7 % 4 }}", "002.5 2.5 first 3"),
        ("{{ '{:>8,}|{x}|{0.real}'.format(1234567, x=a) }}", "1,234,567|first|1234567"),
        ("{{ '{a}: {n:.2f}'.format_map({'a': a, 'n': n}) }}", "first: 2.50"),
        ("{{ a ~ n ~ '!' }} {{ a + 'x' }} {{ (n + 1) ~ '' }}", "first2.5! firstx 3.5"),
        ("{{ a.center(9) }}|{{ a | center(9) }}|{{ 'x\ny' | indent(2) }}", "first  |  first  |x\n  y"),
        ("{{ ', '.join(['a', 'b']) }} {{ [1, 2] | join('-') }} {{ [{'k': 1}] | join(attribute='k') }}", "a, b 1-2 1"),
        ("{{ a.replace('f', 'ff') }} {{ a | replace('s', '') }} {{ a | wordwrap(2) }}", "ffirst firt fi\nrs\nt"),
        ("{% macro m(s) %}<{{ s }}>{% endmacro %}{{ m(a) | upper }} {{ [a] | tojson }}", '<FIRST> ["first"]'),
    ):
        assert JinjaTemplate("t", jinja + " ||| x").render({"a": "first", "n": 2.5}).prompt == expected


def test_bad_files_are_explained(tmp_path):
    with pytest.raises(TaskError, match="there is no folder"):
        promptsource_tasks(tmp_path / "templates", tmp_path / "data")
    write(tmp_path, [f"{{{{premise}}}} {ANSWER}"])
    with pytest.raises(TaskError, match=r"none of the 1 template files .* has data"):
        promptsource_tasks(tmp_path / "templates", tmp_path / "data", split="test")
    file = tmp_path / "templates" / "set.yaml"
    for content, message in (
        ("templates:\n  a: !!python/object/apply:os.system ['false']\n", "is not a promptsource file"),
        ("templates: [", "is not a promptsource file"),
        ("templates: {}\n", "has no templates"),
        ("templates:\n  a: !Template\n    name: x\n", "has no 'jinja' text"),
        ("templates:\n  a: !Template [1]\n", "is not a promptsource file"),
    ):
        file.write_text(content)
        with pytest.raises(TaskError, match=message):
            load_templates(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="is not a promptsource file"):
        load_templates(file)
    file.unlink()
    with pytest.raises(TaskError, match=r"holds no \.yaml file"):
        promptsource_tasks(tmp_path / "templates", tmp_path / "data")


def test_layout_of_the_promptsource_repository(tmp_path):
    write(tmp_path, [f"{{{{premise}}}} {ANSWER}"], name="glue_set")
    nested = tmp_path / "templates" / "glue" / "set"
    nested.mkdir(parents=True)
    (tmp_path / "templates" / "glue_set.yaml").rename(nested / "templates.yaml")
    (task,) = promptsource_tasks(tmp_path / "templates", tmp_path / "data")
    assert task.task_id == "promptsource/glue_set"


def test_templates_cannot_change_rows():
    with pytest.raises(TaskError, match="is unsafe"):
        JinjaTemplate("t", "{{ a.append(1) }} ||| x").render({"a": [1]})


def test_importing_the_module_imports_no_jinja():
    code = (
        "import sys, lightning_zeroprompt.data.sources.promptsource; assert not {'jinja2', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not (DATA / "templates_t0").is_dir(),
    reason=f"no T0 templates at {DATA}; set ZEROPROMPT_DATA to a folder that has templates_t0/",
)
@pytest.mark.parametrize("original_only", [pytest.param(True, marks=pytest.mark.slow), False])
def test_t0_templates_render_as_promptsource_does(original_only):
    class Loader(yaml.SafeLoader):
        pass

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    tasks = promptsource_tasks(DATA / "templates_t0", DATA / "t0", original_tasks_only=original_only)
    made = {}
    for task in tasks:
        name = task.task_id.split("/")[1]
        examples = list(task.examples())
        for template in task.templates:
            words = template.verbalizer or ()
            for example in examples:
                label = example.options.index(example.outputs[0])
                shown = words or example.options
                made.setdefault(name, []).append((template.render(example), shown[label], frozenset(shown)))
    expected = {}
    for name in made:
        file = yaml.load((DATA / "templates_t0" / f"{name}.yaml").read_text(), Loader)
        rows = pq.read_table(DATA / "t0" / name / "validation.parquet").to_pylist()
        for entry in file["templates"].values():
            if original_only and not entry["metadata"]["original_task"]:
                continue
            choices = entry["answer_choices"]
            for parts, words in direct(entry["jinja"], None if choices in (None, "None") else str(choices), rows):
                if len(parts) == 2 and all(parts):
                    expected.setdefault(name, []).append((parts[0], parts[1], frozenset(words)))
    assert len(made) == 10
    for name, prompts in expected.items():
        assert sorted(made[name], key=str) == sorted(prompts, key=str), name
    plain = sum(not t.text.startswith("{rendered_") for task in tasks for t in task.templates)
    assert plain >= 60
