"""Vision Transformers as feature extractors: DINOv2 for Frechet distances, CLIP's image tower for CMMD.

This module loads no framework; sizes are in `evaluators.features.vit_shapes`.
"""

from evaluators.features.spec import FeatureSpec
from evaluators.features.vit_shapes import FLAG, SHAPES

# dgm-eval (Stein et al., arXiv:2306.04675) resizes with Pillow, which rounds to 8 bits. Most published FD-DINOv2 numbers
# use EDM2's default, a float32 resize on the device.
_DINOV2 = (
    "class token after the final norm; bicubic antialiased resize to 224x224 in float32 as EDM2 does;"
    " ImageNet's mean and standard deviation; float32"
)
# google-research/google-research, cmmd/io_util.py and embedding.py
_CLIP = (
    "image embedding scaled to length 1; the middle square resized to 336x336 by Pillow, bicubic;"
    " CLIP's mean and standard deviation; float32"
)


def _spec(name: str, title: str) -> FeatureSpec:
    """The FeatureSpec of the item `name` of SHAPES. Only CLIP has a projection. title: its name in the description."""
    shape = SHAPES[name]
    return FeatureSpec(
        name=name,
        dim=shape.dim,
        classes=None,
        input_size=shape.input_size,
        loader="evaluators.features.vit:load",
        description=f"{title}, {_CLIP if shape.projection else _DINOV2}",
        requires="torch",
        weights_option=FLAG,
    )


DINOV2_VIT_B_14 = _spec("dinov2-vit-b-14", "DINOv2 ViT-B/14")
DINOV2_VIT_L_14 = _spec("dinov2-vit-l-14", "DINOv2 ViT-L/14")
CLIP_VIT_L_14_336 = _spec("clip-vit-l-14-336", "CLIP ViT-L/14-336")

SPECS = {spec.name: spec for spec in (DINOV2_VIT_B_14, DINOV2_VIT_L_14, CLIP_VIT_L_14_336)}
