"""The demo model's architecture: Stable Diffusion 2.1's, at sizes that two CPU cores can train and run.

The VAE reduces by 4 instead of 8 and keeps 16 channels: so small a network needs them for 30 dB. Attention stands where
a picture of 512 pixels has 64 x 64 latents or fewer.
"""

from pisa_jax.sd import random_model

UNET = random_model.UNET | {
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": [64, 96, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": [2, 3, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "sample_size": 128,
}
VAE = random_model.VAE | {
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 16,
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
