"""What every test may rely on: one thread, no network, and the shared folder beside the checkout where there is one."""

import os

# before the first import of a Hugging Face package
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import socket  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# before the first import of triton: without a GPU its kernels run interpreted, on CPU tensors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]

# the suite runs one process per core (make test); threads of one process would fight those of the other
torch.set_num_threads(1)


class NetworkRefused(RuntimeError):
    """A test tried to reach the network. Not an OSError: libraries swallow those and fall back."""


def _refuse_remote(function, host_of):
    def guarded(*args, **kwargs):
        host = host_of(*args)
        if host is None or host in ("localhost", "127.0.0.1", "::1", ""):
            return function(*args, **kwargs)
        raise NetworkRefused(f"tests must not use the network: {function.__name__} to {host!r}")

    return guarded


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuses connections and name look-ups beyond this machine; Unix sockets and localhost stay."""

    def host_of_address(sock, address):
        return None if sock.family == socket.AF_UNIX else address[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse_remote(socket.socket.connect, host_of_address))
        patch.setattr(socket.socket, "connect_ex", _refuse_remote(socket.socket.connect_ex, host_of_address))
        patch.setattr(socket, "getaddrinfo", _refuse_remote(socket.getaddrinfo, lambda host, *rest: host))
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of published data and golden values beside the checkout; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not ((folder / "data").is_dir() and (folder / "golden").is_dir()):
        pytest.skip("no ../shared with data/ and golden/ beside this checkout")
    return folder
