"""What the demo model can read: words for quality, and a tokenizer that knows the words of its training."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pisa_jax.sd.random_model import write_tokenizer

POSITIVE = ("photograph", "sharp focus", "high quality", "highly detailed")
GRAPHICS = ("illustration", "drawing")
NEGATIVE = ("blurry", "noise", "jpeg artifacts", "low quality", "lowres", "over-smooth", "dirty")


def negative_prompt(rng: np.random.Generator) -> str:
    """Some of the negative words, in any order: a degraded picture deserves one or all of them."""
    count = rng.integers(1, len(NEGATIVE) + 1)
    return ", ".join(rng.permutation(NEGATIVE)[:count])


def train_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """CLIP's byte-level alphabet and special tokens, and byte-pair merges learnt from `texts`, up to `size` tokens.

    A folder that is there stays as it is: the trainer breaks ties at random, so that a second one would number the
    tokens in another way than the first, which a text encoder may have been trained with.
    """
    if folder.exists():
        return
    whole, folder = folder, folder.with_name(f"{folder.name}.part")
    write_tokenizer(folder)  # vocabulary without merges
    base = json.loads((folder / "vocab.json").read_text())
    special = [token for token in base if token.startswith("<|")]
    letters = [token for token in base if token not in special]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    learner = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=special
    )
    tokenizer.train_from_iterator(texts, learner)
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(merge) for merge in learnt][: size - len(base)]
    tokens = [*letters, *("".join(merge) for merge in merges), *special]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    folder.rename(whole)
