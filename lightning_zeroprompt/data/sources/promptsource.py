# SPDX-License-Identifier: Apache-2.0
"""Tasks from promptsource templates (Jinja, arXiv 2202.01279) on datasets with their original columns, as in T0.

Every template is rendered for every row as promptsource renders it: the columns and ``answer_choices`` as variables,
the parts before and after ``|||`` stripped, rows with an empty part left out (a label of -1, or a template that asks
only some rows). What comes out becomes tasks: templates that ask the same rows for the same choices stand together in
one task, so that a score over a task's templates compares wordings and nothing else. Where a template's prompt is text
around ``{{column}}`` and renders the same that way, it becomes a :class:`PromptTemplate` over columns, which prompt
search can edit; any other is stored as rendered text in a field of its own. Fixed answer words become labels, other
words for the same labels verbalizers.

Templates come from outside, so they run in a sandbox (:mod:`~lightning_zeroprompt.data.sources.jinja_sandbox`) with
strict undefined names and no loader; YAML is loaded without Python objects. Unlike promptsource, columns of more than
2,048 characters are not cut here: the compiler has its own limit. 114 templates over ten validation sets (6,909 rows)
take about 4 s to list, most of it Jinja. ``jinja2``, ``yaml`` and ``pyarrow`` are imported when a function is called.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_zeroprompt.data.sources.jinja_sandbox import sandbox
from lightning_zeroprompt.data.task import INPUT, OPTIONS, Example, PromptTemplate, Task, TaskError

__all__ = ["CATEGORIES", "JinjaTemplate", "Rendered", "load_templates", "promptsource_tasks"]

CATEGORIES: dict[str, str] = {
    "anli": "nli",
    "super_glue_cb": "nli",
    "super_glue_rte": "nli",
    "super_glue_copa": "causal_reasoning",
    "super_glue_wic": "word_sense",
    "super_glue_wsc": "coreference",
    "winogrande": "coreference",
}
"""Task types of the T0 evaluation sets, by the beginning of their names."""

_log = logging.getLogger(__name__)
_SEPARATOR = "|||"
# What Jinja's filters and Python's methods raise for arguments that they do not take.
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError, RecursionError)
_ESCAPED = "3ed2dface8203c4c9dfb1a5dc58e41e0"


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """What a template makes of a row.

    Attributes:
        prompt: What the model reads.
        target: The right answer.
        choices: The answer choices, or None.
    """

    prompt: str
    target: str
    choices: tuple[str, ...] | None


class JinjaTemplate:
    """One promptsource template.

    Args:
        name: For people and errors.
        jinja: Prompt and target, separated by ``|||``.
        answer_choices: Jinja of the choices, separated by ``|||``, or None.
        original_task: Whether it asks for the dataset's own task.
        where: Names the file in errors.

    Raises:
        TaskError: The Jinja does not parse.
    """

    def __init__(
        self, name: str, jinja: str, answer_choices: str | None = None, *, original_task: bool = True, where: str = ""
    ) -> None:
        import jinja2

        self.name = name
        self.original_task = original_task
        self._where = f"{where}: template {name!r}" if where else f"template {name!r}"
        environment = sandbox()
        try:
            self._tree = environment.parse(jinja)
            self._template = environment.from_string(jinja)
            self._choices = None if answer_choices is None else environment.from_string(answer_choices)
            self._choices_tree = environment.parse(answer_choices or "")
        except (jinja2.TemplateError, RecursionError) as error:
            raise TaskError(f"{self._where} is not valid Jinja ({error}); correct or remove it") from None

    def variables(self) -> set[str]:
        """Columns that the template reads."""
        from jinja2 import meta

        names = meta.find_undeclared_variables(self._tree) | meta.find_undeclared_variables(self._choices_tree)
        return names - {"answer_choices"} - set(sandbox().globals)

    def check(self, columns: Sequence[str]) -> None:
        """Refuse a template that reads what the dataset does not have.

        Raises:
            TaskError: With the unknown names and the columns.
        """
        unknown = sorted(self.variables() - set(columns))
        if unknown:
            raise TaskError(
                f"{self._where} has the unknown variable {', '.join(unknown)}; the dataset has: {', '.join(columns)}"
            )

    def fixed_choices(self) -> bool:
        """Whether the choices are the same words for every row."""
        from jinja2 import meta

        return self._choices is not None and not meta.find_undeclared_variables(self._choices_tree)

    def plain(self) -> PromptTemplate | None:
        """The prompt as text around columns, or None where it is more (conditions, filters, answer choices)."""
        from jinja2 import nodes

        text = ""
        for block in self._tree.body:
            if not isinstance(block, nodes.Output):
                return None
            for node in block.nodes:
                if isinstance(node, nodes.TemplateData):
                    before, found, _ = node.data.partition(_SEPARATOR)
                    text += before.replace("{", "{{").replace("}", "}}")
                    if found:
                        return PromptTemplate(name=self.name, text=text.strip())
                elif isinstance(node, nodes.Name) and node.name not in ("answer_choices", INPUT, OPTIONS):
                    text += "{" + node.name + "}"
                else:
                    return None
        return None

    def render(self, row: Mapping[str, Any]) -> Rendered | None:
        """Apply the template to a row.

        Returns:
            The rendered parts, or None where the template does not apply to the row (an empty prompt or target).

        Raises:
            TaskError: An unknown variable, something the sandbox forbids, no ``|||``, or a target that is none of the
                choices.
        """
        import jinja2

        escaped = {k: v.replace(_SEPARATOR, _ESCAPED) if isinstance(v, str) else v for k, v in row.items()}
        try:
            choices = None
            if self._choices is not None:
                choices = tuple(_unescape(part) for part in self._choices.render(escaped).split(_SEPARATOR))
            text = self._template.render({**escaped, "answer_choices": choices})
            parts = [_unescape(part) for part in text.split(_SEPARATOR)]
        except jinja2.exceptions.SecurityError as error:
            raise TaskError(f"{self._where} is unsafe: {error}; remove it") from None
        except jinja2.UndefinedError as error:
            raise TaskError(f"{self._where} has an unknown variable: {error}; the row has: {', '.join(row)}") from None
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise TaskError(
                f"{self._where} could not be rendered ({type(error).__name__}: {error}); remove it"
            ) from None
        if parts == [""]:
            return None
        if len(parts) != 2:
            raise TaskError(
                f"{self._where} renders {len(parts)} parts; promptsource needs a prompt, '|||' and a target"
            )
        prompt, target = parts
        if not prompt or not target:
            return None
        if choices is not None and target not in choices:
            raise TaskError(f"{self._where} gives the target {target!r}, which is none of its choices {list(choices)}")
        return Rendered(prompt, target, choices)


def _unescape(part: str) -> str:
    return part.replace(_ESCAPED, _SEPARATOR).strip()


def load_templates(path: str | Path) -> list[JinjaTemplate]:
    """Read one promptsource YAML file, without building Python objects.

    Raises:
        TaskError: Not UTF-8, not YAML, an unknown tag, or no templates.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        return loader.construct_mapping(node, deep=True)

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, mapping)
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 -- a SafeLoader with two plain tags
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not a promptsource file: {' '.join(str(error).split())}") from None
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise TaskError(f"{path} has no templates; a promptsource file has them under 'templates'")
    templates = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("jinja"), str):
            raise TaskError(f"{path}: template {key!r} has no 'jinja' text; add it or remove the template")
        choices = entry.get("answer_choices")
        metadata = entry.get("metadata") or {}
        templates.append(
            JinjaTemplate(
                str(entry.get("name") or key),
                entry["jinja"],
                None if choices in (None, "None") else str(choices),
                original_task=bool(metadata.get("original_task", True)),
                where=str(path),
            )
        )
    return templates


@dataclasses.dataclass(slots=True)
class _Group:
    """Templates that ask the same rows for the same choices."""

    rows: list[int]
    options: list[tuple[str, ...] | None]
    answers: list[int | str]
    members: list[tuple[JinjaTemplate, list[Rendered | None], tuple[str, ...] | None]] = dataclasses.field(
        default_factory=list
    )


def _relabelling(ours: Sequence[int | str], theirs: Sequence[int], words: Sequence[str]) -> tuple[str, ...] | None:
    """The other template's word for each of our labels, or None where the labels do not map one to one."""
    pairs = set(zip(ours, theirs, strict=True))
    if len({a for a, _ in pairs}) < len(pairs) or len({b for _, b in pairs}) < len(pairs):
        return None
    found = {int(a): b for a, b in pairs}
    # A label that no row has keeps its own position if that is free.
    for label in range(len(words)):
        if label not in found:
            free = [i for i in range(len(words)) if i not in found.values()]
            found[label] = label if label in free else free[0]
    return tuple(words[found[label]] for label in range(len(words)))


def _place(groups: list[_Group], template: JinjaTemplate, rendered: list[Rendered | None]) -> None:
    rows = [index for index, entry in enumerate(rendered) if entry is not None]
    kept = [entry for entry in rendered if entry is not None]
    options = [entry.choices for entry in kept]
    answers: list[int | str] = [
        entry.target if entry.choices is None else entry.choices.index(entry.target) for entry in kept
    ]
    for group in groups:
        if group.rows != rows:
            continue
        if group.options == options and group.answers == answers:
            group.members.append((template, rendered, None))
            return
        words, labels = options[0], group.options[0]
        is_closed = words is not None and labels is not None and len(set(options)) == len(set(group.options)) == 1
        if is_closed and words is not None and labels is not None and len(words) == len(labels):
            verbalizer = _relabelling(group.answers, [int(a) for a in answers], words)
            if verbalizer is not None:
                group.members.append((template, rendered, verbalizer))
                return
    groups.append(_Group(rows, options, answers, [(template, rendered, None)]))


def _task(
    name: str, number: int, group: _Group, table: Sequence[Mapping[str, Any]], context: Mapping[str, Any]
) -> Task:
    used = {column for template, *_ in group.members for column in template.variables()}
    columns = [c for c in table[0] if c in used and c not in (INPUT, OPTIONS) and isinstance(table[0][c], str)]
    fields: list[dict[str, str]] = [{c: str(table[row][c]) for c in columns} for row in group.rows]
    templates = []
    taken: collections.Counter[str] = collections.Counter()
    for index, (template, rendered, verbalizer) in enumerate(group.members):
        prompts = [entry.prompt for entry in rendered if entry is not None]
        plain = template.plain()
        is_plain = (
            plain is not None
            and set(plain.placeholders()) <= set(columns)
            and all(
                plain.render(Example(input="", outputs=(), fields=f)) == p for f, p in zip(fields, prompts, strict=True)
            )
        )
        text = plain.text if is_plain and plain is not None else f"{{rendered_{index}}}"
        if not is_plain:
            for record, prompt in zip(fields, prompts, strict=True):
                record[f"rendered_{index}"] = prompt
        taken[template.name] += 1
        suffix = f" ({taken[template.name]})" if taken[template.name] > 1 else ""
        templates.append(PromptTemplate(name=template.name + suffix, text=text, verbalizer=verbalizer))
    examples = [
        Example(
            input="\n".join(f"{column}: {record[column]}" for column in columns),
            outputs=(answer if isinstance(answer, str) else (options or ())[answer],),
            options=options,
            fields=record,
        )
        for record, answer, options in zip(fields, group.answers, group.options, strict=True)
    ]
    return Task(
        task_id=f"promptsource/{name}" + (f"/{number + 1}" if number else ""),
        category=next((c for prefix, c in CATEGORIES.items() if name.startswith(prefix)), "other"),
        family=f"promptsource/{name}",
        templates=tuple(templates),
        examples=functools.partial(_iterate, examples),
        role="heldout",
        metric="exact_match",
        **context,
    )


def _iterate(examples: Sequence[Example]) -> Iterator[Example]:
    return iter(examples)


def _read(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise TaskError(f"{path} could not be read as parquet ({error})") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} holds text that is not UTF-8 ({error.reason})") from None
    if not rows:
        raise TaskError(f"{path} has no rows; remove the file or fill it")
    return rows


def _names(folder: Path) -> dict[str, Path]:
    """Template files by dataset name: ``NAME.yaml``, or promptsource's own ``DATASET/SUBSET/templates.yaml``."""
    found = {}
    for file in sorted(folder.rglob("*.yaml")):
        inner = file.relative_to(folder).parts
        found["_".join(inner[:-1]) if inner[-1] == "templates.yaml" else file.stem] = file
    return found


def promptsource_tasks(
    templates_folder: str | Path,
    data_folder: str | Path,
    *,
    split: str = "validation",
    original_tasks_only: bool = True,
) -> list[Task]:
    """Apply template files to the datasets of the same names.

    Args:
        templates_folder: ``NAME.yaml`` files, or promptsource's own folder layout.
        data_folder: ``NAME/SPLIT.parquet`` files with the original columns; template files without data are passed
            over.
        split: Which file of each dataset; datasets without it are passed over.
        original_tasks_only: Leave out templates that ask something else than the dataset's own task, as T0's evaluation
            does.

    Returns:
        Held-out tasks of the benchmark ``"t0"``, one a dataset where all its templates ask the same, else several.

    Raises:
        TaskError: A folder is missing, nothing matches, or a template is unsafe, invalid or reads an unknown variable.
    """
    templates_folder, data_folder = Path(templates_folder), Path(data_folder)
    for folder in (templates_folder, data_folder):
        if not folder.is_dir():
            raise TaskError(f"there is no folder {folder}; give the folders of the templates and of the data")
    files = _names(templates_folder)
    if not files:
        raise TaskError(f"{templates_folder} holds no .yaml file; give the folder of promptsource templates")
    tasks = []
    for name, file in files.items():
        data = data_folder / name / f"{split}.parquet"
        if not data.is_file():
            _log.info("%s has no data at %s; passed over", file, data)
            continue
        table = _read(data)
        templates = [t for t in load_templates(file) if t.original_task or not original_tasks_only]
        groups: list[_Group] = []
        for template in templates:
            template.check(list(table[0]))
            rendered = [template.render(row) for row in table]
            skipped = sum(entry is None for entry in rendered)
            if skipped:
                _log.info("%s: template %r passes over %d of %d rows", name, template.name, skipped, len(table))
            if skipped < len(table):
                _place(groups, template, rendered)
        context = {"source": f"promptsource templates on {name}, {split}", "benchmark": "t0"}
        tasks += [_task(name, number, group, table, context) for number, group in enumerate(groups)]
    if not tasks:
        raise TaskError(
            f"none of the {len(files)} template files in {templates_folder} has data in "
            f"{data_folder}/NAME/{split}.parquet; "
            f"there are templates for {', '.join(files)}"
        )
    return tasks
