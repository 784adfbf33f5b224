"""latents.py: any tokenizer through stages 2 to 4, its latents normalised; the examples of runs/tokenizers/."""
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

import data
import latents
import runtime
import sample
import train_dit
from conftest import ROOT, fork_two
from test_train_dit import failure, run_here

stage4 = importlib.import_module("eval")
ALONE = SimpleNamespace(device=torch.device("cpu"), first=True, wait=lambda: None)
GENERATOR = dict(size="32/2/2", epochs=1, batch_size=16, workers=0, device="cpu", dtype="float32", sample_steps=2)
SAMPLE = dict(steps=2, device="cpu", dtype="float32")
EVAL = dict(feature_net="none", lpips_net="none", workers=0, device="cpu", dtype="float32", val_images=20)
DC_AE = f"""
import runpy, torch
from diffusers import AutoencoderDC
example = runpy.run_path("{ROOT}/runs/tokenizers/dc_ae.py")

def tokenizer():  # the example's network, but narrow and on random weights, for small images
    torch.manual_seed(0)
    narrow = dict(encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6)
    found = example["DCAE"](AutoencoderDC(**example["ARCHITECTURE"], **narrow))
    found.image_size, found.data_dir, found.shapes_images = 64, "shapes", 32
    return found
"""


@pytest.fixture
def pca(tmp_path, monkeypatch):
    """The example, on few images, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "runs/tokenizers/pca.py").read_text()
    few = text.replace("images = 4000", "images = 100").replace("20800", "64")
    assert few.count("100") == 1 and few.count("64") == 1
    (tmp_path / "few.py").write_text(few)
    return "few.py"


def stages(tokenizer, folder, size, shape, count):
    """Encodes, trains, samples and evaluates in `folder`, by the scripts -> the tokenizer as sample.py had it, and
    eval.py's results."""
    opened, plain = [], sample.open_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "open_tokenizer", lambda *a, **b: opened.append(plain(*a, **b)) or opened[-1])
        run_here(train_dit, **GENERATOR, tokenizer=tokenizer, out_dir=folder / "dit")
        run_here(sample, **SAMPLE, checkpoint=folder / "dit/checkpoint.pt", num_samples=5, out_dir=folder)
    run_here(stage4, **EVAL, tokenizer=tokenizer, out=folder / "eval.json")
    items = latents.Store(str(folder / "dit/latents.cache"), None, count, (2, *shape), np.float16).items.astype(float)
    assert np.abs(items[:, 0].mean((0, 2, 3))).max() < 1e-3 and np.abs(items[:, 0].std((0, 2, 3)) - 1).max() < 2e-3
    samples = np.load(folder / "samples.npz")["arr_0"]
    assert samples.shape == (5, size, size, 3) and samples.std() > 1
    return opened[0], json.loads((folder / "eval.json").read_text())


def test_pca_goes_through_all_stages(pca, tmp_path, monkeypatch):
    """Measured once; sampled with what was measured; evaluated as itself: its PSNR is that of its own formula."""
    tcae, results = stages(pca, tmp_path, 32, (8, 4, 4), 64)
    network = tcae.network
    source = data.Shapes("train", 64, 32)
    z = network.encode(torch.cat([data.to_float(torch.from_numpy(np.array(source.load(i)))[None], "cpu")
                                  for i in range(64)]))
    torch.testing.assert_close(tcae.latent_mean.flatten(), z.mean((0, 2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(tcae.latent_std.flatten(), z.std((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    basis = network.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), rtol=0, atol=1e-5)

    pixels = torch.from_numpy(np.stack([np.array(data.Shapes("val", 500, 32).load(i)) for i in
                                        np.linspace(0, 499, 20).round().astype(int)]))
    patches = data.to_float(pixels, "cpu").unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, 4, 4, 8, 8)
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3) - network.mean.flatten()
    lost = (rows - rows @ basis.T @ basis).square().mean((1, 2, 3))  # of values in [-1, 1]
    assert results["PSNR"] == pytest.approx(10 * torch.log10(4 / lost).mean().item(), abs=0.1)  # 8 bits, clipped
    assert results["probe on latents"] > 0 and results["probe on tokens"] is None and results["structure loss"] is None

    def measure(*_):
        raise AssertionError("measured again")
    monkeypatch.setattr(latents, "measure_latents", measure)
    run_here(train_dit, **GENERATOR, tokenizer=pca, cache=tmp_path / "dit/latents.cache", out_dir=tmp_path / "again")
    first, again = (runtime.load_checkpoint(tmp_path / name / "checkpoint.pt", "") for name in ("dit", "again"))
    assert all(torch.equal(first["ema"][name], again["ema"][name]) for name in first["ema"])
    assert torch.equal(again["latent_std"], tcae.latent_std)
    (tmp_path / "dit/latents.cache.statistics").unlink()  # a resumed run has them in its checkpoint
    torch.save({**first, "finished": False}, tmp_path / "stopped.pt")
    (tmp_path / "stopped.pt").replace(tmp_path / "dit/checkpoint.pt")
    run_here(train_dit, **GENERATOR, tokenizer=pca, out_dir=tmp_path / "dit", resume=True)


def test_a_cache_and_a_generator_belong_to_one_tokenizer_s_weights(pca, tmp_path):
    """Other components in the same file: all that was made with the old ones is refused, by name."""
    run_here(train_dit, **GENERATOR, tokenizer=pca, out_dir=tmp_path / "dit")
    state = torch.load("out/pca_shapes_32px_f8_c8.pt")
    torch.save({**state, "basis": -state["basis"]}, "out/pca_shapes_32px_f8_c8.pt")
    again = dict(GENERATOR, tokenizer=pca, cache=tmp_path / "dit/latents.cache")
    message = failure(lambda **more: run_here(train_dit, **again, **more), out_dir=tmp_path / "again")
    assert "latents.cache.statistics was made from something else (tokenizer was" in message
    message = failure(lambda **more: run_here(sample, **SAMPLE, **more), checkpoint=tmp_path / "dit/checkpoint.pt")
    assert f"tokenizer={pca} has other latents than the generator was trained on" in message
    run_here(train_dit, **again, rebuild_cache=True, out_dir=tmp_path / "new")


def test_two_processes_measure_what_one_does(pca, tmp_path):
    run_here(train_dit, **GENERATOR, tokenizer=pca, out_dir=tmp_path / "one")
    (tmp_path / "out/pca_shapes_32px_f8_c8.pt").unlink()  # the first of the two fits it anew
    fork_two(lambda **constants: run_here(train_dit, **constants), **GENERATOR, tokenizer=pca, out_dir=tmp_path / "two")
    one, two = (runtime.load_checkpoint(tmp_path / name / "checkpoint.pt", "") for name in ("one", "two"))
    torch.testing.assert_close(one["latent_std"], two["latent_std"])
    torch.testing.assert_close(one["ema"]["head.weight"], two["ema"]["head.weight"], rtol=1e-3, atol=1e-6)


def test_dc_ae_goes_through_all_stages(tmp_path):
    (tmp_path / "dc_ae.py").write_text(DC_AE)
    tcae, results = stages(tmp_path / "dc_ae.py", tmp_path, 64, (32, 2, 2), 32)
    assert isinstance(tcae.network.network, AutoencoderDC) and results["PSNR"] > 3


def test_the_published_weights_are_asked_for_as_safetensors(monkeypatch):
    """In place of the download, networks of random weights."""
    asked = []
    for network, constants in (AutoencoderDC, {}), (AutoencoderKL, dict(
            block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)):
        constants = constants or dict(encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6)

        def from_pretrained(name, use_safetensors, network=network, given=constants):
            asked.append(name)
            more = dict(latent_channels=128, encoder_block_out_channels=(32,) * 5 + (128,),
                        decoder_block_out_channels=(32,) * 5 + (128,)) if "f32c128" in name else {}
            return network(**{**given, **more}) if use_safetensors else None

        monkeypatch.setattr(network, "from_pretrained", from_pretrained)
    for name, shape in ("dc_ae", (32, 8, 8)), ("dc_ae_1_5", (128, 8, 8)), ("sd_vae", (16, 16, 16)):
        tcae = latents.open_tokenizer(str(ROOT / f"runs/tokenizers/{name}.py"), ALONE)
        with torch.no_grad():
            z = tcae.encode(torch.zeros(1, 3, 256, 256))
            assert tcae.latent_shape == z.shape[1:] == shape and tcae.decode(z).shape == (1, 3, 256, 256)
        assert tcae.data_dir == "imagenet" and not tcae.training
    assert asked == ["mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "dc-ai/dc-ae-1.5-f32c128-diffusers",
                     "stabilityai/sd-vae-ft-ema"]


@pytest.mark.parametrize("text, words", [
    (None, ["No such file"]), ("import nowhere_to_be_found", ["No module named 'nowhere_to_be_found'"]),
    ("x = 1", ["has no function tokenizer()"]), ("def tokenizer(): return 1", ["torch.nn.Module with encode, decode"]),
    ("import torch\ndef tokenizer(): return torch.nn.Identity()", ["torch.nn.Module with encode, decode, image_size"]),
    ("def tokenizer(): raise OSError('no network\\nhere')", ["no network"])])
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "file.py"
    if text:
        path.write_text(text)
    message = failure(lambda: latents.open_tokenizer(str(path), ALONE))
    assert f"tokenizer={path}" in message and all(word in message for word in words), message


def test_latents_of_another_shape_than_its_constants_say(tmp_path):
    (tmp_path / "dc_ae.py").write_text(DC_AE.replace("found.image_size, ", "found.latent_channels, found.image_size, ")
                                       .replace(" = 64,", " = 16, 64,"))
    tcae = latents.open_tokenizer(str(tmp_path / "dc_ae.py"), ALONE)
    assert "(2, 32, 2, 2) where its constants say (2, 16, 2, 2)" in failure(
        lambda: tcae.encode(torch.zeros(2, 3, 64, 64)))


def test_eval_wants_to_know_where_to_write(pca):
    assert "out is empty" in failure(lambda: run_here(stage4, **EVAL, tokenizer=pca))
