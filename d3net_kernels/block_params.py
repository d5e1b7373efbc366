"""What a D2 block is given besides its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, Union

import torch
import torch.distributed
from torch import Tensor

Norm: TypeAlias = Literal["per_source", "per_layer"]
# The name in quotes, for there are builds of torch without it.
Processes: TypeAlias = Union["torch.distributed.ProcessGroup", Literal["world"], None]


class ConvParams(NamedTuple):
    """The convolution of one source for all the layers that read it.

    weight (k * (L - i), C_i, kh, kw), odd sides, and bias (k * (L - i),) or None: one slot of k
    output channels per layer i+1..L, in this order. For `norm_conv2d` weight (K, C, kh, kw) and
    bias (K,).
    """

    weight: Tensor
    bias: Tensor | None


class NormParams(NamedTuple):
    """One batch normalisation of C channels; all vectors are (C,), of x's dtype or float32.

    `use_batch_statistics` as in training, or where there are no running ones (None): those are then
    updated in place, `momentum` being the share of the new batch, a number or a tensor of no
    dimensions. `eps` is added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_statistics: bool
    momentum: float | Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class D2Params:
    """All parameters of a D2 block: convs[i] of source i, and the norms.

    norm="per_source": norms[i] has the C_i channels of source i.
    norm="per_layer": norms[l] has the C_0 + l k channels that layer l + 1 reads.

    Which tensors these are stays as it is, what they hold may change. Calls without gradients go
    quicker when given the same object again.
    """

    convs: Sequence[ConvParams]
    norms: Sequence[NormParams]
    handles: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What such calls leave for each other (block_handle.py)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "convs", tuple(self.convs))
        object.__setattr__(self, "norms", tuple(self.norms))

    def __reduce__(self) -> Any:  # handles are this process's
        return D2Params, (self.convs, self.norms)
