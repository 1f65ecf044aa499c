# SPDX-License-Identifier: Apache-2.0
"""The hub source on small local files of the layouts it ships mappings for, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from lightning_zeroprompt.data.sources.hub import hub_tasks, local_files, read_mapping
from lightning_zeroprompt.data.task import TaskError

MAPPINGS = Path(__file__).parents[2] / "conf" / "mappings"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    # A Hugging Face client that tries the network would only time out here.
    assert os.environ.setdefault("HF_HUB_OFFLINE", "1")


def json_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def reviews(tmp_path, **changes):
    rows = [{"text": f" r{i} ", "label": i % 2, "kind": "ab"[i // 5], "licence": "MIT"} for i in range(10)]
    json_lines(tmp_path / "reviews.jsonl", rows)
    mapping = {
        "load": {"path": "json", "data_files": str(tmp_path / "reviews.jsonl"), "split": "train"},
        "task_id": "kind",
        "category": {"value": "sentiment"},
        "licence": "licence",
        "instructions": {"value": ["Good?", "Is it good?"]},
        "input": "text",
        "output": "label",
        "options": {"value": ["bad", "good"]},
    }
    return {k: v for k, v in (mapping | changes).items() if v is not None}


def test_rows_are_grouped_and_mapped(tmp_path):
    a, b = hub_tasks(reviews(tmp_path, strip=True, fields={"licence_text": "licence"}))
    assert (a.task_id, b.task_id, a.category, a.licence, a.family) == ("a", "b", "sentiment", "MIT", "a")
    assert [t.text for t in a.templates] == ["Good?\n{input}", "Is it good?\n{input}"]
    examples = list(b.examples())
    assert [e.input for e in examples] == [f"r{i}" for i in range(5, 10)]
    assert [e.outputs for e in examples] == [(["bad", "good"][i % 2],) for i in range(5, 10)]
    assert examples[0].options == ("bad", "good")
    assert examples[0].fields == {"licence_text": "MIT"}
    assert [e.input for e in b.examples()] == [e.input for e in examples]


def test_where_templates_and_several_input_columns(tmp_path):
    template = {"name": "n", "text": "{input}?", "role": "heldout", "verbalizer": ["-", "+"]}
    mapping = reviews(
        tmp_path, where={"kind": "b"}, templates=[template], instructions=None, input=["text", "kind"], task_id=None
    )
    (task,) = hub_tasks(mapping)
    assert (task.task_id, task.templates[0].role, task.templates[0].verbalizer) == ("json", "heldout", ("-", "+"))
    assert [e.input for e in task.examples()] == [f" r{i} \nb" for i in range(5, 10)]


def test_class_labels_give_options(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    folder = tmp_path / "d"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(
        folder / "x.parquet"
    )
    mapping = {"load": {"path": "parquet", "data_files": str(folder / "x.parquet")}, "input": "text", "output": "label"}
    (task,) = hub_tasks(mapping)
    assert [(e.outputs, e.options) for e in task.examples()] == [(("pos",), ("neg", "pos")), (("neg",), ("neg", "pos"))]
    assert task.templates[0].text == "{input}"


def natural_instructions(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        content = {
            "Contributors": ["x"],
            "Source": [f"source{number}"],
            "Categories": ["Question Answering", "other"],
            "Definition": [f"Define {number} {{like this}}."],
            "Input_language": ["English"],
            "Domains": ["News"],
            "Positive Examples": [{"input": "p", "output": "q", "explanation": "r"}],
            "Instances": [
                {"id": f"task{number}-{i}", "input": f"in {number} {i} ", "output": [f"out {i}", "other"]}
                for i in range(4)
            ],
            "Instance License": ["CC-BY-4.0"],
        }
        (folder / f"task{number:03d}_name.json").write_text(json.dumps(content, indent=4))


def test_super_natural_instructions_mapping(tmp_path):
    natural_instructions(tmp_path / "tasks")
    load = {"data_files": str(tmp_path / "tasks" / "*.json")}
    tasks = hub_tasks(MAPPINGS / "super_natural_instructions.yaml", load=load)
    assert [t.task_id for t in tasks] == [f"task{n:03d}_name" for n in range(3)]
    task = tasks[1]
    assert (task.category, task.family, task.licence, task.language) == (
        "Question Answering",
        "source1",
        "CC-BY-4.0",
        "English",
    )
    assert (task.domain, task.source, task.metric) == ("News", "Super-NaturalInstructions", "rouge_l")
    assert task.templates[0].text == "Define 1 {{like this}}.\n{input}"
    assert [(e.input, e.outputs) for e in task.examples()] == [(f"in 1 {i}", (f"out {i}", "other")) for i in range(4)]


def test_data_files_are_looked_for_beside_the_mapping(tmp_path):
    natural_instructions(tmp_path / "tasks", 1)
    copy = tmp_path / "mapping.yaml"
    copy.write_text((MAPPINGS / "super_natural_instructions.yaml").read_text())
    assert [t.task_id for t in hub_tasks(copy)] == ["task000_name"]
    assert [name for name, _ in local_files(copy)] == ["mapping", "task000_name.json"]


def test_p3_mapping(tmp_path):
    rows = [
        {
            "inputs_pretokenized": f"Premise {i}? ",
            "targets_pretokenized": ["Yes", "No"][i % 2] + "\n",
            "answer_choices": ["Yes", "No"],
        }
        for i in range(4)
    ]
    load = {"path": "json", "data_files": str(json_lines(tmp_path / "rte.jsonl", rows)), "name": None}
    (task,) = hub_tasks(MAPPINGS / "p3.yaml", load=load)
    assert [(e.input, e.outputs[0]) for e in task.examples()] == [
        (f"Premise {i}?", ["Yes", "No"][i % 2]) for i in range(4)
    ]
    assert next(task.examples()).options == ("Yes", "No")
    assert (task.source, task.templates[0].text) == ("P3", "{input}")


def test_compiles(tmp_path):
    from lightning_zeroprompt.data.prepare import compile_source

    natural_instructions(tmp_path / "tasks")
    copy = tmp_path / "mapping.yaml"
    copy.write_text((MAPPINGS / "super_natural_instructions.yaml").read_text())
    first = compile_source("hub", copy, tmp_path / "c", tokenizer="byte", progress=False)
    assert (first.counts["tasks"], first.counts["rows"]) == (3, 12)
    assert (
        compile_source("hub", copy, tmp_path / "c", tokenizer="byte", progress=False).fingerprint == first.fingerprint
    )


@pytest.mark.parametrize(
    "load", ["path: {folder}", "path: json, data_dir: {folder}", "path: json, data_files: x.jsonl"]
)
def test_changed_examples_are_noticed(tmp_path, load):
    from lightning_zeroprompt.data.corpus import CorpusError
    from lightning_zeroprompt.data.prepare import compile_source

    folder = tmp_path if "data_files" in load else tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(f"load: {{{load.format(folder=folder)}}}\ninput: text\noutput: label\n")

    def corpus(text, existing):
        json_lines(folder / "x.jsonl", [{"text": text, "label": "b"}])
        return compile_source("hub", mapping, tmp_path / "c", tokenizer="byte", progress=False, existing=existing)

    first = corpus("one", "reuse")
    (folder / ".hidden").write_text("nothing")
    assert corpus("one", "reuse").fingerprint == first.fingerprint
    with pytest.raises(CorpusError, match=r"other settings \(source: "):
        corpus("two", "reuse")
    assert corpus("two", "replace").segment(0).tobytes() != first.segment(0).tobytes()


def test_data_whose_changes_cannot_be_seen_are_warned_of(tmp_path, caplog):
    mapping = tmp_path / "mapping.yaml"
    for load, warned in (("path: some/data", True), ("path: some/data, revision: abc", False)):
        caplog.clear()
        mapping.write_text(f"load: {{{load}}}\ninput: text\noutput: label\n")
        assert local_files(mapping) == [("mapping", mapping)]
        assert ("without asking whether the data have changed" in caplog.text) == warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrong": 1}, "unknown entry wrong; known: load"),
        ({"input": None}, "lacks input"),
        ({"load": {"split": "train"}}, "lacks load: {path"),
        ({"input": "nothing"}, "'input' names the column 'nothing', which is not there; there are: text"),
        ({"task_id": "nothing"}, "'task_id' names the column 'nothing'"),
        ({"category": {"values": 1}}, "'category' must be a column name or"),
        ({"options": {"value": ["a"]}}, "gives the number 1, but there are 1 options"),
        ({"where": {"kind": "z"}}, "finds no rows"),
        ({"templates": [{"text": "x"}]}, "needs name and text"),
        ({"per_file": True, "load": {"path": "json", "data_files": "/nothing/*.json"}}, "no file matches"),
    ],
)
def test_bad_mappings_are_explained(tmp_path, changes, message):
    with pytest.raises(TaskError, match=message):
        [list(task.examples()) for task in hub_tasks(reviews(tmp_path, **changes))]


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("load: json", "load"),
        ("load: {path: 3}", "load.path"),
        ("load: {path: json, data_files: {train: 3}}", "load.data_files"),
        ("load: {path: json, data_files: {train: x}}\nper_file: true", "load.data_files"),
        ("load: {path: json, name: {a: b}}", "load.name"),
        ("load: {path: json, revision: 2020-01-01}", "load"),
        ("input: [3]", "input"),
        ("input: []", "input"),
        ("input: {text: value}", "input"),
        ("output: [label]", "output"),
        ("options: [good, bad]", "options"),
        ("options: {value: good}", "options"),
        ("options: {value: [yes, no]}", "options"),
        ("instructions: [Good]", "instructions"),
        ("instructions: {value: 3}", "instructions"),
        ("instructions: {value: [{text: Good}]}", "instructions"),
        ("templates: {name: a, text: b}", "templates"),
        ("templates: [text]", "templates"),
        ("templates: [{name: a, text: [b]}]", "templates"),
        ("templates: [{name: a, text: b, verbalizer: yes}]", "templates"),
        ("templates: [{name: a, text: b, 3: c}]", "templates"),
        ("fields: text", "fields"),
        ("fields: [text]", "fields"),
        ("where: kind", "where"),
        ("instances: [a]", "instances"),
        ("task_id: [kind]", "task_id"),
        ("category: 3", "category"),
        ("category: {value: {a: b}}", "category"),
        ("per_file: 'no'", "per_file"),
        ("strip: 1", "strip"),
        ("role: test", "role"),
        ("metric: bleu", "metric"),
        ("3: x", "unknown entry 3"),
    ],
)
def test_entries_of_a_wrong_type_are_named_with_their_file(tmp_path, entry, key):
    lines = {"load": "load: {path: json, data_files: x.jsonl}", "input": "input: text", "output": "output: label"}
    lines[entry.split(":")[0]] = entry
    (tmp_path / "mapping.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(TaskError, match=rf"mapping\.yaml.*\b{key}\b"):
        hub_tasks(tmp_path / "mapping.yaml")


@pytest.mark.parametrize("key", ["options", "instructions", "instances"])
def test_columns_of_a_wrong_type_are_named(tmp_path, key):
    wrong = {"a": 1} if key == "instructions" else "no list"
    file = json_lines(tmp_path / "x.jsonl", [{"text": "x", "label": "good", "wrong": wrong}])
    mapping = {"load": {"path": "json", "data_files": str(file)}, "input": "text", "output": "label", key: "wrong"}
    with pytest.raises(TaskError, match=f"'{key}' names a column that holds .*, which is not a list"):
        [list(task.examples()) for task in hub_tasks(mapping)]


def test_bad_files_are_explained(tmp_path):
    with pytest.raises(TaskError, match="there is no mapping"):
        read_mapping(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(TaskError, match="not valid YAML"):
        read_mapping(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("- a")
    with pytest.raises(TaskError, match="must be a mapping"):
        read_mapping(tmp_path / "x.yaml")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(TaskError, match=r"load_dataset\(.*\) failed"):
        hub_tasks(reviews(tmp_path, load={"path": "json", "data_files": str(tmp_path / "broken.jsonl")}))


@pytest.mark.parametrize(
    ("kind", "text"), [("csv", "text,label\nplain,a\ncaf\xe9,b\n"), ("json", '{"text": "caf\xe9", "label": "b"}\n')]
)
def test_files_that_are_not_utf8_are_named(tmp_path, kind, text):
    (tmp_path / f"good.{kind}").write_text(text, encoding="utf-8")
    (tmp_path / f"bad.{kind}").write_text(text, encoding="latin-1")
    load = {"path": kind, "data_files": [str(tmp_path / f"{name}.{kind}") for name in ("good", "bad")]}
    mapping = {"load": load, "input": "text", "output": "label"}
    message = rf"^\S*bad\.{kind} is not utf-8 \(.*, byte 0xe9\); convert it to UTF-8, or name its own encoding"
    with pytest.raises(TaskError, match=message):
        [list(task.examples()) for task in hub_tasks(mapping)]
    mapping["load"] = {"path": kind, "data_files": load["data_files"][1], "encoding": "latin-1"}
    (task,) = hub_tasks(mapping)
    assert [example.input for example in task.examples()][-1] == "caf\xe9"


def test_importing_the_module_imports_no_datasets():
    code = "import sys, lightning_zeroprompt.data.sources.hub; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
