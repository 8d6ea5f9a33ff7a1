"""Select the training images of the demo model: links to all images except the samples', and their prompts.

    python demo/pictures.py --data TRAIN --out runs/demo_pictures

TRAIN contains images and a manifest.csv with the columns file and original_file. The prompts are written to
prompts.jsonl beside the links. A prompt consists of the words of the original file name, if it has any, and words for
quality.
"""

import argparse
import csv
import json
import re
from pathlib import Path

from words import GRAPHICS, POSITIVE

# The sample inputs of the package are made from these images, so nothing may train on them.
HELD_OUT = ("budgie_oakland_zoo_otters", "budgie_roman_colosseum", "budgie_perched_osprey", "budgie_blue_periwinkle")
# Parts of file names that do not describe the content of an image.
_UNINFORMATIVE = {"img", "pexels", "photo", "unsplash"}


def content(original: str) -> str:
    """Extract the words of a file name such as "img/CQ100/img/balinese_dancer.png"; "" for numbers and hashes."""
    name = Path(original.split(" (")[0]).stem.lower()
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return ""
    words = re.findall(r"[a-z]{3,}", name.replace("_", " "))
    return " ".join(word for word in words if word not in _UNINFORMATIVE)


def prompt(path: str, original: str) -> str:
    """Join the words for content, if any, and for quality."""
    quality = GRAPHICS if path.startswith("graphics") else POSITIVE
    return ", ".join(filter(None, [content(original), *quality]))


def choose(data: Path, out: Path) -> None:
    """Link the training images and write their prompts."""
    with (data / "manifest.csv").open(newline="") as file:
        rows = {row["file"].removeprefix(f"{data.name}/"): row["original_file"] for row in csv.DictReader(file)}
    chosen = {path: prompt(path, name) for path, name in rows.items() if not Path(path).name.startswith(HELD_OUT)}
    for path in chosen:
        link = out / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((data / path).resolve())
    lines = [json.dumps({"path": path, "prompt": text}) for path, text in chosen.items()]
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(chosen)} of {len(rows)} images in {out}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    choose(args.data, args.out)


if __name__ == "__main__":
    main()
