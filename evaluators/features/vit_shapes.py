"""Sizes and preprocessing of the Vision Transformers that serve as feature extractors, and where their weights are.

Shapes of DINOv2 after facebookresearch/dinov2, dinov2/hub/backbones.py and dinov2/models/vision_transformer.py; of CLIP
after openai/CLIP, clip/model.py, and the published ViT-L/14@336px.
"""

from dataclasses import dataclass

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
    """A DINOv2 model. letter, size: how its files and its repository name it, such as "b" and "base"."""
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
