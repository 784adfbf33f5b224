"""One of the paper's tables from the results that runs/rows.sh left, with the paper's number beside each cell.

    python runs/tables.py --table=2 --out=out/tables-imagenet
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import check

table = ""  # 1, 2, 3, 4, 6, 8, 9, 10, 11 or figure8
out = "out/tables-imagenet"  # where runs/rows.sh wrote
cfg = "1.5"  # guidance of the columns with it

RECONSTRUCTION = ("rFID", "PSNR", "LPIPS", "SSIM")
FULL = (*RECONSTRUCTION, "gFID", "IS")
PROBES = ("gFID", "probe on tokens", "probe on latents", "structure loss")
DEPTHS = ("rFID", "SSIM", "IS", "IS with guidance")
SYSTEM = ("rFID", "gFID", "gFID with guidance")

TABLES = {  # {table: (its columns, {row: the paper's numbers})}; the probes' accuracies are shares here, per cent there
    "1": (PROBES, {
        "p64": (64.96, 0.295, 0.063, 0.79), "p32": (22.93, 0.419, 0.138, 0.67), "p16": (17.22, 0.584, 0.181, 0.69),
        "p8": (25.36, 0.629, 0.0533, 0.92), "p8-stc": (16.39, 0.391, 0.121, 0.69)}),
    "2": (FULL, {
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58),
        "p8": (0.90, 24.84, 0.085, 0.772, 25.36, 52.38), "p8-stc": (0.90, 24.21, 0.098, 0.749, 16.39, 71.33)}),
    "3": (FULL, {
        "p64-none": (14.97, 21.93, 0.302, 0.602, 65.23, 20.84), "p64": (30.96, 20.25, 0.383, 0.501, 64.96, 24.89),
        "p32-none": (5.31, 23.72, 0.177, 0.721, 37.09, 38.51), "p32": (4.63, 22.15, 0.195, 0.632, 22.93, 57.22),
        "p16-none": (1.12, 25.03, 0.080, 0.779, 31.37, 45.49), "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00),
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8": (0.90, 24.84, 0.085, 0.772, 25.36, 52.38)}),
    "4": (SYSTEM, {"system": (0.35, 7.16, 2.57)}),
    "6": (DEPTHS, {
        "p16": (1.27, 0.723, 69.00, 312.45), "p8-m3": (0.93, 0.728, 66.68, 311.45),
        "p8-stc": (0.90, 0.749, 71.33, 326.47), "p8-m9": (0.92, 0.756, 62.61, 304.26),
        "p8": (0.90, 0.772, 52.38, 257.93)}),
    "6, right": (FULL, {
        "p16-dino": (1.34, 23.94, 0.101, 0.732, 20.38, 62.12), "p16-dinov2": (1.34, 24.48, 0.103, 0.759, 28.22, 49.19),
        "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00)}),
    "8": (FULL, {
        "p8-stc-none-shuffle": (0.89, 25.72, 0.070, 0.808, 37.07, 38.91),
        "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58)}),
    "9": (FULL, {
        "p16": (1.27, 23.76, 0.104, 0.723, 17.22, 69.00), "p16-alpha1": (1.31, 24.79, 0.092, 0.768, 27.74, 48.92),
        "p16-alpha10": (1.26, 25.22, 0.086, 0.789, 34.10, 40.62)}),
    "10": (FULL, {
        "p8-none": (1.33, 25.13, 0.068, 0.794, 44.72, 33.62), "p8-stc-none": (0.75, 25.72, 0.072, 0.807, 32.92, 43.58),
        "p8-stc": (0.90, 24.21, 0.098, 0.749, 16.39, 71.33),
        "c256-none": (0.73, 28.06, 0.040, 0.879, 47.33, 30.73),
        "c256-stc-none": (0.57, 27.98, 0.037, 0.875, 39.93, 36.49),
        "c256-stc": (1.23, 24.99, 0.091, 0.780, 24.27, 55.20)}),
    "11": (SYSTEM, {"c32-stc": (0.81, 10.72, 4.77)}),
    "figure8": (("rFID", "gFID"), {f"{row}{decoder}": (None, None)
                                   for decoder in ("", "-B", "-L") for row in ("p64", "p32", "p16", "p8-stc")}),
}


def results(row):
    """What was measured of a row: {column: value}. With a network other than Inception, FD stands for FID."""
    found = {}
    for file, suffix in (("tokenizer", ""), ("finetuned", ""), ("samples-1", ""), (f"samples-{cfg}", " with guidance")):
        path = Path(out, row, f"{file}.json")
        for name, value in (json.loads(path.read_text()) if path.exists() else {}).items():
            found[name.split(" (")[0].replace("FD", "FID") + suffix] = value  # finetuned's stand over the joint one's
    return found


def cell(value, paper):
    return ("–" if value is None else f"{value:.3f}") + ("" if paper is None else f" ({paper:g})")


def main():
    runtime.configure(globals())
    known = [name for name in TABLES if "," not in name]
    check(table in known, f"table={table!r}: it is one of {', '.join(known)}")
    foreign = any("FD (" in path.read_text() for path in Path(out).glob("*/*.json"))
    note = "; FID and IS are those of another network than Inception" if foreign else ""
    for name in [name for name in TABLES if name.split(",")[0] == table]:
        columns, rows = TABLES[name]
        title = "Figure 8: measured" if name == "figure8" else f"Table {name}: measured (the paper's)"
        print(f"\n{title}{note}\n")
        print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for row, paper in rows.items():
            measured = results(row)
            print(f"| {row} | {' | '.join(cell(measured.get(c), p) for c, p in zip(columns, paper))} |")


if __name__ == "__main__":
    main()
