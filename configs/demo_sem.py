"""The semantic stage of the next demo model: on top of `pix`, a regression of the latents of Real-ESRGAN's results.

    python train.py configs/demo_sem.py

Run it after configs/demo_pix_final.py; configs/demo.py lists all commands. Hardware: as there.
Expected: with configs/demo_final.py, a SqueezeNet distance of 4.2 (CID22_val9) and 4.7 (Kodak24) at scales 1,1.
Measured: not yet run to its end.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=40, alpha=40.0)

config = Config(
    out="runs/demo_sem",
    model="runs/demo_model",
    start="runs/demo_pix_final/adapters.safetensors",
    stages=(
        Stage(
            "sem",
            steps=40000,
            frozen=("pix",),
            l2=0.0,
            latent=1.0,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=200,
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
    batch_size=8,
    ema=0.998,
    log_every=50,
    save_every=250,
)
