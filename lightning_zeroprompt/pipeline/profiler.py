# SPDX-License-Identifier: Apache-2.0
"""Costs of a model's blocks: measured on a device, or estimated without one.

A step is run once up to the blocks, as the pipeline does (see ``chain``); then every block is run by itself on what the
one before returned: F with its Linears deferred, B, W, an ordinary backward pass, and an optimizer step that changes
nothing. Blocks that look alike (class, shapes of parameters and inputs) are measured once. Behind the last one the step
is run again with its output, for the time of what lies behind.

What measures or estimates is a meter (see ``meters.py``). What is held from F to B, and from B to W, is the sum over
distinct storages that autograd and the deferred Linears keep. Lone blocks meet a GPU at rest; in the end all run one
after another for a second, and times grow by as much as that takes longer. Links can be measured beside the same work.

Alternatives: timing whole stages needs a cut, and each cut its own measurement; the sum over blocks was within the
noise of a stage's time there. PyTorch's profiler sees kernels, not what a host needs to launch them.

Cost: some 30 runs a distinct block; a 2.7B GPT has four distinct blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_zeroprompt.pipeline.chain import Calls, Chain
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link
from lightning_zeroprompt.pipeline.meters import DeviceMeter, Meter, Phase
from lightning_zeroprompt.pipeline.torch_compat import storage_key
from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore, defer_linears, restore_linears

__all__ = ["LinkMeter", "machine_name", "model_fingerprint", "profile_chain"]

LinkMeter = Callable[[Sequence[Callable[[], Any]]], Link]
"""Measures a link beside the work that it is given: functions that launch F, B and W of all distinct blocks."""

_STAGE = 4
"""Blocks in a row that show what a stage holds once, such as a mask or a bias."""
_ADAM_BYTES = 8
"""Bytes of Adam's two moments a parameter, in float32."""


def profile_chain(
    chain: Chain,
    step: Callable[[], Any],
    meter: Meter,
    *,
    message: Link | LinkMeter,
    gather: Link | LinkMeter | None = None,
    reduce: Link | LinkMeter | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    host_action: float = 0.0,
    reduce_dtype: torch.dtype | None = None,
) -> Costs:
    """Measure or estimate what a model's blocks cost.

    Args:
        chain: Its blocks, whole and on the meter's device.
        step: Runs user code on one micro-batch, as ``Chain.capture`` and ``replay`` call it; it returns a loss, or a
            mapping with one.
        meter: Measures, or estimates.
        message: Between neighbouring ranks, or what measures that; see :mod:`link_profile`.
        gather: Of gathers of weights; None is ``message``.
        reduce: Of reductions of gradients; None is ``gather``.
        context: What forward passes run in, such as autocast.
        host_action: See ``Costs``.
        reduce_dtype: Type of unreduced gradients; None is the parameters'.

    Raises:
        ValueError: If a block's costs come out as nothing.
    """
    defer_linears(chain.root)
    try:
        profile = _Profile(chain, meter, context, reduce_dtype)
        with torch.enable_grad(), meter.context():
            calls, before = profile.before(step)
            stream: Any = calls.args
            blocks = []
            for index in range(len(chain)):
                costs, stream = profile.block(index, stream, calls)
                blocks.append(costs)
            behind = profile.behind(step, stream)
            device, host = profile.under_load()
            messages = profile.link(message)
            gathers = messages if gather is None else profile.link(gather)
            reductions = gathers if reduce is None else profile.link(reduce)
            profile.forget_gradients()
    finally:
        restore_linears(chain.root)
    return Costs(
        blocks=tuple(_loaded(block, device, host) for block in blocks),
        message=messages,
        gather=gathers,
        reduce=reductions,
        before=_loaded(before, device, host),
        behind=_loaded(behind, device, host),
        host_action=host_action,
        model=model_fingerprint(chain),
        machine=machine_name(meter.device) if isinstance(meter, DeviceMeter) else "",
    )


def _loaded(costs: BlockCosts, device: float, host: float) -> BlockCosts:
    """With times that many times as long."""
    return replace(
        costs,
        forward=device * costs.forward,
        shared_forward=device * costs.shared_forward,
        backward=device * costs.backward,
        weight=device * costs.weight,
        full_backward=None if costs.full_backward is None else device * costs.full_backward,
        host_forward=host * costs.host_forward,
        host_backward=host * costs.host_backward,
        host_weight=host * costs.host_weight,
    )


class _Phases:
    """F, B and W of what runs in a row."""

    def __init__(
        self,
        run: Callable[[], Any],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._run, self._context = run, context
        self.store, self.outputs = WeightGradStore(), list[Any]()
        self._weight: list[Callable[[], None]] = []
        self._gradients: list[Tensor] = []

    def plain_forward(self) -> None:
        """F in front of an ordinary backward pass."""
        with self._context():
            self.outputs[:] = [self._run()]

    def forward(self) -> None:
        """F in front of B and W."""
        with self.store.record():
            self.plain_forward()

    def propagate(self) -> None:
        """B, whose deferred gradients stay in the store."""
        heads = [leaf for leaf in tree_leaves(self.outputs[0]) if _carries(leaf)]
        with self.store.record():
            _propagate(heads, self._gradients)

    def backward(self) -> None:
        """B, or an ordinary backward pass."""
        self.propagate()
        self._weight[:] = [self.store.take()]

    def weight(self) -> None:
        """W."""
        self._weight[0]()


class _Profile:
    def __init__(
        self,
        chain: Chain,
        meter: Meter,
        context: Callable[[], AbstractContextManager[Any]],
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self._chain, self._meter, self._context, self._reduce_dtype = chain, meter, context, reduce_dtype
        self._known: dict[str, BlockCosts] = {}
        self._rows: list[tuple[_Phases, list[Phase]]] = []
        # What calls of F, B and W take besides blocks, by the last row that was measured.
        self._call = [Phase(0.0, 0.0)] * 3
        self._outside_before, self._outside_behind, _ = chain.outside()

    # -- parts ----------------------------------------------------------------------------------------------------

    def before(self, step: Callable[[], Any]) -> tuple[Calls, BlockCosts]:
        """User code up to the blocks."""
        store, made, gradients = WeightGradStore(), list[Calls](), list[Tensor]()

        def forward() -> None:
            made[:] = [self._chain.capture(step)]

        def backward() -> None:
            heads = [leaf for leaf in tree_leaves(made[0].args) if _carries(leaf)]
            with store.record():
                _propagate(heads, gradients)

        phases = self._meter.measure([forward, backward], 0)
        forward()
        costs = self._costs(self._outside_before, phases, BlockCosts())
        calls = made[0]
        calls.args = tree_map_only(Tensor, _input, calls.args)
        self.forget_gradients()
        return calls, costs

    def block(self, index: int, stream: Any, calls: Calls) -> tuple[BlockCosts, Any]:
        """One block, and what it returns."""
        inputs = stream if isinstance(stream, tuple) else (stream,)
        with torch.no_grad(), self._context():
            output = self._chain.run(index, index + 1, inputs, calls)
        key = self._key(index, stream, calls, output)
        if key not in self._known:
            takes = [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves(inputs)]
            gives = [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves(output)]
            self._known[key] = self._measure_block(index, inputs, calls, alike=takes == gives)
        return self._known[key], tree_map_only(Tensor, _input, output)

    def behind(self, step: Callable[[], Any], stream: Any) -> BlockCosts:
        """User code behind the blocks, the loss included."""
        losses: list[Tensor] = []
        output = stream[0] if isinstance(stream, tuple) and len(stream) == 1 else stream

        def forward() -> None:
            result = self._chain.replay(step, output)
            losses[:] = [result["loss"] if isinstance(result, dict) else result]

        def backward() -> None:
            if losses[0].requires_grad:
                losses[0].backward()  # type: ignore[no-untyped-call]

        phases = self._meter.measure([forward, backward], 0)
        sizes = BlockCosts(activations=self._activations(forward))
        self.forget_gradients()
        return self._costs(self._outside_behind, phases, sizes)

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure_block(self, index: int, inputs: tuple[Any, ...], calls: Calls, *, alike: bool) -> BlockCosts:
        one = self._phases(index, inputs, calls, 1)
        times = self._meter.row if alike else 1
        parameters = [p for p in self._chain.blocks[index].parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0) if parameters else None

        one.forward()
        moved = _bytes((inputs, one.outputs[0]))
        # What blocks make once a call is made in F.
        once = [self._chain.makes_once(index), False, False]
        alone = loaded = self._meter.measure([one.forward, one.backward, one.weight], moved)
        whole = self._meter.measure([one.plain_forward, one.backward], moved)[1]
        row = one
        if times > 1:
            row = self._phases(index, inputs, calls, times)
            loaded = self._meter.measure([row.forward, row.backward, row.weight], times * moved)
            parts = [now.split(times, by, once=made) for now, by, made in zip(loaded, alone, once, strict=True)]
            split, self._call = [block for block, _ in parts], [call for _, call in parts]
            whole, _ = self._meter.measure([row.plain_forward, row.backward], times * moved)[1].split(times, whole)
        else:
            split = [phase.without(by, once=made) for phase, by, made in zip(alone, self._call, once, strict=True)]
        steps = self._meter.measure([optimizer.step], _bytes(parameters) * 4)[0] if optimizer else Phase(0.0, 0.0)
        del optimizer
        held, shared = self._activations(one.forward), 0
        if alike:
            several = self._activations(self._phases(index, inputs, calls, _STAGE).forward)
            shared = max(0, _STAGE * held - several) // (_STAGE - 1)
        one.forward()
        one.propagate()
        waiting = _distinct(one.store.held())
        one.store.take()
        sizes = BlockCosts(
            full_backward=whole.seconds,
            optimizer=steps.seconds,
            activations=held - shared,
            shared=shared,
            shared_forward=self._call[0].seconds if once[0] else 0.0,
            weight_inputs=waiting,
            output=_bytes(one.outputs[0]),
        )
        self.forget_gradients()
        self._rows.append((row, loaded))
        return self._costs([self._chain.blocks[index]], split, sizes)

    def under_load(self) -> tuple[float, float]:
        """How many times as long all distinct blocks take, and their host, when the device has been at work for long.

        A host is slower behind a wait for its device than in the midst of a step; one that is far ahead waits, too.
        """
        loaded = self._meter.under_load(self._work())
        self.forget_gradients()
        rested = [phase for _, phases in self._rows for phase in phases]
        known = [(now, rest) for now, rest in zip(loaded or [], rested, strict=False) if now is not None]
        if not known:
            return 1.0, 1.0
        device = sum(now.seconds for now, _ in known) / sum(rest.seconds for _, rest in known)
        host = sum(min(now.host, rest.host) for now, rest in known) / max(1e-9, sum(rest.host for _, rest in known))
        return max(1.0, device), host

    def link(self, link: Link | LinkMeter) -> Link:
        """A link as it is given, or measured beside all distinct blocks."""
        return link if isinstance(link, Link) else link(self._work())

    def _work(self) -> list[Callable[[], None]]:
        """F, B and W of each distinct block."""
        return [phase for row, _ in self._rows for phase in (row.forward, row.backward, row.weight)]

    def _phases(self, index: int, inputs: tuple[Any, ...], calls: Calls, times: int) -> _Phases:
        return _Phases(lambda: self._chain.run_row([index] * times, inputs, calls), self._context)

    def _activations(self, forward: Callable[[], None]) -> int:
        """Bytes of distinct storages that autograd keeps from F to B, weights left out."""
        weights = {storage_key(parameter) for parameter in self._chain.root.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            key = storage_key(tensor)
            if key not in weights:
                saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return sum(saved.values())

    def _costs(self, modules: Iterable[nn.Module], phases: Sequence[Phase], sizes: BlockCosts) -> BlockCosts:
        parameters = {id(p): p for module in modules for p in module.parameters()}.values()
        trained = [p for p in parameters if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in parameters)
        width = None if self._reduce_dtype is None else self._reduce_dtype.itemsize
        gradients = sum(p.numel() * (p.element_size() if width is None else width) for p in trained)
        state = weights + sum(p.numel() * (p.element_size() + _ADAM_BYTES) for p in trained)
        names = ("forward", "backward", "weight")
        times: dict[str, Any] = {}
        for name, phase in zip(names, phases, strict=False):
            times |= {name: phase.seconds, f"host_{name}": phase.host}
        return replace(
            sizes,
            **times,
            parameters=weights,
            gradients=gradients,
            state=state,
            tensors=len(parameters),
            workspace=max(phase.workspace for phase in phases),
        )

    def forget_gradients(self) -> None:
        """So that they take no memory."""
        for parameter in self._chain.root.parameters():
            parameter.grad = None

    def _key(self, index: int, stream: Any, calls: Calls, output: Any) -> str:
        block = self._chain.blocks[index]
        tensors = [*block.named_parameters(), *block.named_buffers()]
        more = calls.extra[index] if self._chain.target is None else (calls.args, calls.kwargs)
        return repr(
            (
                str(block),
                [_plain(part) for part in block.modules()],
                [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors],
                [
                    (tuple(t.shape), t.dtype, t.requires_grad)
                    for t in tree_leaves((stream, more))
                    if isinstance(t, Tensor)
                ],
            )
        )


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's settings; not its number, which layers of Hugging Face models have."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not any(word in name for word in ("idx", "index", "layer_id"))
    ]


def _carries(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _propagate(heads: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """A backward pass.

    Args:
        heads: What it begins with.
        gradients: Of the heads, made here once: random numbers, since a GPU draws less power for equal ones, and runs
            at higher clocks then than it does in training. Their generator is their own.
    """
    if [(head.shape, head.dtype) for head in heads] != [(gradient.shape, gradient.dtype) for gradient in gradients]:
        sources = {d: torch.Generator(d).manual_seed(0) for d in {head.device for head in heads} if d.type != "meta"}
        gradients[:] = [
            torch.randn(head.shape, dtype=head.dtype, device=head.device, generator=sources.get(head.device))
            for head in heads
        ]
    if heads:
        torch.autograd.backward(heads, gradients)


def _input(tensor: Tensor) -> Tensor:
    """A leaf that a stage is given; a part of a larger tensor is copied, or it would count as all of that."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    leaf = tensor.detach()
    if not leaf.is_meta and leaf.untyped_storage().nbytes() > leaf.numel() * leaf.element_size():
        leaf = leaf.clone()
    return leaf.requires_grad_() if floating else leaf


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _distinct(tensors: Iterable[Tensor]) -> int:
    return sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# -- names ----------------------------------------------------------------------------------------------------------


def model_fingerprint(chain: Chain) -> str:
    """A hash of a model's class, the number of its blocks, and its parameters' names and shapes."""
    parameters = [[name, list(p.shape)] for name, p in chain.root.named_parameters()]
    text = json.dumps([type(chain.root).__qualname__, len(chain), parameters])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine_name(device: torch.device) -> str:
    """The device and torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
