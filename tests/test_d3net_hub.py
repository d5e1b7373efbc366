"""Saved networks on the Hugging Face Hub, without a network: what is cached, and what is sent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_d3net_models import TINY

import d3net

REPOSITORY, COMMIT = "someone/small-d3net", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def net() -> d3net.D3NetBackbone:
    return d3net.create_model("d3net_s", **TINY)


@pytest.fixture
def cache(net: d3net.D3NetBackbone, tmp_path: Path) -> Path:
    """A cache of huggingface_hub that has the repository."""
    repository = tmp_path / "models--someone--small-d3net"
    net.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_from_a_repository(net: d3net.D3NetBackbone, cache: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install 'd3net-kernels[hub]'")
    loaded = d3net.D3NetBackbone.from_pretrained(REPOSITORY, cache_dir=cache, local_files_only=True)
    assert loaded.config == net.config
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())


def test_repository_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install 'd3net-kernels[hub]'")
    with pytest.raises(FileNotFoundError, match=f"no folder {REPOSITORY}, and it cannot be fet"):
        d3net.D3NetBackbone.from_pretrained(REPOSITORY, cache_dir=tmp_path, local_files_only=True)


def test_to_a_repository(net: d3net.D3NetBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="pip install 'd3net-kernels[hub]'")
    sent: list[object] = []

    def create_repo(self: object, name: str, **options: object) -> str:
        sent.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self: object, *, repo_id: str, folder_path: str) -> None:
        sent.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    assert net.push_to_hub(REPOSITORY, private=True) == f"https://hub/{REPOSITORY}"
    assert sent == [
        (REPOSITORY, {"exist_ok": True, "private": True}),
        (REPOSITORY, ["config.json", "model.safetensors"]),
    ]


class TestWithoutHuggingfaceHub:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    def test_folders_work(self, net: d3net.D3NetBackbone, tmp_path: Path) -> None:
        net.save_pretrained(tmp_path)
        assert d3net.D3NetBackbone.from_pretrained(tmp_path).config == net.config

    def test_repositories_say_what_to_install(self, net: d3net.D3NetBackbone) -> None:
        with pytest.raises(FileNotFoundError, match=r"pip install 'd3net-kernels\[hub\]'"):
            d3net.D3NetBackbone.from_pretrained(REPOSITORY)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'd3net-kernels\[hub\]'"):
            net.push_to_hub(REPOSITORY)

    def test_a_path_is_no_repository(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
            d3net.D3NetBackbone.from_pretrained("./no/such/folder")
