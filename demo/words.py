"""Prompts of the demo model: words for quality, and a tokenizer trained on the training prompts."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pisa_jax.sd.random_model import write_tokenizer

POSITIVE = ("photograph", "sharp focus", "high quality", "highly detailed")
GRAPHICS = ("illustration", "drawing")
NEGATIVE = ("blurry", "noise", "jpeg artifacts", "low quality", "lowres", "over-smooth", "dirty")


def negative_prompt(rng: np.random.Generator) -> str:
    """Draw some of the negative words, in random order: a degraded image may show any number of these defects."""
    count = rng.integers(1, len(NEGATIVE) + 1)
    return ", ".join(rng.permutation(NEGATIVE)[:count])


def train_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """Write a tokenizer of up to `size` tokens: CLIP's byte-level alphabet and special tokens, and merges for `texts`.

    An existing folder is kept. The trainer breaks ties at random, so a second tokenizer would number the tokens
    differently from the one that a text encoder may have been trained with.
    """
    if folder.exists():
        return
    final, folder = folder, folder.with_name(f"{folder.name}.part")
    write_tokenizer(folder)  # vocabulary without merges
    base = json.loads((folder / "vocab.json").read_text())
    special = [token for token in base if token.startswith("<|")]
    letters = [token for token in base if token not in special]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=special
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(merge) for merge in learned][: size - len(base)]
    tokens = [*letters, *("".join(merge) for merge in merges), *special]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    folder.rename(final)
