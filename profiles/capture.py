"""Trace a rollout, a training step or a whole tiny run, and show where its time went.

    python profiles/capture.py rollout --model XL --images 128       on a GPU
    python profiles/capture.py step --model XL --image_size 384 --images 32
    python profiles/capture.py run                                   tiny, from start to end
    nsys profile ... python profiles/capture.py rollout --tool nsys  see nsys_rollout.sh

Models have random weights and the judge is the mean of the pixels, so nothing has to be fetched. A
run of your own is traced by `argrpo train ... --profile.steps "[20,22]"`.

With --tool torch a folder gets the trace (ui.perfetto.dev opens it) and its table. With --tool nsys
nothing is written here: the work after the warm-up is bracketed by cudaProfilerStart and Stop.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from random_models import REWARD, SIZES, random_policy, write_models
from summarize import summarize, tables
from traces import read_trace

from argrpo.config import (
    OutputConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.devices import DTYPES, choose_device
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.objective_config import ObjectiveConfig
from argrpo.profile_config import ProfileConfig
from argrpo.run_folder import RunFolder
from argrpo.step_profile import StepProfile
from argrpo.trainer import Trainer

_GROUP = 8  # images a prompt, as AR-GRPO draws them
_MICRO_BATCH = 8


def trace_rollout(args: argparse.Namespace, profile: ProfileConfig, folder: Path) -> Path | None:
    """Draws of one engine; the first ones warm up."""
    dtype = DTYPES[args.dtype]
    policy = random_policy(args.model, args.image_size, device=args.device, dtype=dtype)
    traced = StepProfile(profile, args.device, RunFolder(folder))
    engine = RolloutEngine(
        policy.requires_grad_(False), max_slots=args.images, ranges=traced.engine_ranges
    )
    labels = torch.arange(args.images, device=args.device) * 97 % 1000
    params = SamplingParams(guidance_scale=args.guidance_scale)
    for draw in range(args.warmup + args.count):
        with traced.tracing(draw), traced.ranges("rollout"):
            engine.draw(labels, params, seed=draw)
            if args.device.type == "cuda":
                torch.cuda.synchronize()  # the range lasts until the last token is there
    return traced.trace_path


def trace_training(args: argparse.Namespace, profile: ProfileConfig, folder: Path) -> Path | None:
    """Steps of a trainer; the first ones warm up."""
    write_models(folder, args.model, args.image_size, device=args.device, dtype=DTYPES[args.dtype])
    trainer = Trainer(run_config(args, profile, folder), [])
    trainer.train()
    return trainer.profile.trace_path


def run_config(args: argparse.Namespace, profile: ProfileConfig, folder: Path) -> TrainConfig:
    """AR-GRPO's way of training, in as many steps as the trace needs."""
    group = min(_GROUP, args.images)
    return TrainConfig(
        output_dir=str(folder / "run"),
        policy=PolicyConfig(
            path=str(folder / "policy"), num_heads=SIZES[args.model].num_heads, dtype=args.dtype
        ),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer"), dtype=args.dtype),
        rewards=[RewardConfig(name=REWARD)],
        prompts_per_step=args.images // group,
        images_per_prompt=group,
        micro_batch=_MICRO_BATCH,
        num_steps=args.warmup + args.count,
        rollout=SamplingParams(guidance_scale=args.guidance_scale),
        objective=ObjectiveConfig(beta=0.1),
        output=OutputConfig(sample_every=0, sample_images=1, save_every=0, trackers=[]),
        device=args.device.type,
        profile=profile,
    )


def capture(args: argparse.Namespace) -> Path | None:
    """Do the work and write trace and table; returns the trace, or nothing for nsys."""
    profile = ProfileConfig(
        steps=(args.warmup + 1, args.warmup + args.count),
        tool=args.tool,
        with_stack=args.with_stack,
    )
    # Weights, samples and checkpoints of random numbers are nothing to keep.
    with TemporaryDirectory() as scratch:
        trace = (trace_rollout if args.what == "rollout" else trace_training)(
            args, profile, Path(scratch)
        )
        if trace is None:
            return None
        folder = RunFolder.numbered(args.output)
        kept = folder.path / f"{args.what}.json.gz"
        shutil.copyfile(trace, kept)
    table = tables(summarize(read_trace(kept)), args.top)
    heading = ", ".join(f"{name} {value}" for name, value in vars(args).items() if name in _SHOWN)
    text = f"{heading}, torch {torch.__version__}\n\n{table}\n"
    (folder.path / f"{args.what}.md").write_text(text, encoding="utf-8")
    print(text)
    return kept


_SHOWN = ("what", "model", "image_size", "images", "guidance_scale", "dtype", "device", "count")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["rollout", "step", "run"])
    add("--model", choices=list(SIZES), help="XL on a GPU; tiny on a CPU and for a run")
    add("--image_size", type=int, help="pixels a side, a multiple of 16; 256, tiny: 64")
    add("--images", type=int, help="drawn together; 64 on a GPU, 8 on a CPU")
    add("--guidance_scale", type=float, default=2.0, help="1 turns guidance off")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--warmup", type=int, help="draws or steps before the trace; 2, in a run 0")
    add("--count", type=int, help="draws or steps in the trace; 1, in a run 3")
    add("--tool", choices=["torch", "nsys"], default="torch")
    add("--with_stack", action="store_true", help="the Python lines behind each operation")
    add("--top", type=int, default=25, help="kernels in the table")
    add("--output", type=Path, help="folder; default runs/profile_WHAT, or -2, ... when taken")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    on_gpu, whole = args.device.type == "cuda", args.what == "run"
    defaults = {
        "model": "XL" if on_gpu and not whole else "tiny",
        "images": 64 if on_gpu and not whole else 8,
        "dtype": "bfloat16" if on_gpu else "float32",
        "warmup": 0 if whole else 2,
        "count": 3 if whole else 1,
        "output": Path("runs") / f"profile_{args.what}",
    }
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.image_size is None:
        args.image_size = 64 if args.model == "tiny" else 256
    for name, least in (("images", 2), ("warmup", 0), ("count", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.what != "rollout" and args.images > _GROUP and args.images % _GROUP:
        parser.error(f"--images: expected a multiple of {_GROUP}, got {args.images}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    try:
        kept = capture(arguments(argv))
    except (OSError, ValueError) as error:
        sys.exit(f"capture.py: {error}")
    print("captured; nsys writes the report" if kept is None else f"trace: {kept}")


if __name__ == "__main__":
    main()
