"""Public weight files of LDM: model.ckpt, a Lightning checkpoint that holds more than the denoiser.

Names after CompVis/latent-diffusion a506df5: the U-Net under model.diffusion_model, the class embedder under
cond_stage_model, the autoencoder under first_stage_model, the tables of the noise schedule, and, if weights were
averaged, the averages under model_ema.<name after "model." without its dots> (ldm/modules/ema.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.spec import BackboneSpec
from harness.weights.maps import Layout, Mismatch, Recipes, Shapes, Take, WeightMap, take_all

FIRST_STAGE = "first_stage_model."
AVERAGES = "model_ema."
COUNTERS = ("model_ema.decay", "model_ema.num_updates")
TABLES = (  # of DDPM.register_schedule and of LatentDiffusion
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor",
)  # fmt: skip
UNET = "model.diffusion_model."


def average_name(name: str) -> str:
    """Name of the moving average of tensor `name`, which begins with "model."."""
    return AVERAGES + name.removeprefix("model.").replace(".", "")


def average_names(shapes: Shapes) -> dict[str, str]:
    """Name of a tensor of the U-Net -> name of its moving average; empty if the file has none.

    Raises Mismatch if only some of the tensors have a moving average.
    """
    names = {name: average_name(name) for name in shapes if name.startswith("model.")}
    missing = [name for name, average in names.items() if average not in shapes]
    if missing and len(missing) < len(names):
        raise Mismatch(
            f"{missing[0]} has no moving average ({names[missing[0]]} is missing), but other tensors have one: fetch the"
            " file again, or remove model_ema from it"
        )
    return {} if missing else names


def inward(shapes: Shapes, known: Mapping[str, Any]) -> Recipes:
    """Recipes of all tensors under their names; those of the U-Net from their moving averages if there are any.

    The averages and their counters have no recipes under their own names. `known` is not used.
    """
    averages = average_names(shapes)
    only_in_file = {*averages.values(), *COUNTERS}
    return {name: Take(averages.get(name, name)) for name in shapes if name not in only_in_file}


def beside(name: str) -> bool:
    """Whether a tensor of the file belongs to the autoencoder or the noise schedule, not to the denoiser."""
    return name.startswith(FIRST_STAGE) or name in TABLES


def notes(shapes: Shapes) -> tuple[str, ...]:
    """Notes for the user on which weights are used."""
    if average_names(shapes):
        return ("the U-Net's weights are the moving average (model_ema); the weights without averaging are not used",)
    if any(beside(name) for name in shapes):  # a checkpoint of a training run, in which averages are expected
        return ("the file holds no model_ema: the U-Net's weights are those under model.diffusion_model",)
    return ()


def facts(spec: BackboneSpec, shapes: Shapes) -> dict[str, Any]:
    """Builder arguments that follow from the shapes; without the tensor of an argument, that argument is left out."""
    arguments: dict[str, Any] = {}
    if len(embedding := shapes.get(f"{UNET}time_embed.0.weight", ())) == 2:
        arguments["width"] = embedding[1]
    if len(first := shapes.get(f"{UNET}input_blocks.0.0.weight", ())) == 4:
        arguments["in_channels"] = first[1]
    if (last := shapes.get(f"{UNET}out.2.bias")) and "in_channels" in arguments:
        outputs, default = last[0], arguments["in_channels"]
        arguments["out_channels"] = None if outputs == default else outputs
    if len(labels := shapes.get("cond_stage_model.embedding.weight", ())) == 2:
        arguments["context_width"] = labels[1]
        # The shapes do not tell whether the last label is the null class; the named network does.
        arguments["num_classes"] = labels[0] - (1 if spec.defaults.get("null_class") else 0)
    return arguments


MAP = WeightMap(
    layouts=(
        Layout(
            name="ldm",
            title="LDM model.ckpt",
            marks=(f"{UNET}time_embed.0.weight", f"{UNET}input_blocks.0.0.weight", "cond_stage_model.embedding.weight"),
            store="lightning",
            suffix=".ckpt",
            inward=inward,
            outward=take_all,
            beside=beside,
            notes=notes,
        ),
    ),
    facts=facts,
)
