"""CIFAR-10 as PNG files, in cifar10/train/CLASS/ and cifar10/test/CLASS/.

    python runs/cifar10.py                                     # downloads 170 MB
    python runs/cifar10.py --archive=cifar-10-binary.tar.gz    # that is here already
"""
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

import pretrained
import runtime

archive = ""  # the file, if it is here already
out_dir = "cifar10"

URL, SHA256 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a"
FOLDER = "cifar-10-batches-bin"  # in the archive
FILES = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


def main():
    runtime.configure(globals())
    dist = runtime.Distributed("cpu", "float32", saves=False)
    try:
        path = archive or pretrained.download_weights(URL, SHA256, dist)
        with tarfile.open(path) as tar:
            classes = tar.extractfile(f"{FOLDER}/batches.meta.txt").read().decode().split()
            parts = {split: b"".join(tar.extractfile(f"{FOLDER}/{file}").read() for file in files)
                     for split, files in FILES.items()}
    except pretrained.MissingWeights as error:
        runtime.fail(error)
    except (OSError, KeyError, tarfile.TarError) as error:
        runtime.fail(f"archive={archive} can't be used as {URL.rsplit('/', 1)[1]}: {error}")
    for split, content in parts.items():
        for name in classes:
            runtime.make_folder(Path(out_dir, split, name))
        rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, then red, green, blue
        for i, row in enumerate(runtime.bar(rows, dist, desc=split)):
            pixels = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)  # (32, 32, 3)
            Image.fromarray(pixels).save(Path(out_dir, split, classes[row[0]], f"{i:05}.png"))
        dist.print(f"wrote {out_dir}/{split}: {len(rows)} images of {len(classes)} classes")


if __name__ == "__main__":
    main()
