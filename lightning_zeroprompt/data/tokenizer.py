# SPDX-License-Identifier: Apache-2.0
"""Tokenisers of a compiled corpus: bytes, a BPE trained on the corpus itself, or any pretrained T5-like one.

All of them put text into ids piece by piece: instructions, inputs, outputs and options are encoded apart and joined
later, so a word must get the same id at the start of a piece as inside a text. The BPE therefore writes every word with
the mark of a word start before it (``Metaspace`` with ``prepend_scheme="always"``), isolates digits and punctuation,
and falls back to bytes, so that no text is unknown and no piece of user text can ever become a special token (specials
are vocabulary entries that no split of a text can produce, not "added tokens" searched for in the text). The price is
that spaces at the end of a line and a single space at its start are not restored by :meth:`TextTokenizer.decode`.

Alternatives: a byte-level BPE (GPT-2) gives a word two ids, with and without a space; a unigram model (T5) trains
    several times
slower. Importing this module loads neither ``tokenizers`` nor ``transformers``.
"""

import collections
import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "EOS_ID",
    "NUM_SENTINELS",
    "PAD_ID",
    "UNK_ID",
    "BpeTokenizer",
    "ByteTokenizer",
    "PretrainedTokenizer",
    "TextTokenizer",
    "load_tokenizer",
]

PAD_ID = 0
"""Id of padding in every tokeniser; it also starts the decoder, as in T5."""
EOS_ID = 1
"""Id of the end of a text in the built-in tokenisers."""
UNK_ID = 2
"""Id of the unknown symbol in the built-in tokenisers; reserved, never produced."""
NUM_SENTINELS = 100
"""Number of sentinel ids for span corruption (as many as T5 has)."""

_NUM_BYTES = 256
_FIRST_BYTE = 3
_WORD_START = "\u2581"
_BREAKS = ("\n", "\r", "\t")


@runtime_checkable
class TextTokenizer(Protocol):
    """What the compiler and the evaluation need of a tokeniser.

    Attributes:
        vocab_size: Number of ids, sentinels included.
        pad_id: Always 0.
        eos_id: Ends an encoder input and a target.
        sentinel_ids: 100 ids for span corruption, first sentinel first.
        name: For people.
        fingerprint: sha256 hex of everything that changes ids.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    sentinel_ids: tuple[int, ...]
    name: str
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; no end mark is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; padding, end marks and sentinels are skipped."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-like data from which :func:`load_tokenizer` builds the same tokeniser."""
        ...


def _fingerprint(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 3, then the sentinels (the layout of ByT5). Nothing to train, 359 ids.

    Example:
        >>> ByteTokenizer().encode_batch(["ab"])
        [[100, 101]]
    """

    def __init__(self) -> None:
        self.pad_id = PAD_ID
        self.eos_id = EOS_ID
        first = _FIRST_BYTE + _NUM_BYTES
        self.sentinel_ids = tuple(range(first, first + NUM_SENTINELS))
        self.vocab_size = first + NUM_SENTINELS
        self.name = "byte"
        self.fingerprint = _fingerprint(self.state())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, one a byte."""
        return [[byte + _FIRST_BYTE for byte in text.encode("utf-8")] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials are skipped and broken UTF-8 becomes U+FFFD."""
        last = _FIRST_BYTE + _NUM_BYTES
        return bytes(i - _FIRST_BYTE for i in ids if _FIRST_BYTE <= i < last).decode("utf-8", "replace")

    def state(self) -> dict[str, Any]:
        """JSON-like state."""
        return {"kind": "byte"}


class BpeTokenizer:
    """Byte-pair encoding over words, with byte fallback.

    Ids: pad, eos, unk, 256 bytes, 100 sentinels, then what was learned.

    Args:
        model_json: Serialised ``tokenizers.Tokenizer``, as :meth:`train` makes it.
    """

    def __init__(self, model_json: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(model_json)
        self.pad_id = PAD_ID
        self.eos_id = EOS_ID
        first = _FIRST_BYTE + _NUM_BYTES
        self.sentinel_ids = tuple(range(first, first + NUM_SENTINELS))
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self.name = f"bpe-{self.vocab_size}"
        self.fingerprint = _fingerprint(self.state())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn merges from ``texts``; the same texts in the same order give the same tokeniser.

        Args:
            texts: Read once and kept in memory.
            vocab_size: Upper limit of all ids together; fewer where the texts hold fewer words.

        Raises:
            ValueError: ``vocab_size`` leaves no room beside the reserved ids, or there is no text.
        """
        from tokenizers import Tokenizer, decoders, models, trainers

        reserved = _reserved_tokens()
        room = vocab_size - len(reserved)
        if room < 64:
            raise ValueError(
                f"vocab_size {vocab_size} leaves {room} ids beside the {len(reserved)} reserved ones (pad, eos, unk, "
                f"256 bytes, "
                f"{NUM_SENTINELS} sentinels); give at least {len(reserved) + 64}"
            )
        kept = list(texts)
        if not any(kept):
            raise ValueError(
                "there is no text to train a BPE tokeniser on; give tasks with non-empty inputs or use bytes"
            )
        counts: collections.Counter[str] = collections.Counter()
        for text in kept:
            counts.update(text)
        del counts[" "]
        # The trainer's own limit breaks ties between rare characters by hash order; choosing the alphabet here keeps
        # runs equal.
        common = heapq.nsmallest(max(room // 4, 48), counts.items(), key=lambda item: (-item[1], item[0]))
        alphabet = sorted({_WORD_START, *_BREAKS, *(character for character, _ in common)})
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=reserved,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=24,
            show_progress=False,
        )
        draft = Tokenizer(models.BPE())
        draft.normalizer = _normalizer()
        draft.pre_tokenizer = _pre_tokenizer()
        draft.train_from_iterator(kept, trainer)
        learned = json.loads(draft.to_str())["model"]
        final = Tokenizer(
            models.BPE(
                vocab=learned["vocab"],
                merges=[tuple(pair) for pair in learned["merges"]],
                unk_token=reserved[UNK_ID],
                byte_fallback=True,
            )
        )
        final.normalizer = _normalizer()
        final.pre_tokenizer = _pre_tokenizer()
        breaks = [decoders.Replace(a, b) for c in _BREAKS for a, b in ((_WORD_START + c, c), (c + _WORD_START, c))]
        final.decoder = decoders.Sequence(
            [
                decoders.ByteFallback(),
                decoders.Fuse(),
                *breaks,
                decoders.Replace(_WORD_START, " "),
                decoders.Strip(" ", 1, 0),
            ]
        )
        return cls(final.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; runs on all cores and lets other Python threads run meanwhile."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials are skipped."""
        first, last = self.sentinel_ids[0], self.sentinel_ids[-1]
        kept = [int(i) for i in ids if i >= _FIRST_BYTE and not first <= i <= last]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def state(self) -> dict[str, Any]:
        """JSON-like state."""
        return {"kind": "bpe", "model": json.loads(self._tokenizer.to_str())}


def _reserved_tokens() -> list[str]:
    return [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(_NUM_BYTES)),
        *(f"<extra_id_{i}>" for i in range(NUM_SENTINELS)),
    ]


def _normalizer() -> Any:
    from tokenizers import Regex, normalizers

    # The next word brings the mark of its own start, so a space at the end of a piece or line would be a token for
    # nothing.
    return normalizers.Replace(Regex(r" +(?=[\n\r]|\z)"), "")


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            # Line breaks go first so that the word after one gets its start mark like any other word.
            pre_tokenizers.Split(Regex(r"[\n\r\t]"), "isolated"),
            pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="always", split=True),
            pre_tokenizers.Split(
                Regex(rf"{_WORD_START}?(\p{{N}}|[^\p{{L}}\p{{M}}\p{{N}}\s{_WORD_START}])"), "isolated"
            ),
        ]
    )


class PretrainedTokenizer:
    """A tokeniser of the T5 family from ``transformers`` (installed with the ``hf`` extra), local folder or hub name.

    Args:
        name: What ``AutoTokenizer.from_pretrained`` takes.
        revision: Commit or tag on the hub.

    Raises:
        ValueError: ``transformers`` is missing, or the tokeniser has no end mark, or its padding id is not 0.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"tokeniser {name!r} needs transformers; install lightning-zeroprompt[hf], or use 'byte' or 'bpe'"
            ) from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(
                f"tokeniser {name!r} could not be loaded ({first_line}); give 'byte', 'bpe', a local folder or a hub "
                f"name"
            ) from None
        if self._tokenizer.eos_token_id is None or self._tokenizer.pad_token_id != PAD_ID:
            raise ValueError(
                f"tokeniser {name!r} has the end mark {self._tokenizer.eos_token_id} and the padding id "
                f"{self._tokenizer.pad_token_id}; batches pad with 0, so take one of the T5 family, 'byte' or 'bpe'"
            )
        self.name = name
        self._revision = revision
        self.pad_id = PAD_ID
        self.eos_id = int(self._tokenizer.eos_token_id)
        vocab = self._tokenizer.get_vocab()
        named = [vocab.get(f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]
        size = max(vocab.values()) + 1
        # A tokeniser without sentinels gets ids behind its own: no text can produce those.
        missing = any(i is None for i in named)
        self.sentinel_ids = (
            tuple(range(size, size + NUM_SENTINELS)) if missing else tuple(int(i) for i in named if i is not None)
        )
        self.vocab_size = size + NUM_SENTINELS if missing else size
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else sorted(vocab.items())
        self.fingerprint = _fingerprint({"kind": "pretrained", "content": content})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials are skipped."""
        skipped = {self.pad_id, self.eos_id, *self.sentinel_ids}
        return str(self._tokenizer.decode([int(i) for i in ids if int(i) not in skipped], skip_special_tokens=True))

    def state(self) -> dict[str, Any]:
        """JSON-like state: the name, not the vocabulary."""
        return {"kind": "pretrained", "name": self.name, "revision": self._revision, "fingerprint": self.fingerprint}


def load_tokenizer(state: Mapping[str, Any]) -> TextTokenizer:
    """Build the tokeniser that ``state`` came from.

    Raises:
        ValueError: The kind is unknown, or a pretrained tokeniser has changed since.
    """
    kind = state.get("kind")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return BpeTokenizer(json.dumps(state["model"], ensure_ascii=False))
    if kind == "pretrained":
        loaded = PretrainedTokenizer(state["name"], state.get("revision"))
        if loaded.fingerprint != state["fingerprint"]:
            raise ValueError(
                f"tokeniser {state['name']!r} has fingerprint {loaded.fingerprint[:16]} but the corpus was compiled "
                f"with "
                f"{state['fingerprint'][:16]}; compile the corpus again or load the former revision"
            )
        return loaded
    raise ValueError(f"unknown kind of tokeniser {kind!r}; known: 'byte', 'bpe', 'pretrained'")
