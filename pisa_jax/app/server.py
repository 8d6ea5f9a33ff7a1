"""The server of the page: routes, temporary files, users, start and end."""

import contextlib
import os
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fastapi
import gradio as gr
import uvicorn

from pisa_jax.app.events import Events
from pisa_jax.app.page import ASSETS, make_page
from pisa_jax.app.shared_files import PREFIX, SharedFiles
from pisa_jax.app.visitor import Visitor
from pisa_jax.app.visitors import Visitors
from pisa_jax.inference import Upscaler

# Routes of gradio that this page does not need: they write the state of a window to the disk, or ask other servers.
CLOSED = ("/gradio_api/deep_link", "/gradio_api/proxy=", "/gradio_api/stream")


class App(NamedTuple):
    """The page as an ASGI application, and the parts that tests and benchmarks look at."""

    asgi: fastapi.FastAPI
    visitors: Visitors
    files: SharedFiles


def make_app(
    upscaler: Upscaler,
    megapixels: float,
    model_options: Mapping[str, Any] | None = None,
    users: Sequence[tuple[str, str]] = (),
    max_bytes: int | None = None,
) -> App:
    """Make the application. Uploads are written to the folder of `temporary_folder`, within which this is called."""
    files = SharedFiles()
    visitors = Visitors(lambda: Visitor(upscaler, files, megapixels, model_options))
    page = make_page(Events(visitors, upscaler.adapter_names))
    page.state_session_capacity = 100  # windows whose settings gradio keeps; it never forgets one by itself
    asgi = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @asgi.middleware("http")
    async def guard(request: fastapi.Request, call_next: Callable):
        if request.url.path.startswith(CLOSED):
            return fastapi.Response(status_code=404)
        response = await call_next(request)
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @asgi.get(PREFIX + "{key}")
    def shared_file(key: str) -> fastapi.Response:
        file = files.get(PREFIX + key)
        if file is None:
            return fastapi.Response(status_code=404)
        headers = {"Cache-Control": "no-store"}
        if file.name:
            headers["Content-Disposition"] = _attachment(file.name)
        return fastapi.Response(file.data, media_type=file.media_type, headers=headers)

    gr.mount_gradio_app(
        asgi,
        page,
        path="/",
        auth=list(users) or None,
        footer_links=[],
        max_file_size=max_bytes,
        ssr_mode=False,
        show_error=True,
        theme=_theme(),
        css=(ASSETS / "viewer.css").read_text(encoding="utf-8"),
        head=f"<script>{(ASSETS / 'keys.js').read_text(encoding='utf-8')}</script>",
    )
    return App(asgi, visitors, files)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Let this process write all temporary files to a folder of its own, which is removed at the end."""
    before, cache = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="pisa_sr_app_", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            os.environ.pop("GRADIO_TEMP_DIR")
            if cache is not None:
                os.environ["GRADIO_TEMP_DIR"] = cache


def serve(app: App, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_start` gets the address. Raises OSError if the port cannot be used."""
    config = uvicorn.Config(app.asgi, host, port, log_level="warning", timeout_graceful_shutdown=2)
    socket = config.bind_socket()
    on_start(f"http://{host}:{socket.getsockname()[1]}")
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[socket])
    finally:
        app.visitors.close_all()
        socket.close()


def _attachment(name: str) -> str:
    return f"attachment; filename*=UTF-8''{urllib.parse.quote(name)}"


def _theme() -> gr.themes.Base:
    """Return a quiet theme with the fonts of the system: nothing is loaded from other servers."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    return gr.themes.Default(primary_hue="teal", neutral_hue="zinc", spacing_size="sm", font=sans, font_mono=mono)
