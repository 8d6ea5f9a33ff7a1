"""The end of the semantic stage of the next demo model: decoded images, with perceptual, CSD and latent losses.

    python train.py configs/demo_final.py

Run it after configs/demo_sem.py, from whose adapters it starts. The target remains the result of Real-ESRGAN.
Hardware: see configs/demo.py. Expected: see configs/demo_sem.py. Measured: not yet run to its end.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=40, alpha=40.0)

config = Config(
    out="runs/demo_final",
    model="runs/demo_model",
    start="runs/demo_sem/adapters.safetensors",
    stages=(
        Stage(
            "sem",
            steps=2000,
            frozen=("pix",),
            perceptual=0.05,
            csd=0.005,
            latent=0.3,
            learning_rate=2e-4,
            schedule="cosine",
            warmup=50,
            spec=SPEC,
        ),
    ),
    data=Data(
        source="latents",
        path="runs/demo_latents/sem",
        prompts="runs/demo_latents/prompts.jsonl",
        crop=128,
        workers=0,
    ),
    batch_size=4,
    perceptual="squeeze",
    perceptual_weights=None,
    negative_prompt="blurry, noise, jpeg artifacts, low quality, lowres, over-smooth, dirty",
    ema=0.99,
    log_every=20,
    save_every=250,
)
