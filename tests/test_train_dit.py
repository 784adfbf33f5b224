"""Stages 2 and 3 end to end, with networks of a few thousand parameters: the cache of latents, stopped, resumed, split,
sampled, refused."""
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import latents
import runtime
import sample
import train_dit
import train_tokenizer
from conftest import ROOT, clean_environment, fork_two, run_script
from model import TCAE, LightningDiT

IMAGES, SHAPE = 160, (6, 4, 4)  # two batches to encode, of 128 and 32; the latents' shape
TOKENIZER = dict(data_dir="shapes", shapes_images=IMAGES, image_size=32, patch_size=4, downsample=8, latent_channels=6,
                 encoder="32/2/2", decoder="32/2/2", stc_depth=1, lpips_weight=0, ssl_method="none", epochs=3,
                 batch_size=16, learning_rate=3e-3, warmup_epochs=0.2, workers=0, device="cpu", dtype="float32",
                 log_every=10, val_images=16, stats_images=IMAGES)
TINY = dict(size="32/2/2", epochs=4, decay_epoch=4, batch_size=16, learning_rate=1e-3, ema_momentum=0.9, workers=0,
            shift_base=48, device="cpu", dtype="float32", log_every=1, sample_steps=2)
SAMPLE = dict(steps=4, cfg_scale=20, device="cpu", dtype="float32")  # so much guidance, because so little is learned


def arguments(constants):
    return [f"--{name}={value}" for name, value in constants.items()]


def run_here(script, **constants):
    """A script's main() in this process; its constants are as they were before, afterwards."""
    before, argv, handler = dict(vars(script)), sys.argv, signal.getsignal(signal.SIGTERM)
    try:
        sys.argv = [script.__file__, *arguments(constants)]
        script.main()
    finally:
        vars(script).update(before)
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of everything that is made once: tokenizer/, run/ (40 steps that nothing interrupted), the cache."""
    base = tmp_path_factory.mktemp("base")
    run_here(train_tokenizer, **TOKENIZER, out_dir=base / "tokenizer")
    run_here(train_dit, **TINY, tokenizer=base / "tokenizer" / "checkpoint.pt", cache=base / "latents.cache",
             out_dir=base / "run")
    return base


def test_what_is_trained_is_compiled(base, tmp_path, monkeypatch):
    """Both scripts hand their networks over, if told to; that these then compute the same is test_model.py's."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call: call)
    for script in train_tokenizer, train_dit:
        monkeypatch.setattr(script, "compile_blocks", lambda *networks: compiled.extend(networks))
    run_here(train_tokenizer, **{**TOKENIZER, "epochs": 1, "out_dir": tmp_path / "a", "compile": True})
    run_here(train_dit, **{**TINY, "epochs": 1, "decay_epoch": 1, "out_dir": tmp_path / "b", "compile": True},
             tokenizer=base / "tokenizer" / "checkpoint.pt", cache=base / "latents.cache")
    assert [type(network).__name__ for network in compiled] == ["JointTokenizer", "LightningDiT", "LightningDiT"]


def test_a_long_run_on_a_cpu_is_compiled_by_itself(base, tmp_path, monkeypatch):
    """The demo's is, and these tests' are not."""
    asked = []
    monkeypatch.setattr(runtime.Distributed, "should_compile",
                        lambda _, wanted, pays=False: asked.append((wanted, pays)))
    monkeypatch.setattr(data, "TrainLoader", lambda *_, **__: iter([]))  # an end before the first step
    for changes in {}, {"size": "192/6/6", "epochs": 400, "batch_size": 64}:
        with pytest.raises(StopIteration):
            run_here(train_dit, **{**constants(base, tmp_path), **changes})
    assert asked == [("auto", False), ("auto", True)]


@pytest.fixture
def train(base, tmp_path):
    """train(**changes) runs train_dit's main() in this process, on the cache, into tmp_path."""
    def call(**changes):
        run_here(train_dit, **{**constants(base, tmp_path), **changes})
    return call


def constants(base, out_dir):
    return dict(TINY, tokenizer=base / "tokenizer" / "checkpoint.pt", cache=base / "latents.cache", out_dir=out_dir)


@pytest.fixture
def draw(base, tmp_path):
    """draw(**changes) runs sample's main() in this process -> the folder that it wrote into."""
    def call(**changes):
        merged = {**SAMPLE, "checkpoint": base / "run" / "checkpoint.pt", "out_dir": tmp_path / "samples", **changes}
        run_here(sample, **merged)
        return merged["out_dir"]
    return call


def test_generators_side_by_side(base, tmp_path, monkeypatch):
    """runs/compare.py: a row for each generator, the same noise in each, so the same one twice makes the same row twice."""
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    compare, checkpoint = importlib.import_module("compare"), base / "run" / "checkpoint.pt"
    run_here(compare, checkpoints=f"{checkpoint},{checkpoint}", names="one,the other", classes="0,1", steps=2,
             out=tmp_path / "new" / "compare.png", dtype="float32")
    pixels = np.asarray(Image.open(tmp_path / "new" / "compare.png"))[16:, -2 * 98:]
    assert pixels.shape == (2 * 98, 2 * 98, 3) and pixels.std() > 1
    assert np.array_equal(pixels[:98], pixels[98:])


def latents_of(saved):
    """What ties a cache to a tokenizer: its weights without the decoder's."""
    return runtime.fingerprint(saved["tokenizer"], without="decoder.")


def failure(call, **changes):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as error:
        call(**changes)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def checkpoint(out_dir):
    return runtime.load_checkpoint(out_dir / "checkpoint.pt", "out_dir")


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def tensors(state, prefix=""):
    """All tensors of a nested state by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{prefix}/{key}").items()}


def open_cache(path, count=IMAGES):
    """(state, items) of a cache file, writable."""
    store = latents.Store(str(path), None, count, (2, *SHAPE), np.float16)
    return store.state, store.items


def changed_tokenizer(base, path, name, **state):
    """The tokenizer's checkpoint with one weight changed, or with another `state`, at `path`."""
    saved = runtime.load_checkpoint(base / "tokenizer" / "checkpoint.pt", "tokenizer")
    if name:
        saved["tokenizer"][name] = saved["tokenizer"][name] * 1.5 + 0.1
    torch.save({**saved, **state}, path)
    return path


@pytest.fixture
def forbid_encoding(monkeypatch):
    def encode(*_):
        raise AssertionError("images are encoded")
    monkeypatch.setattr(TCAE, "encode", encode)


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many images each call of the tokenizer's encoder has had."""
    counts, encode = [], TCAE.encode
    monkeypatch.setattr(TCAE, "encode", lambda tcae, images: (counts.append(len(images)), encode(tcae, images))[1])
    return counts


@pytest.fixture
def steps_seen(monkeypatch):
    """A list of what each call of the training loss was given, {z, labels, noise, t}."""
    seen, loss = [], train_dit.flow_matching_loss

    def spy(model, z, labels, noise, t):
        seen.append(dict(z=z.clone(), labels=labels.clone(), noise=noise.clone(), t=t.clone()))
        return loss(model, z, labels, noise, t)

    monkeypatch.setattr(train_dit, "flow_matching_loss", spy)
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def encode_directly(base, pixels):
    saved = runtime.load_checkpoint(base / "tokenizer" / "checkpoint.pt", "tokenizer", kind="tokenizer")
    return TCAE.from_checkpoint(saved).encode(data.to_float(torch.from_numpy(pixels), "cpu"))


def test_the_cache_holds_every_image_and_its_mirror_image_normalised(base):
    """Float16, mean 0 and deviation 1 per channel; each entry is what the tokenizer makes of that image."""
    state, items = open_cache(base / "latents.cache")
    assert (state == 1).all() and items.dtype == np.float16 and items.shape == (IMAGES, 2, *SHAPE)
    assert os.path.getsize(base / "latents.cache") == 4096 + IMAGES + IMAGES * 2 * 6 * 4 * 4 * 2
    plain = items[:, 0].astype(np.float64)  # mean and deviation are measured on the images as they are
    assert np.abs(plain.mean((0, 2, 3))).max() < 1e-3 and np.abs(plain.std((0, 2, 3)) - 1).max() < 1e-3
    source = data.Shapes("train", IMAGES, 32)
    for chosen in range(0, IMAGES, 40):
        pixels = np.stack([np.asarray(source.load(i)) for i in range(chosen, chosen + 8)])
        for side, seen in enumerate((pixels, pixels[:, :, ::-1].copy())):
            z = encode_directly(base, seen).numpy()
            np.testing.assert_allclose(items[chosen:chosen + 8, side].astype(np.float32), z, rtol=2e-3, atol=2e-3)
    assert np.abs(plain - items[:, 1]).mean() > 0.1  # a mirror image is another image


def test_the_cache_says_what_it_was_made_from(base):
    """Its header is JSON that a person can read with `head`."""
    with open(base / "latents.cache", "rb") as file:
        about = json.loads(file.read(4096))
    saved = checkpoint(base / "tokenizer")
    assert about["tokenizer"] == latents_of(saved) and about["images"] == IMAGES
    assert about["files"] == data.Shapes("train", 10, 32).fingerprint()


def test_a_cache_is_made_once(base, train, forbid_encoding):
    """The next run, though of another generator, encodes nothing and leaves the file as it is."""
    before = (base / "latents.cache").read_bytes()
    train(epochs=1, decay_epoch=1, size="16/1/1")
    assert (base / "latents.cache").read_bytes() == before


def test_a_complete_cache_may_be_read_only(base, train, tmp_path, forbid_encoding, monkeypatch):
    """Shared among users. (Tests may run as root, who may write everything.)"""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("latents.cache") and access(path, mode))
    before = (base / "latents.cache").read_bytes()
    train(cache=base / "latents.cache", epochs=1, decay_epoch=1)
    assert (base / "latents.cache").read_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        open_cache(base / "latents.cache")[0][0] = 1


@pytest.mark.parametrize("state", (2, 0))
def test_a_read_only_cache_may_lack_bad_images_but_no_others(base, train, tmp_path, forbid_encoding, monkeypatch, state):
    """It was filled where two images could not be used, or copied before it was full."""
    monkeypatch.setattr(data, "BAD_SHARE", 0.1)
    cache = Path(shutil.copy(base / "latents.cache", tmp_path))
    open_cache(cache)[0][[3, 5]] = state
    monkeypatch.setattr(os, "access", lambda path, mode, access=os.access: path != str(cache) and access(path, mode))
    if state:
        train(cache=cache, epochs=1, decay_epoch=1)
    else:
        assert "is incomplete, and can't be written" in failure(train, cache=cache)


def test_the_cache_stands_in_out_dir_unless_it_is_told_otherwise(base, train, tmp_path):
    """With the same content."""
    train(cache="", epochs=1, decay_epoch=1)
    assert (tmp_path / "latents.cache").read_bytes() == (base / "latents.cache").read_bytes()
    made = {path.name for path in tmp_path.glob("[!.]*")}
    assert made == {"latents.cache", "checkpoint.pt", "log.jsonl", "samples.png"}


def test_training_gets_the_right_label_with_every_latent(base, train, steps_seen, monkeypatch):
    """Each z of a training batch is one of the cache's, or of its mirror images; its label is that image's class."""
    train(epochs=1, decay_epoch=1, label_dropout=0)
    _, items = open_cache(base / "latents.cache")
    of = {items[i, side].astype(np.float32).tobytes(): (i, side) for i in range(IMAGES) for side in range(2)}
    met = []
    for step in steps_seen:
        for z, label in zip(step["z"], step["labels"].tolist()):
            image, side = of[z.numpy().tobytes()]
            assert label == image % 10
            met.append((image, side))
    assert sorted(image for image, _ in met) == list(range(IMAGES))  # an epoch is each image once
    assert 40 < sum(side for _, side in met) < 120  # half of them mirrored


def test_a_cache_of_another_tokenizer_is_refused_until_it_is_rebuilt(base, train, tmp_path):
    """One line that names both ways out; then the file is made anew, with the other tokenizer's latents."""
    cache = shutil.copy(base / "latents.cache", tmp_path / "old.cache")
    other = changed_tokenizer(base, tmp_path / "other.pt", "bottleneck.mlp.fc2.weight")
    before = cache.read_bytes()
    message = failure(train, tokenizer=other, cache=cache)
    assert all(word in message for word in (str(cache), "tokenizer was", "--rebuild_cache=True", "--cache"))
    assert cache.read_bytes() == before and not (tmp_path / "checkpoint.pt").exists()
    train(tokenizer=other, cache=cache, rebuild_cache=True, epochs=1, decay_epoch=1)
    assert np.abs(open_cache(cache)[1] - open_cache(base / "latents.cache")[1]).mean() > 0.1
    assert (open_cache(cache)[0] == 1).all()


def test_a_finetuned_decoder_needs_no_new_cache(base, train, tmp_path, forbid_encoding):
    """Its latents are the same (Table 7, right)."""
    train(tokenizer=changed_tokenizer(base, tmp_path / "other.pt", "decoder.head.weight"), epochs=1, decay_epoch=1)
    assert checkpoint(tmp_path)["step"] == 10


@pytest.mark.parametrize("content", [b"", b"not a cache", b"[1, 2]".ljust(4096), b"\xff\xfe" * 3000])
def test_a_file_that_is_no_cache_is_refused(train, tmp_path, content):
    """And left alone: it may be somebody's work."""
    path = tmp_path / "thesis.cache"
    path.write_bytes(content)
    assert str(path) in failure(train, cache=path)
    assert path.read_bytes() == content


def test_a_cache_that_was_not_copied_whole_does_not_pass_for_one(base, train, tmp_path, encoded):
    """Its marks come first and say that all is done, though the latents after them are missing: to be refused, or
    encoded again, but not taken for zeros."""
    cache = tmp_path / "half.cache"
    cache.write_bytes((base / "latents.cache").read_bytes()[:30000])
    try:
        train(cache=cache, epochs=1, decay_epoch=1)
    except SystemExit as error:
        assert str(error).startswith("error: ") and str(cache) in str(error)
    else:
        assert sum(encoded) >= IMAGES
        np.testing.assert_allclose(open_cache(cache)[1], open_cache(base / "latents.cache")[1], rtol=2e-3, atol=2e-3)


def test_an_encoding_that_is_stopped_goes_on_where_it_stopped(base, train, tmp_path, encoded, monkeypatch, capsys):
    """SIGTERM during the first of two batches: what is done is kept, exit status 0; the next run encodes the rest, and
    the file ends as if nothing had happened."""
    encode, cache = TCAE.encode, tmp_path / "latents.cache"
    with monkeypatch.context() as patch:
        patch.setattr(TCAE, "encode", lambda *given: (signal.raise_signal(signal.SIGTERM), encode(*given))[1])
        train(cache=cache)
    assert f"stopped: what is encoded stays in {cache};" in capsys.readouterr().out
    assert (open_cache(cache)[0] == np.repeat([1, 0], [128, IMAGES - 128])).all()
    assert not (tmp_path / "checkpoint.pt").exists()
    encoded.clear()
    train(cache=cache, epochs=1, decay_epoch=1)
    assert encoded == [2 * (IMAGES - 128)]
    assert cache.read_bytes() == (base / "latents.cache").read_bytes()


def test_only_what_a_cache_lacks_is_encoded(base, train, tmp_path, encoded):
    """Items that are not marked as done are garbage of a killed run; those that are marked are not touched."""
    cache = shutil.copy(base / "latents.cache", tmp_path / "cut.cache")
    state, items = open_cache(cache)
    expected, lost = items.copy(), [0, 3, 77, 159]
    state[lost], items[lost], items[5] = 0, np.nan, 7
    expected[5] = 7
    items.flush(), state.flush()
    train(cache=cache, epochs=1, decay_epoch=1)
    state, items = open_cache(cache)
    assert encoded == [2 * len(lost)] and (state == 1).all()
    np.testing.assert_allclose(items[lost], expected[lost], rtol=2e-3, atol=2e-3)  # in a batch of another size
    others = np.setdiff1d(np.arange(IMAGES), lost)
    assert np.array_equal(items[others], expected[others])


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 images, two classes, one of them broken -> (folder, the broken file)."""
    source = data.Shapes("train", 40, 40)
    for k in range(2):
        (tmp_path / "images" / "train" / f"class {k}").mkdir(parents=True)
        for i in range(20):
            source.load(20 * k + i).save(tmp_path / "images" / "train" / f"class {k}" / f"{i:02}.png")
    broken = tmp_path / "images" / "train" / "class 1" / "07.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200].ljust(len(whole), b"\0"))
    return tmp_path / "images", broken


def test_an_image_that_can_not_be_decoded_is_named_and_left_out(base, folder, train, tmp_path, monkeypatch, capsys,
                                                                 steps_seen):
    """In its place stands another of the epoch, the same whether it is met in a new cache, in an old one or on the
    fly."""
    monkeypatch.setattr(data, "BAD_SHARE", 0.1)
    images, broken = folder
    same = dict(data_dir=images, cache=tmp_path / "folder.cache", batch_size=8, epochs=1, decay_epoch=1)
    runs = []
    for changes in {}, {}, {"cache_latents": False}:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        train(**same, **changes, out_dir=tmp_path / "run")
        runs.append((capsys.readouterr().out, list(steps_seen)))
        steps_seen.clear()
    state, _ = open_cache(tmp_path / "folder.cache", 40)
    assert state[27] == 2 and (np.delete(state, 27) == 1).all()
    assert str(broken) in runs[0][0] and str(broken) in runs[2][0]
    assert str(broken) in runs[1][0]
    for _, steps in runs:
        assert len(steps) == 5
        for step, first in zip(steps, runs[0][1]):
            assert step["z"].flatten(1).any(1).all()  # nothing that was never written
            assert torch.equal(step["labels"], first["labels"]) and torch.equal(step["noise"], first["noise"])
            torch.testing.assert_close(step["z"], first["z"], rtol=2e-3, atol=2e-3)
    assert checkpoint(tmp_path / "run")["classes"] == ["class 0", "class 1"]
    data.Shapes("train", 40, 40).load(27).save(broken)  # it may have been out of reach for a minute only
    train(**same, out_dir=tmp_path / "other")
    assert (open_cache(tmp_path / "folder.cache", 40)[0] == 1).all()


def test_a_cache_is_filled_by_one_run_at_a_time(base, train, tmp_path):
    """Others may read it together once it is whole."""
    whole = Path(shutil.copy(base / "latents.cache", tmp_path / "whole.cache"))
    locks = [str(tmp_path / f".{name}.cache.lock") for name in ("new", "whole")]
    other = subprocess.Popen([sys.executable, "-c", f"""
import runtime, time
dist = runtime.Distributed("cpu", "float32")
for path in {locks}:
    dist.lock(path, "this")
print("locked", flush=True)
time.sleep(100)
"""], cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert [other.stdout.readline() for _ in range(2)][1] == "locked\n"
        message = failure(train, cache=tmp_path / "new.cache", out_dir=tmp_path / "run")
        assert f"cache={tmp_path / 'new.cache'} is in use by process {other.pid} on " in message
        train(cache=whole, epochs=1, decay_epoch=1, out_dir=tmp_path / "other")
    finally:
        other.kill()


@pytest.mark.parametrize("change", ["renamed", "made anew"])
def test_a_folder_that_has_changed_needs_another_cache(folder, train, tmp_path, change):
    """As many images as before. Renamed, they have another order: the old cache would pair latents with the labels of
    others. Made anew under the same names, it would be of other images."""
    images, broken = folder
    broken.unlink()
    same = dict(data_dir=images, cache=tmp_path / "folder.cache", batch_size=8, epochs=1, decay_epoch=1)
    train(**same, out_dir=tmp_path / "run")
    if change == "renamed":
        (images / "train" / "class 0").rename(images / "train" / "class 9")
    else:
        for path in images.rglob("*.png"):
            Image.open(path).rotate(45).save(path)
    assert str(tmp_path / "folder.cache") in failure(train, **same, out_dir=tmp_path / "other")


def test_too_many_broken_images_end_the_run(folder, train, tmp_path):
    """One of forty is more than a hundredth: it is not a stray file but the wrong folder."""
    images, broken = folder
    same = dict(data_dir=images, cache=tmp_path / "folder.cache", batch_size=8, epochs=1, decay_epoch=1)
    message = failure(train, **same)
    assert "data_dir" in message and "1 of 40" in message and str(broken) in message
    data.Shapes("train", 40, 40).load(27).save(broken)  # repaired: it is tried again
    train(**same)
    assert (open_cache(tmp_path / "folder.cache", 40)[0] == 1).all()


def test_a_loading_process_gets_the_cache_s_name_and_not_its_42_gigabytes(base):
    """Where processes are not forked (macOS, Python 3.14), a dataset travels to its workers in pickled form."""
    about = {"images": IMAGES}
    store = latents.Store(str(base / "pickled.cache"), about, IMAGES, (2, *SHAPE), np.float16)
    store.put([3], np.full((1, 2, *SHAPE), 5, np.float16))
    pickled = pickle.dumps(train_dit.LatentDataset(data.Shapes("train", IMAGES, 32), 32, store))
    assert len(pickled) < 2000 + 8 * IMAGES < store.items.nbytes
    arrived = pickle.loads(pickled)
    assert (arrived.load(3)["pair"] == 5).all()
    store.put([4], np.full((1, 2, *SHAPE), 6, np.float16))
    assert (arrived.load(4)["pair"] == 6).all()  # the same file


# ----------------------------------------------------------------------------------------------------------------------
# Training examples


def test_examples_have_the_recipe_s_distributions(base, train, steps_seen):
    """A tenth without label, half mirrored, t logit-normal(0, 1), noise standard normal, all independent."""
    train(epochs=25, decay_epoch=25, shift_base=4096, sample_every=1000)
    drawn = {name: torch.cat([step[name] for step in steps_seen]).double().numpy() for name in steps_seen[0]}
    dropped = drawn["labels"] == 10
    assert len(dropped) == 4000 and set(drawn["labels"]) == set(range(11)) and 0.08 < dropped.mean() < 0.12
    _, items = open_cache(base / "latents.cache")
    side = {items[i, side].tobytes(): side for i in range(IMAGES) for side in range(2)}
    mirrored = np.array([side[z.tobytes()] for z in drawn["z"].astype(np.float16)])
    assert 0.46 < mirrored.mean() < 0.54
    logit = np.log(drawn["t"] / (1 - drawn["t"]))
    assert abs(logit.mean()) < 0.06 and abs(logit.std() - 1) < 0.05 and np.abs(np.mean(logit**4) - 3) < 0.6
    noise = drawn["noise"]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    features = np.stack([dropped, mirrored, logit, noise[:, 0, 0, 0]]).astype(float)
    assert np.abs(np.corrcoef(features) - np.eye(4)).max() < 0.06


def test_steps_take_the_examples_of_seed_epoch_and_image(base, train, steps_seen):
    """What a step trains on, rebuilt item by item from a random stream of its own; t arrives shifted."""
    train(epochs=2, decay_epoch=2, seed=3)
    _, items = open_cache(base / "latents.cache")
    s = np.sqrt(6 * 4 * 4 / 48)
    for step, order in zip(steps_seen, data.training_order(IMAGES, 16, 0, 20, 3), strict=True):
        for k, (epoch, i) in enumerate(order):
            rng = np.random.default_rng([3, 0, epoch, i])
            assert np.array_equal(step["z"][k], items[i, int(rng.random() < 0.5)].astype(np.float32))
            t = 1 / (1 + np.exp(-rng.standard_normal()))
            np.testing.assert_allclose(step["t"][k], s * t / (1 + (s - 1) * t), rtol=1e-5)
            assert np.array_equal(step["noise"][k], rng.standard_normal(SHAPE, np.float32))
            assert step["labels"][k] == (10 if rng.random() < 0.1 else i % 10)


def test_the_null_class_is_trained(base, train, tmp_path):
    """Guidance needs it; without label dropout its embedding gets no gradient at all."""
    train(label_dropout=0, epochs=1, decay_epoch=1)
    names = [name for name, _ in LightningDiT("32/2/2", *SHAPE[:2], 10).named_parameters()]
    moments = [checkpoint(out_dir)["optimizer"]["adamw"]["state"][names.index("class_embed.weight")]["exp_avg_sq"]
               for out_dir in (base / "run", tmp_path)]
    assert (moments[0].sum(1) > 0).all()  # all ten classes and the null class
    assert (moments[1][:10].sum(1) > 0).all() and not moments[1][10].any()


# ----------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_leaves_what_it_promises(base):
    """A line per step, a picture of four rows of ten classes, a checkpoint with all that stage 3 needs."""
    lines, state = log(base / "run"), checkpoint(base / "run")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert {"loss", "grad_norm", "lr", "seconds", "images_per_second", "waiting"} <= lines[0].keys()
    picture = Image.open(base / "run" / "samples.png")
    assert picture.width >= 10 * 96 and picture.height >= 4 * 96
    assert state["kind"] == "dit" and state["step"] == 40 and state["classes"] == data.Shapes.classes
    assert tuple(state["latent_shape"]) == SHAPE
    assert state["latents_of"] == latents_of(checkpoint(base / "tokenizer"))
    assert {path.name for path in (base / "run").glob("[!.]*")} == {"checkpoint.pt", "log.jsonl", "samples.png"}


def test_the_loss_begins_at_two_and_falls(base):
    """The velocity starts as 0; noise - data has variance 1 + 1 where latents are normalised (16 images: roughly)."""
    loss = [line["loss"] for line in log(base / "run")]
    assert loss[0] == pytest.approx(2, abs=0.4)
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:10])


def test_cached_and_encoded_on_the_fly_is_the_same_training(base, train, tmp_path, steps_seen):
    """The same batches, to the rounding of a matrix product in a batch of another size, and no cache is written."""
    same = dict(epochs=1, decay_epoch=1)
    train(**same, out_dir=tmp_path / "cached")
    cached = list(steps_seen)
    steps_seen.clear()
    train(**same, out_dir=tmp_path / "fly", cache_latents=False, cache="")
    for a, b in zip(cached, steps_seen, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("labels", "noise", "t"))
        torch.testing.assert_close(a["z"], b["z"], rtol=2e-3, atol=2e-3)
        assert (a["z"] == b["z"]).float().mean() > 0.99  # both rounded to float16
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("cached", "fly")]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not list((tmp_path / "fly").glob("*.cache"))


def test_ema_is_the_running_mean_of_the_weights(train, monkeypatch):
    """e_k = m e_{k-1} + (1 - m) w_k after every step."""
    saved, save = [], runtime.save_checkpoint

    def spy(path, state):
        saved.append({part: {name: x.clone() for name, x in state[part].items()} for part in ("model", "ema")})
        save(path, state)

    monkeypatch.setattr(runtime, "save_checkpoint", spy)
    train(epochs=1, decay_epoch=1, save_every=1)
    assert len(saved) == 10
    for before, after in zip(saved, saved[1:]):
        for name, weights in after["model"].items():
            torch.testing.assert_close(after["ema"][name], 0.9 * before["ema"][name] + 0.1 * weights)
    moved, followed = ((saved[-1][part]["head.weight"]).abs().mean() for part in ("model", "ema"))
    assert 0 < followed < moved


def test_the_rate_warms_up_stays_and_falls_linearly(base, train, tmp_path):
    """Table 4's schedule: constant to decay_epoch, then a line to min_learning_rate; with decay_epoch 0, or the last
    one, it stays."""
    train(epochs=3, decay_epoch=1, min_learning_rate=1e-4, warmup_steps=4, out_dir=tmp_path)
    rates = [line["lr"] for line in log(tmp_path)]
    expected = [1e-3 * min(1, (k + 1) / 4) if k < 10 else 1e-3 - 9e-4 * (k - 10) / 20 for k in range(30)]
    assert rates == pytest.approx(expected, rel=1e-4)
    train(epochs=1, decay_epoch=0, out_dir=tmp_path / "constant")
    assert {line["lr"] for out_dir in (base / "run", tmp_path / "constant") for line in log(out_dir)} == {1e-3}


def test_the_gradient_is_clipped_before_every_update(train, monkeypatch):
    """To grad_clip over all weights."""
    step, norms = torch.optim.AdamW.step, []

    def measured(optimizer):
        norms.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    train(grad_clip=0.01, epochs=1, decay_epoch=1)
    assert len(norms) == 10 and norms == pytest.approx([0.01] * 10, rel=1e-3)


def test_a_loss_that_breaks_stops_the_run_and_keeps_the_checkpoint(train, tmp_path):
    """With the step and the term, and the last checkpoint as it was before."""
    message = failure(train, learning_rate=1e30, save_every=1)
    assert "step 2" in message and "learning_rate" in message and str(tmp_path / "checkpoint.pt") in message
    assert checkpoint(tmp_path)["step"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(base, train, tmp_path):
    """SIGTERM in the middle saves and exits 0, though the loading worker gets it too; resumed, all tensors are the same
    bit for bit. In between a second run in the same folder, another constant, tokenizer or data set are refused."""
    command = [sys.executable, "train_dit.py", *arguments({**constants(base, tmp_path), "workers": 1})]
    process = subprocess.Popen(command, cwd=ROOT, text=True, env=clean_environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    path = tmp_path / "log.jsonl"
    while not (path.exists() and path.read_text().count("\n")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: saved" in printed and str(tmp_path / "checkpoint.pt") in printed
    stopped = checkpoint(tmp_path)["step"]
    assert 0 < stopped < 40

    before = (tmp_path / "checkpoint.pt").read_bytes()
    message = failure(train)
    assert f"out_dir={tmp_path}" in message and "resume" in message
    message = failure(train, resume=True, learning_rate=0.5)
    assert "learning_rate was 0.001, is 0.5" in message and "workers" not in message
    other = changed_tokenizer(base, tmp_path / "other.pt", "bottleneck.mlp.fc2.weight")
    assert f"tokenizer={other}" in failure(train, resume=True, tokenizer=other)
    state = checkpoint(tmp_path)
    (tmp_path / "other").mkdir()
    torch.save({**state, "classes": state["classes"][::-1]}, tmp_path / "other" / "checkpoint.pt")
    assert "data_dir" in failure(train, resume=True, out_dir=tmp_path / "other")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before

    train(resume=True, save_every=7)
    ours, theirs = tensors(checkpoint(tmp_path)), tensors(checkpoint(base / "run"))
    assert ours.keys() == theirs.keys() and {name.split("/")[1] for name in ours} >= {"model", "ema", "optimizer"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 41))


def test_averaged_weights_of_earlier_steps_are_kept(train, draw, tmp_path, monkeypatch):
    """Those that a checkpoint of that step has, and no optimizer; they can be sampled from."""
    saved, save = {}, runtime.save_checkpoint

    def spy(path, state):
        saved[os.path.basename(path), state["step"]] = {name: x.clone() for name, x in state["ema"].items()}
        save(path, state)

    monkeypatch.setattr(runtime, "save_checkpoint", spy)
    train(keep_every=15, save_every=30)
    assert sorted(saved) == [("checkpoint.pt", 30), ("checkpoint.pt", 40), ("step-15.pt", 15), ("step-30.pt", 30)]
    kept = runtime.load_checkpoint(tmp_path / "step-30.pt", "checkpoint", kind="dit")
    assert "model" not in kept and "optimizer" not in kept
    assert all(torch.equal(kept["ema"][name], weight) for name, weight in saved["checkpoint.pt", 30].items())
    assert not torch.equal(saved["step-15.pt", 15]["head.weight"], kept["ema"]["head.weight"])
    assert (draw(checkpoint=tmp_path / "step-15.pt") / "samples.png").exists()
    assert "averaged weights only" in failure(draw, checkpoint=tmp_path / "step-15.pt", use_ema=False)


def test_muon_trains_resumes_and_splits(base, tmp_path):
    """Stopped and resumed the same bit for bit; accumulated and in two processes the same run."""
    same, add = {**constants(base, tmp_path), **TEN, "optimizer": "muon"}, runtime.Progress.add

    def add_and_stop(progress, terms):
        add(progress, terms)
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.Progress, "add", add_and_stop)
        run_here(train_dit, **{**same, "out_dir": tmp_path / "stopped"})
    run_here(train_dit, **{**same, "out_dir": tmp_path / "stopped", "resume": True})
    run_here(train_dit, **{**same, "out_dir": tmp_path / "straight"})
    ours, theirs = (tensors(checkpoint(tmp_path / name)) for name in ("stopped", "straight"))
    assert ours.keys() == theirs.keys() and any("/muon/" in name for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    run_here(train_dit, **{**same, "out_dir": tmp_path / "accumulated", "accumulate": 2})
    fork_two(run_two, **{**same, "out_dir": tmp_path / "two"})
    for other in "accumulated", "two":
        assert_the_same_run(tmp_path / "straight", tmp_path / other)


def run_two(**constants):
    run_here(train_dit, **constants)


def test_a_run_is_finished_once_its_picture_is_there(train, tmp_path, monkeypatch):
    """Killed while it draws the last one, it repeats what came after the checkpoint before."""
    with monkeypatch.context() as patch:
        patch.setattr(train_dit, "draw_samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(epochs=1, decay_epoch=1, save_every=7)
    assert not checkpoint(tmp_path)["finished"] and not (tmp_path / "samples.png").exists()
    train(epochs=1, decay_epoch=1, save_every=7, resume=True)
    assert checkpoint(tmp_path)["finished"] and (tmp_path / "samples.png").exists()


def test_a_finished_run_that_is_resumed_changes_nothing(base, train, tmp_path, capsys):
    """A job that is queued again after its end: it says so, and does not even encode."""
    before = {name: tensor.clone() for name, tensor in tensors(checkpoint(base / "run")).items()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(resume=True, out_dir=base / "run", cache=tmp_path / "none.cache")
    assert not end.value.code, "not a failure"
    assert "is finished: step 40" in capsys.readouterr().out and not (tmp_path / "none.cache").exists()
    after = tensors(checkpoint(base / "run"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# ----------------------------------------------------------------------------------------------------------------------
# Split


def assert_the_same_run(one, other):
    """To float tolerance: losses and gradients' sizes of ten steps, Adam's means, the weights and their mean."""
    for a, b in zip(log(one), log(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = checkpoint(one), checkpoint(other)
    gradients = [torch.cat([mean.flatten() for name, mean in tensors(x["optimizer"]).items()
                            if name.endswith(("/exp_avg", "/mean"))]) for x in (a, b)]
    assert gradients[0].norm() > 0.05 and (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()
    for part in "model", "ema":
        x, y = (torch.cat([tensor.flatten() for tensor in state[part].values()]) for state in (a, b))
        assert (x - y).abs().mean() < 1e-6, part  # ten updates move a weight by up to 1e-3


@pytest.fixture(scope="module")
def ten_steps(base, tmp_path_factory):
    """The folder of a run of ten steps in one process, without accumulation."""
    out_dir = tmp_path_factory.mktemp("ten")
    run_here(train_dit, **{**constants(base, out_dir), **TEN})
    return out_dir


TEN = dict(epochs=1, decay_epoch=1, learning_rate=1e-4)


def test_two_processes_with_half_the_batch_each_do_the_same(base, ten_steps, tmp_path):
    """From the cache on, which both fill: eight GPUs train the same generator as one."""
    mine = {**constants(base, tmp_path), **TEN, "cache": tmp_path / "latents.cache"}
    run_script("train_dit.py", *arguments(mine), nproc=2)
    state, items = open_cache(tmp_path / "latents.cache")
    assert (state == 1).all()
    np.testing.assert_allclose(items, open_cache(base / "latents.cache")[1], rtol=2e-3, atol=2e-3)
    assert_the_same_run(ten_steps, tmp_path)


def test_accumulation_does_the_same(ten_steps, train, tmp_path):
    """Half the memory, the same step."""
    train(**TEN, accumulate=2)
    assert_the_same_run(ten_steps, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def npz(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.fixture(scope="module")
def samples(base, tmp_path_factory):
    """23 samples in batches of 7."""
    out_dir = tmp_path_factory.mktemp("npz")
    run_here(sample, **SAMPLE, checkpoint=base / "run" / "checkpoint.pt", out_dir=out_dir, num_samples=23, batch_size=7)
    return npz(out_dir)


def assert_the_same_images(a, b):
    """To a level of 255: a product in a batch of another size may round otherwise."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_samples_for_fid_are_uint8_and_balanced(samples):
    """What ADM's evaluator reads, and the classes in equal numbers."""
    images, labels = samples
    assert images.dtype == np.uint8 and images.shape == (23, 32, 32, 3) and labels.shape == (23,)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.max() - counts.min() <= 1
    assert images.std() > 5 and len({image.tobytes() for image in images}) == 23


def test_samples_for_fid_of_some_classes(draw):
    """As many of each as of the others, in turn."""
    assert npz(draw(num_samples=5, classes="7,2"))[1].tolist() == [7, 2, 7, 2, 7]


def test_a_sample_does_not_depend_on_its_batch(samples, draw):
    """Nor on how many there are."""
    images, labels = npz(draw(num_samples=23, batch_size=3))
    assert_the_same_images(images, samples[0])
    assert np.array_equal(labels, samples[1])
    assert_the_same_images(npz(draw(num_samples=11))[0], samples[0][:11])


def test_two_processes_draw_the_same_samples(base, samples, tmp_path):
    """Sample i is sample i, whoever draws it."""
    run_script("sample.py", *arguments(dict(SAMPLE, checkpoint=base / "run" / "checkpoint.pt", out_dir=tmp_path,
                                            num_samples=23, batch_size=7)), nproc=2)
    images, labels = npz(tmp_path)
    assert_the_same_images(images, samples[0])
    assert np.array_equal(labels, samples[1]) and [path.name for path in tmp_path.glob("[!.]*")] == ["samples.npz"]


def test_a_sample_is_the_decoded_end_of_its_flow(base, samples):
    """From noise of (seed, i), with the EMA's weights, guidance and steps as asked for, rebuilt from the parts."""
    state = checkpoint(base / "run")
    dit = LightningDiT("32/2/2", 6, 4, 10).requires_grad_(False)
    dit.load_state_dict(state["ema"])
    tcae = TCAE.from_checkpoint(checkpoint(base / "tokenizer"))
    s = np.sqrt(6 * 4 * 4 / 48)
    for i in 0, 17:
        z = torch.from_numpy(np.random.default_rng([0, i]).standard_normal((1, *SHAPE), np.float32))
        for k in range(4):
            t, t_next = (s * u / (1 + (s - 1) * u) for u in (1 - k / 4, 1 - (k + 1) / 4))
            v_class, v_null = (dit(z, torch.tensor([t]).float(), torch.tensor([label])) for label in (i % 10, 10))
            z = z + (t_next - t) * (v_null + 20 * (v_class - v_null))
        expected = ((tcae.decode(z)[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
        assert_the_same_images(samples[0][i], expected)


@pytest.mark.parametrize("changes", [dict(seed=1), dict(steps=3), dict(method="heun"), dict(cfg_scale=1),
                                     dict(cfg_interval="(0.0, 0.05)"), dict(use_ema=False)])
def test_every_constant_of_sampling_counts(samples, draw, changes):
    """Each one makes other samples of the same noise, or of other noise."""
    images, labels = npz(draw(num_samples=23, **changes))
    assert np.abs(images.astype(int) - samples[0]).max() > 1 and np.array_equal(labels, samples[1])


def test_a_finetuned_decoder_draws_the_same_latents_otherwise(base, samples, draw, tmp_path):
    """A tokenizer with another decoder but the same latents may take the place of stage 2's."""
    other = changed_tokenizer(base, tmp_path / "other.pt", "decoder.head.weight")
    images, _ = npz(draw(num_samples=23, tokenizer=other))
    assert np.abs(images.astype(int) - samples[0]).max() > 1


def test_the_picture_shows_a_column_per_class(draw, monkeypatch):
    """By default the first ten classes, eight of each; or those that were asked for, in that order."""
    grids, save_grid = [], data.save_grid

    def spy(path, images, columns, titles=()):
        grids.append((tuple(images.shape), columns, list(titles)))
        save_grid(path, images, columns, titles)

    monkeypatch.setattr(data, "save_grid", spy)
    folder = draw()
    assert Image.open(folder / "samples.png").size >= (960, 768)
    draw(classes="7, 3", per_class=2)
    assert grids == [((80, 32, 32, 3), 10, data.Shapes.classes), ((4, 32, 32, 3), 2, ["star", "crescent"])]
    assert [path.name for path in folder.glob("[!.]*")] == ["samples.png"]


def test_sampling_that_is_stopped_goes_on_where_it_stopped(samples, draw, tmp_path, monkeypatch, capsys):
    """SIGTERM during the first batch: what is drawn is kept, and the same command draws the other samples alone."""
    same, drawn, draw_batch = dict(num_samples=23, batch_size=7), [], sample.draw

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        return draw_batch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw", interrupted)
        draw(**same)
    assert [path.name for path in (tmp_path / "samples").glob("[!.]*")] == ["samples.part"]
    assert f"stopped: {tmp_path / 'samples' / 'samples.part'}" in capsys.readouterr().out
    monkeypatch.setattr(sample, "draw", lambda dit, tcae, indices, *others:
                        (drawn.extend(indices), draw_batch(dit, tcae, indices, *others))[1])
    folder = draw(**same)
    assert drawn == list(range(7, 23))
    assert_the_same_images(npz(folder)[0], samples[0])
    assert [path.name for path in folder.glob("[!.]*")] == ["samples.npz"]


def test_processes_that_are_done_wait_for_the_one_that_is_stopped(draw, tmp_path, monkeypatch):
    """Two samples each, one at a time; SIGTERM reaches the second process alone, during its first one."""
    draw_batch = sample.draw

    def interrupted(*given):
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return draw_batch(*given)

    monkeypatch.setattr(sample, "draw", interrupted)
    fork_two(draw, num_samples=4, batch_size=1)
    with open(tmp_path / "samples" / "samples.part", "rb") as file:
        file.seek(latents.Store.HEADER)
        assert list(file.read(4)) == [1, 1, 1, 0]


@pytest.mark.parametrize("changes", [dict(seed=1), dict(steps=3), dict(cfg_scale=3), dict(num_samples=24),
                                     dict(method="heun"), dict(use_ema=False)])
def test_another_call_does_not_go_on_with_samples_that_were_begun(draw, monkeypatch, changes):
    """Half a file of other samples is thrown away, not mixed in."""
    drawn, draw_batch = [], sample.draw

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        return draw_batch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw", interrupted)
        draw(num_samples=23, batch_size=7)
    monkeypatch.setattr(sample, "draw", lambda dit, tcae, indices, *others:
                        (drawn.extend(indices), draw_batch(dit, tcae, indices, *others))[1])
    draw(**{"num_samples": 23, **changes})
    assert drawn == list(range(changes.get("num_samples", 23)))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("changes, words", [
    (dict(tokenizer="/nonexistent/checkpoint.pt"), ["tokenizer=/nonexistent/checkpoint.pt"]),
    (dict(size="M"), ["size='M'", "XL", "width/depth/heads"]), (dict(size="30/2/4"), ["size='30/2/4'"]),
    (dict(size="24/2/4"), ["size='24/2/4'", "head"]),
    (dict(batch_size=15, accumulate=2), ["batch_size=15", "2"]), (dict(batch_size=0), ["batch_size=0"]),
    (dict(batch_size=320), ["batch_size=320", "160"]), (dict(accumulate=0), ["accumulate=0"]),
    (dict(epochs=0), ["epochs=0"]), (dict(sample_steps=0), ["sample_steps=0"]), (dict(save_every=0), ["save_every=0"]),
    (dict(label_dropout=1.0), ["label_dropout=1.0"]), (dict(ema_momentum=1.0), ["ema_momentum=1.0"]),
    (dict(warmup_steps=41), ["warmup_steps=41", "40 steps"]),
    (dict(decay_epoch=5), ["decay_epoch=5", "epochs=4"]), (dict(betas="(0.9, 1.0)"), ["betas=(0.9, 1.0)"]),
    (dict(optimizer="sgd"), ["optimizer='sgd'", "adamw or muon"]),
    (dict(dtype="float16"), ["dtype='float16'"]), (dict(device="abacus"), ["device='abacus'"]),
    (dict(cache="/nonexistent/x.cache"), ["cache=/nonexistent/x.cache"]),
    (dict(data_dir="/nonexistent/images"), ["data_dir=/nonexistent/images"]),
    (dict(tokeniser="x"), ["tokeniser", "tokenizer"]),
])
def test_a_wrong_constant_of_training_is_one_line_that_names_it(train, tmp_path, changes, words):
    """And says what it may be; nothing is written, and no hour is spent on encoding first."""
    message = failure(train, **{"cache": "", **changes}, out_dir=tmp_path / "out")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize("changes, words", [
    (dict(checkpoint="/nonexistent/checkpoint.pt"), ["checkpoint=/nonexistent/checkpoint.pt"]),
    (dict(tokenizer="/nonexistent/checkpoint.pt"), ["tokenizer=/nonexistent/checkpoint.pt"]),
    (dict(classes="3,10"), ["classes=3,10", "'10'", "9"]), (dict(classes="disc"), ["classes=disc"]),
    (dict(classes="3,,4"), ["classes=3,,4"]), (dict(classes="-1"), ["classes=-1"]),
    (dict(method="rk4"), ["method='rk4'", "euler", "heun"]), (dict(steps=0), ["steps=0"]),
    (dict(batch_size=0), ["batch_size=0"]), (dict(per_class=0), ["per_class=0"]),
    (dict(cfg_interval="(0.9, 0.1)"), ["cfg_interval=(0.9, 0.1)"]),
    (dict(cfg_interval="(0.5,)"), ["cfg_interval=(0.5,)"]),
    (dict(cfg_scal=2), ["cfg_scal", "cfg_scale"]),
])
def test_a_wrong_constant_of_sampling_is_one_line_that_names_it(draw, tmp_path, changes, words):
    """And says what it may be; nothing is written."""
    message = failure(draw, **changes)
    assert all(word in message for word in words), message
    assert not (tmp_path / "samples").exists()


def test_checkpoints_of_something_else_are_refused(base, train, draw, tmp_path):
    """A generator in the tokenizer's place, the other way round, a run that has not ended, and no checkpoint at all."""
    generator, tokenizer = base / "run" / "checkpoint.pt", base / "tokenizer" / "checkpoint.pt"
    for call in train, draw:
        assert f"tokenizer={generator}" in failure(call, tokenizer=generator)
        unfinished = changed_tokenizer(base, tmp_path / "unfinished.pt", None, finished=False)
        assert f"tokenizer={unfinished}" in (message := failure(call, tokenizer=unfinished)) and "resume" in message
        assert str(ROOT / "LICENSE") in failure(call, tokenizer=ROOT / "LICENSE")
    assert f"checkpoint={tokenizer}" in failure(draw, checkpoint=tokenizer)
    assert f"out_dir={base / 'tokenizer'}" in failure(train, out_dir=base / "tokenizer", resume=True)
    other = changed_tokenizer(base, tmp_path / "other.pt", "bottleneck.mlp.fc2.weight")
    message = failure(draw, tokenizer=other)
    assert f"tokenizer={other}" in message and str(tokenizer) in message


def test_the_base_of_the_time_shift_is_the_same_in_training_and_sampling(train, draw, tmp_path, monkeypatch):
    """Given once, to train_dit.py; sample.py reads it in the checkpoint, and the training's own pictures use it."""
    bases = []
    monkeypatch.setattr(train_dit, "shift_time", lambda t, shape, base: bases.append(base) or t)
    flow = sample.sample_flow

    def recorded(velocity, noise, steps, method="euler", shift_base=4096):
        bases.append(shift_base)
        return flow(velocity, noise, steps, method, shift_base)

    monkeypatch.setattr(train_dit, "sample_flow", recorded)
    monkeypatch.setattr(sample, "sample_flow", recorded)
    train(shift_base=77)
    in_training = len(bases)
    draw(checkpoint=tmp_path / "checkpoint.pt", num_samples=3)
    assert in_training > 1 and len(bases) > in_training and set(bases) == {77}
