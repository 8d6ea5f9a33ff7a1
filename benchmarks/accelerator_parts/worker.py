"""Run one part; rows are written to standard output as JSON lines, everything else to standard error.

python -m accelerator_parts.worker PART --until TIME --size SIZE --results FILE
"""

import argparse
import importlib
import json
import os
from pathlib import Path

from accelerator_parts.rows import Rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to the standard output, too
    rows = Rows(
        lambda record: print(json.dumps(record), file=lines, flush=True),
        args.until,
        json.loads(args.results.read_text(encoding="utf-8")),
    )
    importlib.import_module(f"accelerator_parts.{args.part}").run(rows, args.size)


if __name__ == "__main__":
    main()
