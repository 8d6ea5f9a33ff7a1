"""Layout of the page: the viewer, and few controls beside it."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from pisa_jax.app.events import FORMATS, LARGEST_SCALE, Events, samples
from pisa_jax.cli.infer import MAPPED

ASSETS = Path(__file__).parents[1] / "assets" / "app"
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one computation at a time
ABOUT = {
    "pix": "fidelity: removes blur, noise and compression artifacts",
    "sem": "semantic detail: adds texture",
}


class Controls(NamedTuple):
    """Components of the page."""

    viewer: gr.HTML
    upload: gr.File
    samples: gr.HTML
    factor: gr.Radio
    scales: list[gr.Slider]
    area: gr.Accordion
    painted: list[gr.Slider]
    softness: gr.Slider
    maps: dict[str, gr.Button]
    grids: list[gr.Textbox]
    sheet_button: gr.Button
    sheet: gr.HTML
    ext: gr.Dropdown
    save: gr.Button
    command: gr.Textbox


def make_page(events: Events) -> gr.Blocks:
    """Make the page of the adapters `events.names`."""
    with gr.Blocks(title="pisa_jax", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                viewer = gr.HTML(
                    {},
                    html_template=asset("viewer.html"),
                    js_on_load=asset("viewer.js"),
                    apply_default_css=False,
                    elem_id="viewer",
                )
            with gr.Column(scale=2, min_width=290, elem_id="controls"):
                controls = _make_controls(viewer, events.names)
        _connect_api(events)  # first: the names of its endpoints are free
        _connect(controls, events)
        page.unload(events.close)
    return page.queue(default_concurrency_limit=1, api_open=False, max_size=64)


def _make_controls(viewer: gr.HTML, names: Sequence[str]) -> Controls:
    upload = gr.File(label="Image", height=110, elem_id="upload")
    thumbnails = gr.HTML(_thumbnails(), js_on_load=asset("samples.js"), apply_default_css=False, elem_id="samples")
    factor = gr.Radio([1, 2, 3, 4], value=4, label="Upscale factor", elem_id="factor")
    scales = [_slider(name, ABOUT.get(name), f"scale-{name}") for name in names]
    with gr.Accordion("Scales in the painted area", open=False, elem_id="area") as area:
        gr.Markdown("Paint on the image: these scales apply there.")
        painted = [
            _slider(f"{name}, painted", None, f"painted-{name}", 0.0 if name == "sem" else 1.0) for name in names
        ]
        softness = gr.Slider(
            0, 20, 4, step=0.5, label="Softness of the edge (% of the shorter side)", elem_id="softness"
        )
        with gr.Row():
            maps = {name: gr.Button(f"Save {name} map", size="sm") for name in names if name in MAPPED}
    with gr.Accordion("Contact sheet", open=False, elem_id="sheet"):
        with gr.Row():
            grids = [gr.Textbox("0, 0.5, 1" if name == "sem" else "1", label=name, min_width=80) for name in names]
        sheet_button = gr.Button("Make a contact sheet", size="sm")
        sheet = gr.HTML(elem_classes="contact-sheet")
    with gr.Row(equal_height=True):
        ext = gr.Dropdown(list(FORMATS), value="auto", label="Format", min_width=90, elem_id="format")
        save = gr.Button("Download", variant="primary", min_width=120, elem_id="download")
    command = gr.Textbox(
        label="The same on the command line", interactive=False, lines=2, buttons=["copy"], elem_id="command"
    )
    return Controls(
        viewer,
        upload,
        thumbnails,
        factor,
        scales,
        area,
        painted,
        softness,
        maps,
        grids,
        sheet_button,
        sheet,
        ext,
        save,
        command,
    )


def _connect(c: Controls, events: Events) -> None:
    values = [*c.scales, *c.painted, c.softness]
    shown: dict[str, Any] = {"outputs": [c.viewer, c.command], "api_visibility": "private"}
    # Not "queue": False, for which gradio does not show the messages of errors.
    quick = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    opening = {"fn": events.open, "inputs": [c.factor, c.ext, *values], "show_progress_on": c.viewer, **shown, **MODEL}
    # Without preprocessing: that of gr.File leaves an empty temporary file behind.
    received = [
        c.upload.upload(events.receive, c.upload, [c.viewer, c.upload], preprocess=False, **quick),
        c.samples.sample(events.take_sample, None, c.viewer, **quick),
    ]
    for event in received:
        event.success(**opening)
    received[0].failure(lambda: None, None, c.upload, **quick)  # the next file can be chosen
    c.factor.input(**opening, trigger_mode="always_last")
    drawing = {"inputs": [c.ext, *values], "trigger_mode": "always_last", "show_progress": "minimal", **shown, **MODEL}
    gr.on([slider.release for slider in values], events.redraw, show_progress_on=c.viewer, **drawing)
    c.viewer.mask(events.paint, **drawing)
    c.viewer.brush(lambda: gr.Accordion(open=True), None, c.area, **quick)
    c.viewer.pin(events.pin, None, c.viewer, **quick)
    c.save.click(events.download, c.ext, c.viewer, api_visibility="private", show_progress="minimal", **MODEL)
    c.sheet_button.click(events.sheet, c.grids, c.sheet, api_visibility="private", **MODEL)
    for name, button in c.maps.items():
        button.click(events.save_map(name), None, c.viewer, **quick)
    c.ext.change(events.command, c.ext, c.command, **quick)


def _connect_api(events: Events) -> None:
    """Add the endpoints for gradio_client, which have no controls on the page."""
    file, factor = gr.File(visible=False), gr.Number(4, label="factor", visible=False)
    opened, result = gr.JSON(visible=False), gr.File(visible=False)
    scales = [gr.Number(1, label=name, visible=False) for name in events.names]
    ext = gr.Dropdown(list(FORMATS), value="png", label="format", visible=False)
    trigger = gr.Button(visible=False)
    trigger.click(events.open_file, [file, factor], opened, preprocess=False, api_name="open", **MODEL)
    trigger.click(events.render_file, [ext, *scales], result, api_name="render", **MODEL)


def _slider(label: str, info: str | None, elem_id: str, value: float = 1.0) -> gr.Slider:
    return gr.Slider(0, LARGEST_SCALE, value, step=0.05, label=label, info=info, elem_id=elem_id)


def asset(name: str) -> str:
    """Read a file of the page."""
    return (ASSETS / name).read_text(encoding="utf-8")


def _thumbnails() -> str:
    buttons = []
    for path in samples():
        file = io.BytesIO()
        with Image.open(path) as sample:
            sample.convert("RGB").save(file, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        text = path.stem.replace("_", " ")
        image = f'<img src="{source}" alt="Sample: {text}">'
        buttons.append(f'<button type="button" data-sample="{path.stem}" title="{text}">{image}</button>')
    return f'<div class="samples">{"".join(buttons)}</div>'
