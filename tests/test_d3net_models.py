"""The registry: names, sizes, options, initialisation, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
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


# Table 5: D3 blocks 1 to 4, 5 and 6 (of the full branch alone), 7 to 9 with their k and L.
LOW_K, FULL_K = [16, 18, 20, 22, 20, 18, 16], [13, 14, 15, 16, 17, 16, 14, 12, 11]
TABLE_5 = {
    "vocals": (256, LOW_K, [5, 5, 5, 5, 4, 4, 4], FULL_K, [4, 5, 6, 7, 8, 6, 5, 4, 4]),
    "drums": (
        128,
        LOW_K,
        [5, 5, 5, 4, 4, 4, 4],
        [13, 14, 15, 16, 16, 16, 14, 12, 11],
        [4, 5, 6, 7, 8, 6, 6, 4, 4],
    ),
    "bass": (
        192,
        [16, 18, 18, 20, 18, 16, 16],
        [5, 5, 5, 5, 4, 4, 4],
        [10, 10, 12, 14, 16, 14, 12, 8, 8],
        [4, 5, 6, 7, 8, 6, 6, 4, 4],
    ),
}
TABLE_5["other"] = TABLE_5["vocals"]


@pytest.mark.parametrize("target", TABLE_5)
def test_paper_preset_of_separation(target: str) -> None:
    """As Table 5 prints it; the official networks differ in the high band and in the gate."""
    split, low_k, low_layers, full_k, full_layers = TABLE_5[target]
    for preset, high_blocks, gate in (("paper", 7, 3), ("official", 5, 1)):
        if preset == "official" and target == "bass":
            high_blocks = 7
        net = _on_meta(f"d3net_{target}", preset=preset)
        assert net.init_low.out_channels == net.init_full.out_channels == 32
        assert net.init_high.out_channels == 8
        assert net.config.split == split
        for branch, ks, layers, blocks in (
            (net.low, low_k, low_layers, 2),
            (net.high, [2] * high_blocks, [1] * high_blocks, 1),
            (net.full, full_k, full_layers, 2),
        ):
            d3s = [*branch.down, branch.bottom, *branch.up]
            assert [d3.out_channels for d3 in d3s] == ks
            assert [[d2.num_layers for d2 in d3.blocks] for d3 in d3s] == [
                [n] * blocks for n in layers
            ]
        assert (net.final.growth_rate, net.final.num_layers) == (12, 3)
        assert net.gate.gate.kernel_size == net.gate.filter.kernel_size == (gate, gate)
        assert net.gate.gate.out_channels == 2


def test_stages_of_segmentation() -> None:
    """Channels, bottlenecks and compressed widths of both official backbones (section 4)."""
    expected = {
        "d3net_s": ([288, 368, 408, 428], 28, 28),
        "d3net_l": ([574, 797, 908, 964], 51, 36),
    }
    for name, (channels, compressed, bottlenecks) in expected.items():
        net = _on_meta(name)
        assert [stage.out_channels for stage in net.stages] == channels
        assert [t.out_channels for t in net.transitions] == [c // 2 for c in channels[:3]]
        blocks = [block for stage in net.stages for block in stage.blocks]
        assert {block.out_channels for block in blocks} == {compressed}
        assert sum(block.bottleneck is not None for block in blocks) == bottlenecks


def test_densenets() -> None:
    """Section 6.1: 16 and 23 dense layers a stage; the literal growth rate is one of two."""
    for name, preset, layers, growth in (
        ("densenet_133_fcn", "official", 16, 36),
        ("densenet_133_fcn", "paper", 16, 36),
        ("densenet_189_fcn", "official", 23, 26),
        ("densenet_189_fcn", "paper", 23, 23),
    ):
        net = _on_meta(name, preset=preset)
        for stage in net.backbone.stages:
            assert [block.core.growth_rate for block in stage.blocks] == [growth] * layers
            assert {block.core.num_layers for block in stage.blocks} == {1}
            assert all(block.bottleneck.conv.out_channels == 4 * growth for block in stage.blocks)
            assert all(block.compression is None for block in stage.blocks)


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
