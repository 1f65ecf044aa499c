# SPDX-License-Identifier: Apache-2.0
"""Examples from one CSV or parquet file with columns of the user's own, for a prompt search on a task of theirs.

A folder of many tasks in this project's columns is read by :mod:`~lightning_zeroprompt.data.sources.parquet`; here one
file is one task, and what is not the answer or its options is a field that templates may name. The file is read whole:
a search uses some hundred rows. ``pyarrow`` reads both formats and is imported when the function is called.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_zeroprompt.data.task import INPUT, OPTIONS, Example, TaskError

__all__ = ["read_examples"]


def read_examples(
    path: str | Path,
    *,
    input_column: str = "input",
    output_column: str | None = "output",
    options_column: str | None = None,
    labels: Sequence[str] | None = None,
) -> list[Example]:
    """Read the rows of a file as examples; numbers are read as text, as they stand in a CSV.

    Args:
        path: A file that ends in ``.csv`` or ``.parquet``, with a header.
        input_column: The text to work on.
        output_column: The answer, a text or a list of right texts; an empty cell is an unlabelled row, and None says
            that no row is labelled. Unlabelled rows need options.
        options_column: A list of answer choices a row (parquet).
        labels: The answer choices of every row, where they are the same.

    Returns:
        One example a row; every further column is a field.

    Raises:
        TaskError: The file is missing or cannot be read, a column is missing, a text is missing, both or none of two
            ways to say the options are given where one is needed, or a column has a placeholder's name.
    """
    file = Path(path)
    if labels is not None and options_column is not None:
        raise TaskError(f"{file}: labels and options_column={options_column!r} are both given; give one of them")
    columns = _columns(file)
    named = [name for name in (input_column, output_column, options_column) if name is not None]
    missing = [name for name in named if name not in columns]
    if missing:
        raise TaskError(f"{file} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    fields = [name for name in columns if name not in named]
    taken = [name for name in fields if name in (INPUT, OPTIONS) or not name.isidentifier()]
    if taken:
        raise TaskError(f"{file}: column {taken[0]!r} cannot be a template's placeholder; rename or drop it")
    if not columns[input_column]:
        raise TaskError(f"{file} has no rows; give at least one")
    return [
        _example(file, number, columns, (input_column, output_column, options_column), fields, labels)
        for number in range(len(columns[input_column]))
    ]


def _columns(file: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    if not file.is_file():
        raise TaskError(f"there is no file {file}; give a .csv or .parquet file")
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                kinds = {name: pa.string() for name in next(csv.reader(stream), [])}
            options = pa_csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, null_values=[""])
            # A text may hold line breaks inside quotes.
            table = pa_csv.read_csv(
                file, parse_options=pa_csv.ParseOptions(newlines_in_values=True), convert_options=options
            )
        else:
            raise TaskError(f"{file} ends in {file.suffix!r}; give a .csv or .parquet file")
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise TaskError(f"{file} could not be read ({error}); write it again as UTF-8 with a header") from None
    return {name: table[name].to_pylist() for name in table.column_names}


def _example(
    file: Path,
    number: int,
    columns: Mapping[str, list[Any]],
    named: tuple[str, str | None, str | None],
    fields: Sequence[str],
    labels: Sequence[str] | None,
) -> Example:
    input_column, output_column, options_column = named
    text = columns[input_column][number]
    answer = None if output_column is None else columns[output_column][number]
    listed = labels if options_column is None else columns[options_column][number]
    if text is None:
        raise TaskError(f"{file}, row {number}: column {input_column!r} is empty; fill it or drop the row")
    if options_column is not None and not isinstance(listed, list):
        raise TaskError(f"{file}, row {number}: column {options_column!r} is {listed!r}; give a list of texts")
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    options = None if listed is None else tuple(str(option) for option in listed)
    if not answers and options is None:
        raise TaskError(
            f"{file}, row {number} has neither an answer nor options; fill column {output_column!r} or give labels"
        )
    return Example(
        input=str(text),
        outputs=tuple(str(one) for one in answers),
        options=options,
        fields={name: "" if columns[name][number] is None else str(columns[name][number]) for name in fields},
    )
