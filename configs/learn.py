"""Both stages on photographs with a random base model that is small enough for a CPU: training must lower errors.

    python train.py configs/learn.py --data.path PHOTOS --validation.path OTHER_PHOTOS

A random decoder cannot reconstruct images, so the results are poor. But errors that adapters can lower must fall on
images that were not used for training: l2 in the pixel stage, the perceptual distance in the semantic stage. There is
no CSD, because a random teacher carries no information. Hardware: 2 CPU cores, a few minutes. Expected: l2 falls by a
third in the pixel stage, and the perceptual distance by a twentieth in the semantic stage (`test_it_learns`). Measured
on the first 6 images of Kodak24, trained on 352 photographs, 2026-11-25:

| step | l2 | PSNR | SqueezeNet distance |
|---|---|---|---|
| 0, no adapter | .4553 | 13.08 | 8.952 |
| 400, pix | .2326 | 16.86 | 9.359 |
| 700, pix + sem | .3878 | 13.57 | 8.284 |
"""

from pisa_jax.config import AdapterSpec, Config, Data, Stage, Validation

SPEC = AdapterSpec(rank=16)

config = Config(
    out="runs/learn",
    model="random",
    stages=(
        Stage("pix", steps=400, learning_rate=1e-2, schedule="cosine", spec=SPEC),
        Stage("sem", steps=300, frozen=("pix",), perceptual=1.0, learning_rate=5e-3, schedule="cosine", spec=SPEC),
    ),
    data=Data(source="folder", path="photos", crop=64, workers=1),
    validation=Validation(path="held_out", count=6, every=100),
    batch_size=4,
    mesh_data=1,
    perceptual="squeeze",
    perceptual_weights=None,
    log_every=20,
)
