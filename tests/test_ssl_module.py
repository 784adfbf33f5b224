"""ssl.py has the name of Python's TLS module and is found in its place by all of the process: it must be both."""
import ast
import importlib.util
import pickle
import sys

import pytest
import ssl

from conftest import ROOT, python


@pytest.fixture(scope="module")
def tls_names():
    """All names of Python's own module, from a process that ignores the folder it runs in."""
    names = python("-I", "-c", "import ssl; print(ssl.__file__, *vars(ssl))").stdout.split()
    assert names[0] != str(ROOT / "ssl.py") and {"SSLContext", "create_default_context", "SSLWantReadError"} <= set(names)
    return set(names[1:])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs Python as in an environment that has pip and nothing else: no torch, numpy, Pillow."""
    site = tmp_path_factory.mktemp("site")
    pip = importlib.util.find_spec("pip")
    assert pip, "this test needs pip in the environment that runs it"
    (site / "pip").symlink_to(pip.submodule_search_locations[0])
    return lambda *arguments, **options: python("-S", *arguments, PYTHONPATH=site, **options)


def test_import_ssl_finds_ours_and_it_is_also_python_s(tls_names):
    """Every name of the TLS module is there, so no library can miss one."""
    assert python("-c", "import ssl; print(ssl.__file__)").stdout.strip() == str(ROOT / "ssl.py")
    assert not tls_names - set(vars(ssl))
    assert "iBOT" in ssl.__doc__, "help(ssl) tells what this file is"


def test_our_names_overwrite_none_of_python_s(tls_names):
    """One name for two things (say, a loss called `match_hostname`) would break the method, or whoever uses TLS."""
    names = set()
    for node in ast.parse((ROOT / "ssl.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    assert {"IBOTLoss", "MultiCrop", "torch", "data"} <= names  # the walk above finds what it should
    assert names & tls_names == {"__doc__"}  # which is put back at once: it describes this file


def test_tls_works_from_the_project_folder_before_and_after_torch():
    """Contexts, errors and what builds on them, in both import orders; heavy modules come when they are used."""
    use = "c = ssl.create_default_context(); assert c.check_hostname and issubclass(ssl.SSLWantReadError, OSError)\n"
    python("-c", "import ssl, sys\n" + use
           + "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'loaded at import'\n"
           + "import asyncio, http.client, urllib.request\n"
           + "assert any(isinstance(h, urllib.request.HTTPSHandler) for h in urllib.request.build_opener().handlers)\n"
           + "http.client.HTTPSConnection('localhost')\n"
           + "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'loaded by use of TLS'\n"
           + "import torch\nassert ssl.IBOTLoss(4, 'cpu').centers['cls'].shape == (4,)\n" + use)
    python("-c", "import torch\nimport ssl\n" + use + "assert ssl.IBOTLoss(4, 'cpu').centers['patch'].sum() == 0\n"
           + "import asyncio, torch.hub\nasyncio.run(asyncio.sleep(0))")


@pytest.mark.parametrize("script", ["train_tokenizer", "bench"])
def test_python_s_own_may_have_come_first(script):
    """A debugger, Jupyter, a plugin or a .pth file imports it before a script's folder is on the path. The scripts find
    ours all the same, and those who hold the TLS module still hold the one that all others get."""
    python("-I", "-c", f"""
import sys, ssl
own, context = ssl.SSLContext, ssl.create_default_context()
sys.path.insert(0, {str(ROOT)!r})
import {script}
assert {script}.ssl is ssl is sys.modules["ssl"] and ssl.METHODS["ibot"] and ssl.IBOTLoss.__module__ == "ssl"
assert "iBOT" in ssl.__doc__ and ssl.SSLContext is own and isinstance(context, ssl.SSLContext)
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
try:
    ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.org").do_handshake()
except ssl.SSLWantReadError:
    assert b"example.org" in outgoing.read()
""")


def test_pip_and_asyncio_work_where_torch_and_numpy_are_not_installed(bare):
    """Whoever sets up the project runs pip in its folder before anything is installed."""
    bare("-c", "import asyncio, ssl; ssl.create_default_context(); asyncio.run(asyncio.sleep(0))")
    assert "No module named" in bare("-c", "import torch", ok=False).stderr  # the environment is as bare as it claims
    assert "pip" in bare("-m", "pip", "--version").stdout
    bare("-c", "from pip._internal.network.session import PipSession; PipSession().get_adapter('https://localhost')")


def test_torchrun_starts_in_the_project_folder():
    """torchrun's agent imports asyncio, http and multiprocessing before it starts a script."""
    assert "--nproc" in python("-m", "torch.distributed.run", "--help").stdout


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loading_workers_that_do_not_fork(method, tmp_path):
    """Spawned workers (macOS, Windows, Python 3.14) import by name: ssl must be ours there as well, with TLS in it."""
    script = tmp_path / "load.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import ssl
import data
import numpy as np
from torch.utils.data import DataLoader

class Views:
    def __init__(self):
        self.crops = ssl.MultiCrop(16, (0.25, 1.0), 8, (0.05, 0.25), 2, 4)
    def __call__(self, image, rng):
        ssl.create_default_context()  # the worker's ssl is Python's as well
        return self.crops(np.array(image), rng)
    def collate(self, examples):
        return ssl.collate_crops(data.default_collate(examples))

if __name__ == "__main__":
    views = Views()
    dataset = data.TrainBatches(data.Shapes("train", 4, 16), views, seed=0, collate=views.collate)
    loader = DataLoader(dataset, sampler=[[(0, 0), (0, 1)], [(0, 2), (0, 3)]], batch_size=None, num_workers=1,
                        multiprocessing_context={method!r})
    print([tuple(views["global_crops"].shape) for views, bad in loader])
""")
    assert python(script, cwd=tmp_path).stdout.strip() == "[(4, 16, 16, 3), (4, 16, 16, 3)]"


def test_handshake_begins_with_a_client_hello():
    """The C half of TLS calls into the classes of the Python half: SSLObject over memory, up to the first message."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.org")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    hello = outgoing.read()
    assert hello[:2] == b"\x16\x03" and hello[5] == 1 and b"example.org" in hello  # handshake record, ClientHello
    incoming.write(b"this is not TLS at all")
    with pytest.raises(ssl.SSLError):
        connection.do_handshake()


def test_tls_objects_survive_pickling():
    """Enums and errors cross process borders by name; the name `ssl` leads to this file."""
    assert pickle.loads(pickle.dumps(ssl.TLSVersion.TLSv1_3)) is ssl.TLSVersion.TLSv1_3
    assert isinstance(pickle.loads(pickle.dumps(ssl.SSLWantReadError(2, "again"))), ssl.SSLWantReadError)
    assert sys.modules["ssl"] is ssl and ssl.SSLContext.__module__ == "ssl"
