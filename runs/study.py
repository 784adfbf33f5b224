"""The paper's claim in miniature: Table 2 and its neighbours on CIFAR-10, on two CPU cores.

    python runs/features.py --data_dir=cifar10                                    # first: what FD is measured with,
    python runs/features.py config/cifar10_vgg.py --data_dir=cifar10              # and the perceptual loss
    python runs/study.py --data_dir=cifar10                                       # Table 2's rows and p = 8, two seeds
    python runs/study.py --data_dir=cifar10 --rows=p16,p8,p16-none                # the rest of Table 3's
    python runs/study.py --out_dir=docs/study --print_only=True                   # our table and the verdicts

A row is a tokenizer and a generator on its latents, named as in runs/tables.py; p = 16, 8, 4 are 4, 16, 64 tokens for 4
latent positions. All rows of a seed share data, order, steps, generator and evaluation. Stopped and called again, it
continues where it was; a finished cell is never run again. Our results are in docs/study/, and those of other settings,
each with an out_dir of its own:

    docs/study_l1          --tokenizer_config=config/study_l1_tokenizer.py: no perceptual loss, five epochs
    docs/study_wide        --tokenizer_config=config/study_wide_tokenizer.py: the same with 96 channels
    docs/study_wide_vgg    --tokenizer_config=config/study_wide_vgg_tokenizer.py: and with the perceptual loss
    docs/study_large       --tokenizer_config=config/study_large_tokenizer.py: twice as wide, longer, α = 1; for a GPU
    docs/study_wide_vgg_judge, docs/study_large_judge    the same cells by today's runs/features.py: for distances alone,
                           since the probes were fitted on 1,000 images; all other folders have an earlier judge's

The wide ones have wider generators, too, --dit_config=config/study_wide_dit.py; the last, config/study_large_dit.py.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import data
import runtime
from runtime import check

data_dir = "cifar10"  # holds train/CLASS/ and test/CLASS/
rows = "p8-none,p4-none,p4-stc-none,p4,p4-stc"  # README's; "all" = every row below
seeds = (0, 1)  # to run, for weights, order and noise; one alone is 0, (the table shows all that out_dir has)
tokenizer_config = "config/study_tokenizer.py"
downsample = 16  # as in tokenizer_config, for the seams between latent positions
dit_config = "config/study_dit.py"
feature_net = "out/cifar10_resnet.pt2"  # what FD and IS are measured with
samples = 5000  # from each generator, without and with guidance
cfg_scale = 2.0  # guidance
dtype = "auto"  # bfloat16 or float32, in all cells; auto = as in those that are there, else the faster one here
jobs = 2  # cells at a time, of one thread each
out_dir = "out/study"  # checkpoints, samples and results of each cell, in ROW-seedN/
print_only = False  # True: run nothing
cell = ""  # ROW:SEED, for the processes that the script starts

ROWS = {  # the constants of train_tokenizer.py that a row sets beside config/study_tokenizer.py
    "p16-none": dict(patch_size=16, ssl_method="none"), "p16": dict(patch_size=16, global_crop_size=32),
    "p8-none": dict(patch_size=8, ssl_method="none"), "p8": dict(patch_size=8),
    "p4-none": dict(patch_size=4, ssl_method="none"), "p4": dict(patch_size=4),
    "p4-stc-none": dict(patch_size=4, stc_depth=2, ssl_method="none"), "p4-stc": dict(patch_size=4, stc_depth=2),
    "p4-stc-shuffle-none": dict(patch_size=4, stc_depth=2, compression="shuffle", ssl_method="none"),  # Table 8
}
COLUMNS = {  # what the table shows: file, metric as eval.py names it
    "PSNR": ("tokenizer", "PSNR"), "SSIM": ("tokenizer", "SSIM"), "rFD": ("tokenizer", "rFD"),
    "probe, tokens": ("tokenizer", "probe on tokens"), "probe, latents": ("tokenizer", "probe on latents"),
    "structure loss": ("tokenizer", "structure loss"), "gFD": ("samples", "gFD"), "IS": ("samples", "IS"),
    "gFD, guided": ("guided", "gFD"), "own error": ("generator", "gFD"),
    "recognised, guided": ("guided", "recognised"), "seams": ("seams", "seams"),
}
EARLY, LAST_STEP = (195, 585), 1950  # steps of config/study_dit.py's generator, for Figure 6
for step in EARLY:
    COLUMNS[f"gFD, step {step}"] = (f"step-{step}", "gFD")
    COLUMNS[f"own error, step {step}"] = (f"step-{step}-generator", "gFD")

CLAIMS = [  # what is compared, in which column, which row should be lower (or higher), and the paper's numbers, if any
    ("more tokens help reconstruction", "PSNR", "p4-none", ">", "p8-none", "25.13 > 25.03"),
    ("more tokens alone do not help generation", "gFD", "p4-none", ">", "p8-none", "44.72 > 31.37"),
    ("the same with guidance", "gFD, guided", "p4-none", ">", "p8-none", ""),
    ("staging helps reconstruction, without SSL", "PSNR", "p4-stc-none", ">", "p4-none", "25.72 > 25.13"),
    ("staging helps reconstruction, without SSL", "rFD", "p4-stc-none", "<", "p4-none", "0.75 < 1.33"),
    ("staging helps generation, without SSL", "gFD", "p4-stc-none", "<", "p4-none", "32.92 < 44.72"),
    ("staging helps generation, with SSL", "gFD", "p4-stc", "<", "p4", "16.39 < 25.36"),
    ("staging lowers the generator's own error", "own error", "p4-stc-none", "<", "p4-none", ""),
    ("staging costs PSNR, with SSL", "PSNR", "p4-stc", "<", "p4", "24.21 < 24.84"),
    ("SSL costs PSNR, without staging", "PSNR", "p4", "<", "p4-none", "24.84 < 25.13"),
    ("SSL costs PSNR, with staging", "PSNR", "p4-stc", "<", "p4-stc-none", "24.21 < 25.72"),
    ("SSL helps reconstruction, without staging", "rFD", "p4", "<", "p4-none", "0.90 < 1.33"),
    ("SSL costs reconstruction, with staging", "rFD", "p4-stc", ">", "p4-stc-none", "0.90 > 0.75"),
    ("SSL lowers the generator's own error", "own error", "p4", "<", "p4-none", ""),
    ("the same, with staging", "own error", "p4-stc", "<", "p4-stc-none", ""),
    ("SSL helps generation, without staging", "gFD", "p4", "<", "p4-none", "25.36 < 44.72"),
    ("SSL helps generation, with staging", "gFD", "p4-stc", "<", "p4-stc-none", "16.39 < 32.92"),
    ("more tokens lose more structure, without SSL", "structure loss", "p4-none", ">", "p8-none", ""),
    ("more tokens lose more structure, with SSL", "structure loss", "p4", ">", "p8", "0.92 > 0.69"),
    ("staging keeps structure, without SSL", "structure loss", "p4-stc-none", "<", "p4-none", ""),
    ("staging keeps structure, with SSL", "structure loss", "p4-stc", "<", "p4", "0.69 < 0.92"),
]


def differences(images):
    """How much pixels k and k + 1 of a row or a column differ on average: uint8 (N, H, H, 3) -> (H - 1,)."""
    return sum(np.abs(np.diff(images.astype(np.float32), axis=axis)).mean((0, 3 - axis, 3)) for axis in (1, 2)) / 2


def seams(samples, photographs, f):
    """How much larger `differences` are across the borders of latent positions, f pixels apart, than elsewhere, divided
    by the same of photographs: 1 = no seams."""
    border = np.arange(1, len(samples) + 1) % f == 0
    drawn, real = (x[border].mean() / x[~border].mean() for x in (samples, photographs))
    return float(drawn / real)


def is_finished(row, seed):
    """Whether all is measured that is measured in the end; early steps come before that, if they were kept at all."""
    return all(Path(out_dir, f"{row}-seed{seed}", f"{file}.json").exists() for file, _ in COLUMNS.values()
               if not file.startswith("step-"))


def run_cell(row, seed):
    """Everything that a cell lacks, one command after the other."""
    if is_finished(row, seed):
        return
    folder = Path(out_dir, f"{row}-seed{seed}")
    tokenizer, dit = folder / "tokenizer" / "checkpoint.pt", folder / "dit" / "checkpoint.pt"

    def run(script, *config, **constants):
        given = {"dtype": dtype, **constants}
        command = [sys.executable, script, *config, *(f"--{name}={value}" for name, value in given.items())]
        print(f"{time.strftime('%H:%M:%S')} {row} seed {seed}: {script}", flush=True)
        with open(folder / f"{Path(script).stem}.txt", "a") as terminal:
            code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=terminal,
                                  stderr=subprocess.STDOUT).returncode
        check(code == 0, f"{shlex.join(map(str, command))} ended with {code}; see {terminal.name}")

    def evaluate(name, **what):
        out = folder / f"{name}.json"
        if not out.exists():
            run("eval.py", **what, out=out, feature_net=feature_net, lpips_net="none", workers=0)

    def sample(name, checkpoint, scale=1, own=""):
        """Draws samples and compares them with the test images -> NAME.json; and, unless own is "", with the
        tokenizer's reconstructions, the generator's own error -> OWN.json."""
        npz = folder / name / "samples.npz"
        if all((folder / f"{file}.json").exists() for file in (name, own or name)):
            return
        if not npz.exists():
            run("sample.py", checkpoint=checkpoint, num_samples=samples, cfg_scale=scale, out_dir=npz.parent)
        evaluate(name, samples=npz, reference=f"{data_dir}/test")
        if own:
            evaluate(own, samples=npz, reference=folder / "reconstructions.npz")

    folder.mkdir(parents=True, exist_ok=True)
    run("train_tokenizer.py", tokenizer_config, data_dir=data_dir, seed=seed, resume=True, out_dir=tokenizer.parent,
        **ROWS[row])
    evaluate("tokenizer", tokenizer=tokenizer, statistics=folder / "reconstructions.npz")
    run("train_dit.py", dit_config, tokenizer=tokenizer, seed=seed, resume=True, out_dir=dit.parent)
    sample("samples", dit, own="generator")
    sample("guided", dit, cfg_scale)
    for step in EARLY:
        kept = dit.with_name(f"step-{step}.pt")
        if kept.exists():  # not if the generator was trained with another keep_every
            sample(f"step-{step}", kept, own=f"step-{step}-generator")
    if not (folder / "seams.json").exists():
        source = data.open_split(data_dir, "val", 0, 0)
        photographs = differences(np.stack([np.asarray(source.load(i)) for i in data.spread(source, samples)]))
        with np.load(folder / "samples" / "samples.npz") as file:
            drawn = differences(file["arr_0"])
        value = {"seams": seams(drawn, photographs, downsample)}
        value |= {"samples": drawn.tolist(), "photographs": photographs.tolist()}
        (folder / "seams.json").write_text(json.dumps(value))
    for run_folder in tokenizer.parent, dit.parent:  # how it went: some 40 lines are enough for a curve
        lines = (run_folder / "log.jsonl").read_text().splitlines()
        (folder / f"{run_folder.name}.log.jsonl").write_text("\n".join(lines[::max(1, len(lines) // 40)]) + "\n")


def measured(row, seed, column):
    """A number, or None if it isn't there yet."""
    file, metric = COLUMNS[column]
    path = Path(out_dir, f"{row}-seed{seed}", f"{file}.json")
    if path.exists():
        for name, value in json.loads(path.read_text()).items():
            if name.split(" (")[0] == metric:
                return value


def seeds_found():
    """Those of which out_dir has a cell."""
    cells = [path.name.rpartition("-seed") for path in Path(out_dir).glob("*-seed*")]
    return sorted({int(seed) for row, _, seed in cells if row in ROWS and seed.isdecimal()})


def print_results(chosen):
    print("| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for row in chosen:
        cells = []
        for column in COLUMNS:
            values = [measured(row, seed, column) for seed in seeds_found()]
            digits = 3 if column in ("SSIM", "structure loss") or column.startswith(("probe", "recognised")) else 2
            cells.append(" / ".join("–" if value is None else f"{value:.{digits}f}" for value in values))
        print(f"| {row} | " + " | ".join(cells) + " |")
    print("\n| claim | the paper | here, by seed | verdict |\n|---|---|---|---|")
    for claim, column, first, sign, second, paper in CLAIMS:
        pairs = [(a, b) for seed in seeds_found()
                 if None not in (a := measured(first, seed, column), b := measured(second, seed, column))]
        print(f"| {claim} ({column}: {first} {sign} {second}) | {paper} | "
              + ", ".join(f"{a:.2f} and {b:.2f}" for a, b in pairs) + f" | {verdict(pairs, sign)} |")


def verdict(pairs, sign):
    """pairs: (first, second) of each seed."""
    if not pairs:
        return "not run"
    gains = [b - a if sign == "<" else a - b for a, b in pairs]
    mean, spread = sum(gains) / len(gains), max(max(side) - min(side) for side in zip(*pairs))
    if len(pairs) == 1:
        return f"{'holds' if mean > 0 else 'does not hold'} (one seed)"
    if max(gains) <= 0:
        return "does not hold"
    if min(gains) <= 0:
        return "open (the seeds disagree)"
    return "holds" if mean > spread else "holds weakly (less than the seeds' spread)"


def main():
    runtime.configure(globals())
    os.chdir(ROOT)
    chosen = list(ROWS) if rows == "all" else rows.split(",")
    for row in chosen:
        check(row in ROWS, f"rows: {row!r} is none of {', '.join(ROWS)}")
    if cell:
        row, seed = cell.split(":")
        return run_cell(row, int(seed))
    if not print_only:
        finished = [json.loads(path.read_text())["constants"] for path in Path(out_dir).glob("*/tokenizer.json")]
        common_dtype = finished[0]["dtype"] if finished and dtype == "auto" else dtype
        common_dtype = str(runtime.Distributed(dtype=common_dtype, saves=False).dtype).removeprefix("torch.")
        waiting, running = [f"{row}:{seed}" for seed in seeds for row in chosen if not is_finished(row, seed)], []
        check(not waiting or os.path.isfile(feature_net), f"feature_net={feature_net}: there is no such file. First "
              f"run python runs/features.py --data_dir={data_dir} --out={feature_net}")
        failed = 0
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(subprocess.Popen([sys.executable, __file__, *sys.argv[1:], f"--dtype={common_dtype}",
                                                 f"--cell={waiting.pop(0)}"]))
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                failed += process.returncode != 0
        check(not failed, f"{failed} cells have failed (above); the same command tries them again")
    print_results(chosen)


if __name__ == "__main__":
    main()
