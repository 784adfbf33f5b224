"""What every script needs to start, log, stop and resume: a typing error is one line, a crash loses no checkpoint."""
import copy
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lpips
import pytest
import torch

import configurator
import pretrained
import runtime
from conftest import ROOT, clean_environment, python, run_script

SCRIPT = '''"""A script."""
import os

# Group one
size = 256  # pixels
rate = 1e-3  # per step
name = "S"  # S or B
pair = (0.9, 0.95)  # two shares
on = False  # True: whatever
MAY_CHANGE = {"size"}
'''


@pytest.fixture
def configure(tmp_path):
    """configure(*arguments) of a script with one constant of each type -> (its constants, its namespace)."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def call(*arguments):
        script = {"__file__": str(tmp_path / "script.py")}
        exec(SCRIPT, script)
        return runtime.configure(script, [str(a) for a in arguments]), script

    return call


def alone(**more):
    """A process without others, or what `more` makes of it."""
    return SimpleNamespace(**{"first": True, "count": 1, "torch": torch, "sum": lambda tensor: tensor,
                              "gather": lambda items: items, "check_same": lambda *_: None, "print": print,
                              **more})


def failure(call, *arguments):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Constants


def test_files_override_the_script_and_the_command_line_overrides_files(configure, tmp_path):
    """In this order, wherever they stand on the line; the script's own globals change, since its code reads those."""
    (tmp_path / "a.py").write_text('"""A comment."""\nimport time\nimport os.path as place\nsize = 1\nrate = 1\n'
                                   'name = "B"\n_private = 5\n')
    (tmp_path / "b.py").write_text("size = 2\non = True\n")
    defaults, _ = configure()
    assert defaults == {"size": 256, "rate": 1e-3, "name": "S", "pair": (0.9, 0.95), "on": False}
    constants, script = configure("--name=L", tmp_path / "a.py", tmp_path / "b.py")
    assert constants == {"size": 2, "rate": 1.0, "name": "L", "pair": (0.9, 0.95), "on": True}
    assert all(script[name] == value for name, value in constants.items())
    assert configure("--size=3", "--size=4")[0]["size"] == 4


@pytest.mark.parametrize("argument, name, value", [
    ("--on=True", "on", True), ("--on=true", "on", True), ("--on=False", "on", False),
    ("--rate=1", "rate", 1.0), ("--rate=5e-4", "rate", 5e-4), ("--size=5e4", "size", 50000), ("--size=64", "size", 64),
    ("--name='B'", "name", "B"), ('--name="B"', "name", "B"), ("--name=128/4/4", "name", "128/4/4"),
    ("--name=", "name", ""), ("--name=~/a", "name", str(Path.home() / "a")),
    ("--name=7", "name", "7"), ("--name=out/a=b", "name", "out/a=b"), ("--pair=(0.5, 1)", "pair", (0.5, 1.0)),
    ("--pair=0,0.99", "pair", (0.0, 0.99)),  # a fused AdamW takes no whole number for a beta
])
def test_values_as_a_person_types_them(configure, argument, name, value):
    """Not only the value: the type too, since True == 1 and "7" is a fine name for a folder."""
    got = configure(argument)[0][name]
    assert repr(got) == repr(value)


@pytest.mark.parametrize("argument, words", [
    ("--sise=3", ["sise", "did you mean size"]), ("--si-ze=3", ["si-ze", "did you mean size"]),
    ("--zzz=3", ["zzz", "--help"]), ("--MAY_CHANGE=1", ["MAY_CHANGE"]),
    ("--size=big", ["size", "whole number", "256"]), ("--size=2.5", ["size", "whole number"]),
    ("--size=True", ["size", "whole number"]), ("--on=1", ["on", "True or False"]), ("--on=maybe", ["on", "maybe"]),
    ("--rate=fast", ["rate", "number"]), ("--rate=nan", ["rate"]), ("--rate=inf", ["rate"]), ("--rate=1e999", ["rate"]),
    ("--size=-1", ["size", "-1"]), ("--rate=-0.1", ["rate", "-0.1"]), ("--pair=0.5", ["pair", "tuple"]),
    ("--pair=('a', 'b')", ["pair", "finite numbers"]), ("--pair=(0.5, -1)", ["pair", "-1"]),
    ("--pair=(0.5, 1e999)", ["pair", "inf"]), ("--pair=(0.5, True)", ["pair", "True"]),
    ("--size", ["--size", "--name=value"]), ("-size=3", ["--name=value"]), ("--size 3", ["--name=value"]),
    ("missing.py", ["missing.py", "config file"]), ("size=3", ["size=3", "--name=value"]),
])
def test_a_wrong_argument_is_one_line_that_names_it(configure, argument, words):
    """And what was probably meant, or what type is wanted."""
    message = failure(configure, argument)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("line, word", [("rate = float('nan')", "rate"), ("sise = 3", "size"), ("size = 2.5", "size"),
                                        ("size = -4", "size"), ("helper = 3", "_helper"), ("pair = [0.5, 1]", "pair"),
                                        ("name = 3", "name"),
                                        ("name = True", "name"), ("size = = 3", "SyntaxError"),
                                        ("size = sise", "sise")])
def test_a_wrong_line_in_a_config_file_is_named_with_the_file(configure, tmp_path, line, word):
    """The same rules as on the command line."""
    (tmp_path / "wrong.py").write_text(line + "\n")
    message = failure(configure, tmp_path / "wrong.py")
    assert word in message and "wrong.py" in message


def test_help_prints_every_constant_with_its_comment():
    """The constants are the interface: each has a comment, and `--help` shows it, of the real script."""
    source = (ROOT / "train_tokenizer.py").read_text().split("\nMAY_CHANGE")[0]
    constants = re.findall(r"^([a-z]\w*) = (.+?)(?:  # (.+))?$", source, re.MULTILINE)
    assert len(constants) > 30 and "patch_size" in [name for name, *_ in constants]
    help = run_script("train_tokenizer.py", "--help").stdout
    for name, default, comment in constants:
        shown = re.search(rf"^ *--{name}={re.escape(default)}(?: +(.*))?$", help, re.MULTILINE)
        assert shown, name
        assert (shown[1] or "") == comment, name
    assert "--nproc_per_node=8" in help, "the docstring's command lines come first"


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "config").glob("*_tokenizer.py")))
def test_the_config_files_fit_the_script(config):
    """A constant that is renamed must be renamed there, too."""
    script = {"__file__": str(ROOT / "train_tokenizer.py")}
    exec((ROOT / "train_tokenizer.py").read_text().split("\nMAY_CHANGE")[0], script)
    before = dict(script)
    constants = runtime.configure(script, [str(ROOT / "config" / config)])
    assert any(constants[name] != before[name] for name in constants)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def test_only_the_first_process_speaks(monkeypatch):
    """Eight copies of an error help nobody; all of them end all the same."""
    assert failure(runtime.fail, "out_dir is wrong") == "error: out_dir is wrong"
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as error:
        runtime.fail("out_dir is wrong")
    assert error.value.code == 1
    runtime.check(True, "no error")


def test_what_makes_a_run_save_and_end():
    """SIGTERM, Slurm's warning and the first Ctrl-C; a second one ends it at once. What saves nothing ends as usual."""
    dist = runtime.Distributed("cpu", "float32")
    for number in signal.SIGTERM, signal.SIGUSR1, signal.SIGINT:
        dist.stop = False
        signal.raise_signal(number)
        assert dist.stop
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runtime.Distributed("cpu", "float32", saves=False)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def last_words(result):
    """The last line of a failed run under torchrun that is not one of its rules."""
    assert result.returncode == 1 and result.stderr.count("exitcode  :") == 1, result.stderr
    return [line for line in result.stderr.splitlines() if line.strip("=")][-1].removeprefix("  traceback : ")


def test_a_failure_under_torchrun_ends_with_its_line():
    """torchrun's report comes last, and its own last line is ours; the other processes are not in it. The paper's run
    where there is no ImageNet says what to put there."""
    result = run_script("train_tokenizer.py", "--patch_size=8", nproc=2, ok=False)
    line, = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert last_words(result) == line and "data_dir=imagenet" in line and "--data_dir=shapes" in line


def test_an_exception_under_torchrun_is_the_only_one(tmp_path):
    """One process fails, the other one's connection breaks: that is not what one wants to read."""
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import runtime, torch
dist = runtime.Distributed("cpu", "float32")
for step in range(1000):
    if (step, dist.rank) == (3, 1):
        raise ValueError("on this process alone")
    dist.sum(torch.ones(1))
""")
    result = run_script(tmp_path / "script.py", nproc=2, ok=False)
    assert "exitcode  : 1" in result.stderr and "onnection" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.strip("=")][-1].endswith(
        "ValueError: on this process alone")


@pytest.mark.parametrize("arguments, name", [(("abacus",), "device='abacus'"), (("cpu", "float8"), "dtype='float8'")])
def test_a_device_or_type_that_is_not_there_is_named(arguments, name):
    """device=cuda on a laptop is the common case."""
    assert name in failure(runtime.Distributed, *arguments)


def test_when_blocks_are_compiled(monkeypatch, capsys):
    """By default on CUDA, and on a CPU where it pays; by True everywhere. Where it does not work, that is one line."""
    def compiles(wanted, device="cpu", pays=False):
        dist = SimpleNamespace(device=torch.device(device), count=1, sum=lambda tensor: tensor, print=print)
        return runtime.Distributed.should_compile(dist, wanted, pays)

    def broken(call):
        raise RuntimeError("No working C++ compiler found\nTraceback and so on")

    monkeypatch.setattr(torch, "compile", lambda call: call)
    assert [compiles(wanted) for wanted in ("auto", "True", "False")] == [False, True, False]
    assert [compiles(wanted, pays=True) for wanted in ("auto", "True", "False")] == [True, True, False]
    assert "compile='yes'" in failure(compiles, "yes")
    monkeypatch.setattr(torch, "ones", lambda *shape, device: 1)  # this machine may have no CUDA
    assert [compiles(wanted, "cuda") for wanted in ("auto", "False")] == [True, False]
    monkeypatch.setattr(torch, "compile", broken)
    assert [compiles("auto", device, pays=True) for device in ("cpu", "cuda", "mps")] == [False, False, False]
    assert capsys.readouterr().out.count("going on without\n") == 2
    assert "compile=True" in (message := failure(compiles, "True")) and message.endswith("C++ compiler found")


@pytest.mark.parametrize("default", ["auto", "True", "False"])
@pytest.mark.parametrize("value", [True, False, "True", "false"])
def test_true_and_false_for_a_constant_that_is_auto(value, default):
    """As one writes them in a config file, and on the command line, which may follow one another."""
    assert configurator.convert("compile", value, default, "here") == str(value).capitalize()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors lose no time with them")
def test_numbers_below_those_of_full_precision_are_zero():
    """On all threads: they inherit it from the one that starts them, so this needs a process without any."""
    out = python("-c", "import torch, runtime\nruntime.Distributed('cpu', 'float32')\ntorch.set_num_threads(2)\n"
                       "print((torch.full((1 << 20,), 1e-30) * 1e-10).count_nonzero().item())").stdout
    assert out.splitlines()[-1] == "0"


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and logs


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """Tensors, tuples, strings and numbers, with weights_only: a file from a stranger can run no code."""
    state = {"tokenizer": {"w": torch.randn(3, 2)}, "constants": {"betas": (0.9, 0.95), "name": "S"}, "step": 7}
    runtime.save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = runtime.load_checkpoint(tmp_path / "checkpoint.pt", "out_dir")
    assert torch.equal(loaded["tokenizer"]["w"], state["tokenizer"]["w"])
    assert loaded["constants"] == state["constants"] and loaded["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


class Unsaveable:
    """Fails while it is being written, as a full disk would."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_failure_while_saving_leaves_the_old_checkpoint_whole(tmp_path):
    """The moment at which jobs are killed."""
    path = tmp_path / "checkpoint.pt"
    runtime.save_checkpoint(path, {"step": 1, "w": torch.ones(1000)})
    before = path.read_bytes()
    message = failure(runtime.save_checkpoint, path, {"step": 2, "w": torch.zeros(1000), "x": Unsaveable()})
    assert message == f"error: {path} can't be written: No space left on device"
    assert path.read_bytes() == before and runtime.load_checkpoint(path, "out_dir")["step"] == 1
    runtime.save_checkpoint(path, {"step": 3})  # what the failure left behind is in nobody's way
    assert runtime.load_checkpoint(path, "out_dir")["step"] == 3


def test_a_file_that_gets_too_large_is_one_line_and_leaves_nothing(tmp_path):
    """By the limit of the operating system: a full disk differs in the error's number alone."""
    path, limits = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    runtime.save_checkpoint(path, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = failure(runtime.save_checkpoint, path, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"error: {path} can't be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert runtime.load_checkpoint(path, "out_dir")["step"] == 1


def test_a_run_can_save_over_the_checkpoint_it_was_resumed_from(tmp_path):
    """The loaded tensors live in the old file; they must not change when a new one takes its place."""
    path = tmp_path / "checkpoint.pt"
    runtime.save_checkpoint(path, {"w": torch.ones(10000)})
    loaded = runtime.load_checkpoint(path, "out_dir")["w"]
    loaded[0] = 5  # optimizers write in place
    runtime.save_checkpoint(path, {"w": torch.zeros(10000)})
    assert loaded[0] == 5 and loaded[1:].eq(1).all()
    assert runtime.load_checkpoint(path, "out_dir")["w"].eq(0).all()


def test_a_missing_or_damaged_checkpoint_is_one_line(tmp_path):
    """With the constant that led there."""
    path = tmp_path / "checkpoint.pt"
    assert f"out_dir={path}" in failure(runtime.load_checkpoint, path, "out_dir")
    for content in b"not a checkpoint", b"":
        path.write_bytes(content)
        assert f"out_dir={path}" in failure(runtime.load_checkpoint, path, "out_dir")
    runtime.save_checkpoint(path, torch.ones(3))
    assert f"out_dir={path}" in failure(runtime.load_checkpoint, path, "out_dir")
    runtime.save_checkpoint(path, {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    assert f"out_dir={path}" in failure(runtime.load_checkpoint, path, "out_dir")


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path, where):
    """Among its weights, where nothing else would tell."""
    path = tmp_path / "checkpoint.pt"
    runtime.save_checkpoint(path, {"w": torch.randn(100000), "step": 3})
    assert runtime.load_checkpoint(path, "out_dir")["step"] == 3
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    message = failure(runtime.load_checkpoint, path, "out_dir")
    assert f"out_dir={path}" in message and "damaged" in message and "checksum" in message


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    """A file stands in its place, or in its way. One that is there already is taken as it is."""
    runtime.make_folder(tmp_path / "a" / "b")
    runtime.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in tmp_path / "file", tmp_path / "file" / "b":
        assert f"out_dir={path}" in failure(runtime.make_folder, path)


def test_a_folder_whose_lock_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    message = failure(runtime.make_folder, tmp_path, runtime.Distributed("cpu", "float32"))
    assert message == f"error: out_dir={tmp_path} can't be written to: Is a directory"


def test_random_numbers_do_not_depend_on_how_the_precision_is_chosen():
    """To find it, matrices are multiplied that are random, too."""
    drawn = []
    for dtype in "auto", "float32":
        runtime.Distributed("cpu", dtype, seed=3)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


LOCK = """import os, time, runtime
dist = runtime.Distributed("cpu", "float32")
runtime.make_folder({out!r}, dist)
if os.fork():
    print(os.getpid(), flush=True)
time.sleep(60)  # so does a loading worker"""


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """The second one says whose it is. When the first ends, were it by kill -9 and were its workers still there, the
    folder is free."""
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", LOCK.format(out=str(out))], cwd=ROOT, env=clean_environment(),
                             stdout=subprocess.PIPE, text=True, start_new_session=True)
    pid = [first.stdout.readline() for _ in range(2)][1].strip()
    dist = runtime.Distributed("cpu", "float32")
    try:
        message = failure(runtime.make_folder, out, dist)
        assert f"out_dir={out} is in use by process {pid} on {platform.node()}" in message
        first.kill()
        first.wait()
        runtime.make_folder(out, runtime.Distributed("cpu", "float32"))
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_only_free_constants_may_change_on_resume():
    """The others are named, all of them, with the old value and the new one."""
    saved = {"seed": 0, "epochs": 5, "workers": 8, "betas": (0.9, 0.95)}
    runtime.check_resumable(saved, {**saved, "workers": 2}, {"workers"})
    message = failure(runtime.check_resumable, saved, {**saved, "seed": 1, "epochs": 6, "workers": 2}, {"workers"})
    assert "seed was 0, is 1" in message and "epochs was 5, is 6" in message
    assert "workers" not in message and "betas" not in message
    assert "new" in failure(runtime.check_resumable, saved, {**saved, "new": 1}, set())  # a constant of a later version


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    """A run killed after its last checkpoint repeats those steps, and a validation at that step; two lines for one step
    would be two curves."""
    path = tmp_path / "log.jsonl"
    log = runtime.Log(path, 0)
    for step in range(1, 6):
        log.write(step=step, loss=step / 3)
        log.write(step=step, val_psnr=20.5)
    log.file.close()
    log = runtime.Log(path, 3)
    log.write(step=4, loss=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # whole, without closing the file
    assert [(line["step"], "loss" in line) for line in lines] == [
        (1, True), (1, False), (2, True), (2, False), (3, True), (4, True)]
    assert lines[0]["loss"] == pytest.approx(1 / 3, abs=1e-6) and lines[-1]["loss"] == 1.0


def test_log_survives_a_half_written_last_line(tmp_path):
    """A full disk or a killed machine: the run must still be resumable."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    runtime.Log(path, 1).write(step=2, loss=1.0)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.0, 1.0]


@pytest.mark.parametrize("line", [b"{}", b"[]", b"7", b"\xff\xfe", b'{"step": "x"}', b'{"step": 2}{"step": 3}'])
def test_log_goes_on_after_lines_that_can_not_be_read(tmp_path, capsys, line, monkeypatch):
    """They are left out and counted. And what is there is not written over in place: the disk may be full."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}')
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: exec("raise OSError('No space left on device')"))
        assert "can't be written: No space left" in failure(runtime.Log, path, 2)
    assert path.read_bytes() == before
    runtime.Log(path, 2).write(step=3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert capsys.readouterr().out.endswith("left out: 1\n")


def test_log_keeps_six_digits_of_small_numbers(tmp_path):
    """Six decimals would write the last learning rates as 0."""
    path = tmp_path / "log.jsonl"
    runtime.Log(path, 0).write(step=1, lr=1.23456789e-7, loss=123.456789)
    assert json.loads(path.read_text()) == {"step": 1, "lr": 1.23457e-7, "loss": 123.457}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named(tmp_path, value):
    """Which step, which term, where the last good checkpoint is, and which constant to turn. No line of the log tells
    of it, and the bar is closed, so that the message does not stand at its end."""
    (tmp_path / "checkpoint.pt").touch()
    progress = runtime.Progress(tmp_path, 5, 20, 8, alone())
    for mim in 2.0, 4.0, 2.0, value:
        progress.add({"l1": torch.tensor(1.0), "mim": torch.tensor(mim)})
        if progress.step == 7:
            progress.report(lr=0.1)
    message = failure(progress.report, 0.1)
    assert all(word in message for word in ("step 9", "mim", str(tmp_path / "checkpoint.pt"), "learning_rate", "damaged"))
    line, = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["step"], line["l1"], line["mim"], line["lr"]) == (7, 1.0, 3.0, 0.1) and progress.bar.disable
    assert "l1" not in message


def test_terms_that_come_and_go_are_averaged_over_the_steps_that_have_them(tmp_path):
    """A discriminator that starts between two reports; one that breaks is named with its own step."""
    progress = runtime.Progress(tmp_path, 0, 9, 8, alone())
    for step in range(4):
        later = {"adversarial": torch.tensor(step + 0.5)} if step > 1 else {}
        progress.add({"l1": torch.tensor(float(step)), **later})
    progress.report(lr=0.1)
    progress.add({"l1": torch.tensor(1.0)})
    progress.report(lr=0.1)
    mixed, plain = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (mixed["l1"], mixed["adversarial"], plain["l1"]) == (1.5, 3.0, 1.0) and "adversarial" not in plain
    progress.add({"l1": torch.tensor(1.0)})
    progress.add({"l1": torch.tensor(1.0), "adversarial": torch.tensor(math.nan)})
    assert "step 7: adversarial is nan" in failure(progress.report, 0.1)


def test_a_log_file_gets_a_line_per_report(tmp_path, capsys):
    """And no bar. From the first process alone."""
    for first in True, False:
        progress = runtime.Progress(tmp_path, 10, 40, 8, alone(first=first, print=print if first else lambda *_: None))
        for step in range(20):
            progress.add({"l1": torch.tensor(0.25), "grad_norm": torch.tensor(1.5)})
            if progress.step % 10 == 0:
                progress.report(lr=0.1)
        assert list(runtime.bar(range(3), alone(first=first), desc="encoding")) == [0, 1, 2]
        progress.bar.close()
        printed = capsys.readouterr()
        lines = re.sub(r"img/s \d+, \d\d:\d\d left", "img/s and time", printed.out).splitlines()
        expected = [f"step {step}/40: l1 0.250, grad_norm 1.500, img/s and time" for step in (20, 30)]
        assert lines == (expected if first else []) and printed.err == ""


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    """On standard error, and no lines beside it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = runtime.Progress(tmp_path, 0, 2, 8, alone())
    for _ in range(2):
        progress.add({"l1": torch.tensor(0.25)})
    progress.report(lr=0.1)
    list(runtime.bar(range(3), alone(), desc="encoding"))
    progress.bar.close()
    assert "l1=0.250" in terminal.getvalue() and "encoding: 100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_the_time_spent_waiting_for_data_is_logged_as_a_share(tmp_path):
    """Of the time since the last report; what start_clock() leaves out is left out."""
    progress = runtime.Progress(tmp_path, 0, 9, 8, alone())
    for waited in 0.04, 0:
        time.sleep(0.05)
        progress.add({"l1": torch.tensor(1.0)})
        progress.report(0.1, waited)
        time.sleep(0.05)
        progress.start_clock()
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert 0.4 < first["waiting"] <= 0.8 and second["waiting"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Published weights


def missing(*arguments):
    """What MissingWeights says."""
    with pytest.raises(pretrained.MissingWeights) as error:
        pretrained.download_weights(*arguments)
    return str(error.value)


def test_weights_that_are_there_are_checked_and_not_fetched(tmp_path, monkeypatch):
    """Put there by hand on a machine without network: used if whole, refused by name if not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def no_network(*_, **__):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    path = tmp_path / "hub" / "checkpoints" / "weights.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    checksum = hashlib.sha256(b"weights").hexdigest()
    for expected in checksum, checksum[:8]:
        assert pretrained.download_weights("https://localhost/weights.pth", expected, alone()) == path
    path.write_bytes(b"weigh")
    message = missing("https://localhost/weights.pth", checksum, alone())
    assert str(path) in message and "damaged" in message


def test_weights_that_can_not_be_fetched(tmp_path, monkeypatch):
    """Which file, from where, to which path; no half a file stays behind."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = missing("https://localhost/weights.pth", "00", alone())
    path = tmp_path / "hub" / "checkpoints" / "weights.pth"
    assert all(word in message for word in ("https://localhost/weights.pth", str(path), "Name or service"))
    assert not path.exists()


def test_weights_are_fetched_once_per_machine_and_missed_by_all(tmp_path, monkeypatch):
    """The second process of a machine never downloads; if the first one's download failed, it goes without as well."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("tried to download"))
    path = tmp_path / "hub" / "checkpoints" / "weights.pth"
    assert pretrained.download_weights("https://localhost/weights.pth", "00", alone()) == path
    failed = alone(gather=lambda items: ["the first one's error", *items])
    assert missing("https://localhost/weights.pth", "00", failed) == "the first one's error"


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:.*weight enum:UserWarning")
def test_lpips_for_training(monkeypatch):
    """The same in float32; in bfloat16 less than a hundredth off, with distances in float32 and the same gradient up to
    rounding."""
    torch.manual_seed(0)
    perceptual = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).requires_grad_(False)
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    results = {}
    for dtype in "", "float32", "bfloat16":
        network = copy.deepcopy(perceptual)
        monkeypatch.setattr(pretrained, "load_lpips", lambda *_: network)
        network = pretrained.training_lpips("vgg", runtime.Distributed("cpu", dtype)) if dtype else network
        x = b.clone().requires_grad_()
        distance = network(x, a)
        distance.sum().backward()
        assert distance.dtype == torch.float32
        results[dtype] = distance.detach(), x.grad
    (plain, gradient), (single, same_gradient), (half, rounded) = results.values()
    torch.testing.assert_close(single, plain)
    torch.testing.assert_close(same_gradient, gradient)
    torch.testing.assert_close(half, plain, rtol=0.01, atol=0)
    assert (half / plain - 1).abs().max() > 1e-5  # it was rounded
    assert torch.cosine_similarity(rounded.flatten(), gradient.flatten(), dim=0) > 0.98


def test_processes_that_see_other_files_do_not_train_together(tmp_path, monkeypatch):
    """One node resumes and the other does not see the checkpoint: they would average the gradients of different runs."""
    def gather(_, items):
        return items + [("node-1", {"learning_rate": 0.1, "out_dir": "a checkpoint of step 10"})]

    monkeypatch.setattr(runtime.Distributed, "gather", gather)
    dist = runtime.Distributed("cpu", "float32")
    dist.check_same({"learning_rate": 0.1})
    message = failure(dist.check_same, {"learning_rate": 0.1, "out_dir": "no checkpoint"})
    assert "out_dir is not the same" in message and "has no checkpoint, node-1 has a checkpoint of step 10" in message
    message = failure(dist.check_same, {"learning_rate": 0.2, "out_dir": "a checkpoint of step 10"})
    assert "learning_rate" in message and "has 0.2, node-1 has 0.1" in message


def test_two_processes_with_different_images(tmp_path):
    """As on two nodes with a copy of the data each, as many images, but one under another name."""
    for rank in "01":
        for name in "0.png", f"{rank}1.png":
            (tmp_path / rank / "train" / "cat").mkdir(parents=True, exist_ok=True)
            (tmp_path / rank / "train" / "cat" / name).write_bytes(b"the same")
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, runtime
source = data.open_split({str(tmp_path)!r} + "/" + os.environ["RANK"], "train", 32, 0)
data.TrainLoader(source, None, 2, 0, 1, 0, runtime.Distributed("cpu", "float32"))
""")
    result = run_script(tmp_path / "script.py", nproc=2, ok=False)
    assert "data_dir is not the same for all processes" in last_words(result)
    assert last_words(result).count("2 images, list ") == 2


def test_two_processes_of_which_one_sees_no_checkpoint(tmp_path):
    """As on two nodes whose out_dir is not shared."""
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import runtime
runtime.Distributed("cpu", "float32", same=dict(out_dir=10 * int(os.environ["RANK"])))
""")
    result = run_script(tmp_path / "script.py", nproc=2, ok=False)
    assert "out_dir is not the same for all processes" in last_words(result)
