"""Policies on the Hugging Face hub, by the three methods that PyTorchModelHubMixin has.

A repository holds what `argrpo.save_policy` writes (config.json, model.safetensors) and a card.
Reading takes whatever `argrpo.load_policy` reads, a `.pt` file of a repository included. Nothing is
fetched unless a name is given that is no local path.
"""

import tempfile
from pathlib import Path
from typing import Any, Self, cast

import torch

from argrpo.models.image_policy import ImagePolicy

_CARD_FILE = "README.md"


def local_path(
    name: str | Path,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A path as it stands, or the local copy of a repository of the hub, fetched if need be.

    Args:
        name: a file or folder, or a repository as `owner/name`.
        filename: one file of the repository; None takes its configs and safetensors.
        revision: branch, tag or commit of the repository; None: its main branch.
        token: for private repositories; None takes the one that is logged in.
        cache_dir: where copies are kept; None: the usual cache of the hub.

    Raises:
        FileNotFoundError: neither a path nor a repository that can be reached.
    """
    if Path(name).exists():
        return Path(name) if filename is None else Path(name) / filename
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from argrpo.hub_reach import HubOutOfReachError, hub_within_reach

    repo = str(name)
    where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        with hub_within_reach():
            if filename is not None:
                return Path(hf_hub_download(repo, filename, **where))
            files = ["*.json", "*.safetensors"]
            return Path(snapshot_download(repo, allow_patterns=files, **where))
    except HubOutOfReachError as error:
        raise FileNotFoundError(
            f"{name}: expected a path, or a repository that is cached or can be fetched, got "
            f"neither ({error} does not answer)"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: expected a path, or a repository of the hub that can be reached, got neither "
            f"({first_line})"
        ) from error


class HubPolicy:
    """What a policy class inherits to be saved to, and read from, folders and the hub."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy to a new or empty folder, as `argrpo.save_policy` does.

        Raises:
            ValueError: the folder holds something.
            OSError: it cannot be written; nothing is left behind.
        """
        # Here, because the loader knows the classes that inherit from this one.
        from argrpo.models.loading import save_policy

        save_policy(cast(ImagePolicy, self), folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        commit_message: str = "Upload an argrpo policy",
    ) -> str:
        """Make a repository if there is none, and upload the policy and a card in one commit.

        Args:
            repo_id: `owner/name`.
            private: of a repository that is made now; None: as the owner's settings say.
            token: with the right to write; None takes the one that is logged in.
            revision: branch to commit to; None: main.
            license: for the card, as `mit`: that of the weights, which only you know.
            commit_message: of the one commit.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "policy"
            self.save_pretrained(folder)
            card = model_card(cast(ImagePolicy, self), license)
            (folder / _CARD_FILE).write_text(card, encoding="utf-8")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
        downsample: int = 16,
        text_padding: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Read a policy of this class from a path or from the hub. Over 8 arguments because the hub
        has five and the loader six.

        Args:
            name: what `argrpo.load_policy` takes, or a repository as `owner/name`.
            filename: one file of the repository, as c2i_B_256.pt.
            revision, token, cache_dir: see `local_path`.
            image_size, num_heads, downsample, text_padding, device, dtype: see
                `argrpo.load_policy`.

        Raises:
            FileNotFoundError: neither a path nor a repository that can be reached.
            ValueError: as `argrpo.load_policy`, or the policy is of another class.
        """
        from argrpo.models.loading import load_policy

        path = local_path(
            name, filename=filename, revision=revision, token=token, cache_dir=cache_dir
        )
        policy = load_policy(
            path,
            image_size=image_size,
            num_heads=num_heads,
            downsample=downsample,
            text_padding=text_padding,
            device=device,
            dtype=dtype,
        )
        if not isinstance(policy, cls):
            raise ValueError(
                f"{name}: expected a {cls.__name__} policy, got a {type(policy).__name__}; use "
                f"{type(policy).__name__}.from_pretrained"
            )
        return policy


def model_card(policy: ImagePolicy, license: str | None) -> str:
    """The README.md of a repository: what hub pages are found by, and how to draw with it."""
    is_text = policy.config.model_type == "t2i"
    task = "text-to-image" if is_text else "unconditional-image-generation"
    count = sum(weight.numel() for weight in policy.parameters())
    head = ["---", "library_name: argrpo", f"pipeline_tag: {task}"]
    head += [f"license: {license}"] if license else []
    kind = type(policy).__name__
    return "\n".join(
        [
            *head,
            "tags: [argrpo, grpo, autoregressive-image-generation]",
            "---",
            "",
            f"A {kind} policy ({policy.config.model_type}, {policy.config.image_size} pixels, "
            f"{count / 1e6:.1f} M parameters), written by argrpo.",
            "",
            "```python",
            f"from argrpo.models.{kind.lower()} import {kind}",
            "",
            f'policy = {kind}.from_pretrained("owner/name")',
            "```",
            "",
        ]
    )
