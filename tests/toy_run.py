"""`train.py` with the toy model of test_base_model.py, which compiles in seconds.

Start it as python toy_run.py toy_run.py --out DIR.

The file is also the config of such a run. TOY_FAULT="fail 5" lets the fifth batch raise an error, and "hang 5" lets it
never arrive.
"""

import os
import sys
import time

from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=12, targets="conv")
config = Config(
    out="runs/toy",
    stages=(
        Stage("pix", 3, learning_rate=1e-3, spec=SPEC),
        Stage("sem", 4, frozen=("pix",), learning_rate=1e-3, spec=SPEC),
    ),
    data=Data(source="fake", crop=16, workers=0),
    batch_size=4,
    save_every=1,
    log_every=1,
    ema=0.5,
)


def main() -> int:
    from test_base_model import toy_model

    from pisa_jax import training, training_loop
    from pisa_jax.cli import train

    run = training.train
    fault, _, last = os.environ.get("TOY_FAULT", "none 0").partition(" ")
    next_batch, calls = training_loop.next_batch, []

    def disturbed(run):
        calls.append(run)
        if len(calls) == int(last):
            if fault == "fail":
                raise OSError("the disk of this batch is broken")
            time.sleep(1000)
        return next_batch(run)

    training_loop.next_batch = disturbed
    training.train = lambda *arguments, **options: run(*arguments, model=toy_model(), **options)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
