"""Adapters of a file that a training run starts from."""

from dataclasses import replace

from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import load_adapters
from pisa_jax.config import Config


def load_start(config: Config) -> Adapters:
    """Load the adapters of `config.start`; no adapters without it.

    Raises:
        OSError, ValueError: see `load_adapters`.
        ValueError: the file lacks an adapter that a stage builds on, or holds the adapter of a stage with another
            specification.
    """
    if config.start is None:
        return Adapters({}, {})
    start = load_adapters(config.start)
    held = ", ".join(start.trees)
    for index, stage in enumerate(config.stages):
        missing = set(stage.frozen) - start.trees.keys() - {earlier.adapter for earlier in config.stages[:index]}
        if missing:
            raise ValueError(
                f"stage {stage.adapter} builds on {', '.join(sorted(missing))}; {config.start} (start) contains {held}"
            )
        spec = start.specs.get(stage.adapter, stage.spec)
        if replace(spec, dropout=stage.spec.dropout) != stage.spec:
            raise ValueError(
                f"stage {stage.adapter} continues the adapter in {config.start} (start), which has {spec}; "
                f"the stage has {stage.spec}; set the spec of the stage to that of the file"
            )
    return start
