"""Results of a model for `pisa-sr evaluate`: images of one bucket are upscaled together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pisa_jax.cli.infer_plan import header_shape
from pisa_jax.config import Scales
from pisa_jax.imaging.image_data import ImageData, from_array, to_array
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.scale_maps import are_one
from pisa_jax.inference import Upscaler


class BatchUpscaler:
    """Upscales the files of an evaluation in batches; a call returns the results of one file.

    The results of the other files of a batch are kept until they are asked for.
    """

    def __init__(
        self, upscaler: Upscaler, files: Sequence[Path], scale: float | int, seed: int | None, batch_size: int
    ):
        self._upscaler, self._scale, self._seed, self._batch_size = upscaler, scale, seed, batch_size
        self._ready: dict[Path, list[np.ndarray]] = {}
        shapes = {file: shape for file in files if (shape := header_shape(file))}
        upscaler.plan_buckets(list(shapes.values()), scale)
        groups = defaultdict(list)
        for file, shape in shapes.items():
            groups[upscaler.batch_key(shape, scale)].append(file)
        batches = [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)]
        self._batch_of = {file: batch for batch in batches for file in batch}

    def __call__(self, file: Path, rows: Sequence[Scales]) -> list[np.ndarray]:
        """Return the upscaled image of a file at each row of scales; raises what its reading or upscaling raises."""
        if file not in self._ready:
            images = self._read_batch(file)
            try:
                self._ready |= self._upscale(images, rows)
            except Exception:
                if len(images) == 1:
                    raise
                # One file must not be the failure of the others.
                self._ready |= self._upscale({file: images[file]}, rows, fill=False)
        return self._ready.pop(file)

    def _read_batch(self, file: Path) -> dict[Path, ImageData]:
        """Read the files of a batch; raises for `file`, and leaves out others that cannot be read."""
        images = {}
        for each in self._batch_of.get(file, [file]):
            try:
                images[each] = from_array(read_rgb8(each))
            except Exception:  # the call for this file reports the error
                if each == file:
                    raise
        return images

    def _upscale(
        self, images: Mapping[Path, ImageData], rows: Sequence[Scales], fill: bool = True
    ) -> dict[Path, list[np.ndarray]]:
        adjustable = not all(map(are_one, rows))
        batch = list(images.values())
        if fill:
            size = batch[-1].rgb.shape[:2]
            batch += batch[-1:] * self._upscaler.filling(len(batch), self._batch_size, size, self._scale)
        session = self._upscaler.open_all(batch, self._scale, self._seed, adjustable)
        rendered = [list(map(to_array, session.render_all(*row)))[: len(images)] for row in rows]
        return {file: list(results) for file, results in zip(images, zip(*rendered, strict=True), strict=True)}
