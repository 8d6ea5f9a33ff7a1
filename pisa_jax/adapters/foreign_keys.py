"""Recognition of adapter files of other programs, without reading them."""

from pathlib import Path

from pisa_jax.runtime.tensor_files import is_safetensors, read_tensors

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PREFIXES = ("base_model.", "unet.", "lora_unet_", "oft_unet_")
# Keys of `UNet2DConditionModel.save_lora_adapter` in diffusers have no prefix.
ENDINGS = (".lora_A.weight", ".lora_B.weight")


def is_foreign(path: str | Path) -> bool:
    """Return True for a folder of PEFT, and for a safetensors file with keys of PEFT, diffusers or kohya.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return all((path / name).exists() for name in PEFT_FILES)
    return is_safetensors(path) and any(key.startswith(PREFIXES) or key.endswith(ENDINGS) for key in read_tensors(path))
