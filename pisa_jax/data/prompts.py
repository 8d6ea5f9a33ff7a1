"""Prompts of training images, from a JSONL file."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping

from pisa_jax.data.text_files import normalize_path, read_lines

logger = logging.getLogger(__name__)


def read_prompts(path: str | os.PathLike) -> dict[str, str]:
    """Read prompts by image path from a JSONL file of {"path": ..., "prompt": ...}; blank lines are skipped.

    Paths are relative to the root of the source and are normalized (`normalize_path`).

    Raises:
        ValueError: the file has no prompts, or a line is malformed or contradicts an earlier one; the message has its
            number.
    """
    prompts: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        image, prompt = _parse(line, f"{path}, line {number}")
        if prompts.setdefault(image, prompt) != prompt:
            raise ValueError(
                f"{path}, line {number}: {image!r} has the prompt {prompt[:80]!r}, and in line {numbers[image]} "
                f"{prompts[image][:80]!r}; keep one of them"
            )
        numbers.setdefault(image, number)
    if not prompts:
        raise ValueError(f'{path} holds no prompts; it needs lines {{"path": text, "prompt": text}}')
    return prompts


def _parse(line: str, place: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("path", "prompt")):
        raise ValueError(f'{place}: {line[:80]!r} is not {{"path": text, "prompt": text}}')
    prompt = entry["prompt"]
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: the prompt {prompt[:80]!r} is not valid Unicode: it has {prompt[error.start]!r}, one half of a "
            "surrogate pair; correct or remove it"
        ) from error
    return normalize_path(entry["path"]), prompt


def check_prompts(prompts: Mapping[str, str], paths: Iterable[str], total: int, enough: int) -> None:
    """Log the share of images that have a prompt.

    `prompts` have normalized paths; `paths` are those of the `total` images of a source, in any order. After `enough`
    of them no more are read once an image with a prompt was found.

    Raises:
        ValueError: no image has a prompt.
    """
    tried, fitting, used, example = 0, 0, set(), ""
    for path in paths:
        example, tried = example or path, tried + 1
        if (key := normalize_path(path)) in prompts:
            fitting += 1
            used.add(key)
        if tried >= enough and used:
            break
    if not used:
        raise ValueError(
            f"none of the {len(prompts)} prompts has the path of an image of the source: the prompts have e.g. "
            f"{next(iter(prompts))!r}, the source {example!r}; give paths relative to the root of the source"
        )
    unused = len(prompts) - len(used) if tried == total else 0
    logger.log(
        logging.WARNING if unused or fitting < tried else logging.INFO,
        "prompts: %d of %d images%s have one (%.1f %%), the others train with the empty prompt; %s",
        fitting,
        tried,
        "" if tried == total else f" (a sample of {total})",
        100 * fitting / tried,
        f"{unused} prompts belong to no image" if tried == total else "unused prompts were not counted",
    )


def report_long_prompts(prompts: Mapping[str, str], count_tokens: Callable[[str], int], limit: int) -> None:
    """Log the number of prompts with more than the `limit` tokens of the text encoder, which cuts them.

    `count_tokens` counts the tokens of a prompt with those at its ends, as `LoadedModel.count_tokens` does.
    """
    # A token of ASCII text has at least one character, and two tokens mark the ends.
    unknown = {text for text in prompts.values() if not text.isascii() or len(text) + 2 > limit}
    counts = {text: count for text in unknown if (count := count_tokens(text)) > limit}
    if counts:
        longest = max(sorted(counts), key=counts.__getitem__)
        logger.warning(
            "prompts: %d of %d have more than %d tokens and are cut: the text encoder takes no more; the longest has "
            "%d: %s...",
            sum(text in counts for text in prompts.values()),
            len(prompts),
            limit,
            counts[longest],
            longest[:60],
        )


def digest_prompts(prompts: Mapping[str, str]) -> str | None:
    """Digest of prompts, in any order; None if there are none."""
    if not prompts:
        return None
    text = json.dumps(sorted(prompts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
