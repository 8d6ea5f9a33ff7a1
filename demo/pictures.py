"""Choose what the demo model trains on: links to all photographs but the samples', and their prompts.

    python demo/pictures.py --data TRAIN --out runs/demo_pictures

TRAIN holds pictures and a manifest.csv with the columns file and original_file. The prompts, in prompts.jsonl beside
the links, are what a file's original name says, if it is made of words, and words for quality.
"""

import argparse
import csv
import json
import re
from pathlib import Path

from words import GRAPHICS, POSITIVE

# The sample inputs of the package are made from these: nothing may have seen them.
HELD_OUT = ("budgie_oakland_zoo_otters", "budgie_roman_colosseum", "budgie_perched_osprey", "budgie_blue_periwinkle")
# Parts of file names that say nothing about a picture.
_IDLE = {"img", "pexels", "photo", "unsplash"}


def content(original: str) -> str:
    """The words of an original file name such as "img/CQ100/img/balinese_dancer.png"; "" for numbers and hashes."""
    name = Path(original.split(" (")[0]).stem.lower()
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return ""
    words = re.findall(r"[a-z]{3,}", name.replace("_", " "))
    return " ".join(word for word in words if word not in _IDLE)


def prompt(path: str, original: str) -> str:
    """Content, if any, and quality."""
    quality = GRAPHICS if path.startswith("graphics") else POSITIVE
    return ", ".join(filter(None, [content(original), *quality]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with (args.data / "manifest.csv").open(newline="") as file:
        rows = {row["file"].removeprefix(f"{args.data.name}/"): row["original_file"] for row in csv.DictReader(file)}
    chosen = {path: prompt(path, name) for path, name in rows.items() if not Path(path).name.startswith(HELD_OUT)}
    for path in chosen:
        link = args.out / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((args.data / path).resolve())
    lines = [json.dumps({"path": path, "prompt": text}) for path, text in chosen.items()]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(chosen)} of {len(rows)} pictures in {args.out}")


if __name__ == "__main__":
    main()
