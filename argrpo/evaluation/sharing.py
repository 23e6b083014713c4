"""Which batches of a set a process makes."""

from dataclasses import dataclass

from argrpo.ranks import num_ranks, own_rank


@dataclass(frozen=True, slots=True)
class Share:
    """Every `count`-th batch, from `index` on."""

    index: int
    count: int

    def of(self, places: list[int]) -> list[int]:
        """Those of the batches that are this process's own."""
        return [place for place in places if place % self.count == self.index]


def own_share(shard: int, num_shards: int) -> Share:
    """By rank where several processes make one run, else as asked for.

    Raises:
        ValueError: both.
    """
    if num_ranks() == 1:
        return Share(shard, num_shards)
    if num_shards > 1:
        raise ValueError(
            f"num_shards: expected 1 under torchrun, whose processes share the work, got "
            f"{num_shards}"
        )
    return Share(own_rank(), num_ranks())
