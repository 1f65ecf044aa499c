# SPDX-License-Identifier: Apache-2.0
"""A model as a chain of blocks, taken out of and put back into code that knows nothing of pipelines.

User code calls its model in the middle of a step: something before (embeddings, masks), the blocks, something behind
(norm, head, loss). A rank holds a few blocks only. So the step is run twice, with *stand-ins* in the blocks' places:

* ``capture`` runs it up to the last block. The stand-ins note what each block was given besides the stream (masks,
  rotary embeddings) and pass the stream on. The first stage gets its input here; the others get those notes.
* ``replay`` runs it with the pipeline's output in the last block's place: what comes back is the user's loss.

Two forms: a *target* (one module whose call is the chain: an ``nn.Sequential``, or what ``configure_pipeline`` names),
or a list of blocks called one after another by user code. In the second form it is checked, at every call, that each
block is fed the output of the one before, and that nothing else that a block is given carries gradients.

Modules outside the blocks live on the first stage (registered before the blocks) or the last (behind). Where a rank
lacks one, its stand-in returns NaN in the right shape: code that really needed it cannot go unnoticed.

Alternatives: tracing (``torch.export``) asks for a traceable step; asking the user to split the step by hand is what
Megatron-LM and torchtitan do, and no drop-in.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

__all__ = ["Calls", "Chain", "find_chain"]


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


class _Captured(BaseException):
    """The last block has been reached; not an ``Exception``, which user code may catch."""


class _StandIn(nn.Module):
    """In a block's place while user code runs; attributes are the block's."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_call", call)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_block"], name)
        if isinstance(value, nn.Parameter) and value.is_meta:
            raise RuntimeError(
                f"user code reads the parameter {name!r} of {type(self.__dict__['_block']).__name__}, which another "
                "rank holds. A tied weight has to be a parameter of both modules (self.head.weight = "
                "self.embedding.weight); for anything else return blocks that hold what they use from "
                "configure_pipeline()"
            )
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)


class Chain:
    """The blocks of a model, and how to run user code around them.

    Args:
        root: The module whose code is run (a LightningModule).
        blocks: In order. With a ``target``, the output of each is the positional input of the next; a block that
            declares a keyword ``inputs`` also gets the target's ``(args, kwargs)``.
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
        if not self.blocks:
            raise ValueError(f"{name} has no blocks to put on stages")
        self._takes_inputs = [
            target is not None and "inputs" in inspect.signature(block.forward).parameters for block in self.blocks
        ]
        self._absent: list[nn.Module] = []
        self._place = "the first and the last stage"
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
        return bool(self._absent)

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

    def leave_out(self, modules: Sequence[nn.Module], *, before: bool, behind: bool) -> None:
        """Say which outside modules this rank lacks.

        Args:
            modules: They are replaced by stand-ins while user code runs; their parameters are on the meta device.
            before: Whether this rank holds the first stage, so that a stand-in before the blocks is an error.
            behind: Whether it holds the last one.
        """
        self._absent, self._before, self._behind = list(modules), before, behind

    # -- user code ------------------------------------------------------------------------------------------------

    def capture(self, run: Callable[[], Any]) -> Calls:
        """Run user code up to the blocks.

        Args:
            run: Calls the step on one micro-batch.

        Raises:
            ValueError: If the step does not call the chain, or not as a chain.
        """
        calls = Calls()
        try:
            with self._replaced(calls, None):
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
        with self._replaced(Calls(), (output,)):
            return run()

    @contextmanager
    def _replaced(self, calls: Calls, output: tuple[Any] | None) -> Iterator[None]:
        reached = [0]
        token: list[Any] = [None]

        def finish() -> Any:
            reached[0] = len(self.blocks)
            if output is None:
                raise _Captured
            return output[0]

        def whole(*args: Any, **kwargs: Any) -> Any:
            if reached[0]:
                raise ValueError(
                    f"{self.name} is called more than once in a step; a pipeline runs its stages once a micro-batch. "
                    "Join the calls into one along the batch dimension"
                )
            calls.args, calls.kwargs = args, kwargs
            return finish()

        def block_call(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._check_call(index, reached[0], token[0], args)
                calls.extra.append((args[1:], kwargs))
                self._check_extra(index, calls.extra[-1])
                if index == 0:
                    calls.args = args[:1]
                    calls.checkpointed = _inside_checkpoint()
                reached[0] += 1
                if reached[0] == len(self.blocks):
                    return finish()
                # A new object, so that a later block that is given another one's output is noticed.
                token[0] = args[0].view_as(args[0]) if isinstance(args[0], Tensor) else args[0]
                return token[0]

            return call

        swaps: list[tuple[nn.Module, str, nn.Module]] = []

        def swap(module: nn.Module, call: Callable[..., Any]) -> None:
            stand_in = _StandIn(module, call)
            for parent, name in self._places.setdefault(id(module), _places(self.root, module)):
                swaps.append((parent, name, module))
                parent._modules[name] = stand_in

        try:
            for module in self._absent:
                swap(module, self._stand_in_for_absent(module, reached))
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

    def _check_call(self, index: int, expected: int, token: Any, args: tuple[Any, ...]) -> None:
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

    def _stand_in_for_absent(self, module: nn.Module, reached: list[int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            over = reached[0] == len(self.blocks)
            if (self._behind and over) or (self._before and not over):
                name = next((n for n, part in self.root.named_modules() if part is module), type(module).__name__)
                side, way = ("behind", "after") if over else ("before", "before")
                again = ". If the step calls the model a second time: join the calls into one along the batch dimension"
                raise ValueError(
                    f"module {name!r} runs {side} {self.name} but is registered on the other side of them, where its "
                    f"parameters were placed. Register it {way} the blocks, or make it a block with "
                    f"configure_pipeline(){again if over else ''}"
                )
            device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            # Copies of tied parameters may be real, or sharded, on this rank.
            weights = {
                name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in module.named_parameters()
            }
            with torch.no_grad():
                shapes = functional_call(module, weights, _to_meta(args), _to_meta(kwargs))
            return tree_map_only(Tensor, lambda shape: _nothing(shape, device), shapes)

        return call

    # -- blocks ---------------------------------------------------------------------------------------------------

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
        output: Any = stream
        for index in range(first, last):
            args = output if isinstance(output, tuple) else (output,)
            kwargs: dict[str, Any] = {}
            if self.target is None:
                more, kwargs = calls.extra[index]
                args = (*args, *more)
            else:
                if index == 0:
                    kwargs = dict(calls.kwargs)
                if self._takes_inputs[index]:
                    kwargs["inputs"] = (calls.args, calls.kwargs)
            block = self.blocks[index]
            if (self.checkpoint_blocks or calls.checkpointed) and torch.is_grad_enabled():
                output = checkpoint(block, *args, use_reentrant=False, **kwargs)
            else:
                output = block(*args, **kwargs)
        return output


def _places(root: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module is registered."""
    return [(parent, name) for parent in root.modules() for name, child in parent._modules.items() if child is module]


def _to_meta(part: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), part)


def _nothing(shape: Tensor, device: torch.device | None) -> Tensor:
    filled = torch.empty(shape.shape, dtype=shape.dtype, device=device)
    return filled.fill_(float("nan")) if filled.is_floating_point() else filled.zero_()


def _inside_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def find_chain(root: nn.Module) -> Chain:
    """Find what to cut into stages.

    In this order: what ``root.configure_pipeline()`` returns (``(target, blocks)`` or a list of blocks), the
    ``nn.Sequential`` or ``nn.ModuleList`` with the most parameters; a Sequential is a target, a list's blocks have to
    be called by user code one after another.

    Args:
        root: A LightningModule, or any module.

    Raises:
        ValueError: If there is none, with the way out.
    """
    hook = getattr(root, "configure_pipeline", None)
    if hook is not None:
        answer = hook()
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], nn.Module):
            target, blocks = answer
        else:
            target, blocks = None, answer
        blocks = list(blocks) if isinstance(blocks, (list, tuple, nn.ModuleList, nn.Sequential)) else None
        if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
            raise ValueError(
                "configure_pipeline() has to return (target, [block, ...]) or [block, ...], all of them modules; "
                f"it returned {type(answer).__name__}"
            )
        return Chain(root, blocks, target, "the blocks of configure_pipeline()")
    best: tuple[int, str, nn.Module] | None = None
    for name, module in root.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1 and module is not root:
            size = sum(parameter.numel() for parameter in module.parameters())
            # The outermost of equals: a list inside a list is the same parameters once more.
            if size and (best is None or size > best[0]):
                best = (size, name, module)
    if best is None:
        raise ValueError(
            f"{type(root).__name__} has no nn.Sequential and no nn.ModuleList with parameters to cut into stages; say "
            "what to pipeline with configure_pipeline(), which returns (module, [block, ...])"
        )
    _, name, module = best
    blocks = list(module.children())
    return Chain(root, blocks, module if isinstance(module, nn.Sequential) else None, repr(name))
