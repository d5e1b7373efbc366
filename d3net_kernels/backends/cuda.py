"""The compiled CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """The reason why this backend cannot serve `tensors`, or None."""
    return "this release has no CUDA kernels"
