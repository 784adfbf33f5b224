"""The scripts of the paper's tables: every row's commands are valid and fit together; one runs, and only once."""
import functools
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import runtime
from conftest import ROOT, clean_environment
from model import TCAE

SCRIPTS = sorted(path.name for path in (ROOT / "runs").glob("*.sh") if "\ntable " in path.read_text())
FILES = {  # of each script that they call: the constants that name what it reads, and what it writes
    "train_tokenizer.py": (["init_from"], "{out_dir}/checkpoint.pt"),
    "train_dit.py": (["tokenizer"], "{out_dir}/checkpoint.pt"),
    "sample.py": (["checkpoint", "tokenizer"], "{out_dir}/samples.npz"),
    "eval.py": (["tokenizer", "samples", "feature_net"], "{out}"),
    "runs/recognise.py": (["tokenizer"], "{feature_net}"),
    "runs/tables.py": ([], ""),
}


@pytest.fixture(scope="module")
def modules():
    """Those scripts as modules of this file's own, so that their constants can be set."""
    made = {}
    for path in FILES:
        spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
        made[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made[path])
    return made


def run(script, **environment):
    """What a table script prints."""
    result = subprocess.run([ROOT / "runs" / script], env=clean_environment(**environment), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def commands(modules):
    """commands(script, scale) -> [(path, its constants, what it writes)] of a table script. Nothing runs: its Python is
    `echo`."""
    @functools.cache
    def call(script, scale):
        found, printed = [], run(script, PYTHON="echo", OUT="OUT", CFG="2.5", SCALE=scale, DATA="imagenet",
                                 GPUS=1 if scale == "shapes" else 8)
        for line in printed.splitlines():
            path, *arguments = line.removeprefix("-m torch.distributed.run --standalone --nproc_per_node=8 ").split()
            constants = runtime.configure(vars(modules[path]).copy(), arguments)  # ends with an unknown name
            found.append((path, constants, FILES[path][1].format(**constants)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield call


@pytest.mark.parametrize("scale", ["imagenet", "shapes"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_valid(modules, commands, monkeypatch, script, scale):
    """Its constants fit together, what it reads was written before; and what is printed is what was measured."""
    written = {""}
    for path, constants, out in commands(script, scale):
        assert {constants[name] for name in FILES[path][0]} <= written, path
        written.add(out)
        if path.startswith("train_"):
            with monkeypatch.context() as changed:
                for name, value in constants.items():
                    changed.setattr(modules[path], name, value)
                modules[path].check_constants(SimpleNamespace(count=1 if scale == "shapes" else 8))
        if path == "train_tokenizer.py" and not constants["init_from"]:
            with torch.device("meta"):
                TCAE.from_constants(constants)
    assert path == "runs/tables.py" and script in (f"table{constants['table']}.sh", f"{constants['table']}.sh")
    shown = [rows for name, (_, rows) in modules[path].TABLES.items() if name.split(",")[0] == constants["table"]]
    assert {out for out in written if out.endswith(".json")} - {"OUT/system/finetuned.json"} == {
        f"OUT/{row}/{file}.json" for rows in shown for row in rows
        for file in ("tokenizer", "samples-1", "samples-2.5")}


def test_rows_of_one_name_are_one_row(modules, commands):
    """Tables share rows by name: so they must agree in every constant, and in the paper's numbers."""
    seen = {}
    for script in SCRIPTS:
        for path, constants, out in commands(script, "imagenet")[:-1]:
            assert seen.setdefault(out, constants) == constants, f"{script}: {out}"
    for name, (columns, rows) in modules["runs/tables.py"].TABLES.items():
        for row, paper in rows.items():
            assert len(paper) == len(columns)
            for column, number in zip(columns, paper):
                assert name == "figure8" or seen.setdefault((row, column), number) == number, f"table {name}: {row}"


class Colours(torch.nn.Module):
    """In place of the classifier that the scripts train: an image's mean colour, as features and as logits."""

    def forward(self, pixels):
        mean = pixels.float().mean((1, 2)) / 255
        return mean, mean.clone()


def test_a_table_is_made_and_made_only_once(tmp_path):
    """Table 11's row in tiny. The second call only prints."""
    network = torch.export.export(Colours(), (torch.zeros(2, 32, 32, 3, dtype=torch.uint8),),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(network, tmp_path / "classifier.pt2")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ $1 = train_tokenizer.py ] && set -- "$@" --shapes_images=64\n'
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tiny = dict(SCALE="shapes", PYTHON=python, OUT=tmp_path, CFG=1)
    printed = run("table11.sh", **tiny)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "log.jsonl"}
    log = (tmp_path / "c32-stc" / "dit" / "log.jsonl").read_text()

    reconstruction, samples = (json.loads((tmp_path / "c32-stc" / file).read_text())
                               for file in ("tokenizer.json", "samples-1.json"))
    rfid, gfid = reconstruction["rFD (classifier.pt2)"], samples["gFD (classifier.pt2)"]
    table = printed[printed.index("\nTable 11:"):]
    assert table.splitlines()[3:] == [
        "| | rFID | gFID | gFID with guidance |", "|---|---|---|---|",
        f"| c32-stc | {rfid:.3f} (0.81) | {gfid:.3f} (10.72) | {gfid:.3f} (4.77) |"]

    again = run("table11.sh", **tiny)
    assert again.endswith(table)
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert (tmp_path / "c32-stc" / "dit" / "log.jsonl").read_text() == log


@pytest.mark.parametrize("finished", [True, False])
def test_half_a_generator_gets_into_no_table(tmp_path, finished):
    """train_dit.py ends with 0 after SIGTERM: a script must not go on to sample what it left."""
    runtime.save_checkpoint(tmp_path / "checkpoint.pt", {"finished": finished})
    result = subprocess.run(["bash", "-c", f". runs/rows.sh; finished {tmp_path}/checkpoint.pt; echo goes on"],
                            cwd=ROOT, env=clean_environment(SCALE="shapes", PYTHON=sys.executable), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (result.returncode == 0, "goes on" in result.stdout, "not finished" in result.stderr) == (
        finished, finished, not finished)
