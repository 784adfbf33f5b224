"""Images on disk, as people have them: a folder for each class, one for all, ImageNet as Kaggle packs it, or an .npz.

    ImageFolder     a source: len(), classes, labels, load(i) -> a PIL image in RGB, name(i), constant, fingerprint()
    find_split      data_dir/train/, or data_dir/ILSVRC/Data/CLS-LOC/train/
    flat_classes    the classes of ImageNet's flat val/, from the table or the development kit that comes with it
    files_below     what is in a folder
    Npz, open_images, side_of    what eval.py compares: a folder of squares, or an .npz as sample.py writes it
"""
import csv
import hashlib
import os
import struct
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import check, fail

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}
HIDDEN = ".", "@eaDir", "__MACOSX"  # prefixes of names that a Mac or a file server adds
KAGGLE = "ILSVRC/Data/CLS-LOC"  # where Kaggle's archive has train/ and val/
KAGGLE_TABLE = "LOC_val_solution.csv"  # beside ILSVRC/; a row is ImageId, then a WordNet ID and a box: n01751748 111 …
DEVKIT = "ILSVRC2012_devkit_t12/data"  # ILSVRC's own: class numbers in the order of the files, and what they stand for


class ImageFolder:
    """All images (JPEG, PNG, WebP) below `root`, sorted by path. Its subfolders are the classes, in alphabetical order
    as in ImageNet. Without subfolders `flat_classes` tells them; with by_class=False there is only one, "".
    constant: the script's constant that named the folder."""

    def __init__(self, root, constant="data_dir", by_class=True):
        self.root, self.constant, self.paths, self.labels = root, constant, [], []
        folders = {}
        for entry in os.scandir(root) if by_class else ():
            if entry.is_dir() and not entry.name.startswith(HIDDEN):
                folders[unicodedata.normalize("NFC", entry.name)] = entry  # é has two forms
        folders = folders or {"": root}
        self.classes, others = sorted(folders), []
        for label, name in enumerate(self.classes):
            try:
                files = sorted(files_below(folders[name]))
            except OSError as error:
                fail(f"{constant}: {error.filename} can't be read: {error.strerror}", everywhere=False)
            found = [path for path in files if Path(path).suffix.lower() in EXTENSIONS]
            check(found, f"{constant}: the folder {Path(root, name)} holds no images ({', '.join(sorted(EXTENSIONS))})")
            self.paths += found
            self.labels += [label] * len(found)
            others += [Path(path).suffix.lower() or "others" for path in set(files) - set(found)]
        if self.classes != [""]:  # images beside the class folders are of no class
            suffixes = [Path(entry.name).suffix.lower() for entry in os.scandir(root)
                        if entry.is_file() and not entry.name.startswith(HIDDEN)]
            others += [f"{suffix} beside the class folders" for suffix in suffixes if suffix in EXTENSIONS]
        elif by_class:
            self.classes, self.labels = flat_classes(root, self.paths)
        if others and os.environ.get("RANK", "0") == "0":
            print(f"{constant}: left out of {root}:", ", ".join(f"{others.count(k)} {k}" for k in sorted({*others})))

    def __len__(self):
        return len(self.paths)

    def load(self, i, short_side=0):
        """Image i in RGB; raises if it can't be decoded. With `short_side`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its
        size if its short side keeps that many pixels, which is much faster."""
        image = Image.open(self.paths[i])
        if short_side:
            image.draft(None, (short_side, short_side))
        return to_rgb(image)

    def name(self, i):
        return self.paths[i]

    def fingerprint(self):
        """A hash of the paths below the root and of the sizes of a thousand files or more, evenly spread: it changes
        when files are added, removed or renamed, or all made anew."""
        parts = [path[len(str(self.root)):] for path in self.paths]
        some = self.paths[::max(1, len(self) // 1000)]
        parts += [str(os.path.getsize(path)) for path in some if os.path.exists(path)]
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def to_rgb(image):
    """Grey, 16-bit grey, CMYK, palette and alpha images -> RGB; transparent pixels become white."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def find_split(data_dir, names):
    """The first folder of those `names`, as ("val", "test"), in data_dir or where Kaggle puts it; None without one."""
    folders = [Path(data_dir, part, name) for part in ("", KAGGLE) for name in names]
    return next((folder for folder in folders if folder.is_dir()), None)


def flat_classes(folder, paths):
    """Class names and each image's label, of a folder without class folders. They come from the table or the kit that
    lies beside it or up to three levels above; without either all images are of one class, ""."""
    class_of, stems = {}, [Path(path).stem for path in paths]
    for place in Path(folder).absolute().parents[:4]:
        if (place / KAGGLE_TABLE).is_file():
            with open(place / KAGGLE_TABLE, encoding="utf-8", newline="") as file:
                class_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        elif (place / DEVKIT).is_dir():
            from scipy.io import loadmat
            synsets = loadmat(place / DEVKIT / "meta.mat", squeeze_me=True)["synsets"]
            wordnet_id = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()))
            numbers = (place / DEVKIT / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
            class_of = {f"ILSVRC2012_val_{k:08}": wordnet_id[int(number)] for k, number in enumerate(numbers, 1)}
        if class_of.keys() & set(stems):  # a table of other images says nothing
            unknown = next((path for path, stem in zip(paths, stems) if stem not in class_of), None)
            check(not unknown, f"data_dir: {place} has no class for {unknown}")
            classes = sorted(set(class_of.values()))
            label_of = {name: label for label, name in enumerate(classes)}
            return classes, [label_of[class_of[stem]] for stem in stems]
    return [""], [0] * len(paths)


def files_below(root, parents=()):
    """Paths of all regular files below `root`. Links are followed, except in a circle; HIDDEN names are left out."""
    parents = *parents, os.path.realpath(root)
    for entry in os.scandir(root):
        if entry.is_file() and not entry.name.startswith(HIDDEN):
            yield entry.path
        elif entry.is_dir() and not entry.name.startswith(HIDDEN) and os.path.realpath(entry) not in parents:
            yield from files_below(entry.path, parents)


# ----------------------------------------------------------------------------------------------------------------------
# A folder or an .npz file, as eval.py compares them


class Npz:
    """The images arr_0, uint8 (N, H, H, 3), of an .npz file, memory-mapped, so that a large file takes no memory."""

    def __init__(self, path, constant):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            check("arr_0.npy" in names, f"{constant}={path} has no arr_0 but {', '.join(names[:5]) or 'nothing'}")
            member = archive.getinfo("arr_0.npy")
        check(member.compress_type == zipfile.ZIP_STORED,
              f"{constant}={path} is compressed; write it with numpy.savez instead of savez_compressed")
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)  # past the member's name and extra field
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = read(file)
            square = len(shape) == 4 and shape[0] and shape[1] == shape[2] and shape[3] == 3
            check(kind == np.uint8 and square and not fortran, f"{constant}={path}: arr_0 is {kind} {shape} in "
                  f"{'Fortran' if fortran else 'C'} order; it must be uint8 (N, H, H, 3) in C order")
            self.images = np.memmap(path, kind, "r", file.tell(), shape)
        self.root, self.constant = path, constant

    def __reduce__(self):  # workers that are not forked get the path, not the contents
        return Npz, (self.root, self.constant)

    def __len__(self):
        return len(self.images)

    def load(self, i):
        return Image.fromarray(self.images[i])

    def name(self, i):
        return f"{self.root}[{i}]"


def open_images(path, constant):
    """The images at `path`, the value of the constant that is called `constant`."""
    check(os.path.exists(path), f"{constant}={path}: there is no such folder of images or .npz file")
    if os.path.isdir(path):
        return ImageFolder(path, constant, by_class=False)
    check(zipfile.is_zipfile(path), f"{constant}={path} is neither a folder nor a whole .npz file")
    return Npz(path, constant)


def side_of(images):
    """The side of the images, pixels; they must be squares of one size."""
    if isinstance(images, Npz):
        return images.images.shape[1]
    sizes = set()
    for path in images.paths:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
        except Exception:  # undecodable files are reported when they are measured
            pass
    check(sizes, f"{images.constant}: none of {len(images)} images can be decoded, {images.paths[0]} to begin with")
    check(len(sizes) == 1 and len(set(*sizes)) == 1, f"{images.constant}={images.root}: images must be squares of one "
          f"size, but there are some of {', '.join(f'{w} × {h}' for w, h in sorted(sizes)[:5])} pixels")
    return sizes.pop()[0]
