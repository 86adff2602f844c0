"""The Diffusion Transformer in torch, with the parameter names and shapes of the public release.

Source: arXiv:2212.09748, Sec. 3.2 and appendix A; names, order of initialisation and constants after
facebookresearch/DiT ed81ce2, models.py. Only adaLN-Zero was released. The other three block designs follow the paper's
text; their layer norms, biases and final layer were chosen to match its parameter counts (Table 4).

Shapes: N images, T tokens, D width, H heads, p patch size, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.dit.layout import MLP_RATIO, TIME_FEATURES, check_arguments
from backbones.dit.position import sincos_table
from backbones.torch_layers import attend, full_precision, gelu, timestep_features
from harness.errors import UserError

EPS = 1e-6  # of every layer norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled by 1 + scale and shifted; scale and shift are (N, D).

    The result has the dtype of scale and shift: the linear layer that follows would round it to that dtype anyway.
    """
    return torch.addcmul(shift.unsqueeze(1), x.to(scale.dtype), 1 + scale.unsqueeze(1))


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x (N, T, D) plus gate (N, D) times branch (N, T, D): one fused operator where the dtypes agree."""
    if branch.dtype != x.dtype:  # under autocast: the product is rounded to the lower precision before the sum
        return x + gate.unsqueeze(1) * branch
    return torch.addcmul(x, gate.unsqueeze(1), branch)


def plain_norm(width: int) -> nn.LayerNorm:
    """A layer norm without learned scale and shift."""
    return nn.LayerNorm(width, eps=EPS, elementwise_affine=False)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads_and_width = (self.heads, x.shape[-1] // self.heads)
        # Split the last dimension in three, without a (3, H) axis: the gradients are then joined by one contiguous copy.
        q, k, v = (
            part.unflatten(-1, heads_and_width).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )  # (N, H, T, D/H)
        x = attend(q, k, v)  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention from the image tokens to the conditioning tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads_and_width = (self.heads, x.shape[-1] // self.heads)
        q = self.q(x).unflatten(-1, heads_and_width).transpose(1, 2)  # (N, H, T, D/H)
        k, v = (
            part.unflatten(-1, heads_and_width).transpose(1, 2) for part in self.kv(context).chunk(2, dim=-1)
        )  # (N, H, 2, D/H)
        x = attend(q, k, v)  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class Mlp(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.fc1(x))  # (N, T, 4D)
        return self.fc2(x)  # (N, T, D)


class AdaLNBlock(nn.Module):
    """ViT block whose layer norms are modulated by timestep and class: adaLN-Zero if `gated`, else adaLN.

    A linear layer regresses scales and shifts, and if gated also gates of the two residual branches.
    """

    def __init__(self, width: int, heads: int, gated: bool):
        super().__init__()
        self.gated = gated
        self.norm1 = plain_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if gated else 4) * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)  # (N, 6D) or (N, 4D)
        if not self.gated:
            shift1, scale1, shift2, scale2 = modulation.chunk(4, dim=-1)  # (N, D) each
            x = x + self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
            return x + self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, D) each
        x = add_gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))  # (N, T, D)
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, D)


class InContextBlock(nn.Module):
    """A standard ViT block; the conditioning is two more tokens of the sequence."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (N, T + 2, D); c is in x
        return x + self.mlp(self.norm2(x))  # (N, T + 2, D)


class CrossAttentionBlock(nn.Module):
    """A ViT block with attention to the two conditioning tokens after the self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width, eps=EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (N, T, D)
        x = x + self.cross_attn(self.norm_cross(x), c)  # (N, T, D); c (N, 2, D)
        return x + self.mlp(self.norm2(x))  # (N, T, D)


def build_block(block: str, width: int, heads: int) -> nn.Module:
    """A block of the named design, one of backbones.dit.layout.BLOCKS; every block is called as block(x, c)."""
    if block == "in-context":
        return InContextBlock(width, heads)
    if block == "cross-attention":
        return CrossAttentionBlock(width, heads)
    return AdaLNBlock(width, heads, gated=block == "adaln-zero")


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches, row by row; its weight has a convolution's shape (D, C, p, p)."""

    def __init__(self, patch: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # (N, D, H/p, W/p)
        # Contiguous, so that the tensors computed from it are: a layer norm copies a transposed tensor every time, and
        # the compiled gradient of that norm is wrong (torch 2.13, inductor on a CPU: by 0.4 % to 4 %).
        return x.flatten(2).transpose(1, 2).contiguous()  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """256 sinusoids of the timestep and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t, TIME_FEATURES))  # (N, D)


class LabelEmbedder(nn.Module):
    """One vector per class, and a last one for "no class"."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)


class FinalLayer(nn.Module):
    """Layer norm and linear output layer of every token; with adaLN for the two adaLN designs."""

    def __init__(self, width: int, outputs: int, adaptive: bool):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=not adaptive)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if adaptive else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.adaLN_modulation is None:
            return self.linear(self.norm_final(x))  # (N, T, p*p*C_out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # (N, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*C_out)


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer; for items of an nn.Sequential, of which type checkers do not know the type."""
    assert isinstance(layer, nn.Linear)
    return layer.weight


class DiT(nn.Module):
    """Diffusion Transformer.

    Its inputs are x (N, in_channels, input_size, input_size), t (N,) timesteps 0..999, integer or not, and y (N,) int64
    labels 0..num_classes, where num_classes means "no class". It returns (N, out_channels, input_size, input_size).
    With the paper's objective, the first half of the output channels is the noise and the second half the variance.
    Label dropout is done by the trainer. The output is exactly 0 before training. Timestep and label embeddings are
    float32 even under autocast. `gradient_checkpointing` stores only the input of each block for the backward pass and
    recomputes the rest.
    """

    def __init__(
        self,
        *,
        input_size: int,  # latent cells or pixels a side
        in_channels: int,
        num_classes: int,  # without the "no class" label
        out_channels: int | None,  # None: 2 * in_channels
        depth: int,
        width: int,
        heads: int,
        patch: int,
        block: str,  # one of backbones.dit.layout.BLOCKS
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_arguments(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            out_channels=out_channels,
            depth=depth,
            width=width,
            heads=heads,
            patch=patch,
            block=block,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.input_shape = (in_channels, input_size, input_size)
        self.out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patch = patch
        self.grid = input_size // patch
        self.block = block
        self.gradient_checkpointing = gradient_checkpointing

        # Modules are created in the release's order: default initialisation draws random numbers, and the same torch
        # seed must give the same weights.
        adaptive = block in ("adaln", "adaln-zero")
        self.x_embedder = PatchEmbed(patch, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList([build_block(block, width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels, adaptive)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all weights, in place, from torch's global generator, as facebookresearch/DiT ed81ce2 does."""
        if self.pos_embed.is_meta:  # no storage, nothing to draw
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.pos_embed.copy_(torch.from_numpy(sincos_table(self.pos_embed.shape[-1], self.grid)))
        # The patch embedding is initialised as a linear map of p*p*C inputs, although it is stored as a convolution.
        patch_embedding = self.x_embedder.proj
        nn.init.xavier_uniform_(patch_embedding.weight.flatten(1))  # a view, so this sets the weight
        assert patch_embedding.bias is not None
        nn.init.zeros_(patch_embedding.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(_weight(self.t_embedder.mlp[0]), std=0.02)
        nn.init.normal_(_weight(self.t_embedder.mlp[2]), std=0.02)
        for block in self.blocks:
            if isinstance(block, AdaLNBlock) and block.gated:  # adaLN-Zero: every block starts as the identity
                nn.init.zeros_(_weight(block.adaLN_modulation[1]))
        if self.final_layer.adaLN_modulation is not None:
            nn.init.zeros_(_weight(self.final_layer.adaLN_modulation[1]))
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[1:] != self.input_shape:
            raise UserError(
                f"DiT: input of shape {tuple(x.shape)}, but this network takes (N, {', '.join(map(str, self.input_shape))});"
                " build it with the input_size and in_channels of the data"
            )
        tokens = self.grid**2  # T, of the image
        with full_precision(x.device.type):
            t_embedding = self.t_embedder(t)  # (N, D) float32
            y_embedding = self.y_embedder(y)  # (N, D) float32
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D), T = (input_size / p) ** 2
        if self.block in ("adaln", "adaln-zero"):
            c = t_embedding + y_embedding  # (N, D)
        else:
            c = torch.stack([t_embedding, y_embedding], dim=1)  # (N, 2, D)
        if self.block == "in-context":
            x = torch.cat([x, c.to(x.dtype)], dim=1)  # (N, T + 2, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)  # a block is deterministic
            else:
                x = block(x, c)  # (N, T, D), in-context T + 2
        x = self.final_layer(x[:, :tokens], c)  # (N, T, p*p*C_out), without the conditioning tokens
        return self.unpatchify(x)  # (N, C_out, input_size, input_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Images from token vectors, which are laid out as (row, column, channel) with the channel fastest."""
        x = x.unflatten(2, (self.patch, self.patch, self.out_channels))  # (N, T, p, p, C_out)
        x = x.unflatten(1, (self.grid, self.grid))  # (N, G, G, p, p, C_out)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C_out, G, p, G, p)
        return x.flatten(4, 5).flatten(2, 3)  # (N, C_out, input_size, input_size)
