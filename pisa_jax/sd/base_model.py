"""Stable Diffusion as a `BaseModel`: the record of functions that the method, training and inference use."""

import functools

from pisa_jax.model import BaseModel
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import padding, vae_tiling
from pisa_jax.tiling.vae_tiles import TiledVae


def make_base_model(backbone: bb.Backbone) -> BaseModel:
    """Return the functions of the modules in `backbone`."""

    def bind(function):
        return functools.partial(function, backbone)

    return BaseModel(
        encode=bind(padding.encode),
        decode=bind(padding.decode),
        predict_noise=bind(padding.predict_noise),
        encode_text=bind(bb.encode_text),
        vae_scale_factor=backbone.vae_scale_factor,
        latent_channels=backbone.latent_channels,
        unet_dtype=backbone.unet.dtype,
        vae_dtype=backbone.vae.dtype,
        block_outputs=(bb.BLOCK_OUTPUT,),
        takes_sizes=True,
        tiled_vae=TiledVae(
            bind(vae_tiling.footprint),
            bind(vae_tiling.tiled_encoder),
            bind(vae_tiling.tiled_decoder),
            backbone.latent_scale,
        ),
    )
