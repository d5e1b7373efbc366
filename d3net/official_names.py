"""The names that the official release gives to the parameters of its networks.

A walk over a network that pairs each leaf module with its official scope. Slots, layouts and shapes
are the same on both sides, but for the dimensions of size 1 that the official arrays carry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from d3net.blocks import (
    ConcatD3Block,
    ConvNorm,
    ReducedD2Block,
    SumD3Block,
    Transition,
    Upsample,
)
from d3net.heads import FCNHead
from d3net.segmentation import D3NetBackbone, SegmentationNet
from d3net.separation import BandUNet, SeparationNet
from d3net_kernels import D2Block, NormConv2d


class Official(NamedTuple):
    """An official array: our tensor that it belongs to, its shape, and whether it is trained."""

    tensor: Tensor
    shape: tuple[int, ...]
    need_grad: bool


def official_parameters(model: nn.Module) -> dict[str, Official]:
    """Every official name of `model`, in the official order.

    Raises:
        TypeError: the official release has no such network.
    """
    if isinstance(model, D3NetBackbone):
        scopes = backbone_scopes(model, "")
    elif isinstance(model, SegmentationNet) and isinstance(model.head, FCNHead):
        scopes = segmentation_scopes(model)
    elif isinstance(model, SeparationNet):
        scopes = separation_scopes(model)
    else:
        raise TypeError(
            f"the official release has no {type(model).__name__} like this one; accepted are its "
            "backbones, FCN segmentation networks and separation networks"
        )
    return arrays_of(scopes)


# Official scopes and the modules or parameters they stand for, in the official order.
Scopes: TypeAlias = Iterator[tuple[str, nn.Module | nn.Parameter]]


def arrays_of(scopes: Scopes) -> dict[str, Official]:
    """The official arrays of convolutions, normalisations and single parameters."""
    named: dict[str, Official] = {}
    for scope, leaf in scopes:
        named |= _arrays(scope, leaf)
    return named


def _arrays(scope: str, leaf: nn.Module | nn.Parameter) -> dict[str, Official]:
    if isinstance(leaf, nn.Parameter):
        return {scope: Official(leaf, (1, 1, 1, leaf.numel()), True)}
    if isinstance(leaf, nn.BatchNorm2d):
        assert leaf.running_mean is not None
        assert leaf.running_var is not None
        shape = (1, leaf.num_features, 1, 1)
        return {
            f"{scope}/bn/beta": Official(leaf.bias, shape, True),
            f"{scope}/bn/gamma": Official(leaf.weight, shape, True),
            f"{scope}/bn/mean": Official(leaf.running_mean, shape, False),
            f"{scope}/bn/var": Official(leaf.running_var, shape, False),
        }
    assert isinstance(leaf, (nn.Conv2d, nn.ConvTranspose2d))
    kind = "deconv" if isinstance(leaf, nn.ConvTranspose2d) else "conv"
    arrays = {f"{scope}/{kind}/W": Official(leaf.weight, tuple(leaf.weight.shape), True)}
    if leaf.bias is not None:
        arrays[f"{scope}/{kind}/b"] = Official(leaf.bias, tuple(leaf.bias.shape), True)
    return arrays


def d2_scopes(block: D2Block, scope: str, first: str, unit: str) -> Scopes:
    """Source 0 is called `first`, source i layers/layer{i}."""
    if block.norm != "per_source":
        raise TypeError(f"the official release has no norm={block.norm!r}; use norm='per_source'")
    for i, (norm, conv) in enumerate(zip(block.norms, block.convs, strict=True)):
        source = f"{scope}/{first}" if i == 0 else f"{scope}/layers/layer{i}"
        yield f"{source}/{unit}/norm1", norm
        yield f"{source}/{unit}/conv1", conv


def segmentation_scopes(net: SegmentationNet) -> Scopes:
    yield from backbone_scopes(net.backbone, "backbone/")
    assert isinstance(net.head, FCNHead)
    yield "decode_head/convs/0/conv", net.head.mix.conv
    yield "decode_head/convs/0/bn", net.head.mix.norm
    yield "decode_head/conv_seg", net.head.classify


def backbone_scopes(net: D3NetBackbone, scope: str) -> Scopes:
    yield f"{scope}conv1", net.stem.conv1
    yield f"{scope}bn1", net.stem.norm
    yield f"{scope}conv2", net.stem.conv2
    for s, (stage, feature) in enumerate(zip(net.stages, net.features, strict=True), start=1):
        assert isinstance(stage, ConcatD3Block)
        for m, block in enumerate(stage.blocks):
            assert isinstance(block, ReducedD2Block)
            yield from reduced_d2_scopes(block, f"{scope}dense{s}/d2_block/block{m}")
        out = f"{scope}intermediate_out{s}" if s < len(net.stages) else f"{scope}final_out{s}"
        assert isinstance(feature, ConvNorm)
        yield f"{out}/0", feature.conv
        yield f"{out}/1", feature.norm
        if s < len(net.stages):
            transition = net.transitions[s - 1]
            assert isinstance(transition, Transition)
            yield f"{scope}transition{s}/bn", transition.reduce.norm
            yield f"{scope}transition{s}/conv", transition.reduce.conv


def reduced_d2_scopes(block: ReducedD2Block, scope: str) -> Scopes:
    if block.bottleneck is not None:
        unit = f"{scope}/d2block/initial_layer/bc_layer/bottle_neck"
        yield f"{unit}/norm1", block.bottleneck.norm
        yield f"{unit}/conv1", block.bottleneck.conv
    yield from d2_scopes(block.core, f"{scope}/d2block", "initial_layer/init_layer", "bottle_neck")
    if block.compression is not None:
        yield f"{scope}/block_dim_reduction/norm1", block.compression.norm
        yield f"{scope}/block_dim_reduction/conv1", block.compression.conv


def separation_scopes(net: SeparationNet) -> Scopes:
    t = net.config.target
    yield f"{t}/in_offset", net.in_offset
    yield f"{t}/in_scale", net.in_scale
    yield f"{t}/decode_scale", net.decode_scale
    yield f"{t}/decode_bias", net.decode_bias
    yield f"{t}/features_init/0", net.init_low
    yield f"{t}/features_init/1", net.init_high
    for i, (branch, match) in enumerate(((net.low, net.match_low), (net.high, net.match_high))):
        yield from u_net_scopes(branch, f"{t}/dense_band/{i}")
        if isinstance(match, NormConv2d):
            yield f"{t}/match_fm_conv/{i}/norm", match.norm
            yield f"{t}/match_fm_conv/{i}/conv", match.conv
    yield f"{t}/features_init_full", net.init_full
    yield from u_net_scopes(net.full, f"{t}/dense_full")
    yield from d2_scopes(net.final, f"{t}/final_dense", "initial_layer", "bottleneck")
    yield f"{t}/out_gate/bn", net.gate.norm
    yield f"{t}/out_gate/conv_gate/conv", net.gate.gate
    yield f"{t}/out_gate/conv_filt/conv", net.gate.filter


def u_net_scopes(net: BandUNet, scope: str) -> Scopes:
    for i, block in enumerate(net.down):
        yield from sum_d3_scopes(block, f"{scope}/ds_layers/dense_block{i}")
    yield from sum_d3_scopes(net.bottom, f"{scope}/bottleneck_block")
    first = len(net.down) + 1
    for i, (upsample, block) in enumerate(zip(net.upsamples, net.up, strict=True)):
        assert isinstance(upsample, Upsample)
        yield f"{scope}/us_layers/upsample{i}/upsample/norm", upsample.norm
        yield f"{scope}/us_layers/upsample{i}/upsample/transconv", upsample.conv
        yield from sum_d3_scopes(block, f"{scope}/us_layers/dense_block{first + i}")


def sum_d3_scopes(d3: nn.Module, scope: str) -> Scopes:
    assert isinstance(d3, SumD3Block)
    for m, block in enumerate(d3.blocks):
        assert isinstance(block, D2Block)
        inner = f"{scope}/layers/layer{m}" if m else f"{scope}/initial_block"
        yield from d2_scopes(block, inner, "initial_layer", "bottleneck")
