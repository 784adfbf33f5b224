"""AdamW as PyTorch has it, and Muon against its formula: who is trained by which, at what rate."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import optim
import train_dit
from model import TCAE, IBOTHead, JointTokenizer, LightningDiT

ALONE = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
SMALL = dict(image_size=32, patch_size=4, downsample=8, latent_channels=6, encoder="32/2/2", decoder="32/2/2",
             stc_depth=1)
PAPER = dict(optimizer="adamw", learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.04, muon_rate=3.0)


def undecayed(name, p):
    return p.ndim <= 1 or name.endswith("_token")  # as in train_tokenizer.py


def joint_tokenizer(**changes):
    torch.manual_seed(0)
    head = IBOTHead(32, 32, prototypes=64)
    return JointTokenizer(TCAE(**{**SMALL, **changes}), torch.nn.ModuleDict({"cls": head, "patch": head}))


# ----------------------------------------------------------------------------------------------------------------------
# Muon


def polar(matrix, steps=5):
    """What Muon's iteration makes of a matrix, by its singular values in float64: the polynomial moves nothing else."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(9, 8), (24, 8), (8, 20), (8, 4, 3, 3)])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_muon_s_step(shape, dtype, error):
    """Three steps of different rates against the formula in float64; a kernel counts as a matrix of its output rows."""
    rng, shape_4d, shape = np.random.default_rng(0), shape, (shape[0], math.prod(shape[1:]))
    w, mean = rng.standard_normal(shape), np.zeros(shape)
    p = torch.nn.Parameter(torch.tensor(w, dtype=torch.float32).view(shape_4d))
    muon, start = optim.Muon([p], dtype, momentum=0.9, weight_decay=0.5), w
    for rate in 0.02, 0.01, 0.03:
        gradient = rng.standard_normal(shape)
        p.grad = torch.tensor(gradient, dtype=torch.float32).view(shape_4d)
        muon.param_groups[0]["lr"] = rate
        muon.step()
        mean = 0.9 * mean + 0.1 * gradient
        w = w - rate * (0.5 * w + 0.2 * max(shape) ** 0.5 * polar(0.1 * gradient + 0.9 * mean))
    assert np.abs(p.detach().numpy().reshape(shape) - w).max() < error * np.abs(w - start).max()


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonal(shape):
    """Directions of very different lengths come out about equally long, and stay the same directions."""
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    x = optim.orthogonal(torch.tensor(u * np.geomspace(0.02, 1, 8) @ vt)[None])[0].numpy()
    lengths = np.diag(u.T @ x @ vt.T)
    assert 0.65 < lengths.min() and lengths.max() < 1.25
    assert np.abs(u.T @ x @ vt.T - np.diag(lengths)).max() < 1e-6


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has one from 2.9 on")
def test_muon_is_torch_s():
    """In bfloat16, the only type that PyTorch's has, bit for bit; a weight without a gradient stays as it is."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 48), (48, 16), (32, 32), (48, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = optim.Muon(ours, torch.bfloat16, lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours[:4], theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step(), other.step()
    assert all(map(torch.equal, ours, theirs))


def test_muon_s_rate_stays_a_multiple_of_adamw_s():
    """Whatever the schedule says, for both parts of the optimizer."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 8), "mlp": torch.nn.Linear(8, 8)})
    constants = dict(optimizer="muon", learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_rate=2.5)
    optimizer = optim.Optimizer(model, constants, ALONE)
    for rate in 1e-4, 1e-3, 1e-6:
        before = model["mlp"].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(rate)
        assert [part.param_groups[0]["lr"] for part in optimizer.parts.values()] == [rate, 2.5 * rate]
        size = (model["mlp"].weight - before).norm() / 8**0.5  # the root mean square of its 8 singular values
        assert size.item() == pytest.approx(2.5 * rate * 0.2 * 8**0.5, rel=0.25)


# ----------------------------------------------------------------------------------------------------------------------
# Who is trained by which


def taken_by(optimizer, part):
    return {id(p) for group in optimizer.parts[part].param_groups for p in group["params"]}


@pytest.mark.parametrize("compression", ["conv", "shuffle"])
def test_muon_takes_the_matrices_inside_blocks_and_mlps(compression):
    """And staged compression's convolutions, but not those at the ends: patch embedding, decoder's head, prototypes."""
    model = joint_tokenizer(compression=compression)
    optimizer = optim.Optimizer(model, {**PAPER, "optimizer": "muon"}, ALONE, undecayed)
    inside = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {f"tcae.{net}.{blocks}.0.{layer}.weight" for net in ("encoder", "decoder")
                for blocks in ("fine_blocks", "coarse_blocks") for layer in inside}
    expected |= {f"tcae.{net}.mlp.{layer}.weight" for net in ("bottleneck", "decoder.unbottleneck")
                 for layer in ("fc1", "fc2")}
    expected |= {f"heads.cls.mlp.{k}.weight" for k in (0, 2, 4)}
    if compression == "conv":
        expected |= {f"tcae.{net}.{k}.weight" for net in ("encoder.compress", "decoder.expand") for k in (0, 2)}
    else:
        expected |= {f"tcae.{net}.fc{k}.weight" for net in ("encoder.compress.1", "decoder.expand.0") for k in (1, 2)}
    muon, adamw = taken_by(optimizer, "muon"), taken_by(optimizer, "adamw")
    assert {name for name, p in model.named_parameters() if id(p) in muon} == expected
    assert not muon & adamw and muon | adamw == {id(p) for p in model.parameters()}


def test_muon_takes_the_matrices_inside_the_generator_s_blocks():
    """The rest, to the embedding of the classes and adaLN's modulations, stays AdamW's."""
    model = LightningDiT("32/2/2", 6, 4, 10)
    optimizer = optim.Optimizer(model, {**vars(train_dit), "optimizer": "muon"}, ALONE)
    muon, adamw = taken_by(optimizer, "muon"), taken_by(optimizer, "adamw")
    assert not muon & adamw and muon | adamw == {id(p) for p in model.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in muon} == {
        f"blocks.{k}.{layer}.weight" for k in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_alone(optimizer):
    """Biases, norms and the learned tokens keep their size; everything that is trained is in one group."""
    model = joint_tokenizer()
    optimizer = optim.Optimizer(model, {**PAPER, "optimizer": optimizer}, ALONE, undecayed)
    groups = [group for part in optimizer.parts.values() for group in part.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    for name, p in model.named_parameters():
        plain = p.ndim == 1 or name.endswith(("cls_token", "mask_token"))
        assert decay.pop(id(p)) == (0.0 if plain else 0.04), name
    assert not decay


@pytest.mark.parametrize("network", ["tokenizer", "generator"])
def test_adamw_is_torch_s(network):
    """Bit for bit, over steps of different rates, against one that is built by hand."""
    model, other = (joint_tokenizer() if network == "tokenizer" else LightningDiT("32/2/2", 6, 4, 10) for _ in range(2))
    other.load_state_dict(model.state_dict())
    groups, constants = [{"params": list(other.parameters())}], {**PAPER, "weight_decay": 0.1}
    optimizer = optim.Optimizer(model, constants, ALONE)
    if network == "tokenizer":
        plain = [p for p in other.parameters() if p.ndim == 1]
        plain += [other.tcae.encoder.cls_token, other.tcae.encoder.mask_token]
        matrices = [p for p in other.parameters() if not any(p is each for each in plain)]
        groups = [{"params": matrices}, {"params": plain, "weight_decay": 0}]
        optimizer = optim.Optimizer(model, constants, ALONE, undecayed)
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for rate in 1e-3, 3e-4, 0.0, 2e-3:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        optimizer.step(rate)
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_cosine_end_points():
    """Linear from above 0 to the base rate, half a cosine down to the final one, the middle in the middle."""
    rate = [optim.cosine(step, 110, 1e-3, 1e-6, warmup=10) for step in range(111)]
    assert rate[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert rate[10] == pytest.approx(1e-3) and rate[110] == pytest.approx(1e-6)
    assert rate[60] == pytest.approx((1e-3 + 1e-6) / 2)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert optim.cosine(0, 100, 0.996, 1.0) == pytest.approx(0.996)  # the teacher's momentum rises
    assert optim.cosine(100, 100, 0.996, 1.0) == pytest.approx(1.0)
    assert math.isfinite(optim.cosine(5, 5, 1.0, 0.0, warmup=5)), "a warm-up over the whole run"


def test_update_ema():
    """m t + (1 - m) s, in place and without a gradient; m = 1 leaves it alone."""
    trained, averaged = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    expected = [0.9 * t + 0.1 * s.detach() for t, s in zip(averaged.parameters(), trained.parameters())]
    optim.update_ema(averaged, trained, 0.9)
    for got, want in zip(averaged.parameters(), expected):
        torch.testing.assert_close(got.data, want)
        assert not got.requires_grad
    before = [p.clone() for p in averaged.parameters()]
    optim.update_ema(averaged, trained, 1.0)
    assert all(map(torch.equal, averaged.parameters(), before))
