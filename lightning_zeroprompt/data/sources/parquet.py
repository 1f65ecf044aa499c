# SPDX-License-Identifier: Apache-2.0
"""Tasks from a folder of parquet files, one row an example.

Every row names its task and carries the task's attributes (columns in :data:`COLUMNS`), the same in all rows of the
task but for the instruction; ``tasks.jsonl`` beside the files may list more instructions a task. Files whose name
begins with ``train`` train, all others are held out. Tasks are chosen by tier (core before extra), inside a tier in one
seeded order of which every prefix holds its share of each category, so choices of different sizes are nested.

Listing reads each file once, row group by row group, and keeps only where each task's rows lie; compiling reads each
row group once more, as long as a task's rows lie together. 759,000 rows in five files take about 3 s to list.
``pyarrow`` is imported when a function is called.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_zeroprompt.data.mixture import stratified_order
from lightning_zeroprompt.data.task import Example, PromptTemplate, Role, Task, TaskError

__all__ = ["COLUMNS", "MAX_LISTED_OPTIONS", "parquet_files", "parquet_tasks"]

COLUMNS = {
    "task": "string",
    "family": "string",
    "category": "string",
    "language": "string",
    "tier": "string",
    "benchmark": "string",
    "source": "string",
    "licence": "string",
    "instruction": "string",
    "input": "string",
    "outputs": "list of string",
    "options": "list of string",
}
"""Columns of every file and their types."""
MAX_LISTED_OPTIONS = 32
"""Larger label sets get no template that lists them: a prompt of 150 intents would be nearly all options."""

_TIERS = {"core": 0, "extra": 1}
_ATTRIBUTES = [name for name, kind in COLUMNS.items() if kind == "string" and name not in ("task", "input")]
# One task may have several instructions; in everything else its rows agree.
_CONSTANT = [name for name in _ATTRIBUTES if name != "instruction"]
_SAMPLE = 512


@dataclasses.dataclass(slots=True)
class _Found:
    """What listing learns of a task, and where its rows lie: (row group, first, end)."""

    first: dict[str, Any]
    file: "_File"
    pieces: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    lengths: list[float] = dataclasses.field(default_factory=list)
    labels: set[frozenset[str]] = dataclasses.field(default_factory=set)
    has_free: bool = False
    has_choice: bool = False
    num_rows: int = 0
    num_listing: int = 0


class _File:
    """A parquet file, read one row group at a time; the latest of all files stays in memory for the next task."""

    def __init__(self, path: Path, latest: dict[tuple[Path, int], Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise TaskError(f"{path} could not be read as parquet ({error}); download or write it again") from None
        self._check_columns()
        self._latest = latest

    def _check_columns(self) -> None:
        import pyarrow as pa

        schema = self._file.schema_arrow
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            raise TaskError(
                f"{self.path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}; rename or add the "
                f"columns"
            )
        for name, expected in COLUMNS.items():
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            wants_list = expected != "string"
            if wants_list and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                kind, wants_list = kind.value_type, False
            if wants_list or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise TaskError(
                    f"{self.path}: column {name!r} is {schema.field(name).type}, it must be {expected}; convert it"
                )
        if self._file.metadata.num_rows == 0:
            raise TaskError(f"{self.path} has no rows; remove the file or fill it")

    def _group(self, index: int) -> Any:
        key = (self.path, index)
        if key not in self._latest:
            self._latest.clear()
            self._latest[key] = self._file.read_row_group(index, columns=list(COLUMNS))
        return self._latest[key]

    def index(self) -> dict[str, _Found]:
        """Tasks in the order of their first rows."""
        found: dict[str, _Found] = {}
        for group in range(self._file.metadata.num_row_groups):
            table = self._group(group)
            if not table.num_rows:
                continue
            codes = table["task"].combine_chunks().dictionary_encode()
            names = codes.dictionary.to_pylist()
            if codes.null_count:
                raise TaskError(f"{self.path}: {codes.null_count} rows name no task; fill the column 'task'")
            numbers = codes.indices.to_numpy()
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for start, end in itertools.pairwise(edges):
                name = names[numbers[start]]
                rows = table.slice(start, end - start)
                if name not in found:
                    found[name] = _Found(first=rows.select(_ATTRIBUTES).slice(0, 1).to_pylist()[0], file=self)
                found[name].pieces.append((group, start, end))
                _learn(found[name], rows)
            self._refuse_merged(found, table)
        return found

    def _refuse_merged(self, found: Mapping[str, _Found], table: Any) -> None:
        """Rows of one id that describe different tasks."""
        for record in table.group_by(["task", *_CONSTANT]).aggregate([]).to_pylist():
            name, first = record["task"], found[record["task"]]
            values = [(key, first.first[key], record[key]) for key in _CONSTANT if first.first[key] != record[key]]
            if first.has_free and first.has_choice:
                values.append(("options", None, "given"))
            if values:
                key, one, other = values[0]
                raise TaskError(
                    f"{self.path}: two tasks have the id {name!r}: {key} is {one!r} in some of its rows and {other!r} "
                    "in others; give each task an id of its own"
                )

    def examples(self, task: str, pieces: Sequence[tuple[int, int, int]]) -> Iterator[Example]:
        """Examples of one task."""
        row = 0
        for group, start, end in pieces:
            rows = self._group(group).slice(start, end - start).select(["input", "outputs", "options"])
            columns = (rows[name].to_pylist() for name in ("input", "outputs", "options"))
            for text, outputs, options in zip(*columns, strict=True):
                if text is None or outputs is None or None in outputs or (options is not None and None in options):
                    raise TaskError(
                        f"task {task!r}, example {row} in {self.path} has a null text; remove or fill the row"
                    )
                yield Example(input=text, outputs=tuple(outputs), options=None if options is None else tuple(options))
                row += 1


def _learn(found: _Found, rows: Any) -> None:
    import pyarrow.compute as pc

    found.num_rows += rows.num_rows
    found.has_free |= rows["options"].null_count > 0
    found.has_choice |= rows["options"].null_count < rows.num_rows
    if not found.has_free:
        found.num_listing += pc.sum(pc.match_substring(rows["input"], "Options:"), min_count=0).as_py()
        # A third distinct set adds nothing to "not closed".
        for options in rows["options"].to_pylist():
            found.labels.add(frozenset(options))
            if len(found.labels) > 1:
                break
    for outputs in rows["outputs"].slice(0, max(_SAMPLE - len(found.lengths), 0)).to_pylist():
        if outputs and outputs[0]:
            # Twelve characters count as a word, for scripts that write no spaces.
            found.lengths.append(max(len(outputs[0].split()), len(outputs[0]) / 12))


def parquet_files(
    path: str | Path,
    *,
    splits: Sequence[str] = ("train", "train_extra", "heldout"),
    include_noncommercial: bool = False,
    include_bigbench: bool = False,
) -> list[Path]:
    """The files that :func:`parquet_tasks` reads with these arguments, ``tasks.jsonl`` last where it is there.

    Raises:
        TaskError: The folder is missing, holds no parquet file, or lacks one that was asked for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}; give the folder that holds the parquet files")
    present = sorted(file.stem for file in folder.glob("*.parquet"))
    if not present:
        raise TaskError(
            f"{folder} holds no .parquet file; give the folder that holds train.parquet and heldout.parquet"
        )
    names = [*splits]
    names += ["heldout_noncommercial"] * include_noncommercial + ["heldout_bigbench"] * include_bigbench
    missing = [name for name in names if name not in present]
    if missing:
        raise TaskError(f"{folder} has no {', '.join(f'{n}.parquet' for n in missing)}; it has {', '.join(present)}")
    files = [folder / f"{name}.parquet" for name in dict.fromkeys(names)]
    return [*files, folder / "tasks.jsonl"] if (folder / "tasks.jsonl").is_file() else files


def _instructions(path: Path) -> dict[str, list[str]]:
    instructions: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        expected = "every line is an object with 'task', a text, and 'instructions', a list of texts"
        try:
            record = json.loads(line)
            name, texts = record["task"], record["instructions"]
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(f"{path}, line {number}: {type(error).__name__} {error}; {expected}") from None
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TaskError(f"{path}, line {number}: task {name!r} has the instructions {texts!r}; {expected}")
        if name in instructions:
            raise TaskError(f"{path}, line {number}: task {name!r} stands on an earlier line too; keep one of them")
        instructions[name] = texts
    return instructions


def _task(name: str, found: _Found, role: Role, instructions: Sequence[str]) -> Task:
    first = {key: value or "" for key, value in found.first.items()}
    texts = list(dict.fromkeys(text.strip() for text in instructions if text.strip())) or [first["instruction"]]
    closed = not found.has_free and len(found.labels) == 1
    size = len(next(iter(found.labels))) if closed else 0
    lists_options = 2 <= size <= MAX_LISTED_OPTIONS and found.num_listing < found.num_rows / 2
    templates = [PromptTemplate.from_instruction(text, name=f"instruction-{i}") for i, text in enumerate(texts)]
    if lists_options:
        templates += [
            PromptTemplate.from_instruction(text, name=f"instruction-{i}-options", with_options=True)
            for i, text in enumerate(texts)
        ]
    if first["tier"] not in _TIERS:
        raise TaskError(
            f"{found.file.path}: task {name!r} has tier {first['tier']!r}; known tiers: {', '.join(_TIERS)}"
        )
    named = (found.file.path.stem + first["source"] + first["benchmark"]).lower()
    is_bigbench = "bigbench" in named.replace("-", "").replace("_", "").replace(" ", "")
    return Task(
        task_id=name,
        category=first["category"],
        family=first["family"],
        templates=tuple(templates),
        examples=functools.partial(found.file.examples, name, tuple(found.pieces)),
        role=role,
        metric="exact_match" if found.lengths and statistics.median(found.lengths) <= 3 else "rouge_l",
        source=first["source"],
        language=first["language"],
        licence=first["licence"] or "unstated",
        tier=_TIERS[first["tier"]],
        benchmark="" if role == "train" else first["benchmark"],
        training_allowed=not is_bigbench,
    )


def parquet_tasks(
    path: str | Path,
    *,
    splits: Sequence[str] = ("train", "train_extra", "heldout"),
    num_tasks: int | None = 1000,
    seed: int = 0,
    include_noncommercial: bool = False,
    include_bigbench: bool = False,
) -> list[Task]:
    """List the tasks of a folder of parquet files.

    Each instruction becomes a template. Where the answer is one of a closed label set that the input does not list,
    each also becomes one that lists the options (FLAN trains on both). Free answers are scored by exact match where
    they have a median of three words or fewer, else by ROUGE-L.

    Args:
        path: The folder.
        splits: Names of files without ``.parquet``; ``train*`` train, others are held out.
        num_tasks: Training tasks to choose, core tasks first; None takes all.
        seed: Seeds the choice.
        include_noncommercial: Also list ``heldout_noncommercial``.
        include_bigbench: Also list ``heldout_bigbench`` (evaluation only; BIG-bench is refused for training anywhere).

    Returns:
        Chosen training tasks in the order of the files, then the held-out ones; no example text is kept.

    Raises:
        TaskError: The folder, a file or a column is missing or of a wrong type, or BIG-bench stands among the training
            files.
        ValueError: Fewer training tasks than asked for, or fewer than one asked for.
    """
    files = parquet_files(
        path, splits=splits, include_noncommercial=include_noncommercial, include_bigbench=include_bigbench
    )
    instructions = _instructions(files[-1]) if files[-1].suffix == ".jsonl" else {}
    train: list[Task] = []
    heldout: list[Task] = []
    latest: dict[tuple[Path, int], Any] = {}
    for file in files:
        if file.suffix != ".parquet":
            continue
        role: Role = "train" if file.stem.startswith("train") else "heldout"
        try:
            found = _File(file, latest).index()
        except UnicodeDecodeError as error:
            raise TaskError(f"{file} holds text that is not UTF-8 ({error.reason}); write it again as UTF-8") from None
        for name, entry in found.items():
            task = _task(name, entry, role, instructions.get(name, ()))
            task.check()
            (train if role == "train" else heldout).append(task)
    if num_tasks is None:
        return train + heldout
    if not 1 <= num_tasks <= len(train):
        raise ValueError(
            f"asked for {num_tasks} training tasks, {path} has {len(train)}; ask for 1 to {len(train)} or add files"
        )
    order = stratified_order([(task.tier, task.category) for task in train], np.random.default_rng([seed, 0x5A17]))
    return [train[number] for number in sorted(order[:num_tasks])] + heldout
