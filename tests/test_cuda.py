"""On a GPU, if there is one: each script does there what it does on a CPU. (All other tests are a CPU's everywhere.)"""
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import GPUS, ROOT, clean_environment

CPU, CUDA = ("--device=cpu", "--dtype=float32"), ("--device=cuda", "--dtype=float32", "--compile=False")
COMPILED = "--device=cuda", "--dtype=bfloat16", "--compile=True"
NUMBERS = {"step", "lr", "seconds", "images_per_second", "waiting"}  # in log.jsonl, but no terms
TOKENIZER = "train_tokenizer.py", "config/toy_tokenizer.py"
STAGES = {
    "tokenizer": TOKENIZER, "tokenizer by Muon": (*TOKENIZER, "--optimizer=muon"),
    "DINOv2": (*TOKENIZER, "--ssl_method=dinov2"), "two parts": (*TOKENIZER, "--accumulate=2"),
    "generator": ("train_dit.py", "config/toy_dit.py", "--epochs=2", "--tokenizer={}/tokenizer/checkpoint.pt"),
    "finetuning": ("finetune_decoder.py", "config/toy_finetune.py", "--init_from={}/tokenizer/checkpoint.pt"),
}


def start(*arguments):
    """`python ARGUMENTS` where the GPUs can be seen."""
    environment = clean_environment(CUDA_VISIBLE_DEVICES=GPUS)
    if GPUS == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run(*arguments):
    process = start(*arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def train(folder, *arguments):
    """-> the terms of each step."""
    run(*arguments, f"--out_dir={folder}", "--log_every=1")
    return terms(folder)


def terms(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in NUMBERS} for line in lines if "loss" in line]


def difference(one, other, steps):
    """The largest of any term, relative to the first's."""
    assert len(one) == len(other) >= steps and one[0].keys() == other[0].keys()
    return max(abs(b[name] - a[name]) / max(abs(a[name]), 0.01)
               for a, b in list(zip(one, other))[:steps] for name in a)


pytestmark = pytest.mark.skipif("True" not in run("-c", "import torch; print(torch.cuda.is_available())"),
                                reason="there is no GPU")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """tokenizer/ and dit/, trained on the CPU."""
    base = tmp_path_factory.mktemp("base")
    train(base / "tokenizer", *TOKENIZER, *CPU)
    train(base / "dit", *(word.format(base) for word in STAGES["generator"]), *CPU)
    return base


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_on_a_cpu(stage, base, tmp_path):
    """The same weights and data at the start: with TF32's ten bits in matrix products the same losses, compiled in
    bfloat16 nearly the same."""
    command = [word.format(base) for word in STAGES[stage]]
    cpu, cuda, compiled = (train(tmp_path / name, *command, *device)
                           for name, device in (("cpu", CPU), ("cuda", CUDA), ("compiled", COMPILED)))
    assert difference(cpu, cuda, 5) < 0.01
    assert difference(cpu, compiled, 5) < 0.05


def test_a_stopped_run_goes_on(tmp_path):
    """By SIGTERM, with the optimizer's state, to an uninterrupted run's losses."""
    command = *TOKENIZER, "--optimizer=muon", "--epochs=4", *CUDA
    whole = train(tmp_path / "whole", *command)
    process = start(*command, f"--out_dir={tmp_path}/part", "--log_every=1")
    while process.poll() is None and not ((log := tmp_path / "part/log.jsonl").exists() and len(log.read_text()) > 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "stopped: saved" in process.communicate(timeout=100)[0]
    assert "resumed from" in run(*command, f"--out_dir={tmp_path}/part", "--log_every=1", "--resume=True")
    assert difference(whole, terms(tmp_path / "part"), len(whole)) < 0.05


def test_samples_and_measurements_are_a_cpu_s(base, tmp_path):
    """The same noise makes the same images, within a grey level on average, and they are measured alike."""
    drawn, measured = [], []
    for name, device in ("cpu", CPU), ("cuda", CUDA[:2]), ("bfloat16", COMPILED[:2]):
        run("sample.py", f"--checkpoint={base}/dit/checkpoint.pt", "--num_samples=40", "--steps=10", "--cfg_scale=2",
            f"--out_dir={tmp_path}/{name}", *device)
        run("eval.py", f"--tokenizer={base}/tokenizer/checkpoint.pt", "--feature_net=none", "--lpips_net=none",
            "--pca=True", f"--out={tmp_path}/{name}.json", *device)
        with np.load(tmp_path / name / "samples.npz") as file:
            drawn.append(file["arr_0"].astype(float))
        measured.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert drawn[0].std() > 10
    assert abs(drawn[1] - drawn[0]).mean() < 1 and abs(drawn[2] - drawn[0]).mean() < 3
    for other, tolerance in zip(measured[1:], (0.01, 0.05)):
        for name, value in other.items():
            if isinstance(value, float):
                assert value == pytest.approx(measured[0][name], abs=tolerance), name
