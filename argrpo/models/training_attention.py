"""How whole images attend while they are scored: training, where every position is known.

Three ways, all exact, none with a mask of [N, S, S] where no prompt is padded:

    whole      prefix and image as one causal sequence: prefixes of one position (a class), whose
               key is the first of a row, and any prefix whose keys are not zero
    shared     a text prefix whose rotary rows are zero (engine/prefix.py): each distinct prompt is
               read once for all of its images, and only its valid positions; inside it attention is
               a running mean of V, and to an image it is one entry of score 0 that weighs as much
               as the prompt has positions. A padded last position is read too: it predicts token 0
    packed     for attention libraries: prefix keys as any others, sequences of different lengths
               one behind the other, padding left out

The last two feed the trunk one long row: all that is not attention looks at single positions, so
it needs not know whose they are.

Shapes: N images, P distinct prompts, M prefix positions, R valid ones of all prompts together,
E prompts whose last position is padded (right-padded, shorter than the prefix), T image tokens,
I = T - 1 that are fed, H heads, D head size, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.engine.attention import CausalAttend, prefix_allowed, rotate
from argrpo.engine.conditions import Conditions, distinct
from argrpo.engine.policy import Policy, embed_tokens, rotary_rows
from argrpo.engine.prefix import has_zero_rotary_prefix
from argrpo.models.attention_backends import AttentionName, PackedAttention, packed_attention

# A bf16 has 8 significant bits and fp32 has 24.
_BF16_PARTS = 3
# Fast kernels want rows of a multiple of 16 bytes.
_HEAD_MULTIPLE = 8


def whole_image_hidden(
    policy: Policy,
    conditions: Conditions,
    token_ids: Tensor,
    attention: AttentionName,
    end_sees_itself: bool = True,
) -> Tensor:
    """Final-norm hidden states of given images; row t predicts token t. Differentiable.

    Args:
        policy: the model.
        conditions: of N images, on its device.
        token_ids: [N, T] int64; the last column is not fed.
        attention: sdpa is PyTorch's; the others are packages, see argrpo/models/attention_backends.
        end_sees_itself: whether a padded last position attends to itself beside the valid ones, as
            it does when drawing.

    Returns:
        [N, T, width] in the dtype of the weights, contiguous.

    Raises:
        ValueError: the package is missing, or padded last positions meet one.
    """
    if attention != "sdpa":
        return _packed_hidden(policy, conditions, token_ids, attention)
    # A class is one position: plain causal attention reads it as its first key, and sharing it
    # would spare less than one row in T.
    if policy.shape.prefix_len > 1 and has_zero_rotary_prefix(policy):
        return _shared_prefix_hidden(policy, conditions, token_ids, end_sees_itself)
    return _whole_hidden(policy, conditions, token_ids, end_sees_itself)


def _whole_hidden(
    policy: Policy, conditions: Conditions, token_ids: Tensor, end_sees_itself: bool
) -> Tensor:
    prefix = policy.embed_conditions(conditions)
    x = torch.cat([prefix.embeddings, embed_tokens(policy, token_ids[:, :-1])], dim=1)
    prefix_len, num_positions = policy.shape.prefix_len, x.shape[1]
    allowed = None
    # One look at the device a pass: a prefix of one position is never padded.
    if prefix_len > 1 and not bool(prefix.mask.all()):
        allowed = prefix_allowed(prefix.mask, num_positions)
        if not end_sees_itself:
            allowed[:, 0, prefix_len - 1, prefix_len - 1] = prefix.mask[:, -1]
    attend = CausalAttend(rotary_rows(policy, slice(num_positions)), allowed)
    return policy.trunk(x, attend)[:, prefix_len - 1 :].contiguous()


def _shared_prefix_hidden(
    policy: Policy, conditions: Conditions, token_ids: Tensor, end_sees_itself: bool
) -> Tensor:
    once = distinct(conditions)
    prefix = policy.embed_conditions(once.conditions)
    padded = ~prefix.mask[:, -1]
    # The numbers of positions shape the pass, so the host has to know them.
    places, ends = (mask.flatten().nonzero().squeeze(1) for mask in (prefix.mask, padded))
    fed = embed_tokens(policy, token_ids[:, :-1])
    texts = [prefix.embeddings.flatten(0, 1)[places], prefix.embeddings[ends, -1]]
    x = torch.cat([*texts, fed.flatten(0, 1)])
    prefix_len, num_fed = prefix.mask.shape[1], fed.shape[1]
    rotary = rotary_rows(policy, slice(prefix_len, prefix_len + num_fed))
    assert rotary is not None, "has_zero_rotary_prefix"
    lengths = prefix.mask.sum(dim=1)
    columns = count_columns(lengths[once.index], policy.shape.head_dim)
    seen = prefix.mask.cumsum(dim=1).clamp(min=1)
    share = (1 / (lengths[ends] + 1)) * end_sees_itself
    attend = SharedPrefixAttend(rotary, seen, columns, places, ends, share, once.index)
    hidden = policy.trunk(x[None], attend)[0]
    # A prompt's last position predicts token 0.
    num_texts = len(places) + len(ends)
    rows = torch.arange(len(places), num_texts, device=ends.device)
    last = (lengths.cumsum(dim=0) - 1).index_copy(0, ends, rows)
    first = hidden[:num_texts][last[once.index]]
    rest = hidden[num_texts:].unflatten(0, fed.shape[:2])
    return torch.cat([first[:, None], rest], dim=1)


def _packed_hidden(
    policy: Policy, conditions: Conditions, token_ids: Tensor, attention: AttentionName
) -> Tensor:
    prefix = policy.embed_conditions(conditions)
    # One more look at a device whose lengths the host asks for anyway.
    if not bool(prefix.mask[:, -1].all()):
        raise ValueError(
            "policy.attention: expected sdpa for prompts with a padded last position, got "
            f"{attention}; pad on the left, or leave attention at sdpa"
        )
    x = torch.cat([prefix.embeddings, embed_tokens(policy, token_ids[:, :-1])], dim=1)
    valid = F.pad(prefix.mask, (0, x.shape[1] - prefix.mask.shape[1]), value=True)
    rows, lengths = valid.flatten().nonzero().squeeze(1), valid.sum(dim=1)
    attend = PackedAttend(
        rotary_rows(policy, rows % x.shape[1]),
        # The libraries want the longest length, or all of them, on the host.
        packed_attention(attention, lengths.tolist(), x.device),
        policy.shape.head_dim,
    )
    hidden = policy.trunk(x.flatten(0, 1)[rows][None], attend)[0]
    back = torch.arange(token_ids.shape[1], 0, -1, device=rows.device)
    return hidden[lengths.cumsum(dim=0)[:, None] - back]


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class SharedPrefixAttend:
    """P prompts: valid positions, padded last ones; then N images that each follow a prompt."""

    rotary: Tensor  # [I, D / 2, 2] fp32, of the image positions
    seen: Tensor  # [P, M] int64, valid positions up to each, at least 1
    columns: Tensor  # [N, 3] fp32, `count_columns` of the prompts' lengths
    places: Tensor  # [R] int64, the valid ones among the P * M
    ends: Tensor  # [E] int64, the prompts whose last position is padded
    share: Tensor  # [E] fp32, how much of what that position reads is itself
    index: Tensor  # [N] int64, the prompt of an image

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[1, R + E + N * I, 3, H, D] -> [1, R + E + N * I, H * D]."""
        num_valid, num_images = len(self.places), len(self.index) * len(self.rotary)
        texts, ends, images = qkv[0].split([num_valid, len(self.ends), num_images])
        means = self._running_means(texts[:, 2])
        images = images.unflatten(0, (len(self.index), len(self.rotary)))
        q, k = rotate(images[:, :, :2], self.rotary).unbind(2)
        # What an image sees of its text is what the text's last valid position saw.
        out = attend_after_mean(q, k, images[:, :, 2], means[:, -1][self.index], self.columns)
        read = means.flatten(0, 1)[self.places].to(qkv.dtype)
        # Padding changes no mean, but a padded position sees itself beside the valid ones.
        valid = means[:, -1][self.ends]
        with_itself = valid.lerp(ends[:, 2].float(), self.share[:, None, None]).to(qkv.dtype)
        return torch.cat([read, with_itself, out.flatten(0, 1)]).flatten(1)[None]

    def _running_means(self, values: Tensor) -> Tensor:
        """[R, H, D] -> [P, M, H, D] fp32: of the valid positions up to each."""
        grid = values.new_zeros(self.seen.numel(), *values.shape[1:], dtype=torch.float32)
        grid = grid.index_copy(0, self.places, values.float()).unflatten(0, self.seen.shape)
        return grid.cumsum(dim=1) / self.seen[:, :, None, None]


def attend_after_mean(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, columns: Tensor) -> Tensor:
    """Causal attention that also sees some entries of score 0 whose values average `mean`.

    Those entries weigh count * e^0 together, as one entry with the score log(count). Its key is
    therefore zero where the others have theirs, and log(count) in a column of its own, in which
    every query has a one; row 0 holds it, before all image keys, and row 0 of the queries is spare,
    so that the plain causal pattern fits. Nothing is added to the scores by a mask: every kernel of
    `scaled_dot_product_attention` can run it, forward and backward, through the public function, on
    a GPU too. Joining the mean on by the log-sum-exp spares the wider rows (this form takes 1.28
    times as long on a CPU: 12 heads of 64, 255 positions, fp32, both ways), but the public function
    does not give the log-sum-exp, and the private ones differ by device and dtype.

    Args:
        q, k, v: [N, I, H, D], rotated.
        mean: [N, H, D] fp32.
        columns: [N, 3], `count_columns` of their number.

    Returns:
        [N, I, H, D] in the dtype of q.
    """
    head_dim = q.shape[-1]
    width = _next_multiple(head_dim + _BF16_PARTS)
    added = slice(head_dim, head_dim + _BF16_PARTS)
    # On the right the columns, in front the row.
    wider = (0, width - head_dim, 0, 0, 1, 0)
    q, k = F.pad(q, wider), F.pad(k, wider)
    with torch.no_grad():  # constants, where the padding has put zeros
        q[..., added] = 1
        k[:, 0, :, added] = columns[:, None]
    v = F.pad(torch.cat([mean[:, None].to(v.dtype), v], dim=1), (0, width - head_dim))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_dim**-0.5)
    return out.transpose(1, 2)[:, 1:, :, :head_dim]


def count_columns(counts: Tensor, head_dim: int) -> Tensor:
    """What a key has where queries have ones, to score log(count) after the scale of attention.

    In parts of 8 bits, each exact in bf16, which a kernel adds up in fp32.

    Args:
        counts: [N] integer, at least 1.
        head_dim: D; scores are scaled by D^-1/2.

    Returns:
        [N, 3] fp32.
    """
    left, parts = counts.log() * head_dim**0.5, []
    for _ in range(_BF16_PARTS):
        parts.append(left.bfloat16().float())
        left = left - parts[-1]
    return torch.stack(parts, dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class PackedAttend:
    """Sequences of different lengths one behind the other, by a library's attention."""

    rotary: Tensor | None  # [sum of lengths, D / 2, 2] fp32, of each row's position
    attention: PackedAttention
    head_dim: int

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[1, sum of lengths, 3, H, D] -> [1, sum of lengths, H * D]."""
        q, k = rotate(qkv[:, :, :2], self.rotary)[0].unbind(1)
        missing = _next_multiple(self.head_dim) - self.head_dim
        # Zeros add nothing to a score, and what they make of the values is cut off.
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, qkv[0, :, 2]))
        out = self.attention(q, k, v, self.head_dim**-0.5)
        return out[..., : self.head_dim].flatten(1)[None]


def _next_multiple(size: int) -> int:
    return -(-size // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
