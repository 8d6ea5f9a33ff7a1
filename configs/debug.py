"""A smoke test: both stages on synthetic images and a tiny random model. The adapters are of no use.

    python train.py configs/debug.py

Hardware: any; under a minute of CPU time, nearly all of it compilation. Expected: runs/debug/adapters.safetensors,
which `infer.py` takes together with runs/debug/model. Measured: 52 s of CPU time, 69 s on 2 busy cores (2026-11-25).
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

config = Config(
    out="runs/debug",
    model="random",
    stages=(
        Stage("pix", steps=4, learning_rate=1e-3, spec=AdapterSpec(rank=2)),
        Stage("sem", steps=4, frozen=("pix",), perceptual=2.0, csd=1.0, learning_rate=1e-3, spec=AdapterSpec(rank=2)),
    ),
    data=Data(source="fake", crop=64, workers=0),
    batch_size=2,
    mesh_data=1,
    perceptual="squeeze",
    perceptual_weights=None,
    log_every=1,
    save_every=4,
)
