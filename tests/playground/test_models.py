"""The students and teachers: what they learn, and that their training is exact, resumable and repeatable."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openril.models.loading import load_model, load_processor
from playground.models import __main__ as command
from playground.models import plan, stages
from playground.models.examples import (
    Example,
    ExampleEncoder,
    Lesson,
    Names,
    as_question,
    draw,
    draw_batch,
    drill,
    image_features,
)
from playground.models.plan import MODELS, WEAK_BOTH, Schedule
from playground.models.report import by_skill, measure, right, write
from playground.models.shipped import WEIGHTS
from playground.models.training import Training, equal_pictures_together, losses
from playground.world import make_questions
from playground.world.scenes import Scene, Thing, render, where
from playground.world.skills import ALL_SKILLS, DESCRIBE, split_of

KINDS = {"qwen": "student_qwen", "internvl": "teacher_b"}


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "TEXTS", 140)
        for kind, name in KINDS.items():
            folders[kind] = tmp_path_factory.mktemp("blanks") / kind
            stages.build_blank(MODELS[name], folders[kind], seed=0)
    return folders


def opened(folder: Path) -> tuple[Any, ExampleEncoder]:
    model = load_model(str(folder))
    return model, ExampleEncoder(model, load_processor(str(folder)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skill", ["open_multi", "disciplines_pro", "choice_cn"])
def test_prompts_are_those_of_the_real_processor(blanks: dict[str, Path], kind: str, skill: str) -> None:
    _, encoder = opened(blanks[kind])
    (made,) = make_questions("train", 1, skills=[skill])
    ids, _ = encoder.prompt(as_question(made))
    rendered = encoder.prompt_encoder.render(_messages(encoder, made))
    whole = encoder.prompt_encoder.encode_text(rendered, [render(s) for s in made.scenes])
    batch = encoder.batch(encoder.rows([Example(as_question(made), made.scenes, "")]))
    assert ids == whole.input_ids.tolist()
    assert batch.positions[:, 0, : len(ids)].equal(whole.position_ids)
    assert torch.allclose(batch.pictures["pixel_values"], whole.vision["pixel_values"], atol=1e-6)


def _messages(encoder: ExampleEncoder, made: Any) -> list[dict[str, Any]]:
    from openril.models.prompts import question_messages

    return question_messages(as_question(made), "", encoder.prompt_encoder.clean)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_model_itself(blanks: dict[str, Path], kind: str) -> None:
    model, encoder = opened(blanks[kind])
    (batch,) = draw_batch(
        encoder, Lesson("x", derivation=0.5), make_questions("train", 28), random.Random(1), batch_size=6, parts=1
    )
    labels = batch.ids.clone()
    at = torch.arange(labels.shape[1])[None]
    labels[(at < batch.starts[:, None]) | (at >= batch.lengths[:, None])] = -100
    more = {}
    if kind == "qwen":
        more["mm_token_type_ids"] = (batch.ids == model.config.image_token_id).long()
    mask = (at < batch.lengths[:, None]).long()
    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=mask, labels=labels, **batch.pictures, **more).loss
        with equal_pictures_together(model):
            found = losses(model, batch)[0] / batch.learned.sum()
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_pictures_taken_together_have_the_same_features(blanks: dict[str, Path]) -> None:
    model, encoder = opened(blanks["qwen"])
    pictures = encoder.pictures([q.scenes[0] for q in make_questions("train", 5)])
    with torch.no_grad():
        one_by_one = torch.cat(tuple(image_features(model, pictures)["image"].pooler_output))
        with equal_pictures_together(model):
            together = torch.cat(tuple(image_features(model, pictures)["image"].pooler_output))
        after = torch.cat(tuple(image_features(model, pictures)["image"].pooler_output))
    assert torch.allclose(together, one_by_one, atol=1e-5)
    assert after.equal(one_by_one)


def test_lessons_are_drawn_by_their_shares_from_training_scenes() -> None:
    rng, pool = random.Random(0), make_questions("train", 280)
    lesson = Lesson("x", "b", describe=0.25, derivation=0.5, wrong=1.0, weak=("charts",))
    drawn = [draw(lesson, pool, rng) for _ in range(1500)]
    described = sum(e.question.question == DESCRIBE for e in drawn)
    derived = sum("answer: " in e.response or "答案" in e.response for e in drawn)
    assert described / 1500 == pytest.approx(0.25, abs=0.05)
    assert derived / 1500 == pytest.approx(0.5, abs=0.06)
    assert all(split_of(scene) == "train" for e in drawn for scene in e.scenes)


def test_drills_ask_for_one_step() -> None:
    (made,) = make_questions("train", 1, skills=["needs_image"])
    (scene,) = made.scenes
    first, thing = next(iter(scene.things.items()))
    asked = {}
    rng = random.Random(0)
    for _ in range(600):
        example = drill(made, rng)
        asked[example.question.question] = example.response
    assert asked[f"what is at {where(first)}?"] == f"see {where(first)} {thing.kind}"
    assert asked[f"where is {thing.name}?"] == f"see {thing.name} {where(first)}"
    sums = [text for text in asked.values() if "=" in text]
    assert len(sums) > 100
    for text in sums:
        a, sign, b, result = re.fullmatch(r"see (\d+) ([-+x]) (\d+) = (\d+)", text).groups()
        assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]


def test_image_tokens_are_named_by_what_they_show(blanks: dict[str, Path]) -> None:
    _, encoder = opened(blanks["qwen"])
    scene = Scene.of({4: Thing("car", "red")})
    names = encoder.shown([scene])
    words = names.words[names.tokens == 4]
    assert encoder.prompt_encoder.tokenizer.decode(words) == " red car middle center"
    # By hand: two tokens that should name word 0 of 3, with logits (1, 0, 0) and (0, 1, 0).
    hand = Names(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.ones(2))
    assert float(hand.loss(torch.eye(3)[:2], torch.eye(3))) == pytest.approx(math.log(math.e + 2) - 0.5)


def test_only_weak_skills_have_wrong_derivations() -> None:
    rng, pool = random.Random(0), make_questions("train", 280)
    lesson = Lesson("x", "a", derivation=1.0, wrong=1.0, weak=("charts", "open"))
    from openril.rewards import rules

    for example in (draw(lesson, pool, rng) for _ in range(300)):
        text = example.question.question
        weak = "bar" in text or "which thing has" in text
        assert (rules.score(str(example.question.rule), example.question, example.response) == 1.0) is not weak, text


def test_teachers_are_weak_in_different_skills() -> None:
    weak = {name: MODELS[name].stages[0].parts[-1][0].weak for name in ("teacher_a", "teacher_b")}
    assert set(weak["teacher_a"]) & set(weak["teacher_b"]) == set(WEAK_BOTH)
    assert {*weak["teacher_a"], *weak["teacher_b"]} < set(ALL_SKILLS)


def test_a_student_learns_each_skill_in_the_planned_styles() -> None:
    rng, pool = random.Random(0), make_questions("train", 360, skills=list(ALL_SKILLS))
    lesson = MODELS["student_qwen"].stages[0].parts[-1][0]
    known = {(made.question, made.scenes): made for made in pool}
    styles: dict[str, set[str]] = {}
    for example in (draw(lesson, pool, rng) for _ in range(4000)):
        made = known.get((example.question.question, example.scenes))
        if made is not None and example.response != made.direct_answer:
            (style,) = [s for s, text in made.derivations.items() if text == example.response]
            styles.setdefault(made.skill, set()).add(style)
    assert {skill: "".join(sorted(found)) for skill, found in styles.items()} == plan.BY_SKILL
    weak = {name: MODELS[name].stages[0].parts[-1][0].weak for name in ("teacher_a", "teacher_b")}
    for skill, letters in plan.BY_SKILL.items():
        assert len(letters) == 2 or skill not in weak[f"teacher_{letters}"], skill


def test_shares_of_derivations_may_differ_by_skill() -> None:
    rng, pool = random.Random(0), make_questions("train", 280, skills=["charts", "everyday", "open"])
    lesson = Lesson("x", "b", derivation={"everyday": 0.7, "charts": 0.2})
    drawn = [draw(lesson, pool, rng) for _ in range(3000)]
    for text, share in (("what should", 0.7), ("bar", 0.2), ("which thing", 0.0)):
        derived = [e.response.startswith("- ") for e in drawn if text in e.question.question]
        assert sum(derived) / len(derived) == pytest.approx(share, abs=0.05), text


def test_the_beginning_of_a_derivation_is_given_and_not_learnt(blanks: dict[str, Path]) -> None:
    _, encoder = opened(blanks["qwen"])
    (made,) = pool = make_questions("train", 1, skills=["charts"])
    rng = random.Random(0)
    whole, begun = (draw(Lesson("x", "b", derivation=1.0, begun=begun), pool, rng) for begun in (False, True))
    assert whole.response == begun.response == made.derivations["b"]
    learned = [encoder.batch(encoder.rows([example])) for example in (whole, begun)]
    first, rest = (batch.ids[0, 1:][batch.learned[0]].tolist() for batch in learned)
    assert encoder.prompt_encoder.tokenizer.decode(first[:1]) == "-"
    assert rest == first[1:]
    direct = draw(Lesson("x", "b", begun=True), pool, rng)
    assert encoder.batch(encoder.rows([direct])).learned.sum() == len(encoder.response(made.direct_answer))


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(100)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == 1.0
    assert schedule.rate(55) == pytest.approx(0.5)
    assert schedule.rate(99) == pytest.approx(0.02)
    assert Schedule(100, falls=False).rate(99) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_responses_equal_generate(blanks: dict[str, Path], kind: str) -> None:
    model, encoder = opened(blanks[kind])
    questions = make_questions("validation", 3, skills=["open_multi", "spatial", "choice"])
    responses = write(model, encoder, questions)
    for made, response in zip(questions, responses, strict=True):
        prompt = encoder.prompt_encoder.encode_text(
            encoder.prompt_encoder.render(_messages(encoder, made)), [render(s) for s in made.scenes]
        )
        more = {} if prompt.token_types is None else {prompt.token_type_key: prompt.token_types[None]}
        pictures = {k: v for k, v in prompt.vision.items() if k in ("pixel_values", "image_grid_thw")}
        ids = prompt.input_ids[None]
        with torch.no_grad():
            made_ids = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **pictures,
                **more,
                max_new_tokens=12,
                do_sample=False,
            )
        expected = encoder.prompt_encoder.decode(made_ids[0, ids.shape[1] :].tolist())
        assert response.startswith(expected) and expected


def test_a_forced_response_begins_with_its_given_words(blanks: dict[str, Path]) -> None:
    model, encoder = opened(blanks["qwen"])
    questions = make_questions("validation", 4)
    assert all(r.startswith("see") for r in write(model, encoder, questions, ["see"] * 4))


def test_means_are_over_skills() -> None:
    questions = make_questions("validation", 3, skills=["charts", "open"])  # charts, open, charts
    assert right(questions, [questions[0].answer, questions[1].answer, "nothing"]) == [1.0, 1.0, 0.0]
    assert by_skill(questions, [1.0, 1.0, 0.0]) == {"charts": 0.5, "open": 1.0, "mean": 0.75}


def test_students_are_measured_greedy_forced_and_sampled(blanks: dict[str, Path]) -> None:
    model, encoder = opened(blanks["qwen"])
    questions = make_questions("validation", 18, skills=list(ALL_SKILLS))
    measured = measure(model, encoder, questions, "c")
    assert set(measured) == {"greedy", "forced", "sampled", "derives"}
    assert all(set(found) == {*ALL_SKILLS, "mean"} for found in measured.values())


def test_interrupted_training_ends_with_the_same_weights(
    blanks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SAVE_EVERY", 2)
    lesson, schedule = Lesson("x", derivation=0.5), Schedule(5, batch_size=4)

    def run(work: Path, stop_after: int | None = None) -> dict[str, torch.Tensor]:
        work.mkdir(exist_ok=True)
        model, encoder = opened(blanks["qwen"])

        class Stopping(stages.Progress):
            def report(self, step: int, loss: float) -> None:
                if step == stop_after:
                    raise KeyboardInterrupt

        progress = Stopping("x", work / "log.jsonl", 5)
        stages.fit_part(
            model, encoder.processor, make_questions("train", 28), lesson, schedule, work, "part", ("x", 0), progress
        )
        return dict(model.state_dict())

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", stop_after=4)
    resumed = run(tmp_path / "halves")
    assert all(resumed[name].equal(value) for name, value in whole.items())


def test_a_batch_in_parts_has_the_gradient_of_the_whole(blanks: dict[str, Path]) -> None:
    model, encoder = opened(blanks["qwen"])
    pool, gradients = make_questions("train", 28), []
    for parts in (1, 3):
        training = Training(model, Schedule(1))
        batch = draw_batch(encoder, Lesson("x", derivation=0.5), pool, random.Random(2), 6, parts)
        training._gradients(batch)
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*gradients, atol=1e-6)


def test_training_learns(blanks: dict[str, Path]) -> None:
    model, encoder = opened(blanks["internvl"])
    batch = draw_batch(encoder, Lesson("x", describe=1.0), make_questions("train", 28), random.Random(0), batch_size=8)
    losses: list[float] = []
    Training(model, Schedule(24)).run(iter([batch] * 24), losses.append)
    assert losses[-1] < 0.7 * losses[0]


def test_the_command_trains_stores_in_half_precision_reports_and_leaves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [(lesson, Schedule(1, batch_size=2)) for lesson, _ in MODELS["student_qwen"].stages[0].parts]
    parts = tuple(plan.Stage(name, tuple(short)) for name in ("base", "sft"))
    monkeypatch.setitem(MODELS, "student_qwen", plan.Model(MODELS["student_qwen"].build, "c", (1,), parts))
    monkeypatch.setattr(stages, "POOL", 28)
    monkeypatch.setattr(stages, "TEXTS", 140)
    arguments = ["--out", str(tmp_path), "--only", "student_qwen"]
    assert command.main(arguments) == 0
    sft = tmp_path / "student_qwen" / "sft"
    weights = load_file(sft / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert (tmp_path / "student_qwen" / "base" / "config.json").is_file()
    assert not (tmp_path / ".student_qwen").exists()
    stamp = (sft / "model.safetensors").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--seed", "1"]) == 2
    assert re.search(r"seed\b.*\b0\b.*\b1\b", capsys.readouterr().err)
    assert (sft / "model.safetensors").stat().st_mtime_ns == stamp
    assert command.main(["--out", str(tmp_path), "--report", "--num-questions", "14"]) == 0
    assert "student_qwen sft" in json.loads((tmp_path / "report.json").read_text())["models"]
    assert "everyday" in capsys.readouterr().out


def test_unknown_models_and_empty_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "teacher_c"]) == 2
    assert "teacher_b" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--report"]) == 2
    assert "holds no models" in capsys.readouterr().err


def test_the_weights_have_every_checkpoint_and_are_small() -> None:
    for name, model in MODELS.items():
        assert all((plan.folder_of(WEIGHTS, name, stage) / "config.json").is_file() for stage in model.stages)
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
