"""The recipe of `sd21.py` with DoRA (Liu et al. 2024) in both stages.

    python train.py configs/dora.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl

Parameters: 4 351 396 per adapter, 7 % more than LoRA (docs/decompositions.md). Hardware: as for `sd21.py`.
Expected: not stated in the literature for this task. Measured: not yet run.
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec("dora")

config = Config(
    out="runs/dora",
    stages=(
        Stage("pix", steps=4000, spec=SPEC),
        Stage("sem", steps=8500, frozen=("pix",), perceptual=2.0, csd=1.0, spec=SPEC),
    ),
    data=Data(source="fake", crop=512),
    batch_size=16,
    dtype="bfloat16",
)
