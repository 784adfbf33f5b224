"""What every script needs to start, log, stop and resume. Nothing here is about images.

    configure            a script's constants, overridden by config files and the command line
    Distributed          this process among the others: device, precision, sums over all, SIGTERM
    open_run, make_folder, save_checkpoint, load_checkpoint, check_resumable, fingerprint, latents_of
    Log, Progress, bar   log.jsonl, and what a terminal or a batch job's log file shows of a run
    cosine, update_ema   the schedule of the learning rate and of the teacher's momentum; teacher and averaged weights
"""
import ast
import difflib
import hashlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).parent


class Stopped(Exception):
    """A process got SIGTERM; raised in all of them together."""


def fail(message, everywhere=True):
    """Ends the program with one line on standard error and exit status 1. Only the first of several processes prints
    it, unless the problem may be this one's alone (everywhere=False)."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0 and everywhere:
        raise SystemExit(1)
    raise SystemExit(f"error{f' in process {rank}' if rank else ''}: {message}")


def check(condition, message):
    """`fail(message)` unless `condition`. A message names the constant that is to blame."""
    if not condition:
        fail(message)


# ----------------------------------------------------------------------------------------------------------------------
# Constants


def configure(script, arguments=None):
    """Overrides a script's constants, `configure(globals())`, and returns them as a dict.

    Constants are the lower-case names that the script assigns at its top level. Files among `arguments` (default: the
    command line) are Python and come first, in their order; `--name=value` overrides them. Unknown names, wrong types
    and negative numbers end the program with one line; `--help` prints every constant with its comment.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    source = Path(script["__file__"]).read_text()
    names = [node.targets[0].id for node in ast.parse(source).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower()]
    if {"-h", "--help"} & set(arguments):
        print_help(script, source, names)
        raise SystemExit(0)

    def override(name, value, where):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            fail(f"{where}: there is no constant {name}" + (f"; did you mean {near[0]}?" if near else " (see --help)"))
        script[name] = convert(name, value, script[name], where)

    for path in (a for a in arguments if not a.startswith("-")):
        if not Path(path).is_file():
            fail(f"there is no config file {path} (constants are given as --name=value)")
        try:
            overrides = runpy.run_path(path)
        except Exception as error:
            fail(f"{path} is not a config file, or has an error: {type(error).__name__}: {error}")
        for name, value in overrides.items():
            if not name.startswith("_"):
                override(name, value, path)
    for argument in (a for a in arguments if a.startswith("-")):
        match = re.fullmatch(r"--([\w-]+)=(.*)", argument, re.DOTALL)
        if not match:
            fail(f"{argument}: constants are given as --name=value")
        override(match[1], match[2], "command line")
    return {name: script[name] for name in names}


def convert(name, value, default, where):
    """`value`, from a config file or as text from the command line, as the type of `default`."""
    wanted = type(default)
    if isinstance(value, str):
        text = value.strip().strip("\"'")
        try:
            value = text if wanted is str else ast.literal_eval(text.capitalize() if wanted is bool else text)
        except (ValueError, SyntaxError):
            value = text
    if default in ("auto", "True", "False") and str(value).lower() in ("true", "false"):
        value = str(value).capitalize()  # config files have a bool here, the command line often lower case
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e4
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
        fail(f"{where}: {name}={value!r} must be {words[wanted]}, as {default!r} is")
    for number in value if wanted is tuple else [value] if wanted in (int, float) else []:
        check(type(number) in (int, float) and 0 <= number < math.inf,
              f"{where}: {name}={value} must be {'finite numbers' if wanted is tuple else 'finite'}, 0 or more")
    return value


def print_help(script, source, names):
    """The docstring, then every constant with its default and comment, under the source's own headings."""
    print(script["__doc__"].strip(), "\n\nconstants, as --name=value or in a config file:")
    for line in source.splitlines():
        if line.startswith(("def ", "class ", "@", "# ---")):
            break
        if line.startswith("# "):
            print(f"\n{line[2:]}")
        elif (match := re.match(r"(\w+) = (.+?)(?:  # (.*))?$", line)) and match[1] in names:
            print(f"  --{match[1] + '=' + match[2]:<34} {match[3] or ''}")


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices


class Distributed:
    """This process, alone or among those that torchrun started.

    rank of count; `first` is rank 0, which writes files. device: CUDA, MPS or CPU, whatever there is. dtype:
    torch.bfloat16 for autocast where that is faster, else torch.float32. stop: True once this process got SIGTERM.
    """

    def __init__(self, device="auto", dtype="auto", seed=0):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        self.device = self.pick_device(device)
        if self.count > 1:  # gloo for what is exchanged on the CPU (stop flags, file names), NCCL for GPUs
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)
        check(seed < 2**63, f"seed={seed} must be below 2^63")
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in float32
        torch.set_flush_denormal(True)  # below 1e-38 is 0: CPUs are many times slower with such numbers
        check(dtype in ("auto", "bfloat16", "float32"), f"dtype={dtype!r}: it is 'auto', 'bfloat16' or 'float32'")
        self.dtype = torch.bfloat16 if dtype == "bfloat16" or dtype == "auto" and self.bf16_pays() else torch.float32
        self.stop = False
        signal.signal(signal.SIGTERM, self.on_sigterm)
        self.print(f"{self.count} process{'es' if self.count > 1 else ''} on {self.device_name()}, "
                   f"{'bfloat16 autocast' if self.dtype == torch.bfloat16 else 'float32'}")

    def on_sigterm(self, *_):
        self.stop = True

    def pick_device(self, name):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            if name == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
                return torch.device("cuda", torch.cuda.current_device())
            return torch.zeros(0, device=name).device
        except Exception as error:
            fail(f"device={name!r} can't be used here: {str(error).splitlines()[0]}", everywhere=False)

    def device_name(self):
        return torch.cuda.get_device_name() if self.device.type == "cuda" else \
            f"{self.device.type.upper()}, {torch.get_num_threads()} threads"

    def bf16_pays(self):
        """Whether bfloat16 is faster: on CUDA if the GPU has it, on a CPU by a 20 ms test. All processes agree."""
        if self.device.type != "cpu":
            return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

        def seconds(dtype):
            a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 512).to(dtype)
            times = []
            for _ in range(8):
                start = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - start)
            return sorted(times)[len(times) // 2]

        votes = self.sum(torch.tensor(float(seconds(torch.bfloat16) < 0.5 * seconds(torch.float32))))
        return votes.item() == self.count

    def compiles(self, wanted, pays=False):
        """Whether to compile the blocks, by the constant `compile`: "True", "False" or "auto", which is yes on CUDA,
        and on a CPU if it `pays` there and a C++ compiler is installed."""
        check(wanted in ("auto", "True", "False"), f"compile={wanted!r}: it is 'auto', True or False")
        if wanted == "True" or wanted == "auto" and pays and self.device.type == "cpu":
            try:
                torch.compile(lambda x: x + 1)(torch.ones(2, device=self.device))
                return True
            except Exception as error:
                if wanted == "True":
                    fail("compile=True does not work here (a CPU needs a C++ compiler for it): "
                         f"{str(error).splitlines()[0]}", everywhere=False)
        return wanted == "auto" and self.device.type == "cuda"

    def autocast(self):
        """A context in which matrix products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def distribute(self, model):
        """The model, wrapped so that its gradients are averaged over all processes."""
        if self.count == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def to_device(self, tensor):
        """The tensor on the device, without waiting for the device's work."""
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def sum(self, tensor):
        """The sum of `tensor` over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, items):
        """The lists `items` of all processes, concatenated, on every process."""
        if self.count == 1:
            return items
        lists = [None] * self.count
        torch.distributed.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def stop_requested(self):
        """Whether any process got SIGTERM; all must call it. Summed on the CPU, so as not to wait for a GPU."""
        return bool(self.sum(torch.tensor(float(self.stop))))

    def print(self, *words):
        if self.first:
            print(*words, flush=True)

    def wait(self):
        """Waits until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def close(self):
        """All leave together: one that is gone while the first still draws or measures looks like a failure."""
        if self.count > 1:
            self.wait()
            torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and logs


def open_run(out_dir, resume, kind):
    """-> the path of a run's checkpoint, and its contents if there is one to resume from, else None."""
    path = os.path.join(out_dir, "checkpoint.pt")
    check(resume or not os.path.exists(path),
          f"out_dir={out_dir} holds a run already: --resume=True continues it, another --out_dir begins a new one")
    if not os.path.exists(path):
        return path, None
    state = load_checkpoint(path, "out_dir")
    check(state.get("kind") == kind, f"out_dir={out_dir} holds a checkpoint of something else: {state.get('kind')}")
    return path, state


def make_folder(out_dir):
    """Makes the folder unless it exists."""
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        fail(f"out_dir={out_dir} can't be made: {error.strerror}", everywhere=False)
    check(os.access(out_dir, os.W_OK), f"out_dir={out_dir} can't be written to")


def save_checkpoint(path, state):
    """Writes the file whole or not at all: under a temporary name first, then renamed."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, name, kind=None):
    """A checkpoint's contents, on the CPU. `name`: the constant that gave `path`, for messages. kind, if given: what it
    must be, "tokenizer" or "dit"; a tokenizer must be finished."""
    check(Path(path).is_file(), f"{name}={path}: there is no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        fail(f"{name}={path} is not a checkpoint of this project, or it is damaged: "
             f"{str(error).splitlines()[0]}", everywhere=False)
    check(isinstance(state, dict), f"{name}={path} is not a checkpoint of this project")
    check(kind in (None, state.get("kind")), f"{name}={path} is a checkpoint of something else: {state.get('kind')}")
    check(kind != "tokenizer" or state["finished"],
          f"{name}={path} is unfinished, and the mean and std of its latents aren't measured yet: finish the run with "
          "--resume=True")
    return state


def fingerprint(weights, without=None):
    """A hash of {name: tensor}, 16 hexadecimal digits, leaving out names that begin with `without`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if not (without and name.startswith(without)):
            digest.update(name.encode() + weights[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def latents_of(saved):
    """The fingerprint of a tokenizer except its decoder, which can be finetuned without changing the latents."""
    return fingerprint(saved["tokenizer"], without="decoder.")


def check_resumable(saved, constants, free):
    """Fails if constants other than `free` differ from the checkpoint's, naming them."""
    changed = [f"{name} was {saved.get(name)!r}, is {value!r}" for name, value in constants.items()
               if name not in free and saved.get(name) != value]
    check(not changed, "resume=True continues a run with the constants it was begun with, but " + "; ".join(changed)
          + ". Give the same values, or another out_dir")


def git_revision():
    """The commit of this code, followed by + if files were changed; "" outside git."""
    def git(*words):
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:  # git is not installed
        return ""


def bar(items, dist, **words):
    """A progress bar over `items`, drawn by the first process, on a terminal only: log files keep every redrawing."""
    return tqdm(items, disable=None if dist.first else True, **words)


class Log:
    """log.jsonl, one line per logged step, written by the first process. Lines after `step` are removed: a run that was
    killed after its last checkpoint repeats those steps."""

    def __init__(self, path, step):
        lines = Path(path).read_text().splitlines() if Path(path).exists() else []
        lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        Path(path).write_text("".join(f"{line}\n" for line in lines))
        self.file = open(path, "a", buffering=1)

    def write(self, **values):
        values = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        self.file.write(json.dumps(values) + "\n")


class Progress:
    """What a training loop shows and writes while it runs: the bar, the log, and the check that all numbers are finite.

    `add` a step's terms without waiting for the device; `report` waits for it, once for all steps since the last one.
    """

    def __init__(self, out_dir, start, steps, batch_size, dist):
        self.dist, self.batch_size, self.step, self.steps = dist, batch_size, start, steps
        self.checkpoint = Path(out_dir, "checkpoint.pt")
        self.log = Log(Path(out_dir, "log.jsonl"), start) if dist.first else None
        self.bar = bar(None, dist, total=steps, initial=start, unit="step", smoothing=0.05)
        self.pending, self.since = [], time.perf_counter()

    def add(self, terms):
        """terms: {name: scalar tensor} of one step, with the same names in all processes."""
        self.pending.append({name: term.detach() for name, term in terms.items()})
        self.step += 1
        self.bar.update()

    def report(self, lr, waited=0.0):
        """Logs and shows the means over all processes and all steps since the last report; `waited`: seconds spent
        waiting for data since then. Fails at the first NaN or infinity, naming step and term."""
        first = self.step - len(self.pending) + 1
        places = [(step, name) for step, terms in enumerate(self.pending, first) for name in terms]
        values = torch.stack([value.float() for terms in self.pending for value in terms.values()])
        values = (self.dist.sum(values) / self.dist.count).tolist()
        for (step, name), value in zip(places, values):
            if not math.isfinite(value):
                self.bar.close()  # so that the message has a line to itself
                kept = f"The last good checkpoint is still in {self.checkpoint}. " if self.checkpoint.exists() else ""
                fail(f"step {step}: {name} is {value}. {kept}Start again with a smaller learning_rate")
        seconds, by_name = time.perf_counter() - self.since, {}
        for (_, name), value in zip(places, values):
            by_name.setdefault(name, []).append(value)
        speed = self.batch_size * len(self.pending) / seconds
        means = {name: sum(values) / len(values) for name, values in by_name.items()}
        self.write(**means, lr=lr, seconds=seconds, images_per_second=speed, waiting=waited / seconds)
        shown = {**{name: f"{value:.3f}" for name, value in means.items()}, "img/s": f"{speed:.0f}"}
        self.bar.set_postfix(shown)
        if self.bar.disable:
            left = tqdm.format_interval((self.steps - self.step) * seconds / len(self.pending))
            terms = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.dist.print(f"step {self.step}/{self.steps}: {terms}, {left} left")
        self.pending = []
        self.start_clock()

    def validated(self, psnr):
        """Logs and shows the PSNR (dB) of a validation, whose time does not count in images/s."""
        self.write(val_psnr=psnr)
        if self.dist.first:
            tqdm.write(f"step {self.step}: validation PSNR {psnr:.2f} dB")
        self.start_clock()

    def start_clock(self):
        """Leaves what was done since the last report, a validation or a picture, out of images/s."""
        self.since = time.perf_counter()

    def write(self, **values):
        if self.log:
            self.log.write(step=self.step, **values)


def cosine(step, steps, base, final, warmup=0):
    """From 0 linearly to `base` over `warmup` steps, then along half a cosine to `final` at step `steps`."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))


def update_ema(averaged, trained, momentum):
    """averaged <- momentum * averaged + (1 - momentum) * trained, for two lists of parameters (EMA or teacher)."""
    with torch.no_grad():
        torch._foreach_lerp_(averaged, trained, 1 - momentum)
