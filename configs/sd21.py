"""The published recipe of PiSA-SR (Sun et al., CVPR 2025, sec. 4.1): two rank-4 adapters on Stable Diffusion 2.1-base.

    python train.py configs/sd21.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl

Data of the paper: LSDIR and the first 10 000 images of FFHQ, crops of 512, batch 16, RAM tags of the ground truth as
prompts. 4 000 + 8 500 steps of AdamW at 5e-5. Hardware: not stated per run by the paper; not yet run with this package
(the weights of Stable Diffusion and VGG16 were not available for testing).
Expected on RealSR 128 -> 512, default scales: PSNR 25.50, SSIM .7417, LPIPS .2672. Measured: not yet run.
"""

from pisa_jax.config import Config, Data, Stage

config = Config(
    out="runs/sd21",
    stages=(
        Stage("pix", steps=4000),
        Stage("sem", steps=8500, frozen=("pix",), perceptual=2.0, csd=1.0),
    ),
    data=Data(source="fake", crop=512),
    batch_size=16,
    dtype="bfloat16",
)
