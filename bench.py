"""How fast each stage runs here, beside what it is compared with: one process, one device, medians.

    python bench.py    # on a CPU the sizes of small configs, on a GPU the paper's

steps     each training step, encoding, decoding and a guided sampling step, beside the same in plain float32
tokens    what the method is about: p = 16, p = 8, and p = 8 with staged compression, S–S at 256 px
rival     ours with decoder B beside DC-AE f32c32, at 256 px (only by name: it needs `pip install diffusers`)
data      our views of JPEG files, on one core, beside the same recipe in torchvision's transforms
run       train_tokenizer.py from its start, beside `import torch` alone, and how long it waits for data

A script's log.jsonl times its steps, without waiting for data. No downloads: no LPIPS, and a random discriminator.
"""
import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer

import data
import runtime
import ssl
import train_tokenizer as stage1
from model import LightningDiT, TCAE, cfg_velocity, compile_blocks, sample_flow
from runs.baselines import dc_ae, torchvision_views

only = "steps,tokens,data,run"  # tables to make; there is also rival
sizes = "auto"  # "shapes" or "paper"; auto = paper on CUDA, else shapes
data_dir = "shapes"  # what the scripts run on; or a folder, as in train_tokenizer.py
batch_size = 0  # images per step; 0 = the configuration's, for the paper's sizes an eighth of it (one GPU of eight)
steps = 20  # that a script runs for; the first quarter is not counted
repeats = 3  # measurements of each, in turn with what it is compared with; the median is shown
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # matrix products in bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True (a CPU needs a C++ compiler for it), False; auto = on CUDA

HERE = Path(__file__).parent
JOINT, FINETUNE, DIT = "train_tokenizer.py", "finetune_decoder.py", "train_dit.py"
SHAPES = {JOINT: "config/shapes_tokenizer.py", FINETUNE: "config/cifar10_finetune.py", DIT: "config/shapes_dit.py"}
MORE = {JOINT: "--lpips_weight=0", DIT: "", FINETUNE:  # its third phase, in which everything is trained
        "--lpips_weight=0 --discriminator_weights=random --discriminator_start=0 --adversarial_start=0"}


def medians(*measures):
    """The median of each measurement, taken in turn, so that a slow minute of the machine hits all of them."""
    return np.median([[measure() for measure in measures] for _ in range(repeats)], axis=0)


def seconds(task, dist, threads=1):
    """Of one call, without gradient, on so many threads."""
    with torch.no_grad(), dist.autocast():
        return Timer("task()", globals={"task": task}, num_threads=threads).blocked_autorange().median


def constants_of(script, arguments):
    return runtime.configure(runpy.run_path(HERE / script), list(map(str, arguments)))


def arguments_of(script):
    """A script's arguments for these `sizes`."""
    files = [HERE / SHAPES[script]] if sizes == "shapes" else []
    return [*files, f"--batch_size={batch_size or constants_of(script, files)['batch_size'] // (1 if files else 8)}"]


def train(script, *arguments):
    """Runs a script as it is until it has logged `steps` steps -> seconds to its first one; of the later ones the
    median seconds without waiting for data, and the share of time that it waited."""
    source = [f"--data_dir={data_dir}", f"--shapes_images={constants_of(script, arguments)['batch_size']}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / script, f"--workers={8 if torch.cuda.is_available() else 0}",
                   f"--dtype={dtype}", f"--compile={compile}", *arguments, *MORE[script].split(), f"--device={device}",
                   f"--out_dir={folder}/out", f"--epochs={1000 * steps}", "--log_every=1"]
        if script == JOINT:
            command += source
        else:  # after a tokenizer that has learned nothing, which is as fast
            constants = constants_of(JOINT, [*arguments_of(JOINT), *source])
            weights = TCAE.from_constants(constants).state_dict()
            torch.save(dict(kind="tokenizer", finished=True, constants=constants, tokenizer=weights), f"{folder}/in.pt")
            command += [f"--{'tokenizer' if script == DIT else 'init_from'}={folder}/in.pt"]
        log, errors, lines, first, begin = Path(folder, "out/log.jsonl"), Path(folder, "errors"), [], 0, time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors.open("w")) as process:
            while process.poll() is None and len(lines) < steps:
                time.sleep(0.05)
                lines = log.read_text().split("\n")[:-1] if log.exists() else []
                first = first or (time.time() - begin if lines else 0)
            process.kill()
        runtime.check(len(lines) >= steps, f"{script}: {(errors.read_text().splitlines() or ['it ended'])[-1]}")
    logged = map(json.loads, lines[steps // 4:steps])
    whole, waiting = np.array([(step["seconds"], step["waiting"]) for step in logged]).T
    return first, np.median(whole * (1 - waiting)), whole @ waiting / whole.sum()


def networks(dist, compiled, arguments, images, rival=None):
    """Three measurements, with untrained networks, perhaps of a `rival` tokenizer: of encoding, decoding and a step of
    guided sampling."""
    constants = constants_of(JOINT, arguments)
    tcae = (rival or TCAE.from_constants(constants)).to(dist.device)
    pixels = torch.rand(images, 3, constants["image_size"], constants["image_size"], device=dist.device)
    z = torch.randn_like(tcae.encode(pixels))
    dit = LightningDiT(constants_of(DIT, arguments_of(DIT))["size"], z.shape[1], z.shape[2], 1000).to(dist.device)
    velocity = cfg_velocity(dit, torch.zeros(images, dtype=torch.long, device=dist.device), 1000, cfg_scale=1.5)
    if compiled:
        compile_blocks(tcae, dit)
    tasks = lambda: tcae.encode(pixels), lambda: tcae.decode(z), lambda: sample_flow(velocity, z, steps=1)
    return [lambda task=task: seconds(task, dist, torch.get_num_threads()) for task in tasks]


def steps_table(dist, plain):
    def measures(dist, compiled, *flags):
        return [*(lambda script=script: train(script, *arguments_of(script), *flags)[1] for script in SHAPES),
                *networks(dist, compiled, arguments_of(JOINT), images[DIT])]

    yield "step", "images", "ms", "images/s", "plain float32, ms", "× faster"  # a table's first row is its header
    images = {script: constants_of(script, arguments_of(script))["batch_size"] for script in SHAPES}
    pairs = zip(measures(dist, dist.should_compile(compile)),
                measures(plain, False, "--dtype=float32", "--compile=False"))
    for name, pair in zip([*SHAPES, "encode", "decode", "guided sampling"], pairs):
        (ours, theirs), n = medians(*pair), images.get(name, images[DIT])
        yield name, n, f"{ours * 1e3:.1f}", f"{n / ours:.0f}", f"{theirs * 1e3:.1f}", f"{theirs / ours:.2f}"


def tokens_table(dist, _):
    yield "p", "M", "tokens", *(f"{name}, ms/image (of p = 8's)" for name in ("encode", "decode", "joint step"))
    images, measures, rows = batch_size or (64 if dist.device.type == "cuda" else 2), [], ((16, 0), (8, 0), (8, 6))
    for p, depth in rows:
        arguments = f"--batch_size={images}", f"--patch_size={p}", f"--stc_depth={depth}"
        encode, decode, _ = networks(dist, dist.should_compile(compile), arguments, images)
        measures += [encode, decode, lambda arguments=arguments: train(JOINT, *arguments)[1]]
    ms = 1e3 / images * medians(*measures).reshape(3, 3)  # rows × columns
    for (p, depth), times in zip(rows, ms):
        yield p, depth or "–", (256 // p) ** 2, *(f"{time:.1f} ({time / p8:.0%})" for time, p8 in zip(times, ms[1]))


def rival_table(dist, _):
    images, theirs, ours = batch_size or (64 if dist.device.type == "cuda" else 1), dc_ae(), TCAE(decoder="B")
    yield "tokenizer", "M parameters", "encode, ms/image", "decode, ms/image", "images/s", "× DC-AE's"
    measures = [networks(dist, dist.should_compile(compile), [], images, each)[:2] for each in (ours, theirs)]
    times = 1e3 / images * medians(*measures[0], *measures[1]).reshape(2, 2)  # ours, theirs × encode, decode
    for name, network, (encode, decode) in zip(("ours, S–B", "DC-AE f32c32"), (ours, theirs), times):
        total, parameters = encode + decode, sum(p.numel() for p in network.parameters())
        yield (name, f"{parameters / 1e6:.0f}", f"{encode:.1f}", f"{decode:.1f}", f"{1e3 / total:.2f}",
               f"{times[1].sum() / total:.2f}")


def data_table(dist, _):
    yield "JPEG files", "ours, ms/image", "torchvision's, ms/image", "× faster"
    ours = stage1.Views(ssl.MultiCrop(stage1.global_crop_size, stage1.global_crop_scale, stage1.local_crop_size,
                                      stage1.local_crop_scale, stage1.local_crops, output_patch=16))
    theirs, rng = torchvision_views(), np.random.default_rng(0)
    for width, height in (500, 375), (2000, 1500):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "class").mkdir()
            for k in range(8):  # noise just so coarse that the files are as large as photographs'
                noise = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8))
                noise.resize((width, height), Image.BICUBIC).save(f"{folder}/class/{k}.jpg", quality=90)
            # The time is the epoch, so that every call takes other crops.
            batches = data.TrainBatches(data.ImageFolder(folder), ours, 0, ours.collate, ours.short_side)
            times = medians(lambda: seconds(lambda: batches[[(time.time_ns(), i) for i in range(8)]], dist) / 8,
                            lambda: seconds(lambda: [theirs(batches.source.load(i)) for i in range(8)], dist) / 8)
        yield f"{width} × {height} px", *(f"{each * 1e3:.1f}" for each in times), f"{times[1] / times[0]:.2f}"


def run_table(dist, _):
    yield "train_tokenizer.py", "seconds", "beside"
    helped, alone = (seconds(lambda: subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True), dist)
                     for words in ((JOINT, "--help"), ("-c", "import torch")))
    yield "--help", f"{helped:.1f}", f"{alone:.1f} for `import torch` alone"
    workers = f"--workers={constants_of(JOINT, arguments_of(JOINT))['workers']}"
    first, step, waiting = medians(lambda: train(JOINT, *arguments_of(JOINT), workers))[0]
    yield "to its first step", f"{first:.1f}", f"{helped:.1f} for --help"
    yield "then a step", f"{step / (1 - waiting):.3f}", f"{waiting:.1%} of it waiting for data"


def main():
    global sizes
    runtime.configure(globals())
    tables = {"steps": steps_table, "tokens": tokens_table, "rival": rival_table, "data": data_table, "run": run_table}
    runtime.check({*only.split(",")} <= {*tables}, f"only={only!r}: the tables are {', '.join(tables)}")
    dist, plain = (runtime.Distributed(device, each, saves=False) for each in (dtype, "float32"))
    sizes = {"auto": "paper" if dist.device.type == "cuda" else "shapes"}.get(sizes, sizes)
    for name in only.split(","):
        for k, cells in enumerate(tables[name](dist, plain)):
            print("\n" * (k == 0) + f"| {' | '.join(map(str, cells))} |", flush=True)
            if k == 0:
                print("|" + " --- |" * len(cells))


if __name__ == "__main__":
    main()
