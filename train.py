"""Train adapters: `python train.py configs/sd21.py --data.source folder --data.path DIR`; `--help` lists all fields."""

import sys

from pisa_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
