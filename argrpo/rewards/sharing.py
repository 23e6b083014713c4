"""What judges share: networks that several use, and what they made of a batch of images.

    SharedNetworks   loads each network once, however many judges ask for it
    ImageMemo        rows computed from images, while those images live
    Residence        where the weights of a network stand, on the device or offloaded to the CPU

Shapes: N images.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")


class SharedNetworks:
    """The networks of a run's judges, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[Hashable, object] = {}

    def once(self, key: Hashable, load: Callable[[], _T]) -> _T:
        """What `load` gave for this key the first time.

        Args:
            key: everything that `load` depends on, and what kind of thing it gives.
            load: called if nobody asked before.
        """
        if key not in self._loaded:
            self._loaded[key] = load()
        found: _T = self._loaded[key]  # type: ignore[assignment]
        return found


class ImageMemo:
    """Remembers rows computed from images, for who asks again about the same ones.

    An image is known by the memory that it stands in: slices of one batch share what was computed
    for the batch. What is remembered goes when that memory is freed, and when it was written to.
    """

    def __init__(self) -> None:
        self._rows: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, Tensor]]
        self._rows = weakref.WeakKeyDictionary()
        self._versions: weakref.WeakKeyDictionary[torch.UntypedStorage, int]
        self._versions = weakref.WeakKeyDictionary()

    def rows(
        self,
        images: Tensor,
        key: Hashable,
        compute: Callable[[Tensor, list[int]], Tensor],
        *,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """[N, ...] of N images; computes only what is not known.

        Args:
            images: [N, ...].
            key: what the rows depend on beside the images.
            compute: from some of the images, and which of the N they are, to their rows.
            texts: N, where a row depends on one, too.
        """
        if images.is_inference():  # they do not tell when they are written to
            return compute(images, list(range(len(images))))
        storage = images.untyped_storage()
        if self._versions.get(storage) != images._version:
            self._versions[storage] = images._version
            self._rows[storage] = {}
        known = self._rows[storage]
        layout = (key, images.dtype, images.shape[1:], images.stride()[1:])
        offset, step = images.storage_offset(), images.stride(0)
        keys = [
            (layout, offset + step * row, text)
            for row, text in enumerate(texts or [None] * len(images))
        ]
        missing = [row for row, place in enumerate(keys) if place not in known]
        if missing:
            # Rows in order are given as they are, so that a batch is not copied.
            is_whole = len(missing) == len(images)
            computed = compute(images if is_whole else images[missing], missing)
            known.update((keys[row], value) for row, value in zip(missing, computed, strict=True))
        return torch.stack([known[place] for place in keys])


class Residence:
    """Where the weights of a frozen network stand.

    Offloaded, they live in CPU memory (pinned where there is a GPU), `wake` copies them to the
    device and `rest` frees the copies; nothing is copied back, since nothing changes them.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, offload: bool = False) -> None:
        """Freeze the network and put it where it belongs.

        Args:
            network: without hooks that hold on to its weights.
            device: where it works.
            offload: rest on the CPU between steps.
        """
        network.eval().requires_grad_(False)
        self._device = device
        self._offload = offload
        self._is_awake = not offload
        self._homes: list[tuple[Tensor, Tensor]] = []
        if not offload:
            network.to(device)
            return
        network.cpu()
        for tensor in (*network.parameters(), *network.buffers()):
            if device.type == "cuda":
                tensor.data = tensor.data.pin_memory()
            self._homes.append((tensor, tensor.data))

    def wake(self) -> None:
        """Bring the weights to the device, if they are not there."""
        if self._is_awake:
            return
        for tensor, home in self._homes:
            tensor.data = home.to(self._device, non_blocking=True, copy=True)
        self._is_awake = True

    def rest(self) -> None:
        """Free the device of the weights, where they are to be offloaded."""
        if not self._offload:
            return
        for tensor, home in self._homes:
            tensor.data = home
        self._is_awake = False
