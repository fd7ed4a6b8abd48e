"""Sample from vLLM servers that hold the student. Requests go over HTTP; ``weight_sync`` sends new weights.

The server tokenizes the chat itself, so that it can process images. Every answer contains the prompt's token ids, which
must equal the trainer's: a server with another template, tokenizer or image settings is refused.

Servers are started with ``VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --served-model-name student`` (docs/vllm.md).
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from openril.data.images import image_url_parts
from openril.endpoints import ChatClient, Completion
from openril.errors import DataError, EndpointError, OpenRILError, PromptTooLongError
from openril.models.packing import GroupTokens, pad_rows
from openril.models.prompts import PromptEncoder, question_messages
from openril.recipe.schema import SamplerConfig, SamplingConfig
from openril.records import STUDENT, Question, Response
from openril.sampling.weight_sync import WHAT as _WHAT
from openril.sampling.weight_sync import StaleWeightsError, WeightSync, folder_tensors, new_version
from openril.storage import stable_hash

PROBE_TOKENS = 16
"""Tokens of the samples that ``verify`` compares."""
COMPARED_PROMPTS = 16
"""Prompts that are compared with the encoder's where that is all they are encoded for."""

T = TypeVar("T")
Work = tuple[Question, int, int]
"""A question, the index of its first sample, and the number of samples."""


class VLLMSampler:
    """A ``Sampler`` over vLLM servers of the student.

    Sample ``i`` of a question has the seed (hash of seed and question id) + i, which is sent with the request. A server
    returns the same sample again unless its batches change the last bits of its logits. Log-probabilities are those of
    the unmodified distribution at temperature 1. At temperatures other than 0 and 1 these are not the policy's, and
    responses carry none. Special tokens other than the end of the turn are never drawn.

    Args:
        settings: ``student.sampler``. EndpointError is raised if it names no server.
        encoder: The trainer's encoder.
        warn: Called with what a server does not support.
    """

    def __init__(
        self, settings: SamplerConfig, encoder: PromptEncoder, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        self.settings = settings
        self.encoder = encoder
        self.client = ChatClient(settings.endpoint, _WHAT)
        self.banned = sorted(encoder.special_token_ids - set(encoder.eos_token_ids))
        self.weights = WeightSync(settings, warn)
        self._uncompared = COMPARED_PROMPTS

    # Sampling

    def sample(
        self,
        questions: Sequence[Question],
        num_generations: int,
        *,
        settings: SamplingConfig,
        max_completion_length: int,
        seed: int,
        first_index: int = 0,
        source: str = STUDENT,
    ) -> list[list[Response]]:
        """See ``Sampler``. Raises EndpointError if a server is unreachable or reads a prompt differently."""
        work = [(question, first_index, num_generations) for question in questions]
        waiting = iter(work)
        arrived = self.stream(
            lambda: next(waiting, None),
            settings=settings,
            max_completion_length=max_completion_length,
            seed=seed,
            source=source,
        )
        with closing(arrived):
            drawn = {item: responses for batch in arrived for item, responses in batch}
        return [drawn[item] for item in work]

    def stream(
        self,
        take: Callable[[], Work | None],
        *,
        settings: SamplingConfig,
        max_completion_length: int,
        seed: int,
        source: str = STUDENT,
        logprobs: bool = True,
        failed: Callable[[Work, OpenRILError], None] | None = None,
    ) -> Generator[list[tuple[Work, list[Response]]]]:
        """Yield responses in the order in which they arrive: each time all that have arrived since the last time.

        While the caller uses them, the servers answer up to ``concurrency`` requests, and as many are ready to be sent.

        Args:
            take: Returns the next piece of work, or None if there is none now. The iterator ends if there is none and
                nothing is in flight.
            logprobs: Ask for log-probabilities, and compare every prompt with the encoder's. If off, only the first
                ``COMPARED_PROMPTS`` are compared.
            failed: Called with work whose question cannot be shown or whose request has failed. By default the error is
                raised, as errors of servers with other weights, or that read or end text differently, always are.
        """
        request = self._request(settings, max_completion_length, logprobs)
        arrived: SimpleQueue[Future[Completion]] = SimpleQueue()
        running: dict[Future[Completion], Work] = {}
        prompts: dict[Future[Completion], list[int] | None] = {}  # of answers to compare; None: not encoded yet
        ahead: deque[Future[Completion]] = deque()

        def asked_for(work: Work) -> int:
            return work[2] if settings.temperature > 0 else 1  # vLLM refuses n > 1 for greedy samples, all equal

        try:
            while True:
                while len(running) < 2 * self.settings.concurrency and (work := take()) is not None:
                    question, first, _ = work
                    coming = self._ask(question, request, asked_for(work), sample_seed(seed, question.id) + first)
                    future = self.client.loop_thread.submit(coming)
                    future.add_done_callback(arrived.put)
                    running[future] = work
                    if logprobs or self._uncompared > 0:
                        prompts[future] = None
                        ahead.append(future)
                        self._uncompared -= 1
                if not running:
                    return
                while ahead and arrived.empty():  # encode while the servers work
                    future = ahead.popleft()
                    with suppress(DataError):  # raised below
                        prompts[future] = self.encoder(running[future][0]).input_ids.tolist()
                batch = []
                current: set[str] = set()  # servers that hold the right weights after these completions have arrived
                for future in all_of(arrived):
                    work = running.pop(future)
                    try:
                        completion = future.result()
                        if completion.server not in current:
                            self.weights.check(completion.server)
                            current.add(completion.server)
                        compare = future in prompts
                        prompt = prompts.pop(future, None)
                        if compare and prompt is None:
                            prompt = self.encoder(work[0]).input_ids.tolist()
                        self._check_length(work[0], completion.answer)
                    except (DataError, EndpointError) as e:
                        if failed is None or isinstance(e, StaleWeightsError):
                            raise
                        failed(work, e)
                    else:
                        batch.append((work, self._responses(work, asked_for(work), prompt, completion, source)))
                ahead = deque(future for future in ahead if future in running)
                if batch:
                    yield batch
        finally:
            for future in running:
                future.cancel()

    def _responses(
        self, work: Work, asked: int, prompt: list[int] | None, completion: Completion, source: str
    ) -> list[Response]:
        """Check an answer of ``asked`` samples and return them. prompt: the encoder's ids, or None to not compare them."""
        question, first, count = work
        self._check_prompt(question, prompt, completion.answer)
        choices = sorted(completion.answer.choices, key=lambda c: c.index)
        drawn = [self._read(choice) for choice in choices]
        if len(drawn) != asked:
            raise EndpointError(f"{_WHAT}: expected {asked} samples from the server, got {len(drawn)}")
        out = []
        for index, (ids, logprobs, reason) in enumerate(drawn * (count // asked), first):
            out.append(Response(question.id, source, index, self.encoder.decode(ids), reason, ids, logprobs))
        return out

    def _request(self, settings: SamplingConfig, max_completion_length: int, logprobs: bool) -> dict[str, Any]:
        """Return the fields of every request, also those that are not used, because a server may set other defaults."""
        extra = {
            "top_k": settings.top_k or -1,  # vLLM's value for all tokens
            "min_p": 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "stop_token_ids": self.encoder.eos_token_ids,
            "return_token_ids": True,
        }
        return {
            "max_tokens": max_completion_length,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # At other temperatures, those that a server reports are not the policy's.
            **({"logprobs": True, "top_logprobs": 0} if logprobs and settings.temperature in (0.0, 1.0) else {}),
            # The strongest possible bias: e^-100 leaves nothing, and _read checks it.
            "logit_bias": {str(i): -100 for i in self.banned},
            "extra_body": extra,
        }

    async def _ask(self, question: Question, request: dict[str, Any], count: int, seed: int) -> Completion:
        messages = await asyncio.to_thread(self._messages, question)
        return await self.client.chat(messages, n=count, seed=seed, **request)

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        """Return the encoder's chat with images as data URLs. Errors name the question."""
        encoder = self.encoder
        images = image_url_parts(question, max_pixels=encoder.max_image_pixels, allow_urls=encoder.allow_urls)
        return question_messages(question, encoder.system_prompt, encoder.clean, images)

    def _check_length(self, question: Question, answer: Any) -> None:
        length = len(getattr(answer, "prompt_token_ids", None) or ())
        if length > (limit := self.encoder.max_prompt_length):
            reason = f"question {question.id}: expected at most data.max_prompt_length {limit} tokens, got {length}"
            error = PromptTooLongError(reason, length)
            error.question_id = question.id
            raise error

    def _check_prompt(self, question: Question, ours: list[int] | None, answer: Any) -> None:
        theirs = getattr(answer, "prompt_token_ids", None)
        if not isinstance(theirs, list):
            raise EndpointError(
                f"{_WHAT}: the server does not report token ids (return_token_ids). Use vLLM 0.10.2 or newer."
            )
        if ours is None or theirs == ours:
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        shown = [self.encoder.tokenizer.decode(ids[max(0, place - 4) : place + 4]) for ids in (theirs, ours)]
        fix = "Serve the checkpoint that the run starts from, with its own chat template and processor"
        size = getattr(getattr(self.encoder.processor, "image_processor", None), "size", None)
        if question.images and size:
            fix += f", and start it with --mm-processor-kwargs '{json.dumps({'size': dict(size)})}'"
        raise EndpointError(
            f"{_WHAT}: question {question.id!r}: expected the trainer's {len(ours)} prompt tokens, got {len(theirs)} from"
            f" the server; they differ from token {place} on ({shown[1]!r} here, {shown[0]!r} there). {fix}."
        )

    def _read(self, choice: Any) -> tuple[tuple[int, ...], tuple[float, ...] | None, str]:
        """Return token ids, their log-probabilities if they were asked for, and the finish reason of a sample."""
        ids = tuple(getattr(choice, "token_ids", None) or ())
        content = choice.logprobs.content if choice.logprobs is not None else None
        logprobs = None if content is None else tuple(float(token.logprob) for token in content)
        reason = choice.finish_reason
        if reason not in ("stop", "length") or not ids or (logprobs is not None and len(ids) != len(logprobs)):
            raise EndpointError(
                f"{_WHAT}: expected a sample that ends by 'stop' or 'length' with a log-probability per token, got"
                f" {reason!r} with {len(ids)} tokens and {len(logprobs or ())} log-probabilities"
            )
        ended = ids[-1] in self.encoder.eos_token_ids
        if ended != (reason == "stop") and not (ended and reason == "length"):
            raise EndpointError(
                f"{_WHAT}: the server ended a sample with token {ids[-1]}, which ends no turn in the trainer. Serve the"
                " checkpoint that the run starts from, and start the server without additional stop tokens."
            )
        if forbidden := sorted(set(ids) & set(self.banned)):
            name = self.encoder.tokenizer.convert_ids_to_tokens(forbidden[0])
            raise EndpointError(f"{_WHAT}: the server sampled {name!r}, which is forbidden. Lower the temperature.")
        return ids, logprobs, "stop" if ended else "length"

    # New weights

    def sync(self, folder: Path) -> None:
        """Give every server the weights of the checkpoint in ``folder``, from this process alone.

        ``verify`` checks what the servers compute afterwards. Raises EndpointError: see ``WeightSync``.
        """
        if self.settings.sync in ("file", "adapter"):
            self.weights.load(folder, new_version())
        else:
            self.weights.send(folder_tensors(folder), new_version(), lambda action: action())

    def name_model(self, name: str) -> None:
        """Sample from the model that the servers know under ``name``, for instance an adapter."""
        self.client.endpoint = self.client.endpoint.model_copy(update={"model": name})

    def verify(self, policy: Any, questions: Sequence[Question]) -> float:
        """Compare the servers' log-probabilities of short samples with those of ``policy``.

        There is a sample for the first question with images and for the first without. If the policy is sharded, every
        process must call this with the same questions.

        Args:
            policy: The wrapped ``Policy``.

        Returns:
            The larger mean of |server - trainer| over a sample's tokens, in nats.

        Raises:
            EndpointError: It exceeds ``max_logprob_difference``, so that weights are missing or incomplete.
        """
        kinds = {bool(q.images): q for q in reversed(questions)}
        probes = list(kinds.values())
        neutral = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
        # A prompt that the server has seen would be answered from its prefix cache, which sync must have emptied.
        sampled = self.sample(probes, 1, settings=neutral, max_completion_length=PROBE_TOKENS, seed=0)
        worst = 0.0
        for question, (response,) in zip(probes, sampled, strict=True):
            ours = policy_logprobs(policy, self.encoder, question, response)
            theirs = torch.tensor(response.logprobs)
            worst = max(worst, float((ours - theirs).abs().mean()))
        if not worst <= self.settings.max_logprob_difference:
            raise EndpointError(
                f"{_WHAT}.max_logprob_difference: expected at most {self.settings.max_logprob_difference:g} nats a token"
                f" between server and trainer after the sync, got {worst:.3g}: the server does not compute with the new"
                " weights. Look for 'not loaded' in its log, and compare its dtype."
            )
        return worst

    def close(self) -> None:
        """Close connections."""
        self.client.close()
        self.weights.close()


def all_of(queue: SimpleQueue[T]) -> list[T]:
    """Wait for an item, and return all that are there."""
    items = [queue.get()]
    with suppress(Empty):
        while True:
            items.append(queue.get_nowait())
    return items


def sample_seed(seed: int, question_id: str) -> int:
    """Return the seed of a question's sample 0; the others add their index, as vLLM does for n > 1."""
    return stable_hash(seed, question_id) % 2**31


@torch.no_grad()
def policy_logprobs(policy: Any, encoder: PromptEncoder, question: Question, response: Response) -> Tensor:
    """Return log-probabilities of a response's tokens under ``policy`` at temperature 1, float32 [T] on the CPU."""
    assert response.token_ids is not None
    tokens = GroupTokens(encoder(question), [torch.tensor(response.token_ids)])
    device = next(policy.parameters()).device
    training = policy.training
    policy.eval()
    try:
        with _at_temperature_1(policy):
            return policy(pad_rows([tokens], encoder.pad_token_id).to(device))[0].float().cpu()
    finally:
        policy.train(training)


@contextmanager
def _at_temperature_1(policy: Any) -> Iterator[None]:
    inner = policy
    while not hasattr(inner, "temperature"):
        inner = inner.module  # DDP and DeepSpeed wrap
    before, inner.temperature = inner.temperature, 1.0
    try:
        yield
    finally:
        inner.temperature = before
