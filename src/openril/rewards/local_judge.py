"""A judge from a local checkpoint, run with transformers in this process."""

from __future__ import annotations

import asyncio
from typing import Any

# isort: split
import torch
from jinja2 import TemplateError

from openril.data.sanitize import special_tokens, strip_special
from openril.endpoints import EventLoopThread
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
from openril.recipe.schema import JudgeConfig
from openril.rewards.judge import Settle
from openril.rewards.verdict_store import Verdict
from openril.sampling.greedy_batch import GreedyDecoder


class LocalJudge:
    """Judges one prompt at a time: a verdict never depends on what else is judged beside it. Vision-language
    checkpoints are used for text alone.

    With ``judge.batch_size`` above 1 it answers so many prompts at once, greedily, and runs what all of them share (the
    system text) once. A verdict then depends on its neighbours as far as the last bits of a sum do.

    Work is done when a result is asked for (batches: all the work that is waiting), in a thread of its own, so that
    autocast and gradient modes of the caller do not reach it; the random state is put back afterwards. Raises
    ModelError for a checkpoint that cannot be loaded or has no chat template, and for batches where the checkpoint or
    the temperature allows none.
    """

    def __init__(self, settings: JudgeConfig, device: str | None = None) -> None:
        self.settings = settings
        self.name = settings.model_path + (f"@{settings.revision}" if settings.revision else "")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        try:
            config = AutoConfig.from_pretrained(settings.model_path, **where)
            vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
            model: Any = loader.from_pretrained(settings.model_path, dtype=dtype, **where)
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model_path, **where)
            if self.tokenizer.chat_template is None and vision:
                self.tokenizer.chat_template = AutoProcessor.from_pretrained(settings.model_path, **where).chat_template
        except (OSError, ValueError, ImportError) as e:
            raise ModelError(f"judge.model_path: cannot load {settings.model_path}: {e}") from e
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"judge.model_path: {settings.model_path} has no chat template; use an instruction-tuned model,"
                " or add chat_template.jinja to its folder"
            )
        self.model = model.to(self.device).eval()
        self._special = special_tokens(self.tokenizer)
        self._batches = self._batch_reader(vision) if settings.batch_size > 1 else None
        self._waiting: list[_Later] = []
        self._asked: list[tuple[list[dict[str, str]], asyncio.Future[str]]] = []
        self._loop = EventLoopThread()

    def _batch_reader(self, vision: bool) -> GreedyDecoder:
        if vision or self.settings.temperature > 0:
            cause = "a vision-language model" if vision else f"temperature {self.settings.temperature}"
            raise ModelError(
                f"judge.batch_size: {self.settings.batch_size} prompts at once need a text model and temperature 0, and"
                f" this is {cause}; set judge.batch_size 1, or serve the model and set judge.base_urls"
            )
        try:
            return GreedyDecoder(self.model, self.tokenizer, self._end_ids())
        except ModelError as e:
            raise ModelError(f"judge.batch_size: {e}; set it to 1") from e

    async def ask(self, messages: list[dict[str, str]], seed: int) -> str:
        if self._batches is not None:
            loop = asyncio.get_running_loop()
            if not self._asked:
                loop.call_soon(self._answer)  # behind all that is about to ask
            future: asyncio.Future[str] = loop.create_future()
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
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def _answer(self) -> None:
        """Reply to everybody who asked."""
        assert self._batches is not None
        asked, self._asked = self._asked, []
        try:
            by_system: dict[str, list[tuple[str, asyncio.Future[str]]]] = {}
            for messages, future in asked:
                by_system.setdefault(messages[0]["content"], []).append((self.render(messages), future))
            for system, members in by_system.items():
                texts = [text for text, _ in members]
                replies = self._batches.complete(
                    texts, self._head(system), self.settings.max_tokens, self.settings.batch_size
                )
                for (_, future), reply in zip(members, replies, strict=True):
                    if not future.done():
                        future.set_result(reply)
        except Exception as e:  # whoever waits must hear of it
            for _, future in asked:
                if not future.done():
                    future.set_exception(e)

    def _head(self, system: str) -> str:
        """How every prompt with this system text begins."""
        mark = "(here the user begins)"
        return self.render([{"role": "system", "content": system}, {"role": "user", "content": mark}]).split(mark)[0]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt as text. Templates without a system role get the system text at the head of the user's; templates
        that want content in parts get parts."""
        cleaned = [{**m, "content": strip_special(m["content"], extra=self._special)} for m in messages]
        folded = [{"role": "user", "content": "\n\n".join(m["content"] for m in cleaned)}]
        for chat in (cleaned, folded):
            for in_parts in (False, True):
                candidate: list[dict[str, Any]] = [
                    {**m, "content": [{"type": "text", "text": m["content"]}]} if in_parts else m for m in chat
                ]
                try:
                    text = self.tokenizer.apply_chat_template(candidate, tokenize=False, add_generation_prompt=True)
                except (TemplateError, TypeError):
                    continue
                if isinstance(text, str) and all(m["content"].strip() in text for m in cleaned):
                    return text
        raise ModelError(f"judge.model_path: the chat template of {self.settings.model_path} leaves out the prompt")

    def _end_ids(self) -> list[int]:
        config = getattr(self.model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if self.tokenizer.eos_token_id is not None:
            ids = [self.tokenizer.eos_token_id, *ids]
        if not ids:
            raise ModelError(f"judge.model_path: {self.settings.model_path} names no end-of-sequence token")
        return list(dict.fromkeys(ids))

    def start(self, settle: Settle) -> _Later:
        later = _Later(settle, self)
        if self._batches is not None:
            self._waiting.append(later)
        return later

    def settle(self, wanted: _Later) -> None:
        """Settle a verdict; where there are batches, all that wait."""
        waiting, self._waiting = self._waiting, []
        together = [wanted, *(later for later in waiting if later is not wanted)]

        async def all_of_them() -> list[Verdict]:
            return await asyncio.gather(*(later.work() for later in together))

        for later, verdict in zip(together, self._loop.run(all_of_them()), strict=True):
            later.verdict = verdict

    def forget(self, later: _Later) -> bool:
        """Whether a verdict was waiting and now is not."""
        if later not in self._waiting:
            return False
        self._waiting.remove(later)
        return True

    def close(self) -> None:
        self._loop.close()


class _Later:
    """A verdict that is settled when it, or another of its batch, is first asked for."""

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
        """It is settled when asked for, but for nobody else's sake."""
        return self._judge.forget(self)
