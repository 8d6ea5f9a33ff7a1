"""The page in a real browser: headless Chromium."""

import base64
import shlex
import time

import numpy as np
import pytest
from page_server import SECONDS, Window, open_browser, save_image, serve_page, write_model
from PIL import Image

from pisa_jax.cli import infer

pytestmark = pytest.mark.filterwarnings("ignore:::gradio", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser, model):
    with serve_page(model) as page:
        yield page


@pytest.fixture
def open_window(browser, served):
    windows = []

    def make(**options):
        windows.append(Window(browser, served.address, **options))
        return windows[-1]

    yield make
    for window in windows:
        window.close()


@pytest.fixture
def photo(tmp_path):
    text = Image.Exif()
    text[0x010E] = "a test"  # ImageDescription
    return save_image(tmp_path / "photo.jpg", exif=text, quality=95)


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sliders_redraw_and_have_effects_of_their_own(open_window, served, photo):
    window = open_window()
    window.upload(photo)
    first, compiled = window.pixels(), list(served.compiled)
    assert first.shape == (32, 40, 3)
    assert window.pixels("before").shape == first.shape
    pix = window.drag("scale-pix", 0)
    assert window.page.inner_text(".after-tag") == "pix 0, sem 1"
    both = window.drag("scale-sem", 0)
    assert window.page.inner_text(".after-tag") == "pix 0, sem 0"
    again = window.drag("scale-pix", 0.5)
    assert window.page.inner_text(".after-tag") == "pix 1, sem 0"
    images = [first, pix, both, again]
    assert all((one != other).any() for i, one in enumerate(images) for other in images[:i])
    np.testing.assert_array_equal(window.drag("scale-sem", 0.5), first)
    assert served.compiled == compiled


def test_zoom_shows_the_same_place_on_both_sides(open_window, photo):
    window = open_window()
    window.upload(photo)
    page, sizes = window.page, {}
    for zoom in ("fit", "1", "4"):
        page.click(f"[data-zoom='{zoom}']")
        boxes = [page.locator(f".viewer img.{image}").bounding_box() for image in ("before", "after")]
        assert boxes[0] == boxes[1]
        sizes[zoom] = boxes[0]["width"]
    assert sizes["1"] == pytest.approx(40)
    assert sizes["4"] == pytest.approx(160)
    box = page.locator(".divider").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + 60, steps=3)
    page.mouse.up()
    # 40 pixels right of the middle of an image of 160 pixels: three quarters are the left image.
    assert page.evaluate("parseFloat(document.querySelector('img.before').style.clipPath.split('100% - ')[1])") == (
        pytest.approx(120, abs=1.5)
    )


def test_pinned_result_is_compared(open_window, photo):
    window = open_window()
    window.upload(photo)
    pinned = window.pixels()
    window.page.click(".pin")
    window.page.wait_for_selector(".against option[value=pinned]:not([disabled])", state="attached")
    window.drag("scale-sem", 0)
    bicubic = window.shown("before")
    window.page.select_option(".against", "pinned")
    # The label is there before the image is drawn.
    np.testing.assert_array_equal(window.wait_for_another(bicubic, "before"), pinned)
    assert window.page.inner_text(".before-tag") == "pix 1, sem 1"


def paint(window):
    """Paint over the left half of the image."""
    page = window.page
    before = window.shown()
    page.click(".paint")
    page.fill(".size input", "25")
    box = page.locator(".mask").bounding_box()
    page.mouse.move(box["x"], box["y"])
    page.mouse.down()
    for x, y in ((0, 0.99), (0.15, 0.99), (0.15, 0), (0.3, 0), (0.3, 0.99)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
    page.mouse.up()
    window.wait_for_another(before)


def run_command(command, tmp_path, folder):
    words = shlex.split(command)
    assert words[:2] == ["pisa-sr", "infer"]
    files = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words[2:]]
    assert infer.main([*files, "-o", str(folder), "--compile-cache", "off"]) == 0


def save(window, click, folder):
    with window.page.expect_download() as download:
        click()
    folder.mkdir(exist_ok=True)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


GIVE = """([kind, name, base64]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    const event = kind === "drop"
        ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
    document.querySelector(".viewer .empty").dispatchEvent(event);
}"""


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_dropped_and_pasted_images(open_window, tmp_path, kind):
    window, path = open_window(), save_image(tmp_path / "given.png")
    window.page.evaluate(GIVE, [kind, path.name, base64.b64encode(path.read_bytes()).decode()])
    assert window.wait_for_another("").shape == (32, 40, 3)
    assert "given.png" in window.command()


def test_the_command_line_is_copied(open_window, photo):
    window = open_window(permissions=["clipboard-read", "clipboard-write"])
    window.upload(photo)
    window.page.click("#command button")
    wait_until(lambda: window.page.evaluate("navigator.clipboard.readText()") == window.command())


def test_painted_map_download_and_command_line(open_window, photo, tmp_path):
    window = open_window()
    window.upload(photo)
    everywhere = window.pixels().astype(int)
    paint(window)
    before = window.shown()
    window.slider("softness").press("Home")
    window.wait_for_another(before)
    assert window.page.inner_text(".after-tag") == "pix 1, sem 1 (painted 0)"
    window.drag("painted-sem", 1)
    painted = window.drag("painted-sem", 0).astype(int)
    changed = np.abs(painted - everywhere).mean((0, 2))
    assert changed[:10].mean() > 2 * changed[-10:].mean()  # normalization spreads a little of it everywhere
    saved_map = save(window, lambda: window.page.click("text=Save sem map"), photo.parent)
    gray = np.asarray(Image.open(saved_map))
    assert gray[:, : gray.shape[1] // 4].max() == 0
    assert gray[:, gray.shape[1] // 2 :].min() == 255
    saved = save(window, lambda: window.page.click("#download"), tmp_path / "saved")
    assert saved.suffix == ".jpg"
    assert Image.open(saved).getexif()[0x010E] == "a test"
    downloaded = saved.read_bytes()
    assert "--sem-map photo_sem.png" in window.command()
    run_command(window.command(), photo.parent, tmp_path / "out")
    assert (tmp_path / "out" / "photo.jpg").read_bytes() == downloaded


@pytest.mark.parametrize(("ext", "suffix"), [("png", ".png"), ("tiff", ".tiff"), ("webp", ".webp")])
def test_download_at_scale_one_equals_the_command_line(open_window, photo, tmp_path, ext, suffix):
    window = open_window()
    window.upload(photo)
    window.page.click("#format input")
    window.page.click(f"[role=option] >> text={ext}")
    window.page.wait_for_function("document.querySelector('#command textarea').value.includes('--ext')")
    saved = save(window, lambda: window.page.click("#download"), tmp_path / "saved")
    assert saved.suffix == suffix
    run_command(window.command(), photo.parent, tmp_path / "out")
    assert (tmp_path / "out" / saved.name).read_bytes() == saved.read_bytes()


def test_contact_sheet(open_window, photo):
    window = open_window()
    window.upload(photo)
    window.page.click("#sheet button >> nth=0")
    window.page.click("text=Make a contact sheet")
    image = window.page.locator(".contact-sheet img")
    image.wait_for()
    assert window.load_pixels(image.get_attribute("src")).shape[1] > 4 * 40


def test_reload_and_close_free_the_session(open_window, served, photo):
    wait_until(lambda: len(served.app.visitors) == 0)
    window = open_window()
    window.upload(photo)
    assert len(served.app.visitors) == 1
    assert len(served.app.files) == 2
    window.load()
    wait_until(lambda: len(served.app.visitors) == 0)
    assert len(served.app.files) == 0
    assert window.shown() == ""
    window.upload(photo)
    window.context.close()
    wait_until(lambda: len(served.app.visitors) == 0)
    assert len(served.app.files) == 0
    assert [path for path in served.folder.rglob("*") if path.is_file()] == []


def test_phone(open_window, photo):
    window = open_window(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    window.upload(photo)
    page = window.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".stage").bounding_box()["width"] > 340
    slider = window.slider("scale-sem")
    slider.scroll_into_view_if_needed()
    slider.tap()  # draws a result, too, which the next one may replace at any time
    slider.evaluate("s => { s.value = 0; s.dispatchEvent(new Event('input', {bubbles: true})); }")
    slider.dispatch_event("pointerup")
    window.wait_for_label("pix 1, sem 0")


def tab_to(page, selector, key="Tab"):
    """Press a key until the focus is on an element of a selector."""
    for _ in range(60):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
            return
    raise AssertionError(f"{key} does not reach {selector}")


def test_keyboard_only(open_window):
    window = open_window()
    page = window.page
    tab_to(page, "#factor")
    page.keyboard.press("Space")  # 1: this server refuses the samples upscaled 4 times
    tab_to(page, "[data-sample]", "Shift+Tab")
    page.keyboard.press("Enter")
    window.wait_for_another("")
    tab_to(page, "#scale-sem input[type=range]")
    page.keyboard.press("Home")
    window.wait_for_label("pix 1, sem 0")
    tab_to(page, ".divider")
    page.keyboard.press("End")
    assert page.get_attribute(".divider", "aria-valuenow") == "100"
    before = window.shown()
    tab_to(page, ".paint")
    page.keyboard.press("Enter")  # the focus moves to the image
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    window.wait_for_another(before)
    tab_to(page, "#painted-sem input[type=range]")
    page.keyboard.press("End")
    window.wait_for_label("pix 1, sem 0 (painted 2)")
    tab_to(page, "#scale-sem input[type=number]", "Shift+Tab")
    page.keyboard.type("0.5")  # reaching the field by the keyboard has selected its number
    page.keyboard.press("Enter")
    window.wait_for_label("pix 1, sem 0.5 (painted 2)")
    tab_to(page, "#download")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename.endswith(".png")


def test_refused_files(open_window, served, tmp_path, photo):
    window = open_window()
    page = window.page
    large = save_image(tmp_path / "large.png", 300, 300)
    page.set_input_files("#upload input[type=file]", large)
    assert "large.png is too large: 0.1 megapixels, and this page takes at most 0.05" in window.message()
    text = tmp_path / "note.txt"
    text.write_text("no image")
    page.set_input_files("#upload input[type=file]", text)
    assert "note.txt is not an image in a supported format" in window.message()
    broken = tmp_path / "broken.png"
    broken.write_bytes(save_image(tmp_path / "whole.png").read_bytes()[:80])
    page.set_input_files("#upload input[type=file]", broken)
    assert "broken.png is damaged" in window.message()
    middle = save_image(tmp_path / "middle.png", 80, 80)
    page.set_input_files("#upload input[type=file]", middle)
    assert "middle.png would be too large when upscaled 4 times" in window.message()
    assert window.shown() == ""
    page.click("#factor input[value='2']")
    assert window.wait_for_another("").shape == (160, 160, 3)
    window.upload(photo)
    assert [path for path in served.folder.rglob("*") if path.is_file()] == []


def test_two_windows_do_not_share_images(open_window, served, tmp_path):
    windows = [open_window(), open_window()]
    paths = [save_image(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate(("one", "two"))]
    for window, path in zip(windows, paths, strict=True):
        window.page.set_input_files("#upload input[type=file]", path)
    images = [window.wait_for_another("") for window in windows]
    assert (images[0] != images[1]).any()
    labels = [window.page.inner_text(".status") for window in windows]
    assert "one.png" in labels[0]
    assert "two.png" in labels[1]
    assert not {window.shown() for window in windows} & set(windows[0].requests) & set(windows[1].requests)
    np.testing.assert_array_equal(windows[0].drag("scale-sem", 0), windows[0].pixels())
    np.testing.assert_array_equal(windows[1].pixels(), images[1])
    alone = open_window()
    alone.upload(paths[0])
    np.testing.assert_array_equal(alone.pixels(), images[0])


def test_dark_and_light(open_window):
    def background(scheme):
        window = open_window(color_scheme=scheme)
        color = window.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.strip("rgba()").split(",")[:3])) / 3

    assert background("dark") < 60
    assert background("light") > 200
