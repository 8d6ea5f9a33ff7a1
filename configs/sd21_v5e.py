"""The published recipe (configs/sd21.py) on a TPU v5e slice of 16 chips: one image per chip, and a bfloat16 VAE.

    python train.py configs/sd21_v5e.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl
    python train.py configs/sd21_v5e.py --compile-only --topology v5e:4x4 --data.prompts DIR/prompts.jsonl

Hardware: v5e-16, or v5e-8 and v5e-4 with `--accumulate` 2 and 4. Memory of a chip: 6.1 of 15.75 GiB in the pixel stage,
8.4 in the semantic one, from the buffer assignment of the steps compiled for v5e:2x2 and 4 images (2026-11-27).
Expected: the results of configs/sd21.py, in 22 minutes at 40 % of the peak. Measured: not yet run.
"""

import dataclasses
import runpy
from pathlib import Path

published = runpy.run_path(str(Path(__file__).with_name("sd21.py")))["config"]
config = dataclasses.replace(published, out="runs/sd21_v5e", vae_dtype="bfloat16")
