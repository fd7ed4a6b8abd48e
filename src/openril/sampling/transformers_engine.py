"""Sampling with transformers: each question's prompt is run once, branched to its G rows, and all rows decode together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from openril.errors import ModelError
from openril.models.adapters import base_model
from openril.models.prompts import Prompt, PromptEncoder
from openril.recipe.schema import Sampling, Student
from openril.records import STUDENT, Question, Response
from openril.sampling.filtering import draw, penalise_repetition
from openril.storage import stable_hash


class TransformersSampler:
    """A ``Sampler`` over a model in this process.

    Every response has its own random stream, derived from (seed, question id, index): the batch it is drawn in does
    not matter. Special tokens other than the end of the turn are never drawn: an image placeholder in a response would
    be taken for an image when it is read back.
    """

    def __init__(self, model: nn.Module, encoder: PromptEncoder, *, questions_per_batch: int = 8) -> None:
        self.model = model
        self.encoder = encoder
        self.questions_per_batch = questions_per_batch

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        student: Student | None = None,
        *,
        max_prompt_length: int = 4096,
        max_image_pixels: int = 50_000_000,
        allow_urls: bool = False,
        questions_per_batch: int = 8,
        trust_remote_code: bool = False,
        system_prompt: str = "",
    ) -> TransformersSampler:
        """A sampler of its own model, on the GPU if there is one. student: processor bounds and attention settings."""
        from openril.models.loading import load_student, torch_dtype

        student = student or Student(model=checkpoint, trust_remote_code=trust_remote_code, system_prompt=system_prompt)
        cuda = torch.cuda.is_available()
        model, processor = load_student(student, checkpoint, torch_dtype(student.dtype) if cuda else torch.float32)
        model.to("cuda" if cuda else "cpu")
        encoder = PromptEncoder(
            processor,
            model,
            system_prompt=student.system_prompt,
            max_prompt_length=max_prompt_length,
            max_image_pixels=max_image_pixels,
            allow_urls=allow_urls,
        )
        return cls(model, encoder, questions_per_batch=questions_per_batch)

    @torch.no_grad()
    def sample(
        self,
        questions: Sequence[Question],
        num_generations: int,
        *,
        settings: Sampling,
        max_completion_length: int,
        seed: int,
        first_index: int = 0,
        source: str = STUDENT,
    ) -> list[list[Response]]:
        """See ``Sampler``. Long prompts are batched with long ones, to pad little."""
        training = self.model.training
        self.model.eval()
        try:
            prompts = [self.encoder(q) for q in questions]
            order = sorted(range(len(questions)), key=lambda i: prompts[i].length)
            out: list[list[Response]] = [[] for _ in questions]
            for start in range(0, len(order), self.questions_per_batch):
                batch = order[start : start + self.questions_per_batch]
                uniforms = torch.stack(
                    [
                        _uniforms(stable_hash(seed, questions[i].id, first_index + g), max_completion_length)
                        for i in batch
                        for g in range(num_generations)
                    ]
                )
                drawn = self._decode([prompts[i] for i in batch], num_generations, settings, uniforms)
                for n, i in enumerate(batch):
                    for g in range(num_generations):
                        ids, logprobs = drawn[n * num_generations + g]
                        ended = bool(ids) and ids[-1] in self.encoder.eos_token_ids
                        out[i].append(
                            Response(
                                question_id=questions[i].id,
                                source=source,
                                index=first_index + g,
                                text=self.encoder.decode(ids),
                                finish_reason="stop" if ended else "length",
                                token_ids=tuple(ids),
                                logprobs=tuple(logprobs),
                            )
                        )
            return out
        finally:
            self.model.train(training)

    def _decode(
        self, prompts: list[Prompt], num_generations: int, settings: Sampling, uniforms: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probabilities of each row; rows are prompts x num_generations. uniforms: [R, max tokens]."""
        device = next(self.model.parameters()).device
        model = self.model
        rows, limit = uniforms.shape
        longest = max(p.length for p in prompts)
        cache, logits = self._prefill(prompts, num_generations, longest, device)
        lengths = torch.tensor([p.length for p in prompts for _ in range(num_generations)], device=device)
        next_position = torch.tensor([p.next_position for p in prompts for _ in range(num_generations)], device=device)
        attention_mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
        channels = prompts[0].position_ids.shape[0]
        seen = torch.zeros(rows, logits.shape[-1], dtype=torch.bool, device=device)
        for r in range(rows):
            seen[r, prompts[r // num_generations].input_ids.to(device)] = True
        ends = torch.tensor(self.encoder.eos_token_ids, device=device)
        banned = torch.tensor(sorted(self.encoder.special_token_ids - set(self.encoder.eos_token_ids)), device=device)
        temperature = settings.temperature or 1.0
        ids: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]
        alive = torch.arange(rows, device=device)  # row number of every row still being decoded
        for step in range(limit):
            # Under the policy itself, before bans, penalties and truncation: what the trainer computes too.
            scaled = logits.float() / temperature
            normaliser = scaled.logsumexp(-1)
            allowed = logits.float().index_fill(-1, banned, float("-inf"))
            allowed = penalise_repetition(allowed, seen, settings.repetition_penalty)
            token = draw(allowed, settings, uniforms[alive.cpu(), step].to(device))
            chosen = scaled.gather(-1, token[:, None])[:, 0] - normaliser
            for row, t, lp in zip(alive.tolist(), token.tolist(), chosen.tolist(), strict=True):
                ids[row].append(t)
                logprobs[row].append(lp)
            running = ~torch.isin(token, ends)
            if step + 1 == limit or not running.any():
                break
            if not running.all():
                kept = running.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                alive, token, seen = alive[kept], token[kept], seen[kept]
                attention_mask, next_position = attention_mask[kept], next_position[kept]
            seen.scatter_(1, token[:, None], True)
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
            position = (next_position + step)[:, None]
            output = model(
                input_ids=token[:, None],
                attention_mask=attention_mask,
                position_ids=position[None].expand(channels, -1, -1) if channels > 1 else position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
        return list(zip(ids, logprobs, strict=True))

    def _prefill(
        self, prompts: list[Prompt], num_generations: int, longest: int, device: torch.device
    ) -> tuple[Any, Tensor]:
        """One pass per prompt, alone and unpadded; then one cache for all rows, padded on the left."""
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        logits = []
        for prompt in prompts:
            inputs = {k: v.to(device) for k, v in prompt.vision.items()}
            if prompt.token_types is not None:
                inputs[prompt.token_type_key] = prompt.token_types[None].to(device)
            position_ids = prompt.position_ids[:, None].to(device)
            output = self.model(
                input_ids=prompt.input_ids[None].to(device),
                attention_mask=torch.ones(1, prompt.length, dtype=torch.long, device=device),
                position_ids=position_ids if position_ids.shape[0] > 1 else position_ids[0],
                past_key_values=DynamicCache(config=base_model(self.model).config.get_text_config()),
                use_cache=True,
                logits_to_keep=1,
                **inputs,
            )
            logits.append(output.logits[:, -1].expand(num_generations, -1))
            layers = output.past_key_values.layers
            if not all(hasattr(layer, "keys") for layer in layers):
                raise ModelError(
                    f"{type(self.model).__name__} has layers without keys and values (linear attention), which cannot be"
                    " branched here; set train.sampler.engine: vllm"
                )
            keys.append([_left_pad(layer.keys, longest, num_generations) for layer in layers])
            values.append([_left_pad(layer.values, longest, num_generations) for layer in layers])
        merged = DynamicCache()
        for number in range(len(keys[0])):
            merged.update(torch.cat([k[number] for k in keys]), torch.cat([v[number] for v in values]), number)
        return merged, torch.cat(logits)


def _left_pad(states: Tensor, length: int, rows: int) -> Tensor:
    """[1, H, P, D] -> [rows, H, length, D], zeros on the left."""
    padded = nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
    return padded.expand(rows, -1, -1, -1)


def _uniforms(seed: int, count: int) -> Tensor:
    """float64 [count] in [0, 1), from the seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
