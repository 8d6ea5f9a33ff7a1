"""What is minimised, and one step of doing so: pure functions of weights, a batch and random draws."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Array, Bool, Float, Int

from pisa_jax import losses
from pisa_jax.adapters import injection
from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import Config, Stage
from pisa_jax.metrics import lpips
from pisa_jax.model import TIMESTEP
from pisa_jax.sd import backbone as bb


class Frozen(NamedTuple):
    """All arrays that no gradient reaches."""

    # With the adapters of earlier stages merged in.
    unet: bb.Params
    # Without any adapter: the teacher of CSD; None without that loss.
    teacher: bb.Params | None
    vae: bb.Params
    # None where no picture has a prompt.
    text: bb.Params | None
    # Embeddings of "" and of the negative prompt.
    null_prompt: Float[Array, "1 n d"]
    negative_prompt: Float[Array, "1 n d"]
    # Weights of the perceptual distance; None without that loss.
    perceptual: Any
    alphas_cumprod: Float[Array, "steps"]


class Batch(NamedTuple):
    """Pairs of pictures in [-1, 1], their prompts as token ids, and whether the trained UNet may see them."""

    lq: Float[Array, "b h w 3"]
    gt: Float[Array, "b h w 3"]
    token_ids: Int[Array, "b n"]
    use_prompt: Bool[Array, "b"]


class Draws(NamedTuple):
    """The random numbers of one step."""

    posterior: Float[Array, "b y x c"]
    csd_noise: Float[Array, "b y x c"]
    csd_timesteps: Int[Array, "b"]


class State(NamedTuple):
    """What a step changes."""

    step: Int[Array, ""]
    adapter: AdapterTree
    optimizer: Any
    # Exponential moving average of the adapter; None without one.
    ema: AdapterTree | None
    # Steps left out because a loss or a gradient was not finite: in all, and since the last good one.
    skipped: Int[Array, ""]
    bad_streak: Int[Array, ""]


def make_optimizer(config: Config, stage: Stage) -> optax.GradientTransformation:
    """AdamW behind a clipped global norm, with the stage's learning-rate schedule."""
    b1, b2 = config.betas
    adamw = optax.adamw(learning_rate(stage), b1, b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def learning_rate(stage: Stage) -> optax.Schedule:
    """Step -> learning rate: a linear rise from 0 over `warmup` steps, then constant or half a cosine down to 0."""
    peak = stage.learning_rate
    after = optax.constant_schedule(peak)
    if stage.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, stage.steps - stage.warmup)
    if stage.warmup == 0:  # optax's rise over 0 steps would stay at 0
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, stage.warmup), after], [stage.warmup])


def init_state(adapter: AdapterTree, config: Config, stage: Stage) -> State:
    """The state before the first step of a stage."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, adapter) if config.ema else None
    return State(zero, adapter, make_optimizer(config, stage).init(adapter), ema, zero, zero)


def draw(key: Array, backbone: bb.Backbone, config: Config, images: tuple[int, ...]) -> Draws:
    """The draws of a step for a batch of image shape (b, h, w, 3): n ~ N(0, 1), t ~ U{first..last}."""
    posterior, noise, timesteps = jax.random.split(key, 3)
    batch, height, width, _ = images
    shape = (batch, height // backbone.vae_scale_factor, width // backbone.vae_scale_factor, backbone.latent_channels)
    first, last = config.csd_timesteps
    return Draws(
        jax.random.normal(posterior, shape),
        jax.random.normal(noise, shape),
        jax.random.randint(timesteps, (batch,), first, last + 1),
    )


def loss(
    adapter: AdapterTree,
    frozen: Frozen,
    batch: Batch,
    draws: Draws,
    backbone: bb.Backbone,
    config: Config,
    stage: Stage,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of the stage's losses, and each of them.

    z_L = encode(x_L) sampled; z_H = z_L - eps(z_L, 1, c; W + dW); x_H = clip(decode(z_H), -1, 1);
    L = w_l2 l2(x_H, x_GT) + w_p perceptual(x_H, x_GT) + w_csd CSD(z_H) (PiSA-SR, eq. 4-7)
    + w_latent smooth_l2(z_H, encode(x_GT)), our own.
    """
    prompt = frozen.null_prompt
    if frozen.text is not None:
        prompt = bb.encode_text(backbone, frozen.text, batch.token_ids)
    seen = jnp.where(batch.use_prompt[:, None, None], prompt, frozen.null_prompt)
    latents = bb.encode(backbone, frozen.vae, batch.lq, draws.posterior)

    def restore(adapter):
        trained = {stage.adapter: adapter}
        with nn.intercept_methods(
            injection.interceptor(trained, {stage.adapter: stage.spec}, {stage.adapter: jnp.ones(())})
        ):
            restored = latents - bb.eps(backbone, frozen.unet, latents, TIMESTEP, seen)
        return restored, jnp.clip(bb.decode(backbone, frozen.vae, restored), -1, 1)

    if config.remat:
        restore = jax.checkpoint(restore, policy=checkpoint_policies.save_only_these_names(bb.BLOCK_OUTPUT))
    restored, images = restore(adapter)

    def teacher(noisy, timesteps):
        negative = jnp.broadcast_to(frozen.negative_prompt, (noisy.shape[0], *frozen.negative_prompt.shape[1:]))
        prompts = jnp.concatenate([negative, jnp.broadcast_to(prompt, negative.shape)])
        twice = jnp.concatenate([noisy, noisy])
        return jnp.split(bb.eps(backbone, frozen.teacher, twice, jnp.tile(timesteps, 2), prompts), 2)

    parts = {}
    if stage.l2:
        parts["l2"] = losses.l2(images, batch.gt)
    if stage.perceptual:
        parts["perceptual"] = lpips.distance(frozen.perceptual, images, batch.gt).mean()
    if stage.csd:
        alphas, guidance = frozen.alphas_cumprod, config.guidance
        parts["csd"] = losses.csd(teacher, restored, draws.csd_noise, draws.csd_timesteps, alphas, guidance)
    if stage.latent:
        parts["latent"] = losses.smooth_l2(restored, bb.encode(backbone, frozen.vae, batch.gt), stage.latent_window)
    return sum(getattr(stage, name) * value for name, value in parts.items()), parts


def gradient(
    adapter: AdapterTree,
    frozen: Frozen,
    batch: Batch,
    draws: Draws,
    backbone: bb.Backbone,
    config: Config,
    stage: Stage,
) -> tuple[dict[str, Float[Array, ""]], AdapterTree]:
    """Losses ("total" and each part) and their gradient, averaged over `config.accumulate` parts of the batch."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def of_part(part):
        (total, parts), grads = value_and_grad(adapter, frozen, *part, backbone, config, stage)
        return {"total": total, **parts}, grads

    if config.accumulate == 1:
        return of_part((batch, draws))
    # Strided parts: every device keeps its share of the batch in each of them.
    split = jax.tree.map(lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, draws))
    first = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], split)))

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    summed, _ = jax.lax.scan(add, first, split)
    return jax.tree.map(lambda x: x / config.accumulate, summed)


def train_step(
    frozen: Frozen, state: State, batch: Batch, key: Array, *, backbone: bb.Backbone, config: Config, stage: Stage
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of the optimiser: the next state and what was measured.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    draws = draw(jax.random.fold_in(key, state.step), backbone, config, batch.lq.shape)
    measured, grads = gradient(state.adapter, frozen, batch, draws, backbone, config, stage)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(measured["total"])

    updates, optimizer = make_optimizer(config, stage).update(grads, state.optimizer, state.adapter)
    adapter = optax.apply_updates(state.adapter, updates)
    ema = optax.incremental_update(adapter, state.ema, 1 - config.ema) if config.ema else None

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    bad = (~good).astype(jnp.int32)
    after = State(
        step=state.step + 1,
        adapter=keep(adapter, state.adapter),
        optimizer=keep(optimizer, state.optimizer),
        ema=keep(ema, state.ema),
        skipped=state.skipped + bad,
        bad_streak=(state.bad_streak + 1) * bad,
    )
    return after, {**measured, "grad_norm": norm, "skipped": after.skipped, "bad_streak": after.bad_streak}
