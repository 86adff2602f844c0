"""Independence check: diffusers' U-Nets with our weights give our output and our gradients.

diffusers 0.42.1's UNet2DModel is ADM and its UNet2DConditionModel LDM without the class table, given the right
settings: residual resampling and scale_shift for ADM, 32 groups in the middle attention (attn_norm_num_groups; with
scale_shift it has no normalisation otherwise), and "attention_head_dim" meaning channels of a head in the first and
heads in the second. No constant had to be corrected: cosines stand first and frequencies are spaced by 1 / half, group
norms have eps 1e-5 and those before a transformer 1e-6. What the weights need is that the qkv layer is cut into three,
where the older order (a head's q, k and v together) is sorted first: diffusers knows the newer order alone
(scripts/convert_consistency_to_diffusers.py).
"""

import pytest
import torch

from backbones.adm.spec import SPECS as ADM_SPECS
from backbones.ldm.spec import SPECS as LDM_SPECS

diffusers = pytest.importorskip("diffusers")

BY_NAME = {spec.name: spec for spec in (*ADM_SPECS, *LDM_SPECS)}
ADM = {"input_size": 16, "num_classes": 10, "width": 32, "multipliers": (1, 2, 3), "res_blocks": 2}
ADM |= {"attention_resolutions": (8, 4), "head_channels": 16}
LDM = {"input_size": 16, "num_classes": 10, "width": 32, "multipliers": (1, 2, 3), "context_width": 48}
LDM |= {"res_blocks": 2, "attention_rates": (4, 2)}
CASES = {
    "adm, newer order": ("adm-xs", {**ADM, "qkv_first": True}),
    "adm, older order": ("adm-xs", ADM),
    "adm, no class": ("adm-xs", {**ADM, "num_classes": 0, "res_blocks": 1}),
    "ldm, one head": ("ldm-xs", {**LDM, "heads": 1, "head_channels": 0}),
    "ldm, heads of 16, depth 2": ("ldm-xs", {**LDM, "head_channels": 16, "transformer_depth": 2}),
}
RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}


def block_names(levels, res_blocks, attended):
    """Our module path -> diffusers', for every part of the U-Net."""
    names = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb": "class_embedding"}
    for index, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        names[f"middle_block.{index}"] = f"mid_block.{part}"
    number = 0
    for level in range(levels):
        for index in range(res_blocks):
            number += 1
            names[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{index}"
            names[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{index}"
        number += 1
        names[f"input_blocks.{number}.0"] = f"down_blocks.{level}.downsamplers.0"
    for level in range(levels):
        for index in range(res_blocks + 1):
            number = level * (res_blocks + 1) + index
            names[f"output_blocks.{number}.0"] = f"up_blocks.{level}.resnets.{index}"
            has_attention = attended[levels - 1 - level]
            if has_attention:
                names[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{index}"
        names[f"output_blocks.{number}.{1 + has_attention}"] = f"up_blocks.{level}.upsamplers.0"
    return names


def to_diffusers(tensors, names, heads_of, qkv_first):
    """Our tensors by name -> diffusers'; `heads_of` maps channels to heads."""
    transformers = any("transformer_blocks" in name for name in tensors)  # LDM's attention has diffusers' names
    out = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        ours = next(ours for ours in names if path == ours or path.startswith(f"{ours}."))
        inner = path.removeprefix(ours).removeprefix(".")
        theirs = f"{names[ours]}.{RESBLOCK.get(inner, inner)}".removesuffix(".")
        if inner == "qkv":
            stacked = tensor.squeeze(-1) if kind == "weight" else tensor
            if not qkv_first:  # (heads, 3, channels of a head) -> (3, heads, channels of a head)
                heads = heads_of(len(stacked) // 3)
                stacked = stacked.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            for letter, third in zip("qkv", stacked.chunk(3), strict=True):
                out[theirs.removesuffix("qkv") + f"to_{letter}.{kind}"] = third
        elif inner == "proj_out" and not transformers:
            out[theirs.replace("proj_out", f"to_out.0.{kind}")] = tensor.squeeze(-1) if kind == "weight" else tensor
        elif inner == "norm" and not transformers:
            out[theirs.replace(".norm", f".group_norm.{kind}")] = tensor
        else:
            out[f"{theirs}.{kind}"] = tensor
    return out


def diffusers_net(family, a):
    channels = [a["width"] * multiplier for multiplier in a["multipliers"]]
    common = {
        "sample_size": a["input_size"],
        "in_channels": a["in_channels"],
        "layers_per_block": a["res_blocks"],
        "block_out_channels": channels,
        "norm_num_groups": 32,
    }
    if family == "adm":
        return diffusers.UNet2DModel(
            **common,
            out_channels=2 * a["in_channels"],
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32,
            attention_head_dim=a["head_channels"],
            num_class_embeds=a["num_classes"] or None,
        )
    return diffusers.UNet2DConditionModel(
        **common,
        out_channels=a["in_channels"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=a["context_width"],
        transformer_layers_per_block=a["transformer_depth"],
        attention_head_dim=[a["heads"] or width // a["head_channels"] for width in channels],
    )


def unet(ours, family):
    return ours if family == "adm" else ours.model["diffusion_model"]


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """Output, gradient of the input and gradients of all weights, by our network and by diffusers'."""
    name, overrides = CASES[request.param]
    family, a = BY_NAME[name].family, BY_NAME[name].arguments(**overrides)
    torch.manual_seed(0)
    ours = BY_NAME[name].build(**overrides).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # what is zero at the start too
            if parameter.dim() > 1:
                parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))

    attended = [False, True, True]
    names = block_names(len(a["multipliers"]), a["res_blocks"], attended)

    def mapped(tensors):
        return to_diffusers(tensors, names, lambda width: width // a["head_channels"], a.get("qkv_first", True))

    theirs = diffusers_net(family, a).eval()
    theirs.load_state_dict(mapped(unet(ours, family).state_dict()), strict=True)

    ours.double(), theirs.double()  # in float32 the eps of a normalisation would drown in rounding
    unet(ours, family).time_embed.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    x, target = torch.randn(2, a["in_channels"], 16, 16), torch.randn(2, unet(ours, family).out[2].out_channels, 16, 16)
    t, y = torch.tensor([3, 777]), torch.tensor([4, 9])
    results = []
    for net in (ours, theirs):
        image = x.double().requires_grad_()
        if net is ours:
            out = ours(image, t, y)
        elif family == "adm":
            out = theirs(image, t, class_labels=y if a["num_classes"] else None).sample
        else:
            out = theirs(image, t, encoder_hidden_states=ours.cond_stage_model(y).detach()).sample
        torch.nn.functional.mse_loss(out, target.double()).backward()
        results.append((out.detach(), image.grad))
    gradients = mapped({name: parameter.grad for name, parameter in unet(ours, family).named_parameters()})
    return *results, gradients, {name: parameter.grad for name, parameter in theirs.named_parameters()}


def relative(mine, other):
    return ((mine - other).norm() / other.norm()).item()


def test_same_weights_give_the_same_output(both):
    (mine, _), (other, _), *_ = both
    assert mine.dtype == other.dtype == torch.float64 and mine.shape == other.shape
    assert mine.std() > 0.1
    assert relative(mine, other) < 1e-8


def test_same_weights_give_the_same_gradients(both):
    (_, mine), (_, other), gradients, their_gradients = both
    assert relative(mine, other) < 1e-8
    assert set(gradients) == set(their_gradients)
    largest = max(gradient.norm() for gradient in their_gradients.values())
    for name, gradient in their_gradients.items():
        if gradient.norm() > 1e-8 * largest:  # below it what rounding leaves of an exact zero
            assert relative(gradients[name], gradient) < 1e-6, name
