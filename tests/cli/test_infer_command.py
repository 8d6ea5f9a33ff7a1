"""The command line that makes a given result, read back by the parser of the command."""

import shlex
from pathlib import Path

import pytest

from pisa_jax.cli.infer import parser
from pisa_jax.cli.infer_command import infer_command


@pytest.mark.parametrize(
    "options",
    [
        {"input": ["a b.png", "it's.png"], "scales": [(1.0, 0.123456789), (1e-7, 100000.0)]},
        {"input": ["-a.png"], "scales": [(-0.2, 1.0)], "scale": 2.5, "grid": True},
        {"input": ["写真.png"], "sem_map": Path("a map.png"), "pix_map": Path("p.png"), "seed": 0, "prompt": "-x"},
        {"input": ["a.png"], "output": Path("x y"), "ext": "webp", "vae_tile": 0, "color_fix": "none", "min_size": 64},
    ],
)
def test_the_parser_reads_the_options_back(options):
    program, command, *arguments = shlex.split(infer_command(**options))
    assert (program, command) == ("pisa-sr", "infer")
    parsed, defaults = (vars(parser().parse_args(words)) for words in (arguments, []))
    assert parsed == defaults | options


def test_defaults_are_left_out():
    command = infer_command(input=["my photo.jpg"], scale=4.0, output=Path("out"), scales=[(1.0, 0.5)], ext="png")
    assert command == "pisa-sr infer --input 'my photo.jpg' --scales 1,0.5 --ext png"


def test_options_that_no_command_line_has_are_refused():
    with pytest.raises(TypeError, match="has no option sacles; allowed are input, output"):
        infer_command(sacles=[(1.0, 1.0)])
    with pytest.raises(ValueError, match="begins with '-' can only be given alone"):
        infer_command(scales=[(1.0, 1.0), (-0.2, 1.0)])
