"""The student in the loop, sampled by real vLLM servers: same prompts, same log-probabilities, new weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openril.errors import EndpointError
from openril.models.loading import load_processor, load_student
from openril.models.packing import Policy
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import SamplerConfig, SamplingConfig, StudentConfig
from openril.records import Question
from openril.sampling.vllm_engine import VLLMSampler, policy_logprobs
from support.tiny import tiny_questions

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
"""Both sides compute in float32; 1e-6 was measured."""


class StudentInTheLoop:
    """A policy in this process, and the server that samples for it."""

    def __init__(self, server, checkpoint: Path, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        model, processor = load_student(StudentConfig(), str(checkpoint))
        self.policy = Policy(model)
        self.encoder = PromptEncoder(processor, model)
        settings = SamplerConfig(engine="vllm", base_urls=[server.url], max_logprob_difference=0.01)
        self.sampler = VLLMSampler(settings, self.encoder)
        # One image, two, none; and a prompt that fills blocks of vLLM's prefix cache (128 tokens on CPUs).
        long = "Which of these is a colour? " + " ".join(f"word {i}," for i in range(100))
        self.questions = [*tiny_questions(folder / "images", 3), Question("long", long)]

    def sample(self, count: int = 4, settings: SamplingConfig | None = None, **more):
        settings = settings or SamplingConfig()
        return self.sampler.sample(
            self.questions, count, settings=settings, max_completion_length=24, seed=more.pop("seed", 1), **more
        )

    def difference(self, samples) -> float:
        """Return the largest |server - trainer| over all tokens, in nats."""
        return max(
            float((policy_logprobs(self.policy, self.encoder, q, r) - torch.tensor(r.logprobs)).abs().max())
            for q, responses in zip(self.questions, samples, strict=True)
            for r in responses
        )

    def write(self, name: str = "new") -> Path:
        self.policy.model.save_pretrained(self.folder / name)
        return self.folder / name


@pytest.fixture
def student(vlm_server, vlm_checkpoint, tmp_path):
    it = StudentInTheLoop(vlm_server, vlm_checkpoint, tmp_path)
    yield it
    it.sampler.sync(vlm_checkpoint)
    it.sampler.close()


@pytest.fixture
def internvl(internvl_server, internvl_checkpoint, tmp_path):
    it = StudentInTheLoop(internvl_server, internvl_checkpoint, tmp_path)
    yield it
    it.sampler.sync(internvl_checkpoint)
    it.sampler.close()


def perturb(model: torch.nn.Module) -> None:
    """Change every tensor, so that a missing one is noticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * parameter.abs().mean() * torch.randn_like(parameter))


@pytest.mark.parametrize("which", ["student", "internvl"])
def test_samples_carry_the_log_probabilities_that_the_trainer_computes(which, request):
    student = request.getfixturevalue(which)
    samples = student.sample()
    assert student.difference(samples) < TOLERANCE
    eos = set(student.encoder.eos_token_ids)
    for question, responses in zip(student.questions, samples, strict=True):
        assert [(r.question_id, r.index) for r in responses] == [(question.id, i) for i in range(4)]
        for r in responses:
            assert (r.finish_reason == "stop") == (r.token_ids[-1] in eos)
            assert r.finish_reason == "stop" or len(r.token_ids) == 24
            assert r.text == student.encoder.decode(r.token_ids)


def test_a_sample_follows_from_seed_question_and_index_alone(student):
    samples = student.sample()
    alone = student.sample(2, first_index=2)
    assert [[r.token_ids for r in rs] for rs in alone] == [[r.token_ids for r in rs[2:]] for rs in samples]
    assert [r.index for r in alone[0]] == [2, 3]
    assert student.sample(seed=2)[0][0].token_ids != samples[0][0].token_ids


def test_greedy_samples_are_equal_and_other_temperatures_carry_no_log_probabilities(student):
    greedy = student.sample(3, SamplingConfig(temperature=0.0))
    assert all(len({r.token_ids for r in responses}) == 1 for responses in greedy)
    assert student.difference(greedy) < TOLERANCE
    assert student.sample(1, SamplingConfig(temperature=0.7))[0][0].logprobs is None


@pytest.mark.parametrize("which", ["student", "internvl"])
def test_new_weights_arrive_whole_and_caches_are_emptied(which, request):
    student = request.getfixturevalue(which)
    old = student.sample()  # fills the caches of prompts and images
    assert student.sampler.verify(student.policy, student.questions) < TOLERANCE
    perturb(student.policy.model)
    assert student.difference(old) > 0.1
    with pytest.raises(EndpointError, match="does not compute with the new weights"):
        student.sampler.verify(student.policy, student.questions)
    student.sampler.sync(student.write())
    assert student.sampler.verify(student.policy, student.questions) < TOLERANCE
    new = student.sample()
    assert student.difference(new) < TOLERANCE
    assert [r.token_ids for r in new[0]] != [r.token_ids for r in old[0]]


def test_a_synced_sampler_samples_from_the_current_weights(student):
    from accelerate import Accelerator

    from openril.sampling.synced import SyncedSampler, WeightsFolder

    written, step = [], 0

    def write(folder: Path) -> None:
        student.policy.model.save_pretrained(folder)
        written.append(step)

    synced = SyncedSampler(
        student.sampler,
        folder=WeightsFolder(student.sampler.settings, student.folder),
        write=write,
        policy=student.policy,
        accelerator=Accelerator(cpu=True),
        version=lambda: step,
        probes=student.questions,
    )
    for step in (3, 3, 4):  # two samplings in one step, as with an evaluation, need one sync
        if step not in written:
            perturb(student.policy.model)
        samples = synced.sample(student.questions, 1, settings=SamplingConfig(), max_completion_length=8, seed=0)
        assert student.difference(samples) < TOLERANCE
    assert written == [3, 4]


def test_special_tokens_are_never_sampled_and_do_not_change_the_log_probabilities(student):
    # A model whose likeliest token is nearly always an image or a video placeholder: one of x and -x is large.
    tokenizer = student.encoder.tokenizer
    image, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>"))
    with torch.no_grad():
        row = 2 * torch.randn(student.policy.model.config.get_text_config().hidden_size)
        student.policy.model.lm_head.weight[image] = row
        student.policy.model.lm_head.weight[video] = -row
    student.sampler.sync(student.write())
    samples = student.sample()
    drawn = {i for responses in samples for r in responses for i in r.token_ids}
    assert not drawn & set(student.sampler.banned)
    # Under the policy itself those tokens have nearly all the probability.
    assert sum(samples[0][0].logprobs) / len(samples[0][0].logprobs) < -8
    assert student.difference(samples) < TOLERANCE


def test_a_checkpoint_with_a_tensor_missing_is_refused(student, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(student.checkpoint / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[lost]
    (tmp_path / "part").mkdir()
    save_file(tensors, tmp_path / "part" / "model.safetensors")
    with pytest.raises(EndpointError, match=rf"lacks 1 tensors .*{lost}"):
        student.sampler.sync(tmp_path / "part")
    with pytest.raises(EndpointError, match="holds no safetensors"):
        student.sampler.sync(tmp_path)


def test_a_server_that_reads_the_prompt_differently_is_named_with_the_fix(student):
    # 56 x 56 pixels at most: 4 image tokens for pictures that the server shows with more.
    processor = load_processor(str(student.checkpoint), max_pixels=28 * 28)
    encoder = PromptEncoder(processor, student.policy.model)
    sampler = VLLMSampler(student.sampler.settings, encoder)
    try:
        with pytest.raises(EndpointError, match=r"differ from token \d+ on .*--mm-processor-kwargs .*longest_edge"):
            sampler.sample(student.questions[:1], 1, settings=SamplingConfig(), max_completion_length=4, seed=0)
    finally:
        sampler.close()


def test_a_server_without_the_endpoints_for_syncing_is_named_with_the_fix(judge_server, student):
    settings = SamplerConfig(engine="vllm", base_urls=[judge_server.url], model="judge")
    sampler = VLLMSampler(settings, student.encoder)
    sampler.weights._tensors = {judge_server.url: {}}  # as for a server whose checkpoint is on another machine
    try:
        with pytest.raises(EndpointError, match="VLLM_SERVER_DEV_MODE=1"):
            sampler.sync(student.checkpoint)
    finally:
        sampler.close()
