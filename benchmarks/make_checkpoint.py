"""Write a Stable Diffusion checkpoint with random weights: correct shapes and sizes, results of noise.

    python benchmarks/make_checkpoint.py FOLDER              # SD 2.1-base: 866 M + 84 M + 340 M parameters, 5.2 GB
    python benchmarks/make_checkpoint.py FOLDER --size tiny  # the same architecture, 2 M parameters

The folder also contains adapters.safetensors (rank 4 + 4), so `infer.py` and `train.py` can use it.
"""

import argparse
from pathlib import Path

from pisa_jax.sd import random_model


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(random_model.SIZES), default="sd21")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    args = parser.parse_args()
    random_model.write(args.folder, args.size, dtype=args.dtype)
    print(f"wrote {args.folder} ({args.size}, {args.dtype}) and {args.folder / 'adapters.safetensors'}")


if __name__ == "__main__":
    main()
