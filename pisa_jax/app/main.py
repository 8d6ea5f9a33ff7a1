"""Open a page with live scales: `pisa-sr app`."""

import argparse
import contextlib
import importlib.util
import ipaddress
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pisa_jax.cli.arguments import megapixels
from pisa_jax.cli.infer import (
    add_model_arguments,
    buckets_recorded,
    complete_model_arguments,
    enable_compilation_cache,
    limit_megapixels,
    load_upscaler,
)
from pisa_jax.runtime.console import say, show_any_name

USERS_VARIABLE = "PISA_SR_AUTH"
OWN_OPTIONS = ("host", "port", "auth", "max_megapixels", "compile_cache")


def port(text: str) -> int:
    """Parse a port: 0 (any free one) to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; allowed are 0 (any free one) to 65535")
    return int(text)


def parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser: the flags of the server, and those of the model that `pisa-sr infer` has, too."""
    p = argparse.ArgumentParser(prog=prog, description="Open a page with live scales.", allow_abbrev=False)
    p.add_argument("--host", default="127.0.0.1", help="address to bind to (default 127.0.0.1: this machine only)")
    p.add_argument("--port", type=port, default=7860, help="port (default 7860; 0: any free one)")
    p.add_argument("--auth", type=Path, metavar="FILE",
        help=f"file with USER:PASSWORD in each line; without it, the environment variable {USERS_VARIABLE} with one "
        "USER:PASSWORD; without both, the page has no login")  # fmt: skip
    p.add_argument("--max-megapixels", type=megapixels, default=16.0, metavar="N",
        help="refuse images whose result would be larger (default 16)")  # fmt: skip
    add_model_arguments(p.add_argument)
    return p


def read_users(path: Path | None, environment: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Read names and passwords from the file of --auth, or from the environment; none if neither is given.

    Raises:
        ValueError: a line is not USER:PASSWORD, or there is none. No message holds a password.
        OSError: the file cannot be read.
    """
    if path is None:
        if USERS_VARIABLE not in environment:
            return []
        lines, where = [environment[USERS_VARIABLE]], f"the environment variable {USERS_VARIABLE}"
    elif ":" in str(path) and not path.exists():
        raise ValueError(
            "--auth takes the name of a file: other users of the machine can see a command line; write USER:PASSWORD "
            f"to a file, or to the environment variable {USERS_VARIABLE}"
        )
    else:
        lines, where = path.read_text(encoding="utf-8").splitlines(), str(path)
    users = []
    for number, line in enumerate(lines, 1):
        name, separator, password = line.strip().partition(":")
        if line.strip() and not (name and separator and password):
            raise ValueError(f"line {number} of {where} is not USER:PASSWORD")
        users += [(name, password)] if line.strip() else []
    if not users:
        raise ValueError(f"{where} is empty; expected USER:PASSWORD")
    return users


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr app") -> int:
    """Run the command. Exit code: 0 stopped, 1 it could not start, 2 wrong usage."""
    show_any_name()
    p = parser(prog)
    args = p.parse_args(argv)
    model_options = {name: value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    complete_model_arguments(p, args)
    try:
        users = read_users(args.auth)
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the page needs gradio; to install it: pip install 'pisa_jax[app]'")
        if not users and not is_loopback(args.host):
            say(f"anybody who can reach {args.host} can use this page; --auth adds a login", sys.stderr)
        limit_megapixels(args.max_megapixels)
        run(args, model_options, users, enable_compilation_cache(args.compile_cache))
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model is loaded
        pass
    say("the page is closed", sys.stderr)
    return 0


def run(
    args: argparse.Namespace, model_options: Mapping[str, Any], users: Sequence[tuple[str, str]], cache: Path | None
) -> None:
    """Load the model and serve the page until SIGINT or SIGTERM."""
    from pisa_jax.app.server import Server, bind, make_app, temporary_folder

    warnings.filterwarnings("ignore", module="gradio")  # of its use of other libraries
    for number in (signal.SIGTERM, signal.SIGHUP):  # as SIGINT: so that the temporary files are removed
        signal.signal(number, signal.default_int_handler)
    bound, address = bind(args.host, args.port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bound)
        stack.enter_context(temporary_folder())
        upscaler = load_upscaler(args)
        stack.enter_context(buckets_recorded(upscaler, args, cache, adjustable=True, batch_size=1))
        server = Server(make_app(upscaler, args.max_megapixels, model_options, users), bound)
        # From here on a flag and no exception: one that is raised in a callback of the garbage collector is lost.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        say(f"the page is at {address} (Ctrl-C stops it)", sys.stdout)
        server.run()


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches the address `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
