"""The adapters of the demo model that ships with the package: `pix`, then `sem`, on the prior of demo/.

    python demo/pictures.py --data TRAIN --out runs/demo_pictures
    python demo/vae.py --data runs/demo_pictures --out runs/demo_vae
    python demo/prior.py --data runs/demo_pictures --vae runs/demo_vae --out runs/demo_prior --model runs/demo_model
    python train.py configs/demo.py
    python demo/ship.py --model runs/demo_model --adapters runs/demo/adapters.safetensors --data TRAIN --sem 0.6

Hardware: 2 cores of an AMD EPYC, 2026-11-25 and 26 (jax 0.10.2): VAE 1 300 + 500 + 1 500 steps in 75 minutes, prior
1 150 + 1 300 steps in 37, pix in 59, sem in 12. Data: 365 photographs and graphics (NOTICE).
Measured: on CID22_val9 degraded with seed 0: bicubic 24.11 dB and a SqueezeNet distance of 5.67, scales 1,0 24.57 and
4.93, scales 1,1 24.51 and 4.79; Kodak24: 24.43 and 6.43, 24.73 and 5.88, 24.70 and 5.63. Expected: 1 dB over bicubic,
not reached.
Tried: the gain of pix grows less and less with its steps, to near that of each picture's best linear filter. Without
latent_window, sem makes a grid; as trained, it weaves, so it ships with 0.6 of its alpha. CSD without `latent`
collapses with 1 after 60 steps, with 0.05 after 180 of 600: the adapter then makes latents for which the prior's two
predictions agree, and a grid. docs/results.md has other losses of both stages, and where the error lies.
Not as the commands above: the prior's first 1 150 steps read another numbering of the tokens than its last 1 300 and
what ships. The adapters were trained on the float16 weights that ship. sem was first trained with other weights of its
losses; then these were put into the run, and it went on from the end of pix with --resume.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=16, alpha=16.0)

config = Config(
    out="runs/demo",
    model="runs/demo_model",
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
