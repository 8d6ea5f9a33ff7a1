"""LoRA and its variants: adapters as parameter trees, decompositions, injection into a model, and file formats."""
