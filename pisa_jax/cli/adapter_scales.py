"""Names of the adapters of a command line, and their scales."""

from collections.abc import Sequence

from pisa_jax.config import Scales, check_scales


def adapter_names(paths: Sequence[str] | None) -> list[str]:
    """Names of the adapters in the files, in order; those of the method for the demo model and for unreadable files."""
    from pisa_jax.adapters.adapter_tree import with_sem
    from pisa_jax.adapters.files import load_all_adapters

    try:
        return list(with_sem(load_all_adapters(paths)).specs) if paths else ["pix", "sem"]
    except (OSError, ValueError):  # reported when the model is loaded
        return ["pix", "sem"]


def complete_scales(given: Sequence[Scales] | None, names: Sequence[str]) -> list[Scales]:
    """Return one scale for each adapter: none given, all are 1; a single number holds for all.

    Raises:
        ValueError: another number of scales.
    """
    rows = [row * len(names) if len(row) == 1 else row for row in given or [(1.0,)]]
    return list(dict.fromkeys(check_scales(row, names) for row in rows))
