# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are the blocks of its chain: what the user names, or the largest list that fills the stages.

Alternative: tracing a step to see which modules run one after another needs a batch, and weights on every rank.
"""

from __future__ import annotations

from torch import nn

from lightning_zeroprompt.pipeline.chain import Chain

__all__ = ["find_chain"]


def find_chain(root: nn.Module, stages: int = 1) -> Chain:
    """Find what to cut into stages.

    In this order: what ``root.configure_pipeline()`` returns (``(target, blocks)`` or a list of blocks), the
    ``nn.Sequential`` or ``nn.ModuleList`` with the most parameters among those with a block for every stage, or among
    all where none has (one inside another counts where it is most of that); a Sequential is a target, a list's blocks
    have to be called by user code one after another.

    Args:
        root: A LightningModule, or any module.
        stages: How many there will be at least.

    Raises:
        ValueError: If there is none, or ``configure_pipeline`` returns what is no chain of this module's, with the way
            out.
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
        chain = Chain(root, blocks, target, "the blocks of configure_pipeline()")
        _check_parameters(chain)
        return chain
    found: list[tuple[bool, int, str, nn.Module]] = []
    sizes: dict[str, int] = {}
    for name, module in root.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1 and module is not root:
            size = sum(parameter.numel() for parameter in module.parameters())
            parts = name.split(".")
            around = max(sizes.get(".".join(parts[:count]), 0) for count in range(len(parts)))
            sizes[name] = size
            # What is less than half of a list around it is one layer's own, such as its experts.
            if size:
                found.append((len(module) >= stages and 2 * size > around, size, name, module))
    if not found:
        raise ValueError(
            f"{type(root).__name__} has no nn.Sequential and no nn.ModuleList with parameters to cut into stages; say "
            "what to pipeline with configure_pipeline(), which returns (module, [block, ...])"
        )
    # The outermost of equals, which comes first: a list inside a list is the same parameters once more.
    _, _, name, module = max(found, key=lambda each: each[:2])
    blocks = list(module.children())
    return Chain(root, blocks, module if isinstance(module, nn.Sequential) else None, repr(name))


def _check_parameters(chain: Chain) -> None:
    """Refuse blocks that the call they stand for cannot run: no step of it would train them."""
    around = chain.root if chain.target is None else chain.target
    held = set(around.parameters())
    for index, block in enumerate(chain.blocks):
        foreign = [name for name, parameter in block.named_parameters() if parameter not in held]
        if foreign:
            raise ValueError(
                f"{chain.name}: block {index}, a {type(block).__name__}, has parameters {', '.join(foreign[:3])} that "
                f"are none of {type(around).__name__}'s, whose call the blocks are run in place of. Return (target, "
                "blocks) with a target that contains all of its blocks, made of the module's own parts"
            )
