"""The paper's tables: every command is valid and fits the others, a table is made once, from whole results alone; what
--cost counts is what a person counts by hand."""
import ast
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

import data
import finetune_decoder
import pretrained
import runtime
import train_tokenizer
from conftest import ROOT
from model import TCAE, LightningDiT
from test_train_dit import run_here

FILES = {  # of each script: the constants that name what it reads, and what it writes
    "train_tokenizer.py": ([], "{out_dir}/checkpoint.pt"),
    "finetune_decoder.py": (["init_from"], "{out_dir}/checkpoint.pt"),
    "train_dit.py": (["tokenizer"], "{out_dir}/checkpoint.pt"),
    "sample.py": (["checkpoint", "tokenizer"], "{out_dir}/samples.npz"),
    "eval.py": (["tokenizer", "samples", "feature_net"], "{out}"),
    "runs/features.py": (["tokenizer"], "{out}"),
}


def load(path):
    """A script as a module of its own, so that its constants can be set."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    return {path: load(path) for path in FILES}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.chdir(ROOT)  # main() goes there, and this comes back
    return load("runs/tables.py")


def call(monkeypatch, **constants):
    """`python runs/tables.py` with these constants, in this process -> the module."""
    tables = load("runs/tables.py")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tables.py", *(f"--{name}={value}" for name, value in constants.items())])
    tables.main()
    return tables


def replace_processes(monkeypatch, run):
    """In place of starting a process: run([script, argument, …])."""
    class Process:
        def __init__(self, words):
            self.returncode = run(words[words.index("--standalone") + 2 if "--standalone" in words else 1:]) or 0

        def wait(self):
            return self.returncode

    plain = load

    def loaded(path):
        module = plain(path)
        module.subprocess = SimpleNamespace(Popen=Process)
        return module

    monkeypatch.setitem(globals(), "load", loaded)


@pytest.fixture(autouse=True)
def parse_once(monkeypatch, parse=functools.cache(ast.parse)):
    """configure() parses its script's source, here for hundreds of commands."""
    monkeypatch.setattr(ast, "parse", parse)


def parsed(words, scripts):
    """(script, constants, what it writes) of a command; an unknown name ends the test."""
    path, *arguments = words
    constants = runtime.configure(vars(scripts[path]).copy(), arguments)
    return path, constants, FILES[path][1].format(**constants)


# ----------------------------------------------------------------------------------------------------------------------
# Rows and commands


def test_rows_of_one_name_are_one_row(tables):
    """Tables share rows by name, so they must agree in the paper's numbers; and no row has two names."""
    names = {}
    for name, (_, columns, rows) in tables.TABLES.items():
        for row in rows:
            constants = sorted(tables.constants_of(row).items())
            assert names.setdefault(str([row.endswith("-system"), *constants]), row) == row
            numbers = rows[row] if isinstance(rows, dict) else [tables.PAPER.get((row, column)) for column in columns]
            assert len(numbers) == len(columns)
            for column, number in zip(columns, numbers):
                assert tables.PAPER.get((row, column)) == number, f"table {name}: {row}"


def shown(monkeypatch, capsys, scripts, **constants):
    """The commands that --show=True prints, parsed."""
    call(monkeypatch, show=True, **constants)
    found = []
    for line in capsys.readouterr().out.splitlines():
        launcher, *words = shlex.split(line.replace("BEST", "2.5"))
        several = launcher == "torchrun"
        assert words[:2 * several] == ["--standalone", "--nproc_per_node=8"][:2 * several]
        found.append((*parsed(words[2 * several:], scripts), 8 if several else 1))
    return found


@pytest.mark.parametrize("table", ["figure6", "4"])
def test_show_removes_nothing(monkeypatch, capsys, scripts, tmp_path, table):
    """A row that is half done keeps the samples that wait for their evaluation."""
    for _ in range(2):
        commands = shown(monkeypatch, capsys, scripts, table=table, out_dir=tmp_path)
        waiting = [Path(constants["samples"]) for path, constants, *_ in commands if constants.get("samples")]
        for path in waiting:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    shown(monkeypatch, capsys, scripts, table=table, out_dir=tmp_path)
    assert len(waiting) > 5 and all(path.exists() for path in waiting)


TABLES = [name for name in load("runs/tables.py").TABLES if " " not in name]


@pytest.mark.parametrize("scale", ["imagenet", "shapes"])
@pytest.mark.parametrize("table", TABLES)
def test_every_command_is_valid(monkeypatch, capsys, scripts, tables, table, scale, checked=set()):
    """Its constants fit together, what it reads was written before; and what is measured is what the table prints."""
    written = {""}
    commands = shown(monkeypatch, capsys, scripts, table=table, scale=scale, out_dir="OUT")
    for path, constants, out, processes in commands:
        assert {constants[name] for name in FILES[path][0]} <= written, path
        written.add(out)
        if keep := constants.get("keep_every"):
            images = {"imagenet": 1281167, "shapes": 320}[scale]
            steps = constants["epochs"] * (images // constants["batch_size"])
            written |= {out.replace("checkpoint", f"step-{step}") for step in range(keep, steps + 1, keep)}
        apart_from_names = str({name: value for name, value in constants.items() if "OUT" not in str(value)})
        if path.startswith(("train_", "finetune_")) and (path, apart_from_names) not in checked:
            checked.add((path, apart_from_names))
            assert constants["resume"] and processes == (8 if scale == "imagenet" else 1)
            with monkeypatch.context() as changed:
                for name, value in constants.items():
                    changed.setattr(scripts[path], name, value)
                scripts[path].check_constants(SimpleNamespace(count=processes))
            with torch.device("meta"):
                if path == "train_tokenizer.py":
                    TCAE.from_constants(constants)
                elif path == "train_dit.py":
                    LightningDiT(constants["size"], 1, 1, 1)
    results = {out.removeprefix("OUT/") for out in written if out.endswith(".json")}
    expected = set()
    for name in [name for name in tables.TABLES if name.split()[0] == table]:
        _, columns, rows = tables.TABLES[name]
        for row in rows:
            expected |= {f"{row.removesuffix('-system')}/tokenizer.json", f"{row}/samples-1.json"}
            expected |= {f"{row}/finetuned.json"} if row.endswith("-system") else set()
            if table == "figure6":
                steps = range(10000, 100001, 10000) if scale == "imagenet" else (5, 10)
                expected |= {f"{row}/step-{step}.json" for step in steps}
            if "guidance" in columns[-1]:
                cfgs = tables.cfg_scales if scale == "imagenet" else tables.cfg_scales[:2]
                expected |= {f"{row}/guidance-{cfg:g}.json" for cfg in cfgs} | {f"{row}/samples-2.5.json"}
    assert results == expected


def test_dinov2_s_row_has_its_settings(tables):
    assert tables.constants_of("p16-dinov2") == dict(
        patch_size=16, stc_depth=0, ssl_method="dinov2", prototypes=65536, teacher_momentum=0.992,
        global_crop_scale=(0.32, 1.0), local_crops=8, local_crop_scale=(0.05, 0.32))


@pytest.mark.parametrize("constants, message", [
    ({"table": 5}, "table='5': it is one of 1, 2, 3"), ({"table": "2,7"}, "it is one of"), ({}, "table=''"),
    ({"table": 2, "scale": "cifar"}, "imagenet or shapes"), ({"table": 6, "cfg_scales": "1,2"}, "above 1"),
    ({"table": 2, "data_dir": "nowhere"}, "reference=nowhere/VIRTUAL_imagenet256_labeled.npz is missing")])
def test_what_is_wrong_is_said_before_anything_runs(monkeypatch, constants, message):
    replace_processes(monkeypatch, lambda words: pytest.fail(f"ran {words}"))
    with pytest.raises(SystemExit, match=re.escape(message)):
        call(monkeypatch, **constants)


# ----------------------------------------------------------------------------------------------------------------------
# Runs: with stages that only leave what the real ones leave


class Stages:
    """Leaves results in place of the stages. `distances`: gFID of each scale of guidance."""

    def __init__(self, scripts, distances=None, finished=True):
        self.scripts, self.distances, self.finished, self.ran = scripts, distances or {}, finished, []

    def __call__(self, words):
        path, constants, out = parsed(words, self.scripts)
        self.ran.append((path, constants))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if path.startswith(("train_", "finetune_")):
            done = self.finished if path == "train_dit.py" else True
            runtime.save_checkpoint(out, {"finished": done, "constants": constants})
        elif path == "eval.py":
            name = Path(out).stem
            gfid = 10.0 if name == "samples-1" else self.distances.get(float(name.split("-")[1]), 99.0) \
                if "-" in name else None
            Path(out).write_text(json.dumps({"rFID": 0.5, "structure loss": None} if gfid is None else
                                            {"gFID": gfid, "IS": 100.0, "constants": {}}))
        else:
            Path(out).write_text("")

    def paths(self):
        return [path for path, _ in self.ran]


@pytest.fixture
def run(monkeypatch, scripts, capsys, tmp_path):
    """run(stages, constants) -> what is printed. ADM's reference is there."""
    (tmp_path / "VIRTUAL_imagenet256_labeled.npz").write_text("")

    def run(stages, **constants):
        with monkeypatch.context() as patch:
            replace_processes(patch, stages)
            call(patch, data_dir=tmp_path, out_dir=tmp_path / "out", **constants)
        return capsys.readouterr().out

    return run


def test_guidance_is_chosen_on_few_samples_and_measured_on_all(run, scripts, tmp_path):
    stages = Stages(scripts, {1.5: 8.0, 2.5: 3.25, 4.0: 5.0})
    printed = run(stages, table=11, cfg_scales="1.5,2.5,4.0")
    drawn = [(constants["cfg_scale"], constants["num_samples"]) for path, constants in stages.ran
             if path == "sample.py"]
    assert drawn == [(1.0, 50000), (1.5, 10000), (2.5, 10000), (4.0, 10000), (2.5, 50000)]
    assert "| p8-stc-c32-SB | 0.500 (0.81) | 10.000 (10.72) | 3.250 at 2.5 (4.77) |" in printed
    row = tmp_path / "out" / "p8-stc-c32-SB"
    assert sorted(path.parent.name for path in row.glob("*/samples.npz")) == ["samples-1", "samples-2.5"]

    more = Stages(scripts, {6.0: 2.0})  # another scale is tried: only that is measured, and then the new best
    assert "2.000 at 6 (4.77)" in run(more, table=11, cfg_scales="1.5,2.5,4.0,6")
    assert [constants["cfg_scale"] for path, constants in more.ran if path == "sample.py"] == [6.0, 6.0]


def test_rows_that_tables_share_run_once(run, scripts):
    stages = Stages(scripts)
    run(stages, table="2")
    first = [constants["out_dir"] for path, constants in stages.ran if path.startswith(("train_", "finetune_"))]
    assert len(first) == len(set(first)) == 8
    stages.ran.clear()
    printed = run(stages, table="2,3,8", accumulate=2)
    later = [constants["out_dir"] for path, constants in stages.ran if path.startswith(("train_", "finetune_"))]
    assert len(later) == len(set(later)) == 14 and not set(first) & set(later)
    assert {constants["accumulate"] for path, constants in stages.ran if path == "train_tokenizer.py"} == {2}
    assert printed.count("| p8-none | 0.500 (1.33)") == 2
    stages.ran.clear()
    assert run(stages, table="2,3,8") == printed and not stages.ran


def test_curves_of_table_2_s_rows(run, scripts, tmp_path):
    """Each row is trained once for both; every kept step is measured, and its samples, 10 GB, go."""
    stages = Stages(scripts, {10000 * k: 50.0 - k for k in range(1, 11)})
    run(stages, table=2)
    stages.ran.clear()
    printed = run(stages, table="figure6").splitlines()
    assert stages.paths() == ["sample.py", "eval.py"] * 40
    assert printed[-12] == "|---|---|---|---|---|---|---|---|---|"
    assert printed[-11] == "| 10000 |" + " 49.000 |" * 4 + " 100.000 |" * 4
    assert printed[-2].startswith("| 100000 | 40.000 |") and printed[-1].startswith("| all | 10.000 |")
    assert not list(tmp_path.glob("out/*/step-*/samples.npz")) and len(list(tmp_path.glob("out/*/step-*.json"))) == 40


@pytest.mark.parametrize("text", ["", '{"gFID": 1.0, "I'])
def test_a_result_that_is_not_whole_is_made_again(run, scripts, tmp_path, text):
    run(Stages(scripts), table=4)
    row = tmp_path / "out" / "p8-stc-SB-system"
    for name in "finetuned", "samples-1":
        (row / f"{name}.json").write_text(text)
    again = Stages(scripts)
    run(again, table=4)
    assert again.paths() == ["eval.py", "sample.py", "eval.py"]
    assert json.loads((row / "samples-1.json").read_text())["gFID"] == 10


def test_half_a_generator_gets_into_no_table(run, scripts):
    """train_dit.py ends with 0 after SIGTERM: what it left must not be sampled, and is trained on by the next call."""
    half = Stages(scripts, finished=False)
    with pytest.raises(SystemExit, match="dit/checkpoint.pt is not finished: call again"):
        run(half, table=11)
    assert half.paths() == ["train_tokenizer.py", "eval.py", "train_dit.py"]
    whole = Stages(scripts)
    run(whole, table=11)
    assert whole.paths()[:2] == ["train_dit.py", "sample.py"]


def test_a_stage_that_fails_ends_the_table(run):
    with pytest.raises(SystemExit, match="exit status 3 of train_tokenizer.py"):
        run(lambda words: 3, table=2)


def test_a_row_whose_constants_were_changed_is_not_taken_for_done(run, scripts, tmp_path):
    run(Stages(scripts), table=11)
    checkpoint = tmp_path / "out" / "p8-stc-c32-SB" / "tokenizer" / "checkpoint.pt"
    saved = runtime.load_checkpoint(checkpoint, "out_dir")
    runtime.save_checkpoint(checkpoint, {**saved, "constants": {**saved["constants"], "decoder": "S"}})
    with pytest.raises(SystemExit, match="decoder was 'S', is 'B'"):
        run(Stages(scripts), table=11)


def test_sigterm_reaches_the_stage(tables, tmp_path):
    """The stage saves and ends by itself; the table ends after it."""
    ready, result = tmp_path / "ready", tmp_path / "result.json"
    stage = ["-c", "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
             f"time.sleep(0.2); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"]

    def send():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    tables.gpus = 1
    with pytest.raises(SystemExit, match="result.json is not finished: call again"):
        tables.produce(result, stage)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ----------------------------------------------------------------------------------------------------------------------
# The real stages


class Colours(torch.nn.Module):
    """In place of the classifier that shapes are measured with: an image's mean colour, as features and as logits."""

    def forward(self, pixels):
        mean = pixels.float().mean((1, 2)) / 255
        return mean, mean.clone()


def test_a_table_is_made_and_made_only_once(monkeypatch, capsys, tmp_path):
    """Table 4's row in tiny, with all stages. The second call only prints."""
    network = torch.export.export(Colours(), (torch.zeros(2, 32, 32, 3, dtype=torch.uint8),),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(network, tmp_path / "classifier.pt2")
    shapes, ran = data.Shapes.__init__, []
    monkeypatch.setattr(data.Shapes, "__init__", lambda self, split, count, size: shapes(self, split, min(count, 64),
                                                                                         size))

    def run(words):
        ran.append(words[0])
        arguments = ["--workers=0"] if words[0] == "eval.py" else []
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        runpy.run_path(words[0], run_name="__main__")

    replace_processes(monkeypatch, run)
    constants = dict(table=4, scale="shapes", out_dir=tmp_path, cfg_scales="1.5,4,9")
    call(monkeypatch, **constants)
    printed = capsys.readouterr().out
    assert ran == ["train_tokenizer.py", "eval.py", "finetune_decoder.py", "eval.py", "train_dit.py"] + 4 * [
        "sample.py", "eval.py"]

    row = tmp_path / "p8-stc-SB-system"
    rfid = json.loads((row / "finetuned.json").read_text())["rFD (classifier.pt2)"]
    gfid = {name: json.loads((row / f"{name}.json").read_text())["gFD (classifier.pt2)"]
            for name in ("samples-1", "guidance-1.5", "guidance-4")}
    best = "1.5" if gfid["guidance-1.5"] <= gfid["guidance-4"] else "4"
    guided = gfid[f"guidance-{best}"]  # as many samples of the same noise
    table = printed[printed.index("\nTable 4:"):]
    assert table.splitlines()[3:] == [
        "|  | rFID | gFID | gFID with guidance |", "|---|---|---|---|",
        f"| p8-stc-SB-system | {rfid:.3f} (0.35) | {gfid['samples-1']:.3f} (7.16) | {guided:.3f} at {best} (2.57) |"]

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    replace_processes(monkeypatch, lambda words: pytest.fail(f"ran {words}"))
    call(monkeypatch, **constants)
    assert capsys.readouterr().out == table
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}


# ----------------------------------------------------------------------------------------------------------------------
# Costs


def blocks(count, tokens, width):
    """Operations of transformer blocks: 12 D² weights for every token, and N² products of queries, keys and values."""
    return count * (2 * 12 * tokens * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("stc_depth", [0, 1])
def test_a_tokenizer_s_operations_are_those_of_the_formula(tables, stc_depth):
    """Two per multiply-add, attention included, [CLS] too: 64 px at p = 8 are 64 tokens, the latent has 2 × 2."""
    D, c, N = 32, 6, 64
    compressed = N // 4 if stc_depth else N
    merged = compressed // 4  # tokens for one position of the latent
    constants = {**vars(train_tokenizer), "image_size": 64, "latent_channels": c, "encoder": "32/3/2",
                 "decoder": "32/3/2", "stc_depth": stc_depth, "ssl_method": "none"}
    with torch.device("meta"):
        encoder, decoder, encode, decode, attention, step = tables.joint_cost(constants)
        vgg = tables.count(lambda: vgg16().features(torch.zeros(1, 3, 64, 64)))[0]
        tcae = TCAE.from_constants(constants)
    convolutions = 2 * 2 * compressed * 9 * D**2 if stc_depth else 0
    latent = 2 * 4 * (merged * D * D + D * c)
    same = 2 * N * 192 * D + convolutions + latent
    assert encode == same + blocks(stc_depth, N + 1, D) + blocks(3 - stc_depth, compressed + 1, D)
    assert decode == same + blocks(stc_depth, N, D) + blocks(3 - stc_depth, compressed, D)
    assert attention == sum(4 * D * (stc_depth * (N + cls)**2 + (3 - stc_depth) * (compressed + cls)**2)
                            for cls in (0, 1))
    assert step == 3 * (encode + decode) + 3 * vgg
    assert decoder == sum(p.numel() for p in tcae.decoder.parameters())
    assert encoder == sum(p.numel() for part in (tcae.encoder, tcae.bottleneck) for p in part.parameters())


def test_self_supervision_s_operations_are_those_of_the_formula(tables):
    """Views, heads and masked tokens, three forwards for the student's and one for the teacher's."""
    constants = {**vars(train_tokenizer), "image_size": 64, "encoder": "32/3/2", "decoder": "32/3/2", "stc_depth": 1,
                 "global_crop_size": 64, "local_crop_size": 32, "local_crops": 3, "head_hidden": 40, "prototypes": 50}
    with torch.device("meta"):
        alone, both = (tables.joint_cost({**constants, "ssl_method": method})[-1] for method in ("none", "ibot"))

    def view(tokens):
        return (2 * tokens * 192 * 32 + blocks(1, tokens + 1, 32) + blocks(2, tokens // 4 + 1, 32)
                + 2 * 2 * tokens // 4 * 9 * 32**2)

    token = 2 * (32 * 40 + 40 * 40 + 40 * 256 + 256 * 50)
    masked = 0.15 * 16
    student = 2 * view(64) + 3 * view(16) + (2 + 3 + 2 * masked) * token
    assert both - alone == pytest.approx(3 * student + 2 * view(64) + (2 + 2 * masked) * token)


def test_finetuning_s_operations_are_those_of_its_own_steps(tables, monkeypatch, tmp_path):
    """A run of three steps, one in each phase, counted by PyTorch. VGG's features stand for LPIPS."""
    constants = {**vars(train_tokenizer), **vars(finetune_decoder), "image_size": 64, "encoder": "64/4/4",
                 "decoder": "96/4/4", "stc_depth": 2, "discriminator_size": "96/4/4",
                 "discriminator_input": 32}
    kept = {name: constants[name] for name in (*TCAE.CONSTANTS, "shapes_images")}
    torch.save({"kind": "tokenizer", "finished": True, "constants": {**kept, "data_dir": "shapes", "shapes_images": 4},
                "tokenizer": TCAE.from_constants(constants).state_dict()}, tmp_path / "joint.pt")
    vgg, counted, next_batch, add = vgg16().features.requires_grad_(False), [], data.TrainLoader.__next__, \
        runtime.Progress.add

    def begin(loader):
        batch = next_batch(loader)
        counted.append(FlopCounterMode(display=False))
        counted[-1].__enter__()
        return batch

    def end(progress, terms):
        counted[-1].__exit__(None, None, None)
        add(progress, terms)

    monkeypatch.setattr(data.TrainLoader, "__next__", begin)
    monkeypatch.setattr(runtime.Progress, "add", end)
    monkeypatch.setattr(pretrained, "training_lpips", lambda net, dist: lambda a, b: (vgg(a) - vgg(b)).abs())
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted with every version of PyTorch
        run_here(finetune_decoder, init_from=tmp_path / "joint.pt", out_dir=tmp_path / "out", batch_size=4, epochs=3,
                 discriminator_start=1, adversarial_start=2, discriminator_weights="random",
                 discriminator_size="96/4/4", discriminator_input=32, val_images=8, workers=0, device="cpu",
                 dtype="float32")
    with torch.device("meta"):
        expected = tables.finetuning_cost(constants)[:3]
    for counter, operations in zip(counted, expected, strict=True):  # less: what first layers need not pass on
        assert counter.get_total_flops() / 4 == pytest.approx(operations, rel=0.001)


def test_a_generator_s_operations_are_those_of_the_formula(tables):
    """SwiGLU's hidden width is 2/3 · 4 D; the condition passes through each block's modulation once per image."""
    D, c, N = 48, 6, 16
    with torch.device("meta"):
        dit = LightningDiT("48/2/4", c, 4, 10)
        got = tables.count(lambda: dit(torch.zeros(1, c, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)))[0]
    hidden = 8 * D // 3
    block = 2 * N * (4 * D**2 + 3 * D * hidden) + 4 * N**2 * D + 2 * 6 * D**2
    assert got == 2 * block + 2 * N * 2 * c * D + 2 * 2 * D**2 + 2 * (512 * D + D**2)


def test_dc_ae_costs_what_the_paper_says(tables):
    """607 GFLOPs, one per multiply-add; 323 M parameters (DC-AE's paper)."""
    with torch.device("meta"):
        network = tables.dc_ae()
        encode, decode, attention = tables.coding_cost(network, torch.zeros(1, 3, 256, 256))
    assert round((encode + decode) / 2e9) == 607 and 0 < attention < 1e9
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 323


def test_costs_are_printed(monkeypatch, capsys):
    """S–S costs 75 GFLOPs by hand, and convolutions; hours are of 1,281,167 images an epoch at 8 × 226 TFLOP/s."""
    call(monkeypatch, table=8, cost=True)
    tokenizers, stages, generator = capsys.readouterr().out.split("\n\n")[1:]
    head, _, *rows = tokenizers.strip().splitlines()
    rows = [row.strip("| ").split(" | ") for row in rows]
    assert rows.pop()[0] == "DC-AE f32c32"
    cells = {name: [float(number) for number in numbers] for name, *numbers in rows}
    assert list(cells) == ["p8-stc-shuffle-none", "p8-stc-none"]
    assert {len(numbers) for numbers in cells.values()} == {head.count("|") - 2}
    _, _, encode, decode, both, _, multiply_adds, step, hours = cells["p8-stc-none"]
    assert 75 < both < 80 and both == pytest.approx(encode + decode, abs=0.1)
    assert multiply_adds == pytest.approx(both / 2, abs=0.1)
    assert hours == pytest.approx(step * 1e9 * 50 * 1281167 / (8 * 226e12) / 3600, abs=0.1)
    for row in stages.strip().splitlines()[2:]:
        step, epochs, hours = map(float, row.strip("| ").split(" | ")[1:])
        assert hours == pytest.approx(step * 1e9 * epochs * 1281167 / (8 * 226e12) / 3600, abs=0.1)
    assert "675.5 M" in generator
