"""What every test may rely on: fixed seeds, no network, golden files, honest uninitialised memory.

A run that names only tests/kernels on a machine without a GPU switches Triton's interpreter on, so
that `pytest tests/kernels/test_rmsnorm.py` tests the kernel and not its reference against itself.
All other tests run the path that a user on a CPU runs, hence two processes in `make test`. Over 300
lines, because what tests in several folders share can only stand here.
"""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:  # fixtures import argrpo late: whoever imports a kernel fixes its interpreter
    from argrpo.engine.rollout_engine import RolloutEngine

TESTS = Path(__file__).parent
KERNEL_TESTS = TESTS / "kernels"
ENGINE_TESTS = TESTS / "engine"

_TINY_CLIP = {  # an architecture of open_clip
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}

_RANKS_TIMEOUT_S = 60  # a test of a hang fails after this long

# A missing local file must be an error in a test, never a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    named = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    only_kernels = all(path.is_relative_to(KERNEL_TESTS) for path in named)
    if only_kernels and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # The tests' tensors are tiny: more threads wait for each other, on a busy machine for seconds.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    if _interpreted():
        return "kernels: Triton's interpreter"
    if torch.cuda.is_available():
        return f"kernels: {torch.cuda.get_device_name()}"
    return "kernels: references only; run tests/kernels on its own for the interpreter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU, found none"
    elif _interpreted():
        reason = "needs a CUDA GPU, but Triton's interpreter is on"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases, one sub-folder each."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 encoder of width 64 that knows a few words; the others are unknown."""
    from argrpo.digits.text_encoder import DigitsTextEncoderConfig, save_text_encoder

    folder = tmp_path_factory.mktemp("t5")
    words = ["a", "small", "handwritten", "seven", "zero", "tilted", ",", "!"]
    save_text_encoder(DigitsTextEncoderConfig(), words, folder)
    return folder


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """`with files_up_to(4096):` the system refuses to let a file grow further, as a full disk."""
    return _files_up_to


@contextmanager
def _files_up_to(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


class Ended(NamedTuple):
    """How a process of `run_ranks` ended."""

    result: Any  # what its function returned, or what it raised
    code: int  # of the process; negative: the signal that killed it


@pytest.fixture
def run_ranks(tmp_path: Path) -> Iterator[Callable[..., list[Ended]]]:
    """`run_ranks(2, work, *arguments)` runs a function as each rank of a group of gloo processes.

    Forked, so that nothing is imported again; threads do not survive a fork, and the tests' one
    thread has none to miss.
    """
    context = multiprocessing.get_context("fork")
    started: list[multiprocessing.process.BaseProcess] = []

    def run(num_ranks: int, work: Callable[..., object], *arguments: object) -> list[Ended]:
        store = tmp_path / f"ranks_{len(started)}"
        answers = []
        for rank in range(num_ranks):
            mine, its = context.Pipe(duplex=False)
            own = (its, store, rank, num_ranks, work, arguments)
            started.append(context.Process(target=_as_rank, args=own, daemon=True))
            started[-1].start()
            its.close()
            answers.append(mine)
        return [_ended(*pair) for pair in zip(answers, started[-num_ranks:], strict=True)]

    yield run
    for process in started:
        process.kill()


def _as_rank(
    answer: Connection, store: Path, rank: int, count: int, work: Callable[..., object], given: Any
) -> None:
    import torch.distributed as dist

    from argrpo.process_group import failures_told

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        with failures_told():
            result = work(*given)
    except BaseException as error:  # a signal's wish to stop, too
        result = error
    answer.send_bytes(pickle.dumps(result))


def _ended(answer: Connection, process: multiprocessing.process.BaseProcess) -> Ended:
    assert answer.poll(_RANKS_TIMEOUT_S), "expected an answer, got a rank that hangs"
    try:
        result = pickle.loads(answer.recv_bytes())
    except EOFError:
        result = None  # it was killed
    process.join(_RANKS_TIMEOUT_S)
    assert process.exitcode is not None
    return Ended(result, process.exitcode)


class Exchange:
    """One request to the scripted server, which does with it whatever a test wants."""

    def __init__(self, handler: BaseHTTPRequestHandler, number: int, stopping: Event) -> None:
        self.number = number  # from 0, in order of arrival
        self.path, self.headers, self.stopping = handler.path, handler.headers, stopping
        self.body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self._handler = handler

    def reply(self, value: object, code: int = 200, **headers: str) -> None:
        """A whole answer; bytes go as they are, anything else as JSON."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.start(len(content), code, **headers)
        self._handler.wfile.write(content)

    def start(self, length: int, code: int = 200, **headers: str) -> None:
        """The head of an answer of so many bytes; `send` and `die` go on from there."""
        self._handler.send_response(code)
        for name, item in {"Content-Length": str(length), **headers}.items():
            self._handler.send_header(name.replace("_", "-"), item)
        self._handler.end_headers()

    def send(self, content: bytes) -> None:
        self._handler.wfile.write(content)

    def die(self) -> None:
        """Close the connection, whatever was sent."""
        self._handler.close_connection = True
        self._handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def scripted_server() -> Iterator[Callable[[Callable[[Exchange], None]], str]]:
    """Starts HTTP servers on this machine that answer each request by a function; gives their
    addresses."""
    stopping, servers = Event(), []

    def started(script: Callable[[Exchange], None]) -> str:
        numbers = count()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                # A client that has had enough closes its end.
                with suppress(ConnectionError):
                    script(Exchange(self, next(numbers), stopping))

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield started
    stopping.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy of 2 x 2 tokens and a tokenizer, for runs of many steps."""
    from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
    from argrpo.models.loading import save_policy, save_tokenizer
    from argrpo.models.vq import VQConfig, VQTokenizer

    folder = tmp_path_factory.mktemp("tiny_models")
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 16, "vocab_size": 16}
    grid = {"image_size": 8, "downsample": 4, "num_classes": 10}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid)), folder / "policy")
    vq = {"codebook_size": 16, "codebook_dim": 4, "z_channels": 32, "channels": 32}
    blocks = {"encoder_multipliers": (1, 1, 1), "decoder_multipliers": (1, 1, 1)}
    save_tokenizer(VQTokenizer(VQConfig(**vq, **blocks, num_res_blocks=1)), folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # library code may draw from the global state


@pytest.fixture(autouse=True)
def _empty_holds_nan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves a value unwritten, or reads past its mask, shows it as NaN."""
    if not request.path.is_relative_to(KERNEL_TESTS):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _scattered_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page tables are never in order, so that nothing can rely on neighbours."""
    if request.path.is_relative_to(ENGINE_TESTS) or "engine" in request.path.stem:
        from argrpo.engine import page_pool

        order = np.random.default_rng(0)
        monkeypatch.setattr(page_pool, "first_order", lambda n: order.permutation(n).tolist())


@pytest.fixture
def replayed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine replays what it traced once, as a CUDA graph would.

    What a step read on the host while it was traced, a position, a scale, an allocation, is then
    the same in every replay, and the tokens are wrong.
    """

    from argrpo.engine import paged_runner
    from argrpo.engine.device_queue import DeviceQueue
    from argrpo.kernels import guided_sampling

    def traced(queue: DeviceQueue, step: Callable[[], None]) -> Callable[[], object]:
        def traceable() -> Tensor:
            step()
            return torch.zeros(())

        with queue.entered():
            return make_fx(traceable)()

    monkeypatch.setattr(DeviceQueue, "captured", traced)
    monkeypatch.setattr(paged_runner, "_STEPS_PER_GRAPH", (2, 1))  # tracing eight takes seconds
    # The reference reads k and p on the host, to sort no more than they keep; the kernel does not.
    monkeypatch.setattr(guided_sampling, "filter_mask", _filter_on_the_device)


@pytest.fixture(params=["waves", "pages", "replayed"])
def build(request: pytest.FixtureRequest) -> "Iterator[Callable[..., RolloutEngine]]":
    """Builds engines of every kind; when the test is over, every page must be back."""
    from argrpo.engine.rollout_engine import RolloutEngine

    if request.param == "replayed":
        request.getfixturevalue("replayed_steps")
    engines = []

    def built(*args: object, **options: object) -> RolloutEngine:
        engines.append(RolloutEngine(*args, paged=request.param != "waves", **options))
        return engines[-1]

    yield built
    for engine in engines:
        engine.check()
        assert engine.num_held_pages == 0


def _filter_on_the_device(
    logits: Tensor, top_k: Tensor, top_p: Tensor, temperature: Tensor
) -> Tensor:
    """What `filter_mask` keeps, without a look at a number."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    vocab_size = logits.shape[1]
    count = torch.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size).long()
    threshold = ordered.gather(1, (count - 1).expand(len(ordered), 1))
    kept = (ordered >= threshold) & (ordered > -torch.inf)
    mass = (ordered.double() / temperature).masked_fill(~kept, -torch.inf).softmax(dim=1)
    inside = mass.cumsum(dim=1) - mass <= top_p
    inside[:, 0] = True
    kept &= inside | (top_p >= 1)
    return torch.zeros_like(kept).scatter(1, order, kept)


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: object, **options: object) -> Tensor:
        out = allocate(*args, **options)
        if out.is_floating_point():
            with torch.no_grad():
                out.fill_(torch.nan)
        return out

    return allocate_nan


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def tower_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    """Weights of a small CLIP of open_clip, which then knows it as argrpo-tiny, and the model."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "argrpo-tiny.json").write_text(json.dumps(_TINY_CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("argrpo-tiny")
    torch.save(model.state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt"), model.eval()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small CLIP of transformers with its tokenizer, and the model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    ends = [f"{letter}</w>" for letter in letters]
    words = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "vocab_size": len(words)}
    config = CLIPConfig(
        text_config={**sizes, **ids, "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return folder, model
