"""How fast every stage runs here, and how fast it could: one process, one device, medians after warm-up.

    python bench.py                          # on a CPU the sizes of config/shapes_*.py, on a GPU the paper's
    python bench.py --sizes=paper --batch_size=2    # the paper's on a CPU
    python bench.py --only=data,tokens       # some of the tables

steps     every training step, encoding, decoding and sampling: images/s, TFLOP/s by PyTorch's count, that as a share of
          what a large matrix product reaches here; `products`: the share of the time that the step's own products and
          convolutions take when each is run alone; `× plain`: how much longer the step takes written plainly, in
          float32, the patch head on all tokens; and memory
tokens    what the method is about: time and memory of S–S at p = 64 … 8 without and at p = 8 with staged compression
data      decoding, crops, augmentation and masks of 500 × 375 px JPEGs per core, beside torchvision's transforms
run       a real train_tokenizer.py: seconds to its first step, and the share of time that it waits for data

Operations: two per multiply-add, attention included, with the product that fused attention does again on its way back.
On CUDA float32 is TF32, and what is written plainly is not compiled. Nothing is downloaded: LPIPS and the discriminator
have random weights, which take as long. docs/speed.md tells what was measured and tried.
"""
import collections
import copy
import ctypes
import importlib
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import data
import runtime
import ssl
import train_dit as stage2
import train_tokenizer as stage1
from model import JointTokenizer, LightningDiT, TCAE, compile_blocks, flow_matching_loss, guided, sample_flow
from runtime import check

only = "steps,tokens,data,run"  # which tables
sizes = "auto"  # "shapes" or "paper"; auto = paper on CUDA, else shapes
batch_size = 0  # images per step; 0 = the configuration's, for the paper's sizes an eighth of it (one GPU of eight)
repeats = 9  # timed calls of each, of which the median is shown
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of matrix products: bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True (a CPU needs a C++ compiler for it), False; auto = on CUDA

HERE, CPU = Path(__file__).parent, torch.device("cpu")
CONFIGS = {"shapes": {"joint": ["shapes_tokenizer.py"], "finetune": ["shapes_tokenizer.py", "cifar10_finetune.py"],
                      "dit": ["shapes_dit.py"]},
           "paper": {"joint": [], "finetune": ["finetune_decoder.py"], "dit": []}}  # config files of each stage

# ----------------------------------------------------------------------------------------------------------------------
# Clocks and counters


def wait(on):
    """Until the device has done what it was told."""
    if on.type != "cpu":
        getattr(torch, on.type).synchronize()


def seconds(function, on, times=1):
    """Of one call, measured over `times` calls."""
    wait(on)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait(on)
    return (time.perf_counter() - start) / times


def medians(functions, on):
    """{name: function} -> {name: median seconds}. In turn, so that a slow minute of the machine hits all of them."""
    times = {name: [] for name in functions}
    for _ in range(2 + repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, on))
    return {name: sorted(each[2:])[repeats // 2] for name, each in times.items()}


def peak_memory(function, on):
    """MB that a call needs at its peak above what is there before it; NaN where that can't be known."""
    if on.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if on.type != "cpu" or not sys.platform.startswith("linux"):
        return float("nan")

    def resident(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would count as there before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    except (OSError, AttributeError):  # some containers forbid it, musl has no malloc_trim
        return float("nan")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


Like = collections.namedtuple("Like", "shape stride dtype")


def describe(value):
    """Arguments, hashable, with a Like in place of every tensor."""
    if isinstance(value, torch.Tensor):
        return Like(tuple(value.shape), value.stride(), value.dtype)
    return tuple(describe(each) for each in value) if isinstance(value, (list, tuple)) else value


def rebuild(value, on):
    """The reverse: a Like becomes a tensor of random numbers."""
    if isinstance(value, Like):
        count = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride))
        return torch.randn(count, device=on).to(value.dtype).as_strided(value.shape, value.stride)
    return [rebuild(each, on) for each in value] if isinstance(value, tuple) else value


# PyTorch before 2.15 has no count for the CPU's attention; it is that of the GPU's
for way in "", "_backward":
    flop_registry.setdefault(getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{way}"),
                             flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{way}")])


class Products(TorchDispatchMode):
    """Within it, every matrix product, convolution and attention kernel is counted, {call: times}, with the shapes,
    strides and types of its tensors; `operations` is the sum of theirs, two per multiply-add."""

    def __init__(self):
        super().__init__()
        self.calls, self.operations = collections.Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op._overloadpacket in flop_registry:
            self.calls[op, describe(args), describe(tuple((kwargs or {}).items()))] += 1
            self.operations += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def seconds(self, on):
        """What all of them take when each is run alone, on tensors like its own; with what it takes to launch them."""
        total = 0.0
        for (op, args, kwargs), times in self.calls.items():
            args, kwargs = rebuild(args, on), dict(rebuild(kwargs, on))
            call = lambda: op(*args, **kwargs)
            call()
            enough = max(1, min(1000, int(0.005 / seconds(call, on))))  # calls per measurement: 5 ms or so
            total += times * sorted(seconds(call, on, enough) for _ in range(5))[2]
        return total


def large_product(on, dtype):
    """TFLOP/s of a plain product of large square matrices."""
    n = 8192 if on.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=on).to(dtype)
    return 2 * n**3 / medians({"": lambda: a @ b}, on)[""] / 1e12


# ----------------------------------------------------------------------------------------------------------------------
# Stages, each as a function without arguments that does one step


def configure(script, files, *arguments):
    """Sets a script's constants to what a run with these config files and arguments would have."""
    importlib.reload(script)
    runtime.configure(vars(script), [*(str(HERE / "config" / file) for file in files), *arguments])


def images_per_step(script):
    return batch_size or (script.batch_size // 8 if sizes == "paper" else script.batch_size)


def with_all_tokens(views):
    """The same loss, written plainly: head and loss run on every token, those that are not masked have weight 0."""
    weights = torch.zeros(views["mask"].numel(), device=views["mask"].device)
    weights[views["positions"]] = views["weights"]
    return {**views, "positions": torch.arange(len(weights), device=weights.device), "weights": weights}


def tokenizer_step(images, processes, plain=False):
    """A step of train_tokenizer.py, its constants as they are -> (function, modules with blocks to compile)."""
    torch.manual_seed(0)
    on, joint = processes.device, stage1.ssl_method != "none"
    tcae = TCAE.from_constants(vars(stage1)).to(on)
    heads, teacher, ibot, multi_crop = stage1.build_ssl(tcae, processes) if joint else (None,) * 4
    adversary = perceptual = None
    if stage1.adversarial_weight:
        tcae.requires_grad_(False).decoder.requires_grad_(True)
        adversary, averaged = stage1.Adversary(tcae.decoder.head.weight, processes), copy.deepcopy(tcae.decoder)
    if stage1.lpips_weight:
        import lpips
        perceptual = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        runtime.lpips_in_autocast(perceptual.to(on).requires_grad_(False), processes)
    model = JointTokenizer(tcae, heads, multi_crop and multi_crop.masks)
    optimizer = stage1.build_optimizer(model, processes)
    student = [*tcae.encoder.parameters(), *heads.parameters()] if joint else []
    teachers = [*teacher["encoder"].parameters(), *teacher["heads"].parameters()] if joint else []
    source = data.Shapes("train", images, stage1.image_size)
    views, _ = next(iter(data.batches(source, stage1.StepViews(multi_crop), images, 0, 1, 0, processes)))
    views = {name: data.to_float(x, on) if x.dtype == torch.uint8 else x.to(on) for name, x in views.items()}
    views = with_all_tokens(views) if plain and joint else views

    def step():
        loss, _ = stage1.losses(model, teacher, ibot, perceptual, adversary, views, 0.9, processes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage1.grad_clip)
        optimizer.step(stage1.learning_rate)
        if joint:
            ibot.update_centers()
            runtime.update_average(teachers, student, stage1.teacher_momentum)
        if adversary:
            adversary.step(stage1.learning_rate)
            runtime.update_average(list(averaged.parameters()), list(tcae.decoder.parameters()), stage1.decoder_ema)

    return step, [module for module in (model, teacher, adversary and adversary.network) if module]


def latent_shape():
    return stage2.latent_shape({"constants": vars(stage1)})


def generator_step(images, processes):
    """The same for train_dit.py."""
    torch.manual_seed(0)
    on, shape = processes.device, latent_shape()
    model = LightningDiT(stage2.size, shape[0], shape[1], 1000).to(on)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = runtime.Optimizer(model, vars(stage2), processes)
    z, noise = torch.randn(2, images, *shape, device=on)
    t, labels = torch.rand(images, device=on), torch.randint(1000, (images,), device=on)
    trained, averaged = list(model.parameters()), list(ema.parameters())

    def step():
        with processes.autocast():
            loss = flow_matching_loss(model, z, labels, noise, t)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, stage2.grad_clip)
        optimizer.step(stage2.learning_rate)
        runtime.update_average(averaged, trained, stage2.ema_momentum)

    return step, [model]


def coding(images, processes):
    """-> (encode, decode, modules)"""
    tcae = TCAE.from_constants(vars(stage1)).to(processes.device).requires_grad_(False)
    pixels = torch.rand(images, 3, stage1.image_size, stage1.image_size, device=processes.device)
    z = torch.randn(images, *latent_shape(), device=processes.device)

    def encode():
        with torch.no_grad(), processes.autocast():
            tcae.encode(pixels)

    def decode():
        with torch.no_grad(), processes.autocast():
            tcae.decode(z)

    return encode, decode, [tcae]


def sampling(images, processes):
    """-> (one step of guided sampling, which runs twice the images, modules)"""
    on, shape = processes.device, latent_shape()
    dit = LightningDiT(stage2.size, shape[0], shape[1], 1000).to(on).requires_grad_(False)
    noise, labels = torch.randn(images, *shape, device=on), torch.zeros(images, dtype=torch.long, device=on)

    def step():
        with torch.no_grad(), processes.autocast():
            sample_flow(guided(dit, labels, 1000, cfg_scale=1.5), noise, steps=1)

    return step, [dit]


def write_photographs(folder, count, width, height):
    """JPEG files of random pictures with the 1/f spectrum of photographs, as large and as slow to decode, in one class
    folder below `folder`."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / width)

    def field(power):
        waves = rng.normal(size=(2, *frequency.shape)) / frequency**power
        values = np.fft.irfft2(waves[0] + 1j * waves[1], (height, width))
        return (values - values.mean()) / values.std()

    Path(folder, "class").mkdir(parents=True)
    for k in range(count):
        light = 128 + 45 * field(1.1)
        pixels = np.stack([light + 18 * field(1.3) for _ in range(3)], axis=2).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(Path(folder, "class", f"{k}.jpg"), quality=90)


def torchvision_views():
    """The same recipe in torchvision's transforms, with iBOT's own blur: a Pillow image -> a list of tensors."""
    from torchvision import transforms as T
    bicubic = T.InterpolationMode.BICUBIC
    to_tensor = T.Compose([T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2)))

    def view(size, scale, blurred, solarized):
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=bicubic), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(blur)], blurred), T.RandomSolarize(128, solarized), to_tensor])

    size, scale = stage1.global_crop_size, stage1.global_crop_scale
    plain = T.Compose([T.Resize(stage1.image_size, bicubic), T.RandomCrop(stage1.image_size), T.RandomHorizontalFlip(),
                       to_tensor])
    views = [plain, view(size, scale, 1.0, 0.0), view(size, scale, 0.1, 0.2)] + stage1.local_crops * [
        view(stage1.local_crop_size, stage1.local_crop_scale, 0.5, 0.0)]
    return lambda image: [view(image) for view in views]


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def heading(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def show_steps(processes):
    on, plainly = processes.device, runtime.Processes(device, "float32")
    fastest = large_product(on, processes.dtype)
    print(f"\na large product: {fastest:.3g} TFLOP/s in {processes.dtype}, "
          f"{large_product(on, torch.float32):.3g} in float32")
    heading("step", "images", "ms", "images/s", "TFLOP/s", "of a large product", "products", "× plain", "MB")

    def measure(name, images, step, modules, plain=None):
        with Products() as products:  # before compiling: what is inside compiled code can't be seen
            step()
        if processes.compiles(compile):
            compile_blocks(*modules)
        times = medians({"ours": step, "plain": plain or (lambda: None)}, on)
        ours, rate = times["ours"], products.operations / times["ours"] / 1e12
        row(name, images, f"{ours * 1e3:.1f}", f"{images / ours:.0f}", f"{rate:.3g}", f"{rate / fastest:.0%}",
            f"{products.seconds(on) / ours:.0%}", f"{times['plain'] / ours:.2f}" if plain else "",
            f"{peak_memory(step, on):.0f}")
        if on.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")  # names every line that makes the host wait for the GPU
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                step()
            torch.cuda.set_sync_debug_mode("default")

    joint, finetune = CONFIGS[sizes]["joint"], CONFIGS[sizes]["finetune"]
    for name, files in ("tokenizer, joint", joint), ("tokenizer, finetuning", finetune):
        configure(stage1, files, "--data_dir=shapes", "--discriminator_weights=random")
        images = images_per_step(stage1)
        measure(name, images, *tokenizer_step(images, processes), tokenizer_step(images, plainly, plain=True)[0])
    configure(stage1, joint)
    configure(stage2, CONFIGS[sizes]["dit"])
    images = images_per_step(stage2)
    measure("generator", images, *generator_step(images, processes), generator_step(images, plainly)[0])
    encode, _, modules = coding(images, processes)
    measure("encode", images, encode, modules)
    _, decode, modules = coding(images, processes)  # not compiled yet
    measure("decode", images, decode, modules)
    measure("sampling, one guided step", images, *sampling(images, processes))


def show_tokens(processes):
    """Always S–S at 256 px: smaller images have no patches of 64 px. Encoding takes four times the step's images."""
    images, on, steps = batch_size or (64 if processes.device.type == "cuda" else 2), processes.device, {}
    for p, depth in (64, 0), (32, 0), (16, 0), (8, 0), (8, 6):
        crops = ["--global_crop_size=256", "--local_crop_size=128"] if p == 64 else []
        configure(stage1, [], f"--patch_size={p}", f"--stc_depth={depth}", "--lpips_weight=0", *crops)
        encode, _, modules = coding(4 * images, processes)
        step, more = tokenizer_step(images, processes)
        if processes.compiles(compile):
            compile_blocks(*modules, *more)
        steps[p, depth] = encode, step
    encoding, joint = (medians({key: pair[k] for key, pair in steps.items()}, on) for k in (0, 1))
    heading("p", "M", "tokens", "encoding, ms/image", "of p = 8's", "joint step, ms/image", "of p = 8's", "MB")
    for (p, depth), (_, step) in steps.items():
        cells = [cell for times, count in ((encoding, 4 * images), (joint, images)) for cell in
                 (f"{times[p, depth] * 1e3 / count:.1f}", f"{times[p, depth] / times[8, 0]:.0%}")]
        row(p, depth or "–", (256 // p) ** 2, *cells, f"{peak_memory(step, on):.0f}")


def show_data():
    """With the paper's views, whatever the sizes of the other tables; 2000 × 1500 px shows JPEG's draft mode."""
    heading("JPEG files", "ours, ms/image", "torchvision's", "ours, images/s per core", "× torchvision")
    threads, count = torch.get_num_threads(), 8
    torch.set_num_threads(1)  # as in a loading worker
    configure(stage1, [])
    views = stage1.StepViews(ssl.MultiCrop(stage1.global_crop_size, stage1.global_crop_scale, stage1.local_crop_size,
                                           stage1.local_crop_scale, stage1.local_crops, output_patch=16))
    theirs = torchvision_views()
    for width, height in (500, 375), (2000, 1500):
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(folder, count, width, height)
            source = data.ImageFolder(folder)
            ours, epochs = data.Augmented(source, views, seed=0), itertools.count()
            times = medians({"ours": lambda: [ours[next(epochs), i] for i in range(count)],  # other crops every time
                             "theirs": lambda: [theirs(Image.open(path).convert("RGB")) for path in source.paths]},
                            CPU)
        row(f"{width} × {height} px", *(f"{time / count * 1e3:.1f}" for time in times.values()),
            f"{count / times['ours']:.0f}", f"{times['theirs'] / times['ours']:.2f}")
    torch.set_num_threads(threads)


def show_run():
    """Of the run itself, from its log. The paper's sizes are given JPEG files, the others the shapes."""
    script = [sys.executable, str(HERE / "train_tokenizer.py")]
    help_time = seconds(lambda: subprocess.run([*script, "--help"], stdout=subprocess.DEVNULL, check=True), CPU)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*(str(HERE / "config" / file) for file in CONFIGS[sizes]["joint"]), f"--out_dir={folder}/out",
                     f"--device={device}", f"--dtype={dtype}", f"--compile={compile}", "--log_every=1",
                     "--lpips_weight=0"]
        if sizes == "paper":
            for split in "train", "val":
                write_photographs(f"{folder}/{split}", 256, 500, 375)
            arguments += [f"--data_dir={folder}"]
        if batch_size or sizes == "paper":
            arguments += [f"--batch_size={images_per_step(stage1)}"]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the run needs the memory
        start, log, lines, first = time.perf_counter(), Path(folder, "out", "log.jsonl"), [], None
        run = subprocess.Popen([*script, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(lines) < 60:
            time.sleep(0.05)
            lines = log.read_text().splitlines() if log.exists() else []
            first = first or (time.perf_counter() - start if lines else None)
        run.kill()
        run.wait()
    steps = [step for step in map(json.loads, lines[10:60]) if "waiting" in step]  # the first ones warm up
    check(steps, f"train_tokenizer.py ended after {len(lines)} steps; to see why: {' '.join(script + arguments)}")
    spent = sum(step["seconds"] for step in steps)
    heading("train_tokenizer.py", "")
    row("--help", f"{help_time:.1f} s")
    row("first step after", f"{first:.1f} s")
    row("images/s", f"{sum(step['seconds'] * step['images_per_second'] for step in steps) / spent:.0f}")
    row("waiting for data", f"{sum(step['waiting'] * step['seconds'] for step in steps) / spent:.1%} of the time")


def main():
    global sizes
    runtime.configure(globals())
    tables = {"steps": show_steps, "tokens": show_tokens, "data": lambda _: show_data(), "run": lambda _: show_run()}
    for name in only.split(","):
        check(name in tables, f"only={only!r}: the tables are {', '.join(tables)}")
    check(sizes in ("auto", *CONFIGS), f"sizes={sizes!r}: it is auto, {' or '.join(CONFIGS)}")
    check(repeats > 0, f"repeats={repeats} must be at least 1")
    processes = runtime.Processes(device, dtype)
    processes.compiles(compile)  # where that does not work, this ends it before anything is measured
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save
    sizes = {"auto": "paper" if processes.device.type == "cuda" else "shapes"}.get(sizes, sizes)
    print(f"PyTorch {torch.__version__}, sizes={sizes}")
    for name in only.split(","):
        tables[name](processes)


if __name__ == "__main__":
    main()
