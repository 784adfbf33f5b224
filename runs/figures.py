"""The pictures in docs/: how an image flows through TC-AE, what runs/study.py and tables.py found. Needs matplotlib.

    python runs/figures.py --only=flow          # the encoder's token counts, drawn
    python runs/figures.py --only=study         # quality, structure loss and seams, from the study's results
    python runs/figures.py --only=colours       # from out/study: the tokens as colours, without and with SSL
    python runs/figures.py --only=figure6       # the paper's Figure 6, after runs/tables.py --table=figure6
"""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import data
import runtime
import study
import tables
from model import TCAE
from runtime import check
from shapes import Shapes

only = "flow,study"  # one or several of flow, study, colours, figure6
results = "docs/study"  # of runs/study.py
study_dir = "out/study"  # with its tokenizers, for the colours
tables_dir = "out/tables-imagenet"  # of runs/tables.py, for figure6
data_dir = "cifar10"  # for the colours
seed = 0  # of the study, for the colours
out_dir = "docs"

TABLE_2 = {"p4-none": "neither", "p4-stc-none": "STC", "p4": "SSL", "p4-stc": "both"}  # of runs/study.py
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#8a8a8a", "#2b6cb0", "#dd6b20", "#2f855a"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
                     "axes.labelcolor": INK, "font.family": "DejaVu Sans"})


def save(figure, name):
    path = Path(out_dir, name)
    figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.08,
                   pil_kwargs={"optimize": True})
    plt.close(figure)
    print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------------------
# How an image flows


def flow():
    """flow.png: 256 px image, 1,024 tokens, 256 tokens, 8 × 8 latent, with [CLS], and the way back."""
    image = np.asarray(Shapes("val", 100, 256).load(7)) / 255
    pooled = {n: image.reshape(n, 256 // n, n, 256 // n, 3).mean((1, 3)) for n in (32, 16, 8)}
    rng = np.random.default_rng(0)
    latent = (pooled[8] @ rng.normal(size=(3, 3)) + 0.1 * rng.normal(size=(8, 8, 3)))
    latent = (latent - latent.min((0, 1))) / np.ptp(latent, (0, 1))
    figure, axes = plt.subplots(figsize=(10.6, 3.4))
    axes.set(xlim=(0, 106), ylim=(-0.5, 34))
    axes.set_aspect("equal")
    axes.axis("off")

    def grid(x, y, side, picture, lines, colour=INK):
        axes.imshow(picture, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
        for k in range(lines + 1):
            look = dict(color=colour, lw=0.9 if k in (0, lines) else 0.25, zorder=3, snap=False)
            axes.plot([x, x + side], [y + side * k / lines] * 2, **look)
            axes.plot([x + side * k / lines] * 2, [y, y + side], **look)

    def arrow(x0, x1, y, label, below):
        axes.add_patch(FancyArrowPatch((x0, y), (x1, y), arrowstyle="-|>", mutation_scale=10, color=INK, lw=1.2))
        axes.text((x0 + x1) / 2, y + 0.9, label, ha="center", va="bottom", fontsize=7.5)
        axes.text((x0 + x1) / 2, y - 0.9, below, ha="center", va="top", fontsize=7, color=GREY)

    side, top, bottom = 11, 19, 2
    places = {"image": 1, "fine": 26, "coarse": 51, "latent": 76}
    middle = top + side / 2
    grid(places["image"], top, side, image, 1)
    grid(places["fine"], top, side, pooled[32], 32, "#ffffff")
    grid(places["coarse"], top, side, pooled[16], 16, "#ffffff")
    grid(places["latent"], top + 1.5, side - 3, latent, 8, "#ffffff")
    arrow(12.6, 24.6, middle, "patches, p = 8\n6 blocks", "Eq. 1")
    arrow(37.6, 49.6, middle, "2 × 2 → 1: two\nconvolutions;\n6 blocks", "first of two\nstages")
    arrow(62.6, 76.1, middle, "2 × 2 → 1: pixel\nshuffle + MLP", "second, the bottle-\nneck, Eq. 2")
    for name, words in (("image", "image\n256 × 256 × 3"), ("fine", "1,024 tokens\n32 × 32"),
                        ("coarse", "256 tokens\n16 × 16")):
        axes.text(places[name] + side / 2, top + side + 0.7, words, ha="center", va="bottom", fontsize=8)
    axes.text(places["latent"] + side / 2 - 1.5, top + side - 0.8, "latent z\n8 × 8 × 128", ha="center", va="bottom",
              fontsize=8)
    # [CLS] goes around the convolution
    for x in places["fine"], places["coarse"]:
        axes.add_patch(FancyBboxPatch((x + side + 0.25, top - 2.7), 0.9, 0.9, boxstyle="square,pad=0.1", fc=BLUE,
                                      ec="none"))
    axes.annotate("", (places["coarse"] + side + 0.1, top - 2.3), (places["fine"] + side + 1.5, top - 2.3),
                  arrowprops=dict(arrowstyle="-|>", color=BLUE, lw=1))
    axes.text(50, top - 2.9, "[CLS] goes around the convolution", color=BLUE, fontsize=7, ha="center", va="top")
    axes.text(65, top - 4.1, "→ iBOT: a student that sees masked\n    crops predicts the "
                             "teacher's\n    [CLS] and tokens, Eq. 4", color=BLUE, fontsize=7.5, va="center")
    # The decoder, from right to left, and the generator
    small, low, turn = 8, bottom + 3, 98
    for name, x, picture, lines in ("coarse", 53, pooled[16], 16), ("fine", 28, pooled[32], 32), ("image", 3, image, 1):
        grid(x, bottom - 1, small, picture, lines, INK if name == "image" else "#ffffff")
    axes.plot([84.5, turn, turn, 85], [middle, middle, low, low], color=INK, lw=1.2)
    arrow(85, 62, low, "MLP + pixel shuffle, 6 blocks", "the encoder\nbackwards")
    arrow(52, 37, low, "convolutions, 6 blocks", "Sec. 3.5")
    arrow(27, 12, low, "linear head", "L1 and LPIPS,\nEq. 5, 6")
    axes.text(turn - 0.8, (middle + low) / 2 - 4.6, "LightningDiT draws z from\nnoise and a class (stage 2)",
              fontsize=7.5, ha="right", va="center", color=GREEN)
    axes.plot([turn], [(middle + low) / 2 - 4.6], "o", color=GREEN, ms=6)
    save(figure, "flow.png")


# ----------------------------------------------------------------------------------------------------------------------
# What the study found


def study_figure():
    """study.png: PSNR, structure loss and gFD of Table 2's rows, a dot for each seed, with the paper's numbers; and how
    much neighbouring pixels of samples differ, where the borders of latent positions show as peaks."""
    columns = [("PSNR", "PSNR, dB ↑", (25.13, 25.72, 24.84, 24.21)),
               ("structure loss", "structure loss ↓", None),
               ("gFD", "gFD ↓", (44.72, 32.92, 25.36, 16.39))]
    figure, (*panels, profile) = plt.subplots(1, 4, figsize=(11.5, 2.5))
    for row, name, colour in ("p4-none", "one bottleneck", GREY), ("p4-stc-none", "staged", BLUE):
        path = Path(results, f"{row}-seed0", "seams.json")
        if path.exists():
            kept = json.loads(path.read_text())
            places = range(1, len(kept["samples"]) + 1)
            profile.plot(places, kept["samples"], color=colour, lw=1.5, label=name)
            if row == "p4-none":
                profile.plot(places, kept["photographs"], color=INK, lw=0.8, ls=":", label="photographs")
    profile.set_title("seams: how much neighbouring\npixels of samples differ", fontsize=9.5)
    profile.set(xlabel="pixel; 16 is the latent's border", ylim=(0, None))
    if profile.lines:
        profile.legend(fontsize=7, frameon=False, loc="lower left")
    for axes, (column, label, paper) in zip(panels, columns):
        for k, row in enumerate(TABLE_2):
            values = [value for s in study.seeds if (value := study.measured(row, s, column)) is not None]
            axes.plot([k] * len(values), values, "o", color=(GREY, BLUE, ORANGE, GREEN)[k], ms=6)
            if values:
                axes.plot([k - 0.25, k + 0.25], [np.mean(values)] * 2, color=(GREY, BLUE, ORANGE, GREEN)[k], lw=2)
        axes.set_xticks(range(4), [f"{name}\n({paper[k]:g})" if paper else name
                                   for k, name in enumerate(TABLE_2.values())], fontsize=8)
        axes.set_title(label, fontsize=9.5)
        axes.margins(x=0.15, y=0.25)
    figure.text(0.5, -0.04, "CIFAR-10, 64 tokens for 4 latent positions; below each row in brackets the paper's number "
                            "(ImageNet, 1,024 tokens for 64)", ha="center", fontsize=8, color=GREY)
    figure.tight_layout()
    save(figure, "study.png")


@torch.no_grad()
def colours():
    """study_colours.png: three principal components of the encoder's tokens, as red, green, blue."""
    rows = [(path, name) for row, name in TABLE_2.items()
            if (path := Path(study_dir, f"{row}-seed{seed}", "tokenizer", "checkpoint.pt")).exists()]
    check(rows, f"study_dir={study_dir}: no row has a tokenizer yet; run runs/study.py first")
    source = data.open_split(data_dir, "val", 32, 0)
    shown, fitted = range(0, len(source), len(source) // 10), range(0, len(source), max(1, len(source) // 500))
    pixels = torch.from_numpy(np.stack([np.asarray(source.load(i)) for i in [*list(shown)[:10], *fitted]]))
    figure, axes = plt.subplots(1 + len(rows), 1, figsize=(7, 0.72 * (1 + len(rows))))

    def draw(panel, images, name):
        panel.imshow(np.concatenate([np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=1) for x in images], axis=1))
        panel.axis("off")
        panel.text(-6, 17, name, ha="right", va="center", fontsize=9)

    draw(axes[0], pixels[:10].numpy() / 255, "images")
    for panel, (path, name) in zip(axes[1:], rows):
        tcae = TCAE.from_checkpoint(runtime.load_checkpoint(path, "study_dir", kind="tokenizer"))
        _, tokens, _ = tcae.encode(data.to_float(pixels, "cpu"), with_tokens=True)  # (B, h w, D)
        flat = (tokens - tokens.mean((0, 1))).flatten(0, 1)
        _, _, directions = torch.pca_lowrank(flat, q=3, center=False, niter=8)
        scores = (flat @ directions).unflatten(0, tokens.shape[:2])
        low, high = scores.flatten(0, 1).quantile(0.02, 0), scores.flatten(0, 1).quantile(0.98, 0)
        scores = ((scores - low) / (high - low)).clamp(0, 1)[:10]
        side = round(scores.shape[1] ** 0.5)
        maps = scores.unflatten(1, (side, side)).numpy().repeat(32 // side, 1).repeat(32 // side, 2)
        draw(panel, maps, name)
    figure.subplots_adjust(hspace=0.02)
    save(figure, "study_colours.png")


# ----------------------------------------------------------------------------------------------------------------------
# The paper's Figure 6


def figure6():
    """figure6.png: gFID and IS of Table 2's rows against the generator's steps."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    for row, colour in zip(tables.TABLES["figure6"][2], (GREY, BLUE, ORANGE, GREEN)):
        found = {int(path.stem.removeprefix("step-")): tables.measured(path)
                 for path in Path(tables_dir, row).glob("step-*.json")}
        for axes, metric in zip(panels, ("gFID", "IS")):
            steps = sorted(step for step in found if metric in found[step])
            if steps:
                axes.plot(steps, [found[step][metric] for step in steps], "o-", color=colour, ms=4, label=row)
    check(panels[0].lines, f"tables_dir={tables_dir} has no results; run runs/tables.py --table=figure6 first")
    for axes, label in zip(panels, ("gFID ↓", "IS ↑")):
        axes.set(xlabel="the generator's steps", ylabel=label, xlim=(0, None))
    panels[0].legend(frameon=False)
    save(figure, "figure6.png")


FIGURES = {"flow": flow, "study": study_figure, "colours": colours, "figure6": figure6}


def main():
    runtime.configure(globals())
    os.chdir(ROOT)
    study.out_dir = results
    chosen = only.split(",")
    for name in chosen:
        check(name in FIGURES, f"only: {name!r} is none of {', '.join(FIGURES)}")
    for name in chosen:
        FIGURES[name]()


if __name__ == "__main__":
    main()
