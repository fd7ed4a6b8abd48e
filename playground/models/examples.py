"""Training examples of the models as token ids and picture tensors, drawn during training and never stored."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from openril.models.prompts import Prompt, PromptEncoder, question_messages
from openril.records import ImageSource, Question
from playground.world import SkillQuestion, Style
from playground.world.scenes import SIDE, Scene, describe, in_words, render, where
from playground.world.skills import DESCRIBE

_NO_IMAGE = ImageSource(data=b"")

Styles = str | Mapping[str, str]
"""Letters of response styles, such as "cccab", for all skills or by skill. A letter's frequency is its probability."""


@dataclass(frozen=True)
class Example:
    """A question, its pictures, and the response to learn without its first ``given`` tokens."""

    question: Question
    scenes: tuple[Scene, ...]
    response: str
    given: int = 0


@dataclass(frozen=True)
class Lesson:
    """The shares of the examples in a part of the training. The rest of 1 are direct answers."""

    title: str
    """Name in the progress display."""
    styles: Styles = "c"
    """Styles of the derivations."""
    describe: float = 0.0
    """Share of "describe the picture."."""
    drill: float = 0.0
    """Share of single steps of derivations (see ``drill``)."""
    derivation: float | Mapping[str, float] = 0.0
    """Share of derivations, for all skills or by skill."""
    begun: bool = False
    """Whether the first token of a derivation is given, so that the model learns to continue one but not to begin one."""
    look: float = 0.0
    """Weight of a second loss, which teaches the vision side to name the thing and the place of each cell (see ``Names``)."""
    wrong: float = 0.0
    """Share of wrong derivations in the ``weak`` skills."""
    weak: tuple[str, ...] = ()

    def derivation_of(self, skill: str) -> float:
        """Return the share of derivations of a skill, which is 0 for a skill that is not listed."""
        return self.derivation.get(skill, 0.0) if isinstance(self.derivation, Mapping) else self.derivation


def styles_of(styles: Styles, skill: str) -> tuple[Style, ...]:
    """Return the styles of a skill's derivations, repeated by their frequency."""
    return tuple(cast(Style, letter) for letter in (styles if isinstance(styles, str) else styles[skill]))


def as_question(made: SkillQuestion) -> Question:
    """Return the question as it would be read from a file, with empty pictures."""
    return Question("", made.question, made.answer, (_NO_IMAGE,) * len(made.scenes), made.choices, made.rule)


def draw(lesson: Lesson, pool: Sequence[SkillQuestion], rng: random.Random) -> Example:
    """Draw one example about a question of the pool."""
    made = rng.choice(pool)
    sort = rng.random()
    if sort < lesson.describe:
        scene = rng.choice(made.scenes)
        return Example(Question("", DESCRIBE, images=(_NO_IMAGE,)), (scene,), describe(scene))
    sort -= lesson.describe
    if sort < lesson.drill:
        return drill(made, rng)
    response, given = made.direct_answer, 0
    if sort < lesson.drill + lesson.derivation_of(made.skill):
        styles = styles_of(lesson.styles, made.skill)
        style, given = styles[int(rng.random() * len(styles))], int(lesson.begun)
        if made.skill in lesson.weak and rng.random() < lesson.wrong:
            response = made.wrong_derivation(style, rng.randrange(2))
        else:
            response = made.derivations[style]
    return Example(as_question(made), made.scenes, response, given)


def drill(made: SkillQuestion, rng: random.Random) -> Example:
    """Draw a single step of a derivation.

    It asks what is in a place of the picture, in which places something is, or for a sum, difference or product. Small
    models learn these steps late from whole derivations. As in derivations, the answer follows directly after the words
    that it belongs to.
    """
    scene = rng.choice(made.scenes)
    places = {" ".join(words[:2]): words[2:] for words in map(str.split, describe(scene).split(", "))}
    match rng.choices(("what", "where", "sum"), (1, 4, 2))[0]:
        case "what":
            place = where(rng.randrange(SIDE * SIDE))
            text, response = f"what is at {place}?", " ".join([place, *places.get(place, ["nothing"])])
        case "where":
            word = rng.choice([word for words in places.values() for word in words])
            text = f"where is {word}?"
            response = f"{word} " + ", ".join(place for place, words in places.items() if word in words)
        case _:
            a, b = rng.randint(0, 12), rng.randint(1, 9)
            sums = {"plus": ("+", a + b), "minus": ("-", a), "times": ("x", a * b)}
            word, (sign, result) = rng.choice(list(sums.items()))
            a = a + b if word == "minus" else a
            text, response = f"{a} {word} {b}?", f"{a} {sign} {b} = {result}"
    # A first word is needed so that the next words have the same tokens, with a space in front, as in other responses.
    return Example(Question("", text, images=(_NO_IMAGE,)), (scene,), f"see {response}")


@dataclass(frozen=True)
class Names:
    """The words that each image token should name, with equal weights that sum to 1 for each image token.

    tokens: int64 [W], indices of N image tokens. words: int64 [W], token ids. weights: float32 [W].
    """

    tokens: Tensor
    words: Tensor
    weights: Tensor

    @staticmethod
    def of(bags: Sequence[tuple[int, Sequence[int]]]) -> Names:
        """Build from pairs of an image token and its words."""
        return Names(
            torch.tensor([token for token, words in bags for _ in words], dtype=torch.long),
            torch.tensor([word for _, words in bags for word in words], dtype=torch.long),
            torch.tensor([1 / len(words) for _, words in bags for _ in words]),
        )

    def loss(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return the mean cross-entropy of the words in nats for each image token.

        Args:
            states: Features of the image tokens, [N, d].
            embeddings: Embeddings of all words, [V, d]. Their products with the states are the logits.
        """
        named = (states @ embeddings.T).log_softmax(-1)
        return -(named[self.tokens, self.words] * self.weights).sum() / len(states)


@dataclass
class Batch:
    """Rows of equal length T, padded at the end.

    ids: int64 [B, T]. positions: int64 [C, B, T], C = 3 for M-RoPE. starts: int64 [B], index of the first learned token.
    lengths: int64 [B], length of the row. pictures: output of the model's image processor for all pictures, row by row.
    shown: the words that the image tokens of all pictures show.
    """

    ids: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    pictures: dict[str, Tensor]
    shown: Names

    @property
    def learned(self) -> Tensor:
        """bool [B, T - 1]: whether the next token is a learned token of a response."""
        at = torch.arange(1, self.ids.shape[1])[None]
        return (at >= self.starts[:, None]) & (at < self.lengths[:, None])


class ExampleEncoder:
    """Encodes examples for one model to the token ids of the model's processor, and caches texts."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.prompt_encoder = PromptEncoder(processor, model)
        self.processor = processor
        self._heads: dict[str, Prompt] = {}
        self._prompts: dict[tuple[str, tuple[str, ...], int], tuple[list[int], Prompt]] = {}
        self._responses: dict[str, list[int]] = {}
        self._known: dict[str, list[int]] = {}

    def prompt(self, question: Question) -> tuple[list[int], Prompt]:
        """Return the token ids of the prompt, and the encoded prompt up to its last picture."""
        key = (question.question, question.choices, len(question.images))
        if key not in self._prompts:
            self._prompts[key] = self._write_prompt(question)
        return self._prompts[key]

    def _write_prompt(self, question: Question) -> tuple[list[int], Prompt]:
        text = self.prompt_encoder.render(question_messages(question, "", self.prompt_encoder.clean))
        mark = self.processor.image_token
        cut = text.rindex(mark) + len(mark)
        head = self._heads.get(text[:cut])
        if head is None:
            blank = render(Scene.of({}))
            head = self._heads[text[:cut]] = self.prompt_encoder.encode_text(text[:cut], [blank] * len(question.images))
        return [*head.input_ids.tolist(), *self._ids(text[cut:])], head

    def _ids(self, text: str) -> list[int]:
        return list(self.prompt_encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response(self, text: str) -> list[int]:
        """Return the token ids of a response with its end-of-turn token."""
        if text not in self._responses:
            self._responses[text] = [*self._ids(text), self.prompt_encoder.eos_token_ids[0]]
        return self._responses[text]

    def rows(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int], Prompt, Example]]:
        out = []
        for example in examples:
            prompt, head = self.prompt(example.question)
            out.append((prompt, self.response(example.response), head, example))
        return out

    def shown(self, scenes: Sequence[Scene]) -> Names:
        """Return the words of all cells in reading order, one image token for each."""
        cells = [f" {in_words(thing)} {where(cell)}" for scene in scenes for cell, thing in enumerate(scene.cells)]
        return Names.of([(number, self._words(text)) for number, text in enumerate(cells)])

    def _words(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._ids(text)
        return self._known[text]

    def batch(self, rows: Sequence[tuple[list[int], list[int], Prompt, Example]]) -> Batch:
        longest = max(len(prompt) + len(response) for prompt, response, _, _ in rows)
        ids = torch.full((len(rows), longest), self.prompt_encoder.pad_token_id)
        positions = torch.zeros((len(rows[0][2].position_ids), len(rows), longest), dtype=torch.long)
        for r, (prompt, response, head, _) in enumerate(rows):
            ids[r, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            positions[:, r] = row_positions(head, longest)
        scenes = [scene for _, _, _, example in rows for scene in example.scenes]
        return Batch(
            ids,
            positions,
            torch.tensor([len(prompt) + example.given for prompt, _, _, example in rows]),
            torch.tensor([len(prompt) + len(response) for prompt, response, _, _ in rows]),
            self.pictures(scenes),
            self.shown(scenes),
        )

    def pictures(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images=[render(s) for s in scenes], return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}


def row_positions(head: Prompt, length: int) -> Tensor:
    """Return the positions, int64 [C, length], of a row that continues an encoded prompt with text."""
    rest = head.next_position + torch.arange(length - head.length)
    return torch.cat([head.position_ids, rest.expand(len(head.position_ids), -1)], dim=1)


def draw_batch(
    encoder: ExampleEncoder,
    lesson: Lesson,
    pool: Sequence[SkillQuestion],
    rng: random.Random,
    batch_size: int,
    parts: int = 2,
) -> list[Batch]:
    """Draw a batch and split it into parts of rows of similar length.

    The parts need little padding, and each step still sees all skills. Whole batches of similar length would hold one skill
    each, with which models learn badly.
    """
    rows = encoder.rows([draw(lesson, pool, rng) for _ in range(batch_size)])
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    size = -(-batch_size // parts)
    return [encoder.batch(rows[start : start + size]) for start in range(0, batch_size, size)]


def image_features(model: Any, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """Return the ``mm_encoder_outputs`` of the pictures."""
    made = model.model.get_image_features(**pictures, return_dict=True)
    return {"image": SimpleNamespace(pooler_output=made.pooler_output)}
