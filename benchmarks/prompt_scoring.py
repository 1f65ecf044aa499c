# SPDX-License-Identifier: Apache-2.0
"""Scoring of prompts against loops of ``transformers``: (prompt, example) pairs a second, same weights, same process.

A population of prompts over one pool of examples with three options each, random words; the peer is ``transformers``'
T5 with the same weights and the same tokens, in two loops: one forward a (prompt, example, option), and one forward a
(prompt, example) with its options as a batch. The loops run without padding and with each attention that the peer
offers for T5; its best one counts. Loops are timed over a sample of the pairs, ours over all of them, from prompts as
text to fitness, tokenising and batching included; calls before the first round are not counted (they allocate and
choose kernels). Rounds of ours and of the loops take turns; medians count. Every number type is measured by itself,
without TF32 in any of them; the goals are said of each, that of the scores (1e-3 nats) of fp32 alone.

Example:
    python benchmarks/prompt_scoring.py --device cpu --size tiny
    python benchmarks/prompt_scoring.py --device cuda --size base --vocabulary 32128
"""

import argparse
import cProfile
import dataclasses
import json
import platform
import pstats
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.data.tokenizer import BpeTokenizer
from lightning_zeroprompt.models.hf import config_to_hf, state_dict_to_hf
from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.prompts.encoding import EncodingSettings, PromptEncoder
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.pool import ExamplePool

OPTIONS = ("agreed", "denied by both", "unclear")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {"option loop": 10.0, "pair loop": 2.0}
"""Times as fast as the peer's loops."""
CLOSE = 1e-3
"""Largest difference of a score in fp32, nats."""


@dataclasses.dataclass
class Pair:
    """Tokens of one (prompt, example), end marks included, and which option is right."""

    input_ids: list[int]
    options: list[list[int]]
    right: int


def build(args: argparse.Namespace) -> tuple[ExamplePool, list[PromptGenome]]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(400)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    examples = [
        Example(input=text(args.words // 2, args.words * 3 // 2), outputs=(OPTIONS[i % 3],), options=OPTIONS)
        for i in range(args.examples)
    ]
    prompts = [
        PromptGenome(
            instruction=text(4, 12),
            option_frame="Options: {options}" if i % 2 else "",
            option_order="reversed" if i % 4 == 1 else "given",
            answer_cue=text(1, 3),
        )
        for i in range(args.prompts)
    ]
    # Twice, so that every word is frequent enough to be a token, as common words are in a corpus of their own.
    texts = [example.input for example in examples] + [prompt.text for prompt in prompts] + [*OPTIONS]
    tokenizer = BpeTokenizer.train(2 * texts, 4096)
    templates = (PromptTemplate(name="manual", text="Say it:\n{input}"),)
    return ExamplePool.from_examples("benchmark", examples, templates, tokenizer), prompts


def pairs_of(pool: ExamplePool, prompts: list[PromptGenome], count: int) -> list[tuple[int, int, Pair]]:
    """A random sample of the pairs, as the peer reads them."""
    encoder, rng = PromptEncoder(pool), random.Random(1)
    prepared = [entry for entry in encoder.prepare(prompts) if not isinstance(entry, str)]
    chosen = [(rng.randrange(len(prompts)), rng.randrange(len(pool))) for _ in range(count)]
    sample = []
    for prompt, row in chosen:
        batch = encoder.batches(prepared, np.array([prompt]), np.array([row]), 1)[0]
        options = [[t for t in labels if t >= 0] for labels in batch["option_labels"].tolist()]
        sample.append((prompt, row, Pair(batch["input_ids"][0].tolist(), options, int(pool.label[row]))))
    return sample


def build_peers(model: T5, size: T5Config) -> dict[str, Any]:
    """The peer with every attention that this version of it has for T5."""
    weights, peers = state_dict_to_hf(model.state_dict(), size), {}
    for attention in ("eager", "sdpa"):
        try:
            config = transformers.T5Config(**config_to_hf(size), attn_implementation=attention)
            peer = transformers.T5ForConditionalGeneration(config)
        except ValueError as refused:
            print(f"transformers {transformers.__version__} has no {attention} for T5: {refused}", flush=True)
            continue
        if peer.config._attn_implementation != attention:
            raise RuntimeError(f"asked transformers for {attention}, got {peer.config._attn_implementation}")
        peer.load_state_dict(weights, strict=False)
        peer.tie_weights()
        peers[attention] = peer.to(model.shared.weight.device, model.shared.weight.dtype).eval()
    return peers


def margin(totals: list[float], right: int) -> float:
    return totals[right] - max(total for option, total in enumerate(totals) if option != right)


@torch.no_grad()
def loop_options(peer: Any, pair: Pair, device: str) -> float:
    """One forward an option."""
    totals = []
    for option in pair.options:
        labels = torch.tensor([option], device=device)
        out = peer(input_ids=torch.tensor([pair.input_ids], device=device), labels=labels)
        totals.append(-out.loss.item() * len(option))
    return margin(totals, pair.right)


@torch.no_grad()
def loop_pairs(peer: Any, pair: Pair, device: str) -> float:
    """One forward a pair, its options as a batch."""
    longest = max(map(len, pair.options))
    labels = torch.tensor([[*option, *[-100] * (longest - len(option))] for option in pair.options], device=device)
    ids = torch.tensor([pair.input_ids] * len(pair.options), device=device)
    logprobs = peer(input_ids=ids, labels=labels).logits.float().log_softmax(-1)
    picked = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return margin((picked * (labels >= 0)).sum(1).tolist(), pair.right)


def timed(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, pool: ExamplePool, prompts: list[PromptGenome], dtype: str) -> dict[str, Any]:
    """One number type."""
    size = T5Config.preset(args.size, max(args.vocabulary, pool.tokenizer.vocab_size))
    model = T5(size, seed=0).to(args.device, TYPES[dtype]).eval()

    def ours() -> PromptScorer:
        scorer = PromptScorer(pool, T5Forward(model), EncodingSettings(), max_tokens=args.max_tokens)
        scorer.score(prompts)
        return scorer

    sample = pairs_of(pool, prompts, args.sample)
    loops = {
        f"{name}, {attention}": (lambda pair, loop=loop, peer=peer: loop(peer, pair, args.device))
        for attention, peer in build_peers(model, size).items()
        for name, loop in (("option loop", loop_options), ("pair loop", loop_pairs))
    }
    fitness = ours().score(prompts).fitness
    for loop in loops.values():
        for _, _, pair in sample[: args.warm_up]:
            loop(pair)
    seconds: dict[str, list[float]] = {"ours": [], **{name: [] for name in loops}}
    worst = 0.0
    for _ in range(args.rounds):
        seconds["ours"].append(timed(ours, args.device))
        for name, loop in loops.items():
            results: list[float] = []
            seconds[name].append(
                timed(lambda loop=loop, out=results: out.extend(loop(pair) for _, _, pair in sample), args.device)
            )
            differences = [abs(r - fitness[p, row]) for r, (p, row, _) in zip(results, sample, strict=True)]
            worst = max(worst, float(max(differences)))
    number = len(prompts) * len(pool)
    speed = {
        name: (number if name == "ours" else len(sample)) / statistics.median(times) for name, times in seconds.items()
    }
    cached = ours()
    again = timed(lambda: cached.score(prompts), args.device)
    if args.profile:
        profiler = cProfile.Profile()
        profiler.runcall(ours)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
    ratios = {kind: speed["ours"] / max(speed[name] for name in loops if name.startswith(kind)) for kind in GOALS}
    met = {kind: ratios[kind] >= goal for kind, goal in GOALS.items()}
    return {
        "parameters": model.num_parameters(),
        "vocabulary": size.vocab_size,
        "mean_input_tokens": round(statistics.mean(len(pair.input_ids) for _, _, pair in sample), 1),
        "pairs_per_s": {name: round(value, 1) for name, value in speed.items()},
        "spread_s": {name: [round(min(times), 3), round(max(times), 3)] for name, times in seconds.items()},
        "ratio_to_option_loop": round(ratios["option loop"], 2),
        "ratio_to_pair_loop": round(ratios["pair loop"], 2),
        "largest_difference": float(f"{worst:.2g}"),
        "cached_pairs_per_s": round(number / again),
        "met": met | ({"same scores": worst <= CLOSE} if dtype == "fp32" else {}),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    # Said here, since versions of torch differ in what they do unasked.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    since = time.perf_counter()
    pool, prompts = build(args)
    types: dict[str, Any] = {}
    for dtype in args.dtypes:
        types[dtype] = measure(args, pool, prompts, dtype)
        print(f"{dtype}: {json.dumps(types[dtype])}", flush=True)
    return {
        "benchmark": "prompt_scoring",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "size": args.size,
        "prompts": len(prompts),
        "examples": len(pool),
        "options": len(OPTIONS),
        "sample": args.sample,
        "rounds": args.rounds,
        "max_tokens": args.max_tokens,
        "types": types,
        "seconds": round(time.perf_counter() - since, 1),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="tiny", help="preset of T5Config")
    parser.add_argument("--dtypes", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--vocabulary", type=int, default=0, help="at least so many ids; the tokeniser has some 1,000")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--words", type=int, default=30, help="mean words of an input")
    parser.add_argument("--sample", type=int, default=100, help="pairs that each loop of the peer is timed over")
    parser.add_argument("--warm-up", type=int, default=10, help="pairs that each loop sees before it is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8192, help="padded tokens a batch")
    parser.add_argument("--profile", action="store_true", help="print where a call of ours spends its time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    print(json.dumps(run(parse(argv))))


if __name__ == "__main__":
    main()
