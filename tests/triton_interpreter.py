"""Triton's interpreter, made bearable: it searches its whole language anew at every device call."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def make_device_calls_cheap() -> None:
    """Search once per module: what is found then stays in force, here as in Triton's own way."""
    prepared: set[str] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
