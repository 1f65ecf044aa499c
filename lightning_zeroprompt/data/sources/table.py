# SPDX-License-Identifier: Apache-2.0
"""Examples from one CSV or parquet file: a row an example, for a task of one's own.

``pyarrow`` reads the file and is imported when the function is called. A CSV has no lists, so options and several right
outputs of a row are texts with a separator between them. An empty cell is no answer: the row is unlabelled.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_zeroprompt.data.task import Example, TaskError

__all__ = ["read_table"]


def read_table(
    path: str | Path,
    *,
    input_column: str = "input",
    output_column: str = "output",
    options: Sequence[str] | str | None = None,
    separator: str = "|",
) -> list[Example]:
    """Read a table of examples.

    Args:
        path: A ``.csv``, ``.tsv`` or ``.parquet`` file.
        input_column: The text to work on.
        output_column: The right answer, or several; may be missing where no row is labelled.
        options: The answer choices of every row, or the name of a column with each row's own; None: free answers.
        separator: Between options, and between outputs, in a text cell.

    Returns:
        Examples in the file's order. All other columns are fields, which templates may name.

    Raises:
        TaskError: The file cannot be read, lacks a column, or a row has no input.
    """
    path = Path(path)
    rows = _read(path)
    columns = list(rows[0]) if rows else []
    wanted = [input_column, *([options] if isinstance(options, str) else [])]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise TaskError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, columns)) or 'no rows'}")
    return [
        _example(path, number, row, input_column, output_column, options, separator) for number, row in enumerate(rows)
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        elif path.suffix in (".csv", ".tsv"):
            # Labels such as 1 and 0 stay the texts that they are.
            names = csv.open_csv(path, parse_options=csv.ParseOptions(delimiter="," if path.suffix == ".csv" else "\t"))
            types = dict.fromkeys(names.schema.names, pyarrow.string())
            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(
                    delimiter="," if path.suffix == ".csv" else "\t", newlines_in_values=True
                ),
                convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
            )
        else:
            raise TaskError(f"{path} is no .csv, .tsv or .parquet file; give one of these")
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise TaskError(
            f"{path} could not be read ({' '.join(str(error).split())}); check the path and the file"
        ) from None
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _example(
    path: Path,
    number: int,
    row: Mapping[str, Any],
    input_column: str,
    output_column: str,
    options: Sequence[str] | str | None,
    separator: str,
) -> Example:
    given = row[input_column]
    text = "" if given is None else str(given)
    if not text.strip():
        raise TaskError(f"{path}, row {number}: the column {input_column!r} is empty; every example needs an input")
    choices = _texts(row[options], separator) if isinstance(options, str) else tuple(options or ())
    used = {input_column, output_column, *([options] if isinstance(options, str) else [])}
    return Example(
        input=text,
        outputs=_texts(row.get(output_column), separator),
        options=choices or None,
        fields={name: "" if value is None else str(value) for name, value in row.items() if name not in used},
    )


def _texts(cell: Any, separator: str) -> tuple[str, ...]:
    parts = cell if isinstance(cell, list | tuple) else [] if cell is None else str(cell).split(separator)
    return tuple(text for part in parts if (text := str(part).strip()))
