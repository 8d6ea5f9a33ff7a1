"""Record small adapter files of PEFT, diffusers and LyCORIS and the outputs of a tiny UNet with them.

    python tests/assets/adapters/record.py tests/assets/adapters

Runs in an environment of its own with torch, peft, diffusers and lycoris-lora; versions.json names the versions.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

CONV, SHORT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv_shortcut"
QUERY, OUT = (f"mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_out.0"))
LAYERS = {
    CONV: lambda: nn.Conv2d(6, 12, 3, padding=1),
    SHORT: lambda: nn.Conv2d(12, 8, 1),
    QUERY: lambda: nn.Linear(8, 6),
    OUT: lambda: nn.Linear(6, 10),
}
LINEAR = [QUERY, OUT]
# Layers of a real UNet: a pattern of PEFT.
UNET_LAYERS = (
    r"conv_(in|out)|up_blocks\.1\.resnets\.0\.conv_shortcut|down_blocks\.0\.(resnets\.0\.conv1|downsamplers\.0\.conv|"
    r"attentions\.0\.(proj_in|transformer_blocks\.0\.(attn1\.to_q|attn2\.to_k|attn1\.to_out\.0|ff\.net\.(0\.proj|2))))"
)


class UNet(nn.Module):
    """The layers one after the other, under the names that they have in Stable Diffusion's UNet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for path, make in LAYERS.items():
            *parents, name = path.split(".")
            node = self
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = getattr(node, parent)
            node.add_module(name, make())

    def forward(self, x):
        x = self.get_submodule(SHORT)(torch.tanh(self.get_submodule(CONV)(x)))
        x = torch.tanh(x).flatten(2).mT  # as in an attention block
        return self.get_submodule(OUT)(torch.tanh(self.get_submodule(QUERY)(x)))


def image():
    return torch.randn(2, 6, 7, 9, generator=torch.Generator().manual_seed(1))


def randomize(parameters):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(parameters):
        if "bias" in name or "diff_b" in name:  # changes of biases are not part of a kernel's adapter
            continue
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def record_peft(folder):
    import peft

    common = {"target_modules": list(LAYERS)}
    configs = {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 7}, **common),
        "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **common),
        "dora": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **common),
        "loha": peft.LoHaConfig(r=3, alpha=5, **common),
        "loha_tucker": peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, **common),
        "lokr": peft.LoKrConfig(r=1, alpha=5, **common),
        "vera": peft.VeraConfig(r=3, target_modules=LINEAR),
        "hra": peft.HRAConfig(r=4, **common),
        "oft": peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False, target_modules=LINEAR),
        "oft_neumann": peft.OFTConfig(r=0, oft_block_size=2, target_modules=LINEAR),
    }
    for name, config in configs.items():
        model = peft.get_peft_model(UNet(), config)
        randomize((key, p) for key, p in model.named_parameters() if p.requires_grad)
        model.eval()
        model.save_pretrained(folder / f"peft_{name}")
        (folder / f"peft_{name}" / "README.md").unlink(missing_ok=True)
        yield f"peft_{name}", model(image())
        if name == "lora":
            from diffusers.loaders import StableDiffusionLoraLoaderMixin
            from diffusers.utils import convert_state_dict_to_diffusers

            layers = convert_state_dict_to_diffusers(
                {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items()}
            )
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                folder / "diffusers", unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
            )


def record_diffusers(folder):
    """Adapters of some layers of a real UNet, and its output for an input of fixtures/comp/unet.npz at timestep 1."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    fixtures = folder.parent / "fixtures"
    inputs, outputs = np.load(fixtures / "comp" / "unet.npz"), {}
    x, prompt = (torch.from_numpy(inputs[name]) for name in ("x0", "emb0"))
    for name, options in {"lora": {}, "dora": {"use_dora": True}}.items():
        unet = UNet2DConditionModel.from_pretrained(fixtures / "sd_tiny", subfolder="unet", torch_dtype=torch.float32)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=UNET_LAYERS, **options))
        randomize((key, p) for key, p in unet.named_parameters() if "lora" in key)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        metadata = _collate_lora_metadata({"unet": unet})
        StableDiffusionPipeline.save_lora_weights(folder / f"diffusers_{name}", unet_lora_layers=layers, **metadata)
        if name == "lora":
            unet.save_lora_adapter(folder / "diffusers_unet_lora")
        with torch.no_grad():
            outputs[name] = unet(x, 1, prompt).sample.numpy()
        # With the names that pisa_jax writes; diffusers drops the layers of attention of the file above.
        state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
        config = {f"unet.{key}": value for key, value in unet.peft_config["default"].to_dict().items()}
        again = UNet2DConditionModel.from_pretrained(fixtures / "sd_tiny", subfolder="unet", torch_dtype=torch.float32)
        StableDiffusionPipeline.load_lora_into_unet(state, None, again, metadata=config)
        with torch.no_grad():
            assert np.abs(again(x, 1, prompt).sample.numpy() - outputs[name]).max() < 1e-4, name
    np.savez(folder / "diffusers_outputs.npz", **outputs)


def record_lycoris(folder):
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.LORA_PREFIX = "lora_unet"
    LycorisNetwork.apply_preset({"target_module": ["Conv2d", "Linear"], "target_name": []})
    cases = {
        "locon": {"algo": "lora"},
        "locon_tucker": {"algo": "lora", "use_tucker": True},
        "dora": {"algo": "lora", "dora_wd": True},
        "loha": {"algo": "loha"},
        "loha_tucker": {"algo": "loha", "use_tucker": True},
        "lokr": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1},
        "lokr_tucker": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_tucker": True},
        "oft": {"algo": "diag-oft"},
        "full": {"algo": "full"},
    }
    for name, options in cases.items():
        model = UNet()
        settings = {"linear_dim": 3, "linear_alpha": 5, "conv_dim": 3, "conv_alpha": 5} | options
        network = create_lycoris(model, 1.0, **settings)
        network.apply_to()
        randomize((key, p) for key, p in network.named_parameters() if p.requires_grad)
        network.eval()
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"lycoris_{name}.safetensors")
        yield f"lycoris_{name}", model(image())


def main():
    folder = Path(sys.argv[1])
    weights = {key: value.numpy() for key, value in UNet().state_dict().items()}
    outputs, failed = {"plain": UNet()(image()).detach().numpy()}, {}
    for record in (record_peft, record_lycoris):
        try:
            for name, out in record(folder):
                outputs[name] = out.detach().numpy()
                print(name, float((out.detach() - torch.from_numpy(outputs["plain"])).abs().max()), flush=True)
        except Exception as error:
            failed[record.__name__] = repr(error)
            raise
        finally:
            np.savez(folder / "outputs.npz", image=image().numpy(), **outputs)
            np.savez(folder / "weights.npz", **weights)
    record_diffusers(folder)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "diffusers", "lycoris-lora")}
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
