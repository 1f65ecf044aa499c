# SPDX-License-Identifier: Apache-2.0
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_zeroprompt.data.sources.table import read_examples
from lightning_zeroprompt.data.task import Example, TaskError


def write(tmp_path, text):
    file = tmp_path / "task.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_csv_is_read_as_text_with_fields_and_unlabelled_rows(tmp_path):
    file = write(tmp_path, 'input,source,output\n"two\nlines, here",1.50,yes\n007,,\n')
    assert read_examples(file, labels=["yes", "no"]) == [
        Example(input="two\nlines, here", outputs=("yes",), options=("yes", "no"), fields={"source": "1.50"}),
        Example(input="007", outputs=(), options=("yes", "no"), fields={"source": ""}),
    ]
    latin = tmp_path / "latin.csv"
    latin.write_bytes("input,output\ncaf\u00e9,x\n".encode("latin-1"))
    with pytest.raises(TaskError, match="could not be read"):
        read_examples(latin)
    free = read_examples(write(tmp_path, "q,a\nwhy,because\n"), input_column="q", output_column="a")
    assert free == [Example(input="why", outputs=("because",))]


def test_a_parquet_file_may_hold_lists(tmp_path):
    file = tmp_path / "task.parquet"
    columns = {"text": ["a", "b"], "right": [["x", "y"], None], "choices": [["x", "z"], ["p", "q", "r"]]}
    pq.write_table(pa.table(columns), file)
    assert read_examples(file, input_column="text", output_column="right", options_column="choices") == [
        Example(input="a", outputs=("x", "y"), options=("x", "z")),
        Example(input="b", outputs=(), options=("p", "q", "r")),
    ]


@pytest.mark.parametrize(
    ("text", "settings", "wording"),
    [
        ("text,output\na,b\n", {}, "no column input; it has text, output"),
        ("input,output\n,b\n", {}, "row 0: column 'input' is empty"),
        ("input,output\na,\n", {}, "row 0 has neither an answer nor options"),
        ("input,output,my field\na,b,c\n", {}, "column 'my field' cannot be"),
        ("input,output,options\na,b,c\n", {}, "column 'options' cannot be"),
        ("input,output,o\na,b,c\n", {"options_column": "o"}, "is 'c'; give a list"),
        ("input,output\na,b\n", {"options_column": "output", "labels": ["b"]}, "both given"),
        ("input,output\n", {}, "no rows"),
        ("", {}, "could not be read"),
        ("input,output\na,b,c\n", {}, "could not be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, settings, wording):
    with pytest.raises(TaskError, match=wording):
        read_examples(write(tmp_path, text), **settings)


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TaskError, match="no file"):
        read_examples(tmp_path / "none.csv")
    other = tmp_path / "task.xlsx"
    other.write_bytes(b"x")
    with pytest.raises(TaskError, match=r"ends in '\.xlsx'"):
        read_examples(other)
