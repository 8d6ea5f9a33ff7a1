"""Record pyiqa's PSNR and SSIM of the image pairs in this folder; needs pyiqa, in an environment of its own.

    python make.py [FOLDER]

FOLDER holds `SR/` and `HR/` (default: this folder); `metrics.json` is written beside them. Both metrics are those of Y,
as published for super-resolution.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pyiqa.archs.psnr_arch import psnr
from pyiqa.archs.ssim_arch import SSIM

LUMA = {"test_y_channel": True, "color_space": "ycbcr"}


def read(path: Path) -> torch.Tensor:
    """The image as (1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)[None] / 255)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    found = {}
    for path in sorted((folder / "SR").iterdir()):
        sr, hr = read(path), read(folder / "HR" / path.name)
        values = {"PSNR": psnr(sr, hr, **LUMA), "SSIM": SSIM(**LUMA)(sr, hr)}
        found[path.name] = {name: round(float(value), 6) for name, value in values.items()}
    (folder / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
