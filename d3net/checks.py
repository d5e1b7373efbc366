"""What enters the networks, checked before anything is computed or a running statistic changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from d3net.separation import SeparationConfig

SMALLEST_IMAGE = 29  # pixels a side, for one pixel at the coarsest scale: (29 + 3) // 4 // 8


def has_memory(model: nn.Module) -> None:
    """A model that values can be copied into and from: nothing of it is on the meta device."""
    for name, t in model.state_dict().items():
        if t.is_meta:
            raise ValueError(
                f"model has no memory for its values ({name} is on the meta device); give it some "
                "first: model.to_empty(device='cpu'), then model.reset_parameters()"
            )


def images(images: Tensor, weight: Tensor, training: bool) -> None:
    """Images (N, C, H, W) for a backbone whose first convolution has `weight`."""
    _numbers("images", images, f"(N, {weight.shape[1]}, H, W)", weight)
    if images.dim() != 4 or images.shape[1] != weight.shape[1]:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; accepted is (N, {weight.shape[1]}, H, W)"
        )
    n, _, height, width = images.shape
    if height < SMALLEST_IMAGE or width < SMALLEST_IMAGE:
        raise ValueError(
            f"images is {height} x {width}; the coarsest scale, 1/32, needs H and W of at least "
            f"{SMALLEST_IMAGE}: pad or enlarge the images"
        )
    if training and n == 1 and (height + 3) // 4 // 8 * ((width + 3) // 4 // 8) == 1:
        raise ValueError(
            f"images has shape {tuple(images.shape)}: one image with one pixel at scale 1/32 gives "
            "no batch statistics; train on larger or several images, or call eval()"
        )


def magnitudes(
    magnitudes: Tensor, in_offset: Tensor, config: SeparationConfig, training: bool
) -> None:
    """Magnitudes (N, channels, T, bins) for a network whose first parameter is `in_offset`."""
    channels, bins, step = config.channels, config.bins, config.frame_step
    accepted = f"(N, {channels}, T, {bins}): channels, frames, bins"
    _numbers("magnitudes", magnitudes, accepted, in_offset)
    if magnitudes.dim() != 4 or magnitudes.shape[1] != channels or magnitudes.shape[3] != bins:
        raise ValueError(f"magnitudes has shape {tuple(magnitudes.shape)}; accepted is {accepted}")
    n, _, frames, _ = magnitudes.shape
    if frames < step or frames % step != 0:
        raise ValueError(
            f"magnitudes has {frames} frames; accepted are positive multiples of {step}: pad the "
            f"frames with zeros and crop the result, for instance "
            f"torch.nn.functional.pad(magnitudes, (0, 0, 0, -frames % {step}))"
        )
    if (
        training
        and n == 1
        and 1
        in (
            (frames >> band.poolings) * (width >> band.poolings)
            for width, band in config.branches.values()
        )
    ):
        raise ValueError(
            f"magnitudes has shape {tuple(magnitudes.shape)}: one value at a branch's coarsest "
            "scale gives no batch statistics; train on more frames or a larger batch, or call "
            "eval()"
        )


def input_statistics(mean: Tensor, std: Tensor, bins: int) -> None:
    """Mean and standard deviation of `bins` bins, by which the magnitudes are normalised."""
    for name, t in (("mean", mean), ("std", std)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is of type {type(t).__name__}; accepted is a tensor ({bins},)")
        if t.shape != (bins,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; accepted is ({bins},)")
        if not t.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; accepted are finite numbers")
    if not std.max() > 0:
        raise ValueError("std has no value above zero; accepted are those of audible mixtures")


def _numbers(name: str, x: Tensor, accepted: str, parameter: Tensor) -> None:
    """A tensor of the parameters' dtype; torch.autocast takes others too, but no float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; accepted is a tensor {accepted}")
    if not x.is_floating_point():
        advice = "; take abs() of a spectrum" if x.is_complex() else ""
        raise TypeError(
            f"{name} is of {x.dtype}; accepted are floating-point numbers, scaled as for training"
            f"{advice}"
        )
    if x.dtype == parameter.dtype:
        return
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    double = torch.float64 in (x.dtype, parameter.dtype)
    if double or not autocast:
        raise TypeError(
            f"{name} is of {x.dtype} and the network of {parameter.dtype}; they must be equal, "
            f"convert one: {name}.to({parameter.dtype}) or network.to({x.dtype})"
            f"{'' if double else ' (or run under torch.autocast)'}"
        )
