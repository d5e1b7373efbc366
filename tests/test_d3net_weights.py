"""Official .h5 files, safetensors folders, and the command that converts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_params import FOLDER
from test_d3net_models import TINY, TINY_AUDIO
from torch import nn

import d3net
from d3net import pretrained
from d3net.blocks import SumD3Block, Upsample
from d3net.cli import main
from d3net.official_names import arrays_of, official_parameters, sum_d3_scopes
from d3net.weights import read_h5

h5py = pytest.importorskip("h5py", reason="pip install 'd3net-kernels[h5]'")

pytestmark = pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")

SAMPLE = FOLDER / "sample_nnabla.h5"


def _randomised(model: nn.Module) -> nn.Module:
    for t in model.state_dict().values():
        if t.dtype.is_floating_point:
            nn.init.normal_(t)
    return model


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: t.clone()
        for name, t in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, t in _state(model).items():
        assert torch.equal(t, state[name]), name


def _tiny(name: str) -> nn.Module:
    audio = name in ("d3net_vocals", "d3net_bass")
    return d3net.create_model(name, **(TINY_AUDIO if audio else TINY))


def test_sample_of_nnabla() -> None:
    """A D3 block and an up-sampling written by NNabla: names, shapes and attributes as ours."""
    block, up = SumD3Block(6, 5, 4, 2), Upsample(6)
    named = arrays_of(sum_d3_scopes(block, "vocals")) | arrays_of(
        iter([("vocals/upsample/norm", up.norm), ("vocals/upsample/transconv", up.conv)])
    )
    arrays = read_h5(SAMPLE)
    assert set(arrays) == set(named)
    with h5py.File(SAMPLE) as file:
        for index, (name, official) in enumerate(named.items()):
            assert file[name].shape == official.shape
            assert file[name].dtype == np.float32
            assert dict(file[name].attrs) == {"need_grad": official.need_grad, "index": index}


@pytest.mark.parametrize("name", ["d3net_s", "d3net_s_fcn", "d3net_vocals", "d3net_bass"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    source, target = _randomised(_tiny(name)), _tiny(name)
    d3net.save_nnabla_h5(tmp_path / "a.h5", source)
    report = d3net.load_nnabla_h5(tmp_path / "a.h5", target)
    _assert_same(target, _state(source))
    assert report.complete
    assert report.loaded == list(official_parameters(source))


def test_backbone_file_goes_into_a_backbone(tmp_path: Path) -> None:
    """As the published ImageNet files, whose names have no scope."""
    source, net = _randomised(_tiny("d3net_s")), _tiny("d3net_s_fcn")
    d3net.save_nnabla_h5(tmp_path / "a.h5", source)
    assert "conv1/conv/W" in read_h5(tmp_path / "a.h5")
    d3net.load_nnabla_h5(tmp_path / "a.h5", net.backbone)
    _assert_same(net.backbone, _state(source))


def _missing(file: h5py.File) -> str:
    del file["vocals/in_offset"]
    return "1 missing:\n  vocals/in_offset"


def _unexpected(file: h5py.File) -> str:
    file["vocals/extra/W"] = np.zeros(3, np.float32)
    return "1 unexpected:\n  vocals/extra/W"


def _misshapen(file: h5py.File) -> str:
    del file["vocals/in_scale"]
    file["vocals/in_scale"] = np.zeros((1, 1, 1, 7), np.float32)
    return "1 misshapen:\n  vocals/in_scale: (1, 1, 1, 7), expected (1, 1, 1, 30)"


def _foreign(file: h5py.File) -> str:
    file.move("vocals", "violin")
    return "has nothing of this model: its first array is violin/"


def _empty(file: h5py.File) -> str:
    del file["vocals"]
    return "it is empty"


def _words(file: h5py.File) -> str:
    del file["vocals/in_offset"]
    file["vocals/in_offset"] = "rm -rf"
    return "vocals/in_offset is no array of floating-point numbers"


def _elsewhere(file: h5py.File) -> str:
    del file["vocals/in_offset"]
    file["vocals/in_offset"] = h5py.ExternalLink("/etc/passwd", "/")
    return "1 missing:\n  vocals/in_offset"


@pytest.mark.parametrize(
    "damage", [_missing, _unexpected, _misshapen, _foreign, _empty, _words, _elsewhere]
)
def test_files_that_do_not_fit(damage: Callable[[h5py.File], str], tmp_path: Path) -> None:
    """Every trouble is named, and the model stays as it was."""
    path, net = tmp_path / "a.h5", _tiny("d3net_vocals")
    d3net.save_nnabla_h5(path, _randomised(_tiny("d3net_vocals")))
    with h5py.File(path, "r+") as file:
        message = damage(file)
    before = _state(net)
    with pytest.raises(ValueError, match=re.escape(message)):
        d3net.load_nnabla_h5(path, net)
    _assert_same(net, before)


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all", None])
def test_damaged_files(content: bytes | None, tmp_path: Path) -> None:
    path, net = tmp_path / "a.h5", _tiny("d3net_vocals")
    d3net.save_nnabla_h5(path, net)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    before = _state(_randomised(net))
    with pytest.raises(ValueError, match="cannot be read as HDF5"):
        d3net.load_nnabla_h5(path, net)
    _assert_same(net, before)


def test_what_fits_loads_when_not_strict(tmp_path: Path) -> None:
    path, source, net = tmp_path / "a.h5", _tiny("d3net_vocals"), _tiny("d3net_vocals")
    _randomised(source)
    d3net.save_nnabla_h5(path, source)
    with h5py.File(path, "r+") as file:
        _missing(file)
        _misshapen(file)
    report = d3net.load_nnabla_h5(path, net, strict=False)
    assert report.missing == ["vocals/in_offset"]
    assert [line.split(":")[0] for line in report.misshapen] == ["vocals/in_scale"]
    assert torch.equal(net.gate.gate.weight, source.gate.gate.weight)
    assert not net.in_offset.any()
    assert (net.in_scale == 1).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("d3net_l_ocr", TINY, "no SegmentationNet like this"),
        ("d3net_s", {**TINY, "norm": "per_layer"}, "norm='per_layer'"),
    ],
)
def test_networks_without_official_weights(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        d3net.load_nnabla_h5(SAMPLE, d3net.create_model(name, **options))


@pytest.mark.parametrize("name", ["d3net_s_fcn", "d3net_vocals"])
def test_model_without_memory(name: str, tmp_path: Path) -> None:
    """On the meta device a copy would be lost in silence; given memory, the model loads."""
    source = _randomised(_tiny(name))
    h5, safetensors = tmp_path / "a.h5", tmp_path / "a.safetensors"
    d3net.save_nnabla_h5(h5, source)
    pretrained.save_safetensors(source.state_dict(), safetensors)
    with torch.device("meta"):
        model = _tiny(name)
    for use in (
        lambda: d3net.load_nnabla_h5(h5, model),
        lambda: pretrained.load_safetensors(safetensors, model),
        lambda: d3net.save_nnabla_h5(tmp_path / "b.h5", model),
        lambda: model.save_pretrained(tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match=r"is on the meta device.*to_empty"):
            use()
    assert sorted(tmp_path.iterdir()) == [h5, safetensors]
    model.to_empty(device="cpu").reset_parameters()
    d3net.load_nnabla_h5(h5, model)
    _assert_same(model, _state(source))


@pytest.mark.parametrize("name", ["d3net_s", "d3net_l_ocr", "d3net_vocals"])
def test_pretrained_folder(name: str, tmp_path: Path) -> None:
    source = _randomised(_tiny(name))
    source.save_pretrained(tmp_path / "folder")
    loaded = type(source).from_pretrained(tmp_path / "folder")
    _assert_same(loaded, _state(source))
    assert loaded.config == source.config
    assert not loaded.training


def test_pretrained_folder_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        d3net.SeparationNet.from_pretrained(tmp_path)
    _tiny("d3net_vocals").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a SeparationNet, not a D3NetBackbone"):
        d3net.D3NetBackbone.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "final_growth_rate": 5}))
    with pytest.raises(ValueError, match=r"gate.norm.weight has shape \(12,\), expected \(5,\)"):
        d3net.SeparationNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": 5}))
    with pytest.raises(ValueError, match="colour"):
        d3net.SeparationNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm": "batch"}))
    with pytest.raises(ValueError, match=r"config\.json does not .* norm is 'batch'; accepted"):
        d3net.SeparationNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no network, not a SeparationNet"):
        d3net.SeparationNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        d3net.SeparationNet.from_pretrained(tmp_path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    net = _tiny("d3net_vocals")
    net.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        d3net.SeparationNet.from_pretrained(tmp_path)


def test_saved_onto_something_else(tmp_path: Path) -> None:
    """Onto a file, a folder, into no folder."""
    net, file = _tiny("d3net_vocals"), tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(NotADirectoryError, match="file, which is a file; accepted is a folder"):
        net.save_pretrained(file)
    with pytest.raises(IsADirectoryError, match="is a folder; accepted is the name of a file"):
        d3net.save_nnabla_h5(tmp_path, net)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none to write a\.h5"):
        d3net.save_nnabla_h5(tmp_path / "none" / "a.h5", net)
    with pytest.raises(TypeError, match="folder is None; accepted is a path"):
        net.save_pretrained(None)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("writer", ["save_file", "create_dataset"])
def test_interrupted_writing(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays, and nothing half-written beside it."""
    net = _tiny("d3net_vocals")

    def save() -> None:
        net.save_pretrained(tmp_path)
        d3net.save_nnabla_h5(tmp_path / "a.h5", net)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left")

    save()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["a.h5", "config.json", "model.safetensors"]
    _randomised(net)
    place = h5py.Group if writer == "create_dataset" else pretrained
    monkeypatch.setattr(place, writer, fail)
    with pytest.raises(OSError, match="no space left"):
        save()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if writer == "save_file":
        assert after == before
    else:  # the folder was saved before
        assert after["a.h5"] == before["a.h5"]
        assert sorted(after) == sorted(before)


@pytest.fixture(scope="module")
def official_bass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "bass.h5"
    d3net.save_nnabla_h5(path, _randomised(d3net.create_model("d3net_bass")))
    return path


def test_convert(official_bass: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There and back, bit for bit; the network is recognised both times."""
    ours, back = tmp_path / "bass.safetensors", tmp_path / "back.h5"
    assert main(["convert", str(official_bass), str(ours)]) == 0
    assert "d3net_bass" in capsys.readouterr().out
    assert main(["convert", str(ours), str(back)]) == 0
    before, after = read_h5(official_bass), read_h5(back)
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    model = d3net.create_model("d3net_bass", weights=ours)
    _assert_same(model, _state(d3net.create_model("d3net_bass", weights=official_bass)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bass}", "a.pt"], "target a.pt; accepted are an .h5 file to read and"),
        (["none.h5", "a.safetensors"], "there is no file none.h5"),
        (["none.safetensors", "a.h5"], "none.safetensors is missing"),
        (["{bass}", "a.safetensors", "--model", "d3net_drums"], "nothing of this model"),
        (["{bass}", "a.safetensors", "--model", "d3net_base"], "nearest are d3net_bass"),
        (["{sample}", "a.safetensors"], "has nothing of any D3Net"),
    ],
)
def test_convert_refuses(
    arguments: list[str],
    message: str,
    official_bass: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(bass=official_bass, sample=SAMPLE) for argument in arguments]
    assert main(["convert", *given]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_convert_names_the_nearest(
    official_bass: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bass.h5"
    path.write_bytes(official_bass.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["bass/in_offset"]
    assert main(["convert", str(path), str(tmp_path / "bass.safetensors")]) == 1
    error = capsys.readouterr().err
    assert "the nearest is d3net_bass" in error
    assert "bass/in_offset" in error
