"""What the networks and the registry refuse, and that the model stays as it was."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from test_d3net_models import BAND, TINY, TINY_AUDIO
from torch import Tensor, nn

import d3net

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: d3net.create_model("d3net_vocal"), ValueError, "nearest are d3net_vocals"),
        (lambda: d3net.create_model("xyz"), ValueError, "there is no model 'xyz'; there are d3net"),
        (
            lambda: d3net.create_model("d3net_s", growth_rat=1),
            TypeError,
            "no option 'growth_rat'; did you mean growth_rate",
        ),
        (
            lambda: d3net.create_model("d3net_s", num_classes=3),
            TypeError,
            "no option 'num_classes'",
        ),
        (
            lambda: d3net.create_model("d3net_s", preset="best"),
            ValueError,
            "'official' and 'paper'",
        ),
        (lambda: d3net.create_model("d3net_s", dilation="wide"), ValueError, "'multi', 'standard'"),
        (lambda: d3net.create_model("d3net_s", norm="layer"), ValueError, "'per_source'"),
        (lambda: d3net.create_model("d3net_s_fcn", head="unet"), ValueError, "'fcn', 'ocr'"),
        (lambda: d3net.create_model("d3net_s", feature_channels=(1, 2)), ValueError, "four widths"),
        (lambda: d3net.create_model("d3net_s", growth_rate=0), ValueError, "growth_rate is 0"),
        (lambda: d3net.create_model("d3net_s", compression=2), ValueError, "compression is 2"),
        (lambda: d3net.create_model("d3net_s", growth_rate=1, num_layers=2), ValueError, "0.2"),
        (lambda: d3net.create_model("d3net_bass", split=100), ValueError, "split is 100"),
        (
            lambda: d3net.create_model("d3net_bass", features_only=True),
            ValueError,
            "no network for images",
        ),
        (lambda: d3net.create_model("d3net_s", weights="a.pt"), ValueError, ".h5 and .safetensors"),
        (lambda: d3net.create_model("d3net_s", weights="a.h5"), FileNotFoundError, "no file a.h5"),
        (lambda: d3net.create_model("d3net_s", compression="a"), TypeError, "compression is 'a'"),
        (lambda: d3net.create_model("d3net_bass", low=3), TypeError, "accepted is a BandConfig"),
        (lambda: d3net.create_model("d3net_bass", channels=0), ValueError, "channels is 0"),
        (lambda: d3net.BandConfig(8, (2, 2), (1, 1)), ValueError, "odd numbers"),
        (lambda: d3net.SegmentationNet(BAND), TypeError, "SegmentationConfig"),
        (lambda: d3net.SegmentationConfig(BAND), TypeError, "accepted is a BackboneConfig"),
        (lambda: d3net.create_model(["d3net_s"]), TypeError, "accepted is a str, one of d3net_s"),
        (lambda: d3net.create_model("d3net_s", weights=3), TypeError, "weights is 3; accepted is"),
        (lambda: d3net.create_model("d3net_s", features_only="no"), TypeError, "True and False"),
        (lambda: d3net.create_model("d3net_s", bias="no"), TypeError, "bias is 'no'; accepted are"),
        (lambda: d3net.create_model("d3net_s_fcn", head=["fcn"]), ValueError, "'fcn', 'ocr'"),
        (lambda: d3net.create_model("d3net_l_ocr", num_classes=1), ValueError, "num_classes is 1"),
        (lambda: d3net.create_model("d3net_bass", split=192.0), TypeError, "split is 192.0"),
        (lambda: d3net.create_model("d3net_bass", target=None), TypeError, "target is None"),
    ],
)
def test_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), "accepted is (N, 3, H, W)"),
        ((1, 4, 64, 64), "accepted is (N, 3, H, W)"),
        ((1, 3, 28, 64), "at least 29"),
        ((1, 3, 64, 3), "at least 29"),
        ((1, 3, 60, 60), "no batch statistics"),
    ],
)
def test_refused_images(shape: tuple[int, ...], message: str) -> None:
    _assert_refused(d3net.create_model("d3net_s_fcn", **TINY), torch.randn(shape), message)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 30), "accepted is (N, 2, T, 30)"),
        ((1, 1, 16, 30), "accepted is (N, 2, T, 30)"),
        ((1, 2, 16, 31), "accepted is (N, 2, T, 30)"),
        ((1, 2, 18, 30), "multiples of 4: pad"),
        ((1, 2, 0, 30), "multiples of 4: pad"),
    ],
)
def test_refused_magnitudes(shape: tuple[int, ...], message: str) -> None:
    _assert_refused(d3net.create_model("d3net_vocals", **TINY_AUDIO), torch.rand(shape), message)


def test_refused_single_values() -> None:
    """At the coarsest scale of the full branch, 4 frames and 4 bins are one value."""
    options = {**TINY_AUDIO, "split": 2, "modelled_bins": 4}
    net, x = d3net.create_model("d3net_vocals", **options), torch.rand(1, 2, 4, 30)
    _assert_refused(net, x, "one value at a branch's coarsest scale")
    assert net.train()(torch.cat([x, x])).isfinite().all()


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        (torch.rand(3), torch.rand(30), ValueError, "mean has shape (3,); accepted is (30,)"),
        (torch.rand(30), torch.zeros(30), ValueError, "std has no value above zero"),
        (torch.full((30,), torch.nan), torch.rand(30), ValueError, "mean has values that are not"),
        (torch.rand(30), [1.0] * 30, TypeError, "std is of type list; accepted is a tensor (30,)"),
    ],
)
def test_refused_input_statistics(
    mean: Tensor, std: Tensor, error: type[Exception], message: str
) -> None:
    net = d3net.create_model("d3net_vocals", **TINY_AUDIO)
    with pytest.raises(error, match=re.escape(message)):
        net.set_input_statistics(mean, std)
    assert not net.in_offset.any()
    assert (net.in_scale == 1).all()


def _assert_refused(
    net: nn.Module, x: object, message: str, error: type[Exception] = ValueError
) -> None:
    """With the running statistics as they were."""
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        net.train()(x)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


NETS = {
    "d3net_s_fcn": (TINY, (2, 3, 64, 64), "images"),
    "d3net_vocals": (TINY_AUDIO, (2, 2, 16, 30), "magnitudes"),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to(torch.uint8), "{} is of torch.uint8; accepted are floating-point numbers"),
        (lambda x: x.to(torch.complex64), "take abs() of a spectrum"),
        (
            lambda x: x.double(),
            "{} is of torch.float64 and the network of torch.float32; they must",
        ),
        (lambda x: x.bfloat16(), "(or run under torch.autocast)"),
        (lambda x: x.numpy(), "{} is of type ndarray; accepted is a tensor (N, "),
        (lambda x: [x], "{} is of type list; accepted is a tensor"),
        (lambda x: "picture.png", "{} is of type str; accepted is a tensor"),
        (lambda x: None, "{} is of type NoneType; accepted is a tensor"),
    ],
)
def test_refused_kinds(name: str, change: Callable[[Tensor], object], message: str) -> None:
    options, shape, argument = NETS[name]
    net = d3net.create_model(name, **options)
    _assert_refused(net, change(torch.zeros(shape)), message.format(argument), TypeError)


@pytest.mark.parametrize("name", NETS)
def test_what_autocast_takes(name: str) -> None:
    """What autocast casts may differ from the network, which float64 never does."""
    options, shape, _ = NETS[name]
    net = d3net.create_model(name, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.rand(shape).bfloat16()).shape[2:] == shape[2:]
        _assert_refused(net, torch.rand(shape).double(), "torch.float64", TypeError)
        assert net.double()(torch.rand(shape).double()).dtype == torch.float64


@pytest.mark.parametrize("name", NETS)
def test_accepted(name: str) -> None:
    """Empty batches, and NaN, which is the caller's."""
    options, shape, _ = NETS[name]
    for training in (True, False):
        net = d3net.create_model(name, **options).train(training)
        assert net(torch.rand(0, *shape[1:])).shape[0] == 0
        assert all(t.isfinite().all() for t in net.state_dict().values())
    assert net(torch.full(shape, torch.nan))[..., :8].isnan().all()


def test_frames_are_multiples_of_16() -> None:
    with torch.device("meta"):
        net = d3net.create_model("d3net_vocals")
    with pytest.raises(ValueError, match="multiples of 16"):
        net(torch.empty(1, 2, 250, 2049, device="meta"))
