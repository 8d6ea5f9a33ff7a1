"""Imports go down only, and heavy libraries have one door each."""

import ast

import pytest
from conftest import ROOT

# Modules import from lower levels only; the first imports nothing of the project.
LEVELS = [
    "atomic color config encoders icc kernels losses memory metrics ops sharding sheet sources tiling trees vae_tiles "
    "weights",
    "backbone checkpoint convert data decoders degradation lora lpips tfds_files",
    "images measures model prepare pretrained vae_flow",
    "inference objective pairing random_model report",
    "degrade evaluate files watch",
    "training",
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
PACKAGE = sorted((ROOT / "pisa_jax").glob("*.py"))

DOORS = {
    "diffusers": {"backbone"},
    "transformers": {"backbone"},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "tensorflow_datasets": {"tfds_files"},
    "tensorboardX": {"watch"},
    "torch": set(),
    "tensorflow": set(),
}


def imports(path):
    """(module, name or None) of every import statement in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_imports_go_down(path):
    if path.stem == "__init__":
        return
    assert path.stem in LEVEL, f"say in LEVELS where {path.stem} belongs"
    for module, name in imports(path):
        if module.split(".")[0] != "pisa_jax":
            continue
        used = module.split(".")[1] if "." in module else name
        if used in LEVEL:
            assert LEVEL[used] < LEVEL[path.stem], f"{path.stem} imports {used}"


def test_each_heavy_library_has_one_door():
    for path in PACKAGE:
        for library, allowed in DOORS.items():
            found = [module for module, _ in imports(path) if module.split(".")[0] == library]
            assert not found or path.stem in allowed, f"{path.stem} imports {library}"


@pytest.mark.parametrize("module", ["config", "images", "degradation", "data", "degrade", "weights", "sources"])
def test_no_jax_where_it_is_not_needed(module):
    """Data workers and `--help` start without it."""
    seen, waiting = set(), [module]
    while waiting:
        path = ROOT / "pisa_jax" / f"{waiting.pop()}.py"
        for imported, name in imports(path):
            top = imported.split(".")[0]
            assert top not in ("jax", "flax"), f"{path.stem} imports {top}"
            used = imported.split(".")[1] if top == "pisa_jax" and "." in imported else name
            if top == "pisa_jax" and used in LEVEL and used not in seen:
                seen.add(used)
                waiting.append(used)


def test_the_table_names_every_module():
    assert {path.stem for path in PACKAGE} - {"__init__"} == set(LEVEL)
