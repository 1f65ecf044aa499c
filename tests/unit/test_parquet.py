# SPDX-License-Identifier: Apache-2.0
"""The parquet source: choice of tasks, templates, metrics, laziness, and one clear error for each bad folder."""

import collections
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_zeroprompt.data.describe import task_counts
from lightning_zeroprompt.data.sources.parquet import COLUMNS, parquet_files, parquet_tasks
from lightning_zeroprompt.data.task import TaskError

CONSTANT = ("family", "category", "language", "tier", "benchmark", "source", "licence")
DATA = Path(os.environ.get("ZEROPROMPT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def row(task, number=0, **changes):
    values = {
        "task": task,
        "family": f"family of {task}",
        "category": "c",
        "language": "en",
        "tier": "core",
        "benchmark": "train",
        "source": "somewhere",
        "licence": "MIT",
        "instruction": f"Do {task}.",
        "input": f"{task} input {number}",
        "outputs": [f"word {number}"],
        "options": None,
    }
    return values | changes


def write(folder, name, rows, *, row_group_size=None, schema=None):
    folder.mkdir(exist_ok=True)
    kinds = {name: pa.string() if kind == "string" else pa.list_(pa.string()) for name, kind in COLUMNS.items()}
    table = pa.Table.from_pylist(rows, schema=schema or pa.schema(list(kinds.items())))
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group_size or max(len(rows), 1))


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "data"
    core = [row(f"core{t}", i, category=f"c{t % 3}") for t in range(9) for i in range(5)]
    extra = [row(f"extra{t}", i, tier="extra", category=f"e{t % 2}", family="one") for t in range(6) for i in range(3)]
    write(where, "train", core, row_group_size=7)
    write(where, "train_extra", extra)
    write(where, "heldout", [row("held", i, benchmark="t0", options=["a", "b"], outputs=["b"]) for i in range(4)])
    return where


def test_examples_come_whole_across_row_groups(folder):
    tasks = {task.task_id: task for task in parquet_tasks(folder, num_tasks=None)}
    assert list(tasks) == [f"core{t}" for t in range(9)] + [f"extra{t}" for t in range(6)] + ["held"]
    for task in tasks.values():
        count = 5 if task.task_id.startswith("core") else 4 if task.task_id == "held" else 3
        expected = [f"{task.task_id} input {i}" for i in range(count)]
        assert [example.input for example in task.examples()] == expected
        assert [example.input for example in task.examples()] == expected
    held = tasks["held"]
    assert (held.role, held.benchmark, held.tier, held.licence) == ("heldout", "t0", 0, "MIT")
    assert next(held.examples()).options == ("a", "b")
    assert (tasks["extra1"].tier, tasks["extra1"].benchmark, tasks["extra1"].role) == (1, "", "train")


def test_tasks_whose_rows_are_scattered_are_found(tmp_path):
    rows = [row(f"t{i % 4}", i) for i in range(40)]
    write(tmp_path / "d", "train", rows, row_group_size=9)
    for task in parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None):
        number = int(task.task_id[1:])
        assert [e.input for e in task.examples()] == [f"t{number} input {i}" for i in range(number, 40, 4)]


def test_choices_are_core_first_stratified_and_nested(folder):
    def chosen(count, seed=0):
        return {t.task_id for t in parquet_tasks(folder, num_tasks=count, seed=seed) if t.role == "train"}

    picks = [chosen(count) for count in range(1, 16)]
    assert all(small < large for small, large in itertools.pairwise(picks))
    assert picks[8] == {f"core{t}" for t in range(9)}
    for count in (3, 6):
        categories = collections.Counter(int(name[4:]) % 3 for name in picks[count - 1])
        assert set(categories.values()) == {count // 3}
    beyond = collections.Counter(int(name[5:]) % 2 for name in picks[12] if name.startswith("extra"))
    assert set(beyond.values()) == {2}
    assert len({frozenset(chosen(4, seed)) for seed in range(6)}) > 1
    expected = "12 training tasks (10 families), 3 of them beyond the core with 1 new families, 1 held out"
    assert task_counts(parquet_tasks(folder, num_tasks=12)) == expected


def test_every_prefix_holds_its_share_of_unequal_categories(tmp_path):
    write(tmp_path / "d", "train", [row(f"t{i:02d}", category="big" if i < 16 else "small") for i in range(20)])
    for seed in range(5):
        for count in (5, 10, 15):
            tasks = parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=count, seed=seed)
            assert sum(task.category == "small" for task in tasks) == count // 5


def test_instructions_become_templates(folder):
    lines = [
        {"task": "core0", "instructions": ["First {x}.", "Second.", "First {x}."]},
        {"task": "held", "instructions": ["H"]},
    ]
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    tasks = {task.task_id: task for task in parquet_tasks(folder, num_tasks=None)}
    assert [t.text for t in tasks["core0"].templates] == ["First {{x}}.\n{input}", "Second.\n{input}"]
    assert [t.text for t in tasks["core1"].templates] == ["Do core1.\n{input}"]
    assert [t.text for t in tasks["held"].templates] == ["H\n{input}", "H\n{input}\nOptions: {options}"]
    assert tasks["core0"].templates[0].instruction == "First {x}."


@pytest.mark.parametrize(
    ("rows", "lists"),
    [
        ([row("t", i, options=["a", "b"], outputs=["a"]) for i in range(4)], True),
        ([row("t", i, options=["a", "b"] if i % 2 else ["b", "a"], outputs=["a"]) for i in range(4)], True),
        ([row("t", i, options=["a", "b"], outputs=["a"], input="x\nOptions: a, b") for i in range(4)], False),
        ([row("t", i, options=["a", f"b{i}"], outputs=["a"]) for i in range(4)], False),
        ([row("t", i, options=[f"o{k}" for k in range(50)], outputs=["o1"]) for i in range(4)], False),
        ([row("t", i) for i in range(4)], False),
    ],
)
def test_options_are_listed_only_for_small_closed_sets(tmp_path, rows, lists):
    for size in (1, 100):
        write(tmp_path / "d", "train", rows, row_group_size=size)
        task = parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)[0]
        assert [t.text.endswith("{options}") for t in task.templates] == ([False, True] if lists else [False])


@pytest.mark.parametrize(
    ("outputs", "metric"),
    [
        (["yes"], "exact_match"),
        (["one two three"], "exact_match"),
        (["one two three four"], "rouge_l"),
        (["\u6f22" * 60], "rouge_l"),
        (["\u6f22" * 6], "exact_match"),
    ],
)
def test_metric_follows_the_length_of_answers(tmp_path, outputs, metric):
    write(tmp_path / "d", "train", [row("t", outputs=outputs)])
    assert parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)[0].metric == metric


def test_bigbench_is_refused_for_training_under_any_name(folder):
    write(folder, "heldout_bigbench", [row("bb", i, source="PyPI bigbench 1.0.0") for i in range(3)])
    assert "bb" not in {t.task_id for t in parquet_tasks(folder, num_tasks=None)}
    found = parquet_tasks(folder, num_tasks=None, include_bigbench=True)[-1]
    assert (found.task_id, found.role, found.training_allowed) == ("bb", "heldout", False)
    for origin in ({"source": "github google/BIG-bench"}, {"benchmark": "bigbench"}):
        write(folder, "train_more", [row("bb", **origin)])
        with pytest.raises(TaskError, match=r"'bb' .* may not be used for training"):
            parquet_tasks(folder, splits=("train", "train_more"), num_tasks=None)


def test_missing_folders_and_files(tmp_path, folder):
    with pytest.raises(TaskError, match="there is no folder"):
        parquet_tasks(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"holds no \.parquet file"):
        parquet_tasks(tmp_path / "empty")
    with pytest.raises(TaskError, match=r"has no heldout_noncommercial\.parquet; it has heldout, train, train_extra"):
        parquet_tasks(folder, include_noncommercial=True)
    assert [f.name for f in parquet_files(folder)] == ["train.parquet", "train_extra.parquet", "heldout.parquet"]


def test_fewer_tasks_than_asked_for(folder):
    with pytest.raises(ValueError, match=r"asked for 1000 training tasks, .* has 15"):
        parquet_tasks(folder)
    with pytest.raises(ValueError, match="asked for 0"):
        parquet_tasks(folder, num_tasks=0)


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_missing_or_mistyped_column_is_named(tmp_path, name):
    kinds = {n: pa.string() if kind == "string" else pa.list_(pa.string()) for n, kind in COLUMNS.items()}
    rows = [{k: v for k, v in row("t").items() if k != name}]
    write(tmp_path / "d", "train", rows, schema=pa.schema([(k, v) for k, v in kinds.items() if k != name]))
    with pytest.raises(TaskError, match=rf"train\.parquet has no column {name};"):
        parquet_tasks(tmp_path / "d", splits=("train",))
    wrong = pa.int64() if COLUMNS[name] == "string" else pa.string()
    table = pa.table({k: pa.array([None], wrong if k == name else v) for k, v in kinds.items()})
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    with pytest.raises(TaskError, match=f"column '{name}' is {wrong}, it must be {COLUMNS[name]}"):
        parquet_tasks(tmp_path / "d", splits=("train",))


def test_bad_content(tmp_path):
    def listed(rows, **options):
        write(tmp_path / "d", "train", rows, **options)
        return parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)

    with pytest.raises(TaskError, match="has no rows"):
        listed([])
    with pytest.raises(TaskError, match="1 rows name no task"):
        listed([row("t"), row(None)])
    with pytest.raises(TaskError, match="has tier 'huge'"):
        listed([row("t", tier="huge")])
    with pytest.raises(TaskError, match=r"'t', example 1 .* null text"):
        list(listed([row("t"), row("t", input=None)])[0].examples())
    with pytest.raises(TaskError, match=r"'t', example 0 .* null text"):
        list(listed([row("t", input=None, options=["a", "b"]), row("t", input=None, options=["a", "b"])])[0].examples())
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(TaskError, match="could not be read as parquet"):
        parquet_tasks(tmp_path / "d", splits=("train",))
    listed([row("t")])
    for lines, message in (
        (['{"task": "t"}'], "line 1: KeyError"),
        (["[1]"], "line 1: TypeError"),
        (['{"task": "t", "instructions": "Do it."}'], "line 1: task 't' has the instructions 'Do it.'; every line"),
        (['{"task": "t", "instructions": [1]}'], "line 1: task 't' has the instructions"),
        (['{"task": 3, "instructions": []}'], "line 1: task 3 has"),
        (['{"task": "t", "instructions": ["a"]}'] * 2, "line 2: task 't' stands on an earlier line too"),
    ):
        (tmp_path / "d" / "tasks.jsonl").write_text("\n".join(lines))
        with pytest.raises(TaskError, match=rf"tasks\.jsonl, {message}"):
            parquet_tasks(tmp_path / "d", splits=("train",))


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: "other"}, f"{name} is {row('t')[name]!r} in some .* and 'other' in others") for name in CONSTANT),
        ({"licence": None}, "licence is 'MIT' in some .* and None in others"),
        ({"options": ["a", "b"]}, "options is None in some .* and 'given' in others"),
    ],
)
def test_two_tasks_of_one_id_are_refused(tmp_path, changes, message, size):
    rows = [row("t"), row("u", category="x"), row("t", 1), row("t", 2, **changes)]
    write(tmp_path / "d", "train", rows, row_group_size=size)
    with pytest.raises(TaskError, match=rf"train\.parquet: two tasks have the id 't': {message}"):
        parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)
    write(tmp_path / "d", "train", [row("t"), row("t", instruction="Other words.")], row_group_size=size)
    assert len(parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)) == 1


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    from lightning_zeroprompt.data.compile import compile_tasks
    from lightning_zeroprompt.data.tokenizer import ByteTokenizer

    kinds = {n: pa.string() if kind == "string" else pa.list_(pa.string()) for n, kind in COLUMNS.items()}
    arrays = {n: pa.array([value], kinds[n]) for n, value in row("t").items()}
    arrays["input"] = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table(arrays), tmp_path / "d" / "train.parquet")
    tasks = parquet_tasks(tmp_path / "d", splits=("train",), num_tasks=None)
    with pytest.raises(TaskError, match="task 't': its source holds bytes that are not UTF-8"):
        compile_tasks(tasks, tmp_path / "c", tokenizer=ByteTokenizer(), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["d"]


def test_importing_the_module_imports_no_pyarrow():
    code = "import sys, lightning_zeroprompt.data.sources.parquet; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not (DATA / "train.parquet").is_file(),
    reason=f"no task data at {DATA}; set ZEROPROMPT_DATA to a folder that has train.parquet",
)
def test_real_folder():
    tasks = parquet_tasks(DATA, include_noncommercial=True)
    train = [task for task in tasks if task.role == "train"]
    assert len(train) == 1000
    assert sum(task.tier == 0 for task in train) == 784
    assert not {t.family for t in train} & {t.family for t in tasks if t.role == "heldout"}
    example = next(train[500].examples())
    assert train[500].templates[0].render(example).endswith(example.input)
