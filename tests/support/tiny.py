"""Tiny questions, models and cached responses that many tests share."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from openril.records import ImageSource, Question, Response
from openril.storage import atomic_path, write_jsonl

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def draw_square(path: Path, color: str, size: tuple[int, int] = (56, 56)) -> Path:
    """Draw a picture of one colored square on white."""
    image = Image.new("RGB", size, (255, 255, 255))
    ImageDraw.Draw(image).rectangle((8, 8, size[0] - 8, size[1] - 8), fill=COLORS[color])
    # Processes of one test draw into one folder: no process may see an incomplete picture.
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def tiny_questions(folder: Path, count: int = 8) -> list[Question]:
    """Make questions with one image, two images of different sizes, and none, in turn; the answers are colors."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLORS)
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
    """Make questions with one image, two, none, and one of another shape.

    The image tensors of their prompts differ in every dimension in which they can.
    """
    wide = draw_square(folder / "wide.png", "green", (112, 56))
    return [
        *tiny_questions(folder, 3),
        Question("q-wide", "Which colour is the square?", "green", (ImageSource(path=wide),)),
    ]


def write_questions(path: Path, questions: list[Question]) -> Path:
    """Write the questions to a JSONL file."""
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
    """Return the response of an invented teacher, which is wrong every third time."""
    answer = question.answer if index % 3 else "black"
    if teacher == "a":
        return f"I look at the square. Its colour is {answer}. The answer is {answer}."
    return f"Answer: {answer} ({index})"


def teacher_responses(questions: list[Question], teachers: list[str], count: int) -> dict[str, list[Response]]:
    """Return responses by question id."""
    return {
        q.id: [Response(q.id, t, i, teacher_text(q, t, i)) for t in teachers for i in range(count)] for q in questions
    }
