"""Write the adapters from which the semantic stage starts: `pix`, and a `sem` that cancels it.

    python demo/start_sem.py --adapters runs/demo_pix_final/adapters.safetensors --out runs/demo_sem_start.safetensors

At scales 1,1 the model then equals its prior, which was trained to restore (prior.py, adversarial.py). The semantic
stage starts from this restoration instead of training it again.
"""

import argparse
from pathlib import Path

from pisa_jax.adapters import files


def start_sem(pix: Path, out: Path) -> None:
    """Add the LoRA adapter `sem` with A and -B of `pix`: the sum of both changes no weight."""
    adapters = files.load_adapters(pix)
    sem = {path: {"a": factors["a"], "b": -factors["b"]} for path, factors in adapters.trees["pix"].items()}
    specs = {"pix": adapters.specs["pix"], "sem": adapters.specs["pix"]}
    files.save_adapters(out, adapters._replace(trees={"pix": adapters.trees["pix"], "sem": sem}, specs=specs))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="output of train.py configs/demo_pix_final.py")
    parser.add_argument("--out", type=Path, required=True, help="the file that is written")
    args = parser.parse_args()
    start_sem(args.adapters, args.out)


if __name__ == "__main__":
    main()
