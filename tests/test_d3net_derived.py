"""The networks written a second time, as functions of the official arrays, and held against ours.

Everything comes from the names and shapes of the arrays: how many blocks, layers and channels. A
source is convolved once for all its layers, as the official release does, where ours gathers the
sources of one layer. The functions are held to the golden files first; then they say what the
networks without golden files must give, in float64, with all gradients and running statistics.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_params import FOLDER, Golden, parameter, uniform
from torch import Tensor

import d3net
from d3net.official_names import official_parameters

h5py = pytest.importorskip("h5py", reason="pip install 'd3net-kernels[h5]'")

Arrays = dict[str, Tensor]

FLOAT64 = 1e-9  # of the largest value: float64's rounding, amplified by about a hundred layers
SPLIT = {"vocals": 256, "other": 256, "drums": 128, "bass": 192}  # first bin of the high band


class Net:
    """Official arrays and the few operations that all official networks are made of."""

    def __init__(self, arrays: Arrays, *, training: bool, momentum: float = 0.1) -> None:
        self.arrays, self.training, self.momentum = arrays, training, momentum

    def count(self, scope: str) -> int:
        """How many numbers, from 0 or 1 on, make `scope` one that exists."""
        first = int(not self.has(scope.format(0)))
        return next(n for n in range(100) if not self.has(scope.format(first + n)))

    def has(self, scope: str) -> bool:
        return any(name.startswith(f"{scope}/") for name in self.arrays)

    def norm(self, scope: str, x: Tensor) -> Tensor:
        beta, gamma, mean, var = (
            self.arrays[f"{scope}/bn/{leaf}"].view(-1) for leaf in ("beta", "gamma", "mean", "var")
        )
        return F.batch_norm(x, mean, var, gamma, beta, self.training, self.momentum, 1e-5)

    def conv(self, scope: str, x: Tensor, dilation: int = 1, stride: int = 1) -> Tensor:
        weight, bias = self.arrays[f"{scope}/conv/W"], self.arrays.get(f"{scope}/conv/b")
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    def psi_conv(self, scope: str, x: Tensor, dilation: int = 1) -> Tensor:
        return self.conv(f"{scope}/conv1", self.norm(f"{scope}/norm1", x).relu(), dilation)

    def d2(self, scope: str, first: str, unit: str, x: Tensor) -> list[Tensor]:
        """x_1, ..., x_L; every source adds its share to all the layers that read it."""
        layers = 1 + self.count(f"{scope}/layers/layer{{}}/{unit}")
        out = list(self.psi_conv(f"{scope}/{first}/{unit}", x).chunk(layers, 1))
        for i in range(1, layers):
            share = self.psi_conv(f"{scope}/layers/layer{i}/{unit}", out[i - 1], 2**i)
            out[i:] = _add(out[i:], share)
        return out


def _add(waiting: list[Tensor], share: Tensor) -> list[Tensor]:
    return [a + b for a, b in zip(waiting, share.chunk(len(waiting), 1), strict=True)]


def segmentation(net: Net, images: Tensor, scope: str = "backbone/") -> Tensor:
    """Images -> logits at 1/4 of their size."""
    x = net.norm(f"{scope}bn1", net.conv(f"{scope}conv1", images, stride=2)).relu()
    x = net.conv(f"{scope}conv2", x, stride=2)
    features = []
    for stage in range(1, 5):
        for m in range(net.count(f"{scope}dense{stage}/d2_block/block{{}}")):
            x = torch.cat([x, _reduced_d2(net, f"{scope}dense{stage}/d2_block/block{m}", x)], 1)
        out = f"{scope}intermediate_out{stage}" if stage < 4 else f"{scope}final_out4"
        feature = net.norm(f"{out}/1", net.conv(f"{out}/0", x)).relu()
        size = features[0].shape[2:] if features else feature.shape[2:]
        features.append(F.interpolate(feature, size, mode="bilinear", align_corners=False))
        if stage < 4:
            transition = f"{scope}transition{stage}"
            x = net.conv(f"{transition}/conv", net.norm(f"{transition}/bn", x).relu())
            x = F.avg_pool2d(x, 2)
    mixed = net.conv("decode_head/convs/0/conv", torch.cat(features, 1))
    mixed = net.norm("decode_head/convs/0/bn", mixed).relu()
    return net.conv("decode_head/conv_seg", mixed)


def _reduced_d2(net: Net, scope: str, x: Tensor) -> Tensor:
    bottleneck = f"{scope}/d2block/initial_layer/bc_layer/bottle_neck"
    if net.has(bottleneck):
        x = net.psi_conv(bottleneck, x)
    layers = net.d2(f"{scope}/d2block", "initial_layer/init_layer", "bottle_neck", x)
    return net.psi_conv(f"{scope}/block_dim_reduction", torch.cat(layers, 1))


def separation(net: Net, magnitudes: Tensor, target: str) -> Tensor:
    """Magnitudes (N, 2, T, 2049) of the mixture -> of the target."""
    one = {name: net.arrays[f"{target}/{name}"] for name in ("in_offset", "in_scale")}
    z = ((magnitudes - one["in_offset"]) / one["in_scale"])[..., :1600]
    split = SPLIT[target]
    low, high = (
        _u_net(
            net, f"{target}/dense_band/{i}", net.conv(f"{target}/features_init/{i}", z[..., bins])
        )
        for i, bins in enumerate((slice(split), slice(split, None)))
    )
    match = f"{target}/match_fm_conv/1"
    high = net.conv(f"{match}/conv", net.norm(f"{match}/norm", high))
    full = _u_net(net, f"{target}/dense_full", net.conv(f"{target}/features_init_full", z))
    joined = torch.cat([torch.cat([low, high], 3), full], 1)
    x = net.d2(f"{target}/final_dense", "initial_layer", "bottleneck", joined)[-1]
    gate = f"{target}/out_gate"
    x = net.norm(f"{gate}/bn", x)
    x = net.conv(f"{gate}/conv_gate/conv", x).sigmoid() * net.conv(f"{gate}/conv_filt/conv", x)
    x = x * net.arrays[f"{target}/decode_scale"] + net.arrays[f"{target}/decode_bias"]
    return torch.cat([x.relu(), magnitudes[..., 1600:]], 3)


def _u_net(net: Net, scope: str, x: Tensor) -> Tensor:
    n, skips = net.count(f"{scope}/ds_layers/dense_block{{}}"), []
    for i in range(n):
        skips.append(_sum_d3(net, f"{scope}/ds_layers/dense_block{i}", x))
        x = F.avg_pool2d(skips[-1], 2)
    x = _sum_d3(net, f"{scope}/bottleneck_block", x)
    for i in range(n):
        up = f"{scope}/us_layers/upsample{i}/upsample"
        weight, bias = (net.arrays[f"{up}/transconv/deconv/{leaf}"] for leaf in ("W", "b"))
        x = F.conv_transpose2d(net.norm(f"{up}/norm", x), weight, bias, stride=2)
        x = torch.cat([x, skips.pop()], 1)
        x = _sum_d3(net, f"{scope}/us_layers/dense_block{n + 1 + i}", x)
    return x


def _sum_d3(net: Net, scope: str, x: Tensor) -> Tensor:
    blocks = 1 + net.count(f"{scope}/layers/layer{{}}/initial_layer")
    waiting = net.d2(f"{scope}/initial_block", "initial_layer", "bottleneck", x)[-1]
    slots = list(waiting.chunk(blocks, 1))
    for m in range(1, blocks):
        inner = f"{scope}/layers/layer{m}"
        share = net.d2(inner, "initial_layer", "bottleneck", slots[m - 1])[-1]
        slots[m:] = _add(slots[m:], share)
    return slots[-1]


NETS = {
    "d3net_l_fcn": "D3Net_L",
    "d3net_s_fcn": "D3Net_S",
    "d3net_vocals": "vocals",
    "d3net_other": "vocals",
    "d3net_drums": "drums",
    "d3net_bass": "bass",
}


def _shapes(name: str) -> dict[str, list[int]]:
    """Of the official arrays; `other` has those of `vocals`."""
    everything = json.loads(gzip.decompress((FOLDER / "param_names.json.gz").read_bytes()))
    key, scope = NETS[name], name.removeprefix("d3net_")
    return {n.replace(f"{key}/", f"{scope}/", 1): shape for n, shape, _ in everything[key]}


def _run(name: str, net: Net, x: Tensor) -> Tensor:
    if name.endswith("_fcn"):
        low = segmentation(net, x)
        return F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
    return separation(net, x, name.removeprefix("d3net_"))


def _arrays(name: str, x: Tensor, seed: int) -> Arrays:
    """Parameters from their names, and running statistics near those of the batch `x`; float32."""
    arrays = {}
    for key, shape in _shapes(name).items():
        if key.endswith(("/bn/mean", "/bn/var")):
            arrays[key] = torch.ones(shape)
        else:
            arrays[key] = torch.from_numpy(parameter(key, tuple(shape), seed))
    with torch.no_grad():
        _run(name, Net(arrays, training=True, momentum=1.0), x)
    for key, t in arrays.items():
        u = torch.from_numpy(uniform(key, t.numel(), seed)).view(t.shape).float()
        if key.endswith("/bn/mean"):
            t.add_(0.2 * (u - 0.5) * arrays[f"{key.removesuffix('mean')}var"].sqrt())
        elif key.endswith("/bn/var"):
            t.mul_(0.8 + 0.4 * u)
    return arrays


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("file", "name"), [("seg_S_64x128", "d3net_s_fcn"), ("audio_vocals", "d3net_vocals")]
)
def test_derived_is_official(file: str, name: str, training: bool) -> None:
    golden = Golden(file)
    arrays = {}
    for key, shape in _shapes(name).items():
        stored = f"param/{key}" in golden
        drawn = (
            golden[f"param/{key}"]
            if stored
            else torch.from_numpy(parameter(key, tuple(shape), golden.seed))
        )
        arrays[key] = drawn.view(shape).double()
    net, x = Net(arrays, training=training), golden["in/x"].double()
    mode = "train" if training else "eval"
    if name == "d3net_vocals":
        key, out = f"out/{mode}", separation(net, x.transpose(1, 2), "vocals").transpose(1, 2)
    elif training:
        key, out = "out/train_logits", _run(name, net, x)
    else:
        key, out = "mid/logits_lowres", segmentation(net, x)
    expected = golden[key].double()
    error = (golden.thinned(key, out) - expected).abs().max() / expected.abs().max()
    assert error <= (5e-4 if training else 1e-4)  # what float32 makes of it, by the specification
    for key in golden.keys("stat_after_train/") if training else ():
        expected = golden[f"stat_after_train/{key}"].double()
        assert (arrays[key] - expected).abs().max() <= 5e-4 * expected.abs().max(), key


BY_DEFAULT = [("d3net_l_fcn", True), ("d3net_drums", True), ("d3net_bass", False)]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(*case, marks=[] if case in BY_DEFAULT else [pytest.mark.slow])
        for case in itertools.product(NETS, (False, True))
    ],
)
def test_ours(name: str, training: bool, generator: torch.Generator, tmp_path: Path) -> None:
    """Through an official file: output, gradients of everything, running statistics."""
    shape = (1, 3, 64, 128) if name.endswith("_fcn") else (1, 2, 16, 2049)
    seed = int(torch.randint(1 << 31, (), generator=generator))
    x, other = (torch.rand(shape, generator=generator) for _ in range(2))
    arrays = _arrays(name, other, seed)
    model = d3net.create_model(name).double().train(training)
    with h5py.File(tmp_path / "official.h5", "w") as file:
        for key, t in arrays.items():
            file[key] = t.numpy()
    d3net.load_nnabla_h5(tmp_path / "official.h5", model)
    arrays = {
        key: t.double().requires_grad_(not key.endswith(("/bn/mean", "/bn/var")))
        for key, t in arrays.items()
    }
    inputs = [x.double().requires_grad_() for _ in range(2)]
    expected, out = _run(name, Net(arrays, training=training), inputs[0]), model(inputs[1])
    for result in (expected, out):
        result.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    _assert_close({"output": out}, {"output": expected})
    named = official_parameters(model)
    statistics = {key: ours.tensor for key, ours in named.items() if not ours.need_grad}
    _assert_close(statistics, {key: arrays[key] for key in statistics})
    grads = {key: ours.tensor.grad for key, ours in named.items() if ours.need_grad}
    own_grads = {key: arrays[key].grad for key in grads}
    _assert_close({**grads, "input": inputs[1].grad}, {**own_grads, "input": inputs[0].grad})


def _assert_close(ours: Arrays, expected: Arrays) -> None:
    """What is a thousand times smaller than the largest of all is compared with that, not itself.

    Gradients of biases in front of batch statistics are zero but for rounding.
    """
    largest = max(float(t.detach().abs().max()) for t in expected.values())
    for name, t in ours.items():
        truth = expected[name].view_as(t).detach()
        scale = max(float(truth.abs().max()), largest / 1000)
        assert (t.detach() - truth).abs().max() <= FLOAT64 * scale, name
