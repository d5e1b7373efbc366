"""Every check of a public argument, and nothing else: what was given, what is accepted, what to do.

Only sizes that must agree are compared, so that tracing with symbolic sizes keeps them symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._layout import autocast_dtype_for
from .block_params import D2Params, Norm, NormParams, Processes

Dilations: TypeAlias = Sequence[int | tuple[int, int]]

MOST_DEFAULT_SOURCES = 31  # so that 2**i stays below 2**31, as every dilation has to
ACCEPTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(
    inputs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilations: Dilations | None,
    group_channels: Sequence[int] | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[list[Tensor], list[int]]:
    """Check one call of the op; return its sources and flat dilations (dh0, dw0, dh1, ...).

    Raises:
        TypeError: an argument, an element or a dtype is of the wrong kind.
        ValueError: sizes, devices or dilations do not fit together.
    """
    sources = split_sources(inputs, group_channels)
    channels = _sources_agree(sources)
    first = sources[0]
    _tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; accepted is (K, sum of C_i, kh, kw)"
        )
    out_channels, weight_channels, kernel_h, kernel_w = weight.shape
    if weight_channels != channels:
        raise ValueError(
            f"weight has {weight_channels} input channels, but the inputs have {channels} in all "
            f"({[x.shape[1] for x in sources]}); pass a weight of shape (K, {channels}, kh, kw)"
        )
    if kernel_h % 2 != 1 or kernel_w % 2 != 1:
        raise ValueError(
            f"weight has a {kernel_h} x {kernel_w} kernel; accepted are odd heights and widths "
            "(the padding is 'same')"
        )
    if out_channels < 1:
        raise ValueError("weight has 0 output channels; at least 1 is needed")
    _same_place("weight", weight, first)
    if bias is not None:
        _tensor("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != out_channels:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted is ({out_channels},)")
        _same_place("bias", bias, first)
    _psi(scale, shift, relu, channels, first)
    return sources, flat_dilations(dilations, len(sources))


def split_sources(
    inputs: Sequence[Tensor] | Tensor, group_channels: Sequence[int] | None
) -> list[Tensor]:
    """The list of sources; one tensor is cut along its channels into views, without a copy."""
    if isinstance(inputs, Tensor):
        return _cut(inputs, group_channels)
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(
            f"inputs is of type {type(inputs).__name__}; accepted are a list or tuple of tensors "
            "(N, C_i, H, W), or one tensor with group_channels"
        )
    if group_channels is not None:
        raise ValueError(
            "group_channels was given with a list of inputs; it belongs to one concatenated "
            "tensor, leave it out here"
        )
    if not inputs:
        raise ValueError("inputs is empty; at least one source (N, C_0, H, W) is needed")
    return list(inputs)


def sources_match(inputs: Sequence[Tensor] | Tensor, in_channels: Sequence[int]) -> None:
    """Check that a list of sources has the channels that a module was made for, one by one."""
    if not isinstance(inputs, (list, tuple)):
        return  # one tensor is cut by its channels, and checked there
    if len(inputs) != len(in_channels):
        raise ValueError(
            f"inputs has {len(inputs)} source(s), but this module was made for {len(in_channels)}"
        )
    for i, (x, channels) in enumerate(zip(inputs, in_channels, strict=True)):
        _source(f"inputs[{i}]", x)
        if x.shape[1] != channels:
            raise ValueError(
                f"inputs[{i}] has {x.shape[1]} channels, but this module was made for {channels} "
                f"there (in_channels {list(in_channels)})"
            )


def flat_dilations(dilations: Dilations | None, sources: int) -> list[int]:
    """Dilations as dh0, dw0, dh1, dw1, ...; None stands for 2**i, the paper's choice (eq. 2)."""
    if dilations is None:
        if sources > MOST_DEFAULT_SOURCES:
            raise ValueError(
                f"dilations is None, which stands for 2**i, for {sources} sources; accepted is "
                f"that for up to {MOST_DEFAULT_SOURCES} (dilations are below 2**31), pass one per "
                "source"
            )
        return [1 << i for i in range(sources) for _ in (0, 1)]
    if not isinstance(dilations, (list, tuple)):
        raise TypeError(
            f"dilations is of type {type(dilations).__name__}; accepted is a list with one int or "
            "(dh, dw) per source, or None for 2**i"
        )
    if len(dilations) != sources:
        raise ValueError(
            f"dilations has {len(dilations)} entries for {sources} source(s); give one per source"
        )
    flat: list[int] = []
    for i, dilation in enumerate(dilations):
        pair = dilation if isinstance(dilation, (list, tuple)) else (dilation, dilation)
        if len(pair) != 2 or not (_is_int(pair[0]) and _is_int(pair[1])):
            raise TypeError(f"dilations[{i}] is {dilation!r}; accepted are an int or (dh, dw)")
        if not (1 <= pair[0] < 2**31 and 1 <= pair[1] < 2**31):
            raise ValueError(f"dilations[{i}] is {dilation!r}; accepted are 1 <= dilation < 2**31")
        flat += pair
    return flat


def block_input(
    x: Tensor | Sequence[Tensor], weight: Tensor, batch_statistics: bool, processes: Processes
) -> tuple[list[Tensor], dist.ProcessGroup | None]:
    """Check what enters a D2 block, before it updates its running statistics.

    `weight` is that of the source 0; `batch_statistics` says whether any norm takes them. Returns
    the parts of x, and the group to share the statistics with, None where they are those of this
    process alone.
    """
    if isinstance(x, (list, tuple)):
        if not x:
            raise ValueError("x is an empty list; accepted is one tensor (N, C, H, W) at least")
        parts, channels = list(x), _sources_agree(x, "x")
    else:
        only: Any = x
        _source("x", only)
        parts, channels = [only], only.shape[1]
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        given = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"the weight for x is {given}; accepted is a tensor (K, C, kh, kw)")
    if channels != weight.shape[1]:
        raise ValueError(
            f"x has {channels} channels, but the weights were made for {weight.shape[1]}"
        )
    first = parts[0]
    _same_place("weight", weight, first, "x")
    process_group(processes)
    group = _group_of_several(processes) if batch_statistics else None
    n, _, height, width = first.shape
    if batch_statistics and group is None and n * height * width == 1:
        raise ValueError(
            f"x has shape {tuple(first.shape)}; batch statistics need more than one value per "
            "channel (use eval() or larger maps)"
        )
    return parts, group


def block_params(params: D2Params, channels: int, norm: Norm) -> None:
    """Check that the parameters of a D2 block fit an input of so many channels, and each other."""
    convs, norms = params.convs, params.norms
    if len(norms) != len(convs):
        raise ValueError(
            f"params has {len(convs)} convs and {len(norms)} norms; accepted are equally many"
        )
    first, last = convs[0].weight, convs[-1].weight
    _tensor("params.convs[-1].weight", last)
    growth, _, *kernel = last.shape
    normed = 0
    for i, (conv, n) in enumerate(zip(convs, norms, strict=True)):
        slots, width = growth * (len(convs) - i), growth if i else channels
        normed = normed + width if norm == "per_layer" else width
        _shaped(f"params.convs[{i}].weight", conv.weight, (slots, width, *kernel))
        _same_place(f"params.convs[{i}].weight", conv.weight, first, "params.convs[0].weight")
        if conv.bias is not None:
            _shaped(f"params.convs[{i}].bias", conv.bias, (slots,))
            _same_place(f"params.convs[{i}].bias", conv.bias, first, "params.convs[0].weight")
        _running_statistics(i, n)
        for name, t in zip(NormParams._fields[:4], n, strict=False):
            if t is not None or name in ("weight", "bias"):
                _shaped(f"params.norms[{i}].{name}", t, (normed,))


def _shaped(name: str, t: Any, shape: tuple[int, ...]) -> None:
    _tensor(name, t)
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; accepted is {shape}")


def unchanged_convolution(conv: nn.Module, dilation: int = 1) -> None:
    """Check that `conv`, of which the parameters alone are read, still stands for what is done."""
    if not isinstance(conv, nn.Conv2d):
        return
    padding = tuple(side // 2 * dilation for side in conv.kernel_size)
    if (
        conv.stride not in ((1, 1), 1)
        or conv.dilation not in ((dilation, dilation), dilation)
        or conv.padding not in (padding, padding[0], "same")
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    ):
        raise ValueError(
            f"a convolution of this module became {conv}; accepted are stride 1, dilation "
            f"{dilation}, padding {padding} with zeros and one group (it holds parameters, and "
            "is not called)"
        )


def norm_conv(weight: Tensor, norm: Sequence[Tensor]) -> None:
    """Check the kernel of a convolution, and the vectors of the normalisation before it."""
    _, channels, height, width = weight.shape
    if height % 2 != 1 or width % 2 != 1:
        raise ValueError(
            f"conv has a {height} x {width} kernel; accepted are odd heights and widths (the "
            "padding is 'same')"
        )
    for t in norm:
        if t.shape != (channels,):
            raise ValueError(
                f"norm has a vector of shape {tuple(t.shape)}; accepted is ({channels},)"
            )


def process_group(value: Processes) -> Processes:
    """`value` if it stands for processes of which this is one."""
    if value is None or value == "world":
        return value
    if dist.is_available() and isinstance(value, dist.ProcessGroup):
        return value
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"process_group is {value!r}; accepted are None, 'world' and a "
        "torch.distributed.ProcessGroup that this process belongs to"
    )


def _group_of_several(processes: Processes) -> dist.ProcessGroup | None:
    """The group that is meant, or None where it is this process alone."""
    if processes is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"process_group is {processes!r}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or pass process_group=None"
        )
    group = dist.group.WORLD if processes == "world" else processes
    return group if dist.get_world_size(group) > 1 else None


def _running_statistics(index: int, norm: NormParams) -> None:
    """Both or neither."""
    if (norm.running_mean is None) != (norm.running_var is None):
        given = "running_mean" if norm.running_var is None else "running_var"
        raise ValueError(
            f"params.norms[{index}] has {given} alone; accepted are running_mean and running_var, "
            "or neither"
        )


def block_options(norm: str, out_layers: int | None, layers: int) -> int:
    """Check the choices of a D2 block; return how many layers leave it."""
    if norm not in ("per_source", "per_layer"):
        raise ValueError(f"norm is {norm!r}; accepted are 'per_source' and 'per_layer'")
    if not 1 <= layers <= MOST_DEFAULT_SOURCES:
        raise ValueError(
            f"num_layers, or the number of params.convs, is {layers}; accepted are "
            f"1..{MOST_DEFAULT_SOURCES} (the dilation of source i is 2**i, below 2**31)"
        )
    if out_layers is None:
        return layers
    if positive_int("out_layers", out_layers) > layers:
        raise ValueError(f"out_layers is {out_layers}; accepted are 1..{layers}, or None for all")
    return out_layers


def positive_int(name: str, value: int) -> int:
    """`value` if it is an int >= 1."""
    if not _is_int(value):
        raise TypeError(f"{name} is {value!r}; accepted is an int >= 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; accepted are integers >= 1")
    return value


def positive_ints(name: str, values: Sequence[int]) -> list[int]:
    """`values` as a list if it is a list or tuple of ints >= 1 with at least one entry."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name} is of type {type(values).__name__}; accepted is a list of ints >= 1"
        )
    if not values:
        raise ValueError(f"{name} is empty; give one entry per source")
    return [positive_int(f"{name}[{i}]", value) for i, value in enumerate(values)]


def kernel_size(value: int | tuple[int, int]) -> tuple[int, int]:
    """(kh, kw) from an int or a pair, both odd."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not (_is_int(pair[0]) and _is_int(pair[1])):
        raise TypeError(f"kernel_size is {value!r}; accepted are an odd int or (kh, kw)")
    if min(pair) < 1 or pair[0] % 2 == 0 or pair[1] % 2 == 0:
        raise ValueError(f"kernel_size is {value!r}; accepted are odd sizes >= 1")
    return pair[0], pair[1]


def _cut(x: Tensor, group_channels: Sequence[int] | None) -> list[Tensor]:
    if group_channels is None:
        raise ValueError(
            "inputs is one tensor but group_channels is None; give group_channels=[C_0, C_1, ...], "
            "or wrap a single source in a list"
        )
    _source("inputs", x)
    groups = positive_ints("group_channels", group_channels)
    if sum(groups) != x.shape[1]:
        raise ValueError(
            f"group_channels {groups} add up to {sum(groups)}, but inputs has {x.shape[1]} "
            "channels; they must be equal"
        )
    sources, start = [], 0
    for group in groups:
        sources.append(x.narrow(1, start, group))
        start += group
    return sources


def _sources_agree(sources: Sequence[Tensor], name: str = "inputs") -> int:
    """Check every source against the first; return the sum of their channels."""
    first = sources[0]
    _source(f"{name}[0]", first)
    batch, channels, height, width = first.shape
    dtype, device = first.dtype, first.device
    if channels < 1:
        raise ValueError(f"{name}[0] has 0 channels; every source needs at least 1")
    for i in range(1, len(sources)):
        x = sources[i]
        _source(f"{name}[{i}]", x)
        n, c, h, w = x.shape
        if n != batch or h != height or w != width:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)} and {name}[0] {tuple(first.shape)}; "
                "all sources must share N, H and W"
            )
        if c < 1:
            raise ValueError(f"{name}[{i}] has 0 channels; every source needs at least 1")
        if x.dtype != dtype or x.device != device:
            _same_place(f"{name}[{i}]", x, first, f"{name}[0]")
        channels += c
    return channels


def _source(name: str, x: Tensor) -> None:
    _tensor(name, x)
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; accepted are dense tensors (N, C, H, W)")
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted is (N, C, H, W)")


def _tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is of type {type(t).__name__}; accepted is a torch.Tensor")
    if t.dtype not in ACCEPTED_DTYPES:
        raise TypeError(
            f"{name} has dtype {t.dtype}; accepted are float32, float64, bfloat16 and float16"
        )
    if t.layout is not torch.strided:
        raise TypeError(f"{name} has layout {t.layout}; accepted are dense tensors (to_dense())")


def _same_place(name: str, t: Tensor, first: Tensor, first_name: str = "inputs[0]") -> None:
    """Same device and dtype as `first`; under autocast the dtypes are made equal later."""
    if t.device != first.device:
        raise ValueError(
            f"{name} is on {t.device} and {first_name} on {first.device}; "
            "all tensors must be on one device"
        )
    if t.dtype != first.dtype and autocast_dtype_for(first) is None:
        raise TypeError(
            f"{name} has dtype {t.dtype} and {first_name} {first.dtype}; they must be equal "
            "(or run under torch.autocast)"
        )


def _psi(
    scale: Tensor | None, shift: Tensor | None, relu: bool, channels: int, first: Tensor
) -> None:
    if not isinstance(relu, bool):
        raise TypeError(f"relu is {relu!r}; accepted are True and False")
    if scale is None and shift is None:
        return
    if scale is None or shift is None:
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{given} was given without {missing}; give both or neither")
    for name, t in (("scale", scale), ("shift", shift)):
        _tensor(name, t)
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; accepted is ({channels},), one entry per "
                "input channel"
            )
        if t.dtype != torch.float32 or t.device != first.device:
            _same_place(name, t, first)
    if scale.dtype != shift.dtype:
        raise TypeError(
            f"scale has dtype {scale.dtype} and shift {shift.dtype}; they must be equal"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
