"""How a rollout draws its tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The distribution a token is drawn from. Refused at birth if a value is out of range."""

    guidance_scale: float = 1.0
    """Classifier-free guidance, uncond + scale (cond - uncond); at least 1, and 1 has no null."""

    guidance_interval: int | None = None
    """Guide tokens 0 to guidance_interval + 1 only, as LlamaGen's cfg_interval; None guides all."""

    temperature: float = 1.0
    """Divides the logits. 0 is greedy: the likeliest token, with log-prob 0 and entropy 0."""

    top_k: int = 0
    """Keep the k likeliest tokens and every tie of the k-th; 0 keeps all."""

    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass, in (0, 1], after top_k; 1 keeps all."""

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale: expected a finite number of at least 1, got {self.guidance_scale}"
            )
        if self.guidance_interval is not None and self.guidance_interval < 0:
            raise ValueError(
                "guidance_interval: expected None or an integer of at least 0, "
                f"got {self.guidance_interval}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a finite number of at least 0, got {self.temperature}"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k: expected an integer of at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")

    @property
    def is_guided(self) -> bool:
        """Whether a null branch runs at all."""
        return self.guidance_scale > 1

    @property
    def is_filtered(self) -> bool:
        """Whether top_k or top_p may cut tokens. A greedy draw needs no filter: the top stays."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    def num_guided(self, num_tokens: int) -> int:
        """How many of an image's first tokens are guided."""
        if not self.is_guided:
            return 0
        if self.guidance_interval is None:
            return num_tokens
        return min(num_tokens, self.guidance_interval + 2)
