"""The demo model's architecture: Stable Diffusion 2.1's, at sizes that two CPU cores can train and run.

The VAE has a scale factor of 8 and 64 latent channels, which a network of this size needs for a PSNR of 30 dB. The UNet
has one level: all of its layers have the resolution of the latents. The shipped demo model has an earlier shape (its
`config.json` files, demo/NOTES.md).
"""

from pisa_jax.sd import random_model

UNET = random_model.UNET | {
    "in_channels": 64,
    "out_channels": 64,
    "block_out_channels": [128],
    "layers_per_block": 3,
    "cross_attention_dim": 64,
    "attention_head_dim": [4],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "sample_size": 64,
}
VAE = random_model.VAE | {
    "block_out_channels": [32, 64, 96, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 64,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 512,
    # Replaced by 1 / (standard deviation of the latents) when the VAE is trained.
    "scaling_factor": 1.0,
}
TEXT = random_model.TEXT | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}
# For a trial of all stages within two minutes.
TINY_UNET = UNET | {"in_channels": 8, "out_channels": 8, "block_out_channels": [32], "layers_per_block": 1}
TINY_UNET |= {"attention_head_dim": [1]}
TINY_VAE = VAE | {"block_out_channels": [8, 8, 8, 16], "latent_channels": 8}
