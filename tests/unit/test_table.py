# SPDX-License-Identifier: Apache-2.0
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_zeroprompt.data.sources.table import read_table
from lightning_zeroprompt.data.task import Example, TaskError


def test_a_csv_keeps_texts_as_they_are(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text('text,label,more\n"a, ""b""\nc",1,x\n 007,0,\nNA,,y\n')
    found = read_table(path, input_column="text", output_column="label", options=["0", "1"])
    assert found == [
        Example(input='a, "b"\nc', outputs=("1",), options=("0", "1"), fields={"more": "x"}),
        Example(input=" 007", outputs=("0",), options=("0", "1"), fields={"more": ""}),
        Example(input="NA", outputs=(), options=("0", "1"), fields={"more": "y"}),
    ]


def test_options_of_each_row_and_several_outputs(tmp_path):
    (tmp_path / "own.tsv").write_text("input\toutput\tchoices\nq\tb;c\ta; b ;c\n")
    (found,) = read_table(tmp_path / "own.tsv", options="choices", separator=";")
    assert found == Example(input="q", outputs=("b", "c"), options=("a", "b", "c"))
    table = pa.table({"input": ["q"], "output": [["b", "c"]], "choices": [["a", "b", "c"]]})
    pq.write_table(table, tmp_path / "own.parquet")
    assert read_table(tmp_path / "own.parquet", options="choices") == [found]
    (free,) = read_table(tmp_path / "own.tsv", output_column="none")
    assert free == Example(input="q", outputs=(), fields={"output": "b;c", "choices": "a; b ;c"})


@pytest.mark.parametrize(
    ("name", "content", "more", "match"),
    [
        ("a.txt", "x", {}, "no .csv, .tsv or .parquet file"),
        ("a.csv", None, {}, "could not be read"),
        ("a.csv", "", {}, "could not be read"),
        ("a.parquet", "x", {}, "could not be read"),
        ("a.csv", "text\nx\n", {}, "has no column 'input'; it has 'text'"),
        ("a.csv", "input\nx\n", {"options": "choices"}, "has no column 'choices'"),
        ("a.csv", "input,output\nx,y\n ,z\n", {}, "row 1: the column 'input' is empty"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, content, more, match):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(TaskError, match=match):
        read_table(path, **more)
