"""The adapters of the demo model that ships with the package: `pix`, then `sem`, on the prior of demo/.

python train.py configs/demo.py
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=16, alpha=16)

config = Config(
    out="runs/demo/adapters",
    model="runs/demo/model",
    stages=(
        Stage("pix", steps=500, learning_rate=2e-3, schedule="cosine", warmup=50, spec=SPEC),
        Stage(
            "sem",
            steps=350,
            frozen=("pix",),
            perceptual=0.1,
            csd=0.1,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=50,
            spec=SPEC,
        ),
    ),
    data=Data(
        source="folder", path="runs/demo/pictures", prompts="runs/demo/pictures/prompts.jsonl", crop=96, workers=0
    ),
    batch_size=6,
    perceptual="squeeze",
    perceptual_weights=None,
    negative_prompt="blurry, noise, jpeg artifacts, low quality, lowres, over-smooth, dirty",
    ema=0.99,
    log_every=20,
    save_every=100,
)
