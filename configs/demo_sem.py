"""The semantic stage of the next demo model: perceptual, CSD and latent losses; the target is Real-ESRGAN's result.

    python train.py configs/demo_sem.py

Run it after demo/start_sem.py, from whose adapters it starts; configs/demo.py lists all commands. Hardware: as there.
Expected: a SqueezeNet distance of 4.2 (CID22_val9) and 4.7 (Kodak24) at scales 1,1.
Measured: 4.57 and 5.30 on the prior without demo/adversarial.py. With it, the adapters of demo/start_sem.py alone have
4.60 and 5.03. With a lower ratio of latent to perceptual and CSD, the weave is stronger (demo/NOTES.md).
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=40, alpha=40.0)

config = Config(
    out="runs/demo_sem",
    model="runs/demo_model",
    start="runs/demo_sem_start.safetensors",
    stages=(
        Stage(
            "sem",
            steps=300,
            frozen=("pix",),
            perceptual=0.1,
            csd=0.002,
            latent=2.0,
            learning_rate=3e-4,
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
