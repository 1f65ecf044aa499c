# SPDX-License-Identifier: Apache-2.0
"""``import lightning_zeroprompt`` is enough for ``Trainer(strategy="zeropp")``, and costs nothing where no Trainer is.

Lightning knows strategies by a registry that comes to be when Lightning is imported; it has no entry point for others
to add to it. Importing Lightning from here would cost every program that imports this package some seconds, the
command line's ``--help`` included. So the name is registered as soon as Lightning's registry is there: now, or when
somebody imports it. The strategy itself is imported when a Trainer asks for it.

``pytorch_lightning`` has a registry of its own, of classes that are not Lightning's; there the name raises an error
that says so, instead of "invalid strategy name".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_imported"]


def _make_strategy(**settings: Any) -> Any:
    from lightning_zeroprompt.strategies import ZeroPPStrategy

    return ZeroPPStrategy(**settings)


def _refuse(**settings: Any) -> Any:
    raise TypeError(
        "strategy='zeropp' works with `lightning`, not with `pytorch_lightning`: the two packages have different base "
        "classes. Write `from lightning.pytorch import Trainer, LightningModule` (pip install lightning) throughout"
    )


_MAKERS: dict[str, Callable[..., Any]] = {
    "lightning.pytorch.strategies": _make_strategy,
    "pytorch_lightning.strategies": _refuse,
}


def _register(name: str, module: ModuleType) -> None:
    if "zeropp" not in module.StrategyRegistry:
        module.StrategyRegistry.register(
            "zeropp", _MAKERS[name], description="Pipeline parallelism (ZeroPP) with FSDP2"
        )


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: has modules that others find registered in once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _MAKERS:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in finders if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(fullname, module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register ``"zeropp"`` in the registries that are there, and in those that come."""
    for name in _MAKERS:
        if name in sys.modules:
            _register(name, sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
