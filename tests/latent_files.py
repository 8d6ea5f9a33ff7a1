"""Folders of latents for tests."""

import numpy as np

from pisa_jax.data.latents import LATENT_FILES, NAMES_FILE


def write_latents(folder, count=3, side=8, channels=8, seed=0):
    """Write random float16 latents of `count` pairs; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in LATENT_FILES:
        np.save(folder / name, rng.standard_normal((count, side, side, channels)).astype(np.float16))
    (folder / NAMES_FILE).write_text("".join(f"{index}.png\n" for index in range(count)))
    return folder
