"""Decoder finetuning: the discriminator against timm, loops and plain autograd; the run, from a joint checkpoint,
stopped, resumed, split, refused."""
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import data
import runtime
import finetune_decoder
import train_tokenizer
from conftest import ROOT, fork_two
from finetune_decoder import Discriminator, DiscriminatorHead, ImageNorm, augment_differentiably
from model import TCAE
from pretrained import DINO
from test_train_dit import arguments, checkpoint, failure, latents_of, log, run_here, tensors
from test_train_tokenizer import TINY, stop_after

FINETUNE = dict(lpips_weight=0, adversarial_weight=0.75, discriminator_start=1,
                adversarial_start=2, discriminator_weights="random", discriminator_size="16/4/2",
                discriminator_input=16, decoder_ema=0.8, epochs=3, batch_size=16, learning_rate=1e-3, warmup_epochs=0.2,
                weight_decay=0, workers=0, device="cpu", dtype="float32", log_every=1, val_images=16)
TERMS = {"discriminator", "discriminator_accuracy"}, {"adversarial", "adaptive_weight"}  # of the second, third phase


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """The checkpoint of a joint training, of five steps with iBOT on 80 images."""
    out_dir = tmp_path_factory.mktemp("joint")
    run_here(train_tokenizer, **{**TINY, "batch_size": 16, "out_dir": out_dir})
    return out_dir / "checkpoint.pt"


@pytest.fixture(scope="module")
def straight(joint, tmp_path_factory):
    """The folder of a finetuning that nothing interrupted: five steps in each of the three phases."""
    out_dir = tmp_path_factory.mktemp("straight")
    run_here(finetune_decoder, **FINETUNE, init_from=joint, out_dir=out_dir)
    return out_dir


@pytest.fixture
def finetune(joint, tmp_path):
    """finetune(**changes) runs finetune_decoder's main() in this process, into tmp_path/out."""
    return lambda **changes: run_here(finetune_decoder, **{**FINETUNE, "init_from": joint, "out_dir": tmp_path / "out",
                                                          **changes})


@pytest.fixture
def first_step(joint, finetune, monkeypatch):
    """first_step(**changes): one step of the third phase on all 80 images, without augmentation -> what it saw and
    computed: the images, the gradients of the decoder and of the heads, the discriminator's inputs and outputs; and
    the tokenizer and the discriminator as they were before."""
    seen, encode, step, forward = SimpleNamespace(gradients=[], calls=[]), TCAE.encode, torch.optim.AdamW.step, \
        Discriminator.forward

    def note_encode(tcae, images):
        seen.images = getattr(seen, "images", images)  # the first ones: later there are those of validation
        return encode(tcae, images)

    def note_step(optimizer):
        seen.gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return step(optimizer)

    def note_forward(network, images):
        logits = forward(network, images)
        seen.calls.append((network.training, images.detach().clone(), logits.detach().clone()))
        return logits

    def call(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(TCAE, "encode", note_encode)
            patch.setattr(torch.optim.AdamW, "step", note_step)
            patch.setattr(Discriminator, "forward", note_forward)
            finetune(epochs=1, batch_size=80, discriminator_start=0, adversarial_start=0, warmup_epochs=0,
                     discriminator_augment=False, **changes)
        seen.tcae = TCAE.from_checkpoint(runtime.load_checkpoint(joint, "init_from"))
        seen.tcae.decoder.requires_grad_(True)
        torch.manual_seed(0)
        seen.discriminator = Discriminator(DINO("16/4/2", input_size=16))
        return seen

    return call


# ----------------------------------------------------------------------------------------------------------------------
# The discriminator


def meta_s_checkpoint(width=384):
    """Random tensors of the names and shapes of dino_deitsmall8_pretrain.pth."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 785, width), "patch_embed.proj.weight": (width, 3, 8, 8),
              "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for k in range(12):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{k}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{k}.{name}.bias"] = (rows * width,)
        for name in "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias":
            shapes[f"blocks.{k}.{name}"] = (width,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(shape, generator=generator) + name.endswith(("norm1.weight", "norm2.weight"))
            for name, shape in shapes.items()}


def test_dino_s_checkpoint_of_meta_fits_and_gives_timm_s_maps():
    """By name, nothing missing and nothing left over; the tokens after blocks 2, 5, 8, 11 are those of timm's DINO,
    without [CLS], the last ones twice; the bias of the keys, which RAE sets to 0, does nothing."""
    state, theirs = meta_s_checkpoint(), timm.create_model("vit_small_patch8_224.dino", pretrained=False).eval()
    ours = DINO()
    assert not any(p.requires_grad for p in ours.parameters())
    for network in ours, theirs:
        network.load_state_dict(state, strict=True)
    images = torch.rand(1, 3, 224, 224)  # [0, 1]
    mean, std = (torch.tensor(theirs.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        maps = ours(2 * images - 1)
        expected = theirs.get_intermediate_layers((images - mean) / std, n=[2, 5, 8, 11])
    for got, want in zip(maps, [expected[-1], *expected], strict=True):
        assert got.shape == (1, 384, 784)
        torch.testing.assert_close(got.transpose(1, 2), want, rtol=0, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_the_bias_of_dino_s_keys_does_nothing():
    """RAE sets it to 0, we leave it: softmax does not see it."""
    dino, images = DINO("32/4/2", input_size=32), torch.rand(2, 3, 32, 32)
    for block in dino.blocks:
        torch.nn.init.normal_(block.attn.qkv.bias)
    before = dino(images)
    for block in dino.blocks:
        block.attn.qkv.bias[32:64] = 0
    for a, b in zip(before, dino(images)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    dino.blocks[0].attn.qkv.bias[64:] = 0  # the values' bias does something
    assert not torch.allclose(before[0], dino(images)[0], atol=1e-2)


@pytest.mark.parametrize("size", [16, 32, 40])
def test_any_image_is_resized_to_what_dino_expects(size):
    """Bilinearly, as RAE does; what has that size already stays as it is. The gradient comes back to every pixel."""
    dino, images = DINO("16/4/2", input_size=32), torch.rand(2, 3, size, size, requires_grad=True)
    resized = F.interpolate(images, (32, 32), mode="bilinear") if size != 32 else images
    maps = dino(images)
    assert len(maps) == 5 and maps[0].shape == (2, 16, 16)
    assert all(map(torch.equal, maps, dino(resized)))
    maps[1].square().sum().backward()
    assert (images.grad != 0).all()


def test_image_norm_is_over_the_tokens_of_each_image():
    """Per image and channel, as a loop in float64: so neither batch nor number of processes matters."""
    norm, x = ImageNorm(3), torch.randn(4, 3, 5) * torch.tensor([1.0, 5.0, 0.1])[:, None] + 2
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    expected = torch.empty_like(x, dtype=torch.float64)
    for k, c in np.ndindex(4, 3):
        values, scale, shift = x[k, c].double(), norm.weight[c].item(), norm.bias[c].item()
        expected[k, c] = (values - values.mean()) / (values.var(correction=0) + 1e-6).sqrt() * scale + shift
    for mode in norm.train(), norm.eval():
        torch.testing.assert_close(mode(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.float32 and norm.state_dict().keys() == {"weight", "bias"}


def test_a_head_is_what_it_should_be():
    """Kernel 1, kernel 9 around a residual scaled by 1/√2, kernel 1 to a logit per token, tokens in a circle."""
    head, x = DiscriminatorHead(6).eval(), torch.randn(8, 6, 12)

    def block(x, conv, norm):
        weight, half = conv.weight, conv.weight.shape[2] // 2
        y = sum(torch.einsum("oi,bin->bon", weight[:, :, k], x.roll(half - k, 2)) for k in range(weight.shape[2]))
        return F.leaky_relu(norm(y + conv.bias[:, None]), 0.2)

    y = block(x, head.block1[0], head.block1[1])
    y = (y + block(y, head.block9[0], head.block9[1])) / 2**0.5
    expected = torch.einsum("i,bin->bn", head.out.weight[0, :, 0], y) + head.out.bias
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_heads_keep_a_spectral_norm_of_one(dtype):
    """Of every convolution, however large its weights are; logits are float32, five for each token."""
    torch.manual_seed(0)
    network = Discriminator(DINO("16/4/2", input_size=16))
    with torch.no_grad():
        for name, p in network.heads.named_parameters():
            p *= 3 if "original" in name else 1
    optimizer = torch.optim.AdamW(network.heads.parameters(), lr=1e-3)
    for _ in range(20):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(torch.rand(8, 3, 16, 16))
        (-logits[:4].mean() + logits[4:].mean()).backward()
        optimizer.step(), optimizer.zero_grad()
    assert logits.shape == (8, 5 * 4) and logits.dtype == torch.float32 and len(network.heads) == 5
    for head in network.eval().heads:
        for conv in head.block1[0], head.block9[0], head.out:
            largest = torch.linalg.matrix_norm(conv.weight.flatten(1).double(), 2).item()
            assert largest == pytest.approx(1, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# The augmentation


def test_augmentation_equals_the_loop():
    """A shift of up to an eighth, beyond the border grey; then brightness, saturation, contrast."""
    images = torch.rand(4, 3, 16, 24) * 2 - 1
    torch.manual_seed(3)
    ours = augment_differentiably(images)
    torch.manual_seed(3)
    down, right = (((torch.rand(2, 4) * 2 - 1) / 8)).tolist()
    brightness, saturation, contrast = torch.rand(3, 4).tolist()
    for b in range(4):
        shift = round(down[b] * 16), round(right[b] * 24)
        x = torch.zeros(3, 16, 24, dtype=torch.float64)
        for i in range(16):
            for j in range(24):
                if 0 <= i - shift[0] < 16 and 0 <= j - shift[1] < 24:
                    x[:, i, j] = images[b, :, i - shift[0], j - shift[1]]
        x = x + brightness[b] - 0.5
        grey = x.mean(0)
        x = grey + (x - grey) * 2 * saturation[b]
        x = x.mean() + (x - x.mean()) * (contrast[b] + 0.5)
        torch.testing.assert_close(ours[b].double(), x, rtol=0, atol=1e-5)


def test_augmentation_is_unbiased_and_shifts_by_an_eighth_at_most():
    """Of a flat colour the mean stays, away from the borders; after a shift a row or column there is grey."""
    colour = torch.tensor([0.6, -0.5, 0.1])[:, None, None]
    images = colour.expand(4000, 3, 16, 16)
    augmented = augment_differentiably(images)
    inner = augmented[:, :, 2:-2, 2:-2]
    assert (inner.mean((0, 2, 3)) - colour.flatten()).abs().max() < 0.03
    is_grey = (augmented.amax(1) - augmented.amin(1)) < 1e-5 * augmented.abs().amax(1)  # (B, 16, 16)
    assert not is_grey[:, 2:-2, 2:-2].any(), "a shift by more than an eighth"
    border = is_grey
    for edge in border[:, 0], border[:, -1], border[:, :, 0], border[:, :, -1]:
        assert 0.2 < edge.all(-1).float().mean() < 0.5
    assert 0.05 < border[:, :2].all((1, 2)).float().mean() < 0.25


def test_the_gradient_goes_through_the_augmentation():
    """It is linear in each image for given random numbers: the gradient is that of finite differences."""
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def augmented(x):
        torch.manual_seed(0)
        return augment_differentiably(x)

    assert torch.autograd.gradcheck(augmented, images)


# ----------------------------------------------------------------------------------------------------------------------
# One step, looked at closely


def test_the_decoder_s_gradient_is_that_of_the_plain_loss(first_step, tmp_path):
    """L_rec + λ_q w L_adv with w as VQGAN's code has it, for every weight of the decoder, and as logged."""
    seen = first_step()
    reconstruction = seen.tcae(seen.images)
    rec = F.l1_loss((reconstruction + 1) / 2, (seen.images + 1) / 2)
    adversarial = -seen.discriminator.eval()(reconstruction).mean()
    last_layer = seen.tcae.decoder.head.weight
    of_rec, of_adversarial = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                              for loss in (rec, adversarial))
    weight = of_rec.norm() / (of_adversarial.norm() + 1e-6)
    loss = rec + 0.75 * weight * adversarial
    parameters = list(seen.tcae.decoder.parameters())
    for got, want in zip(seen.gradients[0], torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item() + 1e-7)
    line = log(tmp_path / "out")[0]
    for name, value in dict(loss=loss, adversarial=adversarial, adaptive_weight=weight).items():
        assert line[name] == pytest.approx(value.item(), rel=1e-3), name
    assert 0 < weight < 1e4


def test_the_adaptive_weight_has_a_limit(finetune, tmp_path, monkeypatch):
    """Where the discriminator says nothing, its weight would have none."""
    monkeypatch.setattr(Discriminator, "forward", lambda network, images: 1e-9 * images.flatten(1) + 0 * sum(
        p.sum() for p in network.heads.parameters()))
    finetune(epochs=1, discriminator_start=0, adversarial_start=0)
    assert log(tmp_path / "out")[0]["adaptive_weight"] == 1e4


def test_the_discriminator_s_step(first_step, tmp_path):
    """Hinge loss on the real images and on fresh reconstructions as 8 bits, from the decoder after its step; the
    gradient is that of the heads alone."""
    seen = first_step()
    (training, _, _), (learning, inputs, logits) = seen.calls
    assert not training and learning
    after = checkpoint(tmp_path / "out")["decoder"]
    seen.tcae.decoder.load_state_dict(after)
    fake = data.to_float(data.to_uint8(seen.tcae(seen.images).detach()), "cpu")
    assert torch.equal(inputs[:80], seen.images)
    assert (inputs[80:] - fake).abs().max() <= 2 / 255 + 1e-6 and (inputs[80:] != fake).float().mean() < 1e-3
    of_real, of_fake = logits.double().chunk(2)
    hinge = ((1 - of_real).clamp(min=0).mean() + (1 + of_fake).clamp(min=0).mean()) / 2
    accuracy = ((of_real > 0).double().mean() + (of_fake < 0).double().mean()) / 2
    line = log(tmp_path / "out")[0]
    assert line["discriminator"] == pytest.approx(hinge.item(), rel=1e-5)
    assert line["discriminator_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
    logits = seen.discriminator.train()(inputs)
    loss = (F.relu(1 - logits[:80]).mean() + F.relu(1 + logits[80:]).mean()) / 2
    expected = torch.autograd.grad(loss, list(seen.discriminator.heads.parameters()))
    for got, want in zip(seen.gradients[1], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_the_discriminator_learns(finetune, tmp_path):
    """To tell one from the other, with random features under it and a decoder that improves meanwhile."""
    finetune(epochs=40, discriminator_start=0, adversarial_start=39.9, learning_rate=1e-2, min_learning_rate=1e-2,
             warmup_epochs=0, decoder_ema=0.0, discriminator_augment=False, eval_every=1000)
    steps = [line for line in log(tmp_path / "out") if "discriminator" in line]
    accuracy, hinge = ([line[name] for line in steps] for name in ("discriminator_accuracy", "discriminator"))
    assert np.mean(accuracy[-20:]) > np.mean(accuracy[:5]) + 0.03
    assert np.mean(hinge[-20:]) < 0.97 * np.mean(hinge[:5])


# ----------------------------------------------------------------------------------------------------------------------
# A run


def test_a_finetuning_changes_the_decoder_alone(joint, straight):
    """Sizes and data come from the joint checkpoint, whose encoder, bottleneck and latent statistics stay bit for bit;
    the result is a finished tokenizer with the same latents. The discriminator's terms come with their phases."""
    before, after = runtime.load_checkpoint(joint, "init_from"), runtime.load_checkpoint(
        straight / "checkpoint.pt", "tokenizer", kind="tokenizer")
    for name in (*TCAE.CONSTANTS, "shapes_images", "data_dir"):
        assert after["constants"][name] == before["constants"][name] == TINY.get(name, "conv"), name
    same = {name for name in before["tokenizer"] if torch.equal(before["tokenizer"][name], after["tokenizer"][name])}
    assert same == {name for name in before["tokenizer"] if not name.startswith("decoder.")}
    assert latents_of(before) == latents_of(after)
    assert TCAE.from_checkpoint(after).decode(torch.zeros(1, 6, 4, 4)).shape == (1, 3, 32, 32)
    steps = [line for line in log(straight) if "loss" in line]
    assert len(steps) == 15 and log(straight)[-1]["val_psnr"] > 5
    for k, line in enumerate(steps):
        assert (TERMS[0] <= line.keys()) == (k >= 5) and (TERMS[1] <= line.keys()) == (k >= 10)
        adversarial = 0.75 * line["adaptive_weight"] * line["adversarial"] if k >= 10 else 0
        assert line["loss"] == pytest.approx(line["l1"] / 2 + adversarial, rel=1e-4, abs=1e-5)  # L1 on [0, 1]
    heads = after["discriminator_optimizer"]["state"]
    assert {int(state["step"]) for state in heads.values()} == {10}, "the discriminator learns from its start on"


def test_the_discriminator_s_schedule(finetune, monkeypatch):
    """Its rate begins with its own training: here with a warm-up of one step at step 5, and along the cosine of all 15
    steps from there."""
    step, rates = torch.optim.AdamW.step, []

    def note_step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", note_step)
    finetune(min_learning_rate=1e-4)
    of_discriminator = rates[6::2]  # after five steps of the decoder alone they alternate
    expected = [1e-4 + 9e-4 * (1 + np.cos(np.pi * (k - 1) / 14)) / 2 for k in range(1, 10)]
    assert of_discriminator == pytest.approx([1e-3, *expected], rel=1e-6)


def test_what_is_kept_is_the_running_average_of_the_decoder(joint, finetune, monkeypatch):
    """From the joint decoder on, by hand; the last weights are kept beside it. Without average both are the same, and
    the latents' statistics are the joint ones."""
    saves = []
    monkeypatch.setattr(runtime, "save_checkpoint", lambda _, state: saves.append(
        {part: {name: x.clone() for name, x in state[part].items()} for part in ("tokenizer", "decoder")}))
    finetune(epochs=1, adversarial_weight=0, save_every=1)
    began = runtime.load_checkpoint(joint, "init_from")["tokenizer"]
    average = {name.removeprefix("decoder."): x.clone() for name, x in began.items() if name.startswith("decoder.")}
    assert len(saves) == 6  # five steps, and the end
    for state in saves[:5]:
        for name in average:
            average[name] = 0.8 * average[name] + 0.2 * state["decoder"][name]
            torch.testing.assert_close(state["tokenizer"][f"decoder.{name}"], average[name], rtol=0, atol=1e-6)
    assert not torch.equal(saves[-1]["tokenizer"]["decoder.head.weight"], saves[-1]["decoder"]["head.weight"])
    finetune(epochs=1, adversarial_weight=0, decoder_ema=0)
    assert all(torch.equal(saves[-1]["tokenizer"][name], began[name]) for name in ("latent_mean", "latent_std"))
    assert all(torch.equal(saves[-1]["tokenizer"][f"decoder.{name}"], x) for name, x in saves[-1]["decoder"].items())


@pytest.mark.parametrize("stop", [3, 8, 12])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(straight, joint, finetune, tmp_path, stop):
    """In each phase, bit for bit: decoder, average, discriminator with its spectral norms, both optimizers."""
    moved = tmp_path / "joint.pt"
    moved.write_bytes(joint.read_bytes())
    with stop_after(stop):
        finetune(init_from=moved)
    state = checkpoint(tmp_path / "out")
    assert (state["step"], state["finished"]) == (stop, False)
    moved.unlink()  # all that the rest takes is in its own checkpoint
    finetune(init_from=moved, resume=True)
    ours, theirs = checkpoint(tmp_path / "out"), checkpoint(straight)
    assert {"tokenizer", "decoder", "optimizer", "discriminator", "discriminator_optimizer"} <= ours.keys()
    assert ours["finished"]
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys() and any("_u" in name for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_two_processes_do_the_same(joint, finetune, tmp_path):
    """With half of the images each, and without the augmentation, for which each process has its own random numbers:
    the same terms, adaptive weight, decoder and heads."""
    same = dict(FINETUNE, init_from=joint, epochs=1, discriminator_start=0.2, adversarial_start=0.5, learning_rate=1e-4,
                discriminator_augment=False)
    finetune(**same)
    two = tmp_path / "two"
    fork_two(finetune, **{**same, "out_dir": two})
    for a, b in zip(log(tmp_path / "out"), log(two), strict=True):
        assert a.keys() == b.keys() and (a["step"] < 4 or "val_psnr" in a or TERMS[1] <= a.keys())
        for name in (a.keys() & {"loss", "l1", "grad_norm", "val_psnr", *TERMS[0], *TERMS[1]}):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), (a["step"], name)
    a, b = checkpoint(tmp_path / "out"), checkpoint(two)
    for one, other in (a["decoder"], b["decoder"]), (a["discriminator"], b["discriminator"]):
        x, y = (torch.cat([tensor.flatten() for tensor in state.values()]) for state in (one, other))
        assert (x - y).abs().mean() < 1e-6


def test_the_defaults_are_the_paper_s():
    """Table 7, right, with its epochs 6 and 8; RAE's average, augmentation and gradients that are not clipped."""
    table = dict(epochs=16, batch_size=256, betas=(0.9, 0.95), weight_decay=0, learning_rate=2e-4,
                 min_learning_rate=2e-5, warmup_epochs=1, lpips_weight=1, adversarial_weight=0.75, grad_clip=0,
                 discriminator_start=6, adversarial_start=8, decoder_ema=0.9978, discriminator_augment=True)
    assert {name: getattr(finetune_decoder, name) for name in table} == table


@pytest.mark.parametrize("processes", [1, 2])
def test_the_config_fits(processes, monkeypatch):
    """No constant is refused."""
    script = vars(finetune_decoder)
    for name, value in list(script.items()):
        monkeypatch.setitem(script, name, value)
    runtime.configure(script, [str(ROOT / "config" / "cifar10_finetune.py")])
    finetune_decoder.check_constants(SimpleNamespace(count=processes))


# ----------------------------------------------------------------------------------------------------------------------
# Refused


def test_dino_s_weights_that_can_not_be_had_end_the_run_before_its_first_step(finetune, tmp_path, monkeypatch):
    """Which file, from where, to which path, and which constant does without it; also where the file is another one."""
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    real = dict(discriminator_weights="dino", discriminator_size="S", discriminator_input=224)
    message = failure(finetune, **real)
    path = tmp_path / "hub" / "checkpoints" / "dino_deitsmall8_pretrain.pth"
    url = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    for word in url, str(path), "adversarial_weight=0", "discriminator_weights=random":
        assert word in message
    for other in {"weight": torch.zeros(3)}, None:
        torch.save(other, path) if other else path.write_bytes(b"<html>")
        message = failure(finetune, **real)
        assert str(path) in message and "discriminator_weights" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(discriminator_weights="dino"), ["discriminator_size='16/4/2'", "discriminator_input=16", "S", "224"]),
    (dict(discriminator_weights="imagenet"), ["discriminator_weights='imagenet'", "dino", "random"]),
    (dict(discriminator_start=2.5), ["discriminator_start=2.5", "adversarial_start=2"]),
    (dict(adversarial_start=3), ["adversarial_start=3", "epochs=3"]),
    (dict(discriminator_input=20), ["discriminator_input=20", "8"]),
    (dict(discriminator_input=8), ["discriminator_input=8", "16"]),
    (dict(decoder_ema=1), ["decoder_ema=1"]),
    (dict(init_from="/nonexistent.pt"), ["init_from=/nonexistent.pt"]),
])
def test_a_wrong_constant_is_one_line_that_names_it(finetune, tmp_path, changes, words):
    """And says what it may be; nothing is written."""
    message = failure(finetune, **changes)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, words", [(dict(finished=False), "unfinished"), (dict(kind="dit"), "something else")])
def test_a_checkpoint_that_is_no_finished_tokenizer_is_refused(joint, finetune, tmp_path, change, words):
    """Its latents have no statistics yet, or it has none."""
    path = tmp_path / "other.pt"
    torch.save({**runtime.load_checkpoint(joint, "init_from"), **change}, path)
    message = failure(finetune, init_from=path)
    assert f"init_from={path}" in message and words in message and not (tmp_path / "out").exists()
