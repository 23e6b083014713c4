"""What the trainer asks of a policy beyond what the engine does: any module with these members can
be tuned, saved and measured."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from argrpo.engine.conditions import Conditions
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.attention_backends import AttentionName
from argrpo.models.scoring import ScoringPolicy


class PolicySizes(Protocol):
    """What a policy's config says whatever its family."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        ...

    @property
    def downsample(self) -> int:
        """Pixels a side of one token."""
        ...

    @property
    def model_type(self) -> str:
        """c2i: class labels; t2i: text features."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels that a class-conditional one knows."""
        ...

    @property
    def text_padding(self) -> str:
        """Where padding stands in a text: left or right."""
        ...


class ImagePolicy(ScoringPolicy, Protocol):
    """A policy that can be tuned: LlamaGen, Taming."""

    checkpoints_layers: bool
    """Whether a layer's inside is made again backwards instead of kept."""
    attention: AttentionName
    """Of the pass over whole images."""
    end_sees_itself: bool
    """See `whole_image_hidden`."""

    @property
    def config(self) -> PolicySizes: ...

    @property
    def has_null_condition(self) -> bool:
        """Whether it can be guided."""
        ...

    @staticmethod
    def published_names(key: str) -> tuple[str, ...]:
        """The published parameters that are the row blocks of one of ours, in order."""
        ...

    def logits(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: int | None = None,
    ) -> Tensor: ...

    def logprobs(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        params: SamplingParams,
        support: Tensor | None = None,
    ) -> Tensor: ...

    # What every nn.Module has.

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def to(self, device: str | torch.device) -> Self: ...
