"""The recipe of `sd21.py` and a third adapter, `face`, trained on top of both, such as for images of faces.

    python train.py configs/three_adapters.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl
    python infer.py -i photo.jpg --model MODEL --adapters runs/three_adapters/adapters.safetensors --scales 1,1,0.5

Inference takes three scales, in the order of the stages. Hardware: as for `sd21.py`. Expected: with the scales 1,1,0
the result of `sd21.py`. Measured: not yet run.
"""

from pisa_jax.config import Config, Data, Stage

config = Config(
    out="runs/three_adapters",
    stages=(
        Stage("pix", steps=4000),
        Stage("sem", steps=8500, frozen=("pix",), perceptual=2.0, csd=1.0),
        Stage("face", steps=4000, frozen=("pix", "sem"), perceptual=2.0, csd=1.0),
    ),
    data=Data(source="fake", crop=512),
    batch_size=16,
    dtype="bfloat16",
)
