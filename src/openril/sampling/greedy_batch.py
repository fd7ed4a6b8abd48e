"""Decode greedy replies of a small text model in batches; the beginning that prompts share runs once and is kept."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from openril.errors import ModelError
from openril.hf import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Chat = list[dict[str, str]]

MOST_HEADS = 4
"""Number of shared beginnings that are kept."""
ROWS = 32
"""Prompts per pass. More are no faster on a CPU, and different lengths cost padding."""


class GreedyDecoder:
    """A causal language model with its tokenizer, on the model's device.

    Args:
        ends: Token ids that end a reply; by default the tokenizer's end-of-sequence token.

    Raises:
        ModelError: The model's forward pass takes no positions, which rows of different lengths need.
    """

    def __init__(self, model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        takes = inspect.signature(model.forward).parameters
        if missing := [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in takes]:
            raise ModelError(f"{type(model).__name__} cannot answer in batches: its forward pass takes no {missing[0]}")
        self.ends = torch.tensor([*ends] or [tokenizer.eos_token_id], device=model.device)
        self._heads: LRUCache[str, tuple[list[int], list[tuple[Tensor, Tensor]]]] = LRUCache(MOST_HEADS)

    @classmethod
    def from_checkpoint(cls, folder: Path) -> GreedyDecoder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def replies(self, chats: Sequence[Chat], max_new_tokens: int = 64) -> list[str]:
        """Return one reply per chat, in order. Chats with the same first message share that message's pass."""
        by_head: dict[str, list[int]] = {}
        for i, chat in enumerate(chats):
            by_head.setdefault(self._render(chat[:1], False) if len(chat) > 1 else "", []).append(i)
        out = [""] * len(chats)
        for head, members in by_head.items():
            texts = [self._render(chats[i], True) for i in members]
            for i, reply in zip(members, self.complete(texts, head, max_new_tokens), strict=True):
                out[i] = reply
        return out

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str], head: str, max_new_tokens: int, rows: int = ROWS) -> list[str]:
        """Return what the model writes after each prompt, in order.

        Args:
            head: The beginning that all prompts share; may be empty.
            rows: Prompts per pass; those of similar length share one.
        """
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = [""] * len(ids)
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            for i, reply in zip(members, self._decode(head, [ids[i] for i in members], max_new_tokens), strict=True):
                out[i] = reply
        return out

    def _decode(self, head: str, rows: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        prefix, states = self._run_head(head)
        if any(row[: len(prefix)] != prefix or len(row) == len(prefix) for row in rows):
            prefix, states = [], []  # the tokenizer merges over the end of the head
        device = self.model.device
        ends = [row[len(prefix) :] for row in rows]
        count, longest = len(rows), max(map(len, ends))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.ends[0])
        inputs = torch.tensor([[pad] * (longest - len(e)) + e for e in ends], device=device)
        padding = torch.tensor([longest - len(e) for e in ends], device=device)[:, None]
        places = torch.arange(longest, device=device)[None]
        mask = torch.cat([padding.new_ones(count, len(prefix)), (places >= padding).long()], dim=1)
        positions = (len(prefix) + places - padding).clamp(min=0)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), number)
        running = torch.ones(count, dtype=torch.bool, device=device)
        written: list[Tensor] = []
        for _ in range(max_new_tokens):
            output = self.model(
                inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            token = output.logits[:, -1].argmax(-1)
            written.append(torch.where(running, token, self.ends[0]))
            running &= ~torch.isin(token, self.ends)
            if not running.any():
                break
            inputs, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(count, 1)], dim=1)
        return [str(t) for t in self.tokenizer.batch_decode(torch.stack(written, dim=1), skip_special_tokens=True)]

    def _render(self, chat: Chat, prompt: bool) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))

    def _run_head(self, head: str) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        """Return token ids of a shared beginning, and each layer's keys and values."""
        if head not in self._heads:
            ids = list(self.tokenizer(head, add_special_tokens=False)["input_ids"]) if head else []
            layers = []
            if ids:
                inputs = torch.tensor([ids], device=self.model.device)
                layers = self.model(inputs, use_cache=True, logits_to_keep=1).past_key_values.layers
            self._heads[head] = ids, [(layer.keys, layer.values) for layer in layers]
        return self._heads[head]
