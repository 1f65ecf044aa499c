# SPDX-License-Identifier: Apache-2.0
"""The command zeroprompt-data: each subcommand, and one line on stderr with exit code 2 for bad input."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_zeroprompt.cli.data import main
from lightning_zeroprompt.data.corpus import Corpus

COMPILE = ["compile", "--source", "builtin", "--tokenizer", "byte", "--num-tasks", "30", "--examples-per-task", "40"]
COMPILE += ["--max-examples-per-task", "20", "--max-heldout-examples", "5", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "corpus"
    main([*COMPILE, "--out", str(out)])
    return out


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_compile_says_what_it_did_and_reuses(folder, capsys):
    corpus = Corpus.open(folder)
    assert sum(task.role == "train" for task in corpus.tasks) == 30
    assert max(task.num_train_rows for task in corpus.tasks) <= 20
    arguments = [*COMPILE, "--out", str(folder)]
    main(arguments)
    printed = capsys.readouterr().out
    assert f"{corpus.counts['rows']:,} rows" in printed
    assert f"caps {corpus.counts['capped']:,}" in printed
    assert "30 training tasks" in printed
    assert corpus.fingerprint[:16] in printed
    message = fails(capsys, *arguments, "--max-input-tokens", 9)
    assert "other settings (max_input_tokens: there 1024, asked for 9)" in message


def test_compile_shows_a_bar(tmp_path, capsys):
    main(
        ["compile", "--source", "builtin", "--out", str(tmp_path / "c"), "--num-tasks", "5", "--examples-per-task", "5"]
    )
    assert "bpe" in (tmp_path / "c" / "tokenizer.json").read_text()[:40]


def test_verify(folder, capsys, tmp_path):
    main(["verify", str(folder)])
    assert Corpus.open(folder).fingerprint in capsys.readouterr().out
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = bytearray((copy / "row_label.npy").read_bytes())
    content[-1] ^= 3
    (copy / "row_label.npy").write_bytes(content)
    assert "the content of row_label.npy differs" in fails(capsys, "verify", copy)


def test_describe(folder, capsys):
    main(["describe", str(folder)])
    printed = capsys.readouterr().out
    corpus = Corpus.open(folder)
    for category in {task.category for task in corpus.tasks}:
        assert category in printed
    assert "CC0-1.0" in printed
    assert f"{corpus.counts['tokens']:,} tokens" in " ".join(printed.split())
    (total,) = {line.split()[1] for line in printed.splitlines() if line.strip().startswith("all ")}
    assert total == "30"


def test_mixture(folder, capsys):
    main(["mixture", str(folder), "--num-tasks", "12", "--draws", "3072", "--show", "3"])
    printed = capsys.readouterr().out
    assert "12 tasks, 3,072 draws" in printed
    worst = float(re.search(r"largest difference .*: ([0-9.]+)", printed)[1])
    assert 0 <= worst < 3
    assert "training on 12 training tasks" in printed
    main(["mixture", str(folder), "--max-per-class", "all", "--temperature", "2", "--draws", "512", "--denoising", "0"])
    assert "span corruption: target 0.000, 0.000 of 512 draws" in capsys.readouterr().out
    corpus = Corpus.open(folder)
    category = next(task.category for task in corpus.tasks if task.role == "train")
    out = {task.task_id for task in corpus.tasks if task.category == category}
    arguments = ["mixture", str(folder), "--holdout-categories", category, "--draws", "30", "--no-class-balance"]
    main([*arguments, "--denoising", "0.9", "--max-per-task", "3", "--show", "99"])
    lines = capsys.readouterr().out.splitlines()
    share = float(re.search(r"target 0.900, ([0-9.]+) of 30 draws", "\n".join(lines))[1])
    assert share > 0.6
    assert not out & {word for line in lines for word in line.split()}
    assert "hold-out category 'x' is unknown" in fails(capsys, "mixture", folder, "--holdout-categories", "x")
    assert "denoising is 1.0" in fails(capsys, "mixture", folder, "--denoising", 1)
    assert "max_per_task is 0" in fails(capsys, "mixture", folder, "--max-per-task", 0)
    for draws in (-3, 0):
        assert f"--draws is {draws}" in fails(capsys, "mixture", folder, "--draws", draws)
    assert "asked for 31 training tasks" in fails(capsys, "mixture", folder, "--num-tasks", 31)


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "no compiled corpus" in fails(capsys, "describe", tmp_path / "nothing")
    assert "there is no folder" in fails(
        capsys,
        "compile",
        "--source",
        "parquet",
        "--path",
        tmp_path / "x",
        "--out",
        tmp_path / "c",
        "--tokenizer",
        "byte",
    )
    assert "max_examples_per_task is 0" in fails(
        capsys,
        "compile",
        "--source",
        "builtin",
        "--out",
        tmp_path / "c",
        "--tokenizer",
        "byte",
        "--max-examples-per-task",
        0,
    )
    assert "no KEY=VALUE" in fails(
        capsys, "compile", "--source", "hub", "--path", tmp_path / "m", "--out", tmp_path / "c", "--load", "x"
    )
    assert not (tmp_path / "c").exists()
    with pytest.raises(SystemExit):
        main(["nonsense"])


def test_hub_and_promptsource_through_the_command(tmp_path, capsys):
    rows = [{"inputs_pretokenized": f"q{i}", "targets_pretokenized": "a", "answer_choices": None} for i in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        "load: {path: json, name: no, data_files: y}\ninput: inputs_pretokenized\noutput: targets_pretokenized\n"
    )
    load = ["--load", "data_files=x.jsonl", "--load", "name=null", "--load", f"cache_dir={tmp_path / 'cache'}"]
    common = ["--tokenizer", "byte", "--quiet"]
    main(["compile", "--source", "hub", "--path", str(mapping), "--out", str(tmp_path / "c"), *load, *common])
    assert Corpus.open(tmp_path / "c").counts["rows"] == 3
    capsys.readouterr()
    arguments = ["compile", "--source", "promptsource", "--path", tmp_path, "--out", tmp_path / "d", *common]
    assert "needs the option data_folder" in fails(capsys, *arguments)
    assert "m.yaml has no templates" in fails(capsys, *arguments, "--data", _data(tmp_path))


def _data(folder):
    (folder / "m").mkdir()
    pq.write_table(pa.table({"a": ["b"]}), folder / "m" / "validation.parquet")
    return folder
