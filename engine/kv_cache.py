"""Keys and values of a wave of images that all stand at the same position.

The layout of the plain PyTorch path: every slot owns one contiguous stretch, so that the valid
part of the cache is a slice, read without copies. Entry 0 of a slot is its collapsed prefix (a key
of zeros and the mean of the prefix values); entry 1 + t belongs to image token t. The last token
of an image is never fed back, so T entries suffice.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.engine.attention import rotate
from argrpo.engine.cache_plan import ROW_TILE
from argrpo.engine.policy import PolicyShape
from argrpo.engine.prefix import PrefixStates

# Keys, values and scores are fp32 whatever the weights are: without a kernel that accumulates in
# fp32, half-precision scores would be rounded, and on a CPU half-precision products are slower.
_DTYPE = torch.float32


def slot_bytes(shape: PolicyShape, num_branches: int) -> int:
    """Bytes of keys and values that one image needs."""
    entries = shape.num_layers * shape.num_heads * shape.num_image_tokens * shape.head_dim
    return 2 * num_branches * entries * _DTYPE.itemsize


def rows_within(shape: PolicyShape, kv_bytes: int) -> int:
    """How many guided images a cache of so many bytes holds, in whole tiles where one fits.

    Raises:
        ValueError: not one fits.
    """
    one = slot_bytes(shape, num_branches=2)
    if kv_bytes < one:
        raise ValueError(f"kv_bytes: expected at least {one} for one guided image, got {kv_bytes}")
    fitting = kv_bytes // one
    return fitting // ROW_TILE * ROW_TILE or fitting


class WaveCache:
    """Keys and values of R rows: the conditional rows first, then the unconditional ones."""

    def __init__(self, shape: PolicyShape, num_rows: int, device: torch.device) -> None:
        size = (shape.num_layers, num_rows, shape.num_heads, shape.num_image_tokens, shape.head_dim)
        self.keys = torch.zeros(size, dtype=_DTYPE, device=device)
        self.values = torch.zeros(size, dtype=_DTYPE, device=device)
        # Entry 0 scores log(count), so that it weighs as much as the whole prefix. One position
        # scores 0 and needs no bias.
        self.log_counts = torch.zeros(num_rows, dtype=_DTYPE, device=device)
        self.has_long_prefix = shape.prefix_len > 1

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    def write_prefix(self, rows: slice, prefix: PrefixStates, index: Tensor) -> None:
        """Entry 0 of some cache rows; `index` says which row of the draw each of them is."""
        prompts = prefix.index[index]
        means = prefix.value_sums / prefix.counts[None, :, None, None]
        self.keys[:, rows, :, 0] = 0
        self.values[:, rows, :, 0] = means[:, prompts].to(self.values.dtype)
        self.log_counts[rows] = prefix.counts[prompts].log()

    def attend(self, num_rows: int, entry: int, rotary: Tensor) -> "WaveAttend":
        """The attention of one decode step.

        Args:
            num_rows: the first rows take part.
            entry: where this step's keys and values go; entries 0 to `entry` are attended to.
            rotary: [1, D / 2, 2] cosines and sines of this step's position.
        """
        return WaveAttend(self, num_rows, entry, rotary)


class WaveAttend:
    """One query a row against the filled part of its cache.

    Batched products instead of the fused attention of the library, whose CPU form gives a row
    other bits at another place in the batch; these do not, and they are no slower at one query.
    """

    def __init__(self, cache: WaveCache, num_rows: int, entry: int, rotary: Tensor) -> None:
        keys, values = cache.keys[:, :num_rows], cache.values[:, :num_rows]
        self._new_keys = keys[:, :, :, entry]  # [L, R, H, D]
        self._new_values = values[:, :, :, entry]
        # [L, R * H, entries, D] views: a slot's heads follow each other, so nothing is copied.
        self._keys = keys.flatten(1, 2)[:, :, : entry + 1].transpose(2, 3)
        self._values = values.flatten(1, 2)[:, :, : entry + 1]
        log_counts = cache.log_counts[:num_rows].repeat_interleave(keys.shape[2])
        self._bias = F.pad(log_counts[:, None, None], (0, entry))
        self._bias_weight = int(cache.has_long_prefix)  # 0: the product does not read the bias
        self._rotary = rotary

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[R, 1, 3, H, D] -> [R, 1, H * D]."""
        q, k = rotate(qkv[:, :, :2], self._rotary)[:, 0].unbind(1)
        self._new_keys[layer] = k
        self._new_values[layer] = qkv[:, 0, 2]
        query = q.flatten(0, 1)[:, None].to(_DTYPE)
        scores = torch.baddbmm(
            self._bias,
            query,
            self._keys[layer],
            beta=self._bias_weight,
            alpha=q.shape[-1] ** -0.5,
        )
        out = torch.bmm(scores.softmax(dim=-1), self._values[layer])
        return out.view(len(qkv), 1, -1).to(qkv.dtype)
