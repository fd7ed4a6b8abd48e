"""Sample with transformers: each question's prompt runs once for its G rows, and all rows decode together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from openril.models.adapters import base_model
from openril.models.dummy_image import has_images
from openril.models.packing_probe import PackingProbe, evaluating
from openril.models.prompts import Prompt, PromptEncoder
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import SamplingConfig, StudentConfig
from openril.records import STUDENT, Question, Response
from openril.sampling.logits_processors import draw, penalize_repetition
from openril.sampling.plain_rows import PlainRows
from openril.sampling.shared_prefix_rows import SharedPrefixRows, Vision, decoding_difference
from openril.storage import stable_hash


class TransformersSampler:
    """A ``Sampler`` over a model in this process.

    Every response has a separate random stream derived from (seed, question id, index), so its batch does not matter.
    Special tokens other than the end of the turn are never drawn, because an image placeholder in a response would be
    read as an image later.

    Args:
        vision: Image features of prompts, if the caller keeps them. By default the vision side runs at every call.
        warn: Receives a warning if the model cannot share its prompts' keys and values. By default it is logged.
        gathered: See ``sampling.protocol.gathered``.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: PromptEncoder,
        *,
        questions_per_batch: int = 8,
        vision: Vision | None = None,
        warn: Callable[[str], None] | None = None,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.gathered = gathered
        self.encoder = encoder
        self.questions_per_batch = questions_per_batch
        if vision is None:
            features = VisionFeatures(base_model(model), FeatureCache(0))
            vision = features if features.available else None
        self.vision = vision
        self.packing = PackingProbe(True, "sampler", warn or logging.getLogger(__name__).warning)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        student: StudentConfig | None = None,
        *,
        max_prompt_length: int = 4096,
        max_image_pixels: int = 50_000_000,
        allow_urls: bool = False,
        questions_per_batch: int = 8,
        trust_remote_code: bool = False,
        system_prompt: str = "",
    ) -> TransformersSampler:
        """Load a model and make its sampler, on the GPU if there is one. student: image sizes and attention settings."""
        from openril.models.loading import load_student, torch_dtype

        student = student or StudentConfig(
            model=checkpoint, trust_remote_code=trust_remote_code, system_prompt=system_prompt
        )
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
        settings: SamplingConfig,
        max_completion_length: int,
        seed: int,
        first_index: int = 0,
        source: str = STUDENT,
    ) -> list[list[Response]]:
        """See ``Sampler``. Prompts of similar length share a batch, which saves padding."""
        with evaluating(self.model):
            prompts = [self.encoder(q) for q in questions]
            order = sorted(range(len(questions)), key=lambda i: prompts[i].length)
            out: list[list[Response]] = [[] for _ in questions]
            for start in range(0, len(order), self.questions_per_batch):
                batch = order[start : start + self.questions_per_batch]
                keys = [(questions[i].id, first_index + g) for i in batch for g in range(num_generations)]
                uniforms = torch.stack([_uniforms(stable_hash(seed, *key), max_completion_length) for key in keys])
                drawn = self._decode([prompts[i] for i in batch], num_generations, settings, uniforms)
                for n, i in enumerate(batch):
                    for g in range(num_generations):
                        ids, logprobs = drawn[n * num_generations + g]
                        reason = "stop" if ids and ids[-1] in self.encoder.eos_token_ids else "length"
                        text, index = self.encoder.decode(ids), first_index + g
                        tokens = tuple(ids), tuple(logprobs)
                        out[i].append(Response(questions[i].id, source, index, text, reason, *tokens))
            return out

    @property
    def _banned(self) -> list[int]:
        return sorted(self.encoder.special_token_ids - set(self.encoder.eos_token_ids))

    def _decode(
        self, prompts: list[Prompt], num_generations: int, settings: SamplingConfig, uniforms: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Return token ids and log-probabilities of each of prompts x num_generations rows. uniforms: [R, max tokens]."""
        rows = self._start(prompts, num_generations, uniforms.shape[1])
        # Prompts run outside of it, because features that the caller keeps must be usable in training.
        with torch.inference_mode():
            return self._draw_all(rows, prompts, num_generations, settings, uniforms)

    def _draw_all(
        self,
        rows: SharedPrefixRows | PlainRows,
        prompts: list[Prompt],
        num_generations: int,
        settings: SamplingConfig,
        uniforms: Tensor,
    ) -> list[tuple[list[int], list[float]]]:
        device = rows.logits.device
        count, limit = uniforms.shape
        logits = rows.logits.repeat_interleave(num_generations, dim=0)
        # Ids that each row has seen: those of its prompt, and then its own.
        prompt_ids = [p.input_ids.unique() for p in prompts]
        most = max(len(ids) for ids in prompt_ids)
        padded = torch.stack([torch.cat([ids, ids[-1:].expand(most - len(ids))]) for ids in prompt_ids])
        seen = torch.zeros(count, most + limit, dtype=torch.long, device=device)
        seen[:, :most] = padded.repeat_interleave(num_generations, dim=0)
        uniforms = uniforms.to(device)
        ends = set(self.encoder.eos_token_ids)
        banned = torch.tensor(self._banned, device=device)
        ids: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        alive = list(range(count))  # numbers of the running rows
        drawn: list[tuple[list[int], Tensor]] = []
        for step in range(limit):
            token, chosen = _draw(logits, settings, seen[:, : most + step], banned, uniforms[:, step])
            tokens = token.tolist()
            for row, t in zip(alive, tokens, strict=True):
                ids[row].append(t)
            drawn.append((alive, chosen))
            running = [i for i, t in enumerate(tokens) if t not in ends]
            if step + 1 == limit or not running:
                break
            if len(running) < len(tokens):
                index = torch.tensor(running, device=device)
                rows.keep(running)
                alive = [alive[i] for i in running]
                token, seen, uniforms = token[index], seen[index], uniforms[index]
            seen[:, most + step] = token
            logits = rows.advance(token)
        together = torch.cat([chosen for _, chosen in drawn]).tolist()  # one transfer from the device
        for row, logprob in zip((r for numbers, _ in drawn for r in numbers), together, strict=True):
            logprobs[row].append(logprob)
        return list(zip(ids, logprobs, strict=True))

    def _start(self, prompts: list[Prompt], num_generations: int, limit: int) -> SharedPrefixRows | PlainRows:
        """Run the prompts, and return their rows ready for decoding."""
        if self.packing.due(images := has_images(prompts)):
            trial = sorted(prompts, key=lambda p: (not p.vision, p.length))  # one with images, and another
            forbidden = self.encoder.special_token_ids | set(self.encoder.eos_token_ids)
            tokens = [i for i in range(len(forbidden) + 3) if i not in forbidden][:3]
            self.packing.run(
                base_model(self.model),
                lambda: decoding_difference(self.model, [trial[0], trial[-1]], self.vision, tokens),
                images=images,
            )
        if self.packing.on:
            return SharedPrefixRows(self.model, prompts, num_generations, limit, self.vision)
        return PlainRows(self.model, prompts, num_generations)


def _draw(
    logits: Tensor, settings: SamplingConfig, seen: Tensor, banned: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw tokens, int64 [N], and return them with their log-probabilities [N]. logits: [N, V]; seen: int64 [N, S]."""
    logits = logits.float()
    # Log-probabilities are the policy's, before bans, penalties and truncation, as in the trainer.
    scaled = logits / settings.temperature if settings.temperature not in (0.0, 1.0) else logits
    log_total = scaled.logsumexp(-1)
    allowed = penalize_repetition(logits, seen, settings.repetition_penalty).index_fill_(-1, banned, float("-inf"))
    token = draw(allowed, settings, uniform)
    return token, scaled.gather(-1, token[:, None])[:, 0] - log_total


def _uniforms(seed: int, count: int) -> Tensor:
    """Return float64 [count] in [0, 1) that depend only on the seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
