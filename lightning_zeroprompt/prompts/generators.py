# SPDX-License-Identifier: Apache-2.0
"""Text models for the prompt search: span infilling by the model being trained, and GPS's two by any local model.

:class:`SpanInfiller` asks our own T5, which has learned span corruption on the tasks' inputs: the gap is the first
sentinel, and the answer stands between the first and the second (the layout of
:mod:`~lightning_zeroprompt.data.join`). It needs no second model and knows the vocabulary that the search is about.

:class:`SentenceContinuation` and :class:`BackTranslation` are the operators of GPS (arXiv 2210.17041): a language model
that continues ``Task: Write two question that ask the same thing. Question 1: "..." Question 2: "`` up to the closing
quote (the wording is the release's), and a pair of translation models. They read folders that ``transformers`` wrote,
never the network, and only safetensors (no pickle). Unlike the release, which seeds every call alike and filters by
lists for each template, a call has its own seed, and placeholders never reach the model.

All of them sample with top-p (Holtzman et al. 2020) and are pure functions of (weights, requests, seed): our T5 with a
:class:`torch.Generator` of its own, ``transformers`` inside a forked global one. Requests are batched, the encoder runs
once a request.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_zeroprompt.data.tokenizer import TextTokenizer
from lightning_zeroprompt.models.t5 import T5
from lightning_zeroprompt.prompts.operators import TextRequest

__all__ = ["BackTranslation", "SentenceContinuation", "SpanInfiller", "cut_continuation", "top_p_choice"]

_CONTEXT = 64
_BATCH = 32


def top_p_choice(top_p: float, temperature: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A rule for :meth:`T5.generate <lightning_zeroprompt.models.t5.T5.generate>`: sample from the likeliest tokens.

    Args:
        top_p: The fewest tokens whose probabilities reach this sum are drawn from, in (0, 1].
        temperature: Divides the logits; above 0.
        generator: On the logits' device.

    Returns:
        A function from logits ``[B, V]`` to tokens ``[B]``.

    Raises:
        ValueError: A number out of range.
    """
    if not 0 < top_p <= 1 or temperature <= 0:
        raise ValueError(f"top_p={top_p} has to be in (0, 1] and temperature={temperature} above 0")

    def choose(logits: Tensor) -> Tensor:
        # A diverged model has NaN everywhere, which must cost its candidates and not the run.
        scaled = logits.float().nan_to_num(nan=0.0) / temperature
        likely, order = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = likely.softmax(-1)
        # A token counts if those before it do not reach top_p; the likeliest always does.
        kept = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, 0.0)
        chosen: Tensor = order.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
        return chosen

    return choose


class SpanInfiller:
    """Fills gaps with the model that is being trained.

    Args:
        model: A T5 that has learned span corruption with the tokeniser's sentinels; used without soft prompts, in eval
            mode, and left in the mode it was in.
        tokenizer: The model's.
        num_samples: Texts drawn for a gap.
        max_new_tokens: Of a text, with both marks.
        top_p: See :func:`top_p_choice`.
        temperature: See :func:`top_p_choice`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        model: T5,
        tokenizer: TextTokenizer,
        *,
        num_samples: int = 4,
        max_new_tokens: int = 16,
        top_p: float = 0.9,
        temperature: float = 1.0,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 2:
            raise ValueError(f"num_samples={num_samples} has to be at least 1 and max_new_tokens={max_new_tokens} 2")
        top_p_choice(top_p, temperature, torch.Generator())
        self._model, self._tokenizer = model, tokenizer
        self._num_samples, self._max_new_tokens = num_samples, max_new_tokens
        self._top_p, self._temperature = top_p, temperature

    @torch.no_grad()
    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        """Texts for the gaps, in the order drawn, each once.

        Args:
            requests: Texts with a gap; at most 64 tokens on either side of it are read.
            seed: Of the samples.
        """
        model = self._model
        device = model.shared.weight.device
        choose = top_p_choice(self._top_p, self._temperature, torch.Generator(device).manual_seed(seed))
        was_training = model.training
        model.eval()
        try:
            found: list[list[str]] = []
            for start in range(0, len(requests), _BATCH):
                found += self._fill(requests[start : start + _BATCH], device, choose)
        finally:
            model.train(was_training)
        return found

    def _fill(
        self, requests: Sequence[TextRequest], device: torch.device, choose: Callable[[Tensor], Tensor]
    ) -> list[list[str]]:
        model, tokenizer = self._model, self._tokenizer
        before = tokenizer.encode_batch([request.text for request in requests])
        behind = tokenizer.encode_batch([request.behind for request in requests])
        gap, end = [tokenizer.sentinel_ids[0]], [tokenizer.eos_id]
        rows = [
            torch.tensor(left[-_CONTEXT:] + gap + right[:_CONTEXT] + end)
            for left, right in zip(before, behind, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        segments = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).int()
        task_ids = None if model.soft_prompt is None else torch.zeros_like(segments)
        memory = model.encode(ids, segments, task_ids)
        out = model.generate(
            ids.repeat_interleave(self._num_samples, 0),
            segments.repeat_interleave(self._num_samples, 0),
            self._max_new_tokens,
            memory=memory.repeat_interleave(self._num_samples, 0),
            eos_id=tokenizer.eos_id,
            stop_early=not isinstance(model, FSDPModule),
            choose=choose,
        ).tolist()
        texts = [self._span(row) for row in out]
        groups = [texts[at : at + self._num_samples] for at in range(0, len(texts), self._num_samples)]
        return [list(dict.fromkeys(text for text in group if text)) for group in groups]

    def _span(self, ids: Sequence[int]) -> str:
        """What stands between the first sentinel and the next mark; empty where the layout is another."""
        first, second = self._tokenizer.sentinel_ids[:2]
        ends = [place for place, token in enumerate(ids) if token in (second, self._tokenizer.eos_id)]
        if ids[0] != first or not ends:
            return ""
        return " ".join(self._tokenizer.decode(ids[1 : ends[0]]).split())


class _LocalModel:
    """A language or translation model from a folder of ``transformers``.

    Args:
        folder: Config, tokeniser and safetensors.
        device: Where it runs.

    Raises:
        ValueError: ``transformers`` is missing, or the folder, or something in it.
    """

    def __init__(self, folder: str | Path, device: str) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"there is no model at {folder}: a folder with config.json, tokeniser and safetensors is needed, as "
                "save_pretrained writes it; nothing is downloaded"
            )
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"the model at {folder} needs transformers; install lightning-zeroprompt[hf], or give the operators "
                "that ask it the weight 0"
            ) from None
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            self.is_encoder_decoder = bool(config.is_encoder_decoder)
            kind: Any = (
                transformers.AutoModelForSeq2SeqLM if self.is_encoder_decoder else transformers.AutoModelForCausalLM
            )
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, padding_side="right" if self.is_encoder_decoder else "left"
            )
            self._model: Any = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(f"the model at {folder} could not be loaded ({first_line})") from None
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = torch.device(device)
        self._model.to(self._device).eval()

    @torch.no_grad()
    def write(
        self, texts: Sequence[str], *, num_samples: int, top_p: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """Sampled outputs (without the text itself) of each text; the global random numbers stay as they are."""
        devices = [self._device] if self._device.type == "cuda" else []
        written: list[list[str]] = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(texts), _BATCH):
                batch = self._tokenizer(list(texts[start : start + _BATCH]), return_tensors="pt", padding=True)
                batch = {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}
                ids = self._model.generate(
                    **batch,
                    do_sample=True,
                    top_p=top_p,
                    top_k=0,
                    num_return_sequences=num_samples,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
                new = ids if self.is_encoder_decoder else ids[:, batch["input_ids"].shape[1] :]
                decoded = self._tokenizer.batch_decode(new, skip_special_tokens=True)
                written += [decoded[at : at + num_samples] for at in range(0, len(decoded), num_samples)]
        return written


def cut_continuation(text: str, continuation: str) -> str | None:
    """The rewritten text in a continuation, or None where it is of no use (the general ones of GPS's filters).

    Args:
        text: The text that was to be rewritten.
        continuation: What the model wrote after the opening quote.

    Returns:
        What stands before the closing quote; None without one, or if that has a line break, fewer than two words, or is
        the text itself.

    Example:
        >>> cut_continuation("Is it good?", 'Is that a good one?" Question 3')
        'Is that a good one?'
    """
    written, quote, _ = continuation.partition('"')
    written = written.strip()
    usable = quote and "\n" not in written and len(written.split()) > 1 and written != text.strip()
    return written if usable else None


class SentenceContinuation:
    """Writes sentences anew by continuation, as GPS does.

    Args:
        folder: A causal or text-to-text language model.
        num_samples: Continuations of a sentence; GPS draws 30.
        top_p: See :func:`top_p_choice`.
        max_new_tokens: Of a continuation.
        device: Where the model runs.

    Raises:
        ValueError: The model is missing or cannot be loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_samples: int = 8,
        top_p: float = 0.9,
        max_new_tokens: int = 50,
        device: str = "cpu",
    ) -> None:
        self._model = _LocalModel(folder, device)
        self._settings: dict[str, Any] = {"num_samples": num_samples, "top_p": top_p, "max_new_tokens": max_new_tokens}

    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        """Usable continuations (:func:`cut_continuation`), each once, in the order drawn."""
        # A quote inside the sentence would close it.
        texts = [request.text.replace('"', "'") for request in requests]
        asked = [
            f'Task: Write two question that ask the same thing.\nQuestion 1: "{text}"\nQuestion 2: "' for text in texts
        ]
        written = self._model.write(asked, seed=seed, **self._settings)
        cut = [[cut_continuation(text, one) for one in group] for text, group in zip(texts, written, strict=True)]
        return [list(dict.fromkeys(text for text in group if text is not None)) for group in cut]


class BackTranslation:
    """Writes texts anew by translating them to another language and back.

    Args:
        there: Folder of a model that translates to the other language.
        back: Folder of one that translates back.
        prefixes: What each model wants before a text, such as ``"translate English to German: "``.
        num_samples: Translations there of a text; each is translated back once.
        top_p: See :func:`top_p_choice`.
        max_new_tokens: Of a translation.
        device: Where the models run.

    Raises:
        ValueError: A model is missing or cannot be loaded.
    """

    def __init__(
        self,
        there: str | Path,
        back: str | Path,
        *,
        prefixes: tuple[str, str] = ("", ""),
        num_samples: int = 4,
        top_p: float = 0.9,
        max_new_tokens: int = 64,
        device: str = "cpu",
    ) -> None:
        self._there, self._back = _LocalModel(there, device), _LocalModel(back, device)
        self._prefixes, self._num_samples = prefixes, num_samples
        self._settings: dict[str, Any] = {"top_p": top_p, "max_new_tokens": max_new_tokens}

    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        """Texts that came back, each once, in the order drawn; line breaks in them become spaces."""
        there, back = self._prefixes
        asked = [there + request.text for request in requests]
        foreign = self._there.write(asked, seed=seed, num_samples=self._num_samples, **self._settings)
        flat = [back + text for group in foreign for text in group]
        written = [
            " ".join(text.split()) for (text,) in self._back.write(flat, seed=seed, num_samples=1, **self._settings)
        ]
        groups = [written[at : at + self._num_samples] for at in range(0, len(written), self._num_samples)]
        return [list(dict.fromkeys(text for text in group if text)) for group in groups]
