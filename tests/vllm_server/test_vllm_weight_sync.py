"""Each route by which a real vLLM server gets new weights: it rewrites every tensor, and samples come from them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from accelerate import Accelerator

from openril.errors import EndpointError
from openril.models.adapters import add_adapters
from openril.models.loading import load_student
from openril.models.packing import Policy
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import LoraConfig, SamplerConfig, SamplingConfig, StudentConfig
from openril.sampling import weight_transfer
from openril.sampling.synced import SyncedSampler, WeightsFolder
from openril.sampling.vllm_engine import VLLMSampler, policy_logprobs
from openril.sampling.weight_sync import StaleWeightsError, folder_tensors, new_version
from support.cpu_transfer import transfers_on_the_cpu
from support.tiny import tiny_questions

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every tensor other values, none of them 0, so that each one that is missed shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + (parameter.ndim == 1))


class Trainer:
    """A student in this process, and a sampler from the server that gets its weights by ``route``."""

    def __init__(self, server, checkpoint: Path, folder: Path, route: str, lora: bool = False) -> None:
        self.model, processor = load_student(StudentConfig(), str(checkpoint))
        self.encoder = PromptEncoder(processor, self.model)
        if lora:
            self.model = add_adapters(self.model, LoraConfig(r=8, alpha=16))
        self.policy, self.folder, self.step = Policy(self.model), folder, 0
        settings = SamplerConfig(engine="vllm", base_urls=[server.url], sync=route, max_logprob_difference=0.01)
        self.sampler = VLLMSampler(settings, self.encoder)
        self.questions = tiny_questions(folder / "images", 3)
        self.synced = SyncedSampler(
            self.sampler,
            folder=WeightsFolder(settings, folder),
            write=self.write,
            policy=self.policy,
            accelerator=Accelerator(cpu=True),
            version=lambda: self.step,
            probes=self.questions,
            base=lambda: checkpoint,
            tensors=lambda: folder_tensors(self.written()),
        )

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def written(self) -> Path:
        self.write(self.folder / "as files")
        return self.folder / "as files"

    def sample(self):
        return self.synced.sample(self.questions, 3, settings=SamplingConfig(), max_completion_length=12, seed=1)

    def difference(self, samples) -> float:
        return max(
            float((policy_logprobs(self.policy, self.encoder, q, r) - torch.tensor(r.logprobs)).abs().max())
            for q, responses in zip(self.questions, samples, strict=True)
            for r in responses
        )


def tokens(samples) -> list[list[tuple[int, ...]]]:
    return [[response.token_ids for response in responses] for responses in samples]


@pytest.fixture
def trainer(sync_server, vlm_checkpoint, tmp_path, monkeypatch):
    """Makes trainers. Transfers run on the CPU, see support/cpu_transfer.py."""
    transfers_on_the_cpu(monkeypatch.setattr)
    made = []

    def make(route: str, **more) -> Trainer:
        folder = tmp_path / f"{route} {len(made)}"
        folder.mkdir()
        made.append(Trainer(sync_server, vlm_checkpoint, folder, route, **more))
        return made[-1]

    yield make
    for it in made:
        it.synced.close()


@pytest.fixture
def ask(sync_server):
    """Posts to the server's endpoints for developers."""
    with httpx.Client(base_url=sync_server.url.removesuffix("/v1"), timeout=60, trust_env=False) as client:

        def ask(path: str, **body):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield ask


@pytest.mark.parametrize("route", ["file", "nccl"])
def test_a_sync_rewrites_every_tensor(route, trainer, ask, monkeypatch):
    monkeypatch.setattr(weight_transfer, "CHUNK_BYTES", 100_000)  # several chunks
    it = trainer(route)
    randomize(it.model, 1)
    samples = it.sample()
    assert it.difference(samples) < TOLERANCE
    whole = ask("/weight_checker", action="checksum")["checksums"]
    assert len(whole) > 30

    assert ask("/weight_checker", action="reset") == {"status": "reset"}
    reset = ask("/weight_checker", action="compare", baseline=whole)
    assert sorted(reset["mismatches"]) == sorted(whole)  # zeroed, so that none can pass by keeping its value
    it.step = 1
    assert tokens(it.sample()) == tokens(samples)
    assert ask("/weight_checker", action="compare", baseline=whole) == {"match": True, "mismatches": []}

    it.step = 2
    randomize(it.model, 2)
    assert it.difference(samples) > 0.01
    assert it.difference(it.sample()) < TOLERANCE
    changed = ask("/weight_checker", action="compare", baseline=whole)["mismatches"]
    assert sorted(changed) == sorted(whole)


def test_samples_of_other_weights_are_refused(trainer, ask, sync_server):
    it = trainer("file")
    it.sample()
    synced = it.sampler.weights.version
    ask("/update_weight_version", new_version="another process")
    with pytest.raises(StaleWeightsError, match=f"{sync_server.url}: .*'{synced}', got 'another process'"):
        it.sample()
    failed = []
    waiting = iter([(it.questions[0], 0, 1)])
    arrived = it.sampler.stream(
        lambda: next(waiting, None),
        settings=SamplingConfig(),
        max_completion_length=4,
        seed=0,
        failed=lambda work, error: failed.append(work),
    )
    with pytest.raises(StaleWeightsError):  # not one lost request among others
        list(arrived)
    assert failed == []


def test_an_adapter_alone_gives_the_samples_of_the_merged_weights(trainer):
    it = trainer("adapter", lora=True)
    merged = trainer("file")
    before = None
    for it.step in (1, 2):
        torch.manual_seed(it.step)
        with torch.no_grad():
            for name, parameter in it.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        samples = it.sample()
        assert it.difference(samples) < TOLERANCE
        assert tokens(samples) != before  # the adapter of the step before is not used
        before = tokens(samples)
    files = sorted(path.name for path in it.synced.folder.adapter.iterdir())
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    merged.model.load_state_dict(it.model.merge_and_unload().state_dict())
    assert tokens(merged.sample()) == before


def test_a_transfer_that_lacks_a_tensor_is_refused(trainer):
    it = trainer("nccl")
    lost = "model.layers.1.mlp.up_proj.weight"

    def tensors():
        yield from ((name, value) for name, value in folder_tensors(it.written()) if not name.endswith(lost))

    with pytest.raises(EndpointError, match=rf"lacks 1 tensors .*{lost}"):
        it.sampler.weights.send(tensors(), new_version(), lambda action: action())
    it.sampler.weights.post(it.sampler.weights.urls[0], "/finish_weight_update", "ending the update")
