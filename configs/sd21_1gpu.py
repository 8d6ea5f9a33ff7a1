"""The published recipe (configs/sd21.py) on one GPU of 24 GB: gradient accumulation over 16 parts, rematerialization.

    python train.py configs/sd21_1gpu.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl

Hardware: meant for one GPU of 24 GB; not yet run on one (docs/training.md has the memory of compiled steps).
Expected: same steps, same effective batch, same figures as configs/sd21.py. Measured: not yet run.
"""

import dataclasses
import runpy
from pathlib import Path

published = runpy.run_path(str(Path(__file__).with_name("sd21.py")))["config"]
config = dataclasses.replace(published, out="runs/sd21_1gpu", accumulate=16, remat=True, vae_dtype="bfloat16")
