"""The page of `pisa-sr app` in this process, with a tiny random model, and a browser to use it."""

import contextlib
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from pisa_jax import Upscaler
from pisa_jax.sd import random_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 120  # the longest wait for a computation, on a busy machine


class RunningPage(NamedTuple):
    """A page that is served, and what happened in it."""

    address: str
    app: object
    compiled: list[str]
    folder: Path


@contextlib.contextmanager
def serve_page(model: Path, megapixels: float = 0.05, **options) -> Iterator[RunningPage]:
    """Serve the page of a model folder on a free port; skips the test without gradio."""
    pytest.importorskip("gradio", reason="needs pip install gradio")
    from pisa_jax.app.server import Server, bind, make_app, temporary_folder

    compiled: list[str] = []
    upscaler = Upscaler.load(
        model, model / "adapters.safetensors", min_size=32, on_compile=lambda what, seconds: compiled.append(what)
    )
    shown = {"model": str(model), "adapters": [str(model / "adapters.safetensors")], "min_size": 32}
    with temporary_folder() as folder:
        app = make_app(upscaler, megapixels, shown, **options)
        bound, address = bind("127.0.0.1", 0)
        server = Server(app, bound)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        yield RunningPage(address, app, compiled, Path(folder))
        server.should_exit = True
        thread.join(SECONDS)


def write_model(folder: Path) -> Path:
    """Write a tiny random model with adapters."""
    random_model.write_random_model(folder, "nano")
    return folder


def save_image(path: Path, height: int = 8, width: int = 10, seed: int = 0, **options) -> Path:
    """Write an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@contextlib.contextmanager
def open_browser() -> Iterator[object]:
    """Start headless Chromium; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Window:
    """One window of the browser that shows the page."""

    def __init__(self, browser, address: str, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        self.context.set_default_timeout(SECONDS * 1000)
        self.requests, self.problems = [], []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.address = address
        self.load()

    def load(self) -> None:
        self.page.goto(self.address)
        self.page.wait_for_selector(".viewer .bar")

    def shown(self, image: str = "after") -> str:
        """Address of an image that is drawn: "before" or "after"; "" for none."""
        return self.page.evaluate(f"document.querySelector('.viewer img.{image}').dataset.shown || ''")

    def pixels(self, image: str = "after") -> np.ndarray:
        """Pixels of an image that is drawn."""
        return self.load_pixels(self.shown(image))

    def load_pixels(self, url: str) -> np.ndarray:
        import io

        response = self.context.request.get(self.address + url)
        assert response.ok
        return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"))

    def upload(self, path: Path) -> None:
        """Choose a file, and wait for its result."""
        before = self.shown()
        self.page.set_input_files("#upload input[type=file]", path)
        self.wait_for_another(before)

    def wait_for_another(self, before: str, image: str = "after") -> np.ndarray:
        """Wait until another image than that of the address `before` is drawn, and return it."""
        drawn = f"document.querySelector('.viewer img.{image}').dataset.shown"
        self.page.wait_for_function(f"before => ![undefined, '', before].includes({drawn})", arg=before)
        return self.pixels(image)

    def wait_for_label(self, label: str) -> None:
        """Wait until a result with a label is drawn."""
        self.page.wait_for_function("text => document.querySelector('.after-tag').textContent === text", arg=label)

    def slider(self, name: str):
        return self.page.locator(f"#{name} input[type=range]")

    def drag(self, name: str, to: float) -> np.ndarray:
        """Drag a slider with the mouse to a part of its length, release it, and return the new result."""
        before, box = self.shown(), self.slider(name).bounding_box()
        y = box["y"] + box["height"] / 2
        knob = self.slider(name).evaluate("s => (s.value - s.min) / (s.max - s.min)")
        self.page.mouse.move(box["x"] + 8 + knob * (box["width"] - 16), y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + 8 + to * (box["width"] - 16), y, steps=4)
        self.page.mouse.up()
        return self.wait_for_another(before)

    def message(self) -> str:
        """Wait for a message of an error, and close it."""
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        text = re.sub(r"\s+", " ", toast.inner_text())
        self.page.locator(".toast-close").first.click()
        toast.wait_for(state="detached")
        return text

    def command(self) -> str:
        return self.page.input_value("#command textarea")

    def close(self) -> None:
        self.context.close()
        assert self.problems == []
        assert [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))] == []
