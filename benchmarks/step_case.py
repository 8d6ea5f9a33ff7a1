"""Arguments of the training step with random weights, made on the device, and the step itself, for benchmarks."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pisa_jax import losses, train_step
from pisa_jax.adapters import injection
from pisa_jax.config import Stage
from pisa_jax.metrics import lpips
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb

STAGES = {
    "pix": Stage("pix", steps=4000),
    "sem": Stage("sem", steps=8500, frozen=("pix",), perceptual=2.0, csd=1.0),
}
PROMPT_TOKENS = 77


class StepCase(NamedTuple):
    """Settings of one training step: everything except the weights."""

    stage: Stage
    crop: int
    batch_size: int
    remat: bool
    dtype: str
    vae_dtype: str

    @property
    def objective(self) -> train_step.Objective:
        """The loss of the stage."""
        stage = self.stage
        return train_step.Objective(
            stage.spec, l2=stage.l2, perceptual=stage.perceptual, csd=stage.csd, remat=self.remat
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipping, as in a training run."""
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(self.stage.learning_rate, 0.9, 0.999, weight_decay=1e-2)
        )


def vgg_shapes() -> dict[str, Any]:
    """Shapes of the weights of LPIPS (VGG16)."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernels = lpips.FEATURE_NETWORKS["vgg"].kernels
    layers = {name: {"kernel": of(shape), "bias": of(shape[-1:])} for name, shape in kernels.items()}
    heads = {f"lin{index}": of((width,)) for index, width in enumerate((64, 128, 256, 512, 512))}
    return {"vgg": {"layers": layers, "heads": heads}}


def argument_shapes(modules: bb.Backbone, shapes: dict[str, Any], case: StepCase) -> tuple[Any, ...]:
    """Shapes of the arguments of `train_step.train_step`; `shapes` are `backbone.param_shapes`."""
    of, stage = jax.ShapeDtypeStruct, case.stage

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: of(leaf.shape, jnp.dtype(dtype)), tree)

    prompt = of((1, PROMPT_TOKENS, modules.unet.cross_attention_dim), jnp.float32)
    unet = cast(shapes["unet"], case.dtype)
    frozen = train_step.Frozen(
        unet=unet,
        teacher=unet if stage.csd else None,
        vae=cast(shapes["vae"], case.vae_dtype),
        text=cast(shapes["text"], jnp.float32) if stage.csd else None,
        null_prompt=prompt,
        negative_prompt=prompt,
        perceptual=vgg_shapes() if stage.perceptual else None,
        alphas_cumprod=of((1000,), jnp.float32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(
        lambda key, unet: train_step.init_state(
            injection.init_adapter(key, unet, stage.spec), case.optimizer, ema=False, spec=stage.spec
        ),
        key,
        cast(shapes["unet"], jnp.float32),
    )
    images = of((case.batch_size, case.crop, case.crop, 3), jnp.float32)
    ids = of((case.batch_size, PROMPT_TOKENS), jnp.int32)
    batch = train_step.Batch(images, images, ids, of((case.batch_size,), jnp.bool_))
    return frozen, state, batch, key


def random_arguments(shapes: tuple[Any, ...], case: StepCase) -> tuple[Any, ...]:
    """Random arrays of the shapes of `argument_shapes`, on the default device."""
    frozen, state, batch, _ = shapes
    unet = random_weights(frozen.unet, 0)
    frozen = frozen._replace(
        unet=unet,
        teacher=unet if case.stage.csd else None,
        vae=random_weights(frozen.vae, 1),
        text=random_weights(frozen.text, 2) if case.stage.csd else None,
        null_prompt=normal(frozen.null_prompt, 3),
        negative_prompt=normal(frozen.negative_prompt, 4),
        perceptual=random_weights(frozen.perceptual, 5) if case.stage.perceptual else None,
        alphas_cumprod=losses.ddpm_schedule().alphas_cumprod,
    )
    state = train_step.init_state(random_adapter(state.adapter, 6), case.optimizer, ema=False, spec=case.stage.spec)
    images = [jnp.tanh(normal(leaf, seed)) for leaf, seed in ((batch.lq, 7), (batch.gt, 8))]
    ids, seen = jnp.zeros(batch.token_ids.shape, jnp.int32), jnp.ones(batch.use_prompt.shape, bool)
    return frozen, state, train_step.Batch(*images, ids, seen), jax.random.key(0)


def random_weights(shapes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Draw weights that preserve the magnitude of activations, on the default device.

    Variance 1 / fan_in, scales 1, biases 0, as `random_model.random_params` draws them on the host.
    """
    key = jax.random.key(seed, impl="rbg")  # compiles in a fraction of threefry's time, once per shape

    def leaf(index, path, shape):
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return jnp.full(shape.shape, float(name == "scale"), shape.dtype)
        fan_in = math.prod(shape.shape[:-1]) if name == "kernel" else 1
        return _uniform(jax.random.fold_in(key, index), fan_in**-0.5, shape.shape, shape.dtype)

    flat = flatten(shapes)
    return unflatten({path: leaf(index, path, shape) for index, (path, shape) in enumerate(flat.items())})


def random_adapter(shapes: Any, seed: int) -> Any:
    """Draw factors of an adapter, on the default device: not 0, and small enough for weights of `random_weights`."""
    key = jax.random.key(seed, impl="rbg")
    leaves, structure = jax.tree.flatten(shapes)
    factors = [
        _uniform(jax.random.fold_in(key, index), 0.02, leaf.shape, leaf.dtype) for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, factors)


def normal(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Draw N(0, 1)."""
    return jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _uniform(key, spread, shape, dtype):
    """Draw uniform numbers with the standard deviation `spread`."""
    return (spread * jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5)).astype(dtype)
