"""The adapters of the demo model that ships with the package (version 1).

    python train.py configs/demo_v1.py

Its VAE (factor 4, 16 latent channels) and its prior were trained with earlier versions of the scripts in demo/; the
scripts now train the model of configs/demo.py. Shipped with demo/ship.py --sem 0.6.
Hardware: 2 cores of an AMD EPYC, 2026-11-25 and 26 (jax 0.10.2). VAE: 1 300 + 500 + 1 500 steps in 75 minutes. Prior:
1 150 + 1 300 steps in 37 minutes. pix: 59 minutes. sem: 12 minutes. Data: 365 photographs and graphics (NOTICE).
Expected: 1 dB over bicubic (not reached).
Measured (PSNR in dB and SqueezeNet distance, images degraded with seed 0):
CID22_val9: bicubic 24.11 and 5.67, scales 1,0 24.57 and 4.93, scales 1,1 24.51 and 4.79.
Kodak24: bicubic 24.43 and 6.43, scales 1,0 24.73 and 5.88, scales 1,1 24.70 and 5.63.
Settings: without latent_window, sem adds a grid. At its trained strength, sem adds a weave, so it ships with 0.6 of its
alpha. CSD without `latent` collapses after 60 steps (weight 1) or 180 of 600 steps (weight 0.05): the adapter produces
latents for which the two predictions of the prior agree, which decode to a grid. demo/NOTES.md describes other losses
of both stages and where the error lies.
Differences from this config: the first 1 150 steps of the prior used another numbering of the tokens than the last
1 300 steps and the shipped model. The adapters were trained on the shipped float16 weights. sem was first trained
with other loss weights; then the run was resumed from the end of pix with the weights below.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=16, alpha=16.0)

config = Config(
    out="runs/demo_v1",
    model="demo",
    stages=(
        Stage("pix", steps=10000, l2=0.0, latent=1.0, learning_rate=1.5e-3, schedule="cosine", warmup=50, spec=SPEC),
        Stage(
            "sem",
            steps=1000,
            frozen=("pix",),
            perceptual=0.3,
            csd=0.05,
            latent=30.0,
            latent_window=3,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=50,
            spec=SPEC,
        ),
    ),
    data=Data(
        source="folder", path="runs/demo_pictures", prompts="runs/demo_pictures/prompts.jsonl", crop=96, workers=0
    ),
    batch_size=8,
    perceptual="squeeze",
    perceptual_weights=None,
    negative_prompt="blurry, noise, jpeg artifacts, low quality, lowres, over-smooth, dirty",
    ema=0.995,
    log_every=20,
    save_every=250,
)
