"""Tiny questions, models and cached responses that many tests share."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from openril.records import ImageSource, Question, Response
from openril.storage import atomic_path, write_jsonl

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def draw_square(path: Path, colour: str, size: tuple[int, int] = (56, 56)) -> Path:
    """A picture of one coloured square on white."""
    image = Image.new("RGB", size, (255, 255, 255))
    ImageDraw.Draw(image).rectangle((8, 8, size[0] - 8, size[1] - 8), fill=COLOURS[colour])
    # Processes of one test draw into one folder: a picture must never be seen half-written.
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def tiny_questions(folder: Path, count: int = 8) -> list[Question]:
    """Questions with one image, two images of unlike size, and none, in turn; answers are colours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    questions = []
    for i in range(count):
        answer, other = names[i % 4], names[(i + 1) % 4]
        one = draw_square(folder / f"{i}-a.png", answer)
        two = draw_square(folder / f"{i}-b.png", other, (84, 56))
        if i % 3 == 0:
            q = Question(f"q{i}", "Which colour is the square?", answer, (ImageSource(path=one),))
        elif i % 3 == 1:
            text = "Look at <image> and at <image>. Which colour has the first square?"
            q = Question(f"q{i}", text, answer, (ImageSource(path=one), ImageSource(path=two)))
        else:
            q = Question(f"q{i}", f"Say the word {answer}.", answer)
        questions.append(q)
    return questions


def unlike_questions(folder: Path) -> list[Question]:
    """One image, two, none, and one of another shape: prompts whose image tensors differ in every dimension they can."""
    wide = draw_square(folder / "wide.png", "green", (112, 56))
    return [
        *tiny_questions(folder, 3),
        Question("q-wide", "Which colour is the square?", "green", (ImageSource(path=wide),)),
    ]


def write_questions(path: Path, questions: list[Question]) -> Path:
    """The questions as a JSONL file."""
    write_jsonl(
        path,
        (
            {
                "id": q.id,
                "images": [str(image.path) for image in q.images],
                "question": q.question,
                "answer": q.answer,
            }
            for q in questions
        ),
    )
    return path


def teacher_text(question: Question, teacher: str, index: int) -> str:
    """What a made-up teacher says: every third response is wrong."""
    answer = question.answer if index % 3 else "black"
    if teacher == "a":
        return f"I look at the square. Its colour is {answer}. The answer is {answer}."
    return f"Answer: {answer} ({index})"


def teacher_responses(questions: list[Question], teachers: list[str], count: int) -> dict[str, list[Response]]:
    """Responses by question id."""
    return {
        q.id: [Response(q.id, t, i, teacher_text(q, t, i)) for t in teachers for i in range(count)] for q in questions
    }
