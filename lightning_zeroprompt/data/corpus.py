# SPDX-License-Identifier: Apache-2.0
"""The read side of a compiled corpus: a folder of memory-mapped arrays and a manifest.

Every text of every task was tokenised once, piece by piece: a *segment* is the tokens of one literal of a template, one
field of an example, one output or one option. All segments lie end to end in ``tokens``; rows, templates and options
are numbers of segments, so a prompt is joined at draw time by gathering ranges. The alternatives that this replaces,
1,000 open streams of ``datasets`` or one Arrow file a task, decode strings at every draw and keep two file handles a
task; here ``open`` costs about the time of parsing the manifest (70 ms for 1,244 tasks with 2,183 templates) and no
handle stays open.

Layout (all ``.npy``; S segments, N rows, T templates; template codes: ``>= 0`` the segment of a literal, ``-1`` the
options, ``-2 - k`` field ``k`` of the task, of which field 0 is ``input``)::

    tokens                uint16, or uint32 from 65,536 ids on     row_first_segment   [N]  fields, then outputs
    segment_offsets       [S + 1]                                  row_num_outputs     [N]
    template_codes                                                 row_option_segment  [N]  -1: free answer
    template_offsets      [T + 1]                                  row_num_options     [N]
    template_separator    [T]                                      row_label           [N]  -1: free answer
    template_verbalizer   [T]  -1: none                            template_role       [T]   0 train, 1 held out

Offsets and row arrays are signed integers of 16, 32 or 64 bits, the narrowest that holds the array's numbers; template
arrays are int64.
Opening checks the manifest and the sizes; :meth:`Corpus.verify` reads everything and checks all hashes.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.tokenizer import TextTokenizer, load_tokenizer

__all__ = [
    "ARRAYS",
    "FORMAT",
    "MANIFEST",
    "TOKENIZER",
    "Corpus",
    "CorpusError",
    "TaskInfo",
    "TemplateInfo",
    "manifest_fingerprint",
    "take",
    "tokenizer_record",
]

FORMAT = 2
"""Version of the layout; another version is refused."""
MANIFEST = "manifest.json"
"""Name of the manifest in the folder; written last."""
TOKENIZER = "tokenizer.json"
"""Name of the file with the tokeniser's state."""
ARRAYS: tuple[str, ...] = (
    "tokens",
    "segment_offsets",
    "row_first_segment",
    "row_num_outputs",
    "row_option_segment",
    "row_num_options",
    "row_label",
    "template_codes",
    "template_offsets",
    "template_separator",
    "template_verbalizer",
    "template_role",
)
"""Names of the arrays; each is a file ``NAME.npy`` and an attribute of :class:`Corpus`."""


class CorpusError(ValueError):
    """A compiled folder that cannot be read or written; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """A task as compiled; texts of the source's record are explained at :class:`~lightning_zeroprompt.data.task.Task`.

    Attributes:
        index: Position in :attr:`Corpus.tasks`.
        fields: Names of the fields; the first is ``input``.
        labels: The closed label set in its canonical order, or None where options differ between rows or answers are
            free.
        first_row: Rows of the task are ``first_row .. first_row + num_rows``.
        num_rows: All rows: training rows, then held-out instances.
        num_heldout_rows: The last rows of a training task, which training never draws.
        class_counts: Sizes of the groups of training rows: one a label that has rows, in label order, or one for the
            whole task; empty for tasks of role ``"heldout"``.
        first_template: Templates of the task are ``first_template .. first_template + num_templates``.
        num_templates: Number of templates.
        kind: ``"choice"`` where every row has options, else ``"generation"``.
        num_truncated: Rows with a field that was cut to the limit at compile time.
        num_dropped: Rows left out because a field was too long, or because all their options were one and the same
            text.
        num_capped: Rows left out by the caps.
        mean_input_tokens: Mean tokens of all fields of a row together.
        mean_output_tokens: Mean tokens of a row's first output.
    """

    index: int
    task_id: str
    category: str
    family: str
    role: Literal["train", "heldout"]
    metric: Literal["exact_match", "rouge_l"]
    language: str
    licence: str
    origin: str
    domain: str
    tier: int
    benchmark: str
    source: str
    cluster: str
    fields: tuple[str, ...]
    labels: tuple[str, ...] | None
    first_row: int
    num_rows: int
    num_heldout_rows: int
    class_counts: tuple[int, ...]
    first_template: int
    num_templates: int
    kind: Literal["choice", "generation"]
    num_truncated: int = 0
    num_dropped: int = 0
    num_capped: int = 0
    mean_input_tokens: float = 0.0
    mean_output_tokens: float = 0.0

    @property
    def num_train_rows(self) -> int:
        """Rows that training may draw: 0 for a task of role ``"heldout"``."""
        return self.num_rows - self.num_heldout_rows if self.role == "train" else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInfo:
    """A template as compiled; see :class:`~lightning_zeroprompt.data.task.PromptTemplate`.

    Attributes:
        index: Position in :attr:`Corpus.templates`.
        task: Index of the task it belongs to.
    """

    index: int
    task: int
    name: str
    text: str
    role: Literal["train", "heldout"]
    instruction: str
    verbalizer: tuple[str, ...] | None
    option_separator: str


def tokenizer_record(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What a manifest says of a tokeniser: all that drawing and packing need, so that they do not have to load it."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "sentinel_ids": list(tokenizer.sentinel_ids),
    }


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """The sha256 hex of a manifest without its own ``fingerprint``: hashes of all files, settings, tasks and templates.

    Dates and paths are in no manifest, so equal content has equal fingerprints on every machine.
    """
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def take(array: npt.NDArray[np.signedinteger[Any]], index: Any) -> npt.NDArray[np.int64]:
    """Entries of a stored array as int64, in which sums and products of them have room.

    Args:
        array: An array of :class:`Corpus`, of any width.
        index: Anything that numpy indexes with.
    """
    taken: npt.NDArray[np.int64] = np.asarray(array)[index].astype(np.int64)
    return taken


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


class Corpus:
    """A compiled corpus, opened for reading. Arrays are attributes; their names and types are in the module's text.

    Attributes:
        path: The folder.
        tasks: All tasks, in the order of their rows.
        templates: All templates, in the order of their tasks.
        fingerprint: sha256 hex of content and settings.
        settings: What the corpus was compiled with.
        vocab_size: Ids of the tokeniser.
        eos_id: Its end mark.
        sentinel_ids: Its marks of span corruption, the first one first.
        counts: Sums over the tasks (``tasks``, ``rows``, ``segments``, ``tokens``, ``truncated``, ``dropped``,
            ``capped``).
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    segment_offsets: npt.NDArray[np.signedinteger[Any]]
    row_first_segment: npt.NDArray[np.signedinteger[Any]]
    row_num_outputs: npt.NDArray[np.signedinteger[Any]]
    row_option_segment: npt.NDArray[np.signedinteger[Any]]
    row_num_options: npt.NDArray[np.signedinteger[Any]]
    row_label: npt.NDArray[np.signedinteger[Any]]
    template_codes: npt.NDArray[np.int64]
    template_offsets: npt.NDArray[np.int64]
    template_separator: npt.NDArray[np.int64]
    template_verbalizer: npt.NDArray[np.int64]
    template_role: npt.NDArray[np.signedinteger[Any]]

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.tasks = tuple(TaskInfo(**_tuples(task)) for task in manifest["tasks"])
        self.templates = tuple(TemplateInfo(**_tuples(template)) for template in manifest["templates"])
        self.fingerprint: str = manifest["fingerprint"]
        self.settings: dict[str, Any] = manifest["settings"]
        self.counts: dict[str, int] = manifest["counts"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.sentinel_ids: tuple[int, ...] = tuple(manifest["tokenizer"]["sentinel_ids"])
        self._files: dict[str, dict[str, Any]] = manifest["files"]
        for name in ARRAYS:
            # Each map keeps a file handle, which the few kilobytes of the templates are not worth.
            mode: Literal["r"] | None = None if name.startswith("template") else "r"
            try:
                setattr(self, name, np.load(path / f"{name}.npy", mmap_mode=mode, allow_pickle=False))
            except ValueError as error:
                raise CorpusError(
                    f"{path / name}.npy is damaged ({error}); delete the folder and compile it again"
                ) from None

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Open a compiled folder; checks the manifest and all sizes, reads no content.

        Args:
            path: The folder that the compiler wrote.

        Raises:
            CorpusError: The folder or a file is missing, cut short, changed, or of another version.
        """
        path = Path(path)
        remedy = "compile it again with `zeroprompt-data compile`"
        if not path.is_dir():
            raise CorpusError(f"there is no compiled corpus at {path}; {remedy}")
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CorpusError(
                f"{path} has no {MANIFEST}: it is half-written or no compiled corpus; delete it and {remedy}"
            ) from None
        except ValueError as error:
            raise CorpusError(f"{path / MANIFEST} is damaged ({error}); delete the folder and {remedy}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            given = manifest.get("format") if isinstance(manifest, dict) else None
            raise CorpusError(f"{path / MANIFEST} has format {given}, this version reads {FORMAT}; {remedy}")
        if manifest_fingerprint(manifest) != manifest.get("fingerprint"):
            raise CorpusError(f"{path / MANIFEST} was changed after it was written; delete the folder and {remedy}")
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise CorpusError(f"{file} is missing; delete the folder and {remedy}")
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise CorpusError(
                    f"{file} has {size:,} bytes, the manifest says {entry['bytes']:,}; delete the folder and {remedy}"
                )
        return cls(path, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the whole array; a spawned worker opens the folder itself.
        return Corpus.open, (self.path,)

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokeniser of the corpus, loaded at first use."""
        return load_tokenizer(json.loads((self.path / TOKENIZER).read_text(encoding="utf-8")))

    def segment(self, index: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Tokens of one segment, a view of shape [length]."""
        return self.tokens[self.segment_offsets[index] : self.segment_offsets[index + 1]]

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest.

        Raises:
            CorpusError: A file's content differs; all such files are named.
        """
        damaged = []
        for name, entry in self._files.items():
            with (self.path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    damaged.append(name)
        if damaged:
            raise CorpusError(
                f"{self.path}: the content of {', '.join(damaged)} differs from the manifest; delete the folder and "
                f"compile it again"
            )
