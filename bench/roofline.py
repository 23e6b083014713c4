"""The least time of a decode step: weights, or products where those take longer, and the cache.

    step = max(weight bytes / bandwidth, operations / rate) + cache bytes / bandwidth

Products and attention take turns inside a layer, so their times add. Activations and logits stay in
the cache of the device and do not count.
"""

from dataclasses import dataclass

from timing import Ceilings


@dataclass(frozen=True)
class StepSizes:
    """What a step multiplies and reads."""

    dim: int
    num_layers: int
    ffn_dim: int
    vocab_size: int
    images: int
    num_branches: int  # 2 with guidance
    itemsize: int  # bytes of a weight
    cache_itemsize: int  # bytes of a key or value

    @property
    def layer_weights(self) -> int:
        """Of all layers, without their norms."""
        return self.num_layers * (4 * self.dim**2 + 3 * self.dim * self.ffn_dim)

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.dim


def least_step_us(sizes: StepSizes, num_entries: float, ceilings: Ceilings) -> float:
    """Microseconds of a step that attends to so many positions, its own included."""
    sequences = sizes.images * sizes.num_branches
    weight_bytes = (sizes.layer_weights + sizes.head_weights) * sizes.itemsize
    flops = 2 * sizes.layer_weights * sequences + 2 * sizes.head_weights * sizes.images
    entry_bytes = 2 * sizes.num_layers * sizes.dim * sizes.cache_itemsize
    products = max(weight_bytes / ceilings.bytes_per_second, flops / ceilings.flops_per_second)
    cache = sequences * num_entries * entry_bytes / ceilings.bytes_per_second
    return (products + cache) * 1e6


def least_rollout_us(sizes: StepSizes, num_tokens: int, ceilings: Ceilings) -> float:
    """Microseconds of the steps of a whole rollout: token t attends to t + 1 positions."""
    return num_tokens * least_step_us(sizes, (num_tokens + 1) / 2, ceilings)
