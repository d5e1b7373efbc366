"""The backbones through timm, and through segmentation_models_pytorch's timm encoders."""

from __future__ import annotations

import pytest
import torch

timm = pytest.importorskip("timm", reason="pip install 'd3net-kernels[timm]'")

from d3net import timm_models  # noqa: E402 (needs timm)

SMALL = {"growth_rate": 4, "num_blocks": 1, "stem_channels": 8}

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")


@pytest.mark.parametrize(
    ("name", "widths"), [("d3net_s", (32, 40, 64, 128)), ("d3net_l", (32, 48, 96, 192))]
)
def test_features_only(name: str, widths: tuple[int, ...]) -> None:
    model = timm.create_model(name, features_only=True, in_chans=4, out_indices=(1, -1), **SMALL)
    features = model.eval()(torch.randn(1, 4, 64, 96))
    assert model.feature_info.channels() == [widths[1], widths[3]]
    assert model.feature_info.reduction() == [8, 32]
    assert [tuple(f.shape) for f in features] == [(1, widths[1], 8, 12), (1, widths[3], 2, 3)]
    assert name in timm.list_models("d3net_*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no classifier"),
        ({"features_only": True, "pretrained": True}, "timm has no weights for d3net_s"),
        ({"features_only": True, "out_indices": (4,)}, "0..3"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_models.d3net_s(**options, **SMALL)


def test_encoder_of_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="pip install segmentation-models-pytorch"
    )
    model = smp.Unet("tu-d3net_s", encoder_weights=None, classes=5, **SMALL).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)
