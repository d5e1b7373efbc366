"""The registry: names, sizes, options, initialisation, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_params import FOLDER
from torch import Tensor, nn

import d3net
from d3net.blocks import SingleDilationD2Block
from d3net.cli import main
from d3net.costs import cost
from d3net.official_names import official_parameters
from d3net_kernels import D2Block

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

# Trainable parameters and GMACs; those of the first six are the official release's, that of OCR
# and of the DenseNets the paper's (Tables 1 and 2).
SIZES = {
    "d3net_s_fcn": (9_685_699, 98.36),
    "d3net_l_fcn": (38_726_117, 374.81),
    "d3net_vocals": (2_967_407, 119.89),
    "d3net_other": (2_967_407, 119.89),
    "d3net_drums": (2_873_284, 107.87),
    "d3net_bass": (2_419_822, 77.72),
    "d3net_s": (9_610_440, None),
    "d3net_l": (38_582_946, None),
    "d3net_l_ocr": (42_336_456, None),
    "densenet_133_fcn": (10_178_387, None),
    "densenet_189_fcn": (10_040_941, None),
}
PAPER_SIZES = {
    "d3net_s_fcn": 12_184_960,  # (M, L) = (4, 8) read literally; the paper prints 9.7M
    "d3net_l_fcn": 53_470_451,
    "densenet_189_fcn": 7_959_383,  # k = 23
}
OFFICIAL = {
    "d3net_s_fcn": "D3Net_S",
    "d3net_l_fcn": "D3Net_L",
    "d3net_vocals": "vocals",
    "d3net_drums": "drums",
    "d3net_bass": "bass",
}

TINY = {
    "growth_rate": 4,
    "num_blocks": 2,
    "num_layers": 3,
    "stem_channels": 8,
    "feature_channels": (3, 4, 5, 6),
}
BAND = d3net.BandConfig(4, (3, 4, 3), (2, 2, 2))
TINY_AUDIO = {
    "split": 8,
    "low": BAND,
    "high": d3net.BandConfig(2, (2,), (1,), 1),
    "full": d3net.BandConfig(4, (3, 4, 4, 3, 2), (2, 2, 3, 2, 2)),
    "bins": 30,
    "modelled_bins": 24,
}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return d3net.create_model(name, **options)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    parameters, gmacs = SIZES[name]
    measured = cost(name)
    assert measured.parameters == parameters
    assert gmacs is None or round(measured.macs / 1e9, 2) == gmacs


def test_every_model_has_a_known_size() -> None:
    assert sorted(SIZES) == sorted(d3net.list_models())


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_sizes_of_the_paper_read_literally(name: str) -> None:
    assert _count(_on_meta(name, preset="paper")) == PAPER_SIZES[name]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names(name: str) -> None:
    """Names, shapes, order and what is trained, of every array of the official networks."""
    everything = json.loads(gzip.decompress((FOLDER / "param_names.json.gz").read_bytes()))
    ours = official_parameters(_on_meta(name)).items()
    expected = everything[OFFICIAL[name]]
    assert [[n, list(o.shape), int(o.need_grad)] for n, o in ours] == expected


def test_official_names_cover_all_parameters() -> None:
    for name in OFFICIAL:
        model = _on_meta(name)
        named = {id(o.tensor) for o in official_parameters(model).values()}
        own = [*model.parameters(), *(b for b in model.buffers() if b.dim() > 0)]
        assert named == {id(t) for t in own}


def test_paper_preset_of_separation() -> None:
    net = _on_meta("d3net_vocals", preset="paper")
    assert len(net.high.down) == 3  # D3 blocks 1-4 and 7-9
    assert net.gate.gate.kernel_size == net.gate.filter.kernel_size == (3, 3)


@pytest.mark.parametrize("dilation", ["standard", "none"])
@pytest.mark.parametrize("name", ["d3net_s_fcn", "d3net_vocals"])
def test_ablations_have_the_same_parameters(name: str, dilation: str) -> None:
    multi, other = _on_meta(name), _on_meta(name, dilation=dilation)
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (multi, other)]
    assert shapes[0] == shapes[1]
    cores = [m for m in other.modules() if isinstance(m, D2Block)]
    assert all(isinstance(core, SingleDilationD2Block) for core in cores)


@pytest.mark.parametrize("norm", ["per_source", "per_layer"])
@pytest.mark.parametrize(("dilation", "dilations"), [("standard", (1, 2, 4)), ("none", (1, 1, 1))])
@pytest.mark.parametrize("training", [True, False])
def test_single_dilation_block(
    norm: str, dilation: str, dilations: tuple[int, ...], training: bool
) -> None:
    """Against the definition, one convolution per source and layer."""
    block = SingleDilationD2Block(4, 2, 3, dilation=dilation, norm=norm).double().train(training)
    for n in block.norms:
        nn.init.normal_(n.weight)
        nn.init.normal_(n.bias)
        nn.init.normal_(n.running_mean)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    sources = [x]
    for layer, d in enumerate(dilations):
        widths = [s.shape[1] for s in sources]
        if norm == "per_layer":
            psi = block.norms[layer](torch.cat(sources, 1)).relu().split(widths, 1)
        else:
            psi = [n(s).relu() for n, s in zip(block.norms, sources, strict=False)]
        out: Tensor | float = 0.0
        for i, y in enumerate(psi):
            slot = slice((layer - i) * 2, (layer - i + 1) * 2)
            conv = block.convs[i]
            out = out + nn.functional.conv2d(y, conv.weight[slot], conv.bias[slot], 1, d, d)
        sources.append(out)
    torch.testing.assert_close(block(x), torch.cat(sources[1:], 1))


@pytest.mark.parametrize("size", [(29, 29), (33, 47), (64, 96), (65, 127)])
@pytest.mark.parametrize("name", ["d3net_s_fcn", "d3net_l_ocr", "densenet_133_fcn"])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    net = d3net.create_model(name, **TINY, num_classes=7).eval()
    assert net(torch.randn(2, 3, *size)).shape == (2, 7, *size)


@pytest.mark.parametrize("name", ["d3net_s", "d3net_l_fcn", "d3net_l_ocr"])
def test_features_only(name: str) -> None:
    net = d3net.create_model(name, features_only=True, **TINY).eval()
    features = net(torch.randn(1, 3, 65, 95))
    widths, reductions = (3, 4, 5, 6), (4, 8, 16, 32)
    assert [tuple(f.shape) for f in features] == [
        (1, width, math.ceil(65 / 4) >> s, math.ceil(95 / 4) >> s) for s, width in enumerate(widths)
    ]
    assert tuple(info["num_chs"] for info in net.feature_info) == widths
    assert tuple(info["reduction"] for info in net.feature_info) == reductions
    for info, feature in zip(net.feature_info, features, strict=True):
        assert net.get_submodule(info["module"]).norm.num_features == feature.shape[1]


def test_official_feature_widths() -> None:
    for name, widths in (("d3net_s", (32, 40, 64, 128)), ("d3net_l", (32, 48, 96, 192))):
        assert tuple(i["num_chs"] for i in _on_meta(name).feature_info) == widths


def test_coarse_logits() -> None:
    images = torch.randn(2, 3, 64, 64)
    net = d3net.create_model("d3net_l_ocr", **TINY, num_classes=7).eval()
    logits, coarse = net.forward_with_coarse(images)
    assert logits.shape == coarse.shape == (2, 7, 64, 64)
    torch.testing.assert_close(logits, net(images))
    with pytest.raises(TypeError, match="'fcn'"):
        d3net.create_model("d3net_s_fcn", **TINY).forward_with_coarse(images)


def test_bins_above_are_copied() -> None:
    net = d3net.create_model("d3net_vocals", **TINY_AUDIO)
    x = torch.rand(2, 2, 16, 30)
    out = net(x)
    assert out.shape == x.shape
    assert torch.equal(out[..., 24:], x[..., 24:])
    assert (out >= 0).all()


class TestInitialisation:
    """As the official release: which distribution, and repeatable from a seed."""

    def test_seed(self) -> None:
        for name, options in (("d3net_s_fcn", TINY), ("d3net_bass", TINY_AUDIO)):
            states = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                states.append(d3net.create_model(name, **options).state_dict())
            same = [torch.equal(states[0][k], states[1][k]) for k in states[0]]
            other = [torch.equal(states[0][k], states[2][k]) for k in states[0]]
            assert all(same)
            assert not all(other)

    def test_reset(self) -> None:
        for name, options in (("d3net_s_fcn", TINY), ("d3net_bass", TINY_AUDIO)):
            net = d3net.create_model(name, **options)
            states = []
            for _ in range(2):
                for t in (*net.parameters(), *net.buffers()):
                    nn.init.constant_(t, 7)
                torch.manual_seed(3)
                net.reset_parameters()
                states.append({k: t.clone() for k, t in net.state_dict().items()})
            assert all(torch.equal(states[0][k], t) for k, t in states[1].items())
            assert not any((t == 7).all() for t in states[0].values())

    def test_segmentation(self) -> None:
        net = d3net.create_model("d3net_s_fcn", num_blocks=1)
        for conv in (m for m in net.backbone.modules() if isinstance(m, nn.Conv2d)):
            fans = (conv.in_channels + conv.out_channels) * math.prod(conv.kernel_size)
            limit = math.sqrt(6 / fans)
            assert conv.weight.abs().max() <= limit
            if conv.weight.numel() > 2000:
                assert conv.weight.detach().std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
            assert conv.bias is None or not conv.bias.any()
        for conv in (net.head.mix.conv, net.head.classify):
            assert conv.weight.detach().std() == pytest.approx(0.01, rel=0.1)
        assert not net.head.classify.bias.any()

    def test_separation(self) -> None:
        net = d3net.create_model("d3net_vocals")
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)):
            fans = (conv.in_channels + conv.out_channels) * math.prod(conv.kernel_size)
            assert not conv.bias.any()
            if conv.weight.numel() > 4000:
                assert conv.weight.detach().std() == pytest.approx(math.sqrt(2 / fans), rel=0.1)
            if isinstance(conv, nn.ConvTranspose2d):
                assert conv.weight.abs().max() <= math.sqrt(6 / fans)
        for ones in (net.in_scale, net.decode_scale, net.decode_bias):
            assert (ones == 1).all()
        assert not net.in_offset.any()

    def test_input_statistics(self) -> None:
        net = d3net.create_model("d3net_vocals", **TINY_AUDIO)
        mean, std = torch.rand(30), torch.linspace(0, 2, 30)
        net.set_input_statistics(mean, std)
        assert torch.equal(net.in_offset, mean)
        assert torch.equal(net.in_scale[1:], std[1:])
        assert float(net.in_scale.detach()[0]) == pytest.approx(2e-4)
        with pytest.raises(ValueError, match=r"mean has shape \(3,\)"):
            net.set_input_statistics(torch.rand(3), std)


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


def _assert_refused(
    net: nn.Module, x: Tensor, message: str, error: type[Exception] = ValueError
) -> None:
    """With the running statistics as they were."""
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        net.train()(x)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [("d3net_s_fcn", TINY, (2, 3, 64, 64)), ("d3net_vocals", TINY_AUDIO, (2, 2, 16, 30))],
)
def test_refused_integers(name: str, options: dict[str, object], shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.uint8)
    _assert_refused(d3net.create_model(name, **options), x, "accepted are floating", TypeError)


def test_frames_are_multiples_of_16() -> None:
    net = _on_meta("d3net_vocals")
    with pytest.raises(ValueError, match="multiples of 16"):
        net(torch.empty(1, 2, 250, 2049, device="meta"))


def test_models_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == d3net.list_models()
    assert "9,685,699" in lines[1 + d3net.list_models().index("d3net_s_fcn")]


def test_import_needs_no_extra() -> None:
    program = (
        "import sys; import d3net; extras = {'h5py', 'timm', 'torchvision', 'onnx', 'av', "
        "'huggingface_hub'}; print(sorted(set(sys.modules) & extras))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_without_h5py(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    source = tmp_path / "a.h5"
    source.touch()
    assert main(["convert", str(source), str(tmp_path / "a.safetensors")]) == 1
    assert "pip install 'd3net-kernels[h5]'" in capsys.readouterr().err
