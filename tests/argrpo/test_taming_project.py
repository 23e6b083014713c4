"""The project YAML of taming-transformers: sizes, and everything that is another model."""

from pathlib import Path

import pytest

from argrpo.models.taming import TamingConfig
from argrpo.models.taming_project import TamingProject
from argrpo.models.vq import VQConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = (GOLDEN / "taming_net2net" / "project.yaml").read_text(encoding="utf-8")


def project(tmp_path: Path, *changes: tuple[str, str]) -> TamingProject:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "project.yaml"
    path.write_text(text, encoding="utf-8")
    return TamingProject(path)


def test_sizes_are_read(tmp_path: Path) -> None:
    read = project(tmp_path)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "image_size": 8}
    assert read.policy_config() == TamingConfig(
        **sizes, downsample=2, num_classes=6, num_positions=16
    )
    assert read.tokenizer_config() == VQConfig(
        codebook_size=32,
        codebook_dim=16,
        z_channels=32,
        channels=32,
        encoder_multipliers=(1, 1),
        decoder_multipliers=(1, 1),
        num_res_blocks=1,
        unit_codes=False,
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mingpt.GPT", "mingpt.CodeGPT", "transformer_config.target: expected a path that ends"),
        ("vqgan.VQModel", "vqgan.GumbelVQ", "first_stage_config.target: expected a path that ends"),
        ("util.Labelator", "util.SOSProvider", "cond_stage_config.target: expected a path"),
        ("n_layer: 2", "n_layer: two", "n_layer: expected a whole number, got 'two'"),
        ("n_layer: 2", "other: 2", "n_layer: expected a whole number, got None"),
        ("n_head: 2", "n_head: true", "n_head: expected a whole number, got True"),
        ("n_head: 2", "n_head: 2\n        n_unmasked: 4", "n_unmasked: expected 0, got 4"),
        ("- 4\n", "- 8\n", r"attn_resolutions: expected \[4\], got \[8\]"),
        ("double_z: false", "double_z: true", "double_z: expected False, got True"),
        (
            "  cond_stage_key:",
            "  unconditional: true\n    cond_stage_key:",
            "unconditional: expected",
        ),
        ("ch_mult:", "ch_mult: [1, a]\n          x:", "ch_mult: expected a list of whole numbers"),
    ],
)
def test_another_model_is_refused_by_its_key(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        project(tmp_path, (old, new)).policy_config()


def test_an_order_of_tokens_that_is_not_raster_is_refused(tmp_path: Path) -> None:
    spiral = (
        "  params:\n    permuter_config: {target: taming.modules.transformer.permuter.SpiralOut}"
    )
    with pytest.raises(ValueError, match=r"permuter_config\.target: expected permuter\.Identity"):
        project(tmp_path, ("  params:\n    cond_stage_key", spiral + "\n    cond_stage_key"))


def test_a_tag_in_a_project_runs_nothing(tmp_path: Path) -> None:
    path, marker = tmp_path / "project.yaml", tmp_path / "it ran"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {marker}']\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a project YAML, got none"):
        TamingProject(path)
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):
        TamingProject(tmp_path / "none.yaml")
