"""One training step: loss terms, gradient, optimizer update, and the jitted function with its shardings.

Nothing here depends on a training run: the functions take arrays, a `BaseModel`, an optimizer and one
small `Objective`. `examples/own_loop.py` uses them in a loop of its own.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from pisa_jax import losses
from pisa_jax.adapters import injection
from pisa_jax.adapters.adapter_tree import AdapterTree, join, split
from pisa_jax.adapters.fit import is_mergeable
from pisa_jax.adapters.registry import get_decomposition
from pisa_jax.config import AdapterSpec
from pisa_jax.metrics import lpips
from pisa_jax.model import BaseModel, LoadedModel, Params, predict
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options


@dataclass(frozen=True)
class Objective:
    """The loss that one adapter is trained with, and how its gradient is computed."""

    # How the factors of the adapter become weight differences.
    spec: AdapterSpec
    # Loss weights; a loss of weight 0 is not computed.
    l2: float = 1.0
    perceptual: float = 0.0
    csd: float = 0.0
    # Squared error of the latents, averaged over windows of this side first.
    latent: float = 0.0
    latent_window: int = 1
    # Batches hold encoded images: z_L = encode(x_L) and encode(x_GT).
    latents: bool = False
    # CSD: guidance scale, and the range of t ~ U{first..last}.
    guidance: float = 7.5
    csd_timesteps: tuple[int, int] = (20, 499)
    # Parts that a batch is split into, one after the other, their gradients averaged.
    accumulate: int = 1
    # Keep only block outputs for the gradient and recompute the rest.
    remat: bool = False
    # Decay of the moving average of the adapter; 0: none.
    ema: float = 0.0
    # Specifications of `Frozen.below`.
    below: tuple[AdapterSpec, ...] = ()


class Frozen(NamedTuple):
    """All arrays that receive no gradient."""

    # With the adapters of earlier stages merged in.
    unet: Params
    # Without any adapter: the teacher of CSD; None without that loss.
    teacher: Params | None
    vae: Params
    # None where no image has a prompt.
    text: Params | None
    # Embeddings of "" and of the negative prompt.
    null_prompt: Float[Array, "1 n d"]
    negative_prompt: Float[Array, "1 n d"]
    # Network weights of the perceptual loss; None without that loss.
    perceptual: Any
    alphas_cumprod: Float[Array, " steps"]
    # Adapters of earlier stages that have no weight difference and are not merged.
    below: tuple[AdapterTree, ...] = ()


class Batch(NamedTuple):
    """LQ/GT pairs, their prompts as token ids, and the samples whose prompt the trained UNet receives.

    Pairs are images (c = 3) in [-1, 1], or scaled latents with `Objective.latents`.
    """

    lq: Float[Array, "b h w c"]
    gt: Float[Array, "b h w c"]
    token_ids: Int[Array, "b n"]
    use_prompt: Bool[Array, " b"]


class Draws(NamedTuple):
    """The random numbers of one step."""

    posterior: Float[Array, "b y x c"]
    csd_noise: Float[Array, "b y x c"]
    csd_timesteps: Int[Array, " b"]
    # None without dropout. A key for each sample: its dropout does not depend on how a batch is split or sharded.
    dropout: Key[Array, " b"] | None = None


class State(NamedTuple):
    """Everything that a step updates."""

    step: Int[Array, ""]
    adapter: AdapterTree
    optimizer: Any
    # Exponential moving average of the adapter; None without one.
    ema: AdapterTree | None
    # Steps skipped because a loss or a gradient was not finite: in total, and since the last finite one.
    skipped: Int[Array, ""]
    bad_streak: Int[Array, ""]


def init_state(
    adapter: AdapterTree, optimizer: optax.GradientTransformation, ema: bool, spec: AdapterSpec | None = None
) -> State:
    """Return the state before the first step.

    Constant factors get no optimizer state; `spec` is needed for decompositions that have some.
    """
    # Three arrays, because the jitted step donates each of them.
    step, skipped, bad_streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    average = jax.tree.map(jnp.copy, adapter) if ema else None
    trainable, _ = split(adapter, get_decomposition(spec).constants if spec else ())
    return State(step, adapter, optimizer.init(trainable), average, skipped, bad_streak)


def make_frozen(
    model: LoadedModel,
    mesh: Mesh,
    adapters: Mapping[str, AdapterTree] | None = None,
    specs: Mapping[str, AdapterSpec] | None = None,
    *,
    negative_prompt: str = "",
    perceptual: Any = None,
    teacher: bool = False,
    prompts: bool = False,
) -> Frozen:
    """Shard the weights of `model` over the mesh and merge `adapters`, at scale 1 and in order, into its UNet.

    Those without a weight difference are kept beside it; `Objective.below` needs their specifications.

    Args:
        perceptual: network weights of the perceptual loss on the devices, where that loss is used.
        teacher: keep the UNet without adapters, for CSD.
        prompts: keep the text encoder; without it every sample is trained with the empty prompt.
    """
    base = model.base

    def shard(part, dtype):
        host = model.params[part]
        return distributed.make_global_arrays(host, distributed.weight_shardings(mesh, host), dtype)

    unet, text = shard("unet", base.unet_dtype), shard("text", jnp.float32)
    adapted, below = unet, []
    for name, tree in (adapters or {}).items():  # each was trained on top of those before it
        if specs and not is_mergeable(specs[name]):
            layout = jax.tree.map(lambda _: distributed.replicated(mesh), tree)
            below.append(distributed.make_global_arrays(tree, layout))
        else:
            adapted = injection.merge(adapted, {name: tree}, specs or {}, {name: 1.0})
    encode = jax.jit(base.encode_text)
    null, negative = (encode(text, jnp.asarray(model.tokenize([prompt]))) for prompt in ("", negative_prompt))
    return Frozen(
        unet=adapted,
        teacher=unet if teacher else None,
        vae=shard("vae", base.vae_dtype),
        text=text if prompts else None,
        null_prompt=null,
        negative_prompt=negative,
        perceptual=perceptual,
        alphas_cumprod=losses.schedule_of(model.schedule).alphas_cumprod,
        below=tuple(below),
    )


def draw(
    key: Array,
    base: BaseModel,
    csd_timesteps: tuple[int, int],
    images: tuple[int, ...],
    latents: bool = False,
    dropout: bool = False,
) -> Draws:
    """Draw n ~ N(0, 1) and t ~ U{first..last} for a batch of images, or of latents, of shape (b, h, w, c)."""
    posterior, noise, timesteps = jax.random.split(key, 3)
    batch, height, width, _ = images
    factor = 1 if latents else base.vae_scale_factor
    shape = (batch, height // factor, width // factor, base.latent_channels)
    first, last = csd_timesteps
    return Draws(
        jax.random.normal(posterior, shape),
        jax.random.normal(noise, shape),
        jax.random.randint(timesteps, (batch,), first, last + 1),
        jax.random.split(jax.random.fold_in(key, 3), batch) if dropout else None,
    )


def loss(
    adapter: AdapterTree, frozen: Frozen, batch: Batch, draws: Draws, base: BaseModel, objective: Objective
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the weighted sum of the losses, and each of them.

    z_L = encode(x_L), sampled; z_H = z_L - eps(z_L, 1, c; W + dW); x_H = clip(decode(z_H), -1, 1);
    L = w_l2 l2(x_H, x_GT) + w_p perceptual(x_H, x_GT) + w_csd CSD(z_H) (PiSA-SR, eq. 4-7)
    + w_latent smooth_l2(z_H, encode(x_GT)), which the paper does not have.
    For a batch of latents, which holds z_L and encode(x_GT), x_GT is clip(decode(encode(x_GT)), -1, 1).
    """
    prompt = frozen.null_prompt if frozen.text is None else base.encode_text(frozen.text, batch.token_ids)
    seen = jnp.where(batch.use_prompt[:, None, None], prompt, frozen.null_prompt)
    if objective.latents:
        latents, gt = batch.lq, jnp.clip(base.decode(frozen.vae, batch.gt), -1, 1)
    else:
        latents, gt = base.encode(frozen.vae, batch.lq, draws.posterior), batch.gt

    def upscale(adapter):
        below = tuple(zip(frozen.below, objective.below, strict=True))
        keys = draws.dropout
        eps = predict(base, frozen.unet, adapter, objective.spec, latents, seen, below=below, dropout_keys=keys)
        z_h = latents - eps[0]
        return z_h, jnp.clip(base.decode(frozen.vae, z_h), -1, 1)

    if objective.remat:
        upscale = jax.checkpoint(upscale, policy=checkpoint_policies.save_only_these_names(*base.block_outputs))
    z_h, images = upscale(adapter)

    def teacher(noisy, timesteps):
        negative = jnp.broadcast_to(frozen.negative_prompt, (noisy.shape[0], *frozen.negative_prompt.shape[1:]))
        prompts = jnp.concatenate([negative, jnp.broadcast_to(prompt, negative.shape)])
        twice = jnp.concatenate([noisy, noisy])
        return jnp.split(base.predict_noise(frozen.teacher, twice, jnp.tile(timesteps, 2), prompts), 2)

    terms = {}
    if objective.l2:
        terms["l2"] = losses.l2(images, gt)
    if objective.perceptual:
        terms["perceptual"] = lpips.distance(frozen.perceptual, images, gt).mean()
    if objective.csd:
        alphas, guidance = frozen.alphas_cumprod, objective.guidance
        terms["csd"] = losses.csd(teacher, z_h, draws.csd_noise, draws.csd_timesteps, alphas, guidance)
    if objective.latent:
        target = batch.gt if objective.latents else base.encode(frozen.vae, batch.gt, None)
        terms["latent"] = losses.smooth_l2(z_h, target, objective.latent_window)
    total = sum(getattr(objective, name) * value for name, value in terms.items())
    if penalty := get_decomposition(objective.spec).penalty:
        terms["penalty"] = jnp.sum(jnp.stack([penalty(factors) for factors in adapter.values()]))
        total = total + terms["penalty"]
    return total, terms


def gradient(
    adapter: AdapterTree, frozen: Frozen, batch: Batch, draws: Draws, base: BaseModel, objective: Objective
) -> tuple[dict[str, Float[Array, ""]], AdapterTree]:
    """Compute the losses ("total" and each term) and their gradient, averaged over `accumulate` parts of the batch.

    The gradient has no constant factors.
    """
    trainable, constants = split(adapter, get_decomposition(objective.spec).constants)

    def of_part(part):
        part_batch, part_draws = part

        def loss_of(factors):
            return loss(join(factors, constants), frozen, part_batch, part_draws, base, objective)

        (total, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return {"total": total, **terms}, grads

    if objective.accumulate == 1:
        return of_part((batch, draws))
    # Strided parts: every device keeps its share of the batch in each of them.
    parts = jax.tree.map(lambda x: x.reshape(-1, objective.accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, draws))
    first = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts)))

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    summed, _ = jax.lax.scan(add, first, parts)
    return jax.tree.map(lambda x: x / objective.accumulate, summed)


def train_step(
    frozen: Frozen,
    state: State,
    batch: Batch,
    key: Array,
    *,
    base: BaseModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Run one optimizer step; returns the next state and the measurements.

    A step whose loss or gradient is not finite changes the counters only.
    """
    draws = draw(
        jax.random.fold_in(key, state.step),
        base,
        objective.csd_timesteps,
        batch.lq.shape,
        objective.latents,
        dropout=objective.spec.dropout > 0,
    )
    measured, grads = gradient(state.adapter, frozen, batch, draws, base, objective)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(measured["total"])

    names = get_decomposition(objective.spec).constants
    trainable, constants = split(state.adapter, names)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, trainable)
    trainable = optax.apply_updates(trainable, updates)
    adapter, ema = join(trainable, constants), None
    if state.ema is not None:
        average, _ = split(state.ema, names)
        ema = join(optax.incremental_update(trainable, average, 1 - objective.ema), constants)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    bad = (~finite).astype(jnp.int32)
    after = State(
        step=state.step + 1,
        adapter=keep(adapter, state.adapter),
        optimizer=keep(optimizer_state, state.optimizer),
        ema=keep(ema, state.ema),
        skipped=state.skipped + bad,
        bad_streak=(state.bad_streak + 1) * bad,
    )
    return after, {**measured, "grad_norm": norm, "skipped": after.skipped, "bad_streak": after.bad_streak}


def jit_train_step(
    base: BaseModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    frozen: Frozen,
    mesh: Mesh,
    state: State | None = None,
) -> Callable[[Frozen, State, Batch, Array], tuple[State, dict[str, Array]]]:
    """Jit `train_step`: weights and state sharded as they are, the batch over all devices, the state donated.

    Without `state`, the states are replicated.
    """
    replicated = distributed.replicated(mesh)
    state_layout = replicated if state is None else jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        functools.partial(train_step, base=base, objective=objective, optimizer=optimizer),
        in_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, frozen),
            state_layout,
            distributed.batch_sharding(mesh),
            None,
        ),
        out_shardings=(state_layout, replicated),
        donate_argnums=1,
        compiler_options=compiler_options(),
    )
