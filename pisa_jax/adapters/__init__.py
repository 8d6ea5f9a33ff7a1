"""LoRA and its variants as functional parameter trees, and the files that adapters come in."""
