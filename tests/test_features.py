"""runs/features.py: the judge that eval.py measures samples with."""
import importlib
import re

import numpy as np
import torch
from conftest import ROOT, run_script


def test_the_judge_learns_and_cannot_tell_an_image_from_its_mirror_image(tmp_path):
    """On the shapes it is right on nine tenths after one epoch, and the file takes images of other sizes, one or many."""
    path = tmp_path / "judge.pt2"
    out = run_script("runs/features.py", "config/shapes_judge.py", "--epochs=1", "--shapes_images=3000",
                     "--dtype=float32", f"--out={path}").stdout
    assert float(re.search(r"resnet knows ([\d.]+)%", out)[1]) > 90

    network = torch.export.load(path).module()
    for count, height, width in (1, 24, 24), (3, 32, 64):
        images = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
        features, logits = network(images)
        assert features.shape == (count, 64) and logits.shape == (count, 10)
        for a, b in zip((features, logits), network(images.flip(2))):
            torch.testing.assert_close(a, b)


def test_whitening_leaves_patches_uncorrelated(monkeypatch):
    """Of the images that it was fitted to: 2 × 2 patches come out with nearly the identity as covariance."""
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    smooth = torch.nn.functional.interpolate(torch.randn(200, 3, 8, 8), scale_factor=2, mode="bilinear")
    net = importlib.import_module("features").ResNet(10, 8)
    net.fit_whitening(smooth)
    outputs = net.whiten(smooth)[:, :12].movedim(1, 0).flatten(1)  # the other 12 are the same, negative
    assert torch.equal(net.whiten.weight[12:], -net.whiten.weight[:12])
    values = np.linalg.eigvalsh(np.cov(torch.nn.functional.unfold(smooth, 2).movedim(1, 0).flatten(1).numpy()))
    expected = values / (values + 5e-4)
    np.testing.assert_allclose(np.cov(outputs.detach().numpy()), np.diag(expected), atol=1e-4)
