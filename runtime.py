"""What every script needs to start, log, stop and resume. Nothing here is about images.

    Distributed            this process among the others: device, precision, sums over all of them, SIGTERM
    start, check_training, check_positive, make_folder    how a script begins
    whole_file, save_checkpoint, load_checkpoint, check_resumable, header, fingerprint
    Log, Progress, bar     log.jsonl, and what a terminal or a batch job's log shows

configure, check, fail and how a process ends are in configurator.py; the scripts call them as runtime.configure etc.
"""
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import signal
import ssl
import subprocess
import sys
import time
import timeit
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import SIGNALS, check, configure, fail, first_line, first_traceback, ignore_signals  # noqa: F401
from configurator import leave

HERE = Path(__file__).parent
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.load unpickles nothing, whichever library calls it
if not hasattr(ssl, "IBOTLoss"):  # a debugger, Jupyter or a plugin had imported Python's own: ours becomes a part of it
    importlib.util.spec_from_file_location("ssl", HERE / "ssl.py").loader.exec_module(ssl)


class Stopped(Exception):
    """Some process got one of SIGNALS; raised in all of them together."""


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices


class Distributed:
    """This process, alone or among those that torchrun started.

    rank and count; first: rank 0, which writes the files. device: CUDA, MPS or CPU. dtype, for autocast: torch.bfloat16
    where that is faster, else torch.float32. stop: True once this process got one of SIGNALS; with saves=False they end
    it at once. same: {name: value} that must be the same for all.
    """

    def __init__(self, device="auto", dtype="auto", seed=0, saves=True, same={}):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        self.device = self.pick_device(device)
        if self.count > 1:  # gloo for what the CPUs exchange (stop flags, file names), NCCL between GPUs
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)
            sys.excepthook = first_traceback
            self.check_same(same)
        torch.set_float32_matmul_precision("high")  # TF32 for matrix products that stay in float32
        torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: they slow a CPU down many times
        check(dtype in ("auto", "bfloat16", "float32"), f"dtype={dtype!r}: it is 'auto', 'bfloat16' or 'float32'")
        self.dtype = torch.bfloat16 if dtype == "bfloat16" or dtype == "auto" and self.bf16_pays() else torch.float32
        torch.manual_seed(seed)  # after bf16_pays, which draws random numbers
        self.stop, self.locks = False, {}
        self.seen = {}  # {the checkpoint: when it was written}, as start() found it
        for number in SIGNALS if saves else ():
            signal.signal(number, self.on_signal)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else \
            f"{self.device.type.upper()}, {torch.get_num_threads()} threads"
        self.print(f"{self.count} process{'es' if self.count > 1 else ''} on {name}, "
                   f"{'bfloat16 autocast' if self.dtype == torch.bfloat16 else 'float32'}")

    def on_signal(self, number, _):
        self.stop = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends it

    def pick_device(self, name):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            if name == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
                return torch.device("cuda", torch.cuda.current_device())
            return torch.zeros(0, device=name).device
        except Exception as error:
            fail(f"device={name!r} can't be used here: {first_line(error)}", everywhere=False)

    def bf16_pays(self):
        """Whether bfloat16 is faster: on CUDA if the GPU supports it, on a CPU by a test, and then only if it is faster
        for every process. The test takes 20 ms, or a fifth of a second on a CPU that has no instructions for it."""
        if self.device.type != "cpu":
            return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

        def seconds(dtype, repeat):
            a, b = torch.randn(1024, 256).to(dtype), torch.randn(256, 512).to(dtype)
            return sorted(timeit.repeat(lambda: a @ b, number=1, repeat=repeat))[repeat // 2]

        pays = seconds(torch.bfloat16, 1) < 0.05 and seconds(torch.bfloat16, 8) < 0.5 * seconds(torch.float32, 8)
        votes = self.sum(torch.tensor(float(pays)))
        return votes.item() == self.count

    def should_compile(self, wanted, pays=False):
        """Whether to compile the blocks. `wanted` is the constant `compile`: "True", "False" or "auto", which means yes
        on CUDA, and on a CPU if it `pays`, unless it does not work there."""
        check(wanted in ("auto", "True", "False"), f"compile={wanted!r}: it is 'auto', True or False")
        worthwhile = self.device.type == "cuda" or self.device.type == "cpu" and pays
        if wanted == "False" or wanted == "auto" and not worthwhile:
            return False
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=self.device))
            works = 1.0
        except Exception as error:
            if wanted == "True":
                fail("compile=True does not work here (a CPU needs a C++ compiler for it): "
                     f"{first_line(error)}", everywhere=False)
            works = 0.0
        if self.sum(torch.tensor(works)) < self.count:  # all processes do the same
            self.print("compile=auto does not work here (is there a C++ compiler?): going on without")
            return False
        return True

    def autocast(self):
        """A context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def distribute(self, model):
        """The model in DistributedDataParallel, which averages gradients over all processes."""
        if self.count == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

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

    def check_same(self, values):
        """Ends the run if processes differ in one of the {name: value}: their nodes may hold different files."""
        each = self.gather([(os.uname().nodename, values)])
        for name in values:
            nodes = {str(has[name]): node for node, has in each}
            check(len(nodes) == 1, f"{name} is not the same for all processes: "
                  + ", ".join(f"{node} has {value}" for value, node in nodes.items()))

    def stop_requested(self):
        """Whether any process is to stop. All must call it. It sums on the CPU, so it waits for no GPU."""
        return bool(self.sum(torch.tensor(float(self.stop))))

    def print(self, line):
        if self.first:
            tqdm.write(line)  # on a line of its own above a bar, if there is one
            sys.stdout.flush()

    def wait(self):
        """Waits until every process has called it."""
        if self.count > 1:
            torch.distributed.barrier()

    def lock(self, path, what):
        """Until close(), `what` belongs to this run, and another one ends with one line. `path`: the file to lock. The
        kernel frees it however this process ends, and its loading workers never have it."""
        if not self.first or path in self.locks:
            return
        try:
            file = self.locks[path] = open(path, "a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"{what} is in use by {Path(path).read_text()}: wait until it ends, or choose another")
            except OSError as error:  # some network file systems have no locks
                print(f"{what} can't be locked ({error.strerror}): see that no other run writes there")
            file.truncate(0)
            print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
        except OSError as error:
            fail(f"{what} can't be written to: {error.strerror}", everywhere=False)

    def close(self):
        """All processes exit together: one that exits while the first still draws or measures would seem to fail."""
        for file in self.locks.values():
            file.close()
        if self.count > 1:
            self.wait()
            torch.distributed.destroy_process_group()
            leave.done = True


# ----------------------------------------------------------------------------------------------------------------------
# The start of a run, checkpoints, logs


def start(script, kind, may_change):
    """The start of a training script -> its constants; this process among the others; the path of its checkpoint; and
    the checkpoint to resume from, or None. Constants must then be those that the run was begun with, except for the
    names in `may_change`. A run that is finished ends here."""
    constants, resumed = configure(script), None
    out_dir, path = constants["out_dir"], os.path.join(constants["out_dir"], "checkpoint.pt")
    seen = {path: modified(path)}  # before it is read; make_folder looks again
    if os.path.exists(path):
        check(constants["resume"],
              f"out_dir={out_dir} holds a run already: --resume=True continues it, another --out_dir begins a new one")
        resumed = load_checkpoint(path, "out_dir")
        check(resumed.get("kind") == kind, f"out_dir={out_dir} holds another kind of checkpoint: {resumed.get('kind')}")
        check_resumable(resumed["constants"], constants, may_change)
    same = {"out_dir": f"a checkpoint of step {resumed['step']}" if resumed else "no checkpoint",
            **{name: value for name, value in constants.items() if name not in may_change}}
    chosen = resumed["dtype"] if resumed else constants["dtype"]  # a resumed run keeps what auto chose
    dist = Distributed(constants["device"], chosen, constants["seed"], same=same)
    if resumed and resumed["finished"]:
        dist.print(f"{path} is finished: step {resumed['step']}")
        dist.close()
        raise SystemExit
    if resumed:
        dist.print(f"resumed from {path} at step {resumed['step']}")
    dist.seen = seen
    git_revision()  # now, for the checkpoints to come
    return constants, dist, path, resumed


def check_resumable(saved, constants, may_change):
    """Fails if constants other than `may_change` differ from the checkpoint's, naming them."""
    changed = [f"{name} was {saved.get(name)!r}, is {value!r}" for name, value in constants.items()
               if name not in may_change and saved.get(name) != value]
    check(not changed, "resume=True continues a run with the constants it was begun with, but " + "; ".join(changed)
          + ". Give the same values, or another out_dir")


def check_training(constants, dist, positive=()):
    """Checks the constants that several training scripts have; those in `positive` must be at least 1, too."""
    check_positive(constants, "epochs", "batch_size", "log_every", "save_every", *positive)
    chosen = constants.get("optimizer", "adamw")
    check(chosen in ("adamw", "muon"), f"optimizer={chosen!r}: it is adamw or muon")
    batch_size, parts, betas = constants["batch_size"], dist.count * constants.get("accumulate", 1), constants["betas"]
    check(batch_size % parts == 0, f"batch_size={batch_size} must be a multiple of {parts} (processes × accumulate)")
    check(len(betas) == 2 and max(betas) < 1, f"betas={betas} must be two numbers, each at least 0 and below 1")
    for name in ("warmup_epochs", "decay_epoch"):
        check(constants.get(name, 0) <= constants["epochs"],
              f"{name}={constants.get(name)} is more than epochs={constants['epochs']}")
    for name in ("teacher_momentum", "decoder_ema", "ema_momentum", "label_dropout"):
        check(constants.get(name, 0) < 1, f"{name}={constants.get(name)} must be at least 0 and below 1")


def check_positive(constants, *names):
    """The constants `names` must be at least 1."""
    for name in names:
        check(constants[name] > 0, f"{name}={constants[name]} must be at least 1")


def make_folder(path, dist=None, constant="out_dir"):
    """Makes the folder, which `constant` names, unless it is there. With `dist` it is locked for this run."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        fail(f"{constant}={path} can't be written to: {error.strerror}", everywhere=False)
    if dist:
        dist.lock(os.path.join(path, ".lock"), f"{constant}={path}")
        for checkpoint, when in dist.seen.items():
            check(modified(checkpoint) == when, f"{constant}={path}: another run, which was being stopped, has saved "
                  "there since this one looked; start it again")


def modified(path):
    """When the file was last written; None if it isn't there."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes into. It takes its name once it is whole, so a crash or a full disk leaves the old one."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's error covers the disk's
        if not isinstance(cause, OSError):
            raise
        fail(f"{path} can't be written: {cause.strerror or cause}", everywhere=False)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def save_checkpoint(path, state):
    with whole_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path, name, kind=None):
    """Reads a checkpoint, on the CPU. name: the constant that gave `path`, for messages. kind: "tokenizer" or "dit", if
    it must be one; a tokenizer must be finished, too."""
    check(Path(path).is_file(), f"{name}={path}: there is no such checkpoint")
    try:
        if damaged := zipfile.ZipFile(path).testzip():
            raise OSError(f"the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        fail(f"{name}={path} is not a checkpoint of this project, or it is damaged: "
             f"{first_line(error)}", everywhere=False)
    check(isinstance(state, dict), f"{name}={path} is not a checkpoint of this project")
    check(kind in (None, state.get("kind")), f"{name}={path} is a checkpoint of something else: {state.get('kind')}")
    check(kind != "tokenizer" or state["finished"],
          f"{name}={path} is unfinished, and the mean and std of its latents aren't measured yet: finish the run with "
          "--resume=True")
    return state


def fingerprint(weights, without=()):
    """A hash of {name: tensor}, 16 hexadecimal digits; names that begin with `without` are left out."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if not name.startswith(without):
            digest.update(name.encode() + weights[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def header(kind, constants, dist):
    """The first entries of every checkpoint. kind: "tokenizer" or "dit"."""
    return {"kind": kind, "constants": constants, "dtype": str(dist.dtype).removeprefix("torch."),
            "revision": git_revision()}


@functools.cache  # of the run's beginning: the files may change meanwhile
def git_revision():
    """This code's commit, with a + if files were changed since; "" outside git."""
    words = "describe --always --exclude=* --abbrev=40 --dirty=+".split()
    try:
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""


def bar(items, dist, **words):
    """A progress bar over `items`, drawn by the first process and only on a terminal: a file would keep every frame."""
    return tqdm(items, disable=None if dist.first else True, **words)


class Log:
    """log.jsonl, one line per logged step, written by the first process. Lines after `step` are removed, since a run
    that was killed after its last checkpoint repeats those steps and the validation at `step`. So are lines that can't
    be read."""

    def __init__(self, path, step):
        lines, unread = [], 0
        for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
            try:
                values = json.loads(line)
                if values["step"] < step or values["step"] == step and "val_psnr" not in values:
                    lines.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                unread += 1
        if unread:
            print(f"{path}: lines that can't be read and are left out: {unread}")
        with whole_file(path) as file:
            file.writelines(lines)
        self.file = open(path, "a", buffering=1)

    def write(self, **values):
        values = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        self.file.write(json.dumps(values) + "\n")


class Progress:
    """What a training loop shows and logs: the bar, log.jsonl, and the check that all numbers are finite.

    `add` keeps a step's terms on the device; `report` waits for it, once for all steps since the last report.
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
        """Logs and shows the means over all processes and all steps since the last report. waited: seconds spent
        waiting for data since then. Ends the run at a NaN or an infinity, naming the step and the term."""
        first, by_name = self.step - len(self.pending) + 1, {}
        places = [(step, name) for step, terms in enumerate(self.pending, first) for name in terms]
        values = torch.stack([value.float() for terms in self.pending for value in terms.values()])
        values = (self.dist.sum(values) / self.dist.count).tolist()
        for (step, name), value in zip(places, values):
            if not math.isfinite(value):
                self.bar.close()  # so that the message has a line to itself
                kept = f"The last good checkpoint is still in {self.checkpoint}. " if self.checkpoint.exists() else ""
                fail(f"step {step}: {name} is {value}. {kept}Look for damaged images, or lower learning_rate")
            by_name.setdefault(name, []).append(value)
        seconds = time.perf_counter() - self.since
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
        """Logs and shows the PSNR (dB) of a validation, whose time is left out of images/s."""
        self.write(val_psnr=psnr)
        self.dist.print(f"step {self.step}: validation PSNR {psnr:.2f} dB")
        self.start_clock()

    def stopped(self):
        """The end of a run that a signal has stopped."""
        self.bar.close()
        self.dist.print(f"stopped: saved {self.checkpoint} at step {self.step}; --resume=True continues from there")
        self.dist.close()

    def start_clock(self):
        """Starts the time of images/s again, after a validation or a picture."""
        self.since = time.perf_counter()

    def write(self, **values):
        if self.log:
            self.log.write(step=self.step, **values)
