"""What eval.py measures, against the packages that others measure with; and that it measures all of what it is given,
however it is divided, or says what is missing."""
import io
import json
import os
import pickle
import signal
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

import data
import latents
import eval as stage4
import pretrained
import runtime
from conftest import run_script
from model import TCAE
from test_data import failure, process
from test_train_tokenizer import arguments

CLOSED = {**dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
          "no_proxy": "", "NO_PROXY": ""}  # the environment of a machine without network
CPU = torch.device("cpu")
PROBES = {"probe on tokens", "probe on [CLS] and tokens", "probe on latents", "structure loss"}


def pictures(count, size=32, seed=0):
    """uint8 (N, size, size, 3): blurred noise, each with a colour and a contrast of its own."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.normal(rng.normal(0, 40, (count, 3, 1, 1)), rng.uniform(10, 60, (count, 1, 1, 1)),
                                        (count, 3, 6, 6)))
    return (F.interpolate(small, size=size, mode="bicubic") + 128).clamp(0, 255).byte().movedim(1, -1).contiguous()


def noisy(pixels, seed=0):
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (pixels + 20 * noise).clamp(0, 255).byte()


def folder_of(pixels, path):
    """The images as path/000.png, path/001.png, …"""
    path.mkdir(parents=True)
    for i, image in enumerate(pixels.numpy()):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def npz_of(pixels, path):
    np.savez(path, arr_0=pixels.numpy(), arr_1=np.arange(len(pixels)) % 5)
    return path


def cut(path, size=60):
    """Only the beginning of the file is left."""
    path.write_bytes(path.read_bytes()[:size])
    return path


class Net(torch.nn.Module):
    """A feature network: uint8 (B, H, W, 3) -> 8 features, all far from 0 if `shift` is, and 5 logits."""

    def __init__(self, shift=0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(48, 8, generator=generator) / 3)
        self.register_buffer("second", torch.randn(8, 5, generator=generator))
        self.features, self.classes, self.shift = 8, 5, shift

    def forward(self, pixels):
        x = pixels.movedim(-1, 1).float() / 127.5 - 1
        features = torch.tanh(F.adaptive_avg_pool2d(x, 4).flatten(1) @ self.first)
        return features.double() + self.shift if self.shift else features, features @ self.second


def export(network, path, batch=torch.export.Dim("batch")):
    """Writes a network for images of 32 pixels as .pt2."""
    shapes = batch and ({0: batch},)
    torch.export.save(torch.export.export(network, (pictures(2),), dynamic_shapes=shapes), path)
    return path


def sums_of(network, pixels):
    """FeatureSums of the images, of one process."""
    sums = stage4.FeatureSums(network, len(pixels), CPU)
    for indices in torch.arange(len(pixels)).split(7):
        sums.add(pixels[indices], indices)
    assert sums.reduce(process()) == len(pixels)
    return sums


def distance(a, b):
    """The Fréchet distance of features (N, D) and (M, D) without a covariance: with A and B the centred features over
    √(N - 1) and √(M - 1), tr (Σ₁ Σ₂)^½ is the sum of the singular values of A Bᵀ."""
    a, b = a.double(), b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return (means + a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")).item()


def net_distance(a, b):
    """The same of images, by Net."""
    return pytest.approx(distance(Net()(a)[0], Net()(b)[0]), rel=1e-4)


def their_score(logits):
    """torch-fidelity's Inception score."""
    return isc_features_to_metric(logits, splits=10, shuffle=False)[KEY_METRIC_ISC_MEAN]


def together(count, work):
    """[work(processes) of each of `count` processes], which here are threads, one of which runs at a time, until all
    exchange. They fail if not all of them add up or gather the same at the same time."""
    barrier, given, turn = threading.Barrier(count, timeout=100), [None] * count, threading.Lock()

    def wait():
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def exchange(rank, value):
        given[rank] = value
        wait()
        everyone = list(given)
        wait()
        assert len({getattr(value, "shape", None) for value in everyone}) == 1
        return everyone

    def run(rank):
        one = process(rank, count)
        one.sum = lambda tensor: tensor.copy_(sum(exchange(rank, tensor.clone())))
        one.gather = lambda items: sum(exchange(rank, items), [])
        with turn:
            try:
                return work(one)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, rank) for rank in range(count)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:  # the first cause, not what it did to the others
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors, "a process waited for the others in vain"
    return [future.result() for future in futures]


# ----------------------------------------------------------------------------------------------------------------------
# What the tests of the whole script share


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The checkpoint of a tokenizer that saw 80 shapes of 32 pixels."""
    out_dir = tmp_path_factory.mktemp("tokenizer")
    run_script("train_tokenizer.py", *arguments(ssl_method="none", out_dir=out_dir))
    return out_dir / "checkpoint.pt"


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Net, as a .pt2 for images of 32 pixels."""
    return export(Net(), tmp_path_factory.mktemp("net") / "net.pt2")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No published weights, no network -> the folder where they would lie."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    return tmp_path / "torch_home" / "hub" / "checkpoints"


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """evaluate(**constants) runs main() in this process -> what it wrote to eval.json."""
    before = {name: value for name, value in vars(stage4).items() if isinstance(value, (str, int, float))}
    handler = signal.getsignal(signal.SIGTERM)

    def call(**constants):
        vars(stage4).update(before)
        given = {"workers": 0, "device": "cpu", "dtype": "float32", "out": tmp_path / "eval.json", **constants}
        monkeypatch.setattr(sys, "argv", ["eval.py", *options(given)])
        stage4.main()
        return json.loads(Path(given["out"]).read_text())

    yield call
    vars(stage4).update(before)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(evaluate):
    """refused(**constants) -> the one line with which main() ends."""
    return lambda **constants: failure(lambda: evaluate(**constants))


@pytest.fixture
def unread(monkeypatch):
    """The test fails if an image is measured."""
    monkeypatch.setattr(data, "eval_loader", lambda *_, **__: pytest.fail("began to measure"))


@pytest.fixture(params=["tokenizer", "samples", "paired"])
def given(request, tokenizer, net, tmp_path):
    """Eleven images for each of the three evaluations."""
    if request.param == "tokenizer":
        return dict(tokenizer=tokenizer, val_images=11, probe_images=11, feature_net=net)
    return dict(samples=npz_of(noisy(pictures(11)), tmp_path / "samples.npz"), feature_net=net,
                reference=folder_of(pictures(11), tmp_path / "reference"), paired=request.param == "paired")


def options(given={}, **more):
    """Constants, as on the command line."""
    return [f"--{name}={value}" for name, value in {**given, **more}.items()]


def numbers(table):
    """What was measured, without words."""
    return {name: value for name, value in table.items() if isinstance(value, float)}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of sets of images and of pairs


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in a file, and torch-fidelity's Inception with them: from pixels to features and logits."""
    torch.manual_seed(0)
    ours, weights = pretrained.Inception(), {}
    classifier = {f"fc.{name}": tensor for name, tensor in ours.classifier.state_dict().items()}
    for name, tensor in {**ours.net.state_dict(), **classifier}.items():
        if tensor.ndim > 1:
            tensor = torch.randn(tensor.shape) * (1.6 / tensor[0].numel()) ** 0.5
        elif name.endswith("var"):
            tensor = torch.rand(tensor.shape) + 0.5
        elif tensor.ndim:
            tensor = torch.randn(tensor.shape) * 0.3 + name.endswith("bn.weight")
        weights[name] = tensor
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    return path, lambda pixels: theirs(pixels.movedim(-1, 1))


@pytest.mark.parametrize("size", [32, 64, 320])
@torch.no_grad()
def test_inception_equals_torch_fidelity_s(inception, size):
    """The same weights give the same features and logits, for images that are enlarged and that are reduced: as
    TensorFlow 1 did it."""
    path, theirs = inception
    pixels = noisy(pictures(2, size))
    for a, b in zip(pretrained.Inception.pretrained(path).eval()(pixels), theirs(pixels), strict=True):
        assert a.shape == b.shape and 1e-2 < b.std() < 1e2, "activations neither vanish nor explode"
        assert (a[0] - a[1]).abs().max() > 0.05 * b.std(), "nor are they the same for all images"
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@torch.no_grad()
def test_fid_and_is_with_inception(inception, evaluate, monkeypatch, tmp_path):
    """The whole way from files to FID and IS, which are called so; the file of weights is the published one."""
    path, theirs = inception
    asked = []
    monkeypatch.setattr(pretrained, "download_weights", lambda *given: asked.append(given[:2]) or path)
    a, b = pictures(11), noisy(pictures(10, seed=1))
    table = evaluate(samples=npz_of(a, tmp_path / "a.npz"), reference=npz_of(b, tmp_path / "b.npz"))
    (features_a, logits), (features_b, _) = theirs(a), theirs(b)
    assert numbers(table) == {"gFID": pytest.approx(distance(features_a, features_b), rel=1e-3),
                              "IS": pytest.approx(their_score(logits), rel=1e-3)}
    assert asked == [pretrained.INCEPTION]


@pytest.mark.parametrize("count_a, count_b", [(100, 60), (37, 95), (10, 10), (11, 19)])
def test_distance_and_score_equal_torch_fidelity_s(count_a, count_b):
    """For numbers of images that ten does not divide, too: the parts for IS begin where theirs do."""
    a, b = pictures(count_a), pictures(count_b, seed=1)
    (features_a, logits), (features_b, _) = Net()(a), Net()(b)
    statistics = [fid_features_to_statistics(features.double()) for features in (features_a, features_b)]
    theirs = fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID]
    of_a, of_b = sums_of(Net(), a), sums_of(Net(), b)
    assert theirs > 0.01
    assert stage4.frechet_distance(of_a.mean_and_cov(), of_b.mean_and_cov()) == pytest.approx(theirs, rel=1e-3)
    assert of_a.inception_score() == pytest.approx(their_score(logits), rel=1e-6)


@pytest.mark.parametrize("count, width", [(500, 40), (50, 300)])
def test_distance_of_a_set_to_itself_is_0(count, width):
    """And rounding makes it no less; with fewer images than features, too, where the covariance has no inverse."""
    for seed in range(5):
        x = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).relu()
        assert 0 <= stage4.frechet_distance(*[(x.mean(0), x.T.cov())] * 2) < 1e-3


def test_sums_keep_their_digits():
    """Features far from 0, as the sums of a million would be: float32 would lose the covariance."""
    near, far = (sums_of(network, pictures(200)).mean_and_cov()[1] for network in (Net(), Net(1e5)))
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-5)


def pairs(height, width):
    """Two uint8 (6, H, W, 3): noise and its negative, noise on a constant and on three pictures, twice the same."""
    a = pictures(6, 48)[:, :height, :width].clone()
    a[0], a[1] = torch.randint(0, 256, a[0].shape, generator=torch.Generator().manual_seed(0)), 200
    b = noisy(a)
    b[0], b[-1] = 255 - a[0], a[-1]
    return a, b


@pytest.mark.parametrize("height, width", [(24, 41), (11, 11)])
def test_psnr_and_ssim_equal_skimage_s(height, width, monkeypatch):
    """Image by image; PSNR of two equal images is infinite there."""
    a, b = pairs(height, width)
    similarity = [structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                        data_range=255, channel_axis=-1) for x, y in zip(a.numpy(), b.numpy())]
    assert min(similarity) < 0.1 and similarity[-1] == 1
    np.testing.assert_allclose(stage4.ssim(a, b), similarity, atol=1e-4)
    ratio = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a[:-1].numpy(), b[:-1].numpy())]
    steep = [np.mean([np.hypot(np.diff(x, axis=0)[:, :-1], np.diff(x, axis=1)[:-1])]) for x in
             (set.double().movedim(0, -1).numpy() for set in (a[:-1], b[:-1]))]
    monkeypatch.setattr(stage4, "feature_net", "none")
    monkeypatch.setattr(stage4, "lpips_net", "none")
    sums = stage4.PairMetrics(6, 48, process())
    sums.add(a[:1], b[:1], torch.arange(1))
    sums.add(a[1:-1], b[1:-1], torch.arange(1, 5))
    assert sums.results(process()) == (5, {"rFID": None, "PSNR": pytest.approx(np.mean(ratio), abs=1e-4), "LPIPS": None,
                                           "SSIM": pytest.approx(np.mean(similarity[:-1]), abs=1e-4),
                                           "sharpness": pytest.approx(steep[1] / steep[0])})


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:.*weight enum:UserWarning")
def test_lpips_equals_the_package_s_image_by_image(monkeypatch):
    """What the package gives for images in [-1, 1], averaged; random AlexNet, since its weights can't be had here."""
    torch.manual_seed(0)
    package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    monkeypatch.setattr(pretrained, "download_weights", lambda *_: None)
    monkeypatch.setattr(lpips, "LPIPS", lambda net, verbose: package)
    a, b = pairs(48, 40)
    expected = [package(*(image[None].movedim(-1, 1) / 127.5 - 1 for image in pair)).item() for pair in zip(a, b)]
    monkeypatch.setattr(stage4, "feature_net", "none")
    monkeypatch.setattr(stage4, "lpips_net", "alex")
    sums = stage4.PairMetrics(6, 48, process())
    for k in range(0, 6, 4):
        sums.add(a[k:k + 4], b[k:k + 4], torch.arange(k, min(k + 4, 6)))
    assert sums.results(process())[1]["LPIPS"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert min(expected[:-1]) > 1e-4 and not any(weight.requires_grad for weight in package.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_npz_is_read_in_place(tmp_path):
    """As sample.py writes it. Fifty thousand images of 256 pixels are 10 GB: neither opening the file nor a loading
    worker, forked or not, may copy them."""
    pixels, path = pictures(40), tmp_path / "samples.npz"
    store = latents.Store(tmp_path / "samples.part", {}, 40, (32, 32, 3), np.uint8)
    store.put(list(range(40)), pixels.numpy())
    np.savez(path, arr_0=store.items, arr_1=np.arange(40))
    source = stage4.open_images(path, "samples")
    pickled = pickle.dumps(source)
    assert isinstance(source.images, np.memmap) and len(pickled) < pixels[0].numel()
    for source in source, pickle.loads(pickled):
        assert len(source) == 40 and stage4.side_of(source) == 32
        assert all(np.array_equal(np.asarray(source.load(i)), pixels[i].numpy()) for i in range(40))


def test_folder_npz_and_statistics_of_the_same_images_give_the_same_table(evaluate, net, tmp_path):
    """Images of a reference folder, or of folders in it, may have any size: they are cropped as validation images are.
    Statistics are as ADM publishes them, with images beside them, which are not looked at."""
    samples, deep, sizes = pictures(35), tmp_path / "b" / "deep", [(32, 32), (50, 40), (40, 70), (130, 65), (20, 25)]
    deep.mkdir(parents=True)
    originals = [Image.fromarray(image.numpy()).resize(sizes[i % 5]) for i, image in enumerate(pictures(50, 80, 1))]
    for i, image in enumerate(originals):
        image.save(deep / f"{i:02}.png")
    reference = torch.from_numpy(np.stack([data.center_crop(image, 32) for image in originals]))
    features, logits = Net()(reference)[0], Net()(samples)[1]
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False),
             arr_0=np.zeros(3))
    inputs = [npz_of(samples, tmp_path / "a.npz"), folder_of(samples, tmp_path / "a"), tmp_path / "a.npz"], \
        [npz_of(reference, tmp_path / "b.npz"), tmp_path / "b", tmp_path / "statistics.npz"]
    for a, b, against in zip(*inputs, ("50 images", "50 images", "the statistics")):
        table = evaluate(samples=a, reference=b, feature_net=net)
        found = {"gFD (net.pt2)": net_distance(samples, reference),
                 "IS (net.pt2)": pytest.approx(their_score(logits), rel=1e-5)}
        if a.suffix == ".npz":  # it says what the samples should show
            right = (logits.argmax(1) == torch.arange(35) % 5).double()
            found["recognised (net.pt2)"] = pytest.approx(right.mean().item())
            found["recognised, worst class (net.pt2)"] = pytest.approx(min(right[k::5].mean().item() for k in range(5)))
        assert numbers(table) == found
        assert table["measured"] == f"{a}: 35 samples, 32 px, against {against} of {b}"


def test_reference_may_be_the_shapes(evaluate, net, monkeypatch, tmp_path):
    """Five thousand of validation, here thirty, at the samples' size."""
    few, samples = data.Shapes("val", 30, 32), pictures(12)
    monkeypatch.setattr(data, "Shapes", lambda *given: {("val", 5000, 32): few}[given])
    table = evaluate(samples=npz_of(samples, tmp_path / "a.npz"), reference="shapes", feature_net=net)
    images = torch.from_numpy(np.stack([np.asarray(few.load(i)) for i in range(30)]))
    assert table["gFD (net.pt2)"] == net_distance(samples, images) and "30 images of shapes" in table["measured"]


def test_tokenizer_s_and_pairs_table(tokenizer, net, evaluate, refused, monkeypatch, tmp_path):
    """The tokenizer's is that of its reconstructions, wherever they come from; fewer than ten will do. Structure loss
    is 1 - R_lat / R_tok."""
    monkeypatch.setattr(pretrained, "load_lpips", lambda *_: lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True))
    shapes, tcae = data.Shapes("val", 500, 32), TCAE.from_checkpoint(torch.load(tokenizer))

    def known(indices):
        originals = torch.from_numpy(np.stack([data.center_crop(shapes.load(i), 32) for i in indices]))
        with torch.no_grad():
            reconstructions = data.to_uint8(tcae.decode(tcae.encode(data.to_float(originals, CPU))))
        difference = (originals.float() - reconstructions).abs().mean().item() / 127.5
        sharpness = stage4.gradient_magnitude(reconstructions).mean() / stage4.gradient_magnitude(originals).mean()
        return originals, reconstructions, {
            "rFD (net.pt2)": net_distance(originals, reconstructions),
            "PSNR": pytest.approx(data.psnr(originals, reconstructions).mean().item(), rel=1e-4),
            "SSIM": pytest.approx(stage4.ssim(originals, reconstructions).mean().item(), rel=1e-4),
            "LPIPS": pytest.approx(difference, rel=1e-4), "sharpness": pytest.approx(sharpness.item(), rel=1e-4)}

    originals, reconstructions, expected = known((0, 166, 333, 499))
    files = dict(reference=folder_of(originals, tmp_path / "a"), samples=folder_of(reconstructions, tmp_path / "b"))
    table = evaluate(**files, paired=True, feature_net=net)
    assert numbers(table) == expected and table["constants"]["paired"] and "4 pairs" in table["measured"]
    kept = tmp_path / "reconstructions.npz"
    table = evaluate(tokenizer=tokenizer, feature_net=net, val_images=50, statistics=kept)  # of 4 a probe may know none
    _, reconstructions, expected = known(np.linspace(0, 499, 50).round().astype(int))
    assert f"{tokenizer}: reconstructions of 50 images of shapes, 32 px" in table["measured"]
    assert "fitted on 80 training images" in table["measured"]
    before, after = table["probe on tokens"], table["probe on latents"]
    assert numbers(table) == {**expected, **{name: table[name] for name in PROBES}}
    assert table["structure loss"] == pytest.approx(1 - after / before)
    samples = pictures(12)
    table = evaluate(samples=npz_of(samples, tmp_path / "samples.npz"), reference=kept, feature_net=net)
    assert table["gFD (net.pt2)"] == net_distance(samples, reconstructions)
    assert "statistics" in refused(tokenizer=tokenizer, feature_net="none", statistics=kept)
    assert "r.npz can't be written" in refused(tokenizer=tokenizer, statistics=tmp_path / "none" / "r.npz")


def test_images_without_classes_have_no_probes(tokenizer, evaluate, tmp_path, capsys):
    """And nothing is encoded for them."""
    for split, count in ("train", 3), ("val", 2):
        folder_of(pictures(count), tmp_path / "photos" / split)
    table = evaluate(tokenizer=tokenizer, data_dir=tmp_path / "photos", feature_net="none", lpips_net="none")
    assert all(table[name] is None for name in PROBES) and table["PSNR"] > 0
    assert "probes fitted" not in table["measured"] and "no probes" in capsys.readouterr().out


@pytest.mark.parametrize("labels, found", [(np.arange(12) % 5, True), (np.arange(12), False), (np.zeros(12), False),
                                           (np.zeros((12, 1), int), False), (np.full(12, -1), False)])
def test_only_one_class_for_each_sample_is_compared(evaluate, net, tmp_path, labels, found):
    """arr_1 of other people's files may be anything."""
    np.savez(tmp_path / "a.npz", arr_0=pictures(12).numpy(), arr_1=labels)
    table = evaluate(samples=tmp_path / "a.npz", reference=folder_of(pictures(12), tmp_path / "b"), feature_net=net)
    assert ("recognised (net.pt2)" in table) == found


@pytest.mark.parametrize("values", [20, 300])
def test_pca_is_numpy_s(values, monkeypatch):
    """The baseline's PSNR, by a singular value decomposition in float64; with more values than pixels it has no error.
    """
    monkeypatch.setattr(stage4, "workers", 0)
    train, val = data.Shapes("train", 300, 8), data.Shapes("val", 40, 8)
    x, y = (np.stack([np.asarray(source.load(i)) for i in range(len(source))]).reshape(-1, 192) / 255.0
            for source in (train, val))
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:values]
    z = ((y - x.mean(0)) @ basis.T @ basis + x.mean(0)).clip(0, 1)
    mse = np.square((z * 255).round() - y * 255).mean(1).clip(1e-10)
    assert stage4.pca_psnr(train, val, values, 8, process()) == pytest.approx(
        (10 * np.log10(255**2 / mse)).mean(), abs=0.02)


def test_pca_stands_in_the_table_when_it_is_asked_for(tokenizer, evaluate):
    """With as many values as the tokenizer's latents have."""
    table = evaluate(tokenizer=tokenizer, feature_net="none", lpips_net="none", val_images=8, probe_images=40, pca=True)
    assert 5 < table["PSNR of PCA, 96 values"] < 60


def test_no_table_depends_on_processes_or_batches(given, evaluate, monkeypatch):
    """Eleven images in batches of 64 or 4, with a worker or without, on one process, two, or thirteen, of which two
    have none to look at."""
    one = evaluate(**given, workers=1)
    assert numbers(evaluate(**given, batch_size=4)) == pytest.approx(numbers(one), rel=1e-5)
    monkeypatch.setattr(pretrained, "FeatureNet", lambda *_: Net())  # torch.export.load is not for threads
    work = stage4.evaluate_tokenizer if "tokenizer" in given else \
        stage4.evaluate_pairs if given["paired"] else stage4.evaluate_samples
    for count in 2, 13:
        for about, results in together(count, work):  # with the constants of the last call
            assert about == one["measured"] and numbers(results) == pytest.approx(numbers(one), rel=1e-5)


@pytest.mark.parametrize("given", ["tokenizer", "samples"], indirect=True)
def test_torchrun(given, evaluate, tmp_path):
    """Two real processes give the table of one. eval.json lies beside the checkpoint, or the samples. No workers: where
    other threads run, Python before 3.11.8 may hang in a fork (its issue 112275)."""
    result = run_script("eval.py", *options(given, workers=0, dtype="float32", device="cpu"), nproc=2,
                        TORCH_HOME=tmp_path / "torch_home", **CLOSED)
    path = (given.get("tokenizer") or given["samples"]).parent / "eval.json"
    two, one = json.loads(path.read_text()), evaluate(**given)
    assert one["measured"] == two["measured"] and one["measured"] in result.stdout and str(path) in result.stdout
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-5) and "Traceback" not in result.stderr
    width = max(map(len, numbers(one)))
    assert all(f"  {name:<{width}}{value:10.4f}\n" in result.stdout for name, value in numbers(one).items())


def test_probes_that_are_always_wrong_have_no_structure_loss(tokenizer, evaluate, monkeypatch):
    """As may happen with few images: 1 - 0 / 0 is no error."""
    monkeypatch.setattr(stage4, "probe", lambda *_: 0.0)
    table = evaluate(tokenizer=tokenizer, val_images=2, probe_images=2)
    assert table["probe on tokens"] == 0 and table["structure loss"] is None


def test_networks_that_are_not_wanted_are_not_fetched(tokenizer, evaluate, monkeypatch, capsys, refused, tmp_path):
    """With "none" nothing is asked of the network, and the line about what is missing says how to get it."""
    monkeypatch.setattr(pretrained, "download_weights", Mock(side_effect=AssertionError))
    table = evaluate(tokenizer=tokenizer, feature_net="none", lpips_net="none", val_images=2, probe_images=2)
    assert table["rFID"] is None and table["LPIPS"] is None and table["PSNR"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "will not be measured" in line]
    assert len(lines) == 2 and "rFID" in lines[0] and "feature_net=none" in lines[0]
    assert "LPIPS" in lines[1] and "lpips_net=none" in lines[1]
    samples = folder_of(pictures(10), tmp_path / "a")
    assert "feature_net=none" in refused(samples=samples, reference=samples, feature_net="none")


@pytest.mark.parametrize("given", ["tokenizer", "paired"], indirect=True)
def test_without_weights_the_rest_of_the_table_is_measured(given, evaluate, offline, monkeypatch, capsys):
    """A line for each metric, before anything is measured, names the file that is missing, from where it comes and where
    it should lie."""
    shown, eval_loader, url = [], data.eval_loader, pretrained.INCEPTION[0]
    monkeypatch.setattr(data, "eval_loader", lambda *words, **more: shown.append(capsys.readouterr().out)
                        or eval_loader(*words, **more))
    table = evaluate(**{**given, "feature_net": ""})
    measured = {"PSNR", "SSIM", "sharpness"} | (PROBES if "tokenizer" in given else set())
    assert numbers(table).keys() == measured and table.keys() == measured | {"measured", "constants", "rFID", "LPIPS"}
    assert table["rFID"] is None and table["LPIPS"] is None
    lines = [line for line in shown[0].splitlines() if "will not be measured" in line]
    for url, line in zip((url, "https://download.pytorch.org/models/vgg16-397923af.pth"), lines, strict=True):
        assert url in line and str(offline / url.rsplit("/", 1)[1]) in line
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rFID", "–"] in rows and ["LPIPS", "–"] in rows


# ----------------------------------------------------------------------------------------------------------------------
# Files that can't be used


@pytest.fixture
def many(tmp_path):
    """120 images with noise, and without; and the folders in which they lie, by the names of the constants."""
    images = dict(samples=noisy(pictures(120)), reference=pictures(120))
    return images, {name: folder_of(pixels, tmp_path / name) for name, pixels in images.items()}


@pytest.mark.parametrize("where, content", [("samples", None), ("reference", None), ("samples", b""),
                                            ("reference", b"not an image")])
def test_one_broken_file_is_left_out_and_named(many, evaluate, refused, net, capsys, where, content):
    """The others give the table and are counted where they are; cut off, empty, or something else. A second one is more
    than one percent, and stops."""
    images, paths = many
    broken = [cut(paths[where] / "040.png")]
    if content is not None:
        broken[0].write_bytes(content)
    table = evaluate(**paths, feature_net=net)
    images[where] = torch.cat([images[where][:40], images[where][41:]])
    a, b = images.values()
    assert table["gFD (net.pt2)"] == net_distance(a, b)
    assert table["measured"] == f"{paths['samples']}: {len(a)} samples, 32 px, against {len(b)} images of " \
                                f"{paths['reference']}"
    assert f"\n{where}: {broken[0]} can't be used" in capsys.readouterr().out
    broken.append(cut(paths[where] / "100.png"))
    for paired in False, True:
        message = refused(**paths, feature_net=net, paired=paired)
        assert f"{where}: 2 of 120" in message and all(str(path) in message for path in broken)


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("broken", [dict(samples=40), dict(reference=119), dict(samples=40, reference=119)])
def test_a_pair_of_which_one_is_broken_is_left_out(many, evaluate, net, capsys, monkeypatch, broken, batch_size):
    """Both images of it, and only it: the others are still compared with their own partners. On two processes, too, of
    which one has a batch without a whole pair."""
    images, paths = many
    kept = [i for i in range(120) if i not in broken.values()]
    bad = [cut(paths[name] / f"{i:03}.png") for name, i in broken.items()]
    table, shown = evaluate(**paths, feature_net=net, paired=True, batch_size=batch_size), capsys.readouterr().out
    a, b = (pixels[kept] for pixels in images.values())
    assert table["PSNR"] == pytest.approx(data.psnr(a, b).mean().item()) and all(str(path) in shown for path in bad)
    assert table["rFD (net.pt2)"] == net_distance(a, b) and f"{len(kept)} pairs" in table["measured"]
    monkeypatch.setattr(pretrained, "FeatureNet", lambda *_: Net())  # torch.export.load is not for threads
    for about, results in together(2, stage4.evaluate_pairs):
        assert about == table["measured"] and numbers(results) == pytest.approx(numbers(table), rel=1e-5)


@pytest.mark.parametrize("original, reconstruction", [
    (lambda k: f"val_{k:08}.png", lambda k: f"{k}.png"), (lambda k: f"n{k % 3}/x{k}y.png", lambda k: f"x{k}y.webp"),
    (lambda k: f"{k % 3}/{k // 3}.png", lambda k: f"{k % 3}/{k // 3}.webp"), (lambda k: f"{k:02}.png", None),
    (lambda k: f"{k % 3}/{k // 3}.png", lambda k: f"{k // 3}/{k % 3}.png"),
    (lambda k: f"{k}.png", lambda k: f"{k + 1}.png"),
    (lambda k: f"{k or 'first'}.png", lambda k: f"{k or 'other'}.png"),
])
def test_pairs_are_matched_by_name(evaluate, refused, tmp_path, original, reconstruction):
    """With or without zeros in front, in classes or not; where names don't tell, by no means by their order."""
    images, changed = pictures(12), noisy(pictures(12))
    for folder, pixels, name in ("a", images, original), ("b", changed, reconstruction):
        for k, image in enumerate(pixels if name else []):
            (tmp_path / folder / name(k)).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(tmp_path / folder / name(k), lossless=True)
    samples = tmp_path / "b" if reconstruction else npz_of(changed, tmp_path / "b.npz")
    given = dict(samples=samples, reference=tmp_path / "a", paired=True, feature_net="none", lpips_net="none")
    if reconstruction and (reconstruction(11) in ("3/2.png", "12.png") or reconstruction(0) == "other.png"):
        message = refused(**given)
        assert "paired=True" in message and str(samples) in message and "names" in message
    else:
        assert evaluate(**given)["PSNR"] == pytest.approx(data.psnr(images, changed).mean().item())


def test_broken_validation_images(tokenizer, evaluate, refused, tmp_path, capsys):
    """One of 120 is left out and named; above one percent of those that were asked for, it stops."""
    for split in "train", "val":
        for name, part in zip(("cat", "dog"), pictures(120).chunk(2)):
            folder_of(part, tmp_path / split / name)
    broken = cut(tmp_path / "val" / "dog" / "007.png")
    given = dict(tokenizer=tokenizer, data_dir=tmp_path)
    table = evaluate(**given, probe_images=20)
    assert "119 images" in table["measured"] and f"data_dir: {broken}" in capsys.readouterr().out
    cut(tmp_path / "val" / "cat" / "000.png")
    assert "2 of 120" in refused(**given)
    assert "1 of 4" in refused(**given, val_images=4)  # the first, which is broken, and every fortieth


# ----------------------------------------------------------------------------------------------------------------------
# What ends with one line, and before anything is measured


def test_neither_or_both_and_wrong_constants(refused, unread, tokenizer, tmp_path):
    """What to give is said, and what is wrong."""
    for given in {}, dict(tokenizer=tokenizer, samples=tmp_path):
        message = refused(**given)
        assert "--tokenizer" in message and "--samples" in message
    assert "paired=True has no effect beside --tokenizer" in refused(tokenizer=tokenizer, paired=True)
    assert "lpips_net='resnet'" in refused(tokenizer=tokenizer, lpips_net="resnet")
    assert "batch_size=0" in refused(tokenizer=tokenizer, batch_size=0)
    tiny, samples = (npz_of(pictures(10, size), tmp_path / f"{size}.npz") for size in (10, 32))
    assert "val_images=9 has no effect beside --samples" in refused(samples=tiny, reference=tiny, val_images=9)
    assert "10 pixels" in refused(samples=tiny, reference=tiny, paired=True), "SSIM needs 11"
    assert "reference=: there is no such folder" in refused(samples=samples)
    assert pretrained.INCEPTION[0] in refused(samples=samples, reference=samples), "nothing would be left to measure"
    for name in "train/cat", "train/dog", "val/cat":
        folder_of(pictures(2), tmp_path / name)
    assert "dog" in refused(tokenizer=tokenizer, data_dir=tmp_path), "a half-copied data set"


@pytest.mark.parametrize("name", ["tokenizer", "samples"])
def test_a_path_that_does_not_exist(refused, tmp_path, name):
    """A mistyped folder is named with its own constant, also where the results would lie in it."""
    for path in tmp_path / "file", tmp_path / "folder" / "file":
        assert f"{name}={path}" in refused(**{name: path}, out="")


@pytest.mark.parametrize("out", ["nowhere/eval.json", "."])
@pytest.mark.parametrize("given", ["samples"], indirect=True)
def test_results_that_can_not_be_written_are_known_at_once(given, refused, unread, tmp_path, out):
    """Not after an hour of measuring: in a folder that is not there, or where there is a folder."""
    assert f"out={tmp_path / out}" in refused(**given, out=tmp_path / out)


@pytest.mark.parametrize("given", ["samples"], indirect=True)
def test_results_are_whole_or_not_there(given, evaluate, monkeypatch, tmp_path):
    """A table script takes a file that is there for a measurement: a full disk must not leave an empty one."""
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(SystemExit, match="eval.json can't be written: No space left"):
        evaluate(**given)
    assert not list(tmp_path.glob("eval.json*"))


@pytest.mark.parametrize("name, write, words, more", [
    ("samples", lambda path: np.savez(path, images=np.zeros(3)), ["arr_0", "images.npy"], {}),
    ("samples", lambda path: np.savez(path, np.zeros((10, 32, 32, 3), np.float32)), ["float32", "uint8"], {}),
    ("samples", lambda path: np.savez(path, np.zeros((10, 3, 32, 32), np.uint8)), ["(10, 3, 32, 32)", "H, 3)"], {}),
    ("samples", lambda path: np.savez(path, np.zeros((0, 32, 32, 3), np.uint8)), ["(0, 32, 32, 3)"], {}),
    ("samples", lambda path: np.savez(path, np.zeros((10, 32, 32, 3), np.uint8, order="F")), ["Fortran"], {}),
    ("samples", lambda path: np.savez_compressed(path, np.zeros((10, 32, 32, 3), np.uint8)), ["compressed"], {}),
    ("samples", lambda path: npz_of(pictures(9), path), ["9 images", "10"], {}),
    ("samples", lambda path: cut(npz_of(pictures(12), path), 20000), ["neither"], {}),
    ("samples", lambda path: path.mkdir(), ["no images", ".png"], {}),
    ("samples", lambda path: folder_of(pictures(9), path) and folder_of(pictures(2, 40), path / "z"),
     ["32 × 32", "40 × 40"], {}),
    ("samples", lambda path: folder_of(pictures(10)[:, :20], path), ["32 × 20"], {}),
    ("reference", lambda path: None, ["no such folder"], dict(feature_net="")),
    ("reference", lambda path: None, ["no such folder"], dict(feature_net="", paired=True)),
    ("reference", lambda path: npz_of(pictures(12, 40), path), ["another size", "32"], dict(feature_net="")),
    ("reference", lambda path: npz_of(pictures(11), path), ["12", "11"], dict(feature_net="", paired=True)),
    ("reference", lambda path: np.savez(path, mu=np.zeros(8), sigma=np.eye(8)), ["no arr_0"], dict(paired=True)),
    ("reference", lambda path: np.savez(path, mu=np.zeros(9), sigma=np.eye(9)), ["(9,)", "8 features"], {}),
    ("feature_net", lambda path: None, ["no such file"], {}),
    ("feature_net", lambda path: torch.save({"weights": torch.zeros(3)}, path), ["torch.export"], {}),
    ("feature_net", lambda path: export(Net(), path, None), ["(B, 32, 32, 3) for any B"], {}),
    ("feature_net", lambda path: export(Net(), path, torch.export.Dim("batch", max=8)), ["any B"], {}),
    ("feature_net", lambda path: export(torch.nn.Flatten(), path), ["logits"], {}),
])
def test_a_wrong_file(refused, unread, net, tmp_path, capsys, name, write, words, more):
    """The constant, the path, and what is wrong; of a reference even before weights are looked for."""
    path, whole = tmp_path / ("it.pt2" if name == "feature_net" else "it.npz"), npz_of(pictures(12), tmp_path / "w.npz")
    write(path)
    message = refused(**{"samples": whole, "reference": whole, "feature_net": net, name: path, **more})
    assert all(word in message for word in [name, str(path), *words]), message
    assert "weights" not in capsys.readouterr().out


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["weights", "sample_inputs", "constants", "aotinductor"])
def test_a_network_s_file_runs_no_code(refused, net, tmp_path, place):
    """Wherever torch.export.load would unpickle, or load a compiled library: the file is refused, and nothing ran."""
    path, ran, saved = tmp_path / "it.pt2", tmp_path / "ran", io.BytesIO()
    torch.save(Payload(ran), saved)
    with zipfile.ZipFile(net) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if place == "weights" and name.endswith("weights_config.json"):
                about = json.loads(content)
                for each in about["config"].values():
                    each["use_pickle"] = True
                content = json.dumps(about)
            if place == "constants" and name.endswith("constants_config.json"):
                content = json.dumps({"config": {"x": dict(path_name="opaque_obj_0", is_param=False, use_pickle=True,
                                                           tensor_meta=None)}})
            if f"data/{place}/" in name and not name.endswith(".json"):
                content = saved.getvalue()
            changed.writestr(name, content)
        root = name.split("/")[0]
        if place == "constants":
            changed.writestr(f"{root}/data/constants/opaque_obj_0", pickle.dumps(Payload(ran)))
        if place == "aotinductor":
            changed.writestr(f"{root}/data/aotinductor/model/model.so", b"")
    samples = npz_of(pictures(12), tmp_path / "samples.npz")
    message = refused(samples=samples, reference=samples, feature_net=path)
    assert f"feature_net={path}" in message and not ran.exists()
    assert ("harmful" if place in ("constants", "aotinductor") else "eights") in message
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        pretrained.FeatureDistance(str(path), process())
    assert not ran.exists()


def test_an_error_is_all_that_stands_on_stderr(tmp_path):
    """Not the library's own lines before it, nor a traceback; and the exit status is 1."""
    samples, network = npz_of(pictures(12), tmp_path / "samples.npz"), tmp_path / "text.pt2"
    network.write_bytes(b"not a network")
    result = run_script("eval.py", *options(samples=samples, reference=samples, feature_net=network), ok=False)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: feature_net={network} must be a file of torch.export")


# ----------------------------------------------------------------------------------------------------------------------
# Probes


def halves(features, labels):
    """Training and validation half of features (N, D) and labels (N,), for probe()."""
    half = len(labels) // 2
    return features[:half], labels[:half], features[half:], labels[half:]


def gaussian_pair(count):
    """Unit Gaussians at ±1 along a line: Φ(1) = 84.1 % is the most that any classifier can know."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (count,))
    return torch.randn(count, 4) + (2 * labels[:, None] - 1) * torch.tensor([1.0, 0, 0, 0]), labels


def test_each_probe_sees_what_it_is_named_after():
    """What [CLS] alone knows is found by the probe on [CLS] and tokens, what latents alone know by theirs."""
    rng, labels = torch.Generator().manual_seed(0), torch.arange(400) % 2
    sign, width = 2.0 * labels - 1, 4
    source, tcae = Mock(classes=["a", "b"], labels=labels.tolist()), Mock(latent_mean=torch.zeros(3, 1, 1))
    tcae.encoder.width = width

    def features(cls, latents):
        """Noise, with the label in one of the two."""
        pooled = stage4.PooledFeatures(source, tcae)
        pooled.add(torch.randn(400, width, generator=rng) + 9 * cls * sign[:, None],
                   torch.randn(400, 9, width, generator=rng),
                   torch.randn(400, 3, 2, 2, generator=rng) + 9 * latents * sign[:, None, None, None], np.arange(400))
        return pooled

    for where, knows in (dict(cls=1, latents=0), "[CLS] and tokens"), (dict(cls=0, latents=1), "latents"):
        found = stage4.probes(features(**where), features(**where), process())
        assert found.pop(f"probe on {knows}") == 1 and found.pop("structure loss") is not None
        assert len(found) == 2 and all(0.35 < accuracy < 0.65 for accuracy in found.values())


def test_probe_finds_what_is_linearly_there():
    """With the feature that tells three classes, large as it is, all are right; without it, a third. Of two Gaussians
    it finds Φ(1), also far from 0 in units of their spread, as after a layer with a bias, and beside a constant."""
    torch.manual_seed(0)
    features, labels = torch.randn(4000, 20), torch.randint(0, 3, (4000,))
    features[:, 7] += 100 * labels  # a large scale, which standardising must take away
    assert stage4.probe(*halves(features, labels), 3, process()) == 1.0
    assert stage4.probe(*halves(features[:, :5], labels), 3, process()) == pytest.approx(1 / 3, abs=0.06)
    features, labels = gaussian_pair(20000)
    assert stage4.probe(*halves(features, labels), 2, process()) == pytest.approx(0.8413, abs=0.01)
    far = torch.cat([features * 0.01 + 30, torch.full((20000, 1), 7.3)], 1)
    assert stage4.probe(*halves(far, labels), 2, process()) == pytest.approx(0.8413, abs=0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_probe_of_several_processes_is_the_probe_of_one(count, monkeypatch):
    """Each has rows of its own, in unequal numbers, the last none at all, and looks at them in chunks; all learn the
    accuracy over all."""
    given = halves(*gaussian_pair(4000))
    alone = stage4.probe(*given, 2, process())
    monkeypatch.setattr(stage4.chunks, "__defaults__", (300,))

    def work(dist):
        mine = slice(dist.rank, None, 2) if dist.rank < 2 else slice(0, 0)
        return stage4.probe(*(part[mine] for part in given), 2, dist)

    accuracies = together(count, work)
    assert len(set(accuracies)) == 1 and accuracies[0] == pytest.approx(alone, abs=0.005)
