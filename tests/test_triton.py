"""The Triton backend without a GPU: the grid in Triton's interpreter, its choices, its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import d3net_kernels as dk
from d3net_kernels import ops
from d3net_kernels.__main__ import main

pytest.importorskip("triton")

from d3net_kernels.backends.triton import configs, dispatch, launch, prepared, tune, views
from d3net_kernels.backends.triton.kernels import parts

TESTS = Path(__file__).parent

# One or two cases of every kind: the interpreter takes seconds for each.
INTERPRETED = (
    "one_source",
    "one_row",
    "two_by_two",
    "no_batch",
    "no_columns",
    "dilation_beyond_both",
    "dilation_pairs",
    "decreasing_dilations",
    "uneven_sources",
    "growth_36",
    "kernel_1x1",
    "kernel_3x5",
    "psi_None_relu_True_bias_False",
    "psi_same_relu_False_bias_True",
    "layout_mixed_float32",
    "layout_shared_last_bfloat16",
    "grad_all_expanded_of_channels_last",
    "float64_psi_same_small_channels_last",
    "bfloat16_psi_float32_small_contiguous",
    "float16_psi_None_small_contiguous",
    "needs_inputs[0]_inputs[2]_bias",
)


def _pytest(*arguments: str) -> None:
    """Run pytest in a process in which Triton interprets; the seed is that of this session."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout


def test_interpreted_cases() -> None:
    grid = TESTS / "test_grid.py"
    _pytest(*(f"{grid}::test_right[triton-{name}]" for name in INTERPRETED))


@pytest.mark.slow
def test_interpreted_moments() -> None:
    _pytest(str(TESTS / "test_with_moments.py"))


def test_interpreted() -> None:
    _pytest(str(TESTS / "interpreted_triton.py"))


@pytest.mark.slow
def test_interpreted_grid() -> None:
    _pytest(str(TESTS / "test_grid.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu() -> None:
    assert "no GPU" in str(dk.why_not("triton"))
    with pytest.raises(RuntimeError, match="triton backend is not available: torch finds no GPU"):
        dk.use_backend("triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in str(dk.why_not("triton"))


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "GPU is sm_75; the kernels need sm_80"), ((8, 0), None)]
)
def test_old_gpu(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tensor:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    given = dk.why_not("triton", Tensor())  # type: ignore[arg-type]
    assert given == reason if reason is None else reason in str(given)


def test_serves_cuda_tensors_by_default() -> None:
    """Through the dispatcher, where no compiled kernel is registered for them."""
    for op in (*ops.DEFAULT, *ops.TRITON):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"), op.name()


def test_output_blocks() -> None:
    """Powers of two that cover all outputs with less than half of them, and 8, in vain."""
    for outputs in range(1, 300):
        block, rest = configs.output_blocks([outputs])
        assert block in (8, 16, 32, 64), outputs
        assert rest in (0, 8, 16, 32), outputs
        assert rest < block, outputs
        programs = -(-outputs // (block + rest))
        assert outputs <= programs * (block + rest) < outputs * 1.5 + 8, outputs


def test_output_blocks_of_d3net() -> None:
    assert configs.output_blocks([36]) == (32, 8)
    assert configs.output_blocks([64]) == (64, 0)
    assert configs.output_blocks([12]) == (16, 0)
    assert configs.output_blocks([20]) == (16, 8)


@pytest.mark.parametrize(
    ("arch", "dtype", "blocks"),
    [
        ("sm_80", torch.bfloat16, (32, 32)),
        ("sm_89", torch.float16, (32, 32)),
        ("sm_80", torch.float32, (64, 0)),
        ("sm_90", torch.bfloat16, (64, 0)),
        ("gfx942", torch.bfloat16, (64, 0)),
    ],
)
def test_convolved_blocks(arch: str, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    """Two products where Triton would prefetch for one."""
    assert configs.convolved_blocks([64], arch, dtype) == blocks
    assert configs.convolved_blocks([36], arch, dtype) == (32, 8)
    assert configs.convolved_blocks([8], arch, dtype) == (8, 0)


def test_alignment() -> None:
    """Runs of elements that one load may take, in a type of 2 bytes."""

    def of(t: torch.Tensor) -> tuple[object, int]:
        seen = [views.View.of(t)]
        layout = views.layout_of(seen, t.shape[3])
        return layout, views.alignment(seen, layout, t.shape[2] * t.shape[3], 2)

    x = torch.zeros(2, 12, 4, 10, dtype=torch.bfloat16)
    assert of(x) == (parts.PLANES, 8)
    assert of(x[:, :, :3]) == (parts.PLANES, 2)  # 30 pixels
    assert of(x[:, :1]) == of(x[:, 3:4]) == (parts.PLANES, 8)  # an only channel
    assert of(x[..., 1:]) == (parts.STRIDED, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    assert of(last) == (parts.CHANNELS_LAST, 4)  # 12 channels
    assert of(last[:, 2:10]) == (parts.CHANNELS_LAST, 2)  # which start at 4 bytes


def test_wide_offsets_of_dense_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded source takes no room; its gradient does, where it is wanted.

    64-bit offsets take registers: they come with smaller tiles.
    """
    decisions = []
    x = torch.empty(1, 1, 1024, 1024, device="meta").expand(1, 4096, 1024, 1024)
    weight, grad_output = x.new_empty(1, 4096, 1, 1), x.new_empty(1, 1, 1024, 1024)

    def prepare(inputs: object, chunk: int) -> prepared.Prepared:
        return prepared.Prepared(grad_output.new_empty(1, 1024, 1024, chunk), [0])

    class Kernel:
        def __getitem__(self, grid: object) -> Kernel:
            return self

        def __call__(self, *_: object, **options: object) -> None:
            decisions.append((options["WIDE"], options["PIXELS"]))

    monkeypatch.setattr(configs, "arch_of", lambda _: "sm_80")
    monkeypatch.setattr(configs, "tuned", lambda _: {})
    monkeypatch.setattr(launch, "prepare", prepare)
    monkeypatch.setattr(launch, "backward_data_kernel", Kernel())
    scale = x.new_empty(4096)
    for wanted in ([1], [0]):
        launch.backward_data(grad_output, [x], weight, [1, 1], scale, scale, False, 0, wanted)
    keys = [
        configs.Key("backward_data", "sm_80", torch.float32, 64, scattered)
        for scattered in (True, False)
    ]
    scattered, plain = (configs.shipped(key).pixels for key in keys)
    assert decisions == [(True, scattered), (False, plain)]
    assert scattered < plain


def test_channel_blocks() -> None:
    """Of D3Net's sources: two blocks cover 36 channels, and 144, with fewer in vain than one."""
    assert configs.channel_blocks([144, 36, 36], 32, rest=True) == (32, 16)
    assert configs.channel_blocks([144, 36, 36], 32, rest=False) == (32, 0)
    assert configs.channel_blocks([13, 1], 32, rest=True) == (16, 0)


def test_no_tf32_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """There most GPUs lack it, and Triton refuses to compile."""
    assert launch._precision(torch.float32, 1) == "tf32"
    assert launch._precision(torch.float32, 0) == "ieee"
    assert launch._precision(torch.bfloat16, 1) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch._precision(torch.float32, 1) == "ieee"


def test_compiler_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question would break its graph; the operator itself refuses where it runs."""

    class Tensor:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dk.why_not("triton", Tensor()) is None  # type: ignore[arg-type]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    forward = dispatch._kernel_or_error("forward", 0)
    with pytest.raises(RuntimeError, match="triton backend is not available: GPU is sm_75"):
        forward([Tensor()])


def test_cache_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    assert configs.read(path) == {}
    tuned = {
        "forward/bfloat16/48": configs.Config(128, 32, 4, 2),
        "backward_weight/bfloat16/40": configs.Config(16, 16, 1, 2),
    }
    configs.write(path, tuned)
    assert configs.read(path) == tuned
    configs.write(path, {})
    assert configs.read(path) == {}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\x01",
        '{"forward/bfloat16/48": {"pixels": 128}}',
        '{"forward/bfloat16/48": {"pixels": 100, "channels": 16, "warps": 4, "stages": 2}}',
        '{"forward/bfloat16/48": {"pixels": 128, "channels": 16, "warps": 4, "stages": "2"}}',
        '{"forward/bfloat16/48": {"pixels": 128, "channels": -16, "warps": 4, "stages": 2}}',
        '{"backward_weight/bfloat16/40": {"pixels": 16, "channels": 8, "warps": 1, "stages": 2}}',
        '{"backward_weight/bfloat16/40": {"pixels": 8, "channels": 16, "warps": 1, "stages": 2}}',
    ],
)
def test_damaged_cache(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="file.json is not used"):
        assert configs.read(path) == {}


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU/80GB")
    monkeypatch.setenv("D3NET_KERNELS_CACHE", str(tmp_path))
    path = configs.cache_file(torch.device("cuda"))
    assert path.parent == tmp_path / "triton"
    assert path.name.startswith("Some_GPU_80GB-torch")
    monkeypatch.setattr(configs, "KERNELS_VERSION", configs.KERNELS_VERSION + 1)
    assert configs.cache_file(torch.device("cuda")) != path  # other kernels, other files
    monkeypatch.delenv("D3NET_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert configs.cache_file(torch.device("cuda")).parent == tmp_path / "user/d3net_kernels/triton"


def test_tuned_configuration_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(configs, "cache_file", lambda _: tmp_path / "file.json")
    key = configs.Key("forward", "sm_90", torch.bfloat16, 36)
    assert key.name == "forward/bfloat16/48"
    numbers = {"pixels": 256, "channels": 32, "warps": 8, "stages": 2}
    (tmp_path / "file.json").write_text(json.dumps({key.name: numbers}))
    configs.tuned.cache_clear()
    assert configs.config_for(key, device) == configs.Config(**numbers)
    for other in (key._replace(dtype=torch.float16), key._replace(scattered=True)):
        assert configs.config_for(other, device) == configs.shipped(other)
    configs.tuned.cache_clear()


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_tuned_candidates_can_be_read(kernel: str, tmp_path: Path) -> None:
    """What is shipped is one of them."""
    key = configs.Key(kernel, "sm_80", torch.bfloat16, 36)
    candidates = list(tune._candidates(key))
    named = {f"{kernel}/{i}": config for i, config in enumerate(candidates)}
    configs.write(tmp_path / "file.json", named)
    assert configs.read(tmp_path / "file.json") == named
    assert configs.shipped(key) in candidates


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "nothing to tune: torch finds no GPU here" in capsys.readouterr().out
