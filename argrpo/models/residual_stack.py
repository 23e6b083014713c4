"""The pass through a policy's layers, whatever a layer of its family is made of.

N images, S positions, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from argrpo.engine.attention import Attend


def run_stack(
    x: Tensor,
    layers: nn.ModuleList,
    norms: Sequence[nn.Module],
    attend: Attend,
    *,
    checkpoints_layers: bool,
) -> Tensor:
    """Embeddings through all layers and the final norm.

    Each norm also makes the residual add before it, one launch for both: so a layer takes the
    residual stream, its norm, `attend` and the norm that follows, and returns the stream and that
    norm of it.

    Args:
        x: [N, S, D] embeddings.
        layers: L of them, in order.
        norms: the first norm of each layer, and the final one: L + 1.
        attend: what the engine or the trainer does for attention.
        checkpoints_layers: whether a pass that is differentiated keeps what goes into each layer
            alone, and makes the rest of it again in the backward pass.

    Returns:
        [N, S, D] final-norm hidden states.
    """
    first_norm, *next_norms = norms
    normed = first_norm(x)
    for layer, next_norm in zip(layers, next_norms, strict=True):
        if checkpoints_layers and torch.is_grad_enabled():
            # A layer draws no random number whose state would have to be kept.
            x, normed = checkpoint(
                *(layer, x, normed, attend, next_norm),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            x, normed = layer(x, normed, attend, next_norm)
    return normed
