"""LlamaGen's own sampler as a contender, from a checkout of its repository.

The checkout is imported from where it lies; nothing of it is copied. Its model gets our weights,
and `first_logits` lets the bench see that both draw from the same distribution.

Written against FoundationVision/LlamaGen at ce98ec4.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from rollout_contenders import NUM_CLASSES, VOCAB_SIZE, Case, PeerMissingError, random_tokens
from torch import Tensor

from argrpo.models.llamagen import LlamaGen

_MODEL_FILE = Path("autoregressive") / "models" / "gpt.py"


class LlamaGenPeer:
    """`autoregressive.models.generate` on the model of `autoregressive.models.gpt`."""

    name = "llamagen"

    def __init__(self, case: Case, policy: LlamaGen, path: Path | None) -> None:
        """Build the peer's model with the weights of `policy`.

        Raises:
            PeerMissingError: `path` holds no checkout that can be imported, or the work is of text.
        """
        if case.text_tokens:
            raise PeerMissingError(f"{self.name}: measured on class labels only")
        if path is None or not (path / _MODEL_FILE).is_file():
            raise PeerMissingError(
                "peer_path: expected a checkout of github.com/FoundationVision/LlamaGen, "
                f"got {path}, where {_MODEL_FILE} is missing"
            )
        try:
            with importable(path):
                models = import_module("autoregressive.models.gpt").GPT_models
                self._sampler = import_module("autoregressive.models.generate")
        except ImportError as error:
            raise PeerMissingError(f"peer_path: {path} cannot be imported: {error}") from error
        self._case = case
        build = models[f"GPT-{case.model}"]
        model = build(
            vocab_size=VOCAB_SIZE,
            block_size=case.num_tokens,
            num_classes=NUM_CLASSES,
            cls_token_num=1,
            model_type="c2i",
        )
        model = model.to(device=case.device, dtype=case.dtype).eval()
        model.load_state_dict(published_weights(policy))
        self._model = self._run = model
        self._settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self._at = torch.zeros(1, device=case.device, dtype=torch.int)
        self.facts = {"how": "eager, its own loop; math attention; no log-prob"}

    def prepare(self) -> None:
        case = self._case
        rows = 2 * case.images if case.is_guided else case.images
        with torch.device(case.device):
            self._model.setup_caches(rows, 1 + case.num_tokens, case.dtype)
        self._tokens = random_tokens(case, case.images)[:, None]
        self._randomise()

    @torch.no_grad()
    def step(self, position: int) -> object:
        """One turn of the sampler's own loop."""
        self._at.fill_(position)  # it counts on from here, in place
        return self._sampler.decode_n_tokens(
            self._run, self._tokens, self._at, 1, self._case.guidance_scale, -1, **self._settings
        )

    def finish(self) -> None:
        """Its caches stay; its own `rollout` makes new ones."""

    def rollout(self) -> object:
        case = self._case
        return self._sampler.generate(
            self._run,
            case.labels,
            case.num_tokens,
            cfg_scale=case.guidance_scale,
            **self._settings,
        )

    @torch.no_grad()
    def first_logits(self) -> Tensor:
        """[N, V] fp32 logits of token 0, guidance mixed, before the draw."""
        case = self._case
        labels = self._branches(case.labels)
        with torch.device(case.device):
            self._model.setup_caches(len(labels), 1 + case.num_tokens, case.dtype)
        logits, _ = self._model(None, labels, torch.arange(1, device=case.device))
        for layer in self._model.layers:
            layer.attention.kv_cache = None  # `prepare` is where its memory counts
        if not case.is_guided:
            return logits[:, -1]
        cond, uncond = logits[:, -1].chunk(2)
        return uncond + case.guidance_scale * (cond - uncond)

    def _branches(self, labels: Tensor) -> Tensor:
        """[R] labels, with those of the null class where there is guidance."""
        if not self._case.is_guided:
            return labels
        return torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])

    def _randomise(self) -> None:
        for layer in self._model.layers:
            layer.attention.kv_cache.k_cache.normal_()
            layer.attention.kv_cache.v_cache.normal_()


@contextmanager
def importable(path: Path) -> Iterator[None]:
    sys.path.insert(0, str(path.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))


def published_weights(policy: LlamaGen) -> dict[str, Tensor]:
    """Our weights under the published names: w1 and w3 are one parameter here."""
    weights = {}
    for name, weight in policy.state_dict().items():
        if name.endswith("feed_forward.w13"):
            stem = name.removesuffix("w13")
            weights[f"{stem}w1.weight"], weights[f"{stem}w3.weight"] = weight.chunk(2)
        else:
            weights[name] = weight
    return weights
