"""What the judges behind servers share in a step: its deadline, and its images as PNG.

A picture is squeezed once, however many judges send it: that takes ten milliseconds of a core for
256 x 256 pixels, fifty times as long as telling by a hash that it is the same.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

from PIL import Image

from argrpo.rewards.image_transfer import png_base64

Due = Callable[[], float]
"""When an answer is too late, a time.perf_counter(); moves on while images are still to come."""

_Key = tuple[bytes, tuple[int, int], int | None]


class PngTexts:
    """PNG files in base64 of pictures. Called from several threads.

    Args:
        num_takers: who will ask for a picture; after the last one it is forgotten.
    """

    def __init__(self, num_takers: int = 1) -> None:
        self._num_takers = num_takers
        self._lock = Lock()
        self._texts: dict[_Key, Future[str]] = {}
        self._num_taken: dict[_Key, int] = {}

    def of(self, picture: Image.Image, side: int | None = None) -> str:
        """The text of a picture, RGB of 8 bits.

        Args:
            picture: as it is scored.
            side: to which height and width are resized before; None: as they are.
        """
        key = (hashlib.blake2b(picture.tobytes(), digest_size=16).digest(), picture.size, side)
        with self._lock:
            is_first = key not in self._texts
            text = self._texts.setdefault(key, Future())
            self._num_taken[key] = self._num_taken.get(key, 0) + 1
            if self._num_taken[key] >= self._num_takers:
                del self._texts[key], self._num_taken[key]
        if is_first:
            try:
                text.set_result(_squeezed(picture, side))
            except BaseException as error:  # whoever waits for it fails, too, instead of hanging
                text.set_exception(error)
        return text.result()


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """What holds for all questions of a step."""

    due: Due = lambda: math.inf
    pngs: PngTexts = field(default_factory=PngTexts)


def _squeezed(picture: Image.Image, side: int | None) -> str:
    if side is not None:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return png_base64(picture)
