"""How much memory there is, and what to do with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Where nothing says how much is free.
ASSUMED = 4 * 2**30
# What a tile may take of what is free: the rest is for weights on their way, pictures, and errors of the estimate.
SHARE = 0.5
# Below this a tile's margin costs more than the tile.
LEAST_TILE = 64


def free_bytes(device: Any) -> int:
    """What a jax device can still allocate; for a CPU, what the machine has available."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in lines:
            return 1024 * int(lines["MemAvailable"].split()[0])
    return ASSUMED


class Footprint(NamedTuple):
    """Estimates for one batch of pictures."""

    whole: int  # bytes, done at once
    per_pixel: int  # bytes per pixel of a tile
    margin: int  # pixels a tile sees around it


def check_tile(tile: int | str) -> None:
    """Raises ValueError unless `tile` is "auto", 0, or large enough to be worth it."""
    if tile != "auto" and not (isinstance(tile, int) and (tile == 0 or tile >= LEAST_TILE)):
        raise ValueError(f"vae_tile is {tile!r}; allowed are 'auto', 0 (never) and pixels from {LEAST_TILE} on")


def choose_tile(needed: Footprint, free: int) -> int:
    """0 where the whole fits; else the largest power of two (pixels a side) whose tile fits with its margin."""
    budget = SHARE * free
    if needed.whole <= budget:
        return 0
    tile = LEAST_TILE
    while needed.per_pixel * (2 * tile + 2 * needed.margin) ** 2 <= budget:
        tile *= 2
    return tile


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Memory:
    """Remembers how large tiles may be; where memory runs out all the same, they become smaller for good."""

    def __init__(self, tile: int | str, free: int, notice: Callable[[str], None]):
        self.tile, self.free, self.notice = tile, free, notice

    def run(self, needed: Footprint, side: int, whole: Callable[[], Any], tiled: Callable[[int], Any]) -> Any:
        """`whole()`, or `tiled(tile)` with the largest tile that memory allows; `side` is the pictures' longer one."""
        while True:
            tile = self._choose(needed, side)
            try:
                return tiled(tile) if tile else whole()
            except (MemoryError, RuntimeError) as error:  # jax reports a full device as a RuntimeError
                smaller = min(tile or side, side) // 2
                if self.tile == 0 or not exhausted(error) or smaller < LEAST_TILE:
                    raise
            self.tile = smaller
            tried = f"VAE tiles of {tile}" if tile else "the whole picture"
            self.notice(f"out of memory with {tried}: now tiles of {smaller} pixels")

    def _choose(self, needed, side):
        if self.tile == "auto":
            return choose_tile(needed, self.free)
        return self.tile if side > self.tile else 0
