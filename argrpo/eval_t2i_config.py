"""Settings of `argrpo eval t2i`."""

from dataclasses import dataclass, field

from argrpo.data_config import DataConfig
from argrpo.evaluation.features import FeatureKind
from argrpo.images_config import ImagesConfig, check_scales
from argrpo.prompt_folders import Layout
from argrpo.reward_config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class T2iConfig(ImagesConfig):
    """Draw images of prompts into the folders of GenEval or DrawBench, let judges score them, and
    show base and tuned policy side by side."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which prompts, and the encoder that a text-conditional policy reads them through; without
    prompts or text_features those of metadata. A class-conditional policy takes classes."""

    num_images_per_prompt: int = 4
    """GenEval's figures are of 4."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none. LlamaGen's text policies are shown with 7.5."""

    layout: Layout = "geneval"
    """Whose folders: geneval wants its own metadata; drawbench takes any prompts."""

    metadata: str | None = None
    """The benchmark's file, whose records go to metadata.jsonl: evaluation_metadata.jsonl of
    GenEval; a table or AR-GRPO's JSON of DrawBench. Its prompts must be those of data, in order."""

    judges: list[RewardConfig] = field(default_factory=list)
    """As under rewards of a training: clip, hpsv2, ... or your own. Weights do nothing."""

    deadline_s: float = 120.0
    """Seconds that judges behind servers have after the last image of a batch."""

    features: FeatureKind = "dinov2"
    """The network in whose features the images of one prompt are compared with each other."""

    features_path: str | None = None
    """Its weights; None compares pixels alone."""

    page_prompts: int = 200
    """Prompts of side_by_side.html, evenly spaced ones where there are more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scales("guidance_scale", [self.guidance_scale])
        self.sampling_params(self.guidance_scale)
        for name in ("num_images_per_prompt", "page_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.deadline_s > 0:
            raise ValueError(f"deadline_s: expected a number above 0, got {self.deadline_s}")
        if self.layout == "geneval" and self.metadata is None:
            raise ValueError(
                "metadata: expected evaluation_metadata.jsonl for layout geneval, got none; its "
                "evaluator reads what each prompt must show; layout drawbench needs none"
            )
