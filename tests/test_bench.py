"""bench.py: that it counts what it says, that what it calls plain is the same computation, and that it runs."""
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bench
import runtime
import train_dit
import train_tokenizer

ROOT = Path(__file__).parent.parent
TINY = """
data_dir = "shapes"
image_size, patch_size, downsample, latent_channels = 16, 4, 8, 4
encoder = decoder = "32/2/2"
stc_depth, lpips_weight, prototypes, head_hidden = 1, 0.0, 32, 32
global_crop_size, local_crop_size, local_crops = 16, 8, 2
batch_size, shapes_images, workers, epochs, val_images = 8, 800, 0, 1, 8
warmup_epochs, freeze_prototypes_epochs, stats_images = 0.0, 0.0, 8
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Configurations so small that every table takes seconds; the scripts' constants are put back afterwards."""
    joint, dit, finetune = (tmp_path / f"{name}.py" for name in ("joint", "dit", "finetune"))
    joint.write_text(TINY)
    dit.write_text('size, batch_size = "32/2/2", 8')
    finetune.write_text('ssl_method, adversarial_weight, discriminator_size = "none", 0.5, "32/4/2"\n'
                        "discriminator_input, discriminator_start, adversarial_start = 32, 0.0, 0.1")
    monkeypatch.setattr(bench, "CONFIGS", {"shapes": {"joint": [joint], "finetune": [joint, finetune], "dit": [dit]}})
    monkeypatch.setattr(bench, "sizes", "shapes")
    monkeypatch.setattr(bench, "repeats", 1)
    kept = {module: dict(vars(module)) for module in (train_tokenizer, train_dit)}
    yield
    for module, values in kept.items():
        vars(module).update(values)


def test_products_are_counted_with_their_operations():
    """A linear layer, a convolution and attention, forwards and backwards, against the products written out."""
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    with bench.Products() as products:
        F.linear(x, weight).sum().backward()
    assert products.operations == 3 * 2 * 5 * 7 * 3  # forwards, to x, to the weight

    image, kernel = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    with bench.Products() as products:
        F.conv2d(image, kernel).sum().backward()
    assert products.operations == 3 * 2 * 2 * 6 * 7 * 7 * 4 * 9

    q, k, v = torch.randn(3, 2, 4, 10, 8)
    with bench.Products() as products:
        F.scaled_dot_product_attention(q, k, v)
    assert products.operations == 2 * 2 * 2 * 4 * 10 * 10 * 8


def test_products_alone_take_the_time_of_the_product():
    """Of a step that is one product: the bare time is the step's own, within the noise of a busy machine."""
    a, b = torch.randn(2, 512, 512)
    with bench.Products() as products:
        for _ in range(4):
            a @ b
    assert list(products.calls.values()) == [4]  # equal calls are timed once
    alone, step = products.seconds(bench.CPU), bench.medians({"": lambda: [a @ b for _ in range(4)]}, bench.CPU)[""]
    assert 0.2 < alone / step < 5


def test_rebuilt_tensors_are_like_the_described_ones():
    value = (torch.zeros(4, 6).T, [torch.zeros(2, dtype=torch.bfloat16), 3], None, "same")
    first, (second, three), nothing, word = bench.rebuild(bench.describe(value), bench.CPU)
    assert first.shape == (6, 4) and first.stride() == (1, 6)
    seed = bench.rebuild(bench.describe(torch.zeros((), dtype=torch.int64)), bench.CPU)
    assert seed.shape == () and seed.dtype == torch.int64  # such as fused attention takes
    assert second.dtype == torch.bfloat16 and (three, nothing, word) == (3, None, "same")


def test_the_plain_step_is_the_same_computation(tiny):
    """Head and loss on all tokens, the masked ones weighted, give the loss of the masked tokens alone."""
    dist = runtime.Distributed("cpu", "float32")
    seen = []
    for plain in False, True:
        bench.configure(train_tokenizer, bench.CONFIGS["shapes"]["joint"])
        original = train_tokenizer.losses

        def losses(*arguments):
            loss, terms = original(*arguments)
            seen.append(terms)
            return loss, terms

        train_tokenizer.losses = losses
        bench.tokenizer_step(8, dist, plain)[0]()
    ours, plain = seen
    assert ours["mim"] > 0
    for name in "loss", "l1", "cls", "mim":
        assert math.isclose(ours[name], plain[name], rel_tol=1e-5), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_table(tiny, capsys, dtype):
    """Every stage is measured; nothing is missing or not a number."""
    bench.show_steps(runtime.Distributed("cpu", dtype))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [cells[0] for cells in rows] == ["tokenizer, joint", "tokenizer, finetuning", "generator", "encode",
                                            "decode", "sampling, one guided step"]
    for cells in rows:
        assert float(cells[2]) > 0 and float(cells[4]) > 0
    assert all(float(cells[7]) > 0 for cells in rows[:3])


@pytest.fixture
def meta(monkeypatch):
    """Processes on the meta device, whose tensors have no values: what would make the host wait for a GPU, such as
    .item(), .cpu(), an `if` or a mask as an index, is an error there, as is a tensor of the CPU among the device's."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    return SimpleNamespace(device=torch.device("meta"), dtype=torch.float32, autocast=nullcontext, rank=0, count=1,
                           distribute=lambda model: model, sum=lambda tensor: tensor, print=lambda *_: None)


@pytest.mark.parametrize("method", ["ibot", "dino", "dinov2", "none"])
def test_no_tokenizer_step_waits_for_its_device(tiny, meta, method):
    """Networks, losses and updates; with "none" against the discriminator."""
    config = bench.CONFIGS["shapes"]["finetune" if method == "none" else "joint"]
    bench.configure(train_tokenizer, config, f"--ssl_method={method}", "--discriminator_weights=random")
    step, _ = bench.tokenizer_step(8, meta)
    step()


def test_no_step_on_latents_waits_for_its_device(tiny, meta):
    """The generator's, and encoding, decoding and sampling."""
    bench.configure(train_tokenizer, bench.CONFIGS["shapes"]["joint"])
    bench.configure(train_dit, bench.CONFIGS["shapes"]["dit"])
    encode, decode, _ = bench.coding(4, meta)
    for step in bench.generator_step(4, meta)[0], encode, decode, bench.sampling(4, meta)[0]:
        step()


def test_run_table(tiny, capsys):
    """It starts the real script and reads its log."""
    bench.show_run()
    out = capsys.readouterr().out
    cells = dict(re.findall(r"^\| (.+) \| (.+) \|$", out, re.MULTILINE))
    assert 0 < float(cells["--help"].split()[0]) and 0 < float(cells["first step after"].split()[0]) < 120
    assert 0 <= float(cells["waiting for data"].split("%")[0]) <= 100 and float(cells["images/s"]) > 0


def test_unknown_table_names_the_constant():
    done = subprocess.run([sys.executable, ROOT / "bench.py", "--only=speed"], capture_output=True, text=True)
    assert done.returncode == 1 and "only='speed'" in done.stderr and len(done.stderr.splitlines()) == 1
