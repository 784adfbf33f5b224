"""The networks: shapes at every setting of the paper, the transformer against others' code, and what masks may hide."""
import copy
import itertools
from functools import partial

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock

import model
from model import (TCAE, Attention, Block, DiTBlock, Encoder, IBOTHead, LightningDiT, compile_blocks,
                   flow_matching_loss, patchify, position_embedding, regrid, to_map, to_tokens)
from pretrained import DINO

SMALL = dict(image_size=32, patch_size=4, downsample=8, latent_channels=6, encoder="32/2/2", decoder="32/2/2",
             stc_depth=1)


def build(**changes):
    torch.manual_seed(0)
    return TCAE(**{**SMALL, **changes}).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("compression", ["conv", "shuffle"])
@pytest.mark.parametrize("patch_size", [64, 32, 16, 8])
def test_every_patch_size_and_stc_depth_gives_the_same_latent_shape(patch_size, compression):
    """Table 3's sweep and Table 6's: 8 × 8 × c at f = 32, whether the bottleneck compresses or expands the grid."""
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    for stc_depth in (0, 1, 2, 3):
        tcae = build(image_size=256, patch_size=patch_size, downsample=32, encoder="32/3/2", decoder="48/3/2",
                     stc_depth=stc_depth, compression=compression)
        z = tcae.encode(images)
        assert z.shape == (1, 6, 8, 8)
        assert tcae.decode(z).shape == images.shape
        assert len(tcae.encoder.fine_blocks) == len(tcae.decoder.fine_blocks) == stc_depth
        assert len(tcae.encoder.coarse_blocks) == len(tcae.decoder.coarse_blocks) == 3 - stc_depth


@pytest.mark.parametrize("patch_size, downsample, image_size, width", [(8, 4, 32, 32), (6, 2, 24, 36), (2, 10, 40, 32),
                                                                          (10, 2, 40, 100)])
def test_grids_of_any_whole_ratio(patch_size, downsample, image_size, width):
    """Not only powers of two, in either direction."""
    size = f"{width}/1/2"
    tcae = build(image_size=image_size, patch_size=patch_size, downsample=downsample, stc_depth=0, encoder=size,
                 decoder=size)
    z = tcae.encode(torch.rand(1, 3, image_size, image_size))
    assert z.shape[2:] == (image_size // downsample,) * 2
    assert tcae.decode(z).shape == (1, 3, image_size, image_size)


def test_a_deeper_decoder_keeps_the_encoder_s_share_of_fine_blocks():
    """S-L pairs 12 blocks with 24: with M = 6 the decoder spends half of its own on the fine grid."""
    tcae = build(encoder="32/2/2", decoder="32/4/2", stc_depth=1)
    assert (len(tcae.decoder.coarse_blocks), len(tcae.decoder.fine_blocks)) == (2, 2)


@pytest.mark.parametrize("stc_depth", [0, 1])
def test_crops_of_other_sizes_go_through_the_encoder(stc_depth):
    """Local and global crops have sizes of their own, and need not be square."""
    encoder = build(stc_depth=stc_depth).encoder
    step = encoder.output_patch
    assert step == (8 if stc_depth else 4)
    for height, width in (step, step), (2 * step, 3 * step), (5 * step, step), (48, 48):
        cls, tokens = encoder(torch.rand(2, 3, height, width))
        assert cls.shape == (2, 32) and tokens.shape == (2, height // step * (width // step), 32)
    for height, width in (3 * step // 2, step), (step, 3 * step // 2), (step + 2, step + 2):
        with pytest.raises(ValueError, match=f"multiples of {step} px"):
            encoder(torch.rand(2, 3, height, width))


def test_sizes_are_those_of_vit():
    """S, B and L of the paper are timm's ViT-S, B, L: the blocks have the same number of parameters."""
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        for size, name in ("S", "small"), ("B", "base"), ("L", "large"):
            theirs = timm.create_model(f"vit_{name}_patch16_224", pretrained=False)
            for stc_depth in (0, 6):
                encoder = Encoder(256, 8, size, stc_depth, "conv")
                assert count(encoder.fine_blocks, encoder.coarse_blocks) == count(theirs.blocks)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


def test_attention_equals_its_formula():
    """softmax(q kᵀ / √d) v per head, in loops and float64."""
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    qkv = (x.double() @ attention.qkv.weight.double().T + attention.qkv.bias.double())
    expected = torch.zeros(2, 5, 12, dtype=torch.float64)
    for b, head, n in itertools.product(range(2), range(3), range(5)):
        columns = slice(4 * head, 4 * head + 4)
        q, k, v = (qkv[b, :, part * 12:(part + 1) * 12][:, columns] for part in range(3))
        weights = torch.exp(torch.stack([q[n] @ k[m] / 4**0.5 for m in range(5)]))
        expected[b, n, columns] = sum(w / weights.sum() * v[m] for m, w in enumerate(weights))
    expected = expected @ attention.proj.weight.double().T + attention.proj.bias.double()
    torch.testing.assert_close(attention(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 64])
def test_attention_in_bfloat16_on_a_cpu_is_attention(width):
    """Where it is trained there it is written out; up to rounding with the numbers of PyTorch's own in float64."""
    torch.manual_seed(0)
    attention, reference = Attention(2 * width, 2), Attention(2 * width, 2).double()
    reference.load_state_dict(attention.state_dict())
    x, weights = torch.randn(3, 40, 2 * width), torch.randn(3, 40, 2 * width)
    exact = x.double().requires_grad_()
    (reference(exact) * weights).sum().backward()
    rough = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        trained = attention(rough)
        with torch.no_grad():
            torch.testing.assert_close(attention(x).double(), reference(x.double()), rtol=0.05, atol=0.02)
    assert "SoftmaxBackward" in graph(trained)
    (trained * weights).sum().backward()
    torch.testing.assert_close(trained.double(), reference(x.double()), rtol=0.05, atol=0.02)
    for ours, theirs in [(rough.grad, exact.grad), *((p.grad, q.grad) for p, q in zip(attention.parameters(),
                                                                                  reference.parameters()))]:
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def graph(tensor):
    """The names of all steps that a tensor was made by."""
    names, todo = "", [tensor.grad_fn]
    while todo:
        step = todo.pop()
        names += type(step).__name__ + " "
        todo += [earlier for earlier, _ in step.next_functions if earlier]
    return names


def test_compiled_blocks_compute_the_same():
    """For real, on the CPU, with gradients; what differs is float32's rounding."""
    torch._inductor.config.compile_threads = 1  # no pool of processes, since later tests fork this one
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"nothing can be compiled here: {error}")
    torch.manual_seed(0)
    dit, z, noise = LightningDiT("16/2/2", 4, 4, 3), *torch.randn(2, 3, 4, 4, 4)
    for p in dit.parameters():  # adaLN-Zero starts as the identity
        torch.nn.init.normal_(p, std=0.1)
    results = []
    for network in dit, copy.deepcopy(dit):
        if results:
            compile_blocks(network)
        loss = flow_matching_loss(network, z, torch.tensor([0, 1, 3]), noise, torch.tensor([0.2, 0.5, 0.9]))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert network.blocks[0]._compiled_call_impl is not None


def test_compiling_reaches_every_block_and_nothing_else(monkeypatch):
    """The tokenizer's, the discriminator's and the generator's, each once; recorded, since compiling takes minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    networks = (TCAE(32, 4, 8, 8, "16/3/2", "16/2/2", 1), DINO("16/4/2", input_size=16),
                LightningDiT("16/2/2", 8, 4, 3))
    compile_blocks(*networks)
    assert [type(block) for block in compiled] == [Block] * (3 + 2 + 4) + [DiTBlock] * 2
    assert len(set(map(id, compiled))) == len(compiled)


@pytest.mark.parametrize("stc_depth, compression", [(0, "conv"), (1, "conv"), (1, "shuffle")])
def test_tokens_stay_float32_and_contiguous_from_block_to_block(stc_depth, compression):
    """Under autocast too: what a layer between blocks gives in bfloat16, or as a view of a map, would stay so in all
    that follow, since x + attention(x) keeps both."""
    tcae, seen = build(stc_depth=stc_depth, compression=compression), []
    for block in tcae.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda _, x, y: seen.extend([x[0], y]))
    with torch.autocast("cpu", torch.bfloat16):
        tcae(torch.rand(2, 3, 32, 32))
    assert len(seen) == 8 and all(x.dtype == torch.float32 and x.is_contiguous() for x in seen)


def test_block_equals_timm_s():
    """With the same weights, under the same names: what is known about ViTs holds for ours."""
    torch.manual_seed(0)
    ours, theirs = Block(32, 4), TimmBlock(32, 4, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels, tokens, maps, positions


def test_patchify_puts_every_square_in_one_row_and_can_be_undone():
    """Row by row, patch n holds the pixels of its square and no others; the decoder's last step is the inverse."""
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row, column in itertools.product(range(2), range(3)):
        square = images[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
        assert torch.equal(patches[:, 3 * row + column].sort(1).values, square.flatten(1).sort(1).values)
    assert torch.equal(F.pixel_shuffle(to_map(patches, (2, 3)), 4), images)
    assert torch.equal(to_tokens(to_map(patches, (2, 3))), patches)


@pytest.mark.parametrize("factor", [4, 2, 1, 1 / 2])
def test_regrid_keeps_every_value_above_its_own_place(factor):
    """A coarser position gets the channels of exactly the positions it covers, and back."""
    x = torch.randn(2, 8, 8, 8)
    y = regrid(x, factor)
    assert y.shape == (2, 8 * factor**2, 8 / factor, 8 / factor)
    assert torch.equal(regrid(y, 1 / factor), x)
    side = max(1, int(factor))
    assert torch.equal(y[:, :, 0, 0].flatten(1).sort(1).values,
                       (x[:, :, :side, :side].flatten(1) if factor >= 1 else x[:, 0::4, 0, 0]).sort(1).values)


def test_positions_are_those_of_patch_centres():
    """A grid three times coarser has the embeddings of the fine grid's patches that share its centres; a grid of any
    other size, and of any shape, is laid over the same square."""
    fine = position_embedding((12, 12), 12, 32, "cpu").view(12, 12, 32)
    coarse = position_embedding((4, 4), 12, 32, "cpu").view(4, 4, 32)
    torch.testing.assert_close(coarse, fine[1::3, 1::3])
    wide = position_embedding((4, 12), 12, 32, "cpu").view(4, 12, 32)
    torch.testing.assert_close(wide, fine[1::3])
    finer = position_embedding((36, 36), 12, 32, "cpu").view(36, 36, 32)
    torch.testing.assert_close(finer[1::3, 1::3], fine, rtol=0, atol=1e-5)


def test_positions_have_amplitude_one_and_differ():
    """Small embeddings left training at the mean colour for hundreds of steps; equal ones would lose the place."""
    for height, width in (32, 32), (12, 12), (3, 5):
        rows = position_embedding((height, width), 32, 64, "cpu")
        assert rows.abs().max() > 0.9
        torch.testing.assert_close(rows.square().sum(1), torch.full((height * width,), 32.0))  # sin² + cos² = 1
        distances = torch.cdist(rows, rows) + 10 * torch.eye(len(rows))
        assert distances.min() > 0.3
    vertical, horizontal = position_embedding((8, 8), 8, 64, "cpu").view(8, 8, 2, 32).unbind(2)
    assert torch.equal(vertical, vertical[:, :1].expand_as(vertical)), "half of it tells the row alone"
    assert torch.equal(horizontal, horizontal[:1].expand_as(horizontal)), "and half the column"


# ----------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("stc_depth, compression", [(0, "conv"), (1, "conv"), (1, "shuffle"), (2, "conv")])
def test_masked_pixels_influence_nothing(stc_depth, compression):
    """With staged compression a 3 × 3 convolution and four patches stand behind a token: if one of them showed through,
    the student could copy its answer. Bit for bit, on every output; without the mask everything changes."""
    encoder = build(stc_depth=stc_depth, compression=compression).encoder
    grid, side = 32 // encoder.output_patch, encoder.output_patch
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mask = torch.rand(2, grid, grid) < 0.4
    pixels = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].expand_as(images)
    changed = torch.where(pixels, torch.rand_like(images) * 2 - 1, images)
    for before, after in zip(encoder(images, mask), encoder(changed, mask)):
        assert torch.equal(before, after)
    for before, after in zip(encoder(images), encoder(changed)):
        assert not torch.isclose(before, after, rtol=0, atol=1e-6).all(-1).any()
    seen = torch.where(pixels, images, torch.rand_like(images))  # the visible pixels still count
    assert not torch.equal(encoder(images, mask)[0], encoder(seen, mask)[0])


def test_a_mask_that_hides_nothing_is_no_mask():
    """Half of the student's global crops have an empty mask: they must go through as any image."""
    encoder, images = build().encoder, torch.rand(2, 3, 32, 32)
    for with_mask, without in zip(encoder(images, torch.zeros(2, 4, 4, dtype=torch.bool)), encoder(images)):
        assert torch.equal(with_mask, without)


def test_mask_and_token_are_at_the_same_place():
    """Hiding output token n changes, before attention mixes, the tokens under n and no others: a transposed grid would
    pass every test of shapes."""
    encoder = Encoder(32, 4, "32/1/2", 1, "shuffle").requires_grad_(False)
    encoder.fine_blocks = encoder.coarse_blocks = torch.nn.Sequential()
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 3] = True
    _, hidden = encoder(images, mask)
    _, plain = encoder(images)
    assert (hidden != plain).any(-1)[0].nonzero()[:, 0].tolist() == [1 * 4 + 3]


def test_head_on_masked_tokens_alone_equals_the_head_on_all():
    """The shortcut that saves the memory of all the other tokens' logits must not change the ones it keeps."""
    encoder = build().encoder
    head, crops = IBOTHead(32, hidden=16, bottleneck=8, prototypes=11), torch.rand(3, 3, 32, 32)
    mask = torch.rand(3, 4, 4) < 0.4
    masked_index = mask.flatten().nonzero()[:, 0]
    views = {"global_crops": crops, "mask": mask, "masked_index": masked_index, "local_crops": crops[:0]}
    cls, patches, raw = model.ssl_output(encoder, {"cls": head, "patch": head}, views, student=True)
    all_cls, all_tokens = encoder(crops, mask)
    torch.testing.assert_close(cls, head(all_cls))
    torch.testing.assert_close(patches, head(all_tokens)[mask.flatten(1)])
    assert torch.equal(raw, all_cls)
    other = IBOTHead(32, hidden=16, bottleneck=8, prototypes=11)  # DINOv2's: one for [CLS], one for tokens
    cls, patches, _ = model.ssl_output(encoder, {"cls": head, "patch": other}, views, student=True)
    torch.testing.assert_close(cls, head(all_cls))
    torch.testing.assert_close(patches, other(all_tokens)[mask.flatten(1)])


def test_prototypes_start_with_a_linear_layer_s_length():
    """0.58, as in iBOT: rows of length 16 would be turned 25 times more slowly."""
    prototypes = IBOTHead(32, hidden=16, prototypes=4096).prototypes.detach()
    lengths = prototypes.norm(dim=1)
    assert lengths.mean() == pytest.approx(3**-0.5, rel=0.01) and lengths.std() < 0.03
    assert prototypes.mean().abs() < 1e-3 and prototypes.abs().max() <= 256**-0.5


def test_head_gives_cosines():
    """L2-normalised features against weight-normalised prototypes: the temperatures are made for [-1, 1]."""
    head = IBOTHead(32, hidden=16, bottleneck=8, prototypes=11)
    tokens = torch.randn(4, 5, 32)
    logits = head(100 * tokens)
    assert logits.shape == (4, 5, 11) and logits.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.prototypes *= torch.rand(11, 1) + 0.5  # their length must not matter
    torch.testing.assert_close(head(100 * tokens), logits)


def test_joint_forward_gives_each_view_its_own_pass():
    """One forward for one step: the tokenizer's reconstruction; global crops are masked, local ones not."""
    tcae, head = build(), IBOTHead(32, hidden=16, bottleneck=8, prototypes=11)
    joint = model.JointTokenizer(tcae, torch.nn.ModuleDict({"cls": head, "patch": head}))
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(4, 3, 3) < 0.5
    views = {"global_crops": torch.rand(4, 3, 24, 24), "local_crops": torch.rand(6, 3, 16, 16), "mask": mask,
             "masked_index": mask.flatten().nonzero()[:, 0]}
    reconstruction, (cls_logits, patches, raw) = joint(images, views)
    global_cls, local_cls = cls_logits.split([4, 6])
    torch.testing.assert_close(reconstruction, tcae(images))
    cls, tokens = tcae.encoder(views["global_crops"], mask)
    torch.testing.assert_close(raw, cls)
    torch.testing.assert_close(global_cls, head(cls))
    torch.testing.assert_close(patches, head(tokens[mask.flatten(1)]))
    torch.testing.assert_close(local_cls, head(tcae.encoder(views["local_crops"])[0]))


# ----------------------------------------------------------------------------------------------------------------------
# The latent


def test_latents_come_normalised_and_decode_undoes_it():
    """encode and decode own the statistics: what lies between them is always z with mean 0 and variance 1."""
    tcae, images = build(), torch.rand(16, 3, 32, 32) * 2 - 1
    raw, reconstruction = tcae.encode(images), tcae(images)
    tcae.latent_mean.copy_(raw.mean((0, 2, 3))[:, None, None])
    tcae.latent_std.copy_(raw.std((0, 2, 3))[:, None, None])
    z = tcae.encode(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(tcae.decode(z), reconstruction, rtol=0, atol=1e-5)
    copy = build()
    copy.load_state_dict(tcae.state_dict())  # they travel with the weights
    assert torch.equal(copy.encode(images), z)


@pytest.mark.parametrize("changes, name", [
    (dict(encoder="XL"), "encoder='XL'"), (dict(encoder="36/2"), "encoder='36/2'"),
    (dict(encoder="32/2/3"), "encoder='32/2/3'"), (dict(decoder="30/2/2"), "decoder='30/2/2'"),
    (dict(stc_depth=3), "stc_depth=3"),
    (dict(compression="pool"), "compression='pool'"),
    (dict(image_size=36), "image_size=36"), (dict(patch_size=5), "patch_size=5"),
    (dict(downsample=12), "downsample=12"),
    (dict(image_size=48, downsample=12), "downsample=12"),
    (dict(patch_size=32, downsample=4, stc_depth=0, encoder="64/2/2", decoder="36/2/2"), "decoder"),
    (dict(patch_size=32, downsample=4, stc_depth=0, encoder="36/2/2"), "encoder"),
])
def test_sizes_that_do_not_fit_are_refused_by_name(changes, name):
    """A person who typed one wrong number reads which."""
    with pytest.raises(ValueError) as error:
        build(**changes)
    assert name in str(error.value) and "\n" not in str(error.value)
