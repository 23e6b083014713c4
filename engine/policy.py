"""What the engine asks of a model. Any module with these members can be drawn from."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from argrpo.engine.attention import Attend
from argrpo.engine.conditions import Conditions


class Prefix(NamedTuple):
    """Conditions as the first positions of a sequence."""

    embeddings: Tensor  # [N, P, D]
    mask: Tensor  # [N, P] bool, True on valid positions


class PolicyShape(NamedTuple):
    """The sizes of a policy that a key-value cache depends on."""

    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    prefix_len: int  # P
    num_image_tokens: int  # T


class Policy(Protocol):
    """An autoregressive model over image tokens, with one definition for drawing and training."""

    @property
    def shape(self) -> PolicyShape: ...

    @property
    def rotary(self) -> Tensor | None:
        """[P + T, head_dim / 2, 2] fp32 cosines and sines; None: no rotary embedding."""
        ...

    @property
    def token_embedding(self) -> nn.Embedding: ...

    @property
    def image_places(self) -> Tensor | None:
        """[T - 1 or more, D] learned positions that are added to the embeddings of image tokens,
        row t for token t, in the dtype of the weights and contiguous; None: none are.

        Prefix positions are `embed_conditions`' own."""
        ...

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the head has no bias."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every weight; the engine reads them in place and notices when they change."""
        ...

    def check_conditions(self, conditions: Conditions) -> None:
        """Raise ValueError by name if these conditions cannot be embedded."""
        ...

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """The null condition for every row. ValueError if the model has none."""
        ...

    def embed_conditions(self, conditions: Conditions) -> Prefix: ...

    def trunk(self, x: Tensor, attend: Attend) -> Tensor:
        """[N, S, D] embeddings -> [N, S, D] final-norm hidden states."""
        ...


def embed_tokens(policy: Policy, token_ids: Tensor) -> Tensor:
    """Image tokens 0 to S - 1 as they are fed: [N, S] int64 -> [N, S, D]. Differentiable."""
    x: Tensor = policy.token_embedding(token_ids)
    places = policy.image_places
    return x if places is None else x + places[: x.shape[1]]


def rotary_rows(policy: Policy, positions: slice | Tensor) -> Tensor | None:
    """Some rows of the policy's rotary table, if it has one."""
    return None if policy.rotary is None else policy.rotary[positions]
