# SPDX-License-Identifier: Apache-2.0
"""The pipeline on real GPUs and NCCL: one rank a GPU, two where there are two, else one rank with all stages.

``python -m pytest tests/gpu`` runs these; without a GPU they are skipped. Functions below take the type of device, and
run on ``"cpu"`` with gloo the same way, to see that the tests are right. Of ``tests/dist``, the monitor's run is done
again here on NCCL; the rest compares in float64 on gloo, which ``python -m pytest tests/dist`` does on any machine,
with GPUs or without.
"""

import copy
import gc
import os
from random import Random

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models import Text2TextModule
from lightning_zeroprompt.pipeline import build_schedule
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.pipeline.peer_copy import PeerCopies
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain
from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.testing import run_distributed
from tests.dist import test_monitor

GPUS = torch.cuda.device_count()
RANKS = min(2, GPUS)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device; there is none")]

WIDTH, LAYERS, VOCABULARY, LENGTH, MICRO_BATCHES = 256, 8, 512, 128, 4
SETTINGS = {
    "zeropp": {"stages_per_rank": 2, "unit": 2},
    "zeropp_overlap": {"stages_per_rank": 2, "unit": 2},
    "zbv": {"stages_per_rank": 2},
    "1f1b": {},
}


class Layer(nn.Module):
    """Attention and an MLP, as in the benchmark."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def start(device_type):
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    bound = device if device_type == "cuda" else None
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", device_id=bound)
    return device


def cut(model, name, layout, device):
    """A pipeline and a function that runs one step of it on this data-parallel rank's share of the tokens."""
    count = MICRO_BATCHES // layout.data
    settings = SETTINGS[name]
    schedule = build_schedule(name, ranks=layout.pipeline, micro_batches=count, **settings)
    chain = find_chain(model)
    groups = ProcessGroups(layout, device.type)
    pipeline = Pipeline(chain, schedule.placement, cut_chain(chain, schedule.placement), groups, device)
    pipeline.prepare()
    parts = tokens(device).chunk(MICRO_BATCHES)[groups.data_rank :: layout.data]

    def capture(part):
        return lambda: chain.capture(lambda: model(part))

    def end(output, index):
        return loss_of(chain.replay(lambda: model(parts[index]), output), parts[index]) / count

    given = [MicroBatch(tuple(part.shape), capture(part)) for part in parts]
    return pipeline, lambda: pipeline.train_step(schedule, given, end)


def tokens(device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (2 * MICRO_BATCHES, LENGTH), generator=generator).to(device)


def plain(model, device):
    """Gradients of the whole model in one process, micro-batch by micro-batch."""
    model = copy.deepcopy(model).to(device)
    for part in tokens(device).chunk(MICRO_BATCHES):
        (loss_of(model(part), part) / MICRO_BATCHES).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def errors(device_type, data, dtype, names=tuple(SETTINGS), compiled=None):
    """For each schedule the largest relative error of a gradient: ours, and plain autograd's in the same type.

    With ``compiled`` our ``"blocks"`` or ``"stages"`` are compiled.
    """
    device = start(device_type)
    torch.manual_seed(0)
    model = Model()
    exact = plain(model.double(), device)
    model = model.to(dtype)
    same_type = plain(model, device)
    found = {}
    for name in names:
        ours = copy.deepcopy(model)
        for block in ours.blocks if compiled == "blocks" else ():
            block.compile()
        pipeline, step = cut(ours, name, Layout(dist.get_world_size() // data, data), device)
        if compiled == "stages":
            pipeline.chain.compile_rows()
        for _ in range(2):
            # The second step finds what the first has left behind.
            for parameter in pipeline.parameters().values():
                parameter.grad = None
            step()
        held = {
            key: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).double()
            for key, p in pipeline.parameters().items()
        }
        assert held
        found[name] = tuple(
            max(float((grads[key] - exact[key]).norm() / exact[key].norm()) for key in held)
            for grads in (held, same_type)
        )
    dist.destroy_process_group()
    return found


def growth(device_type, data, steps, names=tuple(SETTINGS)):
    """For each schedule the bytes held after a tenth of the steps and after all, and the peaks of the two parts."""
    device = start(device_type)
    found = {}
    for name in names:
        pipeline, step = cut(Model(), name, Layout(dist.get_world_size() // data, data), device)
        seen = []
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for index in range(steps):
            for parameter in pipeline.parameters().values():
                parameter.grad = None
            step()
            if index + 1 in (steps // 10, steps) and device_type == "cuda":
                torch.cuda.synchronize()
                seen.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        found[name] = seen
        del pipeline, step
        gc.collect()
    dist.destroy_process_group()
    return found


def exchange(ring_bytes, seed):
    """Messages of random sizes both ways through small rings, received late; whether each came as it was sent."""
    device = start("cuda")
    control = dist.new_group(backend="gloo")
    if not PeerCopies.possible(dist.group.WORLD, control, device):
        return None
    copies = PeerCopies(dist.group.WORLD, control, device, ring_bytes)
    rank, random = dist.get_rank(), Random(seed)
    sizes = [[random.choice((0, 1, 100, 1000, 5000)) for _ in range(60)] for _ in range(2)]

    def message(sender, index):
        generator = torch.Generator().manual_seed(100 * sender + index)
        return torch.randn(sizes[sender][index], generator=generator)

    sent, received, right = [], [], []
    for index in range(60):
        # Something to wait for, so that copies are not over before the next one is asked for.
        torch.cuda._sleep(random.choice((0, 10**6)))
        tensor = message(rank, index).to(device) + 0.0
        sent.append((copies.send(tensor, 1 - rank), tensor))
        if index % (rank + 2) == 0 or index == 59:
            for late in range(len(received), index + 1):
                tensor = torch.full((sizes[1 - rank][late],), float("nan"), device=device)
                received.append((copies.receive(tensor, 1 - rank), tensor))
    for index, (work, tensor) in enumerate(received):
        work.wait()
        right.append(torch.equal(tensor.cpu(), message(1 - rank, index)))
    torch.cuda.synchronize()
    assert all(work.is_completed() for work, _ in sent)
    dist.barrier(group=control)
    dist.destroy_process_group()
    return right


def stuck():
    """A receive that nobody sends to, let go."""
    device = start("cuda")
    control = dist.new_group(backend="gloo")
    copies = PeerCopies.make(dist.group.WORLD, control, device)
    if copies is not None and dist.get_rank() == 0:
        copy_of_nothing = copies.receive(torch.zeros(8, device=device), 1)
        copy_of_nothing.wait()
        assert not copy_of_nothing.is_completed()
        copies.release()
        torch.cuda.synchronize()
    dist.barrier(group=control)
    dist.destroy_process_group()


def train_t5(folder, accelerator, devices):
    """Losses of a few steps of a small T5 on the tiny corpus, on every rank."""
    torch.manual_seed(0)
    corpus = Corpus.open(folder)
    data = TaskDataModule(corpus, steps=8, encoder_length=64, decoder_length=16, rows_per_batch=8)
    module = Text2TextModule(vocab_size=corpus.vocab_size, size="nano", optimizer={"learning_rate": 3e-3})
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    strategy = ZeroPPStrategy(num_microbatches=4, stages_per_rank=1) if devices > 1 else "auto"
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=1,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return losses


SHARED = sorted({1, RANKS or 1})
"""D: no sharding, and all ranks."""


@pytest.mark.parametrize("data", SHARED)
def test_gradients_in_float32(data):
    """Products in full float32 (no TF32): sums in another order are all that differs, 1e-5 of a gradient's norm."""
    for found in run_distributed(errors, RANKS, "cuda", data, torch.float32):
        assert all(ours < 1e-5 for ours, _ in found.values()), found


@pytest.mark.parametrize("data", SHARED)
def test_gradients_in_bfloat16(data):
    """Against float64, at most 1.5 times as far as plain autograd in bfloat16 is."""
    for found in run_distributed(errors, RANKS, "cuda", data, torch.bfloat16):
        assert all(ours < 1.5 * plain for ours, plain in found.values()), found


@pytest.mark.parametrize("data", SHARED)
@pytest.mark.parametrize("compiled", ["blocks", "stages"])
def test_gradients_of_compiled_blocks(data, compiled):
    """The bounds of ``test_gradients_in_float32``."""
    names = ("zeropp", "zbv")
    for found in run_distributed(errors, RANKS, "cuda", data, torch.float32, names, compiled, timeout=300):
        assert all(ours < 1e-5 for ours, _ in found.values()), found


@pytest.mark.parametrize("data", SHARED)
def test_memory_does_not_grow_in_200_steps(data):
    """By less than 1 MiB; the activations of one micro-batch in a layer are more.

    Peaks differ by the messages that have not gone yet, which depends on times: at most all of a step's, both ways. One
    that were lost a step would make 180 of them.
    """
    message = 2 * LENGTH * WIDTH * 4
    for found in run_distributed(growth, RANKS, "cuda", data, 200, timeout=300):
        for (early, early_peak), (late, late_peak) in found.values():
            assert late - early < 2**20, found
            assert late_peak - early_peak <= 2 * MICRO_BATCHES * message, found


@pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("ring_bytes", [512, 4096, 2**20])
def test_copies_between_gpus(ring_bytes):
    """Every message is the one that was sent, also those longer than the ring."""
    for right in run_distributed(exchange, 2, ring_bytes, 0):
        if right is None:
            pytest.skip("the GPUs do not reach each other")
        assert right == [True] * 60


@pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")
def test_a_gpu_does_not_wait_for_ever():
    run_distributed(stuck, 2, timeout=60)


@pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")
def test_t5(tmp_path):
    """P=2 in float32 against one GPU: the first losses, before rounding adds up, within 1e-4 of each other."""
    folder = str(tmp_path / "corpus")
    compile_tasks(builtin_tasks(num_tasks=10, examples_per_task=20), folder, tokenizer=ByteTokenizer(), progress=False)
    (alone,) = run_distributed(train_t5, 1, folder, "cuda", 1)
    for losses in run_distributed(train_t5, 2, folder, "cuda", 2):
        assert len(losses) == len(alone) == 8
        assert losses[:4] == pytest.approx(alone[:4], rel=1e-4)


@pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")
def test_what_is_recorded(tmp_path):
    """The monitor's run on NCCL, timed by CUDA events: complete, without overlaps, memory from the allocator."""
    settings = {"every_n_steps": 2}
    (found, timeline, _), _ = run_distributed(
        test_monitor.fit, 2, str(tmp_path), settings, {"num_microbatches": 4}, 6, "cuda"
    )
    assert list(found) == [2, 4, 6]
    assert 0 < found[6]["pipeline/bubble_share"] < 1
    for rank, lane in enumerate(timeline.lanes):
        assert len(lane.tasks) == 3 * 2 * 4
        assert lane.peak_bytes is not None
        assert 0 < found[6][f"pipeline/peak_gib_rank_{rank}"] < 0.1
