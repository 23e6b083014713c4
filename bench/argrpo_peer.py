"""AR-GRPO's own code as a contender of bench_step.py, from a checkout of its repository.

Its model, its sampler and its image tokenizer are imported from where they lie, with our weights;
nothing of them is copied. Its trainer is a changed copy of TRL 0.19's and wants that and a process
group, so the lines between them (a mask, a loss, AdamW) are those of plain_path.py.

Written against Kwai-Klear/AR-GRPO at 65947ad.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from llamagen_peer import importable, published_weights
from plain_path import PlainStep
from rollout_contenders import MODELS, NUM_CLASSES, VOCAB_SIZE, PeerMissingError
from step_case import Judges, StepCase
from torch import Tensor

from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQConfig, VQTokenizer

_GPT = "autoregressive.models.gpt"
_SAMPLER = "autoregressive.models.generate"
_VQ = "tokenizer_lg.tokenizer_image.vq_model"
_MARK = Path("tokenizer_lg") / "tokenizer_image" / "vq_model.py"  # LlamaGen's has another name


class CheckoutModel:
    """Its GPT with our weights, drawn from by its `generate`, scored as its `forward` does."""

    def __init__(self, case: StepCase, policy: LlamaGen, gpt: Any, sampler: Any) -> None:
        sizes, draw = MODELS[case.draw.model], case.draw
        config = gpt.ModelArgs(
            dim=sizes.dim,
            n_layer=sizes.num_layers,
            n_head=sizes.num_heads,
            vocab_size=VOCAB_SIZE,
            block_size=draw.num_tokens,
            num_classes=NUM_CLASSES,
            cls_token_num=1,
            model_type="c2i",
        )
        model = gpt.Transformer(config).to(device=draw.device, dtype=draw.dtype).eval()
        model.load_state_dict(published_weights(policy))
        self._model, self._sampler = model, sampler
        self._num_tokens, self._scale = draw.num_tokens, draw.guidance_scale

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self._sampler.generate(
            self._model,
            labels[:, None],
            self._num_tokens,
            cfg_scale=self._scale,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            return_logits=True,
        )
        return found["output_ids"].long(), found["logits"]

    def logits(self, labels: Tensor, token_ids: Tensor) -> Tensor:
        self._model.disable_caches()
        size = token_ids.shape[1] + 1
        ones = torch.ones(len(labels), size, size, device=labels.device)
        logits, _loss = self._model(
            cond_idx=labels[:, None],
            idx=token_ids,
            targets=None,
            mask=ones.tril()[:, None].bool(),
            input_pos=torch.arange(size, device=labels.device),
        )
        return logits[:, :-1]

    def freeze(self) -> None:
        """Without gradients, as a reference."""
        self._model.requires_grad_(False)


class CheckoutStep(PlainStep):
    """A step whose policy, sampler and tokenizer are the published ones."""

    def __init__(
        self,
        case: StepCase,
        policy: LlamaGen,
        tokenizer: VQTokenizer,
        judges: Judges,
        path: Path | None,
    ) -> None:
        """
        Raises:
            PeerMissingError: `path` holds no checkout that can be imported.
        """
        if path is None or not (path / _MARK).is_file():
            raise PeerMissingError(
                "peer_path: expected a checkout of github.com/Kwai-Klear/AR-GRPO, "
                f"got {path}, where {_MARK} is missing"
            )
        try:
            with importable(path):
                gpt, sampler, vq = (import_module(name) for name in (_GPT, _SAMPLER, _VQ))
        except ImportError as error:
            raise PeerMissingError(f"peer_path: {path} cannot be imported: {error}") from error
        models = tuple(CheckoutModel(case, policy, gpt, sampler) for _ in range(2))
        models[1].freeze()
        super().__init__("argrpo_code", case, (models[0], models[1]), tokenizer, judges)
        self._decoder = _published_tokenizer(vq, case, tokenizer)
        self.facts = {
            "how": "AR-GRPO's model, sampler and tokenizer from a checkout, eager; the lines of "
            "its trainer re-created; judges one image at a time; no PIL"
        }

    @torch.no_grad()
    def pixels(self, token_ids: Tensor) -> Tensor:
        side = int(token_ids.shape[1] ** 0.5)
        channels = self._tokenizer.config.codebook_dim
        shape = [len(token_ids), channels, side, side]
        decoded = self._decoder.decode_code(token_ids, shape)
        return decoded.float().add_(1).mul_(0.5).clamp_(0, 1)


def _published_tokenizer(vq: Any, case: StepCase, tokenizer: VQTokenizer) -> Any:
    """Its tokenizer with our weights; it has one size."""
    config = tokenizer.config
    if config != VQConfig():
        raise PeerMissingError("argrpo_code: its tokenizer has the size of VQ-16 alone")
    model = vq.VQ_models["VQ-16"](
        codebook_size=config.codebook_size, codebook_embed_dim=config.codebook_dim
    )
    model = model.to(device=case.draw.device, dtype=case.draw.dtype).eval().requires_grad_(False)
    found = model.load_state_dict(tokenizer.state_dict(), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"quantize.codebook_used"}:
        raise PeerMissingError(f"argrpo_code: its tokenizer has other weights: {found}")
    return model
