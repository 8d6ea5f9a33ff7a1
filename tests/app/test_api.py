"""The server of the page without a browser: gradio_client, files of others, login, and the end of the process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from page_server import SECONDS, save_image, serve_page, write_model
from PIL import Image

from pisa_jax import Upscaler

gradio_client = pytest.importorskip("gradio_client", reason="needs pip install gradio")
pytestmark = pytest.mark.filterwarnings("ignore:::gradio", "ignore:::gradio_client", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model):
    with serve_page(model) as page:
        yield page


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_example_of_the_documentation(served, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "photo.jpg", quality=95)
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(snippet.replace("http://127.0.0.1:7860", served.address), names)
    assert names["sizes"] == {"name": "photo.jpg", "input_size": [10, 8], "output_size": [40, 32]}
    upscaler = Upscaler.load(model, model / "adapters.safetensors", min_size=32)
    expected = upscaler.open("photo.jpg").render(1.0, 0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(names["file"])), np.asarray(expected))
    with pytest.raises(gradio_client.exceptions.AppError, match="sem is 3; allowed are numbers from 0 to 2"):
        names["client"].predict("png", 1.0, 3, api_name="/render")
    names["client"].close()


def test_files_of_others_cannot_be_loaded(served, tmp_path):
    outside = tmp_path / "secret.png"
    save_image(outside)
    for path in (outside, served.folder, served.folder / "none.png", ROOT / "setup.cfg"):
        assert status(f"{served.address}/gradio_api/file={path}") == 403
    assert status(f"{served.address}/pisa-files/anything") == 404
    assert status(f"{served.address}/gradio_api/deep_link?session_hash=a") == 404
    assert status(f"{served.address}/gradio_api/proxy=http://127.0.0.1") == 404


def test_a_path_on_the_server_is_no_upload(served, tmp_path):
    save_image(tmp_path / "secret.png")
    client = gradio_client.Client(served.address, verbose=False)
    config = {each["api_name"]: each["id"] for each in client.config["dependencies"]}
    file = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file, 4], "session_hash": "stranger", "fn_index": config["open"]}
    api = f"{served.address}/gradio_api/queue"
    urllib.request.urlopen(
        urllib.request.Request(f"{api}/join", json.dumps(body).encode(), {"content-type": "application/json"})
    ).close()
    with urllib.request.urlopen(f"{api}/data?session_hash=stranger", timeout=SECONDS) as events:
        answers = [json.loads(line.removeprefix(b"data:")) for line in events if line.startswith(b"data:")]
    (end,) = (answer for answer in answers if answer["msg"] == "process_completed")
    assert not end["success"]
    assert "was not uploaded" in end["output"]["error"]
    client.close()


def test_login(model):
    with serve_page(model, users=[("ann", "secret")]) as page:
        assert status(f"{page.address}/config") == 401
        with pytest.raises(Exception, match=r"(?i)401|auth|login"):
            gradio_client.Client(page.address, verbose=False)
        client = gradio_client.Client(page.address, auth=("ann", "secret"), verbose=False)
        assert {"/open", "/render"} == set(client.view_api(return_format="dict")["named_endpoints"])
        client.close()


def test_sigterm_removes_the_temporary_folder(model, tmp_path):
    command = [sys.executable, "-m", "pisa_jax", "app", "--port", "0", "--model", model, "--compile-cache", "off"]
    command += ["--adapters", model / "adapters.safetensors"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert "the page is at http://127.0.0.1:" in process.stdout.readline()
        assert list(tmp_path.glob("pisa_sr_app_*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.stdout.close()
    for _ in range(20):
        if not list(tmp_path.glob("pisa_sr_app_*")):
            break
        time.sleep(0.1)
    assert not list(tmp_path.glob("pisa_sr_app_*"))
