"""The demo's parts on small made-up input, and the whole of it (slow) on the real song."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d3net.audio import Stft, sdr
from d3net.cli import main
from d3net_kernels import D2Block

for package in ("av", "soundfile", "matplotlib"):
    pytest.importorskip(package, reason="pip install 'd3net-kernels[demo]'")

from d3net.data import stempeg_clip
from d3net.demo import demo as demo_module
from d3net.demo.plain import PlainD2Block
from d3net.demo.report import write_picture, write_waves
from d3net.demo.separator import SmallSeparator
from d3net.demo.training import Crops, Run, count_kept_bytes, train


def clip_is_installed() -> bool:
    try:
        return stempeg_clip.clip_path().is_file()
    except ModuleNotFoundError:
        return False


needs_clip = pytest.mark.skipif(not clip_is_installed(), reason="pip install stempeg")


def test_stft_inverts() -> None:
    stft = Stft(n_fft=64, hop=16)
    waves = torch.randn(3, 2, 500)
    spectra = stft.forward(waves)
    assert spectra.shape == (3, 2, 500 // 16 + 1, stft.bins)
    torch.testing.assert_close(stft.inverse(spectra, 500), waves)


def test_sdr_of_known_errors() -> None:
    target = torch.ones(2, 2, 100)
    estimate = torch.stack([target[0] * 0.9, target[1] * 0])
    torch.testing.assert_close(sdr(target, estimate), torch.tensor([20.0, 0.0]).double())
    assert sdr(target[0], target[0]) == torch.inf
    assert sdr(torch.zeros(2, 9), torch.ones(2, 9)) == -torch.inf


@pytest.mark.parametrize("training", [True, False])
def test_plain_block_is_the_fused_block(training: bool) -> None:
    """Float64 leaves only rounding: results, gradients and running statistics agree."""
    torch.manual_seed(0)
    plain = PlainD2Block(5, 3, 4, out_layers=2).double().train(training)
    fused = D2Block(5, 3, 4, out_layers=2).double().train(training)
    fused.load_state_dict(plain.state_dict())
    results = []
    for block in (plain, fused):
        x = torch.arange(5 * 9 * 8.0).cos().double().view(1, 5, 9, 8).requires_grad_()
        out = block(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
        results.append([out, *grads, *block.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_kept_bytes_counts_each_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4)
    with count_kept_bytes(layer) as kept:
        y = layer(x) + layer(x[:4].repeat(2, 1))
    assert y.shape == (8, 4)
    assert sum(kept.values()) == 2 * 8 * 4 * 4


def test_runs_see_the_same_batches_and_learn() -> None:
    torch.manual_seed(0)
    stems = torch.rand(4, 2, 100, 16)
    mixture = stems.sum(dim=0)
    plain = SmallSeparator(PlainD2Block, width=4, growth_rate=4, layers=2)
    fused = SmallSeparator(D2Block, width=4, growth_rate=4, layers=2)
    fused.load_state_dict(plain.state_dict())
    runs = [Run.of("plain", plain, "channels_last"), Run.of("fused", fused, "NCHW")]
    train(runs, Crops(mixture, stems, seed=1), steps=5)
    assert runs[0].losses[0] == pytest.approx(runs[1].losses[0], rel=1e-5)
    assert all(run.losses[-1] < run.losses[0] for run in runs)
    assert runs[1].separate(mixture[:, :98]).shape == (4, 2, 98, 16)
    assert not any(parameter.grad for parameter in plain.parameters())  # runs train copies


def test_files_hold_what_was_given(tmp_path: Path) -> None:
    import soundfile

    stems = {"drums": torch.randn(2, 4000), "bass": torch.zeros(2, 4000)}
    write_waves(tmp_path, stems, sample_rate=8000)
    drums, rate = soundfile.read(tmp_path / "drums.wav", dtype="float32", always_2d=True)
    assert rate == 8000
    loudest = stems["drums"].abs().max().clamp(min=1)
    torch.testing.assert_close(
        torch.from_numpy(drums.T), stems["drums"] / loudest, atol=2**-15, rtol=0
    )
    write_picture(tmp_path / "p.png", Stft(256, 64), 8000, stems["drums"], stems, stems)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@needs_clip
def test_clip_holds_four_stereo_stems() -> None:
    clip = stempeg_clip.load_clip()
    assert clip.sample_rate == 44100
    assert clip.stems.shape[:2] == (4, 2)
    assert clip.stems.shape[2] / clip.sample_rate == pytest.approx(6.08, abs=0.01)
    assert clip.stems.abs().amax(dim=(1, 2)).min() > 0.1
    torch.testing.assert_close(clip.mixture, clip.stems.sum(dim=0))


def test_file_without_stems_is_refused(tmp_path: Path) -> None:
    write_waves(tmp_path, {"alone": torch.zeros(2, 4000)}, sample_rate=8000)
    with pytest.raises(ValueError, match=r"\[8000\] Hz; expected a mix and 4 stems"):
        stempeg_clip.load_clip(tmp_path / "alone.wav")


def test_missing_clip_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise ModuleNotFoundError("No module named 'stempeg'")

    monkeypatch.setattr("d3net_kernels.why_not", lambda backend: None)
    monkeypatch.setattr("d3net_kernels.use_backend", lambda name: torch.enable_grad())
    monkeypatch.setattr(stempeg_clip, "clip_path", missing)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install 'd3net-kernels[demo]'" in capsys.readouterr().err


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("d3net.demo.run_demo", interrupted)
    monkeypatch.setattr("d3net_kernels.why_not", lambda backend: None)
    monkeypatch.setattr("d3net_kernels.use_backend", lambda name: torch.enable_grad())
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nd3net demo: interrupted\n"


def test_an_output_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3net_kernels.why_not", lambda backend: None)
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "no folder can be made there (File exists)" in capsys.readouterr().err


def test_missing_kernels_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("d3net_kernels.why_not", lambda backend: "no compiler")
    assert main(["demo"]) == 1
    assert "the fused kernels are not available: no compiler" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--steps", "0"]])
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.slow
@needs_clip
def test_demo_writes_all_it_promises(tmp_path: Path) -> None:
    report = demo_module.run_demo(tmp_path, steps=4, seed=0)
    names = {path.name for path in tmp_path.iterdir()}
    stems = {f"{name}.wav" for name in (*stempeg_clip.STEMS, "mixture")}
    assert names == stems | {"spectrograms.png", "table.txt", "table.json"}
    assert report.table() == (tmp_path / "table.txt").read_text().rstrip("\n")
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["fused"]["losses"]) == 4
    assert table["fused"]["kept_bytes"] < table["plain"]["kept_bytes"]
