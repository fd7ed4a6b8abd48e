"""Greedy replies of a tiny text model to many chats at once; the system text they share is run once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openril.models  # noqa: F401  (makes torchvision importable; must come before transformers)

# isort: split
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Chat = list[dict[str, str]]


class GreedyReader:
    """A causal language model with its tokenizer. Chats whose first message is the same share that message's pass."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._shared: dict[str, tuple[list[int], list[tuple[Tensor, Tensor]]]] = {}

    @classmethod
    def from_checkpoint(cls, folder: Path) -> GreedyReader:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def replies(self, chats: Sequence[Chat], max_new_tokens: int = 64) -> list[str]:
        """One reply a chat, in order, of at most max_new_tokens tokens."""
        by_head: dict[str, list[int]] = {}
        for i, chat in enumerate(chats):
            by_head.setdefault(self._head(chat), []).append(i)
        out = [""] * len(chats)
        for head, members in by_head.items():
            texts = [self._render(chats[i], True) for i in members]
            for i, reply in zip(members, self._decode(head, texts, max_new_tokens), strict=True):
                out[i] = reply
        return out

    def _render(self, chat: Chat, prompt: bool) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))

    def _head(self, chat: Chat) -> str:
        return self._render(chat[:1], False) if len(chat) > 1 else ""

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prefill(self, head: str) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        if head not in self._shared:
            if len(self._shared) >= 4:
                self._shared.clear()
            ids = self._ids(head)
            layers = self.model.model(torch.tensor([ids]), use_cache=True).past_key_values.layers if ids else []
            self._shared[head] = ids, [(layer.keys, layer.values) for layer in layers]
        return self._shared[head]

    def _decode(self, head: str, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        prefix, states = self._prefill(head)
        rows = [self._ids(text) for text in texts]
        if any(row[: len(prefix)] != prefix for row in rows):  # a tokenizer that merges over the end of the head
            prefix, states = [], []
        ends = [row[len(prefix) :] for row in rows]
        count, longest = len(rows), max(map(len, ends))
        pad = self.tokenizer.pad_token_id
        inputs = torch.tensor([[pad] * (longest - len(e)) + e for e in ends])
        padding = torch.tensor([longest - len(e) for e in ends])
        own = (torch.arange(longest)[None] >= padding[:, None]).long()
        mask = torch.cat([torch.ones(count, len(prefix), dtype=torch.long), own], dim=1)
        positions = (len(prefix) + torch.arange(longest)[None] - padding[:, None]).clamp(min=0)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
        stop = self.tokenizer.eos_token_id
        running = torch.ones(count, dtype=torch.bool)
        written: list[Tensor] = []
        for _ in range(max_new_tokens):
            output = self.model(
                inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            token = output.logits[:, -1].argmax(-1)
            written.append(torch.where(running, token, stop))
            running &= token != stop
            if not running.any():
                break
            inputs, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        return [str(t) for t in self.tokenizer.batch_decode(torch.stack(written, dim=1), skip_special_tokens=True)]
