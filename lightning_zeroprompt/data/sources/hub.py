# SPDX-License-Identifier: Apache-2.0
"""Tasks from any Hugging Face dataset, described by a mapping of its columns.

A mapping is a YAML file (or the same as a dict). ``load`` goes to ``datasets.load_dataset`` as it stands, so names on
the hub and local files (``path: json``, ``data_files: ...``) work alike. Every other entry is the name of a column, or
``{value: ...}`` for a constant. Example::

    load: {path: json, data_files: reviews.jsonl, split: train}
    task_id: {value: reviews}
    category: {value: sentiment}
    instructions: {value: ["Is this review good or bad?"]}
    input: text                    # or a list of columns, joined by line breaks
    output: label                  # a text, a list of texts, or a number among the options
    options: {value: [bad, good]}  # a ClassLabel column needs none
    fields: {text: text}           # further columns for templates
    templates: [{name: short, text: "{text} Good or bad?"}]

``per_file: true`` makes each local data file a task named after it, ``instances`` names a column of nested examples
    (both as in
Super-NaturalInstructions); a list under ``load: {name: ...}`` makes each configuration a task (as in P3). Rows are
grouped by ``task_id``. ``datasets`` is imported when a function is called; it keeps its own cache of what it converted,
and only the dataset in use stays open, so 1,600 files do not mean 1,600 handles.
"""

import collections
import dataclasses
import functools
import glob
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_zeroprompt.data.task import Example, Metric, PromptTemplate, Role, Task, TaskError

__all__ = ["KEYS", "hub_tasks", "local_files", "read_mapping"]

KEYS: dict[str, str] = {
    "load": "arguments of datasets.load_dataset",
    "per_file": "true: each data file is a task",
    "where": "column: value that a row must have",
    "task_id": "names the task of a row",
    "category": "task type",
    "family": "tasks of one corpus; the task's id by default",
    "language": "language tag",
    "licence": "licence of the examples",
    "domain": "content domain",
    "benchmark": "evaluation set",
    "source": "where it comes from",
    "instructions": "a text or list of texts, each a template with the input below",
    "templates": "list of {name, text[, role, option_separator]}",
    "instances": "column with a list of nested examples",
    "input": "column or list of columns",
    "output": "column: text, list of texts, or index into the options",
    "options": "column or constant: the answer choices",
    "fields": "field name: column",
    "strip": "true: strip spaces around inputs, outputs and options",
    "role": "train or heldout",
    "metric": "exact_match or rouge_l",
}
"""Entries of a mapping and what they mean."""

_log = logging.getLogger(__name__)
_TEXTS = ("category", "family", "language", "licence", "domain", "benchmark", "source")


def _is_text(given: Any) -> bool:
    return isinstance(given, str)


def _is_texts(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list) and all(map(_is_text, given)))


def _is_words(given: Any) -> bool:
    # YAML reads yes, no, on and off as truth values, and no prompt means to offer True and False for them.
    return isinstance(given, list) and all(isinstance(w, str | int) and not isinstance(w, bool) for w in given)


def _is_scalar(given: Any) -> bool:
    return isinstance(given, str | int | float)


def _is_column(given: Any, fits: Callable[[Any], bool] = lambda _: True) -> bool:
    """A column's name, or ``{value: ...}`` with a constant that fits."""
    return isinstance(given, str) or (isinstance(given, Mapping) and set(given) == {"value"} and fits(given["value"]))


def _is_named(given: Any, fits: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) and fits(value) for name, value in given.items())


def _is_template(given: Any) -> bool:
    known = {field.name for field in dataclasses.fields(PromptTemplate)}
    if not isinstance(given, Mapping) or not {"name", "text"} <= set(given) <= known:
        return False
    return all(_is_words(value) if name == "verbalizer" else _is_text(value) for name, value in given.items())


_COLUMN = "a column name or {value: ...}"
_BOOL = ("true or false", lambda given: isinstance(given, bool))
_SCALAR = (f"{_COLUMN} with a text", functools.partial(_is_column, fits=_is_scalar))
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "load.path": ("a text", _is_text),
    "load.split": ("a text", _is_text),
    "load.data_dir": ("a text", _is_text),
    "load.name": ("a text or a list of texts", _is_texts),
    "load.data_files": (
        "a file, a list of files or a mapping of splits to files",
        lambda given: _is_texts(given) or _is_named(given, _is_texts),
    ),
    "per_file": _BOOL,
    "where": ("a mapping of columns to values", _is_named),
    "task_id": _SCALAR,
    **dict.fromkeys(_TEXTS, _SCALAR),
    "instructions": (
        f"{_COLUMN} with a text or a list of texts",
        functools.partial(_is_column, fits=_is_texts),
    ),
    "templates": (
        "a list of templates; each needs name and text, and may have role, option_separator, instruction (all texts) "
        "and verbalizer (a list of words)",
        lambda given: isinstance(given, list) and all(map(_is_template, given)),
    ),
    "instances": ("a column name", _is_text),
    "input": (
        f"{_COLUMN}, or a list of them",
        lambda given: all(map(_is_column, given)) if isinstance(given, list) and given else _is_column(given),
    ),
    "output": (_COLUMN, _is_column),
    "options": (
        f"{_COLUMN} with a list of words (yes, no, on and off in quotes)",
        functools.partial(_is_column, fits=_is_words),
    ),
    "fields": ("a mapping of field names to columns", functools.partial(_is_named, fits=_is_column)),
    "strip": _BOOL,
    "role": ("train or heldout", lambda given: given in get_args(Role)),
    "metric": ("exact_match or rouge_l", lambda given: given in get_args(Metric)),
}
"""What an entry must be, in words and as a test."""


def _check_types(where: str, mapping: Mapping[str, Any]) -> None:
    entries = {**mapping, **{f"load.{key}": value for key, value in mapping["load"].items()}}
    for key, (expected, fits) in _TYPES.items():
        if key in entries and not fits(entries[key]):
            raise TaskError(f"{where}: entry {key!r} must be {expected}, not {entries[key]!r}")
    if mapping.get("per_file") and not _is_texts(entries.get("load.data_files", "")):
        raise TaskError(f"{where}: with per_file, entry 'load.data_files' must be a file or a list of files")
    try:
        json.dumps(mapping["load"], sort_keys=True)
    except TypeError as error:
        raise TaskError(
            f"{where}: entry 'load' has a value that is no text, number or list ({error}); quote it"
        ) from None


def read_mapping(mapping: str | Path | Mapping[str, Any], load: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read and check a mapping; data files that are not found from here are looked for beside the YAML file.

    Args:
        mapping: A YAML file or its content.
        load: Replaces entries of the mapping's ``load``; None removes an entry.

    Raises:
        TaskError: The file is missing or not YAML, an entry is unknown or of a wrong type, or a needed one is missing.
    """
    import yaml

    where = "the mapping"
    content: Any = mapping
    folder = None
    if not isinstance(mapping, Mapping):
        path = Path(mapping)
        where, folder = str(path), path.parent
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TaskError(f"there is no mapping {path}; give a YAML file such as conf/mappings/p3.yaml") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TaskError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise TaskError(f"{where} must be a mapping with the entries {', '.join(KEYS)}")
    content = {key: value for key, value in content.items() if value is not None}
    unknown = sorted(map(str, set(content) - set(KEYS)))
    if unknown:
        raise TaskError(f"{where} has the unknown entry {', '.join(unknown)}; known: {', '.join(KEYS)}")
    missing = [key for key in ("load", "input", "output") if key not in content]
    if not isinstance(content.get("load"), Mapping) or "path" not in content["load"]:
        missing.append("load: {path: ...}")
    if missing:
        raise TaskError(f"{where} lacks {', '.join(dict.fromkeys(missing))}")
    checked = dict(content)
    merged = {**checked["load"], **(load or {})}
    checked["load"] = {key: value for key, value in merged.items() if value is not None}
    _check_types(where, checked)
    files = checked["load"].get("data_files")
    if folder is not None and isinstance(files, str | list) and not _folders(checked["load"]):
        names = [files] if isinstance(files, str) else files
        local = [name if "://" in name or glob.glob(name) else str(folder / name) for name in names]
        checked["load"] = {**checked["load"], "data_files": local}
    return checked


def _folders(load: Mapping[str, Any]) -> list[Path]:
    return [Path(load[key]) for key in ("path", "data_dir") if key in load and Path(load[key]).is_dir()]


def _local(load: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The local files that ``load`` names, by pattern or by folder, with names that do not depend on where they lie."""
    found = load.get("data_files") or []
    flat = found.values() if isinstance(found, Mapping) else [found]
    patterns = [pattern for entry in flat for pattern in ([entry] if isinstance(entry, str) else entry)]
    files = [Path(file) for pattern in patterns for file in glob.glob(pattern, recursive=True)]
    named = {file: file.name for file in files}
    for folder in _folders(load):
        # As in datasets, hidden files are no data.
        inside = {file: file.relative_to(folder) for file in folder.rglob("*")}
        named |= {file: str(name) for file, name in inside.items() if not any(p.startswith(".") for p in name.parts)}
    return [(name, file) for file, name in sorted(named.items()) if file.is_file()]


def local_files(mapping: str | Path, load: Mapping[str, Any] | None = None) -> list[tuple[str, Path]]:
    """The mapping file and the local data files it names, each with a name that does not depend on its folder.

    Data on the hub are not looked at; a mapping that leaves their revision open is warned of.

    Raises:
        TaskError: The mapping cannot be used.
    """
    found = read_mapping(mapping, load)["load"]
    files = _local(found)
    if not files and "revision" not in found:
        _log.warning(
            "%s names no local files and no revision: a corpus compiled from it is used again without asking whether "
            "the data have changed; give 'revision' under 'load' to fix them",
            mapping,
        )
    return [("mapping", Path(mapping)), *files]


def _other_encoding(load: Mapping[str, Any], error: UnicodeDecodeError) -> TaskError:
    """What to say of data that is not in the encoding it was read with, naming the files."""
    encoding = load.get("encoding", "utf-8")
    refused = []
    for _, file in _local(load):
        try:
            with file.open(encoding=encoding) as stream:
                collections.deque(stream, maxlen=0)
        except UnicodeError:
            refused.append(str(file))
    found = f"{error.reason}, byte {error.object[error.start]:#x}"
    return TaskError(
        f"{', '.join(refused) or load['path']} is not {encoding} ({found}); convert it to UTF-8, "
        "or name its own encoding in the mapping, such as load: {encoding: latin-1}"
    )


def _load(arguments: str) -> Any:
    stats = [file.stat() for _, file in _local(json.loads(arguments))]
    return _loaded(arguments, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@functools.lru_cache(maxsize=1)
def _loaded(arguments: str, stamps: tuple[tuple[int, int], ...]) -> Any:
    """The dataset; ``stamps`` of its local files only tell old content from new."""
    import datasets

    kwargs = json.loads(arguments)
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(**{"split": "train", **kwargs})
    except Exception as error:
        # load_dataset raises as many kinds as there are builders; all mean that this mapping loads nothing.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, UnicodeDecodeError):
            raise _other_encoding(kwargs, error) from None
        raise TaskError(
            f"datasets.load_dataset({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) failed: "
            f"{type(error).__name__}: "
            f"{str(error).strip() or 'no message'}; check the mapping's 'load'"
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    if isinstance(dataset, dict):
        raise TaskError(f"'load' gives the splits {', '.join(dataset)}; name one with 'split'")
    return dataset


def _value(row: Mapping[str, Any], spec: Any, what: str) -> Any:
    """A constant, or the content of a column; dots go into nested columns."""
    if isinstance(spec, Mapping):
        return spec["value"]
    content: Any = row
    for part in str(spec).split("."):
        if not isinstance(content, Mapping) or part not in content:
            known = ", ".join(content) if isinstance(content, Mapping) else type(content).__name__
            raise TaskError(f"mapping entry {what!r} names the column {spec!r}, which is not there; there are: {known}")
        content = content[part]
    return content


def _text(content: Any, what: str) -> str:
    """A text; of a list the first, of nothing an empty one."""
    if isinstance(content, list | tuple):
        content = content[0] if content else ""
    if content is None:
        return ""
    if isinstance(content, str | int | float | bool):
        return str(content)
    raise TaskError(f"mapping entry {what!r} gives a {type(content).__name__}, not a text; map one of its columns")


def _list(content: Any, what: str) -> list[Any]:
    if not isinstance(content, list):
        raise TaskError(
            f"mapping entry {what!r} names a column that holds {content!r}, which is not a list; map another"
        )
    return content


def _rows(mapping: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "instances" not in mapping:
        yield row
        return
    nested = _value(row, mapping["instances"], "instances")
    if isinstance(nested, Mapping):
        # Older versions of datasets turn a list of records into a record of lists.
        nested = [dict(zip(nested, values, strict=True)) for values in zip(*nested.values(), strict=True)]
    yield from _list(nested, "instances")


def _example(mapping: Mapping[str, Any], row: Mapping[str, Any], names: Sequence[str] | None) -> Example:
    tidy = str.strip if mapping.get("strip") else str
    columns = mapping["input"] if isinstance(mapping["input"], list) else [mapping["input"]]
    text = "\n".join(_text(_value(row, column, "input"), "input") for column in columns)
    options: list[str] | None = None
    if "options" in mapping:
        given = _value(row, mapping["options"], "options")
        options = None if given is None else [str(option) for option in _list(given, "options")]
    elif names is not None:
        options = list(names)
    output = _value(row, mapping["output"], "output")
    if isinstance(output, int) and not isinstance(output, bool) and options is not None:
        if not 0 <= output < len(options):
            raise TaskError(f"mapping entry 'output' gives the number {output}, but there are {len(options)} options")
        outputs = [options[output]]
    else:
        outputs = [str(entry) for entry in output] if isinstance(output, list) else [_text(output, "output")]
    return Example(
        input=tidy(text),
        outputs=tuple(tidy(entry) for entry in outputs),
        options=None if options is None else tuple(tidy(option) for option in options),
        fields={name: _text(_value(row, column, name), name) for name, column in mapping.get("fields", {}).items()},
    )


def _label_names(dataset: Any, mapping: Mapping[str, Any]) -> list[str] | None:
    feature = dataset.features.get(mapping["output"]) if isinstance(mapping["output"], str) else None
    names = getattr(feature, "names", None)
    return [str(name) for name in names] if names else None


def _iterate(dataset: Any, arguments: str) -> Iterator[Mapping[str, Any]]:
    try:
        yield from dataset
    except UnicodeDecodeError as error:
        # JSON is stored as it stands; only its first use decodes it.
        raise _other_encoding(json.loads(arguments), error) from None


def _examples(mapping: Mapping[str, Any], arguments: str, rows: Sequence[int]) -> Iterator[Example]:
    dataset = _load(arguments)
    names = _label_names(dataset, mapping)
    for start in range(0, len(rows), 1000):
        for row in _iterate(dataset.select(rows[start : start + 1000]), arguments):
            for instance in _rows(mapping, row):
                yield _example(mapping, instance, names)


def _templates(mapping: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[PromptTemplate, ...]:
    templates = []
    if "instructions" in mapping:
        given = _value(row, mapping["instructions"], "instructions")
        texts = [given] if isinstance(given, str) else _list(given or [], "instructions")
        templates = [PromptTemplate.from_instruction(str(t), name=f"instruction-{i}") for i, t in enumerate(texts)]
    for entry in mapping.get("templates", ()):
        words = {"verbalizer": tuple(map(str, entry["verbalizer"]))} if "verbalizer" in entry else {}
        templates.append(PromptTemplate(**{**entry, **words}))
    return tuple(templates) or (PromptTemplate(name="input", text="{input}"),)


def _loads(mapping: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The task id to use where the mapping names none, and the arguments of ``load_dataset``."""
    load = dict(mapping["load"])
    if mapping.get("per_file"):
        patterns = load.get("data_files") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        files = sorted({file for pattern in patterns for file in glob.glob(pattern, recursive=True)})
        if not files:
            raise TaskError(
                f"no file matches {', '.join(patterns) or 'data_files (missing)'}; give 'data_files' under 'load'"
            )
        for file in files:
            yield Path(file).name.split(".")[0], load | {"data_files": file}
    elif isinstance(load.get("name"), list):
        for name in load["name"]:
            yield str(name), load | {"name": name}
    else:
        yield str(load.get("name") or load["path"]), load


def hub_tasks(mapping: str | Path | Mapping[str, Any], *, load: Mapping[str, Any] | None = None) -> list[Task]:
    """List the tasks of a dataset.

    Args:
        mapping: A YAML file or its content; see the module's text and :data:`KEYS`.
        load: Replaces entries of the mapping's ``load``, such as ``data_files``; None removes an entry.

    Returns:
        Tasks in the order of their first rows. Examples are read when asked for.

    Raises:
        TaskError: The mapping is wrong, a column is missing, or the dataset cannot be loaded.
    """
    mapping = read_mapping(mapping, load)
    tasks = []
    for default_id, kwargs in _loads(mapping):
        arguments = json.dumps(kwargs, sort_keys=True)
        dataset = _load(arguments)
        columns = {
            spec
            for key, spec in mapping.items()
            if key in ("task_id", "instructions", *_TEXTS) and isinstance(spec, str)
        }
        needed = sorted({column.split(".")[0] for column in columns | set(mapping.get("where", {}))})
        light = dataset.select_columns([name for name in needed if name in dataset.column_names])
        rows: dict[str, list[int]] = collections.defaultdict(list)
        firsts: dict[str, Mapping[str, Any]] = {}
        # Without columns to look at, every row looks alike and iterating would cost for nothing.
        described = enumerate(_iterate(light, arguments)) if needed else ((index, {}) for index in range(len(dataset)))
        for index, row in described:
            if any(_value(row, column, "where") != wanted for column, wanted in mapping.get("where", {}).items()):
                continue
            name = _text(_value(row, mapping["task_id"], "task_id"), "task_id") if "task_id" in mapping else default_id
            firsts.setdefault(name, row)
            rows[name].append(index)
        for name, numbers in rows.items():
            first = firsts[name]
            texts = {key: _text(_value(first, mapping[key], key), key) for key in _TEXTS if key in mapping}
            texts = {key: text for key, text in texts.items() if text}
            tasks.append(
                Task(
                    task_id=name,
                    category=texts.pop("category", "other"),
                    family=texts.pop("family", name),
                    templates=_templates(mapping, first),
                    examples=functools.partial(_examples, mapping, arguments, numbers),
                    role=mapping.get("role", "train"),
                    metric=mapping.get("metric", "rouge_l"),
                    **texts,  # type: ignore[arg-type]
                )
            )
    if not tasks:
        raise TaskError(f"the mapping finds no rows in {mapping['load']!r}; check 'split' and 'where'")
    return tasks
