"""The published recipe (configs/sd21.py) on one GPU of 24 GB: gradient accumulation 16 x 1 and rematerialization.

    python train.py configs/sd21_1gpu.py --data.source folder --data.path DIR --data.prompts DIR/prompts.jsonl

Hardware: meant for one GPU of 24 GB; memory not measured.
Expected: the results of configs/sd21.py, with the same steps and effective batch size. Measured: not yet run.
"""

import dataclasses
import runpy
from pathlib import Path

published = runpy.run_path(str(Path(__file__).with_name("sd21.py")))["config"]
config = dataclasses.replace(published, out="runs/sd21_1gpu", accumulate=16, remat=True, vae_dtype="bfloat16")
