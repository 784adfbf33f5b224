"""Figure 7: the same noise and classes through several generators, a row of the picture for each.

    python runs/compare.py --checkpoints=out/a/checkpoint.pt,out/b/checkpoint.pt --names="without SSL,with SSL"
    python runs/compare.py --checkpoints=out/dit/step-5000.pt,out/dit/step-10000.pt --classes=207,360 --per_class=4

Figure 9, a grid of one generator's samples of chosen classes at full size, is sample.py's own picture. The noise is the
same for latents of the same shape. Writes the picture `out`.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import data
import runtime
from runtime import check

checkpoints = ""  # train_dit.py's, separated by commas
names = ""  # row names, separated by commas; "" = the checkpoints' folders, or their paths if two share one
classes = ""  # class numbers, such as 0,5,7; "" = the first ten
per_class = 1  # samples of each
cfg_scale = 1.0  # as in sample.py, like the next ones
steps = 50
seed = 0
device = "auto"
dtype = "auto"
out = "out/compare.png"


def main():
    constants = runtime.configure(globals())
    paths = [path.strip() for path in checkpoints.split(",") if path.strip()]
    folders = [str(Path(path).parent) for path in paths]
    rows = [name.strip() for name in names.split(",")] if names else folders if len({*folders}) == len(paths) else paths
    check(paths, "checkpoints is empty: files of train_dit.py, separated by commas")
    check(len(rows) == len(paths), f"names={names}: {len(rows)} names for {len(paths)} checkpoints")
    runtime.check_positive(globals(), "per_class")
    known = [runtime.load_checkpoint(path, "checkpoints", kind="dit")["classes"] for path in paths]
    check(all(each == known[0] for each in known), "checkpoints: they were trained on different classes")
    chosen = classes or ",".join(map(str, range(min(10, len(known[0])))))
    runtime.make_folder(Path(out).parent, constant="out")
    count, images = per_class * len(chosen.split(",")), []
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            given = {name: constants[name] for name in ("cfg_scale", "steps", "seed", "device", "dtype")}
            given |= {"checkpoint": path, "classes": chosen, "num_samples": count, "out_dir": folder}
            done = subprocess.run([sys.executable, ROOT / "sample.py", *(f"--{k}={v}" for k, v in given.items())])
            check(done.returncode == 0, f"sample.py could not draw from {path}")
            with np.load(f"{folder}/samples.npz") as file:
                images.append(file["arr_0"])
                labels = file["arr_1"]
    check(len({each.shape for each in images}) == 1, "checkpoints: they draw images of different sizes")
    order = labels.argsort(kind="stable")  # the samples of a class beside each other
    pixels = torch.from_numpy(np.concatenate([each[order] for each in images]))
    data.save_grid(out, pixels, len(order), [known[0][k] for k in labels[order]], rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
