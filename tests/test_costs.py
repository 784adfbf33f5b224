"""The table of costs: what is counted is what a person counts by hand."""
import importlib.util
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

import runtime
import train_tokenizer as stage1
from conftest import ROOT
from model import TCAE, LightningDiT


@pytest.fixture(scope="module")
def costs():
    spec = importlib.util.spec_from_file_location("costs", ROOT / "runs" / "costs.py")
    costs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(costs)
    return costs


def blocks(count, tokens, width):
    """Operations of transformer blocks: 12 D² weights for every token, and N² products of queries, keys and values."""
    return count * (2 * 12 * tokens * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("stc_depth", [0, 1])
def test_a_tokenizer_s_operations_are_those_of_the_formula(costs, stc_depth):
    """Two per multiply-add, attention included, [CLS] too: 64 px at p = 8 are 64 tokens, the latent has 2 × 2."""
    D, c, N = 32, 6, 64
    compressed = N // 4 if stc_depth else N
    merged = compressed // 4  # tokens for one position of the latent
    with torch.device("meta"):
        tcae = TCAE(64, 8, 32, c, "32/3/2", "32/3/2", stc_depth)
        images, z = torch.zeros(1, 3, 64, 64), torch.zeros(1, c, 2, 2)
        (encode, attention), (decode, _) = costs.count(lambda: tcae.encode(images)), costs.count(
            lambda: tcae.decode(z))
    convolutions = 2 * 2 * compressed * 9 * D**2 if stc_depth else 0
    latent = 2 * 4 * (merged * D * D + D * c)
    ends = 2 * N * 192 * D
    same = ends + convolutions + latent
    assert encode == same + blocks(stc_depth, N + 1, D) + blocks(3 - stc_depth, compressed + 1, D)
    assert decode == same + blocks(stc_depth, N, D) + blocks(3 - stc_depth, compressed, D)
    assert attention == 4 * D * (stc_depth * (N + 1)**2 + (3 - stc_depth) * (compressed + 1)**2)


@pytest.mark.parametrize("phase, epoch", [(0, 0), (1, 6), (2, 8)])
def test_finetuning_s_operations_are_those_of_its_own_step(costs, monkeypatch, phase, epoch):
    """The code of the step, forwards and backwards, counted by PyTorch. VGG's features stand for LPIPS."""
    constants = runtime.configure(vars(stage1).copy(), [str(ROOT / "config" / "finetune_decoder.py")])
    constants |= dict(image_size=64, encoder="64/4/4", decoder="96/4/4", stc_depth=2, discriminator_size="96/4/4",
                      discriminator_input=32, discriminator_weights="random")
    for name, value in constants.items():
        monkeypatch.setattr(stage1, name, value)
    dist = SimpleNamespace(device="meta", autocast=nullcontext, distribute=lambda model: model,
                                sum=lambda x: x, print=lambda _: None)
    with torch.device("meta"):
        expected = costs.finetuning_row(constants)[phase]
        tcae, vgg, images = TCAE.from_constants(constants), vgg16().features, torch.zeros(1, 3, 64, 64)
        for frozen in tcae.encoder, tcae.bottleneck, vgg:
            frozen.requires_grad_(False)
        adversary = stage1.Adversary(tcae.decoder.head.weight, dist)
        with FlopCounterMode(display=False) as counter:
            loss, terms = stage1.losses(stage1.JointTokenizer(tcae), None, None, lambda a, b: (vgg(a) - vgg(b)).abs(),
                                        adversary, {"images": images}, epoch / constants["epochs"], dist)
            loss.backward()
    assert ("discriminator" in terms, "adversarial" in terms) == (phase > 0, phase > 1)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.001)  # less: what first layers need not pass on


def test_a_generator_s_operations_are_those_of_the_formula(costs):
    """SwiGLU's hidden width is 2/3 · 4 D; the condition passes through each block's modulation once per image."""
    D, c, N = 48, 6, 16
    with torch.device("meta"):
        dit = LightningDiT("48/2/4", c, 4, 10)
        got = costs.count(lambda: dit(torch.zeros(1, c, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)))[0]
    hidden = 8 * D // 3
    block = 2 * N * (4 * D**2 + 3 * D * hidden) + 4 * N**2 * D + 2 * 6 * D**2
    assert got == 2 * block + 2 * N * 2 * c * D + 2 * 2 * D**2 + 2 * (512 * D + D**2)


def test_the_tables_are_printed(costs, monkeypatch, capsys):
    """A number in every column; the paper's generator has its 675 M; S–S costs 75 GFLOPs by hand, and convolutions;
    the finetuning's mean is that of 6, 2 and 8 epochs, its hours those of 16 × 1,281,167 images at 8 × 396 TFLOP/s."""
    monkeypatch.setattr("sys.argv", ["costs.py"])
    monkeypatch.setattr(costs, "ROWS", [row for row in costs.ROWS if row[0] == "p = 64" or "default" in row[0]])
    try:
        costs.main()
    finally:
        torch.set_default_device(None)
    tables = capsys.readouterr().out.split("\n\n")[1:]
    tokenizers, finetunings, generators = [table.strip().splitlines() for table in tables]
    for head, _, *rows in tokenizers, finetunings, generators:
        assert {row.count("|") for row in rows} == {head.count("|")}
        cells = [cell for row in rows for cell in row.strip("|").split("|")[1:]]
        assert all(re.fullmatch(r" \d+\.\d ", cell) and float(cell) > 0 for cell in cells)
    assert "| XL | 675.5 |" in generators[-1]
    both, multiply_adds = (float(tokenizers[-1].split("|")[column]) for column in (6, 8))
    assert 75 < both < 80 and multiply_adds == pytest.approx(both / 2, abs=0.1)
    for row in finetunings[2:]:
        plain, alone, both, mean, hours = map(float, row.strip("| ").split("|")[1:])
        assert mean == pytest.approx((6 * plain + 2 * alone + 8 * both) / 16, abs=0.1)
        assert hours == pytest.approx(mean * 1e9 * 16 * 1281167 / (8 * 0.4 * 989e12) / 3600, abs=0.1)
