"""Vision Transformers as feature extractors: DINOv2 for Frechet distances, CLIP's image tower for CMMD.

Shapes of DINOv2 after facebookresearch/dinov2, dinov2/hub/backbones.py and dinov2/models/vision_transformer.py; of CLIP
after openai/CLIP, clip/model.py, and the published ViT-L/14@336px. This module loads no framework.
"""

from dataclasses import dataclass

from evaluators.features import FeatureSpec

FLAG = "--features-weights"


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """Sizes of a Vision Transformer, its preprocessing, and the source of its weights.

    The features are the class token after the final norm; with a projection, they are projected and scaled to length 1.
    """

    input_size: int  # height and width of the images in pixels
    width: int
    depth: int
    heads: int
    patch: int = 14
    grid: int  # rows and columns of patches in the stored position table
    eps: float  # of every layer norm
    layer_scale: bool  # a learned factor for every channel of every branch
    pre_norm: bool  # a layer norm before the first block; the patch embedding then has no bias
    quick_gelu: bool  # x * sigmoid(1.702 x) instead of the exact GELU
    projection: int | None  # output width of the linear projection of the class token; None: no projection
    resize: str  # "float32": bicubic, antialiased, not rounded; "pillow": centre crop and bicubic, by Pillow
    mean: tuple[float, float, float]  # of each channel, in [0, 1]
    std: tuple[float, float, float]
    repository: str  # on the Hugging Face hub
    file: str = ""  # of torch.hub, in its folder of checkpoints
    url: str = ""  # of that file

    @property
    def dim(self) -> int:
        """Length of the features."""
        return self.projection or self.width


def _dinov2(width: int, depth: int, heads: int, letter: str, size: str) -> VitShape:
    name = f"dinov2_vit{letter}14"
    return VitShape(
        input_size=224,
        width=width,
        depth=depth,
        heads=heads,
        grid=37,  # of the last training stage, at 518 pixels
        eps=1e-6,
        layer_scale=True,
        pre_norm=False,
        quick_gelu=False,
        projection=None,
        resize="float32",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        repository=f"facebook/dinov2-{size}",
        file=f"{name}_pretrain.pth",
        url=f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth",
    )


SHAPES = {
    "dinov2-vit-b-14": _dinov2(768, 12, 12, "b", "base"),
    "dinov2-vit-l-14": _dinov2(1024, 24, 16, "l", "large"),
    "clip-vit-l-14-336": VitShape(
        input_size=336,
        width=1024,
        depth=24,
        heads=16,
        grid=24,
        eps=1e-5,
        layer_scale=False,
        pre_norm=True,
        quick_gelu=True,
        projection=768,
        resize="pillow",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        repository="openai/clip-vit-large-patch14-336",
    ),
}

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
