"""The project YAML of a taming-transformers run: the sizes of its transformer and of its VQGAN."""

from pathlib import Path
from typing import TypeVar

import yaml  # type: ignore[import-untyped]

from argrpo.models.taming import TamingConfig
from argrpo.models.vq import VQConfig

_TRANSFORMER = "model.params.transformer_config"
_FIRST_STAGE = "model.params.first_stage_config"
_COND_STAGE = "model.params.cond_stage_config"
_GRID = f"{_FIRST_STAGE}.params.ddconfig"

_KIND_WORDS: dict[type, str] = {int: "a whole number", str: "a text", list: "a list"}

Value = TypeVar("Value", int, str, list)


class TamingProject:
    """A project file whose model argrpo has."""

    def __init__(self, path: str | Path) -> None:
        """Read a file; no tag in it is followed.

        Raises:
            FileNotFoundError: nothing stands at the path.
            ValueError: no YAML, or a model that is none of a class-conditional transformer over
                VQGAN tokens in raster order; the message names the key.
        """
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(
                f"{path}: expected the project YAML that stands beside the checkpoint, under "
                "configs/, got no file there"
            )
        try:
            self._tree: object = yaml.safe_load(self._path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            words = " ".join(str(error).split())
            raise ValueError(f"{path}: expected a project YAML, got none ({words})") from error
        self._check_kind()

    def policy_config(self) -> TamingConfig:
        """The transformer's sizes."""
        params = f"{_TRANSFORMER}.params"
        return TamingConfig(
            dim=self._at(f"{params}.n_embd", int),
            num_layers=self._at(f"{params}.n_layer", int),
            num_heads=self._at(f"{params}.n_head", int),
            vocab_size=self._at(f"{params}.vocab_size", int),
            image_size=self._at(f"{_GRID}.resolution", int),
            downsample=2 ** (len(self._at(f"{_GRID}.ch_mult", list)) - 1),
            num_classes=self._at(f"{_COND_STAGE}.params.n_classes", int),
            num_positions=self._at(f"{params}.block_size", int),
        )

    def tokenizer_config(self) -> VQConfig:
        """The VQGAN's sizes."""
        multipliers = tuple(self._at(f"{_GRID}.ch_mult", list))
        return VQConfig(
            codebook_size=self._at(f"{_FIRST_STAGE}.params.n_embed", int),
            codebook_dim=self._at(f"{_FIRST_STAGE}.params.embed_dim", int),
            z_channels=self._at(f"{_GRID}.z_channels", int),
            channels=self._at(f"{_GRID}.ch", int),
            encoder_multipliers=multipliers,
            decoder_multipliers=multipliers,
            num_res_blocks=self._at(f"{_GRID}.num_res_blocks", int),
            unit_codes=False,
        )

    def _check_kind(self) -> None:
        for place, ending in (
            (_TRANSFORMER, "mingpt.GPT"),
            (_FIRST_STAGE, "vqgan.VQModel"),
            (_COND_STAGE, "util.Labelator"),
        ):
            target = self._at(f"{place}.target", str)
            if not target.endswith(f".{ending}"):
                raise self._error(f"{place}.target", f"a path that ends with {ending}", target)
        multipliers = self._at(f"{_GRID}.ch_mult", list)
        if not multipliers or not all(type(multiplier) is int for multiplier in multipliers):
            raise self._error(f"{_GRID}.ch_mult", "a list of whole numbers", multipliers)
        coarsest = self._at(f"{_GRID}.resolution", int) >> (len(multipliers) - 1)
        expected: dict[str, tuple[object, object]] = {  # what it must be, and is where not written
            f"{_TRANSFORMER}.params.n_unmasked": (0, 0),
            "model.params.unconditional": (False, False),
            f"{_FIRST_STAGE}.params.remap": (None, None),
            f"{_GRID}.attn_resolutions": ([coarsest], None),
            f"{_GRID}.double_z": (False, True),
            f"{_GRID}.resamp_with_conv": (True, True),
            f"{_GRID}.in_channels": (3, None),
            f"{_GRID}.out_ch": (3, None),
        }
        for key, (wanted, default) in expected.items():
            found = self._found(key, default)
            if found != wanted:
                raise self._error(key, repr(wanted), found)
        permuter = self._found("model.params.permuter_config.target", "permuter.Identity")
        if not str(permuter).endswith("permuter.Identity"):
            raise self._error("model.params.permuter_config.target", "permuter.Identity", permuter)

    def _at(self, key: str, kind: type[Value]) -> Value:
        value = self._found(key, None)
        if type(value) is not kind:
            raise self._error(key, _KIND_WORDS[kind], value)
        return value

    def _found(self, key: str, default: object) -> object:
        """What stands under a dotted key; the default if nothing does."""
        value = self._tree
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def _error(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self._path}: {key}: expected {expected}, got {got!r}")
