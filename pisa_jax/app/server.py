"""The server of the page: routes, temporary files, users, start and end."""

import contextlib
import logging
import os
import socket
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fastapi
import gradio as gr
import uvicorn

from pisa_jax.app.events import Events
from pisa_jax.app.page import asset, make_page
from pisa_jax.app.shared_files import PREFIX, SharedFiles
from pisa_jax.app.visitor import Visitor
from pisa_jax.app.visitors import Visitors
from pisa_jax.inference import Upscaler

# Routes of gradio that this page does not need: they write the state of a window to the disk, or ask other servers.
CLOSED = ("/gradio_api/deep_link", "/gradio_api/proxy=", "/gradio_api/stream")
# Files that are larger than any image of the allowed size are refused before they are on the disk.
PIXEL_BYTES, METADATA_BYTES = 16, 2**24  # four float32 channels


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
) -> App:
    """Make the application. Uploads are written to the folder of `temporary_folder`, within which this is called."""
    files = SharedFiles()
    visitors = Visitors(lambda: Visitor(upscaler, files, megapixels, model_options))
    page = make_page(Events(visitors, upscaler.adapter_names))
    page.state_session_capacity = 100  # windows whose settings gradio keeps; it never forgets one by itself
    # Only `launch` sets this, and without it gradio takes any path on this machine for an uploaded file.
    page.has_launched = True
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
        max_file_size=int(megapixels * 1e6 * PIXEL_BYTES) + METADATA_BYTES,
        ssr_mode=False,
        show_error=True,
        theme=_theme(),
        css=asset("viewer.css"),
        head=f"<style>{asset('page.css')}</style><script>{asset('keys.js')}</script>",
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


class Server(uvicorn.Server):
    """The server of an `App` on a socket. `run` serves until SIGINT, SIGTERM or `should_exit`."""

    def __init__(self, app: App, bound: socket.socket):
        super().__init__(uvicorn.Config(app.asgi, log_level="warning", timeout_graceful_shutdown=1))
        self._app, self._bound = app, bound

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and free everything at the end."""
        try:
            super().run([self._bound])
        finally:
            self._app.visitors.close_all()
            self._bound.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop. An open window keeps a stream of events open: that it is cut off is no error to report."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> tuple[socket.socket, str]:
    """Bind a socket to a port (0: any free one); return it and the address of the page.

    Raises:
        OSError: the address or the port cannot be used.
    """
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"{shown}:{port} cannot be used: {error}; choose another --host or --port") from None
    return bound, f"http://{shown}:{bound.getsockname()[1]}"


def _attachment(name: str) -> str:
    return f"attachment; filename*=UTF-8''{urllib.parse.quote(name)}"


def _theme() -> gr.themes.Base:
    """Return a quiet theme with the fonts of the system: nothing is loaded from other servers."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    return gr.themes.Default(primary_hue="teal", neutral_hue="zinc", spacing_size="sm", font=sans, font_mono=mono)
