# SPDX-License-Identifier: Apache-2.0
"""Jinja for templates from outside: nothing unsafe, and nothing that builds much text out of little.

Jinja's immutable sandbox keeps templates from the interpreter's insides, but not from memory: ``'%999999999d' % 1`` is
a gigabyte. Here every operation that can multiply a text is checked before it is done: repetition is refused, formats,
padding and indentation have a largest width, and what is added, joined, replaced or rendered (also inside a macro) a
largest length. Time is not limited. ``jinja2`` is imported when :func:`sandbox` is called.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sized
from typing import Any

__all__ = ["LONGEST", "WIDEST", "sandbox"]

LONGEST = 1_000_000
"""Most characters of a text, or elements of a list, that a template may build."""
WIDEST = 1_000
"""Largest width, precision or indentation, and longest text given to a filter that repeats it."""

_WIDTHS = re.compile(r"\*|\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_PADDING_FILTERS = ("batch", "center", "indent", "slice", "tojson", "truncate", "urlize", "wordwrap", "xmlattr")
_PADDING_METHODS = frozenset(["center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"])
_REFUSED_METHODS = frozenset(["translate"])


def _refusal(reason: str) -> Exception:
    from jinja2.exceptions import SecurityError

    return SecurityError(reason)


def _check_size(size: int) -> None:
    if size > LONGEST:
        raise _refusal(f"it builds a text or list of {size:,} or more, over the limit of {LONGEST:,}")


def _check_width(width: int | str) -> None:
    if width == "*" or int(width) > WIDEST:
        raise _refusal(f"the width {width} in a format or filter is over the limit of {WIDEST:,}")


def _check_percent(text: str) -> None:
    for groups in _PERCENT.findall(text):
        for width in filter(None, groups):
            _check_width(width)


def _check_arguments(arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, int):
            _check_width(argument)
        elif isinstance(argument, str) and len(argument) > WIDEST:
            raise _refusal(f"a filter is given {len(argument):,} characters, over the limit of {WIDEST:,}")


def _check_replaced(text: str, old: str, new: str) -> None:
    _check_size(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _check_joined(parts: list[Any], separator: str) -> None:
    _check_size(sum(len(str(part)) for part in parts) + len(separator) * len(parts))


def _concat(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        size += len(part)
        _check_size(size)
        kept.append(part)
    return "".join(kept)


@functools.cache
def sandbox() -> Any:
    """The environment, one for all templates."""
    from jinja2 import StrictUndefined
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802 - named by jinja2
            self.write("environment.concat((")
            for part in node.nodes:
                self.write("str(")
                self.visit(part, frame)
                self.write("), ")
            self.write("))")

    class Formatter(SandboxedFormatter):
        def format_field(self, value: Any, format_spec: str) -> Any:
            for width in _WIDTHS.findall(format_spec):
                _check_width(width)
            return super().format_field(value, format_spec)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%"])
        code_generator_class = Generator
        concat = staticmethod(_concat)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator in ("*", "**"):
                raise _refusal(f"the operator {operator!r} is not allowed in a template")
            if operator == "%" and isinstance(left, str):
                _check_percent(left)
            if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
                _check_size(len(left) + len(right))
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            if super().wrap_str_format(value) is None:
                return None
            text, is_map = str(value.__self__), value.__name__ == "format_map"

            def formatted(*args: Any, **kwargs: Any) -> str:
                return Formatter(self).vformat(text, () if is_map else args, args[0] if is_map else kwargs)

            return formatted

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063 - as in jinja2
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            if name in _PADDING_METHODS:
                _check_arguments([*args, *kwargs.values()])
            elif isinstance(owner, str) and name == "replace":
                _check_replaced(owner, *args[:2])
            elif isinstance(owner, str) and name == "join":
                args = ([*args[0]],)
                _check_joined(args[0], owner)
            return super().call(__context, __obj, *args, **kwargs)

    environment = Environment(undefined=StrictUndefined, autoescape=False)

    def guard(name: str, check: Callable[..., None]) -> None:
        filtered = environment.filters[name]
        # Filters that take a context or environment get it first.
        first = 1 if hasattr(filtered, "jinja_pass_arg") else 0

        @functools.wraps(filtered)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            values = list(args)
            if name == "join":
                values[first] = list(values[first])
            check(*values[first:], **kwargs)
            return filtered(*values, **kwargs)

        environment.filters[name] = guarded

    for name in _PADDING_FILTERS:
        guard(name, lambda _, *args, **kwargs: _check_arguments([*args, *kwargs.values()]))
    guard("format", lambda text, *_, **__: _check_percent(str(text)))
    guard("replace", lambda text, old, new, count=None: _check_replaced(str(text), str(old), str(new)))
    guard("join", lambda parts, d="", attribute=None: _check_joined(parts, str(d)))
    environment.globals["zip"] = zip
    for name in ("lipsum", "cycler", "joiner", "namespace"):
        environment.globals.pop(name, None)
    return environment
