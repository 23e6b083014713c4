"""How pleasing an image is: the LAION aesthetic predictor, version 2.

Five linear layers on the unit vector of CLIP's ViT-L/14, with nothing but dropout between them: one
affine map, which is what they are folded to. Scores are about 1 to 10. The tower is shared with
other judges that use the same one.

Source: christophschuhmann/improved-aesthetic-predictor; Schuhmann et al., arXiv:2210.08402.
"""

from pathlib import Path

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.model_paths import named_within
from argrpo.models.checkpoint_files import read_checkpoint
from argrpo.rewards.sharing import SharedNetworks
from argrpo.rewards.tower_loading import TowerOptions, load_tower

_LAYERS = (0, 2, 4, 6, 7)  # of the published file; the numbers between are dropouts


class AestheticReward:
    """The aesthetic score; does not look at the prompt."""

    def __init__(
        self,
        head: str = "sac+logos+ava1-l14-linearMSE.pth",
        pretrained: str | None = None,
        *,
        model: str = "ViT-L-14-quickgelu",
        dtype: str = "float32",
        device: torch.device,
        reward_batch: int = 64,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "aesthetic",
    ) -> None:
        """Load the image tower and the head.

        Args:
            head: sac+logos+ava1-l14-linearMSE.pth, published in
                christophschuhmann/improved-aesthetic-predictor.
            pretrained: OpenAI's ViT-L/14 for open_clip, a file; None: by the tag openai.
            model: its architecture, or a CLIP of transformers; see rewards/tower_loading.py.
            dtype: of the tower, float32 or bfloat16.
            device: where the tower runs.
            reward_batch: images embedded at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: the files hold something else.
            FileNotFoundError: a file is not there.
        """
        self.name = name
        self.reward_batch = reward_batch
        if not Path(head).is_file():
            raise FileNotFoundError(
                f"rewards.{name}.options.head: expected sac+logos+ava1-l14-linearMSE.pth "
                "(published in christophschuhmann/improved-aesthetic-predictor), got nothing at "
                f"{head}"
            )
        with named_within(f"rewards.{name}.options"):
            weight, bias = folded(_layers(head))
            wanted = TowerOptions(model, pretrained, None, dtype, offload)
            self._tower = load_tower(wanted, shared or SharedNetworks(), device)
        self._weight, self._bias = weight.float().to(device), bias.float().to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32."""
        seen = self._tower.images(images, self._tower.pixels, self.reward_batch)
        if seen.shape[1] != len(self._weight):
            raise ValueError(
                f"rewards.{self.name}.options.model: expected a tower of {len(self._weight)} "
                f"features, as the head was made for, got {seen.shape[1]}"
            )
        return (seen * self._weight).sum(dim=1) + self._bias

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._tower.rest()


def folded(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Linear layers, first to last, as one: weight [C] and bias [] fp64, of the one output.

    Args:
        layers: weight [outputs, inputs] and bias [outputs] of each.
    """
    weight, bias = (part.double() for part in layers[0])
    for later_weight, later_bias in layers[1:]:
        bias = later_weight.double() @ bias + later_bias.double()
        weight = later_weight.double() @ weight
    return weight[0], bias[0]


def _layers(head: str) -> list[tuple[Tensor, Tensor]]:
    weights = read_checkpoint(head).weights
    wanted = [f"layers.{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")]
    wrong = sorted(weights.keys() ^ set(wanted))
    if wrong:
        raise ValueError(
            f"head: expected the keys {', '.join(wanted)}, got {head} with {wrong[0]} amiss"
        )
    return [(weights[w], weights[b]) for w, b in zip(wanted[::2], wanted[1::2], strict=True)]
