# SPDX-License-Identifier: Apache-2.0
"""A template cut into the slots of a genome: instruction, input frame, option frame, answer cue, and their layout.

The template's parsed segments (:meth:`~lightning_zeroprompt.data.task.PromptTemplate.segments`) are cut by rule, with
no regular expression and no list of known templates:

1. The *input frame* reaches from the first field to the last, with all text between them; the *option frame* likewise
   from the first ``{options}`` to the last. Where the two would overlap, the input frame holds everything.
2. Text that is glued to a placeholder (a quotation mark, a full stop), and a label of one or two words with a colon
   ("Premise: "), belongs to its frame.
3. A last line of at most three words with a colon ("Answer:") is the *answer cue*.
4. Of the texts left over, the one that holds the template's stated instruction, else the one with most words, is the
   *instruction*. Another one behind the frames is the answer cue; any other joins the frame that follows it.
5. Blank space and a lone sign (``:``, ``->``) between two slots are no slot's: they are the *joints* of the layout.

Put together again, the slots read exactly as the template did, wherever the rules have cut: a cut in an odd place makes
a crossover less apt, never invalid. The alternative in GPS's code, an extraction rule written by hand for each template
(about 300 lines for ten data sets), cuts better and knows no other template.
"""

import dataclasses
from collections.abc import Sequence

from lightning_zeroprompt.data.task import OPTIONS, PromptTemplate, Segment, TaskError

__all__ = ["SLOTS", "Slots", "cut_template", "escape", "join_slots", "layout_order"]

SLOTS: tuple[str, ...] = ("instruction", "input_frame", "option_frame", "answer_cue")
"""Names of the slots that a layout arranges."""

_SIGNS = frozenset({":", "-", "--", "->", "=>", "|", "/", "*", ";", "="})
_LABEL_WORDS, _CUE_WORDS = 2, 3
_JOINT = "\n"
_COLONS = (":", "\uff1a")


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """A template's text, cut.

    Attributes:
        instruction: Literal text.
        input_frame: Template text.
        option_frame: Template text.
        answer_cue: Literal text.
        layout: Order of the slots and the joints between them, as template text over the names in :data:`SLOTS`.
    """

    instruction: str
    input_frame: str
    option_frame: str
    answer_cue: str
    layout: str


def escape(text: str) -> str:
    """Literal text as template text."""
    return text.replace("{", "{{").replace("}", "}}")


def layout_order(layout: str) -> tuple[tuple[str, str], ...]:
    """Parse a layout.

    Args:
        layout: Each of :data:`SLOTS` once, as a placeholder; the text before one is its joint.

    Returns:
        (joint, slot) pairs in the order of the layout.

    Raises:
        TaskError: A slot is missing, unknown or there twice, or text follows the last one.

    Example:
        >>> layout_order("{input_frame} : {instruction}{option_frame}{answer_cue}")[1]
        (' : ', 'instruction')
    """
    pairs: list[tuple[str, str]] = []
    joint = ""
    for segment in PromptTemplate(name="layout", text=layout).segments():
        if segment.is_placeholder:
            pairs.append((joint, segment.text))
            joint = ""
        else:
            joint = segment.text
    if joint or sorted(slot for _, slot in pairs) != sorted(SLOTS):
        wanted = ", ".join(f"{{{slot}}}" for slot in SLOTS)
        raise TaskError(f"layout {layout!r}: it has to name each of {wanted} once, with no text behind the last")
    return tuple(pairs)


def join_slots(order: Sequence[tuple[str, str]], texts: dict[str, str]) -> str:
    """Template text of slots in the order of a layout; the joints of empty slots and of the first one are left out.

    Args:
        order: From :func:`layout_order`.
        texts: Template text of each slot.
    """
    joined = ""
    for joint, slot in order:
        if texts[slot]:
            joined += (escape(joint) if joined else "") + texts[slot]
    return joined


def cut_template(template: PromptTemplate) -> Slots:
    """Cut a template into slots.

    Args:
        template: Any template with a placeholder.

    Returns:
        Slots that :func:`join_slots` puts together to the template's own segments.

    Raises:
        TaskError: The template does not parse, or has no placeholder.
    """
    segments = template.segments()
    frames = _frames(segments)
    if not frames:
        raise TaskError(f"template {template.name!r} has no placeholder, so every example would read the same")
    starts = [start for _, start, _ in frames]
    ends = [end for _, _, end in frames]
    # Literal text around the frames: before the first, between two, after the last.
    gaps = ["".join(s.text for s in segments[a:b]) for a, b in zip([0, *ends], [*starts, len(segments)], strict=True)]
    texts = {slot: _source(segments[start:end]) for slot, start, end in frames}
    stated = next((i for i, gap in enumerate(gaps) if template.instruction and template.instruction in gap), None)
    # Each slot in reading order, with the joint before it.
    named = [frame[0] for frame in frames]
    for index, slot in enumerate(named):
        before, after = gaps[index], gaps[index + 1]
        if index != stated or not before.rstrip().endswith(template.instruction):
            gaps[index], label = _split_label(before)
            texts[slot] = escape(label) + texts[slot]
        if after and not (index + 1 == stated and after.startswith(template.instruction)):
            glued = _glued(after)
            texts[slot] += escape(glued)
            gaps[index + 1] = after[len(glued) :]
    gaps[-1], cue = _split_cue(gaps[-1]) if stated != len(gaps) - 1 else (gaps[-1], "")
    cores = [_core(gap, is_first=i == 0, is_last=i == len(gaps) - 1 and not cue) for i, gap in enumerate(gaps)]
    words = [_num_words(core) for _, core, _ in cores]
    chosen = stated if stated is not None else max(range(len(gaps)), key=words.__getitem__)
    pieces: list[tuple[str, str, str]] = []
    joint = ""
    for index, (left, core, right) in enumerate(cores):
        is_last = index == len(named)
        if index == chosen and core:
            pieces.append((joint + left, "instruction", core))
            joint = right
        elif core and is_last and not cue:
            pieces.append((joint + left, "answer_cue", core))
            joint = right
        elif core and is_last:
            cue = core + right + cue
            joint += left
        elif core:
            texts[named[index]] = escape(core + right) + texts[named[index]]
            joint += left
        else:
            joint += left + right
        if not is_last:
            pieces.append((joint, named[index], texts[named[index]]))
            joint = ""
    if cue:
        pieces.append((joint, "answer_cue", cue))
        joint = ""
    return _arrange(pieces, tail=joint)


def _frames(segments: Sequence[Segment]) -> list[tuple[str, int, int]]:
    """(slot, first segment, end) of the frames, in reading order."""
    shown = [i for i, s in enumerate(segments) if s.is_placeholder and s.text == OPTIONS]
    fields = [i for i, s in enumerate(segments) if s.is_placeholder and s.text != OPTIONS]
    spans = [(slot, at[0], at[-1] + 1) for slot, at in (("input_frame", fields), ("option_frame", shown)) if at]
    spans.sort(key=lambda span: span[1])
    if len(spans) == 2 and spans[0][2] > spans[1][1]:
        return [("input_frame", spans[0][1], max(end for _, _, end in spans))]
    return spans


def _source(segments: Sequence[Segment]) -> str:
    return "".join(f"{{{s.text}}}" if s.is_placeholder else escape(s.text) for s in segments)


def _num_words(text: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in text.split())


def _glued(text: str) -> str:
    """Punctuation at the start of ``text`` that follows a placeholder without a space."""
    end = next((i for i, c in enumerate(text) if c.isspace() or c.isalnum()), len(text))
    return text[:end]


def _split_label(text: str) -> tuple[str, str]:
    """Cut what belongs to the placeholder behind ``text``: a short label on its line, or glued punctuation."""
    line = text.rpartition("\n")[2]
    stripped = line.strip()
    is_label = stripped[-1:] in _COLONS and stripped[-2:-1].isalnum() and _num_words(stripped) <= _LABEL_WORDS
    if is_label:
        kept = len(text) - len(line.lstrip())
        return text[:kept], text[kept:]
    start = len(text)
    while start and not (text[start - 1].isspace() or text[start - 1].isalnum()):
        start -= 1
    # A full stop or colon behind a word closes the text before the placeholder.
    return (text, "") if start and text[start - 1].isalnum() else (text[:start], text[start:])


def _split_cue(text: str) -> tuple[str, str]:
    """Cut a short last line with a colon off the end."""
    line = text.rstrip().rpartition("\n")[2]
    if not (line.endswith(_COLONS) and 1 <= _num_words(line) <= _CUE_WORDS):
        return text, ""
    start = text.rindex(line)
    return text[:start], text[start:]


def _core(text: str, *, is_first: bool, is_last: bool) -> tuple[str, str, str]:
    """Cut ``text`` into the joint before, the content, and the joint behind; nothing is lost."""
    left, right = ("" if is_first else _joint(text)), ""
    rest = text[len(left) :]
    if rest and not is_last:
        right = _joint(rest[::-1])[::-1]
        rest = rest[: len(rest) - len(right)]
    return left, rest, right


def _joint(text: str) -> str:
    """Blank space at the start of ``text``, with one lone sign inside if there is one."""
    blank = len(text) - len(text.lstrip())
    rest = text[blank:]
    sign = rest.split(maxsplit=1)[0] if rest else ""
    if sign[::-1] not in _SIGNS and sign not in _SIGNS:
        return text[:blank]
    after = rest[len(sign) :]
    return text[: len(text) - len(after.lstrip())]


def _arrange(pieces: list[tuple[str, str, str]], *, tail: str) -> Slots:
    """The cut slots with those that the template lacks put where they usually stand."""
    joint, slot, text = pieces[0]
    # Blank space at either end of the template has no other slot beside it to be a joint of.
    pieces[0] = ("", slot, escape(joint) + text if slot.endswith("frame") else joint + text)
    joint, slot, text = pieces[-1]
    pieces[-1] = (joint, slot, text + (escape(tail) if slot.endswith("frame") else tail))
    usual = next((joint for joint, _, _ in pieces if joint), _JOINT)
    texts = {slot: text for _, slot, text in pieces}
    order = [(joint, slot) for joint, slot, _ in pieces]
    if "instruction" not in texts:
        order[0] = (usual, order[0][1])
        order.insert(0, ("", "instruction"))
    if "input_frame" not in texts:
        at = next(i for i, (_, slot) in enumerate(order) if slot == "instruction") + 1
        order.insert(at, (usual, "input_frame"))
    if "option_frame" not in texts:
        at = len(order) - ("answer_cue" in texts)
        order.insert(at, (usual, "option_frame"))
    if "answer_cue" not in texts:
        order.append((usual, "answer_cue"))
    layout = "".join(f"{escape(joint)}{{{slot}}}" for joint, slot in order)
    return Slots(**{slot: texts.get(slot, "") for slot in SLOTS}, layout=layout)
