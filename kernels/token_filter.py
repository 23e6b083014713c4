"""Which tokens a filtered draw may take: top-k with every tie, then the exact top-p set of it.

    K = {v : x_v >= the k-th largest x},  minus tokens at -inf
    S = the shortest prefix of K, by falling x and then rising token id, whose mass reaches p

The token that crosses p stays. Logits are compared before the division by the temperature, which
could make two of them equal. filter_search.py finds the same set inside a kernel, without sorting.

Source: the order of the filters and the rule for ties, FoundationVision/LlamaGen at ce98ec4,
autoregressive/models/generate.py.
"""

import torch
from torch import Tensor


def filter_mask(
    logits: Tensor,
    top_k: Tensor | float,
    top_p: Tensor | float,
    temperature: Tensor | float = 1.0,
) -> Tensor:
    """Which tokens survive top-k, then top-p. The specification, in plain PyTorch.

    Args:
        logits: [B, V] logits.
        top_k: keep the k largest and every tie of the k-th; 0 or at least V keeps all.
        top_p: keep the shortest prefix, by falling probability (renormalised over what top-k
            left, equal logits by rising token id), whose mass reaches top_p; the token that
            crosses it stays, and so does the first.
        temperature: above 0; what the logits are divided by before they become probabilities.

    Returns:
        [B, V] bool; false at -inf.
    """
    # Both numbers are read by the host: it sorts no more than the filter can keep.
    k, p = int(top_k), float(top_p)
    k = k if 0 < k < logits.shape[1] else logits.shape[1]
    ordered = _largest(logits, k)
    threshold = ordered[:, -1:]
    kept = (logits >= threshold).logical_and_(logits > -torch.inf)
    if p >= 1:
        return kept
    num_kept = kept.sum(dim=1, keepdim=True)
    if num_kept.max() > k:
        ordered = _largest(logits, int(num_kept.max()))
    # fp64 because a running fp32 sum over 16,384 terms is off by 1e-6, enough to move the edge
    scaled = ordered.double() / temperature
    scaled.masked_fill_(ordered < threshold, -torch.inf)
    mass = scaled.softmax(dim=1)
    num_kept = (mass.cumsum(dim=1).sub_(mass) <= p).sum(dim=1, keepdim=True).clamp_(min=1)
    edge = ordered.gather(1, num_kept - 1)
    above, equal = logits > edge, logits == edge
    rank = equal.cumsum(dim=1, dtype=torch.int32)
    return equal.logical_and_(rank <= num_kept - above.sum(dim=1, keepdim=True)).logical_or_(above)


def _largest(logits: Tensor, count: int) -> Tensor:
    """[B, count] largest values of each row, falling."""
    if 2 * count < logits.shape[1]:
        return logits.topk(count, dim=1).values
    return logits.sort(dim=1, descending=True).values[:, :count]


def pack_support(kept: Tensor) -> Tensor:
    """[B, V] bool -> [B, ceil(V / 8)] uint8, the lowest token id in the highest bit."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=kept.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_support(support: Tensor, vocab_size: int) -> Tensor:
    """[B, ceil(V / 8)] uint8 -> [B, V] bool, the inverse of `pack_support`."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=support.device)
    bits = (support[:, :, None] >> shifts) & 1
    return bits.flatten(1)[:, :vocab_size].bool()
