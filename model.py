"""The networks, in the order in which an image meets them.

    Attention, MLP, Block          the transformer, as in ViT (pre-norm)
    Encoder                        patches -> M blocks -> 2 × 2 tokens become 1 -> the other blocks -> image tokens
    Bottleneck                     image tokens -> latent: pixel unshuffle, then an MLP
    Unbottleneck, Decoder          both in reverse
    TCAE                           the tokenizer: encode(images) -> z, decode(z) -> images
    IBOTHead, JointTokenizer       the head for self-supervision; everything that stage 1 trains
    LightningDiT                   the generator, on the tokenizer's latents
    flow_matching_loss, cfg_velocity, sample_flow    how it is trained and guided, and how it is sampled

Images are (B, 3, H, W) in [-1, 1]. A map is (B, D, h, w); tokens are (B, h w, D), row by row; their grid is (h, w).
Equations, sections and tables are the paper's, arXiv 2604.07340.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth (blocks), heads
DIT_SIZES = {**SIZES, "XL": (1152, 28, 16)}


def parse_size(name, size, sizes=SIZES):
    """A size, "S", "B", "L" or "width/depth/heads" -> (width, depth, heads), or a ValueError that names `name`."""
    if size in sizes:
        return sizes[size]
    numbers = size.split("/")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{name}={size!r} is neither one of {', '.join(sizes)} nor width/depth/heads such as 128/4/4")
    width, depth, heads = map(int, numbers)
    if width % heads or width % 4:
        raise ValueError(f"{name}={size!r}: the width must be divisible by the heads, and by 4 for the positions")
    return width, depth, heads


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, D) -> (B, N, D). Only the generator has a `rope`."""

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
    """softmax(q kᵀ / √d) v for q, k, v (B, heads, N, d), by PyTorch's fused kernel, except when training in bfloat16 on
    a CPU: there its backward pass is up to ten times slower than plain matrix products."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Linear, GELU, linear, over the last dimension."""

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
    """The MLP over the channels of a map, at each position alone: (B, inputs, h, w) -> (B, outputs, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_weights(module):
    """For `module.apply`: Xavier for linear layers, zero biases. Compression, expansion and bottleneck have no residual
    connection around them; they get He's initialisation, which keeps the variance through the GELU. Otherwise the
    signal would shrink, and the position embedding that the decoder adds would drown it."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Between pixels, tokens and maps


def patchify(images, patch_size):
    """Images (B, 3, H, W) -> patches (B, N, 3 p²), N = H W / p²: each row holds the pixels of a p × p square."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def to_map(tokens, grid):
    """(B, h w, D) -> (B, D, h, w), where grid = (h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(x):
    """(B, D, h, w) -> (B, h w, D)."""
    return x.flatten(2).transpose(1, 2)


def regrid(x, factor):
    """Pixel unshuffle to a grid `factor` times coarser: (B, D, h, w) -> (B, D factor², h / factor, w / factor). Factors
    1/2, 1/4, … are the inverse, pixel shuffle to a finer grid with fewer channels."""
    return F.pixel_unshuffle(x, round(factor)) if factor >= 1 else F.pixel_shuffle(x, round(1 / factor))


@lru_cache(maxsize=32)
def position_embedding(grid, reference, dim, device):
    """Fixed 2-D sine-cosine position embedding of a grid (h, w) -> (h w, dim), amplitude 1.

    Every grid is stretched over the same `reference` × `reference` square, aligned at patch centres. So the 12 × 12
    patches of a local crop span what an image's 32 × 32 span, more sparsely: a crop is an image of its own (as in iBOT,
    which interpolates a learned embedding). And each of the decoder's coarse tokens lies in the middle of the 2 × 2
    patches that it stands for.
    """
    def encode(count):
        position = (torch.arange(count, dtype=torch.float64) + 0.5) * reference / count - 0.5
        angles = position[:, None] * 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, dim / 2)

    h, w = grid
    rows, columns = encode(h)[:, None].expand(-1, w, -1), encode(w)[None].expand(h, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float().to(device)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer (Sec. 3.3, Fig. 5)


def compression_layer(width, kind):
    """Makes 2 × 2 tokens one: map (B, D, h, w) -> (B, D, h / 2, w / 2). Its two kinds are the rows of Table 8."""
    if kind == "conv":  # "lightweight two-layer convolution"; the stride comes first, so that both layers are cheap
        return nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU(),
                             nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(nn.PixelUnshuffle(2), MapMLP(4 * width, width, width))


def expansion_layer(width, kind):
    """The reverse of `compression_layer`, for the decoder: map (B, D, h, w) -> (B, D, 2 h, 2 w)."""
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
                             nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1))
    return nn.Sequential(MapMLP(width, width, 4 * width), nn.PixelShuffle(2))


def output_patch(patch_size, stc_depth):
    """Side, in pixels, of the square that an output token stands for: p, or 2 p with staged compression."""
    return patch_size * (2 if stc_depth else 1)


class Encoder(nn.Module):
    """Images -> [CLS] token and image tokens.

    Patch embedding makes N = H W / p² tokens (Eq. 1). Staged token compression (Sec. 3.3): M = stc_depth blocks run on
    all N of them, the compression layer merges 2 × 2 into one, and the other blocks run on N / 4."""

    def __init__(self, image_size, patch_size, size, stc_depth, compression):
        super().__init__()
        width, depth, heads = parse_size("encoder", size)
        self.patch_size, self.width = patch_size, width
        self.output_patch = output_patch(patch_size, stc_depth)
        self.reference = image_size // patch_size  # side of the grid that positions refer to
        self.patch_embed = nn.Linear(3 * patch_size**2, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.fine_blocks = nn.Sequential(*[Block(width, heads) for _ in range(stc_depth)])  # on all N tokens
        self.compress = compression_layer(width, compression) if stc_depth else None
        self.coarse_blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth - stc_depth)])  # N / 4, or all
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)
        # Pixels in [-1, 1] are small: this makes the embedding of a patch about as large as that of its position.
        nn.init.normal_(self.patch_embed.weight, std=2 * self.patch_embed.in_features ** -0.5)

    def forward(self, images, mask=None):
        """Images (B, 3, H, W), both sides multiples of `output_patch` -> [CLS] (B, D), image tokens (B, h w, D).

        mask (B, h, w), for iBOT's student: True = hide this *output* token; ssl.MultiCrop draws it, in blocks. The mask
        token replaces all patches under it (with staged compression 2 × 2), so that each output token is either wholly
        hidden or wholly visible.
        """
        if images.shape[2] % self.output_patch or images.shape[3] % self.output_patch:
            raise ValueError(f"the sides of images {tuple(images.shape)} must be multiples of {self.output_patch} px")
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N, D), Eq. 1
        if mask is not None:
            if self.compress:  # from the output grid to the input grid, which is twice as fine
                mask = mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            x = torch.where(mask.flatten(1)[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + position_embedding(grid, self.reference, self.width, x.device)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        x = self.fine_blocks(x)
        if self.compress:  # 2 × 2 image tokens become one; [CLS] bypasses it and rejoins the shorter sequence
            x, cls = to_map(x[:, 1:], grid), x[:, :1]  # (B, D, H / p, W / p), (B, 1, D)
            x = torch.cat([cls, to_tokens(self.compress(x))], dim=1)  # (B, 1 + N / 4, D)
        x = self.norm(self.coarse_blocks(x))
        return x[:, 0], x[:, 1:]


class Bottleneck(nn.Module):
    """Image tokens (B, h w, D) -> latent (B, c, H / f, W / f), Eq. 2: pixel unshuffle puts the factor² tokens of each
    latent position side by side, and an MLP mixes their channels down to c (Sec. 4.1).

    factor = f / output_patch. By default 32 / 16 = 2: 16 × 16 tokens become 8 × 8 positions, and Eq. 3's f_tok→lat = 16
    is the compression layer's 4 times the bottleneck's factor² = 4. Where there are fewer tokens than positions
    (p = 64), factor is below 1, and each token spreads over 1 / factor² of them.

    The latent is deterministic: no KL term, no noise, no quantisation. Nothing fixes its scale in training, so it is
    normalised afterwards (TCAE).
    """

    def __init__(self, width, factor, latent_channels):
        super().__init__()
        self.factor = factor
        self.mlp = MapMLP(round(width * factor**2), width, latent_channels)
        self.apply(init_weights)

    def forward(self, tokens, grid):
        x = regrid(to_map(tokens, grid), self.factor)  # (B, D, h, w) -> (B, D factor², H / f, W / f)
        return self.mlp(x)  # at each position alone


class Unbottleneck(nn.Module):
    """The reverse of `Bottleneck`: latent (B, c, H / f, W / f) -> map (B, D, h, w) on the tokens' grid."""

    def __init__(self, latent_channels, width, factor):
        super().__init__()
        self.factor = factor
        self.mlp = MapMLP(latent_channels, width, round(width * factor**2))

    def forward(self, z):
        return regrid(self.mlp(z), 1 / self.factor)


class Decoder(nn.Module):
    """Latent (B, c, H / f, W / f) -> images (B, 3, H, W): the bottleneck and the encoder in reverse (Sec. 3.5).

    stc_fraction = M / the encoder's depth: a deeper decoder has the same share of its blocks on the fine grid.
    """

    def __init__(self, image_size, patch_size, size, stc_fraction, compression, factor, latent_channels):
        super().__init__()
        width, depth, heads = parse_size("decoder", size)
        fine = round(stc_fraction * depth)
        self.patch_size, self.width = patch_size, width
        self.reference = image_size // patch_size
        self.unbottleneck = Unbottleneck(latent_channels, width, factor)
        self.coarse_blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth - fine)])  # on N / 4, or all
        self.expand = expansion_layer(width, compression) if stc_fraction else None
        self.fine_blocks = nn.Sequential(*[Block(width, heads) for _ in range(fine)])  # on all N
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3 * patch_size**2)
        self.apply(init_weights)
        nn.init.normal_(self.head.weight, std=0.002)  # so the first images are grey, not noise to unlearn

    def forward(self, z):
        x = self.unbottleneck(z)  # (B, D, h, w)
        grid = x.shape[2:]
        x = to_tokens(x).contiguous() + position_embedding(grid, self.reference, self.width, x.device)
        x = self.coarse_blocks(x)  # (B, h w, D)
        if self.expand:  # 1 token becomes 2 × 2
            x = self.expand(to_map(x, grid))  # (B, D, 2 h, 2 w)
            grid = x.shape[2:]
            x = to_tokens(x).contiguous()  # (B, 4 h w, D); a strided view would be slow in every block
            x = x.float()  # the residual stream is float32; autocast ran the expansion in bfloat16
        x = self.head(self.norm(self.fine_blocks(x)))  # (B, N, 3 p²)
        return F.pixel_shuffle(to_map(x, grid), self.patch_size).float()


class TCAE(nn.Module):
    """The tokenizer: encode(images) -> z, decode(z) -> images.

    z (B, c, H / f, W / f) is *already normalised* to mean 0 and variance 1 per channel. The buffers `latent_mean` and
    `latent_std`, (c, 1, 1), are measured on training images at the end of stage 1 (latents.py's measure_latents) and
    saved with the weights, so no later stage can mix up scales. Until then they are 0 and 1.

    image_size: side of the training images, pixels; patch_size p; downsample f; latent_channels c; encoder, decoder:
    "S", "B", "L" or "width/depth/heads"; stc_depth M: 0 = no staged compression; compression: "conv" or "shuffle"
    (Table 8). Sizes that do not fit raise a ValueError that names the argument.
    """

    CONSTANTS = ("image_size", "patch_size", "downsample", "latent_channels", "encoder", "decoder", "stc_depth",
                 "compression")  # the arguments, by their names in train_tokenizer.py and its checkpoints

    def __init__(self, image_size=256, patch_size=8, downsample=32, latent_channels=128, encoder="S", decoder="S",
                 stc_depth=6, compression="conv"):
        super().__init__()
        check_sizes(image_size, patch_size, downsample, encoder, decoder, stc_depth, compression)
        width, depth, _ = parse_size("encoder", encoder)
        side = image_size // downsample
        self.image_size, self.latent_shape = image_size, (latent_channels, side, side)  # (c, H / f, W / f)
        # Eq. 3: f² = f_pix→tok · f_tok→lat. Patch embedding compresses p² : 1 and the compression layer 4 : 1; the
        # bottleneck does the rest of f², factor² : 1.
        factor = downsample / output_patch(patch_size, stc_depth)
        self.encoder = Encoder(image_size, patch_size, encoder, stc_depth, compression)
        self.bottleneck = Bottleneck(width, factor, latent_channels)
        self.decoder = Decoder(image_size, patch_size, decoder, stc_depth / depth, compression, factor, latent_channels)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))

    @classmethod
    def from_constants(cls, constants):
        """A new tokenizer, as a script's constants or a checkpoint's describe it."""
        return cls(**{name: constants[name] for name in cls.CONSTANTS})

    @classmethod
    def from_checkpoint(cls, saved):
        """The trained tokenizer, frozen, from stage 1's checkpoint."""
        tcae = cls.from_constants(saved["constants"])
        tcae.load_state_dict(saved["tokenizer"])
        return tcae.eval().requires_grad_(False)

    def encode(self, images, with_tokens=False):
        """Images (B, 3, H, W) in [-1, 1] -> z (B, c, H / f, W / f), normalised; with_tokens: -> the encoder's [CLS]
        (B, D), its image tokens (B, h w, D), and z."""
        cls, tokens = self.encoder(images)
        grid = [side // self.encoder.output_patch for side in images.shape[2:]]
        z = self.bottleneck(tokens, grid).float()  # Eq. 2
        z = (z - self.latent_mean) / self.latent_std
        return (cls, tokens, z) if with_tokens else z

    def decode(self, z):
        """z (B, c, H / f, W / f) from `encode` -> images (B, 3, H, W) in [-1, 1], not clipped."""
        return self.decoder(z * self.latent_std + self.latent_mean)

    def forward(self, images):
        """Reconstruction, (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decode(self.encode(images))


def check_sizes(image_size, patch_size, downsample, encoder, decoder, stc_depth, compression):
    """Raises a ValueError that names the argument if TCAE's sizes do not fit together."""
    encoder_width, depth, _ = parse_size("encoder", encoder)
    decoder_width, _, _ = parse_size("decoder", decoder)
    if stc_depth > depth:
        raise ValueError(f"stc_depth={stc_depth}: the encoder has only {depth} blocks")
    if compression not in ("conv", "shuffle"):
        raise ValueError(f"compression={compression!r}: it is 'conv' or 'shuffle'")
    token_patch = output_patch(patch_size, stc_depth)
    if image_size % token_patch or image_size % downsample:
        raise ValueError(f"image_size={image_size} must be a multiple of patch_size={patch_size}"
                         f"{' × 2 (staged compression)' if stc_depth else ''} and of downsample={downsample}")
    if max(downsample, token_patch) % min(downsample, token_patch):
        raise ValueError(f"downsample={downsample}: neither a multiple nor a divisor of the {token_patch} pixels "
                         f"that a token stands for (patch_size={patch_size}, stc_depth={stc_depth})")
    for name, width in ("encoder", encoder_width), ("decoder", decoder_width):
        if width * downsample**2 % token_patch**2:
            raise ValueError(f"{name}: its width {width} must be divisible by {(token_patch // downsample)**2}, "
                             f"since patch_size={patch_size} spreads each token over so many latent positions")


# ----------------------------------------------------------------------------------------------------------------------
# Joint self-supervision (Sec. 3.4). Read ssl.py's docstring first, iBOT in a paragraph; losses and masks are there


class IBOTHead(nn.Module):
    """Tokens (…, D) -> logits (…, K): an MLP, then the cosine with each of K prototypes."""

    def __init__(self, width, hidden=2048, bottleneck=256, prototypes=8192):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        # Rows of length 0.58, a linear layer's default, as in iBOT: the longer they are, the slower they turn.
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-1, 1) * bottleneck**-0.5)
        self.apply(init_weights)

    def forward(self, tokens):
        x = F.normalize(self.mlp(tokens).float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for low temperatures
            return F.linear(x, F.normalize(self.prototypes, dim=-1))


class SSLOutput(NamedTuple):
    """What the SSL losses take from an encoder and its heads."""
    cls_logits: torch.Tensor  # (2 B, K) of the teacher, ((2 + L) B, K) of the student: crop by crop, global ones first
    patch_logits: torch.Tensor  # (P, K), of the masked tokens of the global crops
    cls: torch.Tensor  # (2 B, D), [CLS] itself of the global crops, for KoLeo


def ssl_output(encoder, heads, views, student):
    """One network's SSLOutput. views: crops and masks, from ssl.collate_crops. The student (True) sees the global crops
    masked, then the local crops; the teacher (False) sees the global crops whole, and nothing else. heads: {"cls":
    IBOTHead, "patch": the same one, or DINOv2's}."""
    cls, tokens = encoder(views["global_crops"], views["mask"] if student else None)  # (2 B, D), (2 B, h², D)
    masked = tokens.flatten(0, 1)[views["masked_index"]]  # (P, D); K logits of every token would fill the memory
    cls_logits, patch_logits = heads["cls"](cls), heads["patch"](masked)
    if student and len(views["local_crops"]):
        local_cls, _ = encoder(views["local_crops"])  # (L B, D)
        cls_logits = torch.cat([cls_logits, heads["cls"](local_cls)])
    return SSLOutput(cls_logits, patch_logits, cls)


class JointTokenizer(nn.Module):
    """All that stage 1 trains: the tokenizer, and heads as in `ssl_output`, or None without SSL."""

    def __init__(self, tcae, heads=None):
        super().__init__()
        self.tcae, self.heads = tcae, heads

    def forward(self, images, views):
        """-> the reconstruction of images (B, 3, H, W), and the student's SSLOutput (or None). Both in one call, since
        DistributedDataParallel sees only what passes through forward()."""
        reconstruction = self.tcae(images)
        student_out = ssl_output(self.tcae.encoder, self.heads, views, student=True) if self.heads else None
        return reconstruction, student_out


# ----------------------------------------------------------------------------------------------------------------------
# The generator: LightningDiT in RAE's version (Sec. 4.1)


@lru_cache(maxsize=8)
def rope_table(grid, dim, device):
    """Cosines and sines of 2-D rotary positions on a grid (h, w) -> (2, h w, dim / 2): half of a head's pairs of
    channels rotate with the row, the other half with the column."""
    h, w = grid
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = (torch.arange(h)[:, None] * frequencies)[:, None].expand(-1, w, -1)
    columns = (torch.arange(w)[:, None] * frequencies)[None].expand(h, -1, -1)
    angles = torch.cat([rows, columns], dim=2).flatten(0, 1)  # (N, dim / 2)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)  # (2, N, dim / 2)


def rotate(x, rope):
    """Rotary position embedding of x (B, heads, N, d): rotates each pair (x_k, x_{k + d/2}) by its position's angle, so
    that the product of a query and a key depends only on their relative position."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """fc2(silu(gate) · value), both from fc1; 2/3 · 4 D hidden units make as many parameters as an MLP has."""

    def __init__(self, width):
        super().__init__()
        hidden = 2 * 4 * width // 3
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class ModulatedRMSNorm(nn.Module):
    """norm(x) (1 + scale) + shift, with RMSNorm; scale and shift come from the condition."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x, shift, scale):
        """x (B, N, D); shift, scale (B, 1, D)."""
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(shift, x, self.weight + self.weight * scale)  # one pass over x


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero: the condition sets shift, scale and gate of both branches. Gates begin at 0,
    so each block begins as the identity."""

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
    """The velocity at z_t: z_t (B, c, h, w), t (B,) in [0, 1], labels (B,) -> (B, c, h, w).

    A DiT with each latent position as a token, RMSNorm, SwiGLU, a Fourier embedding of t, and rotary positions on top
    of the fixed sine-cosine ones; without RAE's optional wide head and QK norm.
    size: "S", "B", "L", "XL" or "width/depth/heads". Label number `classes` is the null class, for guidance.
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
        grid = z.shape[2:]
        x = self.embed(to_tokens(z))  # (B, h w, D)
        x = x + position_embedding(grid, self.latent_size, self.width, z.device)
        rope = rope_table(grid, self.head_width, z.device)
        angles = 2 * torch.pi * t.float()[:, None] * self.time_frequencies  # (B, 256)
        condition = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.class_embed(labels)  # (B, D)
        for block in self.blocks:
            x = block(x, condition, rope)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return to_map(self.head(self.norm(x, shift, scale)), grid).float()


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching: z_t = (1 - t) z + t noise goes from data (t = 0) to noise (t = 1) in a straight line


def shift_time(t, latent_shape, shift_base=4096):
    """t' = s t / (1 + (s - 1) t). Larger latents need more noise before their content is lost, so this shifts t (in
    [0, 1]) towards 1. s = √(c h w / shift_base) is √2 for latents (c, h, w) of 128 × 8 × 8. Latents of fewer than
    shift_base numbers, which RAE refuses, are not shifted: s = 1."""
    c, h, w = latent_shape
    s = max(1.0, c * h * w / shift_base) ** 0.5
    return s * t / (1 + (s - 1) * t)


def flow_matching_loss(model, z, labels, noise, t):
    """E ‖v(z_t, t, label) - (noise - z)‖², the mean over all elements: z_t moves with the constant velocity noise - z.
    z, noise (B, c, h, w); t, labels (B,)."""
    t_ = t[:, None, None, None]
    velocity = model((1 - t_) * z + t_ * noise, t, labels)
    return F.mse_loss(velocity, noise - z)


def cfg_velocity(model, labels, null_class, cfg_scale=1.0, cfg_interval=(0.0, 1.0)):
    """-> a function velocity(z, t): classifier-free guidance, v_null + cfg_scale (v_class - v_null), for t in the
    interval, v_class elsewhere. One call of the model, on a doubled batch, gives both."""
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
    """Integrates dz/dt = velocity(z, t) from noise (B, c, h, w) at t = 1 to data at t = 0, in `steps` shifted steps.

    method "euler": one evaluation per step. "heun": two, of second order; its last step is Euler's, since training
    never sees t = 0.
    """
    z = noise
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), noise.shape[1:], shift_base).float()
    for t, t_next in zip(times, times[1:]):
        dt = t_next - t  # negative
        v = velocity(z, t)
        if method == "heun" and t_next > 0:
            v = (v + velocity(z + dt * v, t_next)) / 2
        z = z + dt * v
    return z


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def compile_blocks(*networks):
    """Applies torch.compile to each transformer block alone, so that blocks of the same shape share one compilation."""
    torch._dynamo.config.cache_size_limit = 64  # one version per crop size, with and without gradient
    torch._dynamo.config.optimize_ddp = False  # or every block would be split where DDP's buckets end
    for network in networks:
        for module in network.modules():
            if isinstance(module, (Block, DiTBlock)):
                module.compile(dynamic=False)
