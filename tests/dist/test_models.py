# SPDX-License-Identifier: Apache-2.0
"""Models that know nothing of pipelines, trained on two ranks with two stages each and, alone, under strategy="auto".

Float64 and SGD. Hugging Face models round to float32 inside (norms, softmax, logits), so what is compared with must do
its sums in the same parts: alone, a step runs micro-batch by micro-batch.
"""

import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lightning_zeroprompt.strategies import ZeroPPStrategy

ROWS, BATCH, LENGTH, WORDS = 24, 8, 8, 32
PARTS = 8
"""Micro-batches that zeropp chooses for 8 rows on two ranks."""


class Module(pl.LightningModule):
    """Around any model; ``parts`` says in how many parts a step is run by the module itself."""

    parts = 1

    def __init__(self):
        super().__init__()
        self.losses = []
        self.found = []

    def loss_weight(self, batch):
        return torch.tensor(float(len(next(iter(batch.values())))))

    def training_step(self, batch, index):
        if self.parts == 1:
            return self.loss(batch)
        chunks = {key: value.chunk(self.parts) for key, value in batch.items()}
        split = [{key: values[part] for key, values in chunks.items()} for part in range(self.parts)]
        weights = torch.stack([self.loss_weight(part).double() for part in split])
        losses = torch.stack([self.loss(part).double() for part in split]).nan_to_num()
        return (losses * weights).sum() / weights.sum()

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# -- Hugging Face ---------------------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sliding windows of 3 positions, on some layers or all; padding is shorter, or whole rows of attention are masked.
OWN = {
    "Llama": {"num_key_value_heads": 1},
    "Qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 3},
    "Gemma2": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 3,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "GPTNeoX": {},
}


class Causal(Module):
    def __init__(self, family, attention, tied, checkpointing):
        import transformers

        super().__init__()
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **OWN[family], tie_word_embeddings=tied)
        config._attn_implementation = attention
        self.model = getattr(transformers, f"{family}ForCausalLM")(config).double()
        if checkpointing:
            self.model.gradient_checkpointing_enable()

    def loss(self, batch):
        return self.model(**batch).loss

    def loss_weight(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()


def padded_text(generator):
    rows = []
    for _ in range(ROWS):
        mask = (torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (), generator=generator)).long()
        ids = torch.randint(3, WORDS, (LENGTH,), generator=generator) * mask
        labels = ids.masked_fill(mask == 0, -100)
        # Unequal numbers of targets: a mean of means would be another loss.
        labels[: int(torch.randint(0, 5, (), generator=generator))] = -100
        if len(rows) == 3:
            labels[:] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


# -- others ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Recurrent(nn.Module):
    def __init__(self, kind, width=8):
        super().__init__()
        self.rnn = kind(width, width, batch_first=True)

    def forward(self, x):
        return x + self.rnn(x)[0]


class Experts(nn.Module):
    """Each token goes to one of three experts, so how many rows an expert gets depends on the data."""

    def __init__(self, width=8):
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, None])
        return x + out.view_as(x)


class NanoGPT(Module):
    def __init__(self, make=Residual):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.ModuleList(make() for _ in range(4))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(WORDS, 8), "wpe": nn.Embedding(LENGTH, 8), "h": layers, "ln_f": nn.LayerNorm(8)}
        )
        self.lm_head = nn.Linear(8, WORDS, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def loss(self, batch):
        return F.cross_entropy(self(batch["input_ids"])[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Compiled(NanoGPT):
    """Blocks that are compiled, which leaves their weight gradients to be deferred."""

    def __init__(self):
        super().__init__()
        for block in self.transformer.h:
            block.compile(backend="aot_eager")


class Sequential(Module):
    """All of the model, embedding and head included, in one nn.Sequential."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(WORDS, 8), *(Residual() for _ in range(3)), nn.Linear(8, WORDS))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["labels"].relu().flatten())


class TwoTowers(Module):
    """The list with most parameters has fewer blocks than there are stages; the other one is cut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleList(nn.Embedding(4 * WORDS, 8) for _ in range(2))
        self.layers = nn.ModuleList(Residual() for _ in range(4))
        self.head = nn.Linear(8, WORDS)

    def loss(self, batch):
        x = sum(embedding(batch["input_ids"]) for embedding in self.embeddings)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].relu().flatten())


class ViT(Module):
    """A convolution cuts the image into patches; a class token and positions are parameters of the module itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 2, 2), nn.GroupNorm(2, 8))
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def loss(self, batch):
        patches = self.stem(batch["image"]).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x[:, 0]), batch["target"])


class Named(NanoGPT):
    """``configure_pipeline`` returns a list of some of what is called, in order."""

    def configure_pipeline(self):
        return list(self.transformer.h)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Residual()

    def forward(self, x, skip, *, inputs):
        _, kwargs = inputs
        return self.inner(x) * kwargs["scale"] + skip, skip


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)

    def forward(self, tokens, *, scale):
        x = self.embedding(tokens)
        return x, x


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, WORDS)

    def forward(self, x, skip):
        return self.head(x)


class Body(nn.Module):
    """A skip connection from the embedding to every block, which a list of called blocks cannot have."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = First(), nn.ModuleList(Scaled() for _ in range(4)), Last()

    def forward(self, tokens, *, scale):
        x = skip = self.first.embedding(tokens)
        for block in self.blocks:
            x = block.inner(x) * scale + skip
        return self.last.head(x)


class Targeted(Module):
    """``configure_pipeline`` returns (target, blocks); these pass on two tensors and read the target's arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()

    def configure_pipeline(self):
        return self.body, [self.body.first, *self.body.blocks, self.body.last]

    def loss(self, batch):
        out = self.body(batch["input_ids"], scale=0.7)
        return F.cross_entropy(out.flatten(0, 1), batch["labels"].relu().flatten())


MODELS = {
    "nanogpt": NanoGPT,
    "sequential": Sequential,
    "vit": ViT,
    "list of blocks": Named,
    "target and blocks": Targeted,
    "lstm": lambda: NanoGPT(lambda: Recurrent(nn.LSTM)),
    "gru": lambda: NanoGPT(lambda: Recurrent(nn.GRU)),
    "experts": lambda: NanoGPT(Experts),
    "few large blocks": TwoTowers,
    "compiled blocks": Compiled,
}


# -- runs -----------------------------------------------------------------------------------------------------------


def rows():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (ROWS,), generator=generator)
    return padded_text(generator), [{"image": i, "target": t} for i, t in zip(images, targets, strict=True)]


def fit(strategy, make, arguments, parts):
    """Losses, and the parameters that this rank holds before and after."""
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*")
    module = (Causal if make == "causal" else MODELS[make])(*arguments)
    module.parts = parts
    first = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    text, images = rows()
    alone = strategy == "auto"
    trainer = pl.Trainer(
        strategy="auto" if alone else ZeroPPStrategy(**strategy),
        devices=1 if alone else int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Ranks are shared by tests, and would find what an earlier one has compiled.
    torch._dynamo.reset()
    counters.clear()
    trainer.fit(module, DataLoader(images if isinstance(module, ViT) else text, BATCH))
    assert "compile_stages" not in strategy or counters["stats"]["unique_graphs"]
    held = {name: p.detach() for name, p in module.named_parameters() if not p.is_meta}
    return module.losses, first, held


def both(strategy, make, arguments, parts):
    alone = fit("auto", make, arguments, parts)
    return alone, fit(strategy, make, arguments, 1)


def compare(results, tolerance=1e-9):
    together = set()
    (_, first, _), _ = results[0]
    for (losses, _, expected), (found, _, held) in results:
        assert len(losses) == ROWS // BATCH
        assert found == pytest.approx(losses, abs=tolerance)
        for name, parameter in held.items():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance)
        together |= held.keys()
        assert len(held) < len(expected), "a rank holds the whole model"
    assert together == expected.keys()
    moved = [name for name in expected if not torch.equal(expected[name], first[name])]
    assert len(moved) > 0.9 * len(expected)


# transformers has no sdpa for Gemma 2.
@pytest.mark.parametrize(
    ("family", "attention", "tied"),
    [("Gemma2", "eager", False)]
    + [(f, a, a == "eager") for f in OWN for a in ("sdpa", "eager") if (f, a) != ("Gemma2", "sdpa")],
)
def test_hugging_face_causal_model(family, attention, tied, run_ranks):
    compare(run_ranks(both, 2, {}, "causal", (family, attention, tied, False), PARTS))


@pytest.mark.parametrize(
    ("strategy", "checkpointing"),
    [({}, True), ({"activation_checkpointing": True}, False), ({"schedule": "zbv"}, True)],
    ids=["theirs", "ours", "zbv"],
)
def test_hugging_face_model_with_checkpointing(strategy, checkpointing, run_ranks):
    compare(run_ranks(both, 2, strategy, "causal", ("Gemma2", "eager", True, checkpointing), PARTS))


def test_token_mean_of_the_whole_batch(run_ranks):
    # Alone the batch runs whole: the loss is the mean over its tokens. Rounded to float32 in another order.
    compare(run_ranks(both, 2, {}, "causal", ("Llama", "sdpa", True, False), 1), tolerance=2e-6)


@pytest.mark.parametrize("model", MODELS)
def test_model(model, run_ranks):
    settings = {"stages_per_rank": 2} if model == "few large blocks" else {}
    compare(run_ranks(both, 2, settings, model, (), 1))


STAGES = {"compile_stages": {"backend": "aot_eager"}}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("nanogpt", {}),
        ("nanogpt", {"schedule": "zbv"}),
        ("nanogpt", {"activation_checkpointing": True}),
        ("sequential", {}),
        ("target and blocks", {}),
        ("compiled blocks", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_compiled_stages(model, settings, run_ranks):
    compare(run_ranks(both, 2, settings | STAGES, model, (), 1))


def test_compiled_stages_of_a_hugging_face_model(run_ranks):
    compare(run_ranks(both, 2, STAGES, "causal", ("Llama", "sdpa", True, False), PARTS))


def sharded(make, settings):
    losses, _, held = fit({"data_parallel_size": 2} | settings, make, (), 1)
    return losses, {name: part.to_local() for name, part in held.items()}


@pytest.mark.parametrize(
    ("model", "settings"), [("compiled blocks", {}), ("nanogpt", STAGES)], ids=["blocks", "stages"]
)
def test_compiled_with_sharded_weights(model, settings, run_ranks):
    together = zip(run_ranks(sharded, 4, "nanogpt", {}), run_ranks(sharded, 4, model, settings), strict=True)
    for (losses, held), (expected, parts) in together:
        assert losses == pytest.approx(expected, abs=1e-9)
        assert held.keys() == parts.keys()
        for name, part in held.items():
            torch.testing.assert_close(part, parts[name], rtol=0, atol=1e-9)
