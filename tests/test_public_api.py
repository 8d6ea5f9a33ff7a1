"""The public names: documented, importable, and imported on first use only."""

import re
import subprocess
import sys

from conftest import ROOT

import pisa_jax


def documented_names():
    """Names in the table of the section "Library" of docs/code.md."""
    section = (ROOT / "docs" / "code.md").read_text().split("\n## Library\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}


def test_the_documentation_lists_the_public_names():
    assert documented_names() == set(pisa_jax.__all__)


def test_every_public_name_is_there_and_documented():
    for name in pisa_jax.__all__:
        assert getattr(pisa_jax, name).__doc__, name


def test_importing_the_package_imports_no_jax():
    code = "import sys, pisa_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
