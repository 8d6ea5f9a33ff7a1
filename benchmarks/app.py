"""The page `pisa-sr app` in headless Chromium: time from release to image, memory over random use, and its screenshot.

    python benchmarks/app.py [--side 512] [--releases 10] [--minutes 10] [--screenshot docs/app.png]

Serves the page with the demo model in a process of its own, upscales an image to `--side` pixels, and releases the
sliders again and again: prints the seconds until the browser has drawn the new image, and what was compiled meanwhile.
With `--minutes`, random use of several windows follows, and the memory of the server, its open files and threads are
compared. With `--screenshot`, only the picture of README.md is made. Needs the extra `app`, playwright and Debian's
`chromium`.
"""

import argparse
import contextlib
import itertools
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "pisa_jax" / "assets" / "demo" / "samples"
GROWTH = 64.0  # MiB that the memory of the server may grow after the warm-up
TIMEOUT = 300_000  # ms
SHOWN = "document.querySelector('.viewer img.after').dataset.shown || ''"


@contextlib.contextmanager
def served_page(log: Path) -> Iterator[tuple[str, int]]:
    """Serve the page on a free port; yields its address and the process id."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pisa_jax", "app", "--port", "0"]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield process.stdout.readline().split()[4], process.pid
        finally:
            process.terminate()


def open_page(browser: Browser, address: str, **options: Any) -> Page:
    """Open a window that shows the page."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.wait_for_selector(".viewer .bar")
    return page


def wait_for_another(page: Page, before: str) -> None:
    """Wait until another result than `before` is drawn."""
    page.wait_for_function(f"before => !['', before].includes({SHOWN})", arg=before)


def upload(page: Page, path: Path) -> None:
    """Choose an image and wait for its result."""
    before = page.evaluate(SHOWN)
    page.set_input_files("#upload input[type=file]", path)
    wait_for_another(page, before)


def release(page: Page, name: str, part: float) -> float:
    """Drag a slider to a part of its length; return the seconds from its release until the new image is drawn."""
    slider, before = page.locator(f"#scale-{name} input[type=range]"), page.evaluate(SHOWN)
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    knob = slider.evaluate("s => (s.value - s.min) / (s.max - s.min)")
    page.mouse.move(box["x"] + 8 + knob * (box["width"] - 16), y)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + part * (box["width"] - 16), y, steps=3)
    start = time.perf_counter()
    page.mouse.up()
    wait_for_another(page, before)
    return time.perf_counter() - start


def usage(process: int) -> tuple[float, int, int]:
    """Return the memory of a process in MiB, the number of its open files and of its threads."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{process}/fd")), int(fields["Threads"])


def time_releases(page: Page, image: Path, count: int, log: Path) -> bool:
    """Print the times of `count` releases; returns True if none was followed by a compilation."""
    upload(page, image)
    compiled = log.read_text().count("compiled")
    parts = itertools.cycle([0.25, 0.6, 0.0, 0.4])
    seconds = sorted(release(page, name, next(parts)) for _, name in zip(range(count), itertools.cycle(["sem", "pix"])))
    new = log.read_text().count("compiled") - compiled
    print(f"release to image: median {statistics.median(seconds):.2f} s, {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    print(f"compiled meanwhile: {new}", flush=True)
    return not new


def use_at_random(browser: Browser, address: str, process: int, images: list[Path], minutes: float) -> bool:
    """Use the page at random, with windows that come and go; returns True if memory, files and threads stay flat."""
    draw, records, end = random.Random(0), [], time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        page = open_page(browser, address)
        upload(page, draw.choice(images))
        for _ in range(draw.randint(1, 4)):
            release(page, draw.choice(["pix", "sem"]), draw.choice([0.1, 0.3, 0.7, 0.9]))
            if draw.random() < 0.3:
                page.click(".pin")
            if draw.random() < 0.3:
                with page.expect_download():
                    page.click("#download")
        page.context.close()
        records.append(usage(process))
    first, middle, last = records[len(records) // 3], records[2 * len(records) // 3], records[-1]
    flat = last[0] - first[0] <= GROWTH and last[1] - first[1] <= 8 and last[2] - first[2] <= 8
    print(f"{len(records)} windows in {minutes:g} minutes, after one and two thirds of them and at the end:")
    for name, *values in zip(("memory, MiB", "open files", "threads"), first, middle, last, strict=True):
        print(f"  {name}: {' -> '.join(f'{value:.0f}' for value in values)}")
    return flat


def take_screenshot(browser: Browser, address: str, path: Path) -> None:
    """Write the picture of README.md: a sample at pix 1, sem 1, with the border in the middle."""
    page = open_page(browser, address, viewport={"width": 1200, "height": 840})
    page.click("[data-sample=perched_osprey]")
    wait_for_another(page, "")
    page.mouse.move(5, 5)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--releases", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--screenshot", type=Path)
    arguments = parser.parse_args()
    print(f"python {platform.python_version()}, jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder, log = Path(name), Path(name) / "log"
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        images = []
        for path in SAMPLES.glob("*.png"):
            with Image.open(path) as image:
                images.append(folder / path.name)
                image.convert("RGB").resize((arguments.side // 4,) * 2).save(images[-1])
        with served_page(log) as (address, process):
            if arguments.screenshot:
                take_screenshot(browser, address, arguments.screenshot)
                return 0
            page = open_page(browser, address)
            passed = time_releases(page, images[0], arguments.releases, log)
            page.context.close()
            if arguments.minutes:
                passed &= use_at_random(browser, address, process, images, arguments.minutes)
        browser.close()
    return not passed


if __name__ == "__main__":
    sys.exit(main())
