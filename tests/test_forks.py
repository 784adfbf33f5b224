"""docs/FORKS.md: each of its diffs still applies to this project, is as small as the page says, and trains."""
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, python

PAGE = (ROOT / "docs" / "FORKS.md").read_text()
TINY = dict(data_dir="shapes", shapes_images=32, image_size=32, patch_size=4, downsample=8, latent_channels=4,
            encoder="32/2/2", decoder="32/2/2", stc_depth=1, lpips_weight=0, prototypes=32, head_hidden=32,
            global_crop_size=32, local_crops=2, local_crop_size=16, epochs=1, batch_size=8, warmup_epochs=0.2,
            freeze_prototypes_epochs=0, workers=0, device="cpu", dtype="float32", log_every=1, val_images=2,
            stats_images=8, out_dir="out")


def diffs():
    """{heading of the page: its diff}"""
    return dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def fork(tmp_path):
    """fork(part of a heading) -> the folder of a copy of the project with that diff applied."""
    def apply(heading):
        (diff,) = [text for name, text in diffs().items() if heading in name]
        for file in ROOT.glob("*.py"):
            shutil.copy(file, tmp_path)
        subprocess.run(["git", "apply", "-C1", "-"], input=diff, text=True, cwd=tmp_path, check=True)
        return tmp_path

    return apply


def train(folder, **changes):
    """Stage 1 in the copy -> its logged steps."""
    python("train_tokenizer.py", *(f"--{name}={value}" for name, value in {**TINY, **changes}.items()), cwd=folder)
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_each_fork_is_at_most_15_changed_lines():
    assert len(diffs()) == 3
    for heading, diff in diffs().items():
        changed = re.findall(r"^[-+](?!-- a/|\+\+ b/)", diff, re.MULTILINE)
        assert 0 < len(changed) <= 15, (heading, len(changed))


def test_own_images_without_labels(fork):
    """20 images in nested folders: two are for validation, two steps of eight see the rest; then the generator."""
    folder, rng = fork("without labels"), np.random.default_rng(0)
    for k in range(20):
        path = folder / "photos" / f"year{k % 3}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    assert len(train(folder, data_dir="photos", val_images=0)) == 2
    python("train_dit.py", "--tokenizer=out/checkpoint.pt", "--out_dir=dit", "--size=32/1/2", "--batch_size=8",
           "--epochs=1", "--workers=0", "--device=cpu", "--dtype=float32", "--sample_steps=2", cwd=folder)
    state = torch.load(folder / "dit" / "checkpoint.pt", weights_only=True)
    assert state["images"] == 18 and len(state["classes"]) == 1 and state["step"] == 2


def test_simclr(fork):
    """The loss by a loop over pairs, and a run with it: near log(2 B - 1) at first, when all crops look alike."""
    folder = fork("SimCLR")
    shown = python("-c", "import torch, ssl; torch.manual_seed(0); z = torch.randn(6, 5); "
                   "print(ssl.nt_xent(z, 0.5).item())", cwd=folder).stdout
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    expected = 0
    for i in range(6):
        others = [math.exp(z[i] @ z[k] / 0.5) for k in range(6) if k != i]
        expected -= math.log(math.exp(z[i] @ z[(i + 3) % 6] / 0.5) / sum(others)) / 6
    assert math.isclose(float(shown), expected, rel_tol=1e-4)

    steps = train(folder, ssl_method="simclr", local_crops=0)
    assert len(steps) == 4 and all("mim" not in step and 0 < step["simclr"] < 2 * math.log(15) for step in steps)


def test_third_stage_of_compression(fork):
    """p = 2 of 32 px: 256 tokens become 16. A masked output token hides all 16 of its patches: what stands there makes
    no difference to any output. Then a run."""
    folder = fork("third stage")
    python("-c", """
import torch
from model import TCAE
tcae = TCAE(32, 2, 16, 4, "32/3/2", "32/3/2", stc_depth=1)
images, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
mask[:, 1, 2] = True
changed = images.clone()
changed[:, :, 8:16, 16:24] = 0
assert tcae.encoder.output_patch == 8 and tcae.encode(images).shape == (2, 4, 2, 2)
assert tcae(images).shape == images.shape
for a, b in zip(tcae.encoder(images, mask), tcae.encoder(changed, mask)):
    assert torch.equal(a, b)
assert not torch.equal(tcae.encoder(images)[1], tcae.encoder(changed)[1])
""", cwd=folder)
    assert len(train(folder, patch_size=2)) == 4
