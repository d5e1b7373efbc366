"""The backbones as models of timm: `import d3net.timm_models`, then `timm.create_model("d3net_s")`.

Needs timm. With features_only=True they serve wherever timm's feature extractors do, for instance
in segmentation_models_pytorch as "tu-d3net_s".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import FeatureInfo, register_model
from torch import Tensor, nn

from d3net.registry import create_model
from d3net.segmentation import D3NetBackbone


class TimmFeatures(nn.Module):
    """A D3Net backbone with the features and the feature_info that timm's users expect."""

    def __init__(self, backbone: D3NetBackbone, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        info = [dict(entry) for entry in backbone.feature_info]
        for i in out_indices:
            if not -len(info) <= i < len(info):
                raise ValueError(
                    f"out_indices is {tuple(out_indices)}; accepted are 0..{len(info) - 1} for the "
                    "scales 1/4 to 1/32"
                )
        self.feature_info = FeatureInfo(info, tuple(i % len(info) for i in out_indices))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, in_chans, H, W) -> the chosen features, finest first."""
        features: list[Tensor] = self.backbone(images)
        return [features[i] for i in self.feature_info.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether D2 blocks are computed again in backward instead of keeping what they make."""
        self.backbone.set_grad_checkpointing(enable)


def _build(
    name: str,
    pretrained: bool = False,
    features_only: bool = False,
    in_chans: int = 3,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **overrides: Any,
) -> TimmFeatures:
    """What timm passes on; the pretrained_* and cache_dir belong to weights that timm would fetch.

    Raises:
        ValueError: `pretrained` (load the official files into `.backbone` yourself), or no
            `features_only` (there is no classifier).
    """
    if pretrained:
        raise ValueError(
            f"pretrained is True, but timm has no weights for {name}; create it without and call "
            "d3net.load_nnabla_h5(path, model.backbone)"
        )
    if not features_only:
        raise ValueError(f"{name} has no classifier; pass features_only=True")
    backbone = create_model(name, in_channels=in_chans, **overrides)
    assert isinstance(backbone, D3NetBackbone)
    return TimmFeatures(backbone, out_indices)


def d3net_s(**options: Any) -> TimmFeatures:
    """D3Net-S; features of 32, 40, 64 and 128 channels at 1/4 to 1/32."""
    return _build("d3net_s", **options)


def d3net_l(**options: Any) -> TimmFeatures:
    """D3Net-L; features of 32, 48, 96 and 192 channels at 1/4 to 1/32."""
    return _build("d3net_l", **options)


for _entry_point in (d3net_s, d3net_l):
    register_model(_entry_point)
