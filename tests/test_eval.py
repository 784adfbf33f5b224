"""The linear probes of Table 1 and the PSNR that eval.py prints."""
import json

import pytest
import torch

import eval as stage4
from conftest import run_script
from test_train_tokenizer import arguments


def test_probe_finds_what_is_linearly_there():
    """Two thirds of the labels follow a direction of the features: the probe gets those right and no more."""
    torch.manual_seed(0)
    features, labels = torch.randn(3000, 20), torch.randint(0, 3, (3000,))
    features[:, 7] += 100 * labels  # a large scale, which standardising must take away
    assert stage4.probe(features[:2000], labels[:2000], features[2000:], labels[2000:]) == 1.0
    guessing = stage4.probe(features[:2000, :5], labels[:2000], features[2000:, :5], labels[2000:])
    assert guessing == pytest.approx(1 / 3, abs=0.06)


def test_probe_of_two_gaussians_reaches_the_best_accuracy_there_is():
    """Unit Gaussians at ±1 along a line: Φ(1) = 84.1 % is the most that any classifier can know."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (20000,))
    features = torch.randn(20000, 4) + (2 * labels[:, None] - 1) * torch.tensor([1.0, 0, 0, 0])
    accuracy = stage4.probe(features[:10000], labels[:10000], features[10000:], labels[10000:])
    assert accuracy == pytest.approx(0.8413, abs=0.01)


def test_one_process_and_two_give_the_same_table(tmp_path):
    """Every image once, whoever sees it; and the structure loss is 1 - R_lat / R_tok."""
    run_script("train_tokenizer.py", *arguments(ssl_method="none", out_dir=tmp_path))
    path = tmp_path / "checkpoint.pt"
    tables = []
    for nproc, batch_size in (1, 7), (2, 16):
        run_script("eval.py", f"--tokenizer={path}", "--workers=0", f"--batch_size={batch_size}", "--dtype=float32",
                   nproc=nproc)
        tables.append(json.loads((tmp_path / "eval.json").read_text()))
    one, two = tables
    assert one["val_images"] == two["val_images"] and one["probe_images"] == two["probe_images"]
    assert one["psnr"] == pytest.approx(two["psnr"], abs=1e-3)
    for name in "probe_tokens", "probe_latents":  # the images come in another order, so the last digit may differ
        assert one[name] == pytest.approx(two[name], abs=0.02)
    assert one["structure_loss"] == pytest.approx(1 - one["probe_latents"] / one["probe_tokens"])
