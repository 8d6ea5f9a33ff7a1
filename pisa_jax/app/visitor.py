"""One visitor of the page: the image, its session, and the results that the page shows. Nothing of it is on disk."""

import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from PIL import Image

from pisa_jax.app.settings import ScaleMap, Setting
from pisa_jax.app.shared_files import SharedFile, SharedFiles
from pisa_jax.cli.infer_command import infer_command
from pisa_jax.cli.infer_files import sheet_of_results
from pisa_jax.cli.infer_plan import UpscaleOptions, result_suffix
from pisa_jax.config import Scales
from pisa_jax.imaging.image_data import ImageData, ImageError, to_array, to_pil
from pisa_jax.imaging.image_files import readable_formats
from pisa_jax.imaging.image_reading import decode_image
from pisa_jax.imaging.image_writing import output_suffix, write_image
from pisa_jax.inference import Session, Upscaler
from pisa_jax.runtime.messages import number_text

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".tiff": "image/tiff"}


class Shown(NamedTuple):
    """An image of the viewer."""

    url: str
    label: str


class Visitor:
    """State of one page. `files` delivers images to this visitor only; `limit` is the largest result in megapixels.

    Methods that need an image raise ValueError where there is none. `model_options` are options of `infer_command`.
    """

    def __init__(
        self, upscaler: Upscaler, files: SharedFiles, limit: float, model_options: Mapping[str, Any] | None = None
    ):
        self.upscaler, self.files, self.limit, self.model_options = upscaler, files, limit, dict(model_options or {})
        self.name = ""
        self.source: ImageData | None = None
        self.factor = 4.0
        self.setting = Setting((1.0,) * len(upscaler.adapter_names))
        self.area: np.ndarray | None = None  # painted, for `Painted`
        self._session: Session | None = None
        self._result: ImageData | None = None
        self._shown: dict[str, Shown] = {}
        self._ids = itertools.count(1)
        self._image = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Return True once `open` has made a result."""
        return self._result is not None

    def receive(self, data: bytes, name: str) -> None:
        """Decode the content of an image file; the page shows the previous image until `open`.

        Raises:
            ImageError: not an image that `pisa-sr infer` reads, or too many pixels.
        """
        self._check_size(_header_size(data), 1.0, name)
        image = decode_image(data, name)
        self._check_size(image.rgb.shape[1::-1], 1.0, name)
        self.source, self.name = image, name

    def open(self, factor: float, setting: Setting, on_stage: Callable[[str], None] = lambda stage: None) -> None:
        """Run the encoder and the UNet on the received image, and render it.

        `on_stage` is called with "encode", "predict" and "decode" before each stage.

        Raises:
            ImageError: the result would have too many pixels.
        """
        source = self._need(self.source)
        self._check_size(source.rgb.shape[1::-1], factor, self.name)
        self._session = self._result = self.area = None  # their memory is free before that of the next ones is needed
        session = self.upscaler.open_all([source], factor, None, True, on_stage)
        jax.block_until_ready(session.eps)
        on_stage("decode")
        self._session, self.factor = session, factor
        self._forget("bicubic", "pinned", "result")
        self._image = next(self._ids)
        self.render(Setting(setting.scales))
        height, width = self._need(self._result).rgb.shape[:2]
        bicubic = to_pil(source).resize((width, height), Image.Resampling.BICUBIC)
        self._show("bicubic", f"bicubic, {number_text(factor)}x", np.asarray(bicubic.convert("RGBA")))

    def render(self, setting: Setting) -> None:
        """Decode the image at another setting: the only work is one decode of the VAE."""
        self._result = self._render(setting)
        self.setting = setting
        self._show("result", setting.label(self.upscaler.adapter_names), to_array(self._result))

    def pin(self) -> None:
        """Keep the shown result for the comparison."""
        self._need(self._result)
        url, label = self._shown["result"]
        self._publish("pinned", label, self.files.get(url))

    def sheet(self, rows: Sequence[Scales], on_progress: Callable[[int], None] = lambda done: None) -> str:
        """Make a contact sheet of the input and the results at other scales, and return its address."""
        results = []
        for index, scales in enumerate(rows):
            on_progress(index)
            results.append(self._render(Setting(scales)))
        image = sheet_of_results(self._need(self.source), results, rows)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        name = f"{Path(self.name).stem}_grid.png"
        return self._publish("sheet", name, SharedFile(file.getvalue(), "image/png", name))

    def write(self, ext: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
        """Write the shown result as `pisa-sr infer --ext` does; return the file and notes on what it does not hold."""
        source, result = self._need(self.source), self._same_as_infer()
        size = source.rgb.shape[1::-1]
        suffix = result_suffix(output_suffix(source, ext), size, UpscaleOptions(folder, self.factor, ext=ext))
        path = folder / f"{Path(self.name).stem}{suffix}"
        notes = write_image(path, result)
        return path, (*source.notes, *(note for note in notes if note not in source.notes))

    def download(self, ext: str) -> tuple[str, tuple[str, ...]]:
        """Return the address of the shown result as a file, and notes on what the file does not hold."""
        with tempfile.TemporaryDirectory() as folder:
            path, notes = self.write(ext, Path(folder))
            file = SharedFile(path.read_bytes(), MEDIA_TYPES[path.suffix], path.name)
        return self._publish("download", path.name, file), notes

    def map_files(self) -> dict[str, ScaleMap]:
        """Return the painted scale maps of the result by adapter."""
        pairs = zip(self.upscaler.adapter_names, self.setting.maps(), strict=True)
        return {name: each for name, each in pairs if isinstance(each, ScaleMap)}

    def map_download(self, adapter: str) -> str:
        """Return the address of a painted map as a gray PNG."""
        found = self.map_files().get(adapter)
        if found is None:
            raise ValueError(f"there is no map of {adapter}: paint an area, and give it another scale")
        name = self.map_name(adapter)
        return self._publish(f"map of {adapter}", name, SharedFile(found.png(), "image/png", name))

    def map_name(self, adapter: str) -> str:
        """Return the file name of a painted map, such as "photo_sem.png"."""
        return f"{Path(self.name).stem}_{adapter}.png"

    def command(self, ext: str) -> str:
        """Return the command line that writes the same file."""
        if self._result is None:
            return ""
        whites = tuple(each.white if isinstance(each, ScaleMap) else each for each in self.setting.maps())
        maps = {f"{adapter}_map": self.map_name(adapter) for adapter in self.map_files()}
        options = self.model_options | maps | {"ext": ext}
        return infer_command(input=[self.name], scale=self.factor, scales=[whites], **options)

    def view(self, status: str = "", download: str = "") -> dict[str, Any]:
        """Return what viewer.js shows."""
        if self._result is None:
            return {"status": status}
        height, width = self._result.rgb.shape[:2]
        images = {role: self._shown[role]._asdict() for role in ("bicubic", "pinned", "result") if role in self._shown}
        return {
            "image": self._image,
            "width": width,
            "height": height,
            **images,
            "status": status,
            "download": download,
        }

    def sizes(self) -> dict[str, Any]:
        """Return the name of the image, and the sizes [width, height] of the input and the result."""
        before, after = self._need(self.source).rgb.shape[1::-1], self._need(self._result).rgb.shape[1::-1]
        return {"name": self.name, "input_size": list(before), "output_size": list(after)}

    def describe(self) -> str:
        """Return `sizes` as text."""
        sizes = self.sizes()
        before, after = ("{} × {}".format(*sizes[key]) for key in ("input_size", "output_size"))
        return f"{self.name}: {before} → {after}"

    def folder(self) -> Path:
        """Return an empty folder for a file that is not loaded from memory."""
        self._close_folder()
        self._folder = tempfile.TemporaryDirectory()
        return Path(self._folder.name)

    def close(self) -> None:
        """Free everything."""
        self._closed = True
        self._session = self._result = self.source = self.area = None
        self._forget(*self._shown)
        self._close_folder()

    def _close_folder(self) -> None:
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def _same_as_infer(self) -> ImageData:
        """Return the shown result. Where all scales are 1, `pisa-sr infer` predicts once, which rounds differently."""
        result = self._need(self._result)
        if any(isinstance(each, ScaleMap) or each != 1 for each in self.setting.maps()):
            return result
        return self.upscaler.open_all([self.source], self.factor, None, False).render_all()[0]

    def _render(self, setting: Setting) -> ImageData:
        session = self._need(self._session)
        values = [each.values() if isinstance(each, ScaleMap) else each for each in setting.maps()]
        return session.render_all(*values)[0]

    def _show(self, role: str, label: str, pixels: np.ndarray) -> None:
        self._publish(role, label, SharedFile(preview_png(pixels), "image/png"))

    def _publish(self, role: str, label: str, file: SharedFile) -> str:
        """Make a file available in place of the previous one of its role, and return its address."""
        self._forget(role)
        self._shown[role] = Shown(self.files.add(file), label)
        if self._closed:  # during a computation
            self._forget(role)
            raise ValueError("this page was closed")
        return self._shown[role].url

    def _forget(self, *roles: str) -> None:
        for role in roles:
            if shown := self._shown.pop(role, None):
                self.files.remove(shown.url)

    def _check_size(self, size: tuple[int, int] | None, factor: float, name: str) -> None:
        if size is None:
            return
        megapixels = size[0] * size[1] * factor**2 / 1e6
        if megapixels <= self.limit:
            return
        what = "is too large" if factor == 1 else f"would be too large when upscaled {number_text(factor)} times"
        advice = "choose a smaller image" if factor == 1 else "choose a smaller upscale factor or image"
        raise ImageError(
            f"{name} {what}: {megapixels:.1f} megapixels, and this page takes at most {self.limit:g} "
            f"(pisa-sr app --max-megapixels); {advice}"
        )

    @staticmethod
    def _need(part: Any) -> Any:
        if part is None:
            raise ValueError("there is no image; open one first")
        return part


def preview_png(pixels: np.ndarray) -> bytes:
    """Encode a uint8 image (h, w[, 2|3|4]) without loss, as fast as possible: results are compared by their pixels."""
    if pixels.ndim == 3 and pixels.shape[2] == 2:
        pixels = np.dstack([pixels[..., :1]] * 3 + [pixels[..., 1:]])
    if pixels.ndim == 3:
        order = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
        pixels = cv2.cvtColor(pixels, order)
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _header_size(data: bytes) -> tuple[int, int] | None:
    """Read (width, height) without the pixels; None for what only the decoder can tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise ImageError(f"{error} pisa-sr app --max-megapixels allows more") from None
    except Exception:  # Pillow raises arbitrary exceptions on damaged data, and the decoder explains them better
        return None
