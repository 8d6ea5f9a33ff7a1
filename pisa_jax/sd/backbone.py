"""The modules of Stable Diffusion: diffusers' Flax UNet and VAE, and transformers' Flax CLIP text encoder.

This is the only file that imports diffusers or transformers. Their modules are used as released. Where they differ from
the PyTorch modules, with which the published weights were trained, linen interceptors correct them: see `_CORRECTED`.
All functions take and return NHWC arrays, and latents are scaled (multiplied by `latent_scale`) unless stated.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import logging as diffusers_logging

# diffusers warns on import and in every constructor that its Flax classes are deprecated; setup.cfg pins the last
# release that has them. The warnings can only be muted before the models are imported.
diffusers_logging.set_verbosity_error()

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from diffusers.models import attention_flax, resnet_flax, vae_flax  # noqa: E402
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel  # noqa: E402
from jax.ad_checkpoint import checkpoint_name  # noqa: E402
from jaxtyping import Array, Float, Int  # noqa: E402
from transformers import CLIPTextConfig, CLIPTokenizerFast  # noqa: E402
from transformers.models.clip.modeling_flax_clip import FlaxCLIPAttention, FlaxCLIPTextModule  # noqa: E402

from pisa_jax.sd import layers  # noqa: E402

Params = Mapping[str, Any]

# Name of the outputs of residual and transformer blocks for the policies of `jax.checkpoint`.
BLOCK_OUTPUT = "block_output"
_BLOCKS = (resnet_flax.FlaxResnetBlock2D, attention_flax.FlaxTransformer2DModel, vae_flax.FlaxResnetBlock2D)

# PyTorch config keys that the Flax modules ignore, with the values that they implement. For any other unknown key,
# only None, False and () are accepted.
_UNET_IGNORED = {
    "act_fn": ("silu",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (32,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
_VAE_IGNORED = {
    "force_upcast": (True, False),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
# Keys that the Flax classes have fields for, but ignore or interpret in another way than PyTorch.
_UNET_READ = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "addition_embed_type": (None,),
    "only_cross_attention": (False,),
    "dropout": (0.0,),
}
# Keys that have a meaning only together with another key, which is refused.
_INERT = {"addition_embed_type_num_heads"}
_UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
_VAE_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}


class Hooks(NamedTuple):
    """Overrides for the layers whose result at a position depends on other positions.

    The defaults are for whole images; `vae_tiling` overrides them for tiles of the VAE, `padding` for padded images.
    """

    # (x, scale, bias, groups, epsilon) -> normalized x
    norm: Callable = layers.group_norm
    # Self-attention: (query, key, value), each (b, h w, heads, d), and (h, w), which is None in the UNet
    # -> (b, h w, heads, d)
    attention: Callable = lambda query, key, value, size: layers.attention(query, key, value)
    # Applied to the input of each upsampler, and to the output of each downsampler.
    before_upsample: Callable = lambda x: x
    after_downsample: Callable = lambda x: x
    # Applied to the input of each convolution with a kernel larger than 1 x 1.
    before_conv: Callable = lambda x: x


DEFAULT_HOOKS = Hooks()


@dataclass(frozen=True, eq=False)
class Backbone:
    """The modules of one model, without weights. Hashed by identity, so it can be a static argument of `jax.jit`."""

    unet: FlaxUNet2DConditionModel
    vae: vae_flax.FlaxAutoencoderKL
    text: FlaxCLIPTextModule

    @property
    def latent_scale(self) -> float:
        """Factor between the encoder's output and the latents of the UNet (0.18215 for SD 2.1)."""
        return self.vae.scaling_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (4 for SD 2.1)."""
        return self.vae.latent_channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each axis (8 for SD 2.1)."""
        return 2 ** (len(self.vae.block_out_channels) - 1)


def build_modules(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    dtype: Any = jnp.float32,
    vae_dtype: Any = jnp.float32,
) -> Backbone:
    """Build the modules that the `config.json` of the UNet, the VAE and the text encoder describe.

    Raises:
        ValueError: a config has a value that the Flax modules would silently ignore.
    """
    return Backbone(
        unet=_construct(FlaxUNet2DConditionModel, unet, _UNET_IGNORED, _UNET_READ, _UNET_BLOCKS, dtype),
        vae=_construct(vae_flax.FlaxAutoencoderKL, vae, _VAE_IGNORED, {"act_fn": ("silu",)}, _VAE_BLOCKS, vae_dtype),
        text=FlaxCLIPTextModule(CLIPTextConfig(**{k: v for k, v in text.items() if k != "torch_dtype"})),
    )


def _construct(cls, config, ignored, read, blocks, dtype):
    known = {field.name for field in fields(cls)} - {"parent", "name", "dtype"}
    for key, value in config.items():
        allowed = (ignored | read).get(key)
        if key.startswith("_") or (key in known and allowed is None):
            continue
        if not (value in allowed if allowed else not value or key in _INERT):
            instead = " or ".join(map(repr, allowed)) if allowed else "only None or False"
            raise ValueError(
                f"{cls.__name__} does not support {key} = {value!r} of this checkpoint's config.json: it implements "
                f"{instead}, and the result would be wrong. Use a checkpoint with the architecture of SD 2.1-base."
            )
    for key in ("down_block_types", "up_block_types"):
        if unknown := set(config.get(key, ())) - blocks:
            raise ValueError(f"{key} has {sorted(unknown)}; {cls.__name__} supports {sorted(blocks)}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in known}
    return cls(**values, dtype=dtype)


def param_shapes(backbone: Backbone) -> dict[str, Any]:
    """Return the parameter trees "unet", "vae" and "text" with `jax.ShapeDtypeStruct` leaves; computes nothing.

    The modules are initialized without their arithmetic, whose tracing would take several seconds (`_declare`).
    """
    key = jax.random.key(0)
    side = 8 * backbone.vae_scale_factor
    latents = jnp.zeros((1, backbone.latent_channels, 64, 64))
    prompt = jnp.zeros((1, 1, backbone.unet.cross_attention_dim))
    ids = jnp.zeros((1, 1), jnp.int32)
    init = {
        "unet": lambda: backbone.unet.init(key, latents, jnp.ones((1,), jnp.int32), prompt),
        "vae": lambda: backbone.vae.init(key, jnp.zeros((1, backbone.vae.in_channels, side, side))),
        "text": lambda: backbone.text.init(key, ids, jnp.ones_like(ids), ids),
    }
    with nn.intercept_methods(_declare):
        return {name: jax.eval_shape(function)["params"] for name, function in init.items()}


def _declare(next_fun, args, kwargs, context):
    """Interceptor of `init`: layers declare their parameters, and return zeros of the shape of their result."""
    module, x = context.module, args[0] if args else kwargs.get("hidden_states")
    if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    if isinstance(module, nn.Dense):
        _declare_params(module, kernel=(x.shape[-1], module.features), bias=(module.features,))
        return jnp.zeros((*x.shape[:-1], module.features), x.dtype)
    if isinstance(module, nn.Conv):
        kernel = (*module.kernel_size, x.shape[-1], module.features)
        _declare_params(module, kernel=kernel, bias=(module.features,))
        padding = ((0, 0), (0, 0)) if module.padding == "VALID" else module.padding
        sides = [
            (side + sum(added) - length) // stride + 1
            for side, added, length, stride in zip(
                x.shape[1:3], padding, module.kernel_size, module.strides or (1, 1), strict=True
            )
        ]
        return jnp.zeros((len(x), *sides, module.features), x.dtype)
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        _declare_params(module, scale=x.shape[-1:], bias=x.shape[-1:])
        return x
    if isinstance(module, attention_flax.FlaxAttention):
        context = x if len(args) < 2 or args[1] is None else args[1]
        module.key(context), module.value(context)
        return module.proj_attn(module.query(x))
    if isinstance(module, FlaxCLIPAttention):
        module.k_proj(x), module.v_proj(x)
        return (module.out_proj(module.q_proj(x)),)
    return next_fun(*args, **kwargs)


def _declare_params(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Declare those of the parameters `kernel`, `scale` and `bias` that a layer has.

    `module.param` would trace a random key for each of them.
    """
    for name, shape in shapes.items():
        if getattr(module, f"use_{name}", True):
            module.put_variable("params", name, jax.lax.full(shape, 0, module.param_dtype))


def no_interception(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor of Flax's methods that changes nothing."""
    return next_fun(*args, **kwargs)


def predict_noise(
    backbone: Backbone,
    params: Params,
    latents: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"] | Int[Array, ""] | int,
    prompt: Float[Array, "b n d"] | Float[Array, "1 n d"],
    hooks: Hooks = DEFAULT_HOOKS,
    interceptor: Callable = no_interception,
) -> Float[Array, "b h w c"]:
    """Predict the noise in scaled latents of any size with the UNet; float32.

    `interceptor` sees the layers behind `hooks`: the input of a convolution after `before_conv`.
    """
    batch = latents.shape[0]
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
    prompt = jnp.broadcast_to(prompt, (batch, *prompt.shape[1:]))
    with nn.intercept_methods(_corrections(hooks)), nn.intercept_methods(interceptor):
        out = backbone.unet.apply({"params": params}, latents.transpose(0, 3, 1, 2), timesteps, prompt).sample
    return out.transpose(0, 2, 3, 1).astype(jnp.float32)


def posterior(
    backbone: Backbone, params: Params, images: Float[Array, "b h w 3"], hooks: Hooks = DEFAULT_HOOKS
) -> tuple[Float[Array, "b y x c"], Float[Array, "b y x c"]]:
    """Encode images in [-1, 1] to the mean and standard deviation of their unscaled latents; float32.

    The sides of the images are multiples of `vae_scale_factor`.
    """
    with nn.intercept_methods(_corrections(hooks)):
        found = backbone.vae.apply(
            {"params": params}, images.transpose(0, 3, 1, 2), method=backbone.vae.encode
        ).latent_dist
    return found.mean.astype(jnp.float32), found.std.astype(jnp.float32)


def encode(
    backbone: Backbone,
    params: Params,
    images: Float[Array, "b h w 3"],
    noise: Float[Array, "#b y x c"] | None = None,
    hooks: Hooks = DEFAULT_HOOKS,
) -> Float[Array, "b y x c"]:
    """Encode images in [-1, 1] to scaled latents: the mean or, with noise, mean + std noise; float32.

    The sides of the images are multiples of `vae_scale_factor`.
    """
    mean, std = posterior(backbone, params, images, hooks)
    return (mean if noise is None else mean + std * noise) * backbone.latent_scale


def decode(
    backbone: Backbone, params: Params, latents: Float[Array, "b y x c"], hooks: Hooks = DEFAULT_HOOKS
) -> Float[Array, "b h w 3"]:
    """Decode scaled latents to images, nominally in [-1, 1] but not clipped; float32."""
    with nn.intercept_methods(_corrections(hooks)):
        images = backbone.vae.apply(
            {"params": params}, latents / backbone.latent_scale, method=backbone.vae.decode
        ).sample
    return images.transpose(0, 2, 3, 1).astype(jnp.float32)


def encode_text(backbone: Backbone, params: Params, token_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """Return the last hidden state of the text encoder after its final layer norm; float32.

    No token is masked, as in SD 2.1.
    """
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    with nn.intercept_methods(_without_checks):
        out = backbone.text.apply({"params": params}, token_ids, jnp.ones_like(token_ids), positions)
    return out.last_hidden_state.astype(jnp.float32)


class Tokenizer:
    """A function from prompts to CLIP token ids, padded and truncated to the length of the checkpoint."""

    def __init__(self, folder: Path):
        # The slow tokenizer splits CJK text differently unless ftfy is installed.
        self._tokenizer = CLIPTokenizerFast.from_pretrained(str(folder))

    def __call__(self, prompts: list[str]) -> Int[np.ndarray, "b n"]:
        length = self._tokenizer.model_max_length
        ids = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
        return np.asarray(ids["input_ids"], np.int32)

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before it is truncated, with start and end."""
        return len(self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def _corrections(hooks: Hooks = DEFAULT_HOOKS) -> Callable:
    """Return an interceptor for one call of a module.

    It records the input size of each downsampler of the UNet; the matching upsampler crops its output to that size.
    """
    sizes: list[tuple[int, int]] = []

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or module.scope.is_mutable_collection("params"):
            return next_fun(*args, **kwargs)
        _skip_checks(module)
        if isinstance(module, _BLOCKS):
            return checkpoint_name(next_fun(*args, **kwargs), BLOCK_OUTPUT)
        if isinstance(module, resnet_flax.FlaxDownsample2D):
            sizes.append(args[0].shape[1:3])
        if isinstance(module, resnet_flax.FlaxUpsample2D):
            height, width = sizes.pop()
            return module.conv(layers.upsample_nearest(hooks.before_upsample(args[0]))[:, :height, :width])
        if isinstance(module, resnet_flax.FlaxDownsample2D | vae_flax.FlaxDownsample2D):
            return hooks.after_downsample(next_fun(*args, **kwargs))
        if isinstance(module, nn.Conv) and max(module.kernel_size) > 1:
            object.__setattr__(module, "conv_general_dilated", layers.conv)
            return next_fun(hooks.before_conv(args[0]), *args[1:], **kwargs)
        corrected = _CORRECTED.get(type(module))
        return corrected(hooks, module, *args) if corrected else next_fun(*args, **kwargs)

    return intercept


def _skip_checks(module: nn.Module) -> None:
    """Let a layer read its parameters as they are.

    Flax traces the initializer of each parameter that is read, to compare shapes; loading has compared them.
    """
    if isinstance(module, nn.Dense | nn.Conv | nn.LayerNorm):
        object.__setattr__(module, "param", lambda name, *_: module.scope.get_variable("params", name))


def _without_checks(next_fun, args, kwargs, context):
    _skip_checks(context.module)
    return next_fun(*args, **kwargs)


def _group_norm(hooks: Hooks, module: nn.GroupNorm, x):
    # FlaxTransformer2DModel creates its norm with 1e-5, PyTorch's with 1e-6.
    transformer = isinstance(module.parent, attention_flax.FlaxTransformer2DModel)
    weights = module.variables["params"]
    return hooks.norm(x, weights["scale"], weights["bias"], module.num_groups, 1e-6 if transformer else module.epsilon)


def _geglu(_, module: attention_flax.FlaxGEGLU, x, *__):
    linear, gate = jnp.split(module.proj(x), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _attention(hooks: Hooks, module: attention_flax.FlaxAttention, x, context=None, *__):
    attend = layers.attention if context is not None else functools.partial(hooks.attention, size=None)
    context = x if context is None else context

    def heads(projected):
        return projected.reshape(*projected.shape[:2], module.heads, module.dim_head)

    out = attend(heads(module.query(x)), heads(module.key(context)), heads(module.value(context)))
    return module.proj_attn(out.reshape(*out.shape[:2], -1))


def _vae_attention(hooks: Hooks, module: vae_flax.FlaxAttentionBlock, x):
    tokens = module.group_norm(x).reshape(x.shape[0], -1, module.num_heads, x.shape[-1] // module.num_heads)
    flat = tokens.reshape(*tokens.shape[:2], -1)
    projected = (layer(flat).reshape(tokens.shape) for layer in (module.query, module.key, module.value))
    out = hooks.attention(*projected, x.shape[1:3])
    return module.proj_attn(out.reshape(flat.shape)).reshape(x.shape) + x


def _vae_upsample(hooks: Hooks, module: vae_flax.FlaxUpsample2D, x):
    weights = module.conv.variables["params"]
    kernel, bias = (weights[name].astype(module.dtype) for name in ("kernel", "bias"))
    x = hooks.before_upsample(hooks.before_conv(x))
    return layers.upsample_conv(x.astype(module.dtype), kernel, bias)


_CORRECTED = {
    nn.GroupNorm: _group_norm,
    attention_flax.FlaxGEGLU: _geglu,
    attention_flax.FlaxAttention: _attention,
    vae_flax.FlaxAttentionBlock: _vae_attention,
    vae_flax.FlaxUpsample2D: _vae_upsample,
}
