"""Questions about answers: what the student is asked after its samples failed a question (ZPPO, arXiv 2606.18216).

A question of which too few samples are right is remembered with the wrong ones. Later steps ask it again in three forms:
which of two answers is right, a teacher's right one or the student's wrong one; how to solve it, if these answers are wrong;
and the question itself. The teacher is in the prompt alone, so that every response is the student's own sample, scored
against the truth of the original question.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path

from openril.data.question_text import question_text
from openril.data.sanitize import strip_disguised_tags
from openril.errors import StateError
from openril.recipe.schema import RetryConfig, RetryForm
from openril.records import Group, Question, Rollout
from openril.storage import stable_hash, write_jsonl
from openril.training.metrics import put

COMPARE = (
    "{question}\n\nHere are two answers to this question. One is right and the other is wrong.\n{answers}\n"
    "Find out which one is right and explain why in your own words. Then answer the question."
)
AGAIN = (
    "{question}\n\nThe following answers to this question are wrong.\n{answers}\n"
    "Solve the question again in another way, and then answer it."
)


@dataclass
class Retry:
    """One question about answers. ``form``: see ``RetryConfig.forms``."""

    question: Question
    """The original question, against which responses are scored."""
    asked: Question
    """The question as the student gets it."""
    form: RetryForm
    listed: list[str] = field(default_factory=list)
    """The answers that it shows."""
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def scored(self) -> Group:
        """The samples as responses to the original question, for judge and rules."""
        return Group(self.question, self.rollouts)

    @property
    def learned(self) -> Group:
        """The samples as responses to what was asked, for the policy."""
        return Group(self.asked, self.rollouts)


@dataclass
class _Failed:
    """A question that is remembered."""

    question_id: str
    wrong: list[str]
    """Wrong answers of the student, the newest first."""
    tries: int = 0
    """How often it was asked again."""


class RetryMemory:
    """The questions that the student failed, the oldest first; every process holds the same.

    A question leaves when a group that was not shown a right answer reaches the share ``failed_below`` (solved), after
    ``max_tries`` groups (given up), or when newer ones need its place (pushed out).
    """

    def __init__(self, settings: RetryConfig, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.questions: Mapping[str, Question] = {}
        """All questions of the loop by id."""
        self.right: Callable[[Question], Sequence[str]] = lambda question: ()
        """Returns the texts of the teachers' right answers to a question."""
        self._failed: dict[str, _Failed] = {}
        self._too_long = 0

    def __len__(self) -> int:
        return len(self._failed)

    def draw(self, count: int, step: int, fits: Callable[[Question], bool]) -> list[Retry]:
        """Return up to ``count`` questions to ask, drawn for ``step`` uniformly, each in its next form.

        fits: Whether a prompt is short enough. A form that is not makes way for the next, and is counted.
        """
        self._too_long = 0
        drawn: list[Retry] = []
        everything, forms = list(self._failed.values()), self.settings.forms
        for failed in random.Random(stable_hash(self.seed, "retry", step)).sample(everything, len(everything)):
            if len(drawn) == count:
                break
            first = (
                stable_hash(self.seed, "retry", failed.question_id) + failed.tries
            )  # questions begin with other forms
            turns = (forms[(first + i) % len(forms)] for i in range(len(forms)))
            for form in turns:
                retry = self._retry(self.questions[failed.question_id], failed, form)
                if retry is not None and fits(retry.asked):
                    drawn.append(retry)
                    break
                self._too_long += retry is not None
        return drawn

    def _retry(self, question: Question, failed: _Failed, form: RetryForm) -> Retry | None:
        rng = random.Random(stable_hash(self.seed, "retry", question.id, failed.tries))
        asked = replace(question, id=f"{question.id}#{form}")
        if form == "plain":
            return Retry(question, asked, form)
        if form == "again":
            listed, text = failed.wrong[: self.settings.max_answers], AGAIN
        else:
            known = self.right(question)
            if not known:
                return None
            listed, text = [rng.choice(known), rng.choice(failed.wrong)], COMPARE
            rng.shuffle(listed)
        answers = "\n".join(f"<answer_{i}>\n{escaped(a)}\n</answer_{i}>" for i, a in enumerate(listed, start=1))
        text = text.format(question=question_text(question), answers=answers)
        return Retry(question, replace(asked, question=text, choices=()), form, listed)

    def remember(self, groups: Sequence[Group], retries: Sequence[Retry]) -> dict[str, float]:
        """Take the scored groups of a step of all processes, and return its metrics, without those that have no value."""
        counts = {"solved": 0, "given_up": 0, "pushed_out": 0}
        for retry in retries:
            failed = self._failed[retry.question.id]
            failed.tries += 1
            if retry.form != "compare" and self._see(retry.scored):
                counts["solved"] += 1
            elif failed.tries >= self.settings.max_tries:
                del self._failed[retry.question.id]
                counts["given_up"] += 1
        counts["solved"] += sum(self._see(group) for group in groups)
        while len(self._failed) > self.settings.buffer_size:
            del self._failed[next(iter(self._failed))]
            counts["pushed_out"] += 1
        counts |= {"remembered": len(self), "groups": len(retries), "too_long": self._too_long}
        out = {name: float(count) for name, count in counts.items()}
        for form in self.settings.forms:
            put(out, f"answer_{form}", (r.verdict for retry in retries if retry.form == form for r in retry.rollouts))
        shown = [retry for retry in retries if retry.listed]
        put(out, "copied_share", (float(copied(r.response.text, s.listed)) for s in shown for r in s.rollouts))
        return out

    def _see(self, group: Group) -> bool:
        """Remember or forget the question of a group by its share of right samples. Return whether it was forgotten."""
        wrong = [r.response.text for r in group.students if r.verdict == 0.0 and r.response.text.strip()]
        id, share = group.question.id, group.right_share
        if share is None:
            return False
        if share >= self.settings.failed_below:
            return self._failed.pop(id, None) is not None
        if wrong:
            failed = self._failed.setdefault(id, _Failed(id, []))
            failed.wrong = list(dict.fromkeys([*wrong, *failed.wrong]))[: self.settings.max_answers]
        return False

    def save(self, path: Path) -> None:
        write_jsonl(path, [asdict(failed) for failed in self._failed.values()])

    def load(self, path: Path) -> None:
        """Restore what ``save`` wrote. Raises StateError if the file is missing or unreadable."""
        try:
            rows = [_Failed(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError, TypeError) as e:
            raise StateError(
                f"{path}: expected the questions to ask again, got {e!r}. Remove this checkpoint to continue from the one"
                " before it."
            ) from e
        self._failed = {row.question_id: row for row in rows}


def escaped(answer: str) -> str:
    """Return an answer without anything that could end its place in the prompt, forge a turn or add an image."""
    return strip_disguised_tags(answer, {"answer"})


COPIED, BARE = 0.8, 5
"""Share of words that makes a copy; a listed answer of fewer words cannot be said in other ones."""


def copied(response: str, listed: Sequence[str]) -> bool:
    """Return whether a response repeats a listed answer of at least 5 words: one run of words is 80 % of both."""
    words, *others = (re.findall(r"\w+", text.casefold()) for text in (response, *listed))
    for other in (o for o in others if len(o) >= BARE):
        run = SequenceMatcher(None, words, other, autojunk=False).find_longest_match().size
        if run >= COPIED * max(len(words), len(other)):
            return True
    return False


def guard_against_copies(retries: Sequence[Retry], weight: float) -> None:
    """Take the answer reward, of this weight, from copies of a listed answer: they show nothing about the question."""
    for rollout, listed in ((r, retry.listed) for retry in retries for r in retry.rollouts):
        if rollout.verdict and copied(rollout.response.text, listed):
            if rollout.reward is not None:
                rollout.reward -= weight * rollout.verdict
            rollout.verdict = rollout.rewards["answer"] = 0.0
