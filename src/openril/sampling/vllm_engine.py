"""Sampling from vLLM servers that hold the student: requests by HTTP, new weights by way of a folder.

The server tokenises the chat itself, so that it can process images. Every answer names the prompt's token ids, and they
must be the ones the trainer computes with: a server whose template, tokenizer or image settings differ is refused.

Servers are started with ``VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --served-model-name student`` (docs/vllm.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openril.data.images import image_url_parts
from openril.endpoints import ChatClient, Completion
from openril.errors import EndpointError
from openril.models.packing import GroupTokens, pad_rows
from openril.models.prompts import Prompt, PromptEncoder, question_messages
from openril.recipe.schema import EndpointConfig, SamplerConfig, SamplingConfig
from openril.records import STUDENT, Question, Response
from openril.storage import stable_hash

PROBE_TOKENS = 16
"""Length of the samples that ``verify`` compares."""
_WHAT = "train.sampler"


class VLLMSampler:
    """A ``Sampler`` over vLLM servers of the student.

    Seeds travel with the requests: sample ``i`` of a question has the seed (hash of seed and question id) + i. The
    same server gives the same sample again as far as its batches, which move the last bits of its logits, allow.
    Log-probabilities are those of the unmodified distribution at temperature 1; at other temperatures than 0 and 1,
    for which servers do not report the policy's, responses carry none. Special tokens other than the end of the turn
    are never drawn.

    settings: ``train.sampler``. encoder: of the trainer. Raises EndpointError when the settings name no server.
    """

    def __init__(self, settings: SamplerConfig, encoder: PromptEncoder) -> None:
        self.settings = settings
        self.encoder = encoder
        self.client = ChatClient(
            EndpointConfig(
                base_urls=settings.base_urls,
                model=settings.model,
                api_key_env=settings.api_key_env,
                concurrency=settings.concurrency,
                timeout=settings.timeout,
            ),
            _WHAT,
        )
        self.banned = sorted(encoder.special_token_ids - set(encoder.eos_token_ids))
        self._tensors: dict[str, tuple[int, ...]] | None = None

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
        """See ``Sampler``. Raises EndpointError when a server cannot be had or reads a prompt differently from us."""
        # Equal samples of a greedy server are one request, which vLLM insists on.
        count = num_generations if settings.temperature > 0 else 1
        request = self._request(settings, max_completion_length)

        async def ask_all() -> list[Completion]:
            tasks = [
                asyncio.create_task(self._ask(q, request, count, sample_seed(seed, q.id) + first_index))
                for q in questions
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asked = self.client.loop_thread.submit(ask_all())
        try:
            prompts = [self.encoder(q) for q in questions]  # while the servers work; the trainer needs them anyway
            completions = asked.result()
        except BaseException:
            asked.cancel()
            raise
        with_logprobs = settings.temperature in (0.0, 1.0)
        out = []
        for question, prompt, completion in zip(questions, prompts, completions, strict=True):
            self._check_prompt(question, prompt, completion.answer)
            choices = sorted(completion.answer.choices, key=lambda c: c.index)
            if len(choices) != count:
                raise EndpointError(f"{_WHAT}: the server gave {len(choices)} samples instead of {count}")
            drawn = [self._read(choice, with_logprobs) for choice in choices] * (num_generations // count)
            out.append(
                [
                    Response(
                        question_id=question.id,
                        source=source,
                        index=first_index + g,
                        text=self.encoder.decode(ids),
                        finish_reason=reason,
                        token_ids=ids,
                        logprobs=logprobs,
                    )
                    for g, (ids, logprobs, reason) in enumerate(drawn)
                ]
            )
        return out

    def _request(self, settings: SamplingConfig, max_completion_length: int) -> dict[str, Any]:
        """Fields of every request; also those left alone, since a server may have defaults of its own for them."""
        extra = {
            "top_k": settings.top_k or -1,  # vLLM's word for all
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
            "logprobs": True,
            "top_logprobs": 0,
            # The strongest bias there is: e^-100 leaves nothing, and _read makes sure of it.
            "logit_bias": {str(i): -100 for i in self.banned},
            "extra_body": extra,
        }

    async def _ask(self, question: Question, request: dict[str, Any], count: int, seed: int) -> Completion:
        messages = await asyncio.to_thread(self._messages, question)
        return await self.client.chat(messages, n=count, seed=seed, **request)

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        """The encoder's chat with its images as data URLs. Raises DataError naming the question."""
        encoder = self.encoder
        images = image_url_parts(question, max_pixels=encoder.max_image_pixels, allow_urls=encoder.allow_urls)
        return question_messages(question, encoder.system_prompt, encoder.clean, images)

    def _check_prompt(self, question: Question, prompt: Prompt, answer: Any) -> None:
        theirs = getattr(answer, "prompt_token_ids", None)
        if not isinstance(theirs, list):
            raise EndpointError(
                f"{_WHAT}: the server does not report token ids; it must be vLLM that knows return_token_ids (0.10.2 or"
                " newer)"
            )
        ours = prompt.input_ids.tolist()
        if theirs == ours:
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
            f"{_WHAT}: question {question.id!r}: the server reads the prompt as {len(theirs)} tokens, the trainer as"
            f" {len(ours)}; they differ from token {place} on ({shown[0]!r} there, {shown[1]!r} here). {fix}"
        )

    def _read(self, choice: Any, with_logprobs: bool) -> tuple[tuple[int, ...], tuple[float, ...] | None, str]:
        """Token ids, their log-probabilities and the finish reason of one sample."""
        ids = tuple(getattr(choice, "token_ids", None) or ())
        content = choice.logprobs.content if choice.logprobs is not None else None
        logprobs = tuple(float(token.logprob) for token in content or ())
        reason = choice.finish_reason
        if reason not in ("stop", "length") or not ids or len(ids) != len(logprobs):
            raise EndpointError(
                f"{_WHAT}: the server sent a sample that cannot be used (finish reason {reason!r}, {len(ids)} tokens,"
                f" {len(logprobs)} log-probabilities)"
            )
        ended = ids[-1] in self.encoder.eos_token_ids
        if ended != (reason == "stop") and not (ended and reason == "length"):
            raise EndpointError(
                f"{_WHAT}: the server ended a sample with token {ids[-1]}, which ends no turn for the trainer; serve"
                " the checkpoint that the run starts from, and start the server without stop tokens of its own"
            )
        if forbidden := sorted(set(ids) & set(self.banned)):
            name = self.encoder.tokenizer.convert_ids_to_tokens(forbidden[0])
            raise EndpointError(f"{_WHAT}: the server drew {name!r} although it is forbidden; lower the temperature")
        return ids, logprobs if with_logprobs else None, "stop" if ended else "length"

    # New weights

    def sync(self, folder: Path) -> None:
        """Make every server load the checkpoint in ``folder``, and forget what it computed with the old weights.

        One process calls this, between samplings. Raises EndpointError when a server refuses, and when the checkpoint
        holds other tensors than the one a server was started with: those it lacks would silently keep old values.
        ``verify`` tells whether what the server now computes is right.
        """
        import httpx

        folder = folder.resolve()
        key = os.environ.get(self.settings.api_key_env, "").strip() if self.settings.api_key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for url in self.settings.base_urls:
            local = any(host in url for host in ("//127.", "//localhost", "//[::1]"))
            root = url.rstrip("/").removesuffix("/v1")
            try:
                with httpx.Client(timeout=self.settings.timeout, headers=headers, trust_env=not local) as http:
                    self._check_tensors(http, url, folder)
                    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                    _checked(http.post(f"{root}/collective_rpc", json=body), url, f"loading {folder}")
                    # Loading empties the worker's stores of images; these empty the front's, which would rely on them.
                    for store in ("mm", "encoder"):
                        _checked(http.post(f"{root}/reset_{store}_cache"), url, f"emptying its {store} cache")
                    self._reset_prefix_cache(http, root, url)
            except httpx.HTTPError as e:
                raise EndpointError(f"{_WHAT}: {url} cannot be given new weights ({e or type(e).__name__})") from e

    def _check_tensors(self, http: Any, url: str, folder: Path) -> None:
        if self._tensors is None:
            models = _checked(http.get(f"{url.rstrip('/')}/models"), url, "listing its models").json()["data"]
            roots = [m.get("root") for m in models if m.get("id") == self.settings.model]
            if not roots:
                served = ", ".join(str(m.get("id")) for m in models)
                raise EndpointError(f"{_WHAT}: {url} has no model {self.settings.model!r}; it serves {served}")
            # A hub name or a folder of another machine cannot be looked into; then verify() alone is left.
            self._tensors = tensor_shapes(Path(str(roots[0])))
        sent = tensor_shapes(folder)
        if not sent:
            raise EndpointError(f"{_WHAT}: {folder} holds no safetensors file to load weights from")
        if not self._tensors:
            return
        lacking, extra = shape_differences(self._tensors, sent)
        for verb, names in (("lacks", lacking), ("adds", extra)):
            if names:
                raise EndpointError(
                    f"{_WHAT}: {folder} {verb} {len(names)} tensors against the checkpoint that {url} was started with"
                    f" ({', '.join(names[:3])}, ...); start the server with the checkpoint that the run starts from"
                )

    def _reset_prefix_cache(self, http: Any, root: str, url: str) -> None:
        for _ in range(50):
            answer = _checked(http.post(f"{root}/reset_prefix_cache"), url, "emptying its prefix cache")
            if answer.json().get("success", True):
                return
            time.sleep(0.1)  # a request that was cancelled may still hold blocks
        raise EndpointError(
            f"{_WHAT}: {url} cannot empty its prefix cache, which holds states of the old weights; who else uses it?"
        )

    def verify(self, policy: Any, questions: Sequence[Question]) -> float:
        """Compare what the servers sample with what ``policy`` computes for it; returns the larger of the differences.

        Probes are short samples for the first of the questions with images and the first without; the difference is
        the mean of |server - trainer| over a probe's tokens, in nats. policy: the wrapped ``Policy``; where it is
        sharded every process must call this with the same questions. Raises EndpointError above
        ``max_logprob_difference``: weights did not arrive, or arrived in part.
        """
        kinds = {bool(q.images): q for q in reversed(questions)}
        probes = list(kinds.values())
        neutral = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
        # A prompt that the server has seen before is answered from its prefix cache, which sync must have emptied.
        sampled = self.sample(probes, 1, settings=neutral, max_completion_length=PROBE_TOKENS, seed=0)
        worst = 0.0
        for question, (response,) in zip(probes, sampled, strict=True):
            ours = policy_logprobs(policy, self.encoder, question, response)
            theirs = torch.tensor(response.logprobs)
            worst = max(worst, float((ours - theirs).abs().mean()))
        if not worst <= self.settings.max_logprob_difference:
            raise EndpointError(
                f"{_WHAT}: after the sync, log-probabilities of server and trainer differ by {worst:.3g} nats a token,"
                f" more than max_logprob_difference {self.settings.max_logprob_difference:g}: the server does not"
                " compute with the new weights. Look for 'not loaded' in its log, and compare its dtype"
            )
        return worst

    def close(self) -> None:
        """Close connections."""
        self.client.close()


def sample_seed(seed: int, question_id: str) -> int:
    """The seed of a question's sample 0; the others follow one by one, as vLLM itself numbers them for n > 1."""
    return stable_hash(seed, question_id) % 2**31


@torch.no_grad()
def policy_logprobs(policy: Any, encoder: PromptEncoder, question: Question, response: Response) -> Tensor:
    """float32 [T] on the CPU: log-probabilities at temperature 1 of a response's tokens under ``policy``."""
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


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's safetensors files; empty when it has none."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def shape_differences(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Tensors of ``old`` that ``new`` lacks, and those it adds, by name and shape.

    A tensor under another name counts as there when its shape is (libraries rename tensors when they save), and an
    ``lm_head.weight`` that only one of the two holds is tied to the word embeddings in the other.
    """
    lacking = {k: v for k, v in old.items() if new.get(k) != v and not k.endswith("lm_head.weight")}
    extra = {k: v for k, v in new.items() if old.get(k) != v and not k.endswith("lm_head.weight")}
    renamed = Counter(lacking.values()) & Counter(extra.values())
    for tensors in (lacking, extra):
        for shape, count in renamed.items():
            for name in [k for k, v in tensors.items() if v == shape][:count]:
                del tensors[name]
    return sorted(lacking), sorted(extra)


def _checked(answer: Any, url: str, what: str) -> Any:
    if answer.status_code == 404:
        raise EndpointError(
            f"{_WHAT}: {url} has no way of {what}; start vllm serve with VLLM_SERVER_DEV_MODE=1 in the environment"
        )
    if answer.status_code != 200:
        raise EndpointError(f"{_WHAT}: {url} answered {answer.status_code} to {what}: {answer.text[:300]}")
    return answer
