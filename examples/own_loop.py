"""Train an adapter in a loop of your own: load a model, train ten steps on a folder of images, save, upscale.

python examples/own_loop.py FOLDER [--model MODEL] [--out OUT]
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from PIL import Image

import pisa_jax as pj

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="ground-truth images")
parser.add_argument("--model", default="demo", help="diffusers folder or hub id (default: the demo model)")
parser.add_argument("--out", type=Path, default=Path("own_loop"), help="output folder")
args = parser.parse_args()

mesh = pj.make_mesh(data=1)
model = pj.load_pretrained(args.model)
spec = pj.AdapterSpec(rank=4)
objective, optimizer = pj.Objective(spec, l2=1.0), optax.adamw(1e-3)
frozen = pj.make_frozen(model, mesh)
state = pj.init_state(pj.init_adapter(jax.random.key(0), model.params["unet"], spec), optimizer, ema=False)
step = pj.jit_train_step(model.base, objective, optimizer, frozen, mesh)

batches = pj.make_loader(pj.folder_source(args.folder), batch_size=2, crop=64, seed=0, degrade=pj.degrade)
for index in range(10):
    images = next(batches)
    no_prompt = np.zeros((2, 1), np.int32)
    batch = pj.Batch(images["lq"], images["gt"], no_prompt, np.zeros(2, bool))
    state, measured = step(frozen, state, batch, jax.random.key(1))
    print(f"step {index + 1}: l2 {float(measured['l2']):.4f}")
batches.close()

args.out.mkdir(exist_ok=True)
adapters = pj.Adapters({"pix": jax.device_get(state.adapter)}, {"pix": spec}, args.model)
pj.save_adapters(args.out / "adapters.safetensors", adapters)
upscaler = pj.Upscaler.load(args.model, args.out / "adapters.safetensors", min_size=64)
photo = Image.open(next(path for path in sorted(args.folder.iterdir()) if path.suffix in (".png", ".jpg")))
photo.thumbnail((32, 32))
upscaler(photo.convert("RGB"), scale=4, scales=(1.0, 0.0)).save(args.out / "upscaled.png")
print(f"adapters and one upscaled image in {args.out}")
