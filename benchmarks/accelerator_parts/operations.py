"""Operations (FLOPs) of inference and training for one image, counted by XLA before it optimizes a program.

    PYTHONPATH=benchmarks python -m accelerator_parts.operations nano 64

Counted is the model as it is defined: XLA sees no operations in a fused kernel of attention and counts loops once, and
`layers.upsample_conv` needs fewer than the upsampling and convolution that it replaces.
"""

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from step_case import STAGES, StepCase, argument_shapes

from accelerator_parts import random_sd
from pisa_jax import stages, train_step
from pisa_jax.adapters import injection
from pisa_jax.model import Predictions
from pisa_jax.sd import layers
from pisa_jax.sd.base_model import make_base_model
from pisa_jax.weights import Weights

# By size and side, printed by this module: counting takes a minute.
COUNTED = {
    ("sd21", 512): {
        "encode": 1.111e12,
        "predict": 0.796e12,
        "predict_both": 1.593e12,
        "render": 2.504e12,
        "pix": 7.874e12,
        "sem": 9.975e12,
    },
}


@functools.cache
def operations(size: str, side: int) -> dict[str, float]:
    """Return the operations of encoder, UNet (once and twice), decoder, and the training steps."""
    return COUNTED.get((size, side)) or count_inference(size, side) | count_training(size, side)


def count(function, *arguments) -> float:
    """Count the operations of a function."""
    plain = {"attention": jax.nn.dot_product_attention, "upsample_conv": plain_upsample_conv}
    with mock.patch.multiple(layers, **plain):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def plain_upsample_conv(x, kernel, bias):
    """Upsample by 2, then apply a 3x3 convolution."""
    upsampled, layout = layers.upsample_nearest(x), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(upsampled, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias


def count_inference(size: str, side: int) -> dict[str, float]:
    """Count the operations of the stages of inference."""
    modules, shapes, of = random_sd.modules(size, "bfloat16", "float32"), random_sd.shapes(size), jax.ShapeDtypeStruct
    base = make_base_model(modules)
    sem = jax.eval_shape(lambda key: injection.init_adapter(key, shapes["unet"], random_sd.SPEC), jax.random.key(0))
    prompt = of((1, 77, modules.unet.cross_attention_dim), jnp.float32)
    weights = Weights(random_sd.cast(shapes["unet"], "bfloat16"), (sem,), shapes["vae"], prompt)
    latent_side = side // base.vae_scale_factor
    images = of((1, side, side, 3), jnp.float32)
    latents = of((1, latent_side, latent_side, base.latent_channels), jnp.float32)
    predict = functools.partial(stages.predict, base, (random_sd.SPEC,))
    render = functools.partial(stages.render, base, "adain", (side, side))
    return {
        "encode": count(functools.partial(stages.encode, base), weights, images, None),
        "predict": count(functools.partial(predict, ((1.0,),)), weights, latents),
        "predict_both": count(functools.partial(predict, ((0.0,), (1.0,))), weights, latents),
        "render": count(render, weights, Predictions(latents, (latents, latents)), of((2,), jnp.float32), images),
    }


def count_training(size: str, side: int) -> dict[str, float]:
    """Count the operations of the training steps."""
    modules, shapes = random_sd.modules(size, "bfloat16", "float32"), random_sd.shapes(size)
    found = {}
    for name, stage in STAGES.items():
        case = StepCase(stage, side, 1, False, "bfloat16", "float32")
        step = functools.partial(
            train_step.train_step, base=make_base_model(modules), objective=case.objective, optimizer=case.optimizer
        )
        found[name] = count(step, *argument_shapes(modules, shapes, case))
    return found


if __name__ == "__main__":
    print({name: round(value / 1e12, 4) for name, value in operations(sys.argv[1], int(sys.argv[2])).items()}, "TFLOP")
