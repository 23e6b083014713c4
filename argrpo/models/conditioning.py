"""How LlamaGen turns labels and text features into the first positions of a sequence; what labels
of any policy must be.

Parameter names are those of the published checkpoints.

Shapes: N images, P prefix positions, C width of the text features, D width of the model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.engine.policy import Prefix


class LabelEmbedding(nn.Module):
    """Class labels; one more row than classes holds the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def check(self, conditions: Conditions) -> None:
        check_labels(conditions, self.num_classes)

    def embed(self, conditions: Conditions) -> Prefix:
        assert not isinstance(conditions, TextFeatures)
        embeddings = self.embedding_table(conditions)[:, None]
        mask = torch.ones(len(conditions), 1, dtype=torch.bool, device=conditions.device)
        return Prefix(embeddings, mask)

    def null(self, conditions: Conditions) -> Conditions:
        assert not isinstance(conditions, TextFeatures)
        return torch.full_like(conditions, self.num_classes)


def check_labels(conditions: Conditions, num_classes: int) -> None:
    """Whether conditions are labels of so many classes.

    Raises:
        ValueError: texts, or a dtype, shape or range of no labels, by name.
    """
    if isinstance(conditions, TextFeatures):
        raise ValueError("conditions: expected class labels [N] int64, got TextFeatures")
    if conditions.dim() != 1 or conditions.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape [N], got {conditions.dtype} {list(conditions.shape)}"
        )
    outside = (conditions < 0) | (conditions >= num_classes)
    if bool(outside.any()):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, got {int(conditions[outside][0])}"
        )


class CaptionEmbedding(nn.Module):
    """Text features through a two-layer projection; learned features are the null."""

    def __init__(self, prefix_len: int, caption_dim: int, dim: int, text_padding: str) -> None:
        super().__init__()
        self.text_padding = text_padding
        self.cap_proj = _CaptionProjection(caption_dim, dim)
        # A parameter as in AR-GRPO, which may have trained it; LlamaGen keeps it as a buffer.
        self.uncond_embedding = nn.Parameter(
            torch.randn(prefix_len, caption_dim) / caption_dim**0.5
        )

    def check(self, conditions: Conditions) -> None:
        if not isinstance(conditions, TextFeatures):
            raise ValueError("conditions: expected TextFeatures, got a tensor of labels")
        expected = list(self.uncond_embedding.shape)
        if list(conditions.features.shape[1:]) != expected:
            raise ValueError(
                f"features: expected [P, {expected[0]}, {expected[1]}], "
                f"got {list(conditions.features.shape)}"
            )
        # The last position predicts the first image token. Where a policy was trained with valid
        # ones there, padding would predict nonsense, and the other way round.
        end, place = ("last", -1) if self.text_padding == "left" else ("first", 0)
        padded = ~conditions.mask[:, place].bool()
        if bool(padded.any()):
            raise ValueError(
                f"mask: expected {self.text_padding} padding (valid positions {end}), as "
                f"text_padding of this policy says, got {int(padded.sum())} of {len(padded)} "
                f"prompts with a padded {end} position"
            )

    def embed(self, conditions: Conditions) -> Prefix:
        assert isinstance(conditions, TextFeatures)
        features = conditions.features.to(self.uncond_embedding.dtype)
        mask = conditions.mask.bool()
        embeddings = self.cap_proj(features)
        if conditions.index is None:
            return Prefix(embeddings, mask)
        return Prefix(embeddings[conditions.index], mask[conditions.index])

    def null(self, conditions: Conditions) -> Conditions:
        assert isinstance(conditions, TextFeatures)
        # The null differs by its mask alone, so that prompts of one length share one.
        masks, index = conditions.mask.unique(dim=0, return_inverse=True)
        features = self.uncond_embedding.expand(len(masks), -1, -1)
        return TextFeatures(features, masks, index[conditions.rows])


class _CaptionProjection(nn.Module):
    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
