# SPDX-License-Identifier: Apache-2.0
"""A model as a chain of blocks, taken out of and put back into code that knows nothing of pipelines.

User code calls its model in the middle of a step: something before (embeddings, masks), the blocks, something behind
(norm, head, loss). A rank holds a few blocks only. So the step is run twice, with *stand-ins* in the blocks' places:

* ``capture`` runs it up to the last block. The stand-ins note what each block was given besides the stream (masks,
  rotary embeddings) and pass the stream on. The first stage gets its input here; the others get those notes.
* ``replay`` runs it with the pipeline's output in the last block's place: what comes back is the user's loss.

Two forms: a *target* (one module whose call is the chain: an ``nn.Sequential``, or what ``configure_pipeline`` names),
or a list of blocks called one after another by user code. In the second form it is checked, at every call, that each
block is fed the output of the one before, and that nothing else that a block is given carries gradients; and, at the
first call, that nothing else depends on the stream at all. A replay's stream is NaN between the blocks, so that a loss
that reads it there is noticed. (Of the first form see ``chain_check``.)

Modules outside the blocks live on the first stage (registered before the blocks) or the last (behind). Where a rank
lacks one, a stand-in is in its place too (see ``stand_in``). ``find_chain`` says which modules are blocks.

Alternatives: tracing (``torch.export``) asks for a traceable step; asking the user to split the step by hand is what
Megatron-LM and torchtitan do, and no drop-in.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_zeroprompt.pipeline.stand_in import StandIn, nothing_of, without_caches
from lightning_zeroprompt.pipeline.torch_compat import allow_recompilations, is_compiled

__all__ = ["Calls", "Chain", "StageMemo"]

_Made = TypeVar("_Made")
_Link = tuple[nn.Module, tuple[Any, ...], dict[str, Any], bool]
"""A block, what it is given besides the stream, and whether it takes the memo."""
_ROWS = 64
"""Different rows that may be compiled in a process: by their blocks, shapes, and modes."""


@dataclass(slots=True)
class Calls:
    """What user code gave to the blocks for one micro-batch.

    Attributes:
        args: What the chain was called with: with a target all positional arguments, else the stream alone.
        kwargs: Keyword arguments of the target.
        extra: For each block called by user code, what it was given besides the stream.
        checkpointed: Whether user code calls its blocks through ``torch.utils.checkpoint``.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    extra: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    checkpointed: bool = False


class StageMemo:
    """What the blocks of one stage make once for one micro-batch, such as a mask or a bias that all layers add.

    No mapping, which FSDP would copy on its way into a block.
    """

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returned when the stage first asked for this name."""
        if name not in self._made:
            self._made[name] = make()
        made: _Made = self._made[name]
        return made


class _Captured(BaseException):
    """The last block has been reached; not an ``Exception``, which user code may catch."""


class Chain:
    """The blocks of a model, and how to run user code around them.

    Args:
        root: The module whose code is run (a LightningModule).
        blocks: In order. With a ``target``, the output of each is the positional input of the next; a block that
            declares a keyword ``inputs`` also gets the target's ``(args, kwargs)``, and one that declares ``memo`` the
            ``StageMemo`` of its stage and micro-batch.
        target: The module whose call is the whole chain; None where user code calls the blocks itself.
        name: What to call the chain in messages.

    Raises:
        ValueError: If a block is not part of the root, or there is none.
    """

    def __init__(
        self, root: nn.Module, blocks: Sequence[nn.Module], target: nn.Module | None = None, name: str = "blocks"
    ) -> None:
        self.root, self.blocks, self.target, self.name = root, list(blocks), target, name
        self.checkpoint_blocks = False
        self._run_row: Callable[[tuple[_Link, ...], Any], Any] = _run_row
        if not self.blocks:
            raise ValueError(f"{name} has no blocks to put on stages")
        self._takes_inputs, self._takes_memo = (
            [target is not None and name in inspect.signature(block.forward).parameters for block in self.blocks]
            for name in ("inputs", "memo")
        )
        for name, module in root.named_modules():
            inside = (part for child in module.children() for part in child.modules())
            if is_compiled(module) and any(part is self.blocks[0] for part in inside):
                raise ValueError(
                    f"{name!r} is compiled as a whole, so it cannot be cut into stages: compile its blocks instead "
                    "(for block in model.layers: block.compile())"
                )
        self._compared = False
        self._absent: list[nn.Module] = []
        self._released: list[nn.Module] = []
        self._absent_names: dict[int, str] = {}
        self._before = self._behind = True
        replaced = self.blocks if target is None else [] if target is root else [target]
        self._places = {id(module): _places(root, module) for module in replaced}
        for module in replaced:
            if not self._places[id(module)]:
                raise ValueError(f"{name}: {type(module).__name__} is no submodule of {type(root).__name__}")

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def has_stand_ins(self) -> bool:
        """Whether this rank runs user code without some of the modules in it."""
        return bool(self._absent or self._released)

    def makes_once(self, index: int) -> bool:
        """Whether a block may use what a stage makes once; see :class:`StageMemo`."""
        return self._takes_memo[index]

    # -- modules outside the blocks -------------------------------------------------------------------------------

    def outside(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Parameter]]:
        """Modules with parameters that no block holds.

        Returns:
            Those registered before the first block, those behind it, and parameters of modules that contain the blocks
            (which every rank needs, since it runs their code).
        """
        inside = {id(part) for block in self.blocks for part in block.modules()}
        held = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        before: list[nn.Module] = []
        behind: list[nn.Module] = []
        loose: list[nn.Parameter] = []
        seen_block = False

        def visit(module: nn.Module) -> None:
            nonlocal seen_block
            if id(module) in inside:
                seen_block = True
                return
            own = [p for p in module._parameters.values() if p is not None and id(p) not in held]
            if any(id(part) in inside for part in module.modules()):
                loose.extend(own)
                for child in module.children():
                    visit(child)
            elif own:
                (behind if seen_block else before).append(module)
            else:
                for child in module.children():
                    visit(child)

        visit(self.root)
        return before, behind, loose

    def leave_out(
        self, modules: Sequence[nn.Module], *, before: bool, behind: bool, released: Sequence[nn.Module] = ()
    ) -> None:
        """Say which outside modules this rank lacks.

        Args:
            modules: They are replaced by stand-ins while user code runs; their parameters are on the meta device.
            before: Whether this rank holds the first stage, so that a stand-in before the blocks is an error.
            behind: Whether it holds the last one.
            released: Modules before the blocks whose weights are here, but not gathered when the last stage has run;
                ``replay`` replaces them too.
        """
        self._absent, self._before, self._behind = list(modules), before, behind
        self._released = list(released)
        known = {id(module) for module in (*modules, *released)}
        self._absent_names = {id(part): name for name, part in self.root.named_modules() if id(part) in known}

    # -- user code ------------------------------------------------------------------------------------------------

    def capture(self, run: Callable[[], Any]) -> Calls:
        """Run user code up to the blocks.

        Args:
            run: Calls the step on one micro-batch.

        Raises:
            ValueError: If the step does not call the chain, or not as a chain.
        """
        if self.target is not None or self._compared:
            return self._capture(run)
        self._compared = True
        gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(gpu):
            other = self._capture(run, between=float("nan"))
        calls = self._capture(run)
        for index, (one, two) in enumerate(zip(calls.extra, other.extra, strict=True)):
            if not all(_same(a, b) for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True)):
                raise ValueError(
                    f"{self.name}: block {index} is given something besides the stream that is computed from what the "
                    "blocks before it return, and these may be on another rank. Compute it in the block, or return "
                    "(target, blocks) from configure_pipeline() with blocks that pass it on"
                )
        return calls

    def _capture(self, run: Callable[[], Any], between: float | None = None) -> Calls:
        calls = Calls()
        try:
            with self._replaced(calls, None, between):
                run()
        except _Captured:
            return calls
        raise ValueError(
            f"the step ended without calling {self.name}: every step has to call the pipelined model once. "
            "Name the module that it calls with configure_pipeline()"
        )

    def replay(self, run: Callable[[], Any], output: Any) -> Any:
        """Run user code with the pipeline's output in the blocks' place.

        Args:
            run: As for ``capture``.
            output: What the last block returned.

        Returns:
            What ``run`` returns.
        """
        with self._replaced(Calls(), (output,), float("nan")):
            return run()

    @contextmanager
    def _replaced(self, calls: Calls, output: tuple[Any] | None, between: float | None) -> Iterator[None]:
        reached = [0]
        token: list[Any] = [None]

        def finish() -> Any:
            reached[0] = len(self.blocks)
            if output is None:
                raise _Captured
            return output[0]

        def whole(*args: Any, **kwargs: Any) -> Any:
            if reached[0]:
                raise ValueError(self._called_again())
            calls.args, calls.kwargs = without_caches((args, kwargs))
            return finish()

        def block_call(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._check_call(index, reached[0], token[0], args)
                calls.extra.append(without_caches((args[1:], kwargs)))
                self._check_extra(index, calls.extra[-1])
                if index == 0:
                    calls.args = args[:1]
                    calls.checkpointed = _inside_checkpoint()
                reached[0] += 1
                if reached[0] == len(self.blocks):
                    return finish()
                # A new object, so that a later block that is given another one's output is noticed.
                stream = args[0]
                if index == 0 and between is not None and stream.is_floating_point():
                    stream = torch.full_like(stream, between)
                token[0] = stream.view_as(stream)
                return token[0]

            return call

        swaps: list[tuple[nn.Module, str, nn.Module]] = []

        def swap(module: nn.Module, call: Callable[..., Any]) -> None:
            stand_in = StandIn(module, call)
            if id(module) not in self._places:
                self._places[id(module)] = _places(self.root, module)
            for parent, name in self._places[id(module)]:
                swaps.append((parent, name, module))
                parent._modules[name] = stand_in

        try:
            for module in self._absent:
                swap(module, self._stand_in_for_absent(module, reached, before=self._before, behind=self._behind))
            for module in self._released if output is not None else ():
                swap(module, self._stand_in_for_absent(module, reached, before=False, behind=True))
            if self.target is None:
                for index, block in enumerate(self.blocks):
                    swap(block, block_call(index))
            elif self.target is self.root:
                self.root.forward = whole
            else:
                swap(self.target, whole)
            yield
        finally:
            for parent, name, module in swaps:
                parent._modules[name] = module
            if self.target is self.root:
                del self.root.forward

    def _called_again(self) -> str:
        return (
            f"{self.name}: called more than once in a step; a pipeline runs its stages once a micro-batch. Join the "
            "calls into one along the batch dimension"
        )

    def _check_call(self, index: int, expected: int, token: Any, args: tuple[Any, ...]) -> None:
        if index == 0 and expected == len(self.blocks):
            raise ValueError(self._called_again())
        if index != expected:
            again = "again" if index < expected else f"where block {expected} was next"
            raise ValueError(
                f"{self.name}: block {index} is called {again}; a pipeline runs each of its {len(self.blocks)} blocks "
                "once a micro-batch, in order. Name another list of blocks with configure_pipeline()"
            )
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{self.name}: block {index} is called without a tensor as first positional argument, which is what "
                "travels from stage to stage. Pass it so, or return (target, blocks) from configure_pipeline()"
            )
        if index and args[0] is not token:
            raise ValueError(
                f"{self.name}: block {index} is not given what block {index - 1} returned: something happens between "
                "them, or a block returns more than one tensor. Make blocks of what happens between, or return "
                "(target, blocks) from configure_pipeline(), where blocks may pass on tuples"
            )

    def _check_extra(self, index: int, extra: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        for leaf in tree_leaves(extra):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"{self.name}: block {index} is given a tensor of shape {tuple(leaf.shape)} besides the stream "
                    "that carries gradients (a skip connection, or a bias learned outside the blocks); it cannot reach "
                    "other stages. Return (target, blocks) from configure_pipeline() with blocks that pass it on"
                )

    def _stand_in_for_absent(
        self, module: nn.Module, reached: list[int], *, before: bool, behind: bool
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            over = reached[0] == len(self.blocks)
            if (behind and over) or (before and not over):
                side, way = ("behind", "after") if over else ("before", "before")
                again = ". If the step calls the model a second time: join the calls into one along the batch dimension"
                raise ValueError(
                    f"module {self._absent_names[id(module)]!r} runs {side} {self.name} but is registered on the other "
                    f"side of them, where its parameters were placed. Register it {way} the blocks, or make it a block "
                    f"with configure_pipeline(){again if over else ''}"
                )
            return nothing_of(module, args, kwargs)

        return call

    # -- blocks ---------------------------------------------------------------------------------------------------

    def compile_rows(self, **options: Any) -> None:
        """Compile what runs in a row (a stage, or one block where blocks are recomputed) instead of each block.

        Rows of like blocks share their code. What a compiled call costs the host is paid once a row.

        Args:
            options: Of ``torch.compile``.
        """
        allow_recompilations(_ROWS)
        self._run_row = torch.compile(_run_row, **options)

    def run(self, first: int, last: int, stream: tuple[Any, ...], calls: Calls) -> Any:
        """Run blocks ``first`` to ``last``.

        Args:
            first: Index of the first block.
            last: Index behind the last block.
            stream: What comes in: for block 0 the chain's arguments, else what block ``first - 1`` returned.
            calls: Of the micro-batch.

        Returns:
            What block ``last - 1`` returns.
        """
        return self.run_row(range(first, last), stream, calls)

    def run_row(self, indices: Iterable[int], stream: tuple[Any, ...], calls: Calls) -> Any:
        """As ``run``, for blocks in any order, a block several times included."""
        row = tuple(self._link(index, calls) for index in indices)
        if not (self.checkpoint_blocks or calls.checkpointed) or not torch.is_grad_enabled():
            return self._run_row(row, stream)
        output: Any = stream
        for link in row:
            # A block is run again alone: what another one has made is not made then.
            output = checkpoint(self._run_row, (link,), output, use_reentrant=False)
        return output

    def _link(self, index: int, calls: Calls) -> _Link:
        more: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if self.target is None:
            more, kwargs = calls.extra[index]
        else:
            if index == 0:
                kwargs = dict(calls.kwargs)
            if self._takes_inputs[index]:
                kwargs["inputs"] = (calls.args, calls.kwargs)
        return self.blocks[index], more, kwargs, self._takes_memo[index]


def _run_row(row: tuple[_Link, ...], stream: Any) -> Any:
    """Blocks, each on what the one before returned."""
    memo = StageMemo()
    output = stream
    for block, more, kwargs, takes_memo in row:
        args = output if isinstance(output, tuple) else (output,)
        output = block(*args, *more, **kwargs, memo=memo) if takes_memo else block(*args, *more, **kwargs)
    return output


def _places(root: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module is registered."""
    return [(parent, name) for parent in root.modules() for name, child in parent._modules.items() if child is module]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.is_meta or two.is_meta:
            return one.shape == two.shape
        return one.shape == two.shape and bool(((one == two) | ((one != one) & (two != two))).all())
    # What can be compared; functions and other objects are made anew at every call.
    return one == two if isinstance(one, (bool, int, float, str)) else True


def _inside_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None
