"""The networks, in the order in which an image meets them.

    Attention, MLP, Block          the transformer, as in ViT (pre-norm); compile_blocks
    Encoder                        patches -> M blocks -> 2 × 2 tokens become 1 -> the other blocks -> image tokens
    Bottleneck                     image tokens -> latent: pixel shuffle, then an MLP
    Unbottleneck, Decoder          the mirror image of both
    TCAE                           the tokenizer: encode(images) -> z, decode(z) -> images
    IBOTHead, JointTokenizer       the head of self-supervision; all that stage 1 trains
    LightningDiT                   the generator, on the tokenizer's latents
    flow_matching_loss, sample_flow    how it is trained and sampled, side by side

Images are (B, 3, H, W) in [-1, 1]. A "map" is (B, D, h, w), "tokens" are (B, h * w, D), row by row.
Sections and tables are those of the paper, arXiv 2604.07340.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth (blocks), heads
DIT_SIZES = {**SIZES, "XL": (1152, 28, 16)}


def parse_size(name, size, sizes=SIZES):
    """"S", "B", "L" or "width/depth/heads" -> (width, depth, heads). ValueError for anything else, with the `name`."""
    if size in sizes:
        return sizes[size]
    numbers = size.split("/")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{name}={size!r} is neither one of {', '.join(sizes)} nor width/depth/heads such as 128/4/4")
    width, depth, heads = map(int, numbers)
    if width % heads or width % 4:
        raise ValueError(f"{name}={size!r}: the width must be divisible by the heads, and by 4 for its positions")
    return width, depth, heads


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, D) -> (B, N, D); `rope` is for the generator."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = dot_product_attention(q, k, v)  # softmax(q kᵀ / √(D / heads)) v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def dot_product_attention(q, k, v):
    """softmax(q kᵀ / √d) v, (B, heads, N, d) each: PyTorch's fused kernel, but for training in bfloat16 on a CPU, where
    its backward is up to ten times slower than the plain products'."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Two linear layers with a GELU between, over the last dimension."""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), (B, N, D) -> (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MapMLP(MLP):
    """An MLP over the channels of a map, (B, inputs, h, w) -> (B, outputs, h, w)."""

    def forward(self, map):
        return super().forward(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_weights(module):
    """For `module.apply`: Xavier for linear layers. Layers without a residual connection around them (compression,
    expansion, bottleneck) get He's, which keeps the variance through the GELU: otherwise the image's signal would
    become small beside the position embedding that is added after it. Biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.ConvTranspose2d):  # stride 2: an output pixel sees a quarter of the kernel's weights
        nn.init.normal_(module.weight, std=(8 / module.weight[:, 0].numel()) ** 0.5)
    elif isinstance(module, MapMLP):  # after its linear layers, since apply() visits children first
        nn.init.kaiming_normal_(module.fc1.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(module.fc2.weight, nonlinearity="relu")
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.zeros_(module.bias)


def compile_blocks(*networks):
    """torch.compile every transformer block in these networks by itself: blocks of one shape share the result."""
    torch._dynamo.config.cache_size_limit = 64  # one version per crop size, with and without gradient
    torch._dynamo.config.optimize_ddp = False  # else every block is cut where DDP's buckets end
    for network in networks:
        for module in network.modules():
            if isinstance(module, (Block, DiTBlock)):
                module.compile(dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# Between pixels, tokens and maps


def patchify(images, patch_size):
    """Images (B, 3, H, W) -> patches (B, H W / p², 3 p²): the pixels of every p × p square in one row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def to_map(tokens, height, width):
    """(B, h w, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def to_tokens(map):
    """(B, D, h, w) -> (B, h w, D)."""
    return map.flatten(2).transpose(1, 2)


def regrid(map, factor):
    """Pixel shuffle to a grid `factor` times coarser, (B, D, h, w) -> (B, D factor², h / factor, w / factor).

    A factor below 1 (1/2, 1/4, …) shuffles the other way, to a finer grid with fewer channels.
    """
    return F.pixel_unshuffle(map, round(factor)) if factor >= 1 else F.pixel_shuffle(map, round(1 / factor))


@lru_cache(maxsize=32)
def position_embedding(height, width, reference, dim, device):
    """Fixed 2-D sine-cosine position embedding, (height * width, dim), amplitude 1.

    Every grid is rescaled to `reference` × `reference`, aligned at patch centres, so that local crops span the whole
    range too (iBOT interpolates a learned embedding instead).
    """
    def encode(count):
        position = (torch.arange(count, dtype=torch.float64) + 0.5) * reference / count - 0.5
        angles = position[:, None] * 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, dim / 2)

    rows, columns = encode(height)[:, None].expand(-1, width, -1), encode(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float().to(device)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer (Sec. 3.3, Fig. 5)


def compression_layer(width, kind):
    """2 × 2 tokens -> 1, as maps (B, D, h, w) -> (B, D, h / 2, w / 2); the two rows of Table 8."""
    if kind == "conv":  # "lightweight two-layer convolution"; with the stride first both layers are cheap
        return nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU(),
                             nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(nn.PixelUnshuffle(2), MapMLP(4 * width, width, width))


def expansion_layer(width, kind):
    """1 token -> 2 × 2, the mirror image of `compression_layer`."""
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
                             nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1))
    return nn.Sequential(MapMLP(width, width, 4 * width), nn.PixelShuffle(2))


class Encoder(nn.Module):
    """Images -> [CLS] token and image tokens, with staged token compression after block M = stc_depth (Sec. 3.3).

    N = H W / p² tokens (Eq. 1) enter. `output_patch` is the side, in pixels, of the square that one output token stands
    for: p, or 2 p with a compression layer.
    """

    def __init__(self, image_size, patch_size, size, stc_depth, compression):
        super().__init__()
        width, depth, heads = parse_size("encoder", size)
        self.patch_size, self.width = patch_size, width
        self.output_patch = patch_size * (2 if stc_depth else 1)
        self.reference = image_size // patch_size  # the grid that position embeddings are laid over
        self.patch_embed = nn.Linear(3 * patch_size**2, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.fine_blocks = nn.Sequential(*[Block(width, heads) for _ in range(stc_depth)])  # on all N tokens
        self.compress = compression_layer(width, compression) if stc_depth else None
        self.coarse_blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth - stc_depth)])  # on N / 4
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)
        # pixels in [-1, 1] are small: with this gain a patch starts about as large as the embedding of its position
        nn.init.normal_(self.patch_embed.weight, std=2 * self.patch_embed.in_features ** -0.5)

    def forward(self, images, mask=None):
        """Images (B, 3, H, W) with H and W multiples of `output_patch` -> [CLS] (B, D), tokens (B, h w, D).

        `mask` (B, h, w), True where an *output* token is to be hidden: all patches under it become the mask token,
        so that every output token is wholly hidden or wholly visible.
        """
        if images.shape[2] % self.output_patch or images.shape[3] % self.output_patch:
            raise ValueError(f"the sides of images {tuple(images.shape)} must be multiples of {self.output_patch} px")
        height, width = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N, D)
        if mask is not None:
            if self.compress:
                mask = mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            x = torch.where(mask.flatten(1)[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + position_embedding(height, width, self.reference, self.width, x.device)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        x = self.fine_blocks(x)
        if self.compress:  # [CLS] bypasses the convolution and rejoins the shorter sequence
            x, cls = to_map(x[:, 1:], height, width), x[:, :1]
            x = torch.cat([cls, to_tokens(self.compress(x))], dim=1)  # (B, 1 + N / 4, D)
        x = self.norm(self.coarse_blocks(x))
        return x[:, 0], x[:, 1:]


class Bottleneck(nn.Module):
    """Tokens on a grid -> latent (B, c, H / f, W / f): pixel shuffle to the latent's grid, then an MLP (Sec. 4.1).

    `factor` = f / (side of a token): factor² tokens become one latent position, f_tok→lat in Eq. 3 (with staged
    compression a quarter of it). It is below 1 where there are fewer tokens than latent positions (p = 64).
    """

    def __init__(self, width, factor, latent_channels):
        super().__init__()
        self.factor = factor
        self.mlp = MapMLP(round(width * factor**2), width, latent_channels)
        self.apply(init_weights)

    def forward(self, tokens, height, width):
        x = regrid(to_map(tokens, height, width), self.factor)  # (B, D factor², H / f, W / f)
        return self.mlp(x)


class Unbottleneck(nn.Module):
    """Latent (B, c, H / f, W / f) -> map (B, D, h, w) on the tokens' grid: the mirror image of `Bottleneck`."""

    def __init__(self, latent_channels, width, factor):
        super().__init__()
        self.factor = factor
        self.mlp = MapMLP(latent_channels, width, round(width * factor**2))

    def forward(self, z):
        return regrid(self.mlp(z), 1 / self.factor)


class Decoder(nn.Module):
    """Latent (B, c, H / f, W / f) -> images (B, 3, H, W): bottleneck and encoder backwards (Sec. 3.5).

    A decoder deeper than the encoder keeps the encoder's share of blocks on the fine grid.
    """

    def __init__(self, image_size, patch_size, size, stc_fraction, compression, factor, latent_channels):
        super().__init__()
        width, depth, heads = parse_size("decoder", size)
        fine = round(stc_fraction * depth)
        self.patch_size, self.width = patch_size, width
        self.reference = image_size // patch_size
        self.unbottleneck = Unbottleneck(latent_channels, width, factor)
        self.coarse_blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth - fine)])  # on N / 4 tokens
        self.expand = expansion_layer(width, compression) if stc_fraction else None
        self.fine_blocks = nn.Sequential(*[Block(width, heads) for _ in range(fine)])  # on all N
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3 * patch_size**2)
        self.apply(init_weights)
        nn.init.normal_(self.head.weight, std=0.002)  # the first images are grey, not noise to be unlearned

    def forward(self, z):
        x = self.unbottleneck(z)  # (B, D, h, w)
        height, width = x.shape[2:]
        x = to_tokens(x).contiguous() + position_embedding(height, width, self.reference, self.width, x.device)
        x = self.coarse_blocks(x)  # (B, h w, D)
        if self.expand:  # contiguous and float32, which to_tokens' view and autocast's output are not
            x = to_tokens(self.expand(to_map(x, height, width))).contiguous().float()  # (B, 4 h w, D)
            height, width = 2 * height, 2 * width
        x = self.head(self.norm(self.fine_blocks(x)))  # (B, H W / p², 3 p²)
        return F.pixel_shuffle(to_map(x, height, width), self.patch_size).float()


class TCAE(nn.Module):
    """The tokenizer: encode(images) -> z, decode(z) -> images.

    z (B, c, H / f, W / f) is *already normalised*: `latent_mean` and `latent_std`, (c, 1, 1), are measured at the end
    of the tokenizer's training and saved with it, so that no later stage can mix the scales up. Until then they are
    0 and 1.

    image_size: side of the training images, pixels; patch_size p; downsample f; latent_channels c.
    encoder, decoder: "S", "B", "L" or "width/depth/heads". stc_depth M: 0 = no staged compression.
    compression: "conv" or "shuffle" (Table 8). Raises ValueError, naming the argument, for sizes that do not fit.
    """

    CONSTANTS = ("image_size", "patch_size", "downsample", "latent_channels", "encoder", "decoder", "stc_depth",
                 "compression")  # the arguments, by their names in train_tokenizer.py and its checkpoints

    def __init__(self, image_size=256, patch_size=8, downsample=32, latent_channels=128, encoder="S", decoder="S",
                 stc_depth=6, compression="conv"):
        super().__init__()
        encoder_width, encoder_depth, _ = parse_size("encoder", encoder)
        decoder_width, _, _ = parse_size("decoder", decoder)
        if stc_depth > encoder_depth:
            raise ValueError(f"stc_depth={stc_depth}: the encoder has only {encoder_depth} blocks")
        if compression not in ("conv", "shuffle"):
            raise ValueError(f"compression={compression!r}: it is 'conv' or 'shuffle'")
        token_patch = patch_size * (2 if stc_depth else 1)
        if image_size % token_patch or image_size % downsample:
            raise ValueError(f"image_size={image_size} must be a multiple of patch_size={patch_size}"
                             f"{' × 2 (staged compression)' if stc_depth else ''} and of downsample={downsample}")
        if max(downsample, token_patch) % min(downsample, token_patch):
            raise ValueError(f"downsample={downsample}: neither a multiple nor a divisor of the {token_patch} pixels "
                             f"that a token stands for (patch_size={patch_size}, stc_depth={stc_depth})")
        # Eq. 3: f² = f_pix→tok · f_tok→lat. The patch embedding compresses p² : 1, the compression layer another 4 : 1;
        # what then remains of f² is left to the bottleneck, factor² : 1.
        factor = downsample / token_patch
        for name, width in ("encoder", encoder_width), ("decoder", decoder_width):
            if width * downsample**2 % token_patch**2:
                raise ValueError(f"{name}: its width {width} must be divisible by {round(1 / factor**2)}, "
                                 f"since patch_size={patch_size} spreads each token over so many latent positions")
        self.encoder = Encoder(image_size, patch_size, encoder, stc_depth, compression)
        self.bottleneck = Bottleneck(encoder_width, factor, latent_channels)
        self.decoder = Decoder(image_size, patch_size, decoder, stc_depth / encoder_depth, compression, factor,
                               latent_channels)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))

    @classmethod
    def from_constants(cls, constants):
        """The tokenizer that a script's constants, or those in a checkpoint, describe."""
        return cls(**{name: constants[name] for name in cls.CONSTANTS})

    @classmethod
    def from_checkpoint(cls, saved):
        """The trained tokenizer, frozen, from what stage 1 saved."""
        tcae = cls.from_constants(saved["constants"])
        tcae.load_state_dict(saved["tokenizer"])
        return tcae.eval().requires_grad_(False)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> z (B, c, H / f, W / f) (Eq. 2), of mean 0 and variance 1 per channel."""
        return self.encode_with_tokens(images)[2]

    def encode_with_tokens(self, images):
        """Like `encode`, but -> the encoder's [CLS] (B, D) and image tokens (B, h w, D), and z."""
        cls, tokens = self.encoder(images)
        height, width = images.shape[2] // self.encoder.output_patch, images.shape[3] // self.encoder.output_patch
        z = self.bottleneck(tokens, height, width).float()
        return cls, tokens, (z - self.latent_mean) / self.latent_std

    def decode(self, z):
        """z (B, c, H / f, W / f) as `encode` gives it -> images (B, 3, H, W), [-1, 1] but not clipped to it."""
        return self.decoder(z * self.latent_std + self.latent_mean)

    def forward(self, images):
        """Reconstruction, (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(images))


# ----------------------------------------------------------------------------------------------------------------------
# Joint self-supervision (Sec. 3.4); the losses and the views are in ssl.py


class IBOTHead(nn.Module):
    """Tokens (…, D) -> logits (…, K): MLP, L2 normalisation, cosine with K prototypes; in iBOT [CLS] and patches share
    one."""

    def __init__(self, width, hidden=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        # rows of length 0.58, a linear layer's default, as in iBOT: the longer, the slower their direction changes
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-1, 1) * bottleneck**-0.5)
        self.apply(init_weights)

    def forward(self, tokens):
        x = F.normalize(self.mlp(tokens).float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse once divided by a low temperature
            return F.linear(x, F.normalize(self.prototypes, dim=-1))


class SSLOutput(NamedTuple):
    """An encoder's output for V B crops, as the SSL loss takes it."""
    cls_logits: torch.Tensor  # (V B, K), crop by crop
    patch_logits: torch.Tensor  # (P, K), of the masked tokens of the global crops
    cls: torch.Tensor  # (2 B, D), [CLS] itself of the global crops, for KoLeo


class JointTokenizer(nn.Module):
    """All that stage 1 trains, behind one forward, as DistributedDataParallel requires.

    heads: ModuleDict of "cls" and "patch", the same IBOTHead in iBOT and two in DINOv2; None without SSL."""

    def __init__(self, tcae, heads=None, masks=True):
        super().__init__()
        self.tcae, self.heads = tcae, heads
        tcae.encoder.mask_token.requires_grad_(heads is not None and masks)  # DDP refuses unused parameters

    def forward(self, images, views=None):
        """Images (B, 3, H, W) -> their reconstruction, and for `views` (see ssl.collate_crops) the student's SSLOutput
        for the masked global crops and the local crops."""
        reconstruction = self.tcae(images)
        if views is None:
            return reconstruction, None
        encoder = self.tcae.encoder
        student = ssl_output(encoder, self.heads, views["global_crops"], views["masked_index"], views["mask"])
        if len(views["local_crops"]):
            local_cls, _ = encoder(views["local_crops"])  # (L B, D)
            student = student._replace(cls_logits=torch.cat([student.cls_logits, self.heads["cls"](local_cls)]))
        return reconstruction, student


def ssl_output(encoder, heads, crops, masked_index, mask=None):
    """Global crops (2 B, 3, g, g) -> SSLOutput, of the student with a `mask` (2 B, h, h), of the teacher without.

    masked_index (P,): the masked tokens among all 2 B h². Only they enter the loss, so the head, whose K-wide output is
    the largest tensor of the step, runs on them alone.
    """
    cls, tokens = encoder(crops, mask)  # (2 B, D), (2 B, h², D)
    return SSLOutput(heads["cls"](cls), heads["patch"](tokens.flatten(0, 1)[masked_index]), cls)


# ----------------------------------------------------------------------------------------------------------------------
# The generator: LightningDiT in RAE's version (Sec. 4.1)


@lru_cache(maxsize=8)
def rope_table(height, width, dim, device):
    """Cosines and sines of 2-D rotary positions, (2, height * width, dim / 2): half of a head's pairs of numbers turn
    with the row, the other half with the column."""
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = (torch.arange(height)[:, None] * frequencies)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width)[:, None] * frequencies)[None].expand(height, -1, -1)
    angles = torch.cat([rows, columns], dim=2).flatten(0, 1)  # (N, dim / 2)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)  # (2, N, dim / 2)


def rotate(x, rope):
    """Rotary position embedding (B, heads, N, d): every pair (x_k, x_{k + d/2}) turned by its angle. (The product
    of a q and a k turned like this depends on their relative position alone.)"""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """fc2(silu(gate) · value), gate and value from fc1, with 2/3 · 4 D hidden units: as many parameters as an MLP."""

    def __init__(self, width):
        super().__init__()
        self.hidden = 2 * 4 * width // 3
        self.fc1 = nn.Linear(width, 2 * self.hidden)
        self.fc2 = nn.Linear(self.hidden, width)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class ModulatedRMSNorm(nn.Module):
    """RMSNorm whose scale and shift come from the condition: norm(x) (1 + scale) + shift."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x, shift, scale):
        """x (B, N, D); shift, scale (B, 1, D)."""
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(shift, x, self.weight + self.weight * scale)  # fused: one pass over x


class DiTBlock(nn.Module):
    """A transformer block conditioned by modulation (adaLN-Zero: at first all gates are 0, the block the identity)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = ModulatedRMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = ModulatedRMSNorm(width), SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, condition, rope):
        """x (B, N, D), condition (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x, shift1, scale1), rope)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class LightningDiT(nn.Module):
    """Velocity of the flow at z_t: (z_t (B, c, h, w), t (B,) in [0, 1], labels (B,)) -> (B, c, h, w), patch size 1.

    size: "S", "B", "L", "XL" or "width/depth/heads". The label `classes` is the null class of classifier-free guidance.
    """

    def __init__(self, size, latent_channels, latent_size, classes):
        super().__init__()
        width, depth, heads = parse_size("size", size, DIT_SIZES)
        if width // heads % 4:
            raise ValueError(f"size={size!r}: each head's width must be divisible by 4, for 2-D rotary positions")
        self.latent_size, self.width, self.head_width, self.null_class = latent_size, width, width // heads, classes
        self.embed = nn.Linear(latent_channels, width)
        self.register_buffer("time_frequencies", torch.randn(256))  # Gaussian Fourier features, fixed
        self.time_mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embed = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = ModulatedRMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, latent_channels)
        self.apply(init_weights)
        for layer in self.time_mlp[0], self.time_mlp[2], self.class_embed:
            nn.init.normal_(layer.weight, std=0.02)
        for layer in *[block.modulation for block in self.blocks], self.modulation, self.head:
            nn.init.zeros_(layer.weight)

    def forward(self, z, t, labels):
        height, width = z.shape[2:]
        x = self.embed(to_tokens(z))  # (B, h w, D)
        x = x + position_embedding(height, width, self.latent_size, self.width, z.device)
        rope = rope_table(height, width, self.head_width, z.device)
        angles = 2 * torch.pi * t.float()[:, None] * self.time_frequencies  # (B, 256)
        condition = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.class_embed(labels)  # (B, D)
        for block in self.blocks:
            x = block(x, condition, rope)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return to_map(self.head(self.norm(x, shift, scale)), height, width).float()


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching: z_t = (1 - t) z + t noise moves along the straight line from data (t = 0) to noise (t = 1)


def shift_time(t, latent_shape, shift_base=4096):
    """t' = s t / (1 + (s - 1) t), s = √(c h w / shift_base): larger latents need more noise, so t is shifted towards it
    (t = 1). s is at least 1, as in RAE. t: tensor in [0, 1]; latent_shape (c, h, w)."""
    c, h, w = latent_shape
    s = max(1.0, c * h * w / shift_base) ** 0.5
    return s * t / (1 + (s - 1) * t)


def flow_matching_loss(model, z, labels, noise, t):
    """E ‖v(z_t, t, label) - (noise - z)‖², z_t = (1 - t) z + t noise, averaged over all elements -> a scalar.
    z, noise (B, c, h, w); t, labels (B,)."""
    t_ = t[:, None, None, None]
    velocity = model((1 - t_) * z + t_ * noise, t, labels)
    return F.mse_loss(velocity, noise - z)


def cfg_velocity(model, labels, null_class, cfg_scale=1.0, cfg_interval=(0.0, 1.0)):
    """velocity(z, t) with classifier-free guidance, v_null + cfg_scale (v_class - v_null), for t in the interval, and
    v_class elsewhere. Both come from one call of the model on a doubled batch."""
    null = torch.full_like(labels, null_class)

    def velocity(z, t):  # t is on the CPU, so that comparing it never synchronises
        times = torch.full((len(z),), t.item(), device=z.device)
        if cfg_scale == 1 or not cfg_interval[0] <= t <= cfg_interval[1]:
            return model(z, times, labels)
        both = model(torch.cat([z, z]), times.repeat(2), torch.cat([labels, null]))
        v_class, v_null = both.chunk(2)
        return v_null + cfg_scale * (v_class - v_null)

    return velocity


def sample_flow(velocity, noise, steps, method="euler", shift_base=4096):
    """Integrates dz/dt = velocity(z, t) from noise (t = 1) to data (t = 0) in `steps` steps on the shifted grid.

    noise (B, c, h, w). method "euler": one evaluation per step; "heun": two, second order, with a last step of Euler's,
    to avoid evaluating at t = 0, where the velocity is discontinuous if the data are points.
    """
    z = noise
    grid = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), noise.shape[1:], shift_base).float()
    for t, t_next in zip(grid, grid[1:]):
        dt = t_next - t  # negative
        v = velocity(z, t)
        if method == "heun" and t_next > 0:
            v = (v + velocity(z + dt * v, t_next)) / 2
        z = z + dt * v
    return z
