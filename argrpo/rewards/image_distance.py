"""How far an image is from the one of its prompt, pixel by pixel or as a network sees it.

Both are distances: lower is better, so give them a negative weight. An image whose prompt has no
reference image is not scored, and is no failure: neither applies to it.

    mse     mean squared difference of pixels in [0, 1]
    lpips   squared differences of unit feature vectors in five layers, weighted by channel

Source: LPIPS, Zhang et al., arXiv:1801.03924 and its package lpips, which brings the channels'
weights; VA-pi, arXiv:2512.19680, rewards -(mse + lpips).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.models.checkpoint_files import first_keys, read_checkpoint
from argrpo.rewards.reference_images import have_reference, references_of, scattered
from argrpo.rewards.sharing import Residence, SharedNetworks

_BACKBONES = {  # of torchvision
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


class MseReward:
    """Mean squared difference from the prompt's reference image, in [0, 1]."""

    def __init__(self, *, name: str = "mse") -> None:
        self.name = name

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN without a reference."""
        rows, references = references_of(images, prompts)
        squares = (images[rows].float() - references.float()).square()
        return scattered(squares.flatten(1).mean(dim=1), rows, len(images))

    def applies(self, prompts: list[Prompt]) -> list[bool]:
        """Where there is a reference."""
        return have_reference(prompts)


class LpipsReward:
    """LPIPS to the prompt's reference image, about 0 to 1."""

    def __init__(
        self,
        backbone: str | None = None,
        *,
        net: str = "vgg",
        device: torch.device,
        reward_batch: int = 32,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "lpips",
    ) -> None:
        """Load the network.

        Args:
            backbone: torchvision's weights of `net`, a state_dict; None: by their published name.
            net: vgg, alex or squeeze; the first is the one for training.
            device: where it runs.
            reward_batch: pairs compared at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: no such net, or the file holds another network.
            FileNotFoundError: the file is not there.
        """
        self.name = name
        self.reward_batch = reward_batch
        self._device = device
        place = f"rewards.{name}.options"
        if net not in _BACKBONES:
            raise ValueError(f"{place}.net: expected one of {', '.join(_BACKBONES)}, got {net!r}")
        file = backbone or _BACKBONES[net]
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{place}.backbone: expected {_BACKBONES[net]} (published by torchvision at "
                f"download.pytorch.org/models), got nothing at {file}"
            )

        def load() -> tuple[Any, Residence]:
            network = _network(net, file, place)
            return network, Residence(network, device, offload=offload)

        key = (LpipsReward, net, file, device, offload)
        self._network, self._residence = (shared or SharedNetworks()).once(key, load)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN without a reference."""
        images = images.to(self._device).float()
        rows, references = references_of(images, prompts)
        self._residence.wake()
        pairs = zip(
            images[rows].split(self.reward_batch),
            references.split(self.reward_batch),
            strict=True,
        )
        # The network wants pixels in [-1, 1], which `normalize` makes of [0, 1].
        parts = [self._network(a, b, normalize=True).flatten() for a, b in pairs if len(a)]
        return scattered(torch.cat([images.new_empty(0), *parts]), rows, len(images))

    def applies(self, prompts: list[Prompt]) -> list[bool]:
        """Where there is a reference."""
        return have_reference(prompts)

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._residence.rest()


def _network(net: str, backbone: str, place: str) -> Any:
    try:
        import lpips
    except ImportError as error:
        raise ValueError(
            f"{place}: expected the package lpips, got none that can be imported ({error}); "
            "pip install 'argrpo[iqa]'"
        ) from error
    # pnet_rand keeps torchvision from downloading; the channels' weights come with the package.
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    found = read_checkpoint(backbone).weights
    features = {k.removeprefix("features."): v for k, v in found.items() if k.startswith("feat")}
    # slice2.5.weight there is features.5.weight of torchvision.
    names = {key: key.partition(".")[2] for key in network.net.state_dict()}
    missing = sorted(set(names.values()) - features.keys())
    if missing:
        raise ValueError(
            f"{place}.backbone: expected the weights of {_BACKBONES[net]}, got {backbone} without "
            f"{first_keys(f'features.{key}' for key in missing)}"
        )
    try:
        network.net.load_state_dict({key: features[name] for key, name in names.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{place}.backbone: expected the weights of {_BACKBONES[net]}, got {backbone}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return network
