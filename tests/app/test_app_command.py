"""The command line of `pisa-sr app`."""

import importlib.util
import socket

import pytest
from PIL import Image

from pisa_jax.app import main as program
from pisa_jax.app.main import is_loopback, read_users


@pytest.fixture(autouse=True)
def pixel_limit(monkeypatch):
    """Restore Pillow's limit, which the command changes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def test_users_come_from_a_file_or_the_environment(tmp_path):
    path = tmp_path / "users"
    path.write_text("ann:secret\n\nbob:with:colon\n")
    assert read_users(path, {"PISA_SR_AUTH": "eve:other"}) == [("ann", "secret"), ("bob", "with:colon")]
    assert read_users(None, {"PISA_SR_AUTH": "eve:other"}) == [("eve", "other")]
    assert read_users(None, {}) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ann\n", "line 1 of .* is not USER:PASSWORD"),
        ("a:b\n:c\n", "line 2 of"),
        ("\n", "is empty"),
        ("d:\n", "line 1"),
    ],
)
def test_wrong_users_are_refused(tmp_path, text, reason):
    path = tmp_path / "users"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_users(path, {})


def test_a_password_on_the_command_line_is_refused_and_not_repeated(capsys):
    assert program.main(["--auth", "ann:secret"]) == 1
    error = capsys.readouterr().err
    assert "takes the name of a file" in error
    assert "secret" not in error


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--max-megapixels", "0"], ["--tile", "8", "--overlap", "9"], ["--share"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_gradio_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert program.main([]) == 1
    assert capsys.readouterr().err == "pisa-sr app: the page needs gradio; to install it: pip install 'pisa_jax[app]'\n"


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs pip install gradio")
    assert program.main(["--model", str(tmp_path / "none"), "--adapters", "a.pkl", "--compile-cache", "off"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pisa-sr app: ")
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys):
    pytest.importorskip("gradio", reason="needs pip install gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert program.main(["--port", str(port), "--compile-cache", "off"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"pisa-sr app: 127.0.0.1:{port} cannot be used: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback(host, local):
    assert is_loopback(host) == local
