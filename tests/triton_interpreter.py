"""Triton's interpreter, made bearable: fast enough, and with sums as accurate as a GPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def make_device_calls_cheap() -> None:
    """Search the language once per module and not at every device call: what is found then stays
    in force, here as in Triton's own way."""
    prepared: set[str] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


def add_in_pairs() -> None:
    """Sums as lanes make them, pair by pair. NumPy does so only along neighbours in memory; along
    others it adds one after the other, a thousand roundings in one accumulator."""

    def add(self: Any, summed: Any) -> Any:
        data = summed.handle.data
        if self.axis is not None:
            data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
        total = np.sum(data, axis=None if self.axis is None else -1)
        if self.keep_dims and self.axis is not None:
            total = np.expand_dims(total, self.axis)
        return self.to_tensor(total, summed.dtype)

    interpreter.ReduceOps.sum = add
