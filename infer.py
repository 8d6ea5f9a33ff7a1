"""Upscale photographs: `python infer.py -i photo.jpg -o out --scales 1,0.7`; without arguments: the four samples."""

import sys

from pisa_jax.cli.infer import main

if __name__ == "__main__":
    sys.exit(main())
