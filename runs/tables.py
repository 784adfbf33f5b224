"""Every table and figure of the paper: trains and measures what is missing, then prints the table.

    python runs/tables.py --table=2 --data_dir=imagenet      # 8 GPUs; --gpus=4 --accumulate=2 for fewer
    python runs/tables.py --table=2 --show=True              # only the commands
    python runs/tables.py --table=2,figure3 --scale=shapes   # a smoke test on built-in images, on a CPU
    python runs/tables.py --cost=True                        # parameters, operations, hours: computed, not measured

A row's name is its constants (PARTS): p8-stc-none is p = 8 with staged token compression, without self-supervision.
Tables that share a row share its runs, in out_dir/ROW. Paths are relative to the project's folder.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

import finetune_decoder
import runtime
import train_tokenizer
from model import IBOTHead, LightningDiT, TCAE
from pretrained import DINO
from runs.baselines import dc_ae
from runtime import check

table = ""  # 1, 2, 3, 4, 6, 8, 9, 10, 11, figure3, figure4, figure6, figure8, or several: 2,6
show = False  # True: print the commands that are still to run, and run nothing
cost = False  # True: print what the rows cost, those of all tables if none is named, and run nothing

data_dir = "imagenet"  # folder with train/ and val/
reference = ""  # for gFID; "" = data_dir/VIRTUAL_imagenet256_labeled.npz, ADM's
out_dir = ""  # "" = out/tables-SCALE
scale = "imagenet"  # or "shapes": everything tiny, on built-in images; a smoke test, ignore the numbers
gpus = 0  # processes of each run; 0 = 8, for shapes 1
accumulate = 1  # micro-batches per step of the tokenizer, for less memory (DINOv2's KoLeo and Sinkhorn then see less)
cfg_scales = (1.25, 1.5, 2.0, 3.0, 4.0, 6.7, 10.0)  # tried for "with guidance"; the paper omits its scale
tflops = 226.0  # for --cost: what a GPU reaches, 10¹² operations per second; an H200 in stage 1 (docs/LOG.md)

PARTS = {  # of a row's name: the constants of train_tokenizer.py that they set; stc_depth is 0 without stc, m3 and m9
    "p64": dict(patch_size=64, global_crop_size=256, local_crop_size=128),  # crops are whole patches
    "p32": dict(patch_size=32), "p16": dict(patch_size=16), "p8": dict(patch_size=8),
    "m3": dict(stc_depth=3), "stc": dict(stc_depth=6), "m9": dict(stc_depth=9), "shuffle": dict(compression="shuffle"),
    "SB": dict(decoder="B"), "SL": dict(decoder="L"),  # encoder S, as anywhere else
    "BB": dict(encoder="B", decoder="B"), "LL": dict(encoder="L", decoder="L"),
    "c32": dict(latent_channels=32), "c256": dict(latent_channels=256),
    "alpha1": dict(alpha=1.0), "alpha10": dict(alpha=10.0),
    "none": dict(ssl_method="none"), "dino": dict(ssl_method="dino"),
    # DINOv2's own settings, except for its batches of thousands. With K = 65536 a GPU's 64 images have 1 GB of logits.
    "dinov2": dict(ssl_method="dinov2", prototypes=65536, teacher_momentum=0.992, global_crop_scale=(0.32, 1.0),
                   local_crops=8, local_crop_scale=(0.05, 0.32)),
    "system": dict(),  # the tokenizer of the name before it, its decoder finetuned; 800 epochs of the generator
}

FULL = ("rFID", "PSNR", "LPIPS", "SSIM", "gFID", "IS")
SYSTEM = ("rFID", "gFID", "gFID with guidance")

TABLES = {  # {name: (what it shows, its columns, {row: the paper's numbers})}
    "1": ("Table 1: how much structure the bottleneck loses, without and with staged token compression (STC)",
          ("gFID", "probe on tokens", "probe on latents", "structure loss"), {
        "p64": (64.96, 0.295, 0.063, 0.79), "p32": (22.93, 0.419, 0.138, 0.67),
        "p16": (17.22, 0.584, 0.181, 0.69), "p8": (25.36, 0.629, 0.0533, 0.92),
        "p8-stc": (16.39, 0.391, 0.121, 0.69)}),
    "2": ("Table 2: STC, without and with self-supervision", FULL, {
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58),
        "p8": (0.90, 24.84, 0.085, 0.772, 25.36, 52.38), "p8-stc": (0.90, 24.21, 0.098, 0.749, 16.39, 71.33)}),
    "3": ("Table 3: patch sizes, without and with self-supervision", FULL, {
        "p64-none": (14.97, 21.93, 0.302, 0.602, 65.23, 20.84), "p64": (30.96, 20.25, 0.383, 0.501, 64.96, 24.89),
        "p32-none": (5.31, 23.72, 0.177, 0.721, 37.09, 38.51), "p32": (4.63, 22.15, 0.195, 0.632, 22.93, 57.22),
        "p16-none": (1.12, 25.03, 0.080, 0.779, 31.37, 45.49), "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00),
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8": (0.90, 24.84, 0.085, 0.772, 25.36, 52.38)}),
    "4": ("Table 4: the system, with decoder B for the 164 GFLOPs", SYSTEM, {"p8-stc-SB-system": (0.35, 7.16, 2.57)}),
    "6": ("Table 6: where the compression layer stands: M = 0 (p = 16), 3, 6, 9, 12 (none)",
          ("rFID", "SSIM", "IS", "IS with guidance"), {
        "p16": (1.27, 0.723, 69.00, 312.45), "p8-m3": (0.93, 0.728, 66.68, 311.45),
        "p8-stc": (0.90, 0.749, 71.33, 326.47), "p8-m9": (0.92, 0.756, 62.61, 304.26),
        "p8": (0.90, 0.772, 52.38, 257.93)}),
    "6 right": ("Table 6, right: methods of self-supervision; p16 is iBOT", FULL, {
        "p16-dino": (1.34, 23.94, 0.101, 0.732, 20.38, 62.12),
        "p16-dinov2": (1.34, 24.48, 0.103, 0.759, 28.22, 49.19),
        "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00)}),
    "8": ("Table 8: the compression layer", FULL, {
        "p8-stc-shuffle-none": (0.89, 25.72, 0.070, 0.808, 37.07, 38.91),
        "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58)}),
    "9": ("Table 9: α, the weight of the reconstruction: 0.1, 1, 10", FULL, {
        "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00), "p16-alpha1": (1.31, 24.79, 0.092, 0.768, 27.74, 48.92),
        "p16-alpha10": (1.26, 25.22, 0.086, 0.789, 34.10, 40.62)}),
    "10": ("Table 10: 128 and 256 channels", FULL, {
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58),
        "p8-stc": (0.90, 24.21, 0.098, 0.749, 16.39, 71.33),  # Table 2's; the paper repeats here a row of c = 256
        "p8-c256-none": (0.73, 28.06, 0.040, 0.879, 47.33, 30.73),
        "p8-stc-c256-none": (0.57, 27.98, 0.037, 0.875, 39.93, 36.49),
        "p8-stc-c256": (1.23, 24.99, 0.091, 0.780, 24.27, 55.20)}),
    # The paper does not say if Table 11's decoder was finetuned, nor how long its generator was trained: as elsewhere.
    "11": ("Table 11: latents of DC-AE's shape, 8 × 8 × 32", SYSTEM, {"p8-stc-c32-SB": (0.81, 10.72, 4.77)}),
    # The figures' own numbers are not in print. Fig. 4 is with self-supervision: without it p = 8 with STC generates
    # worse than p = 16 (Tables 2 and 3). At p = 64 and 32 there are no more tokens than latents: nothing to stage.
    "figure3": ("Figure 3: patch sizes of ViT-S, B and L, without self-supervision", FULL, [
        f"p{p}{size}-none" for size in ("", "-BB", "-LL") for p in (64, 32, 16, 8)]),
    "figure4": ("Figure 4: patch sizes without STC, then with it", FULL,
                ["p64", "p32", "p16", "p8", "p16-stc", "p8-stc"]),
    "figure6": ("Figure 6: how fast the generator converges on the latents of Table 2's rows",
                ("gFID against steps", "IS against steps"), ["p8-none", "p8-stc-none", "p8", "p8-stc"]),
    "figure8": ("Figure 8: patch sizes with decoders S, B and L", FULL, [
        f"{row}{size}" for size in ("", "-SB", "-SL") for row in ("p64", "p32", "p16", "p8-stc")]),  # every step helps
}
PAPER = {(row, column): number for _, columns, rows in TABLES.values() if isinstance(rows, dict)
         for row, numbers in rows.items() for column, number in zip(columns, numbers)}

SHARED = {  # by all rows of a scale: the stages' scripts with what they are given, how many samples are measured, and
    # at which of the generator's steps, for figure6 (ten checkpoints of 2.7 GB for each of its rows)
    "imagenet": dict(joint=["train_tokenizer.py"], finetuning=["finetune_decoder.py"], generator=["train_dit.py"],
                     longer=["--epochs=800", "--decay_epoch=40"], samples=50000, few_samples=10000,
                     kept=range(10000, 100001, 10000)),
    "shapes": dict(joint=["train_tokenizer.py", "config/toy_tokenizer.py"],
                   finetuning=["finetune_decoder.py", "config/toy_finetune.py"],
                   generator=["train_dit.py", "config/toy_dit.py"], longer=["--epochs=2", "--decay_epoch=1"],
                   samples=20, few_samples=20, kept=range(5, 11, 5)),
}

# ----------------------------------------------------------------------------------------------------------------------
# Runs


def constants_of(row, tiny=False):
    """What a row sets of train_tokenizer.py's constants; `tiny`: at the scale of config/toy_tokenizer.py."""
    constants = {"stc_depth": 0}
    for part in row.split("-"):
        constants.update(PARTS[part])
    if tiny:
        for name in "global_crop_size", "local_crop_size", "local_crops", "prototypes":
            constants.pop(name, None)
        for name in constants.keys() & {"encoder", "decoder"}:
            constants[name] = {"B": "96/4/4", "L": "128/8/4"}[constants[name]]
        for name in constants.keys() & {"patch_size", "stc_depth", "latent_channels"}:
            constants[name] //= {"patch_size": 4, "stc_depth": 3, "latent_channels": 16}[name]
    return constants


def measured(path):
    """{metric: value} of eval.py's file; {} if it is missing or not whole. FD, by another network, goes as FID."""
    try:
        return {name.split(" (")[0].replace("FD", "FID"): value for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def done(path, constants):
    """Whether a result is there and whole: of a run with these constants, and ended (after SIGTERM it also exits 0)."""
    if path.suffix == ".pt" and path.exists():
        saved = runtime.load_checkpoint(path, "out_dir")
        runtime.check_resumable(saved["constants"], constants, may_change=())
        return saved["finished"]
    return bool(measured(path)) if path.suffix == ".json" else path.exists()


def words(script, **constants):
    """A command: the script with its config files, then its constants."""
    return script + [f"--{name}={value}" for name, value in constants.items()]


def produce(result, *commands, processes=None, **constants):
    """Runs, or shows, the commands that lead to a result, unless it is there. `constants`: what a checkpoint holds."""
    if done(result, constants):
        return
    processes = processes or gpus or (1 if scale == "shapes" else 8)
    options = ["--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    for command in commands:
        if show:
            print("torchrun" if options else "python", shlex.join([*options, *command]))
            continue
        launcher = [sys.executable, "-m", "torch.distributed.run", *options] if options else [sys.executable]
        process = subprocess.Popen([*launcher, *command])
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a preempted job: the stage saves and ends
        process.wait()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        check(process.returncode == 0, f"exit status {process.returncode} of {shlex.join(command)}")
    check(show or done(result, constants), f"{result} is not finished: call again")


def guidance(row):
    """The best of `cfg_scales`, by gFID on few samples; None as long as one of them was not measured."""
    distances = {cfg: measured(Path(out_dir, row, f"guidance-{cfg:g}.json")).get("gFID") for cfg in cfg_scales}
    return None if None in distances.values() else f"{min(distances, key=distances.get):g}"


def make(row, columns):
    """All that a row of a table needs and lacks."""
    shared, folder, base = SHARED[scale], Path(out_dir, row), Path(out_dir, row.removesuffix("-system"))
    constants = constants_of(row, tiny=scale == "shapes")
    tokenizer = decoder = base / "tokenizer" / "checkpoint.pt"
    generator, dit = shared["generator"], folder / "dit" / "checkpoint.pt"
    # Inception means little for images of 32 px, and is a download: there a small network takes its place
    judges = {"feature_net": Path(out_dir, "classifier.pt2"), "lpips_net": "none"} if scale == "shapes" else {}

    def evaluate(name, *before, **what):
        produce(name, *before, words(["eval.py"], **what, out=name, **judges))

    produce(tokenizer, words(shared["joint"], data_dir=data_dir, **constants, accumulate=accumulate,
                             out_dir=tokenizer.parent, resume=True), **constants)
    if judges:
        produce(judges["feature_net"], words(["runs/features.py"], data_dir="shapes", tokenizer=tokenizer,
                                             shapes_images=400, epochs=1, batch_size=64, width=8, augmented=False,
                                             out=judges["feature_net"]), processes=1)
    evaluate(base / "tokenizer.json", tokenizer=tokenizer)
    if row.endswith("-system"):  # finetuning changes no latents: the generator does not know of it
        decoder, generator = folder / "finetuned" / "checkpoint.pt", generator + shared["longer"]
        produce(decoder, words(shared["finetuning"], init_from=tokenizer, out_dir=decoder.parent, resume=True))
        evaluate(folder / "finetuned.json", tokenizer=decoder)

    def sample(name, count, cfg, checkpoint=dit):
        command = words(["sample.py"], checkpoint=checkpoint, tokenizer=decoder, num_samples=count, cfg_scale=cfg,
                        out_dir=folder / name)
        evaluate(folder / f"{name}.json", command, samples=folder / name / "samples.npz", reference=reference)

    keep = {"keep_every": shared["kept"].step} if row in TABLES["figure6"][2] else {}
    produce(dit, words(generator, tokenizer=tokenizer, out_dir=dit.parent, resume=True, **keep))
    sample("samples-1", shared["samples"], 1)
    for step in shared["kept"] if any("steps" in column for column in columns) else ():
        sample(f"step-{step}", shared["samples"], 1, dit.parent / f"step-{step}.pt")
        if not show:
            Path(folder, f"step-{step}", "samples.npz").unlink(missing_ok=True)  # 10 GB
    if any("guidance" in column for column in columns):
        for cfg in cfg_scales:
            sample(f"guidance-{cfg:g}", shared["few_samples"], cfg)
            if not show:
                Path(folder, f"guidance-{cfg:g}", "samples.npz").unlink(missing_ok=True)  # 2 GB
        best = guidance(row) or "BEST"  # with --show=True it may not be known yet
        sample(f"samples-{best}", shared["samples"], best)


def print_line(*cells):
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells) + " |")


def print_table(name):
    """Measured beside the paper's; – is what is missing."""
    title, columns, rows = TABLES[name]
    print(f"\n{title}; measured (the paper's)" + "; FID and IS are a small network's" * (scale == "shapes") + "\n")
    print_line("", *columns)
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        base, folder, best = Path(out_dir, row.removesuffix("-system")), Path(out_dir, row), guidance(row)
        found = measured(base / "tokenizer.json") | measured(folder / "finetuned.json") | measured(
            folder / "samples-1.json")  # of a finetuned decoder, its rFID is the row's
        guided = measured(folder / f"samples-{best}.json")
        found |= {f"{metric} with guidance": value for metric, value in guided.items()}
        cells = ["–" if found.get(column) is None else f"{found[column]:.3f}" for column in columns]
        for k, column in enumerate(columns):
            cells[k] += f" at {best}" if guided and "guidance" in column else ""
            cells[k] += f" ({PAPER[row, column]:g})" if (row, column) in PAPER else ""
        print_line(row, *cells)


def print_curves(title, columns, rows):
    """Every row's metrics against the generator's steps; the last line is the whole run's, as in Table 2."""
    print(f"\n{title}" + "; FID and IS are a small network's" * (scale == "shapes") + "\n")
    metrics = [column.split()[0] for column in columns]
    print_line("steps", *(f"{metric} of {row}" for metric in metrics for row in rows))
    print("|---" * (len(metrics) * len(rows) + 1) + "|")
    for step, name in [*((str(step), f"step-{step}") for step in SHARED[scale]["kept"]), ("all", "samples-1")]:
        found = [measured(Path(out_dir, row, f"{name}.json")).get(metric) for metric in metrics for row in rows]
        print_line(step, *("–" if value is None else f"{value:.3f}" for value in found))


# ----------------------------------------------------------------------------------------------------------------------
# Costs: two operations per multiply-add, counted on networks without values (the meta device). Training takes three
# forwards for what is trained, two for what is frozen but passed on the way back, one for what is only run.


def count(function):
    """Operations of a call, and of its attention's products alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    each = counter.get_flop_counts()["Global"]
    return sum(each.values()), sum(n for name, n in each.items() if "bmm" in str(name) or "attention" in str(name))


def coding_cost(network, image):
    """Operations to encode and to decode an image; those of attention's products in both."""
    z = network.encode(image)
    encode, attention = count(lambda: network.encode(image))
    decode, more_attention = count(lambda: network.decode(z))
    return encode, decode, attention + more_attention


def joint_cost(constants):
    """-> parameters of encoder and decoder; operations for one image: encode, decode, attention, a training step."""
    tcae, image = TCAE.from_constants(constants), torch.zeros(1, 3, constants["image_size"], constants["image_size"])
    vgg = vgg16().features  # LPIPS takes VGG of both images, and back for the reconstruction
    encode, decode, attention = coding_cost(tcae, image)
    step = 3 * (encode + decode) + 3 * count(lambda: vgg(image))[0]
    if constants["ssl_method"] != "none":
        global_crop, local_crop = (count(lambda: tcae.encoder(torch.zeros(1, 3, size, size)))[0] for size in (
            constants["global_crop_size"], constants["local_crop_size"]))
        head = IBOTHead(tcae.encoder.width, constants["head_hidden"], prototypes=constants["prototypes"])
        token = count(lambda: head.mlp(torch.zeros(1, tcae.encoder.width)))[0] + 2 * head.prototypes.numel()
        share, crops = 0 if constants["ssl_method"] == "dino" else 0.15, constants["local_crops"]
        masked = share * (constants["global_crop_size"] // tcae.encoder.output_patch) ** 2  # half hide 30 % of theirs
        student = 2 * global_crop + crops * local_crop + (2 + crops + 2 * masked) * token
        step += 3 * student + 2 * global_crop + 2 * (1 + masked) * token
    decoder = sum(p.numel() for p in tcae.decoder.parameters())
    return sum(p.numel() for p in tcae.parameters()) - decoder, decoder, encode, decode, attention, step


def finetuning_cost(constants):
    """Operations for one image until the discriminator starts, while it learns alone, and from when its loss counts;
    and their mean over the epochs."""
    *_, encode, decode, _, step = joint_cost({**constants, "ssl_method": "none"})
    network = DINO(constants["discriminator_size"], input_size=constants["discriminator_input"])
    head, image = finetune_decoder.DiscriminatorHead(network.width), torch.zeros(1, 3, *2 * [constants["image_size"]])
    dino, attention = count(lambda: network(image))
    heads = sum(count(lambda: head(features))[0] for features in network(image))
    # The discriminator learns from a real image and one that is decoded for it, with DINO only run; the decoder's loss
    # then goes forwards and backwards through all of it (attention takes two products, and four back).
    plain = step - 2 * encode  # the encoder is only run
    alone = plain + decode + 2 * (dino + 3 * heads)
    both = alone + 2 * dino + attention + 2 * heads
    epochs, start, counts = (constants[name] for name in ("epochs", "discriminator_start", "adversarial_start"))
    return plain, alone, both, (start * plain + (counts - start) * alone + (epochs - counts) * both) / epochs


def hours(operations, epochs):
    return operations * 1281167 * epochs / ((gpus or 8) * tflops * 1e12) / 3600  # ImageNet's training images


def print_costs(rows):
    print(f"GFLOPs for one image of 256 px, two per multiply-add; hours on {gpus or 8} GPUs at {tflops:g} TFLOP/s\n")
    print_line("tokenizer", "encoder M", "decoder M", "encode", "decode", "both", "without attention",
               "one per multiply-add", "step", f"hours for {train_tokenizer.epochs} epochs")
    print("|---" * 10 + "|")
    for row in rows:
        encoder, decoder, *operations = joint_cost({**vars(train_tokenizer), **constants_of(row)})
        encode, decode, attention, step = (n / 1e9 for n in operations)
        print_line(row, encoder / 1e6, decoder / 1e6, encode, decode, encode + decode, encode + decode - attention,
                   (encode + decode) / 2, step, hours(operations[-1], train_tokenizer.epochs))
    if find_spec("diffusers"):  # Table 4 and 11: the paper has 607 GFLOPs for DC-AE, 164 for its own S–B
        network = dc_ae()
        encoder, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (
            network.network.encoder, network.network.decoder))
        encode, decode, attention = (n / 1e9 for n in coding_cost(network, torch.zeros(1, 3, 256, 256)))
        print_line("DC-AE f32c32", encoder, decoder, encode, decode, encode + decode, encode + decode - attention,
                   (encode + decode) / 2, "–", "–")
    print("\n| another stage | GFLOPs for one training image | epochs | hours |\n|---|---|---|---|")
    constants = {**vars(train_tokenizer), **vars(finetune_decoder)}
    dit = LightningDiT("XL", 128, 8, 1000)
    step = 3 * count(lambda: dit(torch.zeros(1, 128, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)))[0]
    stages = [(f"finetuning decoder {size}", finetuning_cost({**constants, "decoder": size})[-1], constants["epochs"])
              for size in ("S", "B")] + [("generator XL", step, epochs) for epochs in (80, 800)]
    for name, step, epochs in stages:
        print_line(name, step / 1e9, str(epochs), hours(step, epochs))
    print(f"\nThe generator has {sum(p.numel() for p in dit.parameters()) / 1e6:.1f} M parameters.")


def main():
    global data_dir, out_dir, reference, cfg_scales
    runtime.configure(globals())
    os.chdir(ROOT)
    check(scale in SHARED, f"scale={scale!r}: it is {' or '.join(SHARED)}")
    check(min(cfg_scales, default=0) > 1, f"cfg_scales={cfg_scales}: each must be above 1, which is no guidance")
    known = list(dict.fromkeys(name.split()[0] for name in TABLES))
    wanted = table.split(",") if table or not cost else known
    check(set(wanted) <= set(known), f"table={table!r}: it is one of {', '.join(known)}, or several of them")
    names = [name for name in TABLES if name.split()[0] in wanted]
    if cost:
        with torch.device("meta"):
            return print_costs(dict.fromkeys(row.removesuffix("-system") for name in names for row in TABLES[name][2]))
    out_dir = out_dir or f"out/tables-{scale}"
    reference = reference or f"{data_dir}/VIRTUAL_imagenet256_labeled.npz"
    if scale == "shapes":
        data_dir, reference, cfg_scales = "shapes", "shapes", cfg_scales[:2]
    check(show or scale == "shapes" or Path(reference).is_file(),  # gFID is measured last, days from here
          f"reference={reference} is missing: it is at github.com/openai/guided-diffusion, evaluations/")
    for row in dict.fromkeys(row for name in names for row in TABLES[name][2]):
        make(row, [column for name in names if row in TABLES[name][2] for column in TABLES[name][1]])
    for name in () if show else names:
        print_curves(*TABLES[name]) if name == "figure6" else print_table(name)


if __name__ == "__main__":
    main()
