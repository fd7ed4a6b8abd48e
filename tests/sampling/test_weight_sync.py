"""Weight syncs against a server that records requests and answers as vLLM 0.32 does, which was read for it."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections import defaultdict
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from openril.errors import EndpointError
from openril.recipe.schema import SamplerConfig
from openril.sampling import weight_sync, weight_transfer
from openril.sampling.weight_sync import StaleWeightsError, WeightSync, folder_tensors

CPU = torch.device("cpu")
TENSORS = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.bfloat16).view(6, 4),
    "model.layers.0.up_proj.weight": torch.arange(8, dtype=torch.bfloat16).view(2, 4) / 7,
    "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
}
CACHES = ["/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache"]


class RecordedVLLM:
    """Answers the requests of a weight sync. ``answers`` replaces the answer to a path by (status, text) or a function."""

    def __init__(self, checkpoint, world_size: int = 1) -> None:
        self.requests: list[tuple[str, dict | None]] = []
        self.answers: dict[str, object] = {}
        self.version = "default"
        self.closing = threading.Event()
        server, plain = self, {"/version": {"version": "0.32.0"}, "/get_world_size": {"world_size": world_size}}
        plain["/v1/models"] = {"data": [{"id": "student", "root": str(checkpoint)}]}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(json.loads(text) if text else None)

            def answer(self, body: dict | None) -> None:
                server.requests.append((self.path, body))
                status, text = 200, json.dumps(plain.get(self.path, {}))
                if self.path == "/weight_info":
                    text = json.dumps({"weight_version": server.version})
                if self.path == "/update_weight_version":
                    server.version = body["new_version"]
                if self.path == "/finish_weight_update":
                    server.version = body["weight_version"]
                if (other := server.answers.get(self.path)) is not None:
                    status, text = other() if callable(other) else other
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[dict]:
        return [body for found, body in self.requests if found == path]

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


class Group:
    """What ``NcclGroup`` does, as far as the order of its calls goes."""

    def __init__(self, device: torch.device) -> None:
        self.sent: list[torch.Tensor] = []
        self.joined: tuple[bytes, int] | None = None

    def unique_id(self) -> bytes:
        return bytes(range(128))

    def join(self, unique_id: bytes, world_size: int) -> None:
        self.joined = (unique_id, world_size)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.sent.append(tensor.clone())

    def wait(self) -> None:
        pass


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


@pytest.fixture
def serve(checkpoint):
    running = []

    def start(**more) -> RecordedVLLM:
        running.append(RecordedVLLM(checkpoint, **more))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def transfer_on_cpu(monkeypatch):
    def make(settings, servers):
        kind = {"nccl": weight_transfer.NcclTransfer, "ipc": weight_transfer.IpcTransfer}[settings.sync]
        return kind(settings, servers, CPU)

    monkeypatch.setattr(weight_sync, "make_transfer", make)
    monkeypatch.setattr(weight_transfer, "NcclGroup", Group)
    monkeypatch.setattr(weight_transfer, "CHUNK_BYTES", 40)  # of 48, 16 and 8 bytes: a chunk alone, and one of two


def sync_for(*servers: RecordedVLLM, **settings) -> WeightSync:
    urls = [server.url for server in servers]
    warnings: list[str] = []
    sync = WeightSync(SamplerConfig(engine="vllm", base_urls=urls, **settings), warnings.append)
    sync.warnings = warnings
    return sync


def alone(action) -> None:
    action()


def described(*names: str) -> dict:
    return {
        "names": list(names),
        "dtype_names": ["bfloat16"] * len(names),
        "shapes": [list(TENSORS[name].shape) for name in names],
    }


def test_a_file_is_loaded_then_three_caches_emptied_then_the_version_set(serve, checkpoint):
    server = serve()
    with closing(sync_for(server)) as sync:
        sync.load(checkpoint, "v1")
        assert server.paths == ["/v1/models", "/collective_rpc", *CACHES, "/update_weight_version"]
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint)}}
        assert server.bodies("/collective_rpc") == [body]
        assert server.bodies("/update_weight_version") == [{"new_version": "v1"}]
        sync.check(server.url)
        assert server.paths[-1] == "/weight_info"
        sync.load(checkpoint, "v2")
        sync.check(server.url)


def test_a_server_with_another_version_is_named_with_both(serve, checkpoint):
    server = serve()
    with closing(sync_for(server)) as sync:
        sync.check(server.url)  # nothing was sent, so nothing is expected
        assert server.requests == []
        sync.load(checkpoint, "v1")
        server.version = "default"  # as after a restart
        with pytest.raises(StaleWeightsError, match=rf"{server.url}: .*'v1', got 'default'"):
            sync.check(server.url)


def test_an_old_server_without_versions_is_warned_about_once(serve, checkpoint):
    server = serve()
    server.answers["/update_weight_version"] = (404, "{}")
    with closing(sync_for(server)) as sync:
        sync.load(checkpoint, "v1")
        sync.load(checkpoint, "v2")
        sync.check(server.url)
        [warning] = sync.warnings
        assert server.url in warning and "/update_weight_version" in warning
        assert "/weight_info" not in server.paths


@pytest.mark.parametrize("path", CACHES)
def test_a_cache_that_is_not_emptied_fails_the_sync(path, serve, checkpoint):
    server = serve()
    server.answers[path] = (500, "no memory")
    with closing(sync_for(server)) as sync:
        with pytest.raises(EndpointError, match=rf"{server.url} answered 500 .*cache: no memory"):
            sync.load(checkpoint, "v1")
        assert sync.version == ""


def test_the_prefix_cache_is_tried_again_while_a_request_holds_it(serve, checkpoint, monkeypatch):
    server = serve()
    waits = []
    monkeypatch.setattr(weight_sync.time, "sleep", waits.append)
    left = [False, False, True]
    server.answers["/reset_prefix_cache"] = lambda: (200, json.dumps({"success": left.pop(0)}))
    with closing(sync_for(server)) as sync:
        sync.load(checkpoint, "v1")
        assert len(waits) == 2 and left == []
        server.answers["/reset_prefix_cache"] = (200, '{"success": false}')
        with pytest.raises(EndpointError, match="prefix cache"):
            sync.load(checkpoint, "v2")


def test_an_adapter_is_loaded_under_a_new_name_and_the_one_before_unloaded(serve, checkpoint, tmp_path):
    server = serve()
    with closing(sync_for(server, sync="adapter")) as sync:
        sync.load(checkpoint, "v0")
        for version in ("v1", "v2"):
            server.requests.clear()
            sync.load_adapter(tmp_path, version)
            unloading = ["/v1/unload_lora_adapter"] * (version == "v2")
            assert server.paths == [*unloading, "/v1/load_lora_adapter", *CACHES, "/update_weight_version"]
            body = {"lora_name": f"student-{version}", "lora_path": str(tmp_path)}
            assert server.bodies("/v1/load_lora_adapter") == [body]
        assert server.bodies("/v1/unload_lora_adapter") == [{"lora_name": "student-v1"}]
        server.answers["/v1/load_lora_adapter"] = (404, "{}")
        with pytest.raises(EndpointError, match="--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            sync.load_adapter(tmp_path, "v3")


def test_nccl_joins_all_workers_in_one_group_and_broadcasts_in_the_order_of_the_requests(serve, transfer_on_cpu):
    servers = [serve(world_size=2), serve(world_size=1)]
    with closing(sync_for(*servers, sync="nccl")) as sync:
        sync.send(TENSORS.items(), "v1", alone)
        for server, offset in zip(servers, (1, 3), strict=True):
            assert server.paths == [
                *("/version", "/get_world_size", "/init_weight_transfer_engine", "/start_weight_update"),
                *("/update_weights", "/update_weights", "/v1/models", "/finish_weight_update"),
                *(*CACHES, "/update_weight_version"),
            ]
            [init] = server.bodies("/init_weight_transfer_engine")
            unique_id = base64.b64decode(init["init_info"].pop("nccl_unique_id_b64"), validate=True)
            assert unique_id == bytes(range(128))
            assert init == {"init_info": {"rank_offset": offset, "world_size": 4, "packed": False}}
            first, *rest = TENSORS
            expected = [{"update_info": described(first)}, {"update_info": described(*rest)}]
            assert server.bodies("/update_weights") == expected
            assert server.bodies("/start_weight_update") == [None]
            assert server.bodies("/finish_weight_update") == [{"weight_version": "v1"}]
            sync.check(server.url)
        group = sync.transfer.group
        assert group.joined == (bytes(range(128)), 4)
        assert all(torch.equal(a, b) for a, b in zip(group.sent, TENSORS.values(), strict=True))
        for server in servers:
            server.requests.clear()
        sync.send(TENSORS.items(), "v2", alone)
        assert servers[0].paths[0] == "/start_weight_update"  # joined already
    assert servers[0].paths[-1] == "/shutdown_weight_transfer_engine"


def test_ipc_sends_packed_chunks_that_unpack_as_vllm_does_it(serve, transfer_on_cpu, monkeypatch):
    server = serve()
    memory = {}

    def export(packed: torch.Tensor):
        memory[len(memory)] = packed.clone()
        return "GPU-1", (len(memory) - 1, "other arguments")

    monkeypatch.setattr(weight_transfer, "export", export)
    with closing(sync_for(server, sync="ipc")) as sync:
        sync.send(TENSORS.items(), "v1", alone)
    assert server.bodies("/init_weight_transfer_engine") == [{"init_info": {"packed": True}}]
    received = {}
    for body in server.bodies("/update_weights"):
        info = body["update_info"]
        assert set(info) == {"names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles_pickled"}
        handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"], validate=True))
        packed = memory[handles["GPU-1"][0]][: sum(info["tensor_sizes"])]
        for name, dtype, shape, part in zip(
            info["names"], info["dtype_names"], info["shapes"], packed.split(info["tensor_sizes"]), strict=True
        ):
            received[name] = part.contiguous().view(getattr(torch, dtype)).view(shape)
    assert list(received) == list(TENSORS)
    assert all(torch.equal(received[name], TENSORS[name]) for name in TENSORS)


def test_a_worker_that_cannot_join_ends_the_wait_of_this_process(serve, transfer_on_cpu, monkeypatch):
    server = serve()
    monkeypatch.setattr(Group, "join", lambda self, *args: server.closing.wait())  # as NCCL waits
    server.answers["/init_weight_transfer_engine"] = (500, "Weight transfer not configured.")
    with closing(sync_for(server, sync="nccl")) as sync:
        with pytest.raises(EndpointError, match=r"not configured\. .*--weight-transfer-config .*nccl"):
            sync.send(TENSORS.items(), "v1", alone)
        assert sync.version == "" and "/start_weight_update" not in server.paths


def test_an_error_of_nccl_is_one_that_every_process_raises(serve, transfer_on_cpu, monkeypatch):
    def join(self, *args) -> None:
        raise RuntimeError("NCCL Error 5: mismatched versions")

    monkeypatch.setattr(Group, "join", join)
    error = pytest.raises(EndpointError, match=r"student\.sampler\.sync: .*NCCL Error 5: mismatched")
    with closing(sync_for(serve(), sync="nccl")) as sync, error:
        sync.send(TENSORS.items(), "v1", alone)


def test_a_server_that_never_takes_the_weights_is_given_up(serve, transfer_on_cpu):
    server = serve()
    with closing(sync_for(server, sync="nccl", timeout=0.3)) as sync:
        server.answers["/update_weights"] = lambda: (200, "{}" * server.closing.wait())
        with pytest.raises(EndpointError, match=r"/update_weights|student\.sampler\.timeout"):
            sync.send(TENSORS.items(), "v1", alone)
        assert "/finish_weight_update" not in server.paths


@pytest.mark.parametrize(("version", "refused", "warned"), [("0.29.1", True, False), ("0.33.0", False, True)])
def test_the_versions_of_vllm_that_the_protocol_was_read_in(version, refused, warned, serve, transfer_on_cpu):
    server = serve()
    server.answers["/version"] = (200, json.dumps({"version": version}))
    with closing(sync_for(server, sync="nccl")) as sync:
        if refused:
            with pytest.raises(EndpointError, match=rf"student\.sampler\.sync: .*0\.30 .*{version}"):
                sync.send(TENSORS.items(), "v1", alone)
        else:
            sync.send(TENSORS.items(), "v1", alone)
        assert [version in warning for warning in sync.warnings] == [True] * warned


def test_a_transfer_that_lacks_a_tensor_is_not_finished(serve, transfer_on_cpu):
    server = serve()
    with closing(sync_for(server, sync="nccl")) as sync:
        with pytest.raises(EndpointError, match=r"lacks 1 tensors .*model\.norm\.weight"):
            sync.send(list(TENSORS.items())[:-1], "v1", alone)
        assert "/finish_weight_update" not in server.paths


def test_without_a_gpu_a_transfer_is_refused_before_any_request(serve):
    server = serve()
    with closing(sync_for(server, sync="ipc")) as sync:
        with pytest.raises(EndpointError, match=r"student\.sampler\.sync: ipc needs a GPU"):
            sync.send(TENSORS.items(), "v1", alone)
        assert server.requests == []


def test_every_file_of_a_checkpoint_is_read(checkpoint):
    save_file({"second": torch.zeros(2)}, checkpoint / "model-2.safetensors")
    found = defaultdict(int)
    for name, tensor in folder_tensors(checkpoint):
        found[name] += tensor.numel()
    assert found == {"second": 2, **{name: tensor.numel() for name, tensor in TENSORS.items()}}


@pytest.mark.gpu
def test_the_nccl_group_runs_alone_on_a_gpu():
    """One process is a whole group: the calls of torch.cuda.nccl are right, though nothing travels."""
    device = torch.device("cuda", 0)
    group = weight_transfer.NcclGroup(device)
    unique_id = group.unique_id()
    assert len(unique_id) == 128
    group.join(unique_id, 1)
    tensor = torch.arange(1000, device=device, dtype=torch.bfloat16)
    group.broadcast(tensor)
    group.wait()
    assert torch.equal(tensor.cpu(), torch.arange(1000, dtype=torch.bfloat16))


def _open_in_another_process(text: str, sizes: list[int], results) -> None:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    [arguments] = pickle.loads(base64.b64decode(text)).values()
    arguments = list(arguments)
    arguments[6] = 0  # as vLLM: the device of the process that opens it
    results.put([part.sum(dtype=torch.int64).item() for part in rebuild_cuda_tensor(*arguments).split(sizes)])


@pytest.mark.gpu
def test_another_process_opens_the_memory_that_ipc_exports():
    packed = torch.randint(0, 255, (3000,), dtype=torch.uint8, device="cuda")
    uuid, arguments = weight_transfer.export(packed)
    assert uuid == str(torch.cuda.get_device_properties(0).uuid)
    text = base64.b64encode(pickle.dumps({uuid: arguments})).decode()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_open_in_another_process, args=(text, [1000, 2000], results))
    process.start()
    assert results.get(timeout=120) == [part.sum(dtype=torch.int64).item() for part in packed.split([1000, 2000])]
    process.join(timeout=60)
