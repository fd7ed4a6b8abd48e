"""The world, the judge's training cases and the tokenizers' texts never change: the shipped weights are made from them."""

import hashlib
from pathlib import Path

from playground.judge.cases import make_cases, world_questions
from playground.judge.training import make_drills
from playground.world import corpus, write_skills_world


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_files_of_a_small_world_are_pinned(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    write_skills_world(folder, 84, 42, 42, seed=3, difficulty=(1, 2, 3))
    whole = hashlib.sha256()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    assert len(files) == 184
    assert whole.hexdigest() == "f229ad4641ef26d1cf4464b001ea7439744277651d54b3a265713f7ce28aab22"


def test_the_texts_of_the_tokenizers_are_pinned() -> None:
    pinned = "d5ef4cb05ed8f72d60038d178051b50519bd7837688475e91828c6ae582ff3a5"
    assert digest("\n".join(corpus(200, 1))) == pinned


def test_the_judges_cases_and_drills_are_pinned() -> None:
    cases = make_cases(world_questions("train", 420, seed=3), 900, seed=3)
    verdicts = "\n".join(f"{c.question.id}|{c.response}|{c.verdict}|{c.sort}" for c in cases)
    assert digest(verdicts) == "78d62a14d9591e3ad15ce649a747fa736a930a0eb05e191bddd0e8ae77d91b27"
    # The shipped judge was trained before the answer rules read more forms. Since then 5 of these 900 replies, all on
    # babble or cut text, name another answer next to the same verdict.
    replies = "\n".join(f"{c.reply}|{c.reading}" for c in cases)
    assert digest(replies) == "8031d4f78645a66f557a1481e859c763988a8c80dd8e29794a44df4fcaae3317"
    drills = "\n".join(make_drills(cases, 200, seed=0))
    assert digest(drills) == "3dd7c067eb3e17e212f65ea92a4e94258c000dc22230f86343a52b04a00cf327"
