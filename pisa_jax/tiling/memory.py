"""Device memory: how much is free, what the VAE needs, and the tile size that follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pisa_jax.tiling.host_memory import available_bytes

# Assumed if neither the device nor the operating system reports free memory.
DEFAULT_FREE_BYTES = 4 * 2**30
# Fraction of the free memory that a tile may use. The rest is for weights in transit, images, and estimation errors.
MEMORY_FRACTION = 0.5
# Pixels; the margin of a smaller tile costs more than the tile itself.
MIN_TILE = 64

# How tiles of the VAE get the statistics of the whole image (`vae_tiles.process_in_tiles`).
TILE_MODES = ("exact", "fast")


def free_bytes(device: Any) -> int:
    """Return the bytes that a jax device can still allocate; for a CPU, what the host's memory and limits leave."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform == "cpu" and (available := available_bytes()) is not None:
        return available
    return DEFAULT_FREE_BYTES


class Footprint(NamedTuple):
    """Estimated memory of the VAE for one batch of images."""

    untiled_bytes: int  # for the whole batch without tiles
    bytes_per_pixel: int  # of a tile
    margin: int  # pixels around a tile


def check_tile(tile: int | str) -> None:
    """Raise ValueError unless `tile` is "auto", 0, or at least MIN_TILE pixels."""
    if tile != "auto" and not (isinstance(tile, int) and (tile == 0 or tile >= MIN_TILE)):
        raise ValueError(f"vae_tile is {tile!r}; allowed are 'auto', 0 (never) and pixels from {MIN_TILE} on")


def choose_tile(footprint: Footprint, free: int) -> int:
    """Return 0 if the batch fits untiled, else the largest power of two whose tile fits together with its margin.

    The tile is a side in pixels, at least MIN_TILE. `free` is in bytes.
    """
    budget = MEMORY_FRACTION * free
    if footprint.untiled_bytes <= budget:
        return 0
    tile = MIN_TILE
    while footprint.bytes_per_pixel * (2 * tile + 2 * footprint.margin) ** 2 <= budget:
        tile *= 2
    return tile


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors that Python and jax raise when memory is exhausted."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class TileSizePolicy:
    """The size of VAE tiles, fixed or chosen from the free memory; it is halved whenever memory is exhausted."""

    def __init__(self, tile: int | str, free: int, notice: Callable[[str], None]):
        self.tile, self.free, self.notice = tile, free, notice

    def execute(self, footprint: Footprint, side: int, untiled: Callable[[], Any], tiled: Callable[[int], Any]) -> Any:
        """Return `untiled()`, or `tiled(tile)` with the largest tile that fits; `side` is the images' longer side.

        Raises:
            MemoryError, RuntimeError: as `untiled` or `tiled`, if tiles are disabled or cannot become smaller.
        """
        while True:
            tile = self._choose(footprint, side)
            try:
                return tiled(tile) if tile else untiled()
            except (MemoryError, RuntimeError) as error:  # jax reports exhausted device memory as a RuntimeError
                smaller = min(tile or side, side) // 2
                if self.tile == 0 or not is_out_of_memory(error) or smaller < MIN_TILE:
                    raise
            self.tile = smaller
            attempt = f"with VAE tiles of {tile} pixels" if tile else "without VAE tiles"
            self.notice(f"out of memory {attempt}: retrying with tiles of {smaller} pixels")

    def _choose(self, footprint: Footprint, side: int) -> int:
        if self.tile == "auto":
            return choose_tile(footprint, self.free)
        return self.tile if side > self.tile else 0
