"""The pictures in docs/: how an image flows through TC-AE, what runs/study.py and tables.py found. Needs matplotlib.

    python runs/figures.py --only=flow          # the encoder's token counts, drawn
    python runs/figures.py --only=table2        # Table 2 in the paper and in three settings here
    python runs/figures.py --only=study         # seams, reconstructions, and samples by the generator's steps
    python runs/figures.py --only=study --results=docs/study_wide_vgg    # the same of another setting
    python runs/figures.py --only=reconstructions,colours    # from out/study: images, and tokens as colours
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
from matplotlib.ticker import LogLocator

import data
import runtime
import study
import tables
from model import TCAE
from runtime import check
from shapes import Shapes

only = "flow,table2,study"  # one or several of flow, table2, study, reconstructions, colours, figure6
results = "docs/study"  # out_dir of runs/study.py
study_dir = "out/study"  # with its tokenizers, for reconstructions and colours
tables_dir = "out/tables-imagenet"  # out_dir of runs/tables.py, for figure6
data_dir = "cifar10"  # for reconstructions and colours
seed = 0  # the study's, for reconstructions and colours
out_dir = "docs"

TABLE_2 = {"p4-none": "one\nbottleneck", "p4-stc-none": "staged", "p4": "bottleneck\n+ iBOT",
           "p4-stc": "staged\n+ iBOT"}
RECONSTRUCTED = {"p4-none": "one bottleneck", "p4-stc-none": "staged"}
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#8a8a8a", "#2b6cb0", "#dd6b20", "#2f855a"
SETTINGS = {"docs/study": ("32 channels", GREY), "docs/study_wide_vgg_judge": ("96 channels, small", BLUE),
            "docs/study_large_judge": ("96 channels, large", GREEN)}
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
    figure, axes = plt.subplots(figsize=(10.6, 4.0))
    axes.set(xlim=(0, 106), ylim=(-2.5, 38.5))
    axes.set_aspect("equal")
    axes.axis("off")

    def grid(x, y, side, picture, lines, colour=INK):
        axes.imshow(picture, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
        for k in range(lines + 1):
            look = dict(color=colour, lw=0.9 if k in (0, lines) else 0.25, zorder=3, snap=False)
            axes.plot([x, x + side], [y + side * k / lines] * 2, **look)
            axes.plot([x + side * k / lines] * 2, [y, y + side], **look)

    def arrow(x0, x1, y, label, below=""):
        axes.add_patch(FancyArrowPatch((x0, y), (x1, y), arrowstyle="-|>", mutation_scale=10, color=INK, lw=1.2,
                                       shrinkA=0, shrinkB=0))
        axes.text((x0 + x1) / 2, y + 0.9, label, ha="center", va="bottom", fontsize=7.5)
        axes.text((x0 + x1) / 2, y - 0.9, below, ha="center", va="top", fontsize=7.5, color=GREY)

    side, top, bottom = 11, 19, 2
    places = {"image": 1, "fine": 26, "coarse": 51, "latent": 76}
    middle = top + side / 2
    grid(places["image"], top, side, image, 1)
    grid(places["fine"], top, side, pooled[32], 32, "#ffffff")
    grid(places["coarse"], top, side, pooled[16], 16, "#ffffff")
    grid(places["latent"], top + 1.5, side - 3, latent, 8, "#ffffff")
    arrow(12.6, 24.6, middle, "patches, p = 8\n6 blocks", "Eq. 1")
    arrow(37.6, 49.6, middle, "2 × 2 → 1:\nconvolutions;\n6 blocks", "Sec. 3.3")
    arrow(62.6, 75.6, middle, "2 × 2 → 1:\npixel unshuffle,\nMLP", "Eq. 2")
    # One bottleneck, without staging, goes past all this
    start, end, roof = places["fine"] + side / 2, places["latent"] + side / 2 - 1.5, top + side + 6
    axes.plot([start, start, end, end], [roof - 1.2, roof, roof, roof - 2], color=GREY, lw=1, ls="--")
    axes.annotate("", (end, roof - 2.9), (end, roof - 1.9), arrowprops=dict(arrowstyle="-|>", color=GREY, lw=1))
    axes.text((start + end) / 2, roof + 0.6, "without staging: 4 × 4 tokens → 1 at once, which loses their structure",
              fontsize=7.5, color=GREY, ha="center", va="bottom")
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
    axes.text(50, top - 2.9, "[CLS] goes around the convolution", color=BLUE, fontsize=7.5, ha="center", va="top")
    axes.text(65, top - 3.6, "→ iBOT: a student that sees masked\n    crops predicts the "
                             "teacher's\n    [CLS] and tokens, Eq. 4", color=BLUE, fontsize=7.5, va="center")
    # The decoder, from right to left, and the generator
    small, low, turn = 8, bottom + 3, 101
    for name, x, picture, lines in ("coarse", 53, pooled[16], 16), ("fine", 28, pooled[32], 32), ("image", 3, image, 1):
        grid(x, bottom - 1, small, picture, lines, INK if name == "image" else "#ffffff")
    axes.plot([84.5, turn, turn, 70], [middle, middle, low, low], color=INK, lw=1.2)
    arrow(85, 62, low, "MLP, pixel shuffle; 6 blocks")
    arrow(52, 37, low, "convolutions; 6 blocks")
    arrow(27, 12, low, "linear head")
    axes.text(3, bottom - 2, "L1 + LPIPS, Eq. 6", fontsize=7.5, va="top", color=GREY)
    axes.add_patch(FancyBboxPatch((74, 8.9), 21.5, 1.6, boxstyle="round,pad=0.4", fc="none", ec=GREEN))
    axes.text(84.75, 9.6, "LightningDiT: noise, class → z", fontsize=7.5, ha="center", va="center", color=GREEN)
    axes.annotate("", (turn, 9.7), (96, 9.7), arrowprops=dict(arrowstyle="-|>", color=GREEN, lw=1.2))
    axes.text(106, bottom - 2, "sizes of the paper's run: p = 8, M = 6, f = 32, c = 128", fontsize=7.5, va="top",
              ha="right", color=GREY)
    for y, name in (top + side + 5, "encoder"), (bottom + small + 1.5, "decoder"):
        axes.text(0, y, name, fontsize=9, weight="bold")
    save(figure, "flow.png")


# ----------------------------------------------------------------------------------------------------------------------
# What the study found


def study_figure():
    """NAME.png, where `results` is docs/NAME: how much neighbouring pixels of samples differ, where the border of latent
    positions shows as a peak; how good reconstructions are, a dot for each seed; and how samples improve with the
    generator's steps (Figure 6), measured against the test images and against the tokenizer's own reconstructions."""
    study.out_dir = results
    seeds, last = study.seeds_found(), study.LAST_STEP
    figure, ((profile, dots), curves) = plt.subplots(2, 2, figsize=(8, 5.6))
    for row, colour in ("p4-none", GREY), ("p4-stc-none", BLUE):
        path = Path(results, f"{row}-seed{seeds[0] if seeds else 0}", "seams.json")
        if path.exists():
            kept = json.loads(path.read_text())
            places = range(1, len(kept["samples"]) + 1)
            profile.plot(places, kept["samples"], color=colour, lw=1.5, label=TABLE_2[row].replace("\n", " "))
            if row == "p4-none":
                profile.plot(places, kept["photographs"], color=INK, lw=0.8, ls=":", label="photographs")
    profile.set_title("difference of neighbouring pixels in samples:\none bottleneck leaves a seam", fontsize=10)
    profile.set(xlabel="pixel; the latent's border is at 16", ylim=(0, None), xticks=range(0, 33, 8))
    if profile.lines:
        profile.legend(fontsize=8, frameon=False, loc="lower center")

    def measured(row, column):
        """{seed: value}, without the seeds that were not run."""
        values = {seed: study.measured(row, seed, column) for seed in seeds}
        return {seed: value for seed, value in values.items() if value is not None}

    for k, (row, colour) in enumerate(zip(TABLE_2, (GREY, BLUE, ORANGE, GREEN))):
        values = measured(row, "rFD")
        places = [k + 0.15 * (seed - (len(seeds) - 1) / 2) for seed in values]  # side by side
        dots.plot(places, values.values(), "o", color=colour, ms=5)
        for axes, column in zip(curves, ("gFD", "own error")):
            found = {step: measured(row, f"{column}, step {step}") for step in study.EARLY}
            found[last] = measured(row, column)
            for seed in seeds:
                steps = [step for step in found if seed in found[step]]
                axes.plot(steps, [found[step][seed] for step in steps], "o-", color=colour, ms=3.5, lw=1.2,
                          label=TABLE_2[row].replace("\n", " ") if seed == seeds[0] else None)
    dots.set_xticks(range(4), TABLE_2.values(), fontsize=8.5)
    dots.margins(x=0.15, y=0.25)
    dots.set_title("Fréchet distance of reconstructions ↓\n(a dot for each seed)", fontsize=10)
    titles = "Fréchet distance of samples ↓", "the same from reconstructions ↓\n(the generator's own error)"
    for axes, title in zip(curves, titles):
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="the generator's steps")
        axes.set_xticks([*study.EARLY, last], [f"{step:,}" for step in (*study.EARLY, last)])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    curves[1].legend(fontsize=8.5, frameon=False)
    figure.tight_layout()
    save(figure, f"{Path(results).name}.png")


def table2():
    """table2.png: distances of Table 2's four rows, each divided by that of one bottleneck: the paper's gFID, and gFD
    and the generator's own error in our SETTINGS, a dot for each seed that has all four."""
    _, metrics, rows = tables.TABLES["2"]
    gfid = [numbers[metrics.index("gFID")] for numbers in rows.values()]  # in TABLE_2's order
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 2.9), sharey=True)
    panels[0].plot(range(4), [value / gfid[0] for value in gfid], "_", color=INK, ms=24, mew=2,
                   label="the paper, ImageNet")
    for k, (folder, (name, colour)) in enumerate(SETTINGS.items()):
        study.out_dir = folder
        for axes, column in zip(panels, ("gFD", "own error")):
            found = [[study.measured(row, seed, column) for row in TABLE_2] for seed in study.seeds_found()]
            ratios = [value / values[0] for values in found if None not in values for value in values]
            places = [row + 0.17 * (k - 1) for row in range(4)]
            axes.plot(places * (len(ratios) // 4), ratios, "o", ms=5, color=colour, alpha=0.8, label=name)
    titles = "samples to test images (gFID; ours: gFD)", "samples to reconstructions (own error)"
    for axes, title in zip(panels, titles):
        axes.axhline(1, color=GREY, lw=0.8, zorder=0)
        axes.set_title(title, fontsize=9.5)
        axes.set_xticks(range(4), TABLE_2.values(), fontsize=8.5)
        axes.set(xlim=(-0.5, 3.5), ylim=(0, None))
    panels[0].set_ylabel("divided by one bottleneck's ↓")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.tight_layout()
    save(figure, "table2.png")


def study_tokenizers(rows):
    """(name, tokenizer) of those of the study's `rows`, {row: name}, that study_dir has."""
    paths = {name: Path(study_dir, f"{row}-seed{seed}", "tokenizer", "checkpoint.pt") for row, name in rows.items()}
    found = {name: path for name, path in paths.items() if path.exists()}
    check(found, f"study_dir={study_dir}: no row has a tokenizer yet; run runs/study.py first")
    return [(name, TCAE.from_checkpoint(runtime.load_checkpoint(path, "study_dir", kind="tokenizer")))
            for name, path in found.items()]


def study_images(count):
    """Validation images, evenly spread, uint8 (N, 32, 32, 3)."""
    source = data.open_split(data_dir, "val", 32, 0)
    return torch.from_numpy(np.stack([np.asarray(source.load(i)) for i in data.spread(source, count)]))


@torch.no_grad()
def reconstructions():
    """study_reconstructions.png: the six of 2,000 test images in which one bottleneck's seam is most visible, through
    it and through two stages; and how much pixels differ from their neighbours, the mean over all 2,000."""
    pixels = study_images(2000)
    rows = {"original": pixels} | {name: torch.cat([data.to_uint8(tcae(data.to_float(part, "cpu")))
                                                    for part in pixels.split(200)])
                                   for name, tcae in study_tokenizers(RECONSTRUCTED)}

    def edges(images):  # (N, H, W, 3) -> (N, H, W), differences from the pixels to the left and above
        x = images.float()
        return sum(x.diff(dim=dim, prepend=x.narrow(dim, 0, 1)).abs().mean(3) for dim in (1, 2))

    maps = [edges(images) for images in rows.values()]
    original, bottleneck, *_ = [(d[:, 16].mean(1) + d[:, :, 16].mean(1)) / d.mean((1, 2)) for d in maps]  # seams
    shown = (bottleneck - original).topk(6).indices
    brightest = max(d.mean(0).max() for d in maps)
    cells = [torch.cat([images[shown], (d.mean(0) / brightest * 255).byte()[None, :, :, None].expand(1, -1, -1, 3)])
             for images, d in zip(rows.values(), maps)]
    path = Path(out_dir, "study_reconstructions.png")
    large = torch.cat(cells).repeat_interleave(4, 1).repeat_interleave(4, 2)  # to see seams
    data.save_grid(path, large, 7, titles=[""] * 6 + ["mean edge strength"], names=list(rows))
    print(f"wrote {path}")


@torch.no_grad()
def colours():
    """study_colours.png: three principal components of the encoder's tokens, as red, green, blue."""
    pixels = torch.cat([study_images(10), study_images(500)])  # to show, and to fit the components on
    tokenizers = study_tokenizers(TABLE_2)
    figure, axes = plt.subplots(1 + len(tokenizers), 1, figsize=(7, 0.72 * (1 + len(tokenizers))))

    def draw(panel, images, name):
        panel.imshow(np.concatenate([np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=1) for x in images], axis=1))
        panel.axis("off")
        panel.text(-6, 17, name, ha="right", va="center", fontsize=9)

    draw(axes[0], pixels[:10].numpy() / 255, "images")
    for panel, (name, tcae) in zip(axes[1:], tokenizers):
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


FIGURES = {"flow": flow, "table2": table2, "study": study_figure, "reconstructions": reconstructions,
           "colours": colours, "figure6": figure6}


def main():
    runtime.configure(globals())
    os.chdir(ROOT)
    chosen = only.split(",")
    for name in chosen:
        check(name in FIGURES, f"only: {name!r} is none of {', '.join(FIGURES)}")
    for name in chosen:
        FIGURES[name]()


if __name__ == "__main__":
    main()
