"""Tile sizes chosen from the free memory, and reduced when memory is exhausted."""

import jax
import pytest

from pisa_jax.inference import Settings
from pisa_jax.tiling import memory

FOOTPRINT = memory.Footprint(untiled_bytes=1, bytes_per_pixel=1, margin=0)


def tiled_up_to(limit):
    """Return a function of a tile size that runs out of memory above `limit`."""

    def tiled(tile):
        if tile > limit:
            raise MemoryError
        return tile

    return tiled


def test_tiles_are_halved_until_they_fit_and_stay_small():
    notices = []
    policy = memory.TileSizePolicy(512, 0, notices.append)
    for _ in range(2):
        assert policy.execute(FOOTPRINT, 2000, lambda: None, tiled_up_to(128)) == 128
    assert notices == [
        f"out of memory with VAE tiles of {tile} pixels: retrying with tiles of {tile // 2} pixels"
        for tile in (512, 256)
    ]


def test_images_smaller_than_the_tile_are_not_tiled():
    policy = memory.TileSizePolicy(512, 0, pytest.fail)
    assert policy.execute(FOOTPRINT, 512, lambda: "untiled", pytest.fail) == "untiled"


def exhaust():
    raise MemoryError


def test_errors_are_raised_when_no_smaller_tile_is_possible():
    with pytest.raises(MemoryError):  # half of 100 pixels is less than the smallest tile
        memory.TileSizePolicy(128, 0, pytest.fail).execute(FOOTPRINT, 100, exhaust, pytest.fail)
    with pytest.raises(MemoryError):  # tiles are disabled
        memory.TileSizePolicy(0, 0, pytest.fail).execute(FOOTPRINT, 2000, exhaust, pytest.fail)


def test_other_errors_are_raised():
    def fail(tile):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        memory.TileSizePolicy(512, 0, pytest.fail).execute(FOOTPRINT, 2000, exhaust, fail)


def test_jax_errors_of_exhausted_device_memory_are_recognized():
    assert memory.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("INVALID_ARGUMENT"))


def test_auto_chooses_no_tiles_if_the_image_fits_and_the_largest_tile_otherwise():
    footprint = memory.Footprint(untiled_bytes=4096 * 2048**2, bytes_per_pixel=4096, margin=96)
    assert memory.choose_tile(footprint, 2 * footprint.untiled_bytes) == 0
    free = 8 * 2**30
    tile = memory.choose_tile(footprint, free)
    assert tile == 512
    assert 4096 * (tile + 192) ** 2 <= memory.MEMORY_FRACTION * free < 4096 * (2 * tile + 192) ** 2
    assert memory.choose_tile(footprint, 0) == memory.MIN_TILE


def test_free_memory_of_a_device_is_reported():
    assert memory.free_bytes(jax.devices()[0]) > 2**20


@pytest.mark.parametrize("tile", [-1, 63, "big"])
def test_invalid_tiles_are_refused(tile):
    with pytest.raises(ValueError, match=f"vae_tile is {tile!r}; allowed are 'auto', 0 .never. and pixels from 64 on"):
        memory.check_tile(tile)


def test_an_invalid_tile_mode_is_refused():
    with pytest.raises(ValueError, match="vae_tile_mode is 'exakt'; allowed are exact, fast"):
        Settings(vae_tile_mode="exakt")
