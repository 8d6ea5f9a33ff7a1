"""Layering: imports go down only, between and inside the rooms; each heavy library is imported in one module."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "pisa_jax"

# The rooms of the package, lowest first: a module imports from rooms above its own line in this table. Inside a room,
# `|` separates levels, lowest first.
ROOMS = {
    "config": "",
    "runtime": "atomic_write chips compilation console file_identity imports key_value_store messages operations "
    "stop_signals torch_layout trees watchdog | failures performance remote_paths weights_digest | agreement checksums "
    "mirror profiling run_lock torch_pickle | checkpoint run_directory run_log stop_step tensor_files | "
    "cluster distributed",
    "imaging": "arrays icc image_files masks matlab_resize ranges scale_maps tiff_tags xmp | color exif image_data | "
    "network_input pixels png_chunks | decode_deep decode_tiff metadata | decode encode | "
    "image_reading image_writing | any_image contact_sheet",
    "losses": "",
    "tiling": "buckets host_memory placements windows | memory samples | vae_tiles",
    "adapters": "adapter_tree | checks decomposition | full hra layer_maps loha lokr lora oft pisa_sr_file pissa "
    "vera | dora files foreign_keys hira interchange tucker | "
    "foreign_files registry | fit start | injection",
    "model": "",
    "data": "blur_kernels contents folders text_files workers | prompts sources | "
    "degradation latents tfds unusable_files | samples | loader",
    "metrics": "lpips pairing psnr_ssim | niqe validation | registry | report | evaluation",
    "train_step": "",
    "sd": "flash_attention | layers | backbone | padding vae_tile_hooks | vae_tiling | base_model | pretrained | "
    "random_model",
    "weights": "",
    "stages": "",
    "pipeline": "",
    "inference": "",
    "training_model": "",
    "training_mesh": "",
    "training_run": "",
    "training_compile": "",
    "training_report": "",
    "training_loop": "",
    "training": "",
    "cli": "adapter_scales arguments compile_only infer_names known_buckets output_files scale_map_files | "
    "infer_plan | convert degrade evaluate_model infer_files prepare train | evaluate infer inspect | "
    "infer_command warmup",
    "app": "settings shared_files | visitor | visitors | events | page | server | main",
    "__main__": "",
}
RANK = {room: rank for rank, room in enumerate(ROOMS)}
LEVEL = {
    f"{room}.{name}" if name else room: level
    for room, levels in ROOMS.items()
    for level, names in enumerate(levels.split("|"))
    for name in names.split() or [""]
}

DOORS = {
    "diffusers": {"sd.backbone"},
    "transformers": {"sd.backbone"},
    "orbax": {"runtime.checkpoint"},
    "grain": {"data.loader"},
    "tensorflow_datasets": {"data.tfds"},
    "tensorboardX": {"runtime.run_log"},
    "tifffile": {"imaging.decode_tiff"},
    "gradio": {"app.events", "app.page", "app.server"},
    "torch": set(),
    "tensorflow": set(),
}


def modules():
    """Return dotted name below the package -> file, without the `__init__` files."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


MODULES = modules()


def imports(path):
    """Yield (module, name or None) of every import statement in a file, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def project_imports(path):
    """Yield the dotted names of the project's modules that a file imports."""
    for module, name in imports(path):
        package, _, rest = module.partition(".")
        if package != "pisa_jax":
            continue
        if rest in MODULES:
            yield rest
        elif name and (found := f"{rest}.{name}".lstrip(".")) in MODULES:
            yield found


def test_the_table_names_every_module():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    room = name.split(".")[0]
    for used in project_imports(MODULES[name]):
        other = used.split(".")[0]
        if other == room:
            assert LEVEL[used] < LEVEL[name], f"{name} imports {used}, which is not below it in its room"
        else:
            assert RANK[other] < RANK[room], f"{name} imports {used}, and the room {other} is not below {room}"


def test_each_heavy_library_has_one_door():
    for name, path in MODULES.items():
        for library, allowed in DOORS.items():
            found = [module for module, _ in imports(path) if module.split(".")[0] == library]
            assert not found or name in allowed, f"{name} imports {library}"


def test_private_modules_of_jax_have_one_door():
    found = {name for name, path in MODULES.items() for module, _ in imports(path) if module.startswith("jax._src")}
    assert found == {"runtime.key_value_store"}


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "imaging.network_input",
        "data.loader",
        "data.degradation",
        "runtime.tensor_files",
        "cli.degrade",
    ],
)
def test_no_jax_where_it_is_not_needed(name):
    """Data workers and `--help` start without jax."""
    seen, waiting = {name}, [name]
    while waiting:
        path = MODULES[waiting.pop()]
        for module, _ in imports(path):
            assert module.split(".")[0] not in ("jax", "flax"), f"{path} imports {module}"
        for used in set(project_imports(path)) - seen:
            seen.add(used)
            waiting.append(used)
