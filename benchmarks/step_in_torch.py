"""The training step of PiSA-SR in PyTorch, as a subprocess of benchmarks/train_step_against_torch.py.

Needs a separate environment (benchmarks/requirements-torch.txt). The losses are those of pisa_jax/train_step.py,
written with diffusers and peft. In the stage `sem`, the adapter of `pix` is merged into the UNet, as in this package;
the original program applies it in every layer, which takes longer.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from step_inputs import (
    NEGATIVE_ID,
    PROMPT_ID,
    PROMPT_TOKENS,
    VGG_BLOCKS,
    StepSettings,
    answer_requests,
    images,
    settings_of_process,
    vgg_weights,
)
from transformers import CLIPTextModel

# peft's spelling of `config.UNET_TARGETS`.
TARGETS = (
    r".*(to_q|to_k|to_v|to_out\.0|conv|conv1|conv2|conv_in|conv_out|conv_shortcut|proj_in|proj_out|"
    r"ff\.net\.0\.proj|ff\.net\.2)"
)
# Those of the stages in pisa_jax/config.py and of benchmarks/step_case.py.
TIMESTEP, GUIDANCE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1, 7.5, 5e-5, 1e-2, 1.0
LOSS_WEIGHTS = {"pix": {"l2": 1.0}, "sem": {"l2": 1.0, "perceptual": 2.0, "csd": 1.0}}


class Networks(NamedTuple):
    """The modules; `teacher`, `text` and `vgg` only for the losses that need them."""

    unet: Any
    vae: Any
    null_prompt: torch.Tensor
    negative_prompt: torch.Tensor
    teacher: Any = None
    text: Any = None
    vgg: Any = None


def main() -> None:
    """Answer requests; the argument is a `StepSettings`."""
    settings = settings_of_process()
    networks = load(settings)
    trained = [parameter for parameter in networks.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    layout, draws = (
        getattr(torch, settings.layout),
        {k: torch.from_numpy(v) for k, v in np.load(settings.draws).items()},
    )
    lq, gt = (torch.from_numpy(each.transpose(0, 3, 1, 2)).to(memory_format=layout) for each in images(settings))

    def step():
        optimizer.zero_grad()
        loss = total_loss(networks, settings, lq, gt, draws)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        return {"total": loss.item(), "grad_norm": norm.item()}

    count, threads = sum(parameter.numel() for parameter in trained), torch.get_num_threads()
    versions = f"PyTorch {torch.__version__}, {settings.layout}, {threads} threads, {count} trained parameters"
    answer_requests(step, versions)


def load(settings: StepSettings) -> Networks:
    """Load the networks that the stage needs, and add an adapter to the UNet."""
    layout, weights = getattr(torch, settings.layout), LOSS_WEIGHTS[settings.stage]

    def part(cls, name):
        module = cls.from_pretrained(settings.model, subfolder=name).requires_grad_(False)
        return module.to(memory_format=layout)

    unet, text = part(UNet2DConditionModel, "unet"), part(CLIPTextModel, "text_encoder")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="gaussian"))
    null, negative = (embed(text, 1, token_id) for token_id in (PROMPT_ID, NEGATIVE_ID))
    networks = Networks(unet, part(AutoencoderKL, "vae"), null, negative)
    if "csd" in weights:
        networks = networks._replace(teacher=part(UNet2DConditionModel, "unet"), text=text)
    if "perceptual" in weights:
        kernels, heads = vgg_weights()
        kernels = {k: torch.from_numpy(v).to(memory_format=layout) for k, v in kernels.items()}
        networks = networks._replace(vgg=(kernels, [torch.from_numpy(head) for head in heads]))
    return networks


def total_loss(networks: Networks, settings: StepSettings, lq, gt, draws) -> torch.Tensor:
    """Compute the weighted sum of the losses, as `pisa_jax.train_step.loss`."""
    weights, batch, scale = LOSS_WEIGHTS[settings.stage], settings.batch_size, networks.vae.config.scaling_factor
    with torch.no_grad():
        prompt = embed(networks.text, batch, PROMPT_ID) if networks.text else networks.null_prompt.expand(batch, -1, -1)
        posterior = networks.vae.encode(lq).latent_dist
        latents = (posterior.mean + posterior.std * draws["posterior"]) * scale
    z_h = latents - networks.unet(latents, TIMESTEP, prompt).sample
    upscaled = networks.vae.decode(z_h / scale).sample.clamp(-1, 1)
    loss = weights["l2"] * F.mse_loss(upscaled, gt)
    if "perceptual" in weights:
        loss = loss + weights["perceptual"] * lpips(networks.vgg, upscaled, gt)
    if "csd" in weights:
        direction = csd_direction(networks, z_h.detach(), prompt, draws["csd_noise"], draws["csd_timesteps"].long())
        loss = loss + weights["csd"] * torch.mean((direction + (z_h - z_h.detach())) ** 2)
    return loss


@torch.no_grad()
def csd_direction(networks: Networks, z, prompt, noise, timesteps) -> torch.Tensor:
    """Compute the direction of classifier score distillation, as `pisa_jax.losses.csd_direction`."""
    alphas = alphas_cumprod()[timesteps][:, None, None, None]
    noisy = alphas.sqrt() * z + (1 - alphas).sqrt() * noise
    prompts = torch.cat([networks.negative_prompt.expand(len(z), -1, -1), prompt])
    both = networks.teacher(torch.cat([noisy, noisy]), timesteps.repeat(2), prompts).sample
    negative, positive = both.chunk(2)

    def clean(eps):
        return (noisy - (1 - alphas).sqrt() * eps) / alphas.sqrt()

    guided = clean(negative + GUIDANCE * (positive - negative))
    return (clean(negative) - guided) / (z - guided).abs().mean(dim=(1, 2, 3), keepdim=True)


@functools.cache
def alphas_cumprod() -> torch.Tensor:
    """Return the noise schedule of Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def lpips(weights, a, b) -> torch.Tensor:
    """Compute LPIPS 0.1 with VGG16, averaged over the batch."""
    kernels, heads = weights
    with torch.no_grad():
        target = [normalized(each) for each in vgg_features(kernels, b)]
    found = [normalized(each) for each in vgg_features(kernels, a)]
    return sum(
        ((x - y) ** 2 * head[:, None, None]).sum(1).mean() for x, y, head in zip(found, target, heads, strict=True)
    )


def vgg_features(kernels, x) -> list[torch.Tensor]:
    """Return the maps of VGG16 before each pooling and at the end."""
    shift, spread = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x, maps = (x - shift) / spread, []
    for index, block in enumerate(VGG_BLOCKS):
        x = F.max_pool2d(x, 2) if index else x
        for number, _, _ in block:
            x = F.relu(F.conv2d(x, kernels[number], padding=1))
        maps.append(x)
    return maps


def normalized(x) -> torch.Tensor:
    """Normalize over channels."""
    return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def embed(text, batch: int, token_id: int) -> torch.Tensor:
    """Embed a prompt of one repeated token."""
    with torch.no_grad():
        return text(torch.full((batch, PROMPT_TOKENS), token_id)).last_hidden_state


if __name__ == "__main__":
    main()
