"""Policies to and from folders and the hub, without a network."""

from pathlib import Path
from typing import Any

import pytest
import torch

from argrpo.models.hub import model_card
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.taming import Taming, TamingConfig

SIZES = {"dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 16, "image_size": 64}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def llamagen() -> LlamaGen:
    return LlamaGen(LlamaGenConfig(**SIZES, ffn_dim=32, num_classes=10))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub that keeps repositories as folders below tmp_path; what was asked of it."""
    import shutil

    import huggingface_hub

    asked: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked.append({"create": repo_id, "token": self.token, **options})
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            asked.append({"upload": repo_id, **options})
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}/commit/1"

    def snapshot(repo_id: str, **options: Any) -> str:
        asked.append({"fetch": repo_id, **options})
        return str(tmp_path / repo_id)

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append({"fetch": f"{repo_id}/{filename}", **options})
        return str(GOLDEN / "llamagen_c2i" / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_what_is_pushed_is_read_back(
    llamagen: LlamaGen, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    address = llamagen.push_to_hub("me/tuned", private=True, token="t", license="mit")
    assert address == "https://hub/me/tuned/commit/1"
    assert hub[0] == {"create": "me/tuned", "token": "t", "private": True, "exist_ok": True}
    files = sorted(path.name for path in (tmp_path / "me" / "tuned").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    read = LlamaGen.from_pretrained("me/tuned", revision="main", cache_dir="kept")
    assert hub[-1]["revision"] == "main"
    assert hub[-1]["cache_dir"] == "kept"
    assert read.config == llamagen.config
    for name, weight in llamagen.named_parameters():
        assert torch.equal(dict(read.named_parameters())[name], weight), name


def test_a_file_of_a_repository_is_read_with_its_sizes(hub: list[dict[str, Any]]) -> None:
    read = LlamaGen.from_pretrained(
        "FoundationVision/LlamaGen", filename="main.pt", image_size=128, num_heads=2
    )
    assert hub[0]["fetch"] == "FoundationVision/LlamaGen/main.pt"
    assert read.config.image_size == 128


def test_folders_need_no_hub(llamagen: LlamaGen, tmp_path: Path) -> None:
    llamagen.save_pretrained(tmp_path / "kept")
    read = LlamaGen.from_pretrained(tmp_path / "kept", dtype=torch.bfloat16)
    assert read.output.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"got a LlamaGen; use LlamaGen\.from_pretrained"):
        Taming.from_pretrained(tmp_path / "kept")
    with pytest.raises(ValueError, match="holds something"):
        llamagen.save_pretrained(tmp_path / "kept")


def test_a_taming_policy_has_the_same_methods(tmp_path: Path) -> None:
    policy = Taming(TamingConfig(**SIZES, num_classes=10, num_positions=16))
    policy.save_pretrained(tmp_path / "kept")
    assert Taming.from_pretrained(tmp_path / "kept").config == policy.config


def test_what_cannot_be_reached_is_one_clear_error() -> None:
    # Offline, as all tests are: the hub's own cache is asked and lacks it.
    with pytest.raises(FileNotFoundError, match="me/absent: expected a path, or a repository"):
        LlamaGen.from_pretrained("me/absent")
    with pytest.raises(FileNotFoundError, match="not a name: expected a path, or a repository"):
        LlamaGen.from_pretrained("not a name")


def test_a_card_says_how_to_find_and_use_a_policy(llamagen: LlamaGen) -> None:
    card = model_card(llamagen, "mit")
    assert card.startswith("---\nlibrary_name: argrpo\npipeline_tag: unconditional-image-gen")
    assert "license: mit" in card
    assert "from argrpo.models.llamagen import LlamaGen" in card
    assert "license" not in model_card(llamagen, None)
    text = {"model_type": "t2i", "prefix_len": 3, "caption_dim": 4}
    policy = LlamaGen(LlamaGenConfig(**SIZES, ffn_dim=32, **text))
    assert "pipeline_tag: text-to-image" in model_card(policy, None)
