"""The buckets whose programs are in the compilation cache: a file in its folder, so that later runs reuse them."""

import argparse
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from pisa_jax import __version__
from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.tiling.buckets import Size

FILE = "buckets.json"
# Options that decide which programs are compiled for a bucket.
OPTIONS = (
    "model",
    "adapters",
    "color_fix",
    "tile",
    "overlap",
    "vae_tile",
    "vae_tile_mode",
    "devices",
    "dtype",
    "vae_dtype",
)


class KnownBuckets:
    """The known buckets for the options of a command line, in the folder of the compilation cache."""

    def __init__(self, cache: Path, args: argparse.Namespace, adjustable: bool, batch_size: int):
        import jax

        device = jax.devices()[0].device_kind
        options = {name: getattr(args, name) for name in OPTIONS} | {"adjustable": adjustable, "batch": batch_size}
        self._key = json.dumps([__version__, jax.__version__, device, options], default=str)
        self._file = cache / FILE

    def read(self) -> list[Size]:
        """Return the buckets; none if the file does not exist or is damaged: they are compiled again."""
        return [(int(height), int(width)) for height, width in self._read_all().get(self._key, [])]

    def add(self, buckets: Iterable[Size]) -> None:
        """Record further buckets, where the folder can be written."""
        known = self._read_all()
        known[self._key] = sorted({*map(tuple, known.get(self._key, [])), *buckets})
        with contextlib.suppress(OSError), atomic_write(self._file) as file:
            file.write_text(json.dumps(known, indent=1))

    def _read_all(self) -> dict[str, list]:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
