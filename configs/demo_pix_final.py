"""The end of the pixel stage of the next demo model: the squared error of decoded images, which PSNR measures.

    python train.py configs/demo_pix_final.py

Run it after configs/demo.py, from whose adapter it starts.
Hardware, Expected: see configs/demo.py. Measured: not yet run to its end.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=40, alpha=40.0)

config = Config(
    out="runs/demo_pix_final",
    model="runs/demo_model",
    start="runs/demo/adapters.safetensors",
    stages=(
        Stage("pix", steps=2000, l2=1.0, latent=0.03, learning_rate=3e-4, schedule="cosine", warmup=50, spec=SPEC),
    ),
    data=Data(
        source="latents",
        path="runs/demo_latents/pix",
        prompts="runs/demo_latents/prompts.jsonl",
        crop=128,
        workers=0,
    ),
    batch_size=4,
    ema=0.99,
    log_every=20,
    save_every=250,
)
