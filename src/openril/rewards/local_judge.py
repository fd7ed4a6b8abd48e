"""A judge from a local checkpoint, run with transformers in this process."""

from __future__ import annotations

import asyncio
from typing import Any

# isort: split
import torch
from jinja2 import TemplateError

from openril.data.sanitize import special_tokens, strip_special
from openril.endpoints import Completion, EventLoopThread
from openril.errors import ModelError
from openril.hf import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from openril.models.loading import checked, require_all_weights, require_embedded_tokens
from openril.models.prompts import eos_token_ids
from openril.recipe.schema import JudgeConfig
from openril.rewards.judge_protocol import Settle, Verdict, judge_identity
from openril.sampling.greedy_batch import GreedyDecoder


class LocalJudge:
    """Judges with a local checkpoint, one prompt at a time, so that a verdict never depends on what else is judged.

    With ``judge.batch_size`` above 1 it answers that many prompts at once, greedily, and runs the system text that they
    share once. The sums in a forward pass then depend on the other prompts of the batch in their last bits. Of
    vision-language checkpoints only the text part is used.

    The work is done when a result is requested (with batches: all the work that is pending), in a separate thread, so
    that the caller's autocast and gradient modes do not apply. The random state is restored afterwards.

    Raises ModelError if the checkpoint cannot be loaded, has no chat template, or does not allow batches.
    """

    def __init__(self, settings: JudgeConfig, device: str | None = None) -> None:
        self.settings = settings
        self.name = settings.model_path + (f"@{settings.revision}" if settings.revision else "")
        self.identity = judge_identity(settings)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        model, self.tokenizer, vision = load_judge(settings, dtype)
        self.model = model.to(self.device).eval()
        self._special = special_tokens(self.tokenizer)
        self._decoder = self._make_decoder(vision) if settings.batch_size > 1 else None
        self._waiting: list[_Later] = []
        self._asked: list[tuple[list[dict[str, str]], asyncio.Future[Completion]]] = []
        self._loop = EventLoopThread()

    def _make_decoder(self, vision: bool) -> GreedyDecoder:
        if vision or self.settings.temperature > 0:
            cause = "a vision-language model" if vision else f"temperature {self.settings.temperature}"
            raise ModelError(
                f"judge.batch_size: expected 1 for {cause}, got {self.settings.batch_size}. Batches need a text model and"
                " temperature 0. Set judge.batch_size to 1, or serve the model and set judge.base_urls."
            )
        try:
            return GreedyDecoder(self.model, self.tokenizer, self._end_ids())
        except ModelError as e:
            raise ModelError(f"judge.batch_size: {e}. Set it to 1.") from e

    async def ask(self, messages: list[dict[str, str]], seed: int) -> Completion:
        if self._decoder is not None:
            loop = asyncio.get_running_loop()
            if not self._asked:
                loop.call_soon(self._answer)  # runs after every coroutine that is about to ask
            future: asyncio.Future[Completion] = loop.create_future()
            self._asked.append((messages, future))
            return await future
        ids = self.tokenizer(self.render(messages), add_special_tokens=False, return_tensors="pt")["input_ids"]
        generation = GenerationConfig(
            max_new_tokens=self.settings.max_tokens,
            do_sample=self.settings.temperature > 0,
            temperature=self.settings.temperature or None,
            top_k=None,
            eos_token_id=self._end_ids(),
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._end_ids()[0],
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            ids = ids.to(self.device)
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
        return self._completion(str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))

    def _completion(self, text: str) -> Completion:
        cut = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) >= self.settings.max_tokens
        return Completion(text, "length" if cut else "stop", self.name)

    def _answer(self) -> None:
        """Reply to all prompts that have been asked so far."""
        assert self._decoder is not None
        asked, self._asked = self._asked, []
        try:
            by_system: dict[str, list[tuple[str, asyncio.Future[Completion]]]] = {}
            for messages, future in asked:
                by_system.setdefault(messages[0]["content"], []).append((self.render(messages), future))
            for system, members in by_system.items():
                texts = [text for text, _ in members]
                replies = self._decoder.complete(
                    texts, self._head(system), self.settings.max_tokens, self.settings.batch_size
                )
                for (_, future), reply in zip(members, replies, strict=True):
                    if not future.done():
                        future.set_result(self._completion(reply))
        except Exception as e:  # each waiting coroutine raises it
            for _, future in asked:
                if not future.done():
                    future.set_exception(e)

    def _head(self, system: str) -> str:
        """Return the beginning that all prompts with this system text share."""
        mark = "(here the user begins)"
        return self.render([{"role": "system", "content": system}, {"role": "user", "content": mark}]).split(mark)[0]

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt as text, for templates with and without a system role, with content as text or in parts."""
        cleaned = [{**m, "content": strip_special(m["content"], extra=self._special)} for m in messages]
        folded = [{"role": "user", "content": "\n\n".join(m["content"] for m in cleaned)}]
        for chat in (cleaned, folded):
            in_parts: list[Any] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
            for candidate in (chat, in_parts):
                try:
                    text = self.tokenizer.apply_chat_template(candidate, tokenize=False, add_generation_prompt=True)
                except (TemplateError, TypeError):
                    continue
                if isinstance(text, str) and all(m["content"].strip() in text for m in cleaned):
                    return text
        raise ModelError(f"judge.model_path: the chat template of {self.settings.model_path} drops the prompt")

    def _end_ids(self) -> list[int]:
        try:
            return eos_token_ids(self.model, self.tokenizer)
        except ModelError as e:
            raise ModelError(f"judge.model_path: {self.settings.model_path}: {e}") from e

    def start(self, settle: Settle) -> _Later:
        later = _Later(settle, self)
        if self._decoder is not None:
            self._waiting.append(later)
        return later

    def settle(self, requested: _Later) -> None:
        """Compute a verdict and, with batches, all other pending ones together with it."""
        waiting, self._waiting = self._waiting, []
        together = [requested, *(later for later in waiting if later is not requested)]

        async def all_of_them() -> list[Verdict]:
            return await asyncio.gather(*(later.work() for later in together))

        for later, verdict in zip(together, self._loop.run(all_of_them()), strict=True):
            later.verdict = verdict

    def forget(self, later: _Later) -> bool:
        """Remove a verdict from the pending ones and return whether it was among them."""
        if later not in self._waiting:
            return False
        self._waiting.remove(later)
        return True

    def close(self) -> None:
        self._loop.close()


class _Later:
    """A verdict that is computed when its result, or that of another verdict in its batch, is first requested."""

    def __init__(self, work: Settle, judge: LocalJudge) -> None:
        self.work = work
        self.verdict: Verdict | None = None
        self._judge = judge

    def result(self) -> Verdict:
        if self.verdict is None:
            self._judge.settle(self)
        assert self.verdict is not None
        return self.verdict

    def cancel(self) -> bool:
        """Remove the verdict from the pending batch. It is computed only if its own ``result()`` is called."""
        return self._judge.forget(self)


def load_judge(settings: JudgeConfig, dtype: torch.dtype | str, *, meta: bool = False) -> tuple[Any, Any, bool]:
    """Return the judge's model, its tokenizer, and whether it is a vision-language model. meta: See ``load_model``.

    Raises:
        ModelError: The checkpoint cannot be used, or has no chat template.
    """
    key, path = "judge.model_path", settings.model_path
    where: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    checked(path, key, settings.revision, weights=True, trained=False)
    try:
        config = AutoConfig.from_pretrained(path, **where)
        vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # refused below
        options |= {"device_map": "meta"} if meta else {}
        model, info = loader.from_pretrained(path, dtype=dtype, **options, **where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        if tokenizer.chat_template is None and vision:
            tokenizer.chat_template = AutoProcessor.from_pretrained(path, **where).chat_template
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
        raise ModelError(f"{key}: cannot load {path} ({e})") from e
    require_all_weights(model, info, f"{key}: {path}")
    require_embedded_tokens(model, tokenizer, key, path)
    if tokenizer.chat_template is None:
        raise ModelError(f"{key}: {path} has no chat template. Use an instruct model.")
    return model, tokenizer, vision
