"""For all tests: our modules first on the path, one thread, no GPU, and a way to run the scripts as a user does."""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GPUS = os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))  # pytest-xdist's processes, too
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests say what a CPU does, but for test_cuda.py

import pytest  # noqa: E402
import runtime  # noqa: E402, F401 (pytest or a plugin may have imported Python's ssl: it adds ours)
import torch  # noqa: E402

torch.set_num_threads(1)
torch.ones(1, requires_grad=True).backward()  # if the first one came from a thread, none would be possible after a fork


@pytest.fixture(autouse=True)
def handlers():
    """A script that runs in this process takes its signals over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def clean_environment(**more):
    """The environment of a process that knows nothing of this one: single-threaded, no launcher's variables."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}


def python(*arguments, cwd=ROOT, ok=True, timeout=120, **environment):
    """`python ARGUMENTS` from the project's folder -> CompletedProcess with text; `ok` asserts exit status 0."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=clean_environment(**environment),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's processes too
        raise
    result = subprocess.CompletedProcess(arguments, process.returncode, out, err)
    assert not ok or result.returncode == 0, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def run_script(*arguments, nproc=1, ok=True, **environment):
    """A script with its arguments, alone or under torchrun with `nproc` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return python(*launcher, *arguments, ok=ok, **environment)


def fork_two(call, **constants):
    """call(**constants) in two processes that begin as copies of this one: without torchrun, and without the seconds
    that imports take."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        call(**constants)

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=process, args=(rank,)) for rank in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join(100)
        each.kill() if each.is_alive() else None
    assert [each.exitcode for each in both] == [0, 0]
