"""The training step of this package, as a subprocess of benchmarks/train_step_against_torch.py."""

import jax
import jax.numpy as jnp
import numpy as np
from step_case import STAGES, StepCase
from step_inputs import (
    NEGATIVE_ID,
    PROMPT_ID,
    PROMPT_TOKENS,
    StepSettings,
    answer_requests,
    images,
    settings_of_process,
    vgg_weights,
)

from pisa_jax import train_step
from pisa_jax.adapters import injection
from pisa_jax.runtime.distributed import make_mesh
from pisa_jax.runtime.torch_layout import flax_kernel
from pisa_jax.sd import pretrained
from pisa_jax.tiling.host_memory import return_freed_memory


def main() -> None:
    """Answer requests; the argument is a `StepSettings`."""
    settings = settings_of_process()
    case = StepCase(STAGES[settings.stage], settings.crop, settings.batch_size, False, "float32", "float32")
    model, mesh, spec = pretrained.load_pretrained(settings.model), make_mesh(data=1), case.stage.spec
    csd, key = bool(case.stage.csd), jax.random.key(0)
    frozen = train_step.make_frozen(
        model, mesh, perceptual=perceptual() if case.stage.perceptual else None, teacher=csd, prompts=csd
    )
    frozen = frozen._replace(null_prompt=prompt(model, PROMPT_ID), negative_prompt=prompt(model, NEGATIVE_ID))
    adapter = injection.init_adapter(key, model.params["unet"], spec)
    state = train_step.init_state(adapter, case.optimizer, ema=False, spec=spec)
    batch = make_batch(settings)
    write_draws(settings, case, model.base, key)
    jitted = train_step.jit_train_step(model.base, case.objective, case.optimizer, frozen, mesh)
    program = jitted.lower(frozen, state, batch, key).compile()
    return_freed_memory()  # as a training run does

    def step():
        nonlocal state
        state, measured = program(frozen, state, batch, key)
        jax.block_until_ready(state)
        return {name: float(measured[name]) for name in ("total", "grad_norm")}

    count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    answer_requests(step, f"jax {jax.__version__}, {count} trained parameters")


def prompt(model, token_id: int) -> jax.Array:
    """Embed a prompt of one repeated token."""
    return jax.jit(model.base.encode_text)(model.params["text"], jnp.full((1, PROMPT_TOKENS), token_id))


def perceptual() -> dict:
    """Return the random weights of LPIPS."""
    kernels, heads = vgg_weights()
    layers = {
        f"features.{number}": {"kernel": flax_kernel(kernel), "bias": np.zeros(len(kernel), np.float32)}
        for number, kernel in kernels.items()
    }
    tree = {"layers": layers, "heads": {f"lin{index}": head for index, head in enumerate(heads)}}
    return jax.tree.map(jnp.asarray, {"vgg": tree})


def make_batch(settings: StepSettings) -> train_step.Batch:
    """Return the batch of every step."""
    size = settings.batch_size
    ids = jnp.full((size, PROMPT_TOKENS), PROMPT_ID, jnp.int32)
    return train_step.Batch(*map(jnp.asarray, images(settings)), ids, jnp.ones(size, bool))


def write_draws(settings: StepSettings, case: StepCase, base, key: jax.Array) -> None:
    """Write the random numbers of the first step for PyTorch, NCHW."""
    shape = (settings.batch_size, settings.crop, settings.crop, 3)
    draws = train_step.draw(jax.random.fold_in(key, 0), base, case.objective.csd_timesteps, shape)
    posterior, noise = (np.asarray(each.transpose(0, 3, 1, 2)) for each in (draws.posterior, draws.csd_noise))
    np.savez(settings.draws, posterior=posterior, csd_noise=noise, csd_timesteps=np.asarray(draws.csd_timesteps))


if __name__ == "__main__":
    main()
