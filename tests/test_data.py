"""Images in: what is on disk becomes the right RGB, every fault is one clear line, every step has its own images."""
import contextlib
import os
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import skimage.data
import torch
import torchvision.transforms.functional as torchvision
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import data
import latents
import runtime
import shapes
import ssl
from train_tokenizer import Views


def process(rank=0, count=1):
    """A process among others, without torch.distributed; what it prints is in `lines`."""
    lines = []
    return SimpleNamespace(rank=rank, count=count, first=rank == 0, device=torch.device("cpu"), lines=lines,
                           print=lambda *words: lines.append(" ".join(words)), gather=lambda items: items,
                           sum=lambda tensor: tensor, stop=False, stop_requested=lambda: False, wait=lambda: None,
                           autocast=contextlib.nullcontext, check_same=lambda values: None)


def failure(call, *arguments):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def photo(width, height, seed=0):
    """Smooth noise with some detail, RGB."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


# ----------------------------------------------------------------------------------------------------------------------
# The built-in shapes


def test_shapes_are_drawn_from_the_index_alone():
    """Any process, in any order, at any time: the same image; another split or index: another image."""
    source = data.Shapes("train", 40, 32)
    images = [np.asarray(source.load(i)) for i in range(40)]
    again = data.Shapes("train", 40, 32)
    assert all(np.array_equal(images[i], np.asarray(again.load(i))) for i in (39, 0, 17))
    val = [np.asarray(data.Shapes("val", 40, 32).load(i)) for i in range(40)]
    assert len({image.tobytes() for image in images + val}) == 80, "no image is in both splits, none is there twice"
    assert {image.shape for image in images} == {(32, 32, 3)}


def test_shapes_are_balanced_and_labelled():
    """At least ten classes, each as often as any other, in both splits."""
    for split in "train", "val":
        source = data.Shapes(split, 600, 16)
        assert len(source) == len(source.labels) == 600 and len(source.classes) >= 10
        assert np.bincount(source.labels).tolist() == [600 // len(source.classes)] * len(source.classes)


def test_classes_are_told_apart_by_shape_alone():
    """Same colour, place, size and angle: every pair of stencils differs, beyond a turn that would make them equal."""
    stencils = []
    for name in data.Shapes.classes:
        stencil = np.asarray(shapes.draw_shape(name, 128, (0.5, 0.5), 0.35, 0.2)) > 127
        assert 0.03 < stencil.mean() < 0.5 and not stencil[0].any() and not stencil[:, 0].any()
        centre = np.hypot(*(np.mgrid[:128, :128] - 63.5))
        stencils.append(np.array([stencil[(centre >= r) & (centre < r + 8)].mean() for r in range(0, 48, 8)]))  # radial
    for i in range(len(stencils)):
        for j in range(i):
            assert np.abs(stencils[i] - stencils[j]).max() > 0.03, (data.Shapes.classes[i], data.Shapes.classes[j])


def test_shapes_stand_upright():
    """Untilted, each is its own mirror image, as training mirrors images; four change upside down."""
    for name in data.Shapes.classes:
        stencil = np.asarray(shapes.draw_shape(name, 128, (0.5, 0.5), 0.4, 0.0), float) / 255
        mirrored, flipped = (np.abs(stencil - np.flip(stencil, axis)).mean() < 0.01 for axis in (1, 0))
        assert mirrored and flipped == (name not in ("half disc", "crescent", "triangle", "star")), name
        upper, lower = stencil[:64].sum(), stencil[64:].sum()
        assert name != "half disc" or lower < 0.05 * upper
        assert name not in ("crescent", "triangle") or upper < 0.9 * lower
        assert name != "star" or stencil[15, 64] == 1  # its point


def test_shapes_tilt_a_little_to_both_sides(monkeypatch):
    angles, draw_shape = [], shapes.draw_shape
    monkeypatch.setattr(shapes, "draw_shape", lambda *given: angles.append(given[-1]) or draw_shape(*given))
    source = data.Shapes("train", 100, 16)
    for i in range(100):
        source.load(i)
    assert -np.pi / 12 <= min(angles) < -0.2 and 0.2 < max(angles) <= np.pi / 12


def test_shapes_stand_out_from_their_background():
    """Colour, place and background vary, and the shape can be seen: otherwise a class is not in the image."""
    images = np.stack([np.asarray(data.Shapes("train", 100, 32).load(i), float) for i in range(100)])
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)  # (100, 3), the background
    assert np.abs(images - corners[:, None, None]).sum(-1).max((1, 2)).min() > 80
    assert corners.std(0).min() > 30


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes of two images each."""
    for split in "train", "val":
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                photo(20, 24, seed=10 * k + i).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_images_of_every_kind_become_rgb_of_the_right_colour(tmp_path):
    """ImageNet itself holds grey and CMYK JPEGs and a PNG; others' folders hold the rest. Transparent becomes white."""
    orange = (200, 120, 40)
    expected = {}

    def add(name, image, rgb, **options):
        (tmp_path / "class").mkdir(exist_ok=True)
        image.save(tmp_path / "class" / name, **options)
        expected[name] = rgb

    rgb = Image.new("RGB", (16, 16), orange)
    add("rgb.png", rgb, orange)
    add("rgb.JPEG", rgb, orange, quality=95)
    add("rgb.webp", rgb, orange, lossless=True)
    add("grey.jpg", Image.new("L", (16, 16), 90), (90, 90, 90), quality=95)
    add("grey.png", Image.new("L", (16, 16), 90), (90, 90, 90))
    add("black-and-white.png", Image.new("1", (16, 16), 1), (255, 255, 255))
    add("cmyk.jpg", rgb.convert("CMYK"), orange, quality=95)
    add("palette.png", rgb.convert("P", palette=Image.ADAPTIVE), orange)
    add("alpha.png", Image.new("RGBA", (16, 16), orange + (255,)), orange)
    add("half.png", Image.new("RGBA", (16, 16), orange + (128,)), tuple((c * 128 + 255 * 127) / 255 for c in orange))
    add("clear.webp", Image.new("RGBA", (16, 16), (0, 0, 0, 0)), (255, 255, 255), lossless=True)
    add("grey-alpha.png", Image.new("LA", (16, 16), (90, 0)), (255, 255, 255))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, *orange])
    add("palette-clear.png", palette, (255, 255, 255), transparency=1)
    palette = palette.copy()
    add("palette-opaque.png", palette, orange, transparency=0)
    add("grey16.png", Image.fromarray(np.full((16, 16), 90 * 256 + 17, np.uint16)), (90, 90, 90))
    add("white16.png", Image.fromarray(np.full((16, 16), 65535, np.uint16)), (255, 255, 255))
    (tmp_path / "class" / "notes.txt").write_text("not an image")

    source = data.ImageFolder(tmp_path)
    assert len(source) == len(expected), "every image is found, whatever the case of its extension; other files are not"
    for i in range(len(source)):
        name, image = source.name(i).rsplit("/", 1)[1], source.load(i)
        assert image.mode == "RGB" and image.size == (16, 16)
        difference = np.abs(np.asarray(image, float) - np.array(expected[name])).max()
        assert difference <= (4 if name.lower().endswith(("jpg", "jpeg")) else 1), name


def test_exif_orientation_is_ignored(tmp_path):
    """As by torchvision's ImageFolder and ADM's evaluation: statistics and published models are of such images."""
    (tmp_path / "class").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    photo(24, 16).save(tmp_path / "class" / "turned.jpg", exif=exif)
    assert data.ImageFolder(tmp_path).load(0).size == (24, 16)


@pytest.fixture
def large_jpeg(tmp_path):
    """A folder with one JPEG of 1600 × 1200."""
    (tmp_path / "class").mkdir()
    photo(1600, 1200).save(tmp_path / "class" / "large.jpg", quality=90)
    return tmp_path


def test_a_jpeg_is_decoded_no_larger_than_needed(large_jpeg):
    """At 1/2, 1/4 or 1/8, never so that its shorter side falls below what is asked for; other formats as they are."""
    source = data.ImageFolder(large_jpeg)
    sizes = {short_side: source.load(0, short_side).size for short_side in (0, 1, 150, 151, 300, 301, 600, 601, 5000)}
    assert sizes == {0: (1600, 1200), 1: (200, 150), 150: (200, 150), 151: (400, 300), 300: (400, 300),
                     301: (800, 600), 600: (800, 600), 601: (1600, 1200), 5000: (1600, 1200)}
    source.load(0).convert("L").save(large_jpeg / "class" / "grey.jpg")
    source.load(0).convert("CMYK").save(large_jpeg / "class" / "other.jpg")
    source.load(0, 150).save(large_jpeg / "class" / "still.png")
    source = data.ImageFolder(large_jpeg)
    for i, size in enumerate([(400, 300), (400, 300), (400, 300), (200, 150)]):
        image = source.load(i, 300 if i < 3 else 50)
        assert image.size == size and image.mode == "RGB", source.name(i)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("scale", [2, 4])
def test_crops_of_a_jpeg_decoded_smaller_are_nearly_the_same(name, scale, tmp_path):
    """Of photographs, the same boxes at the same size, which is at most the box's own: 2 of 255 levels."""
    (tmp_path / "class").mkdir()
    Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / "class" / "photograph.jpg", quality=90)
    source = data.ImageFolder(tmp_path)
    whole = np.array(source.load(0))
    smaller = np.array(source.load(0, len(whole) // scale))
    height, width, _ = smaller.shape
    assert height == len(whole) // scale
    rng, size, differences = np.random.default_rng(0), height // 2, []
    for _ in range(40):
        h, w = rng.integers(size, height + 1), rng.integers(size, width + 1)
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        ours = data.resize(smaller[top:top + h, left:left + w], size)
        box = np.s_[scale * top:scale * (top + h), scale * left:scale * (left + w)]
        differences.append(np.abs(ours - data.resize(whole[box], size).astype(float)).mean())
    assert np.mean(differences) <= 2 and np.max(differences) <= 2.5


def test_training_asks_for_small_jpegs_and_evaluation_for_whole_ones(large_jpeg):
    """What a step's views need decides: with the paper's, a photograph as in ImageNet is decoded whole, one of a camera
    at a quarter. Without self-supervision the crop to reconstruct is all there is."""
    multi_crop = ssl.MultiCrop(224, (0.25, 1.0), 96, (0.05, 0.25), 10, 16)
    views, alone = Views(multi_crop), Views(None)
    assert 375 < views.short_side == multi_crop.short_side < 3000 / 4 and views.image_size == alone.short_side == 256
    source = data.ImageFolder(large_jpeg)

    for short_side, (width, height) in (500, (800, 600)), (0, (1600, 1200)):
        views, bad = data.TrainBatches(source, lambda image, rng: image.size, seed=0, short_side=short_side)[[(0, 0)]]
        assert (*views, bad) == (width, height, [])
    crops, _, _ = data.CenterCrops(source, 64)[[0]]
    np.testing.assert_array_equal(crops[0], adm_center_crop(Image.open(source.name(0)), 64))


def test_classes_are_the_folders_in_alphabetical_order(folder):
    """As in torchvision and everywhere else, so that labels mean the same; images may lie deeper."""
    (folder / "train" / "ant" / "deep" / "er").mkdir(parents=True)
    photo(8, 8).save(folder / "train" / "ant" / "deep" / "er" / "x.png")
    source = data.open_split(folder, "train", 32, 0)
    assert source.classes == ["ant", "cat", "dog"] and source.labels == [0, 1, 1, 2, 2]


def test_what_a_folder_holds(folder, capsys):
    """Links are followed at every depth, but not in a circle; what a Mac or a file server adds is no class and no
    image; a pipe is no file; what else is no image, or is of no class, is counted. One class, whichever way its é is
    written."""
    train, elsewhere = folder / "train", folder / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    photo(8, 8).save(elsewhere / "deep" / "a.png")
    (train / "eel").symlink_to(elsewhere)
    (train / "cat" / "more").symlink_to(elsewhere)
    (train / "cat" / "itself").symlink_to(train / "cat")
    photo(8, 8).save(train / "beside.png")
    (elsewhere / "deep" / "circle").symlink_to(elsewhere)
    (elsewhere / "deep" / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(train / "dog" / "pipe.jpg")
    for name in ".thumbs", "@eaDir", "__MACOSX":
        for place in train, train / "dog":
            shutil.copytree(elsewhere / "deep", place / name, symlinks=True)
    for name in "._0.png", "a.bmp", "b.BMP", "c.avif", "d":
        (train / "dog" / name).write_bytes(b"")
    source = data.open_split(folder, "train", 32, 0)
    assert source.classes == ["cat", "dog", "eel"]
    assert [path.removeprefix(f"{train}/") for path in source.paths] == [
        "cat/0.png", "cat/1.png", "cat/more/deep/a.png", "dog/0.png", "dog/1.png", "eel/deep/a.png"]
    printed = capsys.readouterr().out
    assert printed == f"data_dir: left out of {train}: 1 .avif, 2 .bmp, 1 .png beside the class folders, 1 others\n"
    assert len(data.ImageFolder(train, by_class=False)) == 7
    (train / "cat").rename(train / unicodedata.normalize("NFC", "café"))
    (folder / "val" / "cat").rename(folder / "val" / unicodedata.normalize("NFD", "café"))
    (folder / "val" / "eel").symlink_to(elsewhere)
    assert data.open_splits(folder, 32, 0)[1].classes == [unicodedata.normalize("NFC", "café"), "dog", "eel"]


@pytest.mark.parametrize("table", ["Kaggle's", "the development kit's", "none"])
def test_imagenet_as_kaggle_packs_it(tmp_path, table):
    """Its val/ is flat; whichever table lies beside it says the classes, and without one nothing is guessed."""
    inside = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    (inside / "val").mkdir(parents=True)
    wanted = {1: "n02", 2: "n01", 3: "n02"}
    for k, name in wanted.items():
        photo(8, 8).save(inside / "val" / f"ILSVRC2012_val_{k:08}.JPEG")
        (inside / "train" / name).mkdir(parents=True, exist_ok=True)
        photo(8, 8).save(inside / "train" / name / f"{name}_{k}.JPEG")
    if table == "Kaggle's":
        rows = [f"ILSVRC2012_val_{k:08},{name} 85 1 499 272" for k, name in sorted(wanted.items(), reverse=True)]
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    elif table == "none":
        assert "LOC_val_solution.csv" in failure(data.open_splits, tmp_path, 32, 0)
        return
    else:
        kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        kit.mkdir(parents=True)
        synsets = np.array([(7, "n02", "cat"), (9, "n01", "dog"), (1001, "n00", "animal")],
                           [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
        scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("7\n9\n7\n")
    for root in tmp_path, inside:  # the archive's folder, or the one that holds train/ and val/
        train, val = data.open_splits(root, 32, 0)
        assert train.classes == val.classes == ["n01", "n02"]
        assert [val.classes[label] for label in val.labels] == list(wanted.values())
    photo(8, 8).save(inside / "val" / "other.JPEG")
    assert "has no class for" in failure(data.open_splits, tmp_path, 32, 0)


def test_a_folder_that_can_not_be_read_is_one_line(folder, monkeypatch):
    """As the operating system says it. (Tests may run as root, who may read everything.)"""
    scandir = os.scandir

    def refuse(path):
        if str(getattr(path, "path", path)).endswith("dog"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = failure(data.open_split, folder, "train", 32, 0)
    assert message == f"error: data_dir: {folder / 'train' / 'dog'} can't be read: Permission denied"


def test_images_without_classes_are_one_class(tmp_path):
    for split, count in ("train", 3), ("val", 2):
        (tmp_path / split).mkdir()
        for k in range(count):
            photo(8, 8).save(tmp_path / split / f"{k}.png")
    train, val = data.open_splits(tmp_path, 32, 0)
    assert train.classes == val.classes == [""] and train.labels == [0, 0, 0] and val.labels == [0, 0]


def test_validation_images_may_stand_in_val_or_test(folder):
    """ImageNet says val, CIFAR-10 says test."""
    assert len(data.open_split(folder, "val", 32, 0)) == 4
    (folder / "val").rename(folder / "test")
    source = data.open_split(folder, "val", 32, 0)
    assert len(source) == 4 and "/test/" in source.name(0)


def test_every_fault_of_the_folder_is_one_line_that_names_data_dir(folder):
    """What a person sees at the first try with their own images."""
    file = folder / "train" / "cat" / "0.png"
    assert "no such folder" in failure(data.open_split, str(file), "train", 32, 0)
    assert "no such folder" in failure(data.open_split, str(folder / "nowhere"), "train", 32, 0)
    assert "shapes" in failure(data.open_split, "imagenet", "train", 32, 0)
    assert "train/" in failure(data.open_split, str(folder / "train"), "train", 32, 0)
    assert "val/" in failure(data.open_split, str(folder / "train"), "val", 32, 0)
    (folder / "empty" / "train").mkdir(parents=True)
    assert str(folder / "empty" / "train") in failure(data.open_split, str(folder / "empty"), "train", 32, 0)
    (folder / "train" / "eel").mkdir()
    no_images = failure(data.open_split, str(folder), "train", 32, 0)
    assert str(folder / "train" / "eel") in no_images and ".png" in no_images
    photo(8, 8).save(folder / "train" / "eel" / "x.png")
    missing = failure(data.open_splits, str(folder), 32, 0)
    (folder / "train" / "eel").rename(folder / "val" / "eel")
    spare = failure(data.open_splits, str(folder), 32, 0)
    assert "eel" in missing and "validation" in missing and "eel" in spare and "training" in spare
    for message in [no_images, missing, spare, failure(data.open_split, "", "train", 32, 0)]:
        assert "data_dir" in message


# ----------------------------------------------------------------------------------------------------------------------
# Files that can't be used


def test_undecodable_files_are_replaced_by_others_and_named(folder):
    """Truncated, empty or no image at all: training goes on with another image, the same one in every run."""
    broken = folder / "train" / "cat" / "0.png"
    for content in broken.read_bytes()[:90], b"", b"not an image":
        broken.write_bytes(content)
        source = data.open_split(folder, "train", 32, 0)
        others = [np.asarray(source.load(i)).tobytes() for i in range(1, 4)]
        dataset = data.TrainBatches(source, lambda image, rng: np.array(image), seed=0)
        replacements = set()
        for epoch in range(8):
            pixels, bad = dataset[[(epoch, 0)]]
            assert pixels.numpy().tobytes() in others and {name for name, _ in bad} == {str(broken)}
            assert torch.equal(dataset[[(epoch, 0)]][0], pixels)
            replacements.add(pixels.numpy().tobytes())
        assert len(replacements) > 1
        pixels, bad = dataset[[(0, 1)]]
        assert pixels.numpy().tobytes() == others[0] and bad == []
    pixels, indices, bad = data.CenterCrops(source, 16)[[0, 1, 2, 3]]  # evaluation leaves it out: none counts twice
    assert pixels.shape == (3, 16, 16, 3) and indices.tolist() == [1, 2, 3] and bad[0][0] == str(broken)


def test_bad_files_are_named_once_and_stop_the_run_above_one_percent():
    """1 % exactly goes on; one more ends it with the list."""
    here, reported = process(), {}

    def report(*bad):
        data.report_bad_files(data.Shapes("train", 200, 32), 200, bad, reported, here)

    report(("b.png", "empty"), ("a.png", "cut off"), ("b.png", "empty"))
    report(("a.png", "another reason"))
    report()
    assert len(here.lines) == 2 and "a.png can't be used and is left out (cut off)" in here.lines[0]
    assert "b.png" in here.lines[1]
    message = failure(report, ("a.png", "cut off"), ("c.png", "no access"))
    assert all(word in message for word in ("data_dir", "3 of 200", "a.png (cut off), b.png (empty), c.png (no access)"))
    message = failure(report, *((f"{k:03}.png", "empty") for k in range(90)))
    assert "93 of 200" in message and message.count(".png") == 10 and message.endswith(" and 83 more")


def test_a_view_that_fails_makes_a_bad_file(folder):
    """Whatever its picture is like: the run knows the file and the reason, and goes on with another one."""
    def view(image, rng):
        if image.size == (20, 24):
            raise MemoryError("a picture of this shape")
        return np.array(image)

    photo(24, 24).save(folder / "train" / "cat" / "2.png")
    source = data.open_split(folder, "train", 32, 0)
    pixels, bad = data.TrainBatches(source, view, 0)[[(0, 0), (0, 2)]]
    assert pixels.shape == (2, 24, 24, 3) and (source.name(0), "MemoryError: a picture of this shape") in bad
    loader = data.TrainLoader(source, lambda image, rng: view, 2, 0, 2, 0, process(), collate=None)
    loader.batches = iter([(None, bad)])
    assert f"{bad[0][0]} MemoryError: a picture of this shape" in failure(next, loader)


def test_a_strip_is_cropped_before_it_is_enlarged():
    """One pixel wide and 65,000 long: at the width of 256 it would have four billion pixels."""
    strip = Image.new("RGB", (1, 65000), "red")
    strip.paste("blue", (0, 32400, 1, 32600))
    for image in strip, strip.transpose(Image.Transpose.ROTATE_90):
        assert (data.center_crop(image, 256) == (0, 0, 255)).all()


def test_loading_processes_beyond_reason_are_refused():
    source = data.Shapes("train", 8, 32)
    assert "workers=100000 " in failure(data.TrainLoader, source, to_pixels, 2, 0, 2, 0, process(), to_pixels, 0, 1,
                                        100000)
    assert "workers=100000 " in failure(list, data.eval_loader(source, 16, 2, process(), 100000))


@pytest.mark.parametrize("workers", [0, 1])
def test_both_loaders_report_what_they_could_not_decode(folder, workers):
    """Training when it is asked to, evaluation at its end; both stop, since one of four is too many. A source of nothing
    else does not keep training in search of a replacement."""
    broken = folder / "train" / "cat" / "0.png"
    broken.write_bytes(b"")
    source = data.open_split(folder, "train", 32, 0)
    loader = data.TrainLoader(source, to_pixels, 2, 0, 2, 0, process(), workers=workers)
    assert len(list(loader)) == 2 and 0 < loader.waited() < 60 and loader.waited() == 0
    assert f"1 of 4 images can't be used, over 1%: {broken}" in failure(loader.report_bad_files)
    assert f"1 of 4 images can't be used, over 1%: {broken}" in \
        failure(list, data.eval_loader(source, 16, 2, process(), workers))
    for path in source.paths:
        open(path, "w").close()
    message = failure(next, data.TrainLoader(source, to_pixels, 2, 0, 2, 0, process(), workers=workers))
    assert "data_dir" in message and any(path in message for path in source.paths)


def to_pixels(image, rng):
    return {"images": np.array(image)}


def test_evaluation_breaks_off_when_it_is_told_to_stop():
    """After the batch it is at; a process that got no signal learns of it at its own end."""
    source, signalled, other = data.Shapes("val", 12, 16), process(), process()
    signalled.stop_requested = other.stop_requested = lambda: True
    for dist, batches in (signalled, 1), (other, 3):
        seen, loader = [], data.eval_loader(source, 16, 4, dist)
        with pytest.raises(runtime.Stopped):
            for _, indices in loader:
                seen.append(indices.tolist())
                signalled.stop = True
        assert len(seen) == batches


def test_validation_leaves_out_what_it_can_not_decode(folder, tmp_path):
    """From the mean and from the picture of eight; of fewer images than eight it shows all."""
    for k in range(200):
        photo(20, 24, seed=k).save(folder / "val" / "cat" / f"{k:03}.png")
    source, picture = data.open_split(folder, "val", 16, 0), tmp_path / "picture.png"
    open(source.paths[0], "w").close()

    def darker(images):
        return (images - 20 / 127.5).clamp(-1, 1)

    assert 22 < data.validate(darker, source, 16, 0, process(), picture) < 23
    assert Image.open(picture).size == (7 * 98, 2 * 98)
    assert "1 of 3" in failure(data.validate, darker, source, 16, 3, process(), picture)
    data.validate(darker, data.Shapes("val", 3, 16), 16, 0, process(), picture)
    assert Image.open(picture).size == (3 * 98, 2 * 98)


# ----------------------------------------------------------------------------------------------------------------------
# Order


def steps_of(order, accumulate=1):
    """The batches of a training_order, micro-batches joined: a list of lists of (epoch, i)."""
    parts = list(order)
    return [sum(parts[k:k + accumulate], []) for k in range(0, len(parts), accumulate)]


def test_every_number_of_processes_sees_the_same_global_batches():
    """One GPU or eight, accumulating or not: step k is about the same images, each on exactly one process."""
    alone = steps_of(data.training_order(50, 8, 0, 15, seed=3))
    for count, accumulate in (2, 1), (1, 2), (4, 2), (8, 1):
        shares = [steps_of(data.training_order(50, 8, 0, 15, 3, rank, count, accumulate), accumulate)
                  for rank in range(count)]
        for step, batch in enumerate(alone):
            together = sum((share[step] for share in shares), [])
            assert sorted(together) == sorted(batch)
            assert {len(share[step]) for share in shares} == {8 // count}


def test_each_epoch_is_a_new_permutation():
    """No image twice in an epoch; 50 images make 6 batches of 8, and the two left out differ between epochs."""
    steps = steps_of(data.training_order(50, 8, 0, 18, seed=3))
    epochs = [sum(steps[6 * e:6 * e + 6], []) for e in range(3)]
    for number, items in enumerate(epochs):
        assert {epoch for epoch, _ in items} == {number}
        images = [i for _, i in items]
        assert len(set(images)) == 48 and set(images) <= set(range(50)) and images != sorted(images)
    assert len({tuple(i for _, i in items) for items in epochs}) == 3
    assert len({frozenset(i for _, i in items) for items in epochs}) > 1
    assert steps_of(data.training_order(50, 8, 0, 6, seed=4)) != steps[:6]


def test_starting_in_the_middle_gives_the_tail_of_the_whole_run():
    """A resumed run goes on where it stopped, within an epoch or between two."""
    whole = steps_of(data.training_order(50, 8, 0, 15, seed=3))
    for start in (1, 6, 10, 15):
        assert steps_of(data.training_order(50, 8, start, 15, seed=3)) == whole[start:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_gives_the_same_tensors(workers):
    """Augmentation included, and without regard to the workers: (seed, epoch, image) decides everything random."""
    views = Views(ssl.MultiCrop(16, (0.25, 1.0), 8, (0.05, 0.25), 2, 4))
    views.image_size = 16
    source = data.Shapes("train", 12, 16)
    whole = list(data.TrainLoader(source, views, 4, 0, 6, 0, process(), views.collate))
    tail = list(data.TrainLoader(source, views, 4, 4, 6, 0, process(), views.collate, workers=workers))
    for expected, got in zip(whole[4:], tail, strict=True):
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(whole[0]["images"], whole[3]["images"])


def test_loading_warns_of_nothing(recwarn):
    """A warning per worker and epoch would push the bar off the screen; torch shows most of its own only once."""
    views = Views(ssl.MultiCrop(16, (0.25, 1.0), 8, (0.05, 0.25), 2, 4))
    views.image_size = 24
    torch.set_warn_always(True)
    try:
        list(data.TrainLoader(data.Shapes("train", 8, 32), views, 4, 0, 2, 0, process(), views.collate))
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_takes_each_image_once(count):
    """Shared by all processes, none dropped, none twice; a part of them is spread evenly over the classes."""
    source = data.Shapes("val", 35, 16)
    for wanted, images in (35, 0), (35, 100), (20, 20), (1, 1):
        loaders = [data.eval_loader(source, 16, 4, process(rank, count), images=images) for rank in range(count)]
        seen = {i: pixels for loader in loaders for batch, indices in loader
                for i, pixels in zip(indices.tolist(), batch, strict=True)}
        assert len(seen) == wanted and len({pixels.numpy().tobytes() for pixels in seen.values()}) == wanted
        assert all(np.array_equal(pixels, data.center_crop(source.load(i), 16)) for i, pixels in seen.items())


# ----------------------------------------------------------------------------------------------------------------------
# From image to tensor and back


def adm_center_crop(image, size):
    """What ADM's evaluation does, step by step (guided-diffusion, center_crop_arr)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 45), (61, 40), (20, 50), (128, 128), (70, 64), (131, 97),
                                           (65, 64), (99, 200), (129, 259)])
def test_center_crop_is_adm_s(width, height):
    """Reference statistics for FID come from images that were cropped like this; a shift by a pixel shows in PSNR."""
    image = photo(width, height)
    ours = data.center_crop(image, 32)
    assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, adm_center_crop(image, 32))


def test_random_crop_covers_the_image_and_flips_half_the_time():
    """Red is x: the crop of a wide image begins anywhere along it, and runs backwards half of the time."""
    wide = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (32, 96, 3)).copy()
    rng = np.random.default_rng(0)
    crops = np.stack([data.random_crop(wide, rng, 32) for _ in range(400)]).astype(int)[:, 0, :, 0]
    flipped = crops[:, 0] > crops[:, -1]
    assert 0.4 < flipped.mean() < 0.6
    starts = crops.min(1)
    assert starts.min() <= 2 and starts.max() >= 62 and (crops.max(1) - starts == 31).all()
    tall = wide.transpose(1, 0, 2)
    starts = np.array([data.random_crop(tall, rng, 32)[0, 0, 0] for _ in range(100)])
    assert starts.min() <= 5 and starts.max() >= 59


@pytest.mark.parametrize("width, height", [(120, 90), (64, 64), (70, 200), (20, 24)])
def test_resized_crops_equal_torchvision_s(width, height):
    """Bicubic with antialiasing, larger or smaller, from the middle of the image: pixels that Pillow would give."""
    image = photo(width, height)
    pixels = np.array(image)
    for left, top, w, h in (0, 0, width, height), (3, 5, width - 9, height // 2), (width // 3, 0, 10, 13):
        ours = data.resize(pixels[top:top + h, left:left + w], 48)
        theirs = torchvision.resized_crop(image, top, left, h, w, [48, 48], torchvision.InterpolationMode.BICUBIC)
        difference = np.abs(ours.astype(int) - np.asarray(theirs))
        assert ours.shape == (48, 48, 3) and ours.dtype == np.uint8
        assert difference.mean() <= 0.25 and difference.max() <= 2
    side = min(width, height)
    squares = [torchvision.resized_crop(image, top, left, side, side, [48, 48], torchvision.InterpolationMode.BICUBIC)
               for top in range(height - side + 1) for left in range(width - side + 1)]
    candidates = np.array([np.asarray(square) for square in squares + [torchvision.hflip(q) for q in squares]], int)
    for seed in range(5):  # the crop to reconstruct is one of the largest squares, or its mirror image
        crop = data.random_crop(pixels, np.random.default_rng(seed), 48)
        assert np.abs(candidates - crop).mean((1, 2, 3)).min() <= 0.25


def test_what_has_the_right_size_is_not_resampled():
    """CIFAR's 32 px, and the built-in shapes."""
    pixels = np.array(photo(32, 32))
    assert data.resize(pixels, 32) is pixels
    crop = data.random_crop(pixels, np.random.default_rng(0), 32)
    assert np.array_equal(crop, pixels) or np.array_equal(crop, pixels[:, ::-1])


def test_pixels_survive_the_way_to_floats_and_back():
    """All 256 levels, and -1 and 1 are black and white; what overshoots is clipped."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16).movedim(1, -1)
    images = data.to_float(pixels, "cpu")
    assert images.shape == (1, 3, 16, 16) and images.min() == -1 and images.max() == 1
    assert torch.equal(data.to_uint8(images), pixels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0, -1 + 0.49 / 127.5]).view(3, 1, 1)).tolist() == [[[0, 255, 0]]]


def test_psnr_equals_skimage():
    """Per image, on 8 bits, the mean over channels and pixels before the logarithm."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 16, 12, 3), dtype=np.uint8)
    b = (a + rng.normal(0, [[[[5]]], [[[30]]], [[[90]]]], a.shape)).clip(0, 255).astype(np.uint8)
    ours = data.psnr(torch.from_numpy(a), torch.from_numpy(b))
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
    assert 100 < data.psnr(torch.from_numpy(a), torch.from_numpy(a))[0] < float("inf")


def test_grid_shows_every_image_in_its_place(tmp_path):
    """Row by row, enlarged without blur, so that a reconstruction stands below its original."""
    levels = torch.arange(6, dtype=torch.uint8) * 40
    data.save_grid(tmp_path / "grid.png", levels[:, None, None, None].expand(6, 8, 8, 3), columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 3
    assert rows == columns and 16 < rows < 2 * 96 and pixels.shape == (2 * rows, 3 * columns, 3)
    middles = pixels[rows // 2::rows, columns // 2::columns, 0]
    assert middles.tolist() == [[0, 40, 80], [120, 160, 200]]
    data.save_grid(tmp_path / "titled.png", levels[:, None, None, None].expand(6, 8, 8, 3), 3, ["a", "b", "c"])
    titled = np.asarray(Image.open(tmp_path / "titled.png"))
    top = len(titled) - len(pixels)
    assert top > 8 and np.array_equal(titled[top:], pixels)
    assert all((titled[:top, k * columns:(k + 1) * columns] < 128).any() for k in range(3)), "a title above each column"
    data.save_grid(tmp_path / "named.png", levels[:, None, None, None].expand(6, 8, 8, 3), 3, names=["a", "bc"])
    named = np.asarray(Image.open(tmp_path / "named.png"))
    left = named.shape[1] - pixels.shape[1]
    assert left > 8 and np.array_equal(named[:, left:], pixels)
    assert all((named[k * rows:(k + 1) * rows, :left] < 128).any() for k in range(2)), "a name before each row"


def test_a_store_without_room_is_one_line(tmp_path, monkeypatch):
    """Before hours of encoding, and nothing is left behind."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 10**6))
    message = failure(latents.Store, str(tmp_path / "latents.cache"), {}, 1000, (2, 1000), np.float16)
    assert message.endswith("latents.cache needs 0.00401 GB, but only 0.004 are free there")
    assert not list(tmp_path.iterdir())
    latents.Store(str(tmp_path / "latents.cache"), {}, 900, (2, 1000), np.float16)
