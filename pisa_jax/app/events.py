"""Functions of the page's controls: calls of `Visitor` with the values that gradio passes."""

import contextlib
import html
import itertools
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from pisa_jax.app.settings import Painted, Setting, check_range, read_area
from pisa_jax.app.visitor import Visitor
from pisa_jax.app.visitors import Visitors
from pisa_jax.cli.arguments import scales_of_adapters
from pisa_jax.cli.infer import SAMPLES
from pisa_jax.imaging.image_files import list_images
from pisa_jax.runtime.messages import error_text

LARGEST_SCALE = 2.0
MOST_CELLS = 25
STAGES = {"encode": (0.05, "encoder"), "predict": (0.25, "UNet"), "decode": (0.8, "decoder")}
FORMATS = ("auto", "png", "jpg", "webp", "tiff")


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Show every error as one line on the page."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(html.escape(error_text(error)), print_exception=False) from error


class Events:
    """The functions of the page's events. `lock` lets one of them compute at a time."""

    def __init__(self, visitors: Visitors, names: Sequence[str]):
        self.visitors, self.names, self.lock = visitors, list(names), Lock()

    def receive(self, request: gr.Request, file: dict[str, Any] | None) -> tuple[Any, None]:
        """Take an uploaded file, which gradio describes by a dict, from the disk into memory."""
        visitor = self._visitor(request)
        with _messages():
            self._receive(visitor, file)
        return visitor.view(f"Upscaling {visitor.name}"), None

    def take_sample(self, request: gr.Request, event: gr.EventData) -> Any:
        """Take a sample image."""
        visitor = self._visitor(request)
        path = next(path for path in samples() if path.stem == event.sample)
        with _messages():
            visitor.receive(path.read_bytes(), path.name)
        return visitor.view(f"Upscaling {visitor.name}")

    def open(self, request: gr.Request, factor: float | int, ext: str, *values: Any) -> tuple[Any, str]:
        """Run the encoder and the UNet, and show the first result."""
        visitor, progress = self._visitor(request), gr.Progress()
        if visitor.source is None:
            return visitor.view(), ""

        def on_stage(stage: str) -> None:
            fraction, name = STAGES[stage]
            progress(fraction, desc=name)

        with _messages(), self.lock:
            visitor.open(check_range("the upscale factor", factor, 1, 64), self._setting(None, values), on_stage)
            return visitor.view(visitor.describe()), visitor.command(ext)

    def redraw(self, request: gr.Request, ext: str, *values: Any) -> tuple[Any, str]:
        """Render the image at the values of the sliders."""
        visitor = self._visitor(request)
        if not visitor.is_open:
            return visitor.view(), ""
        with _messages(), self.lock:
            visitor.render(self._setting(visitor.area, values))
            return visitor.view(visitor.describe()), visitor.command(ext)

    def paint(self, request: gr.Request, event: gr.EventData, ext: str, *values: Any) -> tuple[Any, str]:
        """Take the painted area from the viewer, and render with it."""
        visitor = self._visitor(request)
        with _messages():
            _, _, png = str(event.png).partition(",")
            visitor.area = read_area(b64decode(png)) if png else None
        return self.redraw(request, ext, *values)

    def pin(self, request: gr.Request) -> Any:
        """Keep the shown result for the comparison."""
        visitor = self._visitor(request)
        with _messages():
            visitor.pin()
        return visitor.view("The current result is pinned; choose it under “Compare with”.")

    def sheet(self, request: gr.Request, *grids: str) -> str:
        """Make a contact sheet over all combinations of the given scales."""
        visitor, progress = self._visitor(request), gr.Progress()
        with _messages(), self.lock:
            rows = self._grid(grids)
            url = visitor.sheet(rows, lambda done: progress((done, len(rows)), desc="contact sheet", unit="images"))
        return f'<a href="{url}" download title="Save the contact sheet"><img src="{url}" alt="Contact sheet"></a>'

    def download(self, request: gr.Request, ext: str) -> Any:
        """Let the browser save the result."""
        visitor = self._visitor(request)
        with _messages(), self.lock:
            url, notes = visitor.download(ext)
        return visitor.view("; ".join([f"{visitor.files.get(url).name} is ready", *notes]), url)

    def save_map(self, adapter: str) -> Callable[[gr.Request], Any]:
        """Make the event that lets the browser save the painted map of an adapter."""

        def save(request: gr.Request) -> Any:
            visitor = self._visitor(request)
            with _messages():
                url = visitor.map_download(adapter)
            return visitor.view(f"{visitor.map_name(adapter)} is ready", url)

        return save

    def command(self, request: gr.Request, ext: str) -> str:
        """Return the command line for another output format."""
        return self._visitor(request).command(ext)

    def close(self, request: gr.Request) -> None:
        """Free the visitor whose window was closed."""
        self.visitors.close(str(request.session_hash))

    def open_file(self, request: gr.Request, file: dict[str, Any] | None, factor: float | int) -> dict[str, Any]:
        """Open an image for /render. Returns its name and the sizes [width, height] of the input and the result."""
        visitor = self._visitor(request)
        with _messages():
            self._receive(visitor, file)
        self.open(request, factor, "auto", *[1.0] * (2 * len(self.names)), 0.0)
        return visitor.sizes()

    def render_file(self, request: gr.Request, ext: str, *scales: float | int) -> str:
        """Render the opened image at other scales and return the file."""
        visitor = self._visitor(request)
        with _messages(), self.lock:
            visitor.render(self._setting(None, [*scales, *scales, 0.0]))
            path, _ = visitor.write(ext, visitor.folder())
        return str(path)

    def _visitor(self, request: gr.Request) -> Visitor:
        return self.visitors.get(str(request.session_hash))

    def _receive(self, visitor: Visitor, file: dict[str, Any] | None) -> None:
        if file is None:
            raise ValueError("there is no file; choose an image")
        path = Path(file["path"])
        visitor.receive(_take(path), path.name)

    def _setting(self, area: Any, values: Sequence[Any]) -> Setting:
        """Make a setting of the sliders: the scales, those of the painted area, and the softness of its edge."""
        count = len(self.names)
        pairs = zip(self.names * 2, values[: 2 * count], strict=True)
        scales = [check_range(name, value, 0, LARGEST_SCALE) for name, value in pairs]
        softness = check_range("the softness", values[2 * count], 0, 100)
        painted = None if area is None else Painted(area, tuple(scales[count:]), softness)
        return Setting(tuple(scales[:count]), painted)

    def _grid(self, grids: Sequence[str]) -> list[tuple[float, ...]]:
        rows = list(itertools.product(*map(scales_of_adapters, grids)))
        if len(rows) > MOST_CELLS:
            raise ValueError(f"the contact sheet would have {len(rows)} results; at most {MOST_CELLS} are allowed")
        return rows


def samples() -> list[Path]:
    """Return the files of the sample images."""
    return [SAMPLES / name for name in list_images(SAMPLES)]


def _take(path: Path) -> bytes:
    """Read an uploaded file, and remove it from the disk."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is not there any more; choose it again") from None
    with contextlib.suppress(OSError):  # another visitor may have uploaded the same file
        path.unlink()
        path.parent.rmdir()
    return data
