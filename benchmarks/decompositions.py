"""Decompositions at equal parameter count: both stages on the demo's base model, with several seeds.

    python benchmarks/decompositions.py --photos TRAIN --held-out KODAK24 --out runs/decompositions

Every decomposition has the rank whose number of parameters is closest to that of LoRA. The stages train on latents
that are encoded once, with the losses of configs/demo_v1.py except CSD, and without prompts. The peak learning rate of
a decomposition in a stage is the one of RATES with the smallest training loss in short pilot runs; their seed is used
for nothing else. The moving average of an adapter is merged into the weights and measured on the centers of held-out
images. Every run leaves a JSON file, and a run that has one is not repeated.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pisa_jax.adapters import fit, injection
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.config import AdapterSpec, Validation
from pisa_jax.data.degradation import degrade
from pisa_jax.data.latents import NAMES_FILE, latent_source
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import folder_source
from pisa_jax.imaging.ranges import signed_to_uint8, uint8_to_signed, uint8_to_unit, unit_to_signed
from pisa_jax.metrics import lpips, psnr_ssim
from pisa_jax.metrics.validation import ValidationImage, validation_images
from pisa_jax.model import TIMESTEP, LoadedModel
from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.distributed import make_mesh
from pisa_jax.sd.pretrained import load_pretrained
from pisa_jax.train_step import Batch, Frozen, Objective, init_state, jit_train_step, make_frozen

# Decompositions and their options. LoKr has too few parameters at any rank with its default factor.
OPTIONS = {"lora": (), "dora": (), "loha": (), "lokr": (("factor", 2),), "oft": ()}
# Losses of configs/demo_v1.py; its CSD, of weight 0.05, is left out: it would take half of the time of a step.
LOSSES = {
    "pix": {"l2": 0.0, "latent": 1.0},
    "sem": {"perceptual": 0.3, "latent": 30.0, "latent_window": 3},
}
# Crops of a step, and their side in latents.
CROPS, SIDE = 4, 12
# Sides in pixels of encoded ground truths and of the centers of held-out images.
ENCODED, HELD_OUT = 128, 128
RATES = (5e-4, 1.5e-3, 5e-3)
PILOT_SEED, PILOT_SHARE = 100, 0.25
WARMUP, EMA = 5, 0.95


class Study(NamedTuple):
    """All arguments of the runs."""

    out: Path
    model: LoadedModel
    perceptual: Any
    specs: dict[str, AdapterSpec]
    steps: dict[str, int]
    # UNet weights -> mean PSNR and perceptual distance of the held-out images.
    measure: Callable[[Any], dict[str, float]]


class Case(NamedTuple):
    """One run."""

    stage: str
    decomposition: str
    seed: int
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.stage}-{self.decomposition}-{self.seed}-{self.rate:g}-{self.steps}"


def matching_spec(name: str, kernels: dict[str, tuple[int, ...]], rank: int) -> AdapterSpec:
    """Return the specification whose number of parameters is closest to that of LoRA at `rank`."""
    ranks = range(2, 4 * rank + 1)
    specs = [AdapterSpec(name, each, alpha=float(each), options=OPTIONS[name]) for each in ranks]
    budget = count(AdapterSpec("lora", rank), kernels)
    return min(specs, key=lambda spec: abs(count(spec, kernels) - budget))


def count(spec: AdapterSpec, kernels: dict[str, tuple[int, ...]]) -> int:
    """Count the parameters of an adapter."""
    return sum(leaf.size for shapes in fit.expected_factors(spec, kernels).values() for leaf in shapes.values())


def encode_pairs(model: LoadedModel, photos: Path, out: Path, pairs: int) -> None:
    """Encode crops of photographs and their degradations, with the index of the pair as seed, unless it was done."""
    if (out / NAMES_FILE).exists():
        return
    source, vae = folder_source(photos), jax.device_put(model.params["vae"])
    encode = jax.jit(model.base.encode, static_argnums=2)
    latents: dict[str, list[np.ndarray]] = {"lq": [], "gt": []}
    for index in range(pairs):
        rng, image = np.random.default_rng(index), source[index % len(source)].image
        y, x = (rng.integers(side - ENCODED + 1) for side in image.shape[:2])
        gt = uint8_to_unit(image[y : y + ENCODED, x : x + ENCODED])
        for side, pixels in (("lq", degrade(gt, rng)), ("gt", gt)):
            latents[side].append(np.asarray(encode(vae, unit_to_signed(pixels)[None], None)[0], np.float16))
    out.mkdir(parents=True, exist_ok=True)
    for side, arrays in latents.items():
        np.save(out / f"{side}.npy", np.stack(arrays))
    (out / NAMES_FILE).write_text("".join(f"{index}\n" for index in range(pairs)))


def make_measure(model: LoadedModel, perceptual: Any, images: list[ValidationImage]) -> Callable[[Any], dict]:
    """Return the function from UNet weights, or None for the LQ images, to mean PSNR (Y) and perceptual distance."""
    vae, prompt = jax.device_put(model.params["vae"]), make_frozen(model, make_mesh(data=1)).null_prompt

    @jax.jit
    def upscale(unet, lq):
        latents = model.base.encode(vae, lq, None)
        return model.base.decode(vae, latents - model.base.predict_noise(unet, latents, TIMESTEP, prompt))

    distance = jax.jit(lpips.distance)

    def measure(unet):
        found = []
        for image in images:
            result = image.lq
            if unet is not None:
                result = signed_to_uint8(np.asarray(upscale(unet, uint8_to_signed(image.lq)[None])[0]))
            one, other = (uint8_to_signed(each)[None] for each in (result, image.gt))
            found.append((psnr_ssim.psnr(result, image.gt), float(distance(perceptual, one, other)[0])))
        return dict(zip(("psnr", "perceptual"), np.mean(found, axis=0).tolist(), strict=True))

    return measure


def batches_of(folder: Path, seed: int) -> Iterator[Batch]:
    """Yield batches of latents with empty prompts."""
    for batch in make_loader(latent_source(folder), batch_size=CROPS, crop=SIDE, seed=seed, degrade=degrade):
        yield Batch(batch["lq"], batch["gt"], np.zeros((CROPS, 1), np.int32), np.zeros(CROPS, bool))


def learning_rate(index: int, steps: int, peak: float) -> jax.Array:
    """Return the rate of step `index`: a linear rise times half a cosine down to 0."""
    return jnp.float32(peak * min(1.0, (index + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * index / steps)))


def frozen_of(study: Study, case: Case) -> Frozen:
    """Return the weights below the adapter of a case; `sem` is trained on top of the `pix` of the same seed."""
    mesh = make_mesh(data=1)
    if case.stage == "pix":
        return make_frozen(study.model, mesh)
    seed = 0 if case.seed == PILOT_SEED else case.seed
    below = load_adapters(study.out / f"pix-{case.decomposition}-{seed}.safetensors")
    return make_frozen(study.model, mesh, below.trees, below.specs, perceptual=study.perceptual)


@functools.cache
def optimizer_of() -> optax.GradientTransformation:
    """Return Adam with clipping; its learning rate is an array of its state, so that all rates share one program."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.0))


def with_rate(optimizer_state: Any, rate: jax.Array) -> Any:
    """Set the learning rate of a state of `optimizer_of`."""
    clip, adam = optimizer_state
    return clip, adam._replace(hyperparams={**adam.hyperparams, "learning_rate": rate})


def run(study: Study, case: Case, step: Callable, frozen: Frozen) -> tuple[dict[str, Any], AdapterTree]:
    """Train an adapter; return its record and its moving average.

    The record has the mean loss of the last fifth of the steps and the medians of the times of a step.
    """
    spec, key = study.specs[case.decomposition], jax.random.key(case.seed)
    state = init_state(injection.init_adapter(key, frozen.unet, spec), optimizer_of(), ema=True)
    batches = batches_of(study.out / "latents", case.seed)
    losses, times = [], []
    for index in range(case.steps):
        rate, batch = learning_rate(index, case.steps, case.rate), next(batches)
        state = state._replace(optimizer=with_rate(state.optimizer, rate))
        wall, processor = time.perf_counter(), time.process_time()
        state, measured = step(frozen, state, batch, key)
        losses.append(float(measured["total"]))
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    seconds, processor_seconds = np.median(times, axis=0).tolist()
    loss = float(np.mean(losses[-max(1, case.steps // 5) :]))
    record = {**case._asdict(), "loss": loss, "seconds": seconds, "processor_seconds": processor_seconds}
    return record, jax.device_get(state.ema)


def run_all(study: Study, cases: list[Case]) -> list[dict[str, Any]]:
    """Return the records of cases of one stage; those that have a file are read."""
    steps: dict[str, Callable] = {}
    records = []
    for case in cases:
        file = study.out / f"{case.name}.json"
        if not file.exists():
            frozen, spec = frozen_of(study, case), study.specs[case.decomposition]
            if case.decomposition not in steps:
                objective = Objective(spec, latents=True, ema=EMA, **LOSSES[case.stage])
                steps[case.decomposition] = jit_train_step(
                    study.model.base, objective, optimizer_of(), frozen, make_mesh(data=1)
                )
            record, tree = run(study, case, steps[case.decomposition], frozen)
            if case.seed != PILOT_SEED:
                merged = injection.merge(frozen.unet, {"": tree}, {"": spec}, {"": 1.0})
                record |= study.measure(merged)
                path = study.out / f"{case.stage}-{case.decomposition}-{case.seed}.safetensors"
                save_adapters(path, Adapters({case.stage: tree}, {case.stage: spec}))
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(record, indent=1))
            print(json.dumps(record), flush=True)
        records.append(json.loads(file.read_text()))
    return records


def run_stage(study: Study, stage: str, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Choose the learning rates by pilot runs, then train with every seed; return the records by decomposition."""
    steps = study.steps[stage]
    short = max(1, round(PILOT_SHARE * steps))
    pilots = run_all(study, [Case(stage, name, PILOT_SEED, rate, short) for rate in RATES for name in study.specs])
    best = {
        name: min((record for record in pilots if record["decomposition"] == name), key=lambda record: record["loss"])
        for name in study.specs
    }
    cases = [Case(stage, name, seed, best[name]["rate"], steps) for seed in range(seeds) for name in study.specs]
    records = run_all(study, cases)
    return {name: [record for record in records if record["decomposition"] == name] for name in study.specs}


def table(study: Study, stage: str, records: dict[str, list[dict[str, Any]]]) -> str:
    """Format the means and standard deviations over the seeds as a Markdown table."""
    kernels = injection.target_shapes(study.model.params["unet"], AdapterSpec().targets)
    columns = ["decomposition", "parameters", "learning rate", "PSNR", "distance", "s per step", "processor s per step"]
    lines = [f"Stage `{stage}`, {study.steps[stage]} steps:", "", f"| {' | '.join(columns)} |", "|---" * 7 + "|"]
    for name, runs in records.items():
        values = {key: np.array([run[key] for run in runs]) for key in ("psnr", "perceptual")}
        spread = [f"{v.mean():.3f} ± {v.std(ddof=min(1, len(v) - 1)):.3f}" for v in values.values()]
        times = [f"{np.median([run[key] for run in runs]):.3f}" for key in ("seconds", "processor_seconds")]
        spec = study.specs[name]
        cells = [f"`{name}`, rank {spec.rank}", f"{count(spec, kernels):,}".replace(",", " "), f"{runs[0]['rate']:g}"]
        lines.append("| " + " | ".join([*cells, *spread, *times]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="training images, at least 128 pixels on each side")
    parser.add_argument("--held-out", type=Path, required=True, help="ground truths, or a folder with lq/ and gt/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--decompositions", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rank", type=int, default=8, help="of LoRA (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(100, 40), metavar=("PIX", "SEM"))
    parser.add_argument("--pairs", type=int, default=300, help="encoded crops (default: %(default)s)")
    parser.add_argument("--images", type=int, default=24, help="held-out images (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the study."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    model, perceptual = load_pretrained(args.model), jax.device_put(lpips.load_weights(None, "squeeze"))
    encode_pairs(model, args.photos, args.out / "latents", args.pairs)
    measure = make_measure(model, perceptual, validation_images(Validation(str(args.held_out), args.images), HELD_OUT))
    kernels = injection.target_shapes(model.params["unet"], AdapterSpec().targets)
    specs = {name: matching_spec(name, kernels, args.rank) for name in args.decompositions}
    study = Study(args.out, model, perceptual, specs, dict(zip(LOSSES, args.steps, strict=True)), measure)
    if not (base := args.out / "base.json").exists():
        unet = jax.device_put(model.params["unet"])
        base.write_text(json.dumps({"LQ images": measure(None), "no adapter": measure(unet)}, indent=1))
    print(base.read_text())
    for stage in LOSSES:
        print(table(study, stage, run_stage(study, stage, args.seeds)), flush=True)


if __name__ == "__main__":
    main()
