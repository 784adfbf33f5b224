"""The study on CIFAR-10: its networks, its commands, its verdicts, its pictures."""
import importlib.util
import json
import shlex
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import pretrained
import runtime
import sample
import shapes
import train_dit
import train_tokenizer
from conftest import ROOT
from model import TCAE
from test_train_dit import run_here

sys.path.insert(0, str(ROOT / "runs"))
import features  # noqa: E402
import study  # noqa: E402

SCRIPTS = {"train_tokenizer.py": train_tokenizer, "train_dit.py": train_dit, "sample.py": sample, "eval.py": evaluation}
RESULT = {"train_tokenizer.py": "{out_dir}/checkpoint.pt", "train_dit.py": "{out_dir}/checkpoint.pt",
          "sample.py": "{out_dir}/samples.npz", "eval.py": "{out}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shapes as files, in the layout of CIFAR-10, and both networks after a step or two."""
    folder = tmp_path_factory.mktemp("study")
    for split, source in ("train", shapes.Shapes("train", 64, 32)), ("test", shapes.Shapes("val", 20, 32)):
        for i in range(len(source)):
            path = folder / "cifar10" / split / source.classes[source.labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.load(i).save(path)
    for network in "resnet", "vgg":
        run_here(features, data_dir=folder / "cifar10", network=network, epochs=1, batch_size=32,
                 out=folder / f"{network}.pt2", dtype="float32")
    return folder


def test_what_samples_are_measured_by(folder, monkeypatch):
    """eval.py takes the network, for any number of images."""
    monkeypatch.setattr(evaluation, "feature_net", str(folder / "resnet.pt2"))
    network = evaluation.open_feature_net(32, runtime.Distributed("cpu", "float32"))
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    features, logits = network(pixels)
    assert features.shape == (3, 256) and logits.shape == (3, 10)
    assert torch.allclose(network(pixels[:1])[0], features[:1], atol=1e-5)
    assert network(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))[0].shape == (2, 256)  # and of other sizes


def test_the_perceptual_loss_is_lpips_form(folder):
    """Against a loop over places, in float64; zero for the same image; and it has a gradient."""
    dist = runtime.Distributed("cpu", "float32")
    distance = pretrained.training_lpips(str(folder / "vgg.pt2"), dist)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    maps = distance.maps
    expected = []
    for k in range(2):
        each = []
        for x, y in zip(maps(a), maps(b)):
            x, y = x[k].double(), y[k].double()  # (C, h, w)
            places = [((x[:, i, j] / x[:, i, j].norm().clamp(min=1e-12) - y[:, i, j] / y[:, i, j].norm().clamp(min=1e-12))
                       ** 2).sum() for i in range(x.shape[1]) for j in range(x.shape[2])]
            each.append(torch.stack(places).mean())
        expected.append(torch.stack(each).mean())
    assert torch.allclose(distance(a, b).double(), torch.stack(expected), rtol=1e-4)
    assert distance(a, a).abs().max() == 0
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.abs().max() > 0
    assert distance(*torch.rand(2, 1, 3, 64, 64)).shape == (1,)  # learned at 32 px, it takes other sizes


def test_a_missing_network_is_named(tmp_path):
    with pytest.raises(SystemExit, match="lpips_net=.*nothing.pt2: there is no such file"):
        pretrained.training_lpips(str(tmp_path / "nothing.pt2"), runtime.Distributed("cpu", "float32"))


@pytest.fixture
def cell(folder, tmp_path, monkeypatch):
    """Runs a cell with a stand-in for every script: it checks the constants and writes the file. -> the commands."""
    commands = []

    def run(words, stdout, **_):
        _, script, *arguments = map(str, words)
        constants = runtime.configure(vars(SCRIPTS[script]).copy(), arguments)
        for name in "tokenizer", "checkpoint", "samples":
            assert name not in constants or not constants[name] or Path(constants[name]).exists(), shlex.join(words)
        result = Path(RESULT[script].format(**constants))
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text("{}")
        if result.suffix == ".npz":
            np.savez(result, arr_0=np.random.default_rng(0).integers(256, size=(2, 32, 32, 3)).astype(np.uint8))
        for step in study.EARLY if script == "train_dit.py" else ():
            result.with_name(f"step-{step}.pt").touch()
        (result.parent / "log.jsonl").write_text('{"step": 50, "loss": 1.0}\n')
        commands.append((script, constants))
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    monkeypatch.setattr(study, "data_dir", str(folder / "cifar10"))
    monkeypatch.setattr(study, "out_dir", str(tmp_path / "out_dir"))
    return commands


def test_seams_are_differences_across_the_borders_of_latent_positions():
    """Beside noise, which has none. Against a loop over neighbours."""
    images = np.random.default_rng(0).integers(100, size=(50, 32, 32, 3)).astype(np.uint8)
    noise = images.copy()
    images[:, 16:] += 50
    images[:, :, 16:] += 50
    found, expected = [study.differences(x) for x in (images, noise)], []
    for x in images.astype(float), noise.astype(float):
        border, inside = [], []
        for k in range(31):
            for a, b in (x[:, k], x[:, k + 1]), (x[:, :, k], x[:, :, k + 1]):
                (border if k == 15 else inside).append(abs(a - b).mean())
        expected.append(np.mean(border) / np.mean(inside))
    assert expected[0] > 1.3 and expected[1] == pytest.approx(1, abs=0.02)
    assert study.seams(*found, 16) == pytest.approx(expected[0] / expected[1], rel=1e-5)


@pytest.mark.parametrize("row", study.ROWS)
def test_every_command_is_valid(cell, row):
    """And a finished cell begins nothing."""
    study.run_cell(row, 3)
    assert [script for script, _ in cell] == ["train_tokenizer.py", "eval.py", "train_dit.py", "sample.py", "eval.py",
                                              "eval.py", "sample.py", "eval.py"] + 2 * ["sample.py", "eval.py", "eval.py"]
    assert all(cell[k][1]["reference"] == cell[1][1]["statistics"] for k in (5, 10, 13))
    tokenizer, generator = cell[0][1], cell[2][1]
    steps_per_epoch = 50000 // generator["batch_size"]
    for k, step in (8, study.EARLY[0]), (11, study.EARLY[1]):  # at a step whose averaged weights stage 2 keeps
        assert Path(cell[k][1]["checkpoint"]).name == f"step-{step}.pt" and step % generator["keep_every"] == 0
    assert generator["epochs"] * steps_per_epoch == study.LAST_STEP
    assert tokenizer["seed"] == generator["seed"] == 3
    assert tokenizer["patch_size"] == int(row[1:].split("-")[0])
    assert (tokenizer["stc_depth"] > 0) == ("stc" in row) and (tokenizer["ssl_method"] == "none") == ("none" in row)
    assert (tokenizer["compression"] == "shuffle") == ("shuffle" in row)
    cell.clear()
    study.run_cell(row, 3)
    assert not cell
    for path in Path(study.out_dir).glob("*/step-*.json"):  # a generator of which no early weights were kept
        path.unlink()
    study.run_cell(row, 3)
    assert not cell


def test_rows_differ_in_what_they_are_named_for_alone(cell):
    """Same data, order, steps, generator, evaluation."""
    runs = {}
    for row in study.ROWS:
        cell.clear()
        study.run_cell(row, 0)
        runs[row] = [constants for _, constants in cell]
    for row, commands in runs.items():
        for constants, reference in zip(commands, runs["p4"]):
            different = {name for name in constants if constants[name] != reference[name]}
            assert different <= {"patch_size", "stc_depth", "ssl_method", "global_crop_size", "out_dir", "out",
                                 "reference", "statistics", "tokenizer", "checkpoint", "samples",
                                 *(["compression"] if "shuffle" in row else [])}, (row, different)


@pytest.mark.parametrize("pairs, sign, expected", [
    ([], "<", "not run"),
    ([(1.0, 2.0)], "<", "holds (one seed)"),
    ([(2.0, 1.0)], "<", "does not hold (one seed)"),
    ([(1.0, 2.0), (1.1, 2.1)], "<", "holds"),
    ([(2.0, 1.0), (2.1, 1.1)], ">", "holds"),
    ([(1.0, 2.0), (1.9, 2.1)], "<", "holds weakly (less than the seeds' spread)"),
    ([(1.0, 2.0), (2.5, 2.1)], "<", "open (the seeds disagree)"),
    ([(2.0, 1.0), (1.0, 1.5)], "<", "open (the seeds disagree)"),
    ([(2.0, 1.0), (1.6, 1.5)], "<", "does not hold"),
])
def test_verdicts(pairs, sign, expected):
    assert study.verdict(pairs, sign) == expected


def test_the_table_and_the_pictures(tmp_path, monkeypatch, capsys):
    """From files as eval.py writes them; what was not run is a dash."""
    figures = importlib.import_module("figures")
    for row, gfd in ("p4-none", 9.0), ("p4-stc-none", 7.0), ("p4", 8.0):
        kept = tmp_path / f"{row}-seed0"
        kept.mkdir()
        (kept / "tokenizer.json").write_text(json.dumps({"PSNR": 23.5, "rFD (cifar10_resnet.pt2)": 1.25}))
        (kept / "samples.json").write_text(json.dumps({"gFD (cifar10_resnet.pt2)": gfd}))
        for step, own in (195, 4.0), (585, 2.0):
            (kept / f"step-{step}.json").write_text(json.dumps({"gFD (cifar10_resnet.pt2)": gfd + own}))
            (kept / f"step-{step}-generator.json").write_text(json.dumps({"gFD (cifar10_resnet.pt2)": own}))
    (tmp_path / "p4-stc-none-seed2").mkdir()
    (tmp_path / "p4-stc-none-seed2" / "tokenizer.json").write_text(json.dumps({"PSNR": 23.7}))
    monkeypatch.setattr(study, "out_dir", str(tmp_path))
    study.print_results(["p4-none", "p4-stc-none", "p4-stc"])
    out = capsys.readouterr().out
    assert "| p4-none | 23.50 / – | – / – | 1.25 / – |" in out and "| p4-stc | – / – |" in out
    assert "| p4-stc-none | 23.50 / 23.70 |" in out
    assert "32.92 < 44.72 | 7.00 and 9.00 | holds (one seed) |" in out
    run_here(figures, out_dir=tmp_path)
    for name in "flow.png", "table2.png", "study.png":
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_the_picture_of_table_2(tmp_path, monkeypatch):
    """Distances divided by one bottleneck's, of each seed that has all four rows; the paper's in the same order."""
    figures, drawn = importlib.import_module("figures"), []
    monkeypatch.setattr(figures, "save", lambda figure, name: drawn.extend(figure.axes))
    monkeypatch.setattr(figures, "SETTINGS", {str(tmp_path): ("ours", "red")})
    for row, gfd in ("p4-none", 8.0), ("p4-stc-none", 6.0), ("p4", 4.0), ("p4-stc", 2.0):
        for seed in (0, 1) if row == "p4-none" else (0,):
            (tmp_path / f"{row}-seed{seed}").mkdir()
            (tmp_path / f"{row}-seed{seed}/samples.json").write_text(json.dumps({"gFD (a.pt2)": gfd}))
            (tmp_path / f"{row}-seed{seed}/generator.json").write_text(json.dumps({"gFD (a.pt2)": gfd / 2 + 1}))
    run_here(figures, only="table2")
    gfid, own = ({line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in drawn)
    assert gfid["ours"] == [1, 0.75, 0.5, 0.25] and own["ours"] == [1, 0.8, 0.6, 0.4]
    np.testing.assert_allclose(gfid["the paper, ImageNet"], np.array([44.72, 32.92, 25.36, 16.39]) / 44.72)


def test_pictures_of_the_tokenizers(folder, tmp_path, capsys):
    """Reconstructions and token colours of the rows that are there; and a judge may learn from reconstructions."""
    figures = importlib.import_module("figures")
    for row, depth in ("p4-none", 0), ("p4-stc-none", 1):
        constants = dict(image_size=32, patch_size=4, downsample=16, latent_channels=4, encoder="16/2/1",
                         decoder="16/2/1", stc_depth=depth, compression="conv")
        (tmp_path / f"{row}-seed0/tokenizer").mkdir(parents=True)
        runtime.save_checkpoint(tmp_path / f"{row}-seed0/tokenizer/checkpoint.pt", {
            "kind": "tokenizer", "finished": True, "constants": constants,
            "tokenizer": TCAE.from_constants(constants).state_dict()})
    run_here(figures, only="reconstructions,colours", study_dir=tmp_path, data_dir=folder / "cifar10", out_dir=tmp_path)
    with Image.open(tmp_path / "study_reconstructions.png") as picture:
        assert picture.height == 16 + 3 * (4 * 32 + 2)  # originals and two rows
    assert np.asarray(Image.open(tmp_path / "study_colours.png")).std() > 1
    run_here(features, data_dir=folder / "cifar10", epochs=1, batch_size=32, width=4, out=tmp_path / "judge.pt2",
             tokenizer=tmp_path / "p4-none-seed0/tokenizer/checkpoint.pt", dtype="float32")
    assert "of 20 held-out reconstructions" in capsys.readouterr().out and (tmp_path / "judge.pt2").stat().st_size


def test_the_paper_s_figure_6(tmp_path, monkeypatch):
    """From files as runs/tables.py writes them, in the order of steps; a row that was not run has no curve."""
    figures, drawn = importlib.import_module("figures"), []
    monkeypatch.setattr(figures, "save", lambda figure, name: drawn.extend(figure.axes))
    for row, step, gfid in ("p8", 10000, 30.0), ("p8-stc", 100000, 16.0), ("p8-stc", 20000, 25.0):
        (tmp_path / row).mkdir(exist_ok=True)
        (tmp_path / row / f"step-{step}.json").write_text(json.dumps({"gFID": gfid, "IS": 2 * gfid}))
    run_here(figures, only="figure6", tables_dir=tmp_path)
    gfid, score = ({line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}
                   for axes in drawn)
    assert gfid == {"p8": [[10000], [30.0]], "p8-stc": [[20000, 100000], [25.0, 16.0]]}
    assert score == {"p8": [[10000], [60.0]], "p8-stc": [[20000, 100000], [50.0, 32.0]]}
    with pytest.raises(SystemExit, match="run runs/tables.py --table=figure6 first"):
        run_here(figures, only="figure6", tables_dir=tmp_path / "none")


def test_cifar_10_as_files(tmp_path, monkeypatch, capsys):
    """From an archive laid out as its page says: a byte for the class, 1,024 each for red, green and blue, row by row."""
    cifar10 = importlib.import_module("cifar10")
    pixels = np.random.default_rng(0).integers(256, size=(12, 32, 32, 3)).astype(np.uint8)
    files = {"batches.meta.txt": b"cat\ndog\n\n"}
    for part, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        files[f"{name}.bin"] = b"".join(bytes([i % 2, *pixels[i, :, :, 0].ravel(), *pixels[i, :, :, 1].ravel(),
                                               *pixels[i, :, :, 2].ravel()]) for i in (2 * part, 2 * part + 1))
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        for name, content in files.items():
            (tmp_path / "file").write_bytes(content)
            tar.add(tmp_path / "file", f"cifar-10-batches-bin/{name}")
    run_here(cifar10, archive=tmp_path / "archive", out_dir=tmp_path / "out")
    for split, first, count in ("train", 0, 10), ("test", 10, 2):
        found = data.open_split(str(tmp_path / "out"), "train" if split == "train" else "val", 32, 0)
        assert found.classes == ["cat", "dog"] and len(found) == count
        for i in range(count):
            k = int(Path(found.name(i)).stem)
            assert found.labels[i] == k % 2 and np.array_equal(np.asarray(found.load(i)), pixels[first + k])
    with pytest.raises(SystemExit, match="archive=.*file can't be used as cifar-10-binary.tar.gz"):
        run_here(cifar10, archive=tmp_path / "file", out_dir=tmp_path / "out")
