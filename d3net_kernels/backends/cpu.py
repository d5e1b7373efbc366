"""The compiled CPU kernels (csrc/cpu), reached through the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _binary


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """The reason why this backend cannot serve `tensors`, or None."""
    if _binary.missing is not None:
        return _binary.missing
    for t in tensors:
        if t.device.type != "cpu":
            return f"a tensor is on {t.device}; the cpu backend serves CPU tensors"
    return None
