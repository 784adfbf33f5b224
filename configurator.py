"""A script's constants, overridden by config files and the command line, as in nanoGPT; and how it ends.

    configure                configure(globals()) at the start of a script's main()
    check, fail              end the program with one line; of several processes, the first that fails shows it
    ignore_signals, leave    loading workers end with their training process
"""
import ast
import atexit
import difflib
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # a scheduler's, the first Ctrl-C, Slurm's warning


def fail(message, everywhere=True):
    """Ends the program with one line on standard error and exit status 1. Of several processes only the first prints
    it, unless the problem may be this one's alone (everywhere=False)."""
    rank = int(os.environ.get("RANK", 0))
    line = f"error{f' in process {rank}' if rank and not everywhere else ''}: {message}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # one status of 1 is enough: torchrun's report has a part for each
        raise SystemExit(line if fails_first(line) else 0)
    raise SystemExit(1 if rank > 0 and everywhere else line)


def fails_first(line):
    """Whether, under torchrun, no other process of this machine has failed before. If so, torchrun's report will end
    with `line`. The others, which for example lose their connection to this one, leave without a word."""
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # each process has a folder of its own, side by side
    try:
        if record:
            Path(record).parents[1].joinpath("failed").touch(exist_ok=False)
            more = {"py_callstack": line, "timestamp": int(time.time())}
            Path(record).write_text(json.dumps({"message": {"message": line, "extraInfo": more}}))
        return True
    except FileExistsError:
        return False


def first_traceback(kind, error, trace):
    """A sys.excepthook: of several processes that fail only the first shows a traceback."""
    if fails_first(f"{kind.__name__}: {error}"):
        sys.__excepthook__(kind, error, trace)


def check(condition, message):
    """`fail(message)` unless `condition`. The message names the constant that is to blame."""
    if not condition:
        fail(message)


def first_line(error):
    """What an exception says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ignore_signals(_):
    """For loading workers: their training process needs them until the end of its step, where it saves; see leave()."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def leave():
    """When a process exits, its loading workers end at once. If it is still connected to others, it has failed:
    os._exit keeps gloo's threads from adding a line of their own. torchrun hears only of the first failure. One that
    was connected and is done leaves by os._exit, too: now and then a thread of its libraries aborts the normal exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error about every worker
    for worker in multiprocessing.active_children():
        worker.kill()
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # there if this process was the first to fail
        os._exit(1 if record is None or os.path.exists(record) else 0)
    if leave.done and not hasattr(sys, "last_value"):  # no exception since
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


leave.done = False  # runtime.Distributed.close() sets it


def configure(script, arguments=None):
    """Overrides the constants in a script's globals() and returns all of them as a dict.

    Constants are the lower-case names that the script assigns at its top level. `arguments` (default: the command line)
    are config files, which are Python, and --name=value; files are applied first, in order. Unknown names, wrong types
    and negative numbers end the program with one line; --help prints every constant with its comment.
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
            fail(f"{where}: there is no constant {name}; " + (f"did you mean {near[0]}?" if near else
                 f"see --help, or if it helps to compute one in a config file, begin it with _: _{name}"))
        script[name] = convert(name, value, script[name], where)

    for path in (a for a in arguments if not a.startswith("-")):
        if not Path(path).is_file():
            fail(f"there is no config file {path} (constants are given as --name=value)")
        try:
            overrides = runpy.run_path(path)
        except Exception as error:
            fail(f"{path} is not a config file, or has an error: {type(error).__name__}: {error}")
        for name, value in overrides.items():
            if not name.startswith("_") and not isinstance(value, ModuleType):
                override(name, value, path)
    for argument in (a for a in arguments if a.startswith("-")):
        match = re.fullmatch(r"--([\w-]+)=(.*)", argument, re.DOTALL)
        if not match:
            fail(f"{argument}: constants are given as --name=value")
        override(match[1], match[2], "command line")
    return {name: script[name] for name in names}


def convert(name, value, default, where):
    """Converts `value`, from a config file or as text from the command line, to the type of `default`."""
    wanted = type(default)
    if isinstance(value, str):
        text = os.path.expanduser(value.strip().strip("\"'"))
        try:
            value = text if wanted is str else ast.literal_eval(text.capitalize() if wanted is bool else text)
        except (ValueError, SyntaxError):
            value = text
    if default in ("auto", "True", "False") and str(value).lower() in ("true", "false"):
        value = str(value).capitalize()  # config files say True, the command line often true
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e4
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
        fail(f"{where}: {name}={value!r} must be {words[wanted]}, like {default!r}")
    numbers = value if wanted is tuple else (value,) if wanted in (int, float) else ()
    for number in numbers:
        check(type(number) in (int, float) and 0 <= number < math.inf,
              f"{where}: {name}={value} must be {'finite numbers' if wanted is tuple else 'finite'}, 0 or more")
    if wanted is tuple and isinstance(default[0], float):
        value = tuple(map(float, value))  # --betas=0,0.99
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
