"""The schema of a recipe: every setting, its default and its meaning. Defaults are the paper's (arXiv 2510.19307).

No torch here, so that ``--help`` and ``ril check``'s first messages are fast. Field docstrings are the command line's help.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ModuleGroup = Literal[
    "vision_tower",
    "projector",
    "word_embeddings",
    "attention",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "layer_norms",
    "lm_head",
]
"""Parts of a vision-language model that can be frozen (the paper's Table 5c lists the language-model ones)."""


def _vision_tower() -> list[ModuleGroup]:
    return ["vision_tower"]


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)


class Sampling(Section):
    """How responses are drawn. The paper's values (its Appendix lists temperature, top-p, top-k and penalty)."""

    temperature: NonNegative = 1.0
    """Softmax temperature; 0 means greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Keep the smallest set of tokens whose probabilities sum to this."""
    top_k: NonNegativeInt = 50
    """Keep this many most likely tokens; 0 keeps all."""
    repetition_penalty: Positive = 1.05
    """Divide the scores of tokens already seen (prompt included) by this; 1 is off."""


class Optimiser(Section):
    """AdamW and its schedule."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warmup; linear and cosine end at `final_learning_rate`."""
    final_learning_rate: NonNegative = 0.0
    """Where a linear or cosine schedule ends."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's exponential decay rates."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient's global norm at this; 0 is off."""


class Data(Section):
    """Questions."""

    train: list[str] = Field(default_factory=list)
    """Question files (.jsonl, .json, .parquet), datasets folders, or hub names. Also what SFT and collection use."""
    validation: list[str] = Field(default_factory=list)
    """Held-out questions for the evaluation score during training and for `ril eval`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field -> your column, for instance {question: query, answer: label, images: image}."""
    split: str = "train"
    """Split of a hub data set or datasets folder (`data.train`)."""
    validation_split: str = "validation"
    """Split of a hub data set or datasets folder (`data.validation`)."""
    limit: NonNegativeInt = 0
    """Use only the first this many training questions; 0 uses all."""
    max_prompt_length: PositiveInt = 4096
    """Longest prompt in tokens, image tokens included. Longer questions are refused, never cut through an image."""
    max_image_pixels: PositiveInt = 50_000_000
    """Larger images are refused as decompression bombs."""
    allow_urls: bool = False
    """Fetch images by http(s). Off: a question file cannot make this machine call out."""
    selection: Selection = Field(default_factory=lambda: Selection())
    """Which training questions the loop uses."""


class Selection(Section):
    """Choice of the questions for the loop (paper, section 4: log-probability sampling of NVILA, overlong filter of DAPO)."""

    enabled: bool = False
    """Select before the loop; off uses every training question."""
    num_questions: PositiveInt = 40_000
    """How many questions to keep."""
    reference: str = ""
    """Checkpoint of a larger model whose log-probabilities the student's are compared with; "" uses the student alone."""
    drop_overlong: bool = True
    """Leave out questions whose cached student responses are mostly cut at `train.max_completion_length`."""
    max_overlong_share: Share = 0.5
    """A question with a larger share of cut responses is left out."""


class Student(Section):
    """The model to lift."""

    model: str = ""
    """Checkpoint folder or hub name of a vision-language model (AutoModelForImageTextToText)."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type in which the final student is written. Training keeps float32 master weights unless train.precision is pure_bf16."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Only for publishers you trust."""
    attn_implementation: str = "sdpa"
    """Attention of transformers: sdpa, flash_attention_2, eager."""
    min_pixels: NonNegativeInt = 0
    """Smallest image area the processor resizes to; 0 keeps the processor's own."""
    max_pixels: NonNegativeInt = 0
    """Largest image area the processor resizes to; 0 keeps the processor's own."""
    system_prompt: str = ""
    """System message of every prompt; "" leaves it to the chat template."""
    freeze: list[ModuleGroup] = Field(default_factory=_vision_tower)
    """Parts that do not train."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: Lora = Field(default_factory=lambda: Lora())
    """Low-rank adapters instead of full training."""


class Lora(Section):
    """Low-rank adapters (peft). The reference model is then the base without them, at no extra memory."""

    enabled: bool = False
    """Train adapters only."""
    r: PositiveInt = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale numerator: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the adapters' input while training."""
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of linear layers of the language model that get adapters."""


class Endpoint(Section):
    """An OpenAI-compatible server or a local checkpoint; exactly one of `base_urls` and `model_path` is used."""

    base_urls: list[str] = Field(default_factory=list)
    """One or more servers (for instance http://127.0.0.1:8000/v1) for the same model; work is spread over them."""
    model: str = ""
    """Model name the servers know."""
    model_path: str = ""
    """Local checkpoint, run with transformers in this process."""
    revision: str | None = None
    """Revision, recorded with every response (and used to load a local checkpoint)."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; "" sends none. Keys are never written anywhere."""
    concurrency: PositiveInt = 32
    """Requests in flight over all servers."""
    timeout: Positive = 120.0
    """Seconds a request may take."""
    max_retries: NonNegativeInt = 5
    """Retries of a failed request, with exponential backoff."""
    extra_body: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further fields of the request, for instance {chat_template_kwargs: {enable_thinking: false}}. A nested one is kept,
    and on the command line written, as JSON text."""
    trust_remote_code: bool = False
    """Run code that comes with a local checkpoint. Only for publishers you trust."""

    @field_validator("extra_body", mode="before")
    @classmethod
    def _nested_fields_as_json(cls, value: Any) -> Any:
        # Command-line options have no nested types; the client reads the text back.
        if not isinstance(value, dict):
            return value
        return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for k, v in value.items()}


class Teacher(Endpoint):
    """One teacher."""

    name: str = ""
    """Short unique name; it labels responses in the cache and in every report."""
    system_prompt: str = ""
    """System message for this teacher."""
    send_vllm_fields: bool = True
    """Send top_k and repetition_penalty, which vLLM and SGLang take. Off for APIs that know only OpenAI's fields."""


class Collect(Section):
    """Response collection (paper: N = 16 responses a question from each teacher and from the student)."""

    num_responses: PositiveInt = 16
    """N, responses per question and source. Of a cache that holds more, the first N are used."""
    student: bool = True
    """Collect from the student too: the discriminator's pre-training needs its responses."""
    max_completion_length: PositiveInt = 512
    """Longest response in tokens."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How teacher and student responses are drawn."""
    judge_responses: bool = False
    """Judge the collected responses at once, for instance for rejection sampling."""
    questions_per_batch: PositiveInt = 8
    """Questions a local model answers at a time."""
    shard_size: PositiveInt = 8192
    """Responses a full Parquet shard holds. It does not matter for kills: every finished response is on disk at once."""


class Judge(Endpoint):
    """The judge that compares a response with the ground truth (paper: Qwen2.5-32B-Instruct, text only)."""

    max_tokens: PositiveInt = 256
    """Longest verdict with its explanation."""
    temperature: NonNegative = 0.0
    """Sampling temperature of the judge."""
    bad_verdict_retries: NonNegativeInt = 2
    """Times a verdict that cannot be read is asked for again before it counts as unknown."""
    max_unknown_share: Share = 0.25
    """The run stops when a larger share of a step's verdicts cannot be had."""
    max_response_chars: PositiveInt = 8000
    """Longer responses are cut to this many characters in the judge's prompt (and the cut is marked)."""
    batch_size: PositiveInt = 1
    """Prompts that a model in this process (``model_path``) answers at once; above 1: text models, temperature 0."""


class SFT(Section):
    """Supervised warm start, also of teachers; and the imitation baselines on cached text."""

    enabled: bool = True
    """Run this stage in `ril run`; off starts from student.model as it is."""
    on: Literal["answers", "teacher_responses", "judged_responses"] = "answers"
    """What the model learns to say: the data's own answers; all cached teacher text (sequence-level distillation); or
    cached responses judged right (rejection sampling)."""
    sources: list[str] = Field(default_factory=list)
    """For cached text: names of teachers, or `student`; empty means every teacher."""
    responses_per_question: NonNegativeInt = 0
    """For cached text: at most this many responses per question and source; 0 uses all."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimiser steps; 0 follows `epochs`."""
    batch_size: PositiveInt = 128
    """Examples per optimiser step, over all processes."""
    micro_batch_size: PositiveInt = 4
    """Examples per forward pass on one device."""
    optimiser: Optimiser = Field(
        default_factory=lambda: Optimiser(learning_rate=1e-5, schedule="linear", final_learning_rate=1e-6)
    )
    """Paper: 1e-5, linear to 1e-6."""
    save_every: NonNegativeInt = 500
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class Pretraining(Section):
    """Discriminator pre-training on the response cache."""

    enabled: bool = True
    """Off: the loop starts with a discriminator that has learnt nothing."""
    epochs: Positive = 1.0
    """Passes over the questions."""
    questions_per_step: PositiveInt = 16
    """Questions per optimiser step, over all processes."""
    responses_per_question: NonNegativeInt = 0
    """Responses of each side per question and step; 0 uses all N."""
    held_out_share: Share = 0.1
    """Share of questions kept for measuring the discriminator."""
    optimiser: Optimiser = Field(
        default_factory=lambda: Optimiser(learning_rate=1e-5, schedule="linear", final_learning_rate=1e-6)
    )
    """Paper: 1e-5, linear to 1e-6."""
    save_every: NonNegativeInt = 200
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class Discriminator(Section):
    """The discriminator: the student's architecture and weights with a scalar head (paper, section 3)."""

    mode: Literal["updated", "fixed", "none"] = "updated"
    """Trained in the loop (paper), frozen after pre-training, or left out (paper, Table 5a)."""
    sees: Literal["response", "question", "image"] = "response"
    """What the prompt shows: the response alone (paper), with the question, or with question and images."""
    loss: Literal["bce", "bradley_terry"] = "bce"
    """Eq. 1 (paper), or pairs of a teacher's and a student's response to the same question (GAD, arXiv 2511.10643)."""
    init: str = ""
    """Checkpoint to start from instead of the SFT student."""
    freeze: list[ModuleGroup] = Field(default_factory=_vision_tower)
    """Parts that do not train."""
    max_response_tokens: PositiveInt = 1024
    """Longer responses keep their first and last halves of this many tokens."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward pass on one device; what responses share counts once."""
    pretraining: Pretraining = Field(default_factory=Pretraining)
    """Training on the cache before the loop."""
    optimiser: Optimiser = Field(default_factory=Optimiser)
    """In the loop (paper: 1e-6 constant)."""
    replay: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """In the loop, this share of its update is about groups of earlier steps: the student as it was, against the same
    teachers. All of the step's own groups stay in it, so a share of 0.5 doubles the update's cost. 0 is the paper's."""
    replay_steps: PositiveInt = 50
    """Earlier steps that `replay` draws from; their student responses are kept in memory and in checkpoints."""
    match_length: bool = False
    """Compare beginnings of equal length: student and teacher responses are paired by length and cut to the same number
    of tokens, in training and in scoring, so that length tells it nothing."""
    asleep_accuracy: Share = 0.55
    """Warn when accuracy stays below this: the similarity reward is noise."""
    won_accuracy: Share = 0.98
    """Warn when accuracy stays above this: the similarity reward is constant."""
    health_window: PositiveInt = 20
    """Steps over which those accuracies are averaged."""


class Similarity(Section):
    """Similarity reward from the discriminator."""

    kind: Literal["binary", "continuous", "levels"] = "binary"
    """1 if student_prob < 0.5 (paper); 1 - student_prob; or that rounded to `levels` steps (paper, Fig. 6)."""
    levels: Annotated[int, Field(ge=2)] = 11
    """Number of values of the level variant, 0 and 1 included."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class AnswerReward(Section):
    """Answer reward."""

    kind: Literal["judge", "rules", "rules_then_judge", "none"] = "judge"
    """The LLM judge (paper); answer rules (the paper's "answer parsing"); rules, and the judge where they find no answer
    to compare; or nothing."""
    rule: str = "auto"
    """Rule for questions that name none: auto, exact, choice, number, relaxed_number, boolean, contains."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class RewardFunction(Section):
    """A reward of your own, with TRL's signature (prompts, completions, **columns) -> list[float | None]."""

    function: str = ""
    """Where it is: `package.module:name` or `path/to/file.py:name`."""
    form: Literal["text", "messages"] = "text"
    """What prompts and completions are: plain strings, or lists of chat messages as TRL gives for chat data."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class Rewards(Section):
    """What a response earns: the weighted sum of these."""

    similarity: Similarity = Field(default_factory=Similarity)
    """From the discriminator."""
    answer: AnswerReward = Field(default_factory=AnswerReward)
    """From the judge or from rules."""
    functions: list[RewardFunction] = Field(default_factory=list)
    """Your own."""


class Rollouts(Section):
    """What draws the student's samples in the loop."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """The training process itself, or vLLM servers that are given the new weights before every step."""
    base_urls: list[str] = Field(default_factory=list)
    """vllm: servers of the student, started with VLLM_SERVER_DEV_MODE=1 (for instance http://127.0.0.1:8000/v1)."""
    model: str = "student"
    """vllm: model name the servers know."""
    weights_dir: str = ""
    """vllm: folder for the weights on their way, which the servers see under the same path; "" means `rollout_weights`
    inside run_dir."""
    api_key_env: str = ""
    """vllm: name of the environment variable that holds the servers' key; "" sends none."""
    concurrency: PositiveInt = 64
    """vllm: questions in flight over all servers; each asks for all of its samples at once."""
    timeout: Positive = 600.0
    """vllm: seconds a request or a sync may take."""
    max_logprob_difference: Positive = 0.1
    """vllm: a sync fails when server and trainer differ by more on a probe (mean over its tokens, nats)."""


class Train(Section):
    """The RIL loop (Algorithm 2)."""

    algorithm: Literal["ril", "dr_grpo", "grpo", "gail"] = "ril"
    """ril: both rewards, teacher responses in the group, Dr.GRPO. dr_grpo, grpo: student samples and answer reward alone
    (Algorithm 1). gail: similarity reward alone."""
    num_generations: PositiveInt = 4
    """G, student samples per question."""
    num_teacher_responses: int | None = None
    """Teacher responses per question over all teachers; unset means G (0 in dr_grpo and grpo)."""
    per_teacher: bool = False
    """Read num_teacher_responses as a number for each teacher instead of the total."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers whose cached responses are used; empty uses all of the recipe's."""
    teacher_responses_in_update: bool = True
    """Teacher responses are members of the group in Eq. 2 (paper). Off: they only train the discriminator."""
    num_iterations: PositiveInt = 1
    """mu, updates of the discriminator and of the student per batch of questions."""
    epsilon: Positive = 0.2
    """Clip range of the probability ratio."""
    beta: NonNegative = 0.01
    """Weight of the KL term (k3 estimator) to the SFT student."""
    questions_per_step: PositiveInt = 36
    """Questions per optimiser step, over all processes (paper: 144 responses of 4 each)."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward pass on one device; a group's prompt counts once. A longer group runs alone."""
    packed: bool = True
    """Run a group's prompt once for all its responses. Off: once for each, as elsewhere (slower, the same numbers)."""
    vision_cache_gib: NonNegative = 2.0
    """Host memory for outputs of the frozen vision side, kept for later passes and epochs."""
    questions_per_sampling_batch: PositiveInt = 8
    """Questions the sampler answers at a time on one device."""
    max_steps: NonNegativeInt = 0
    """Stop after this many steps; 0 follows `epochs`."""
    epochs: Positive = 1.0
    """Passes over the questions."""
    max_completion_length: PositiveInt = 512
    """Longest sample in tokens; also the constant in Dr.GRPO's denominator."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How the student's samples are drawn."""
    sampler: Rollouts = Field(default_factory=Rollouts)
    """What draws them."""
    optimiser: Optimiser = Field(default_factory=Optimiser)
    """Paper: AdamW, 1e-6 constant."""
    precision: Literal["float32", "bfloat16", "pure_bf16"] = "bfloat16"
    """float32; bfloat16 autocast over float32 weights; or bfloat16 weights (least memory; small updates are lost)."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints; one is also written at the end and on interrupts. 0 turns the regular ones off."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are removed."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on data.validation; 0 is never."""
    log_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers besides the run folder's own files."""
    log_rollouts_every: PositiveInt = 1
    """Steps between files of every response in rollouts/."""


class Evaluation(Section):
    """`ril eval`: greedy answers, scored by the same rules and judge as training."""

    score: Literal["rules", "judge", "rules_then_judge"] = "rules"
    """How an answer is scored."""
    rule: str = "auto"
    """Rule for questions that name none."""
    max_completion_length: PositiveInt = 512
    """Longest answer in tokens."""
    questions_per_batch: PositiveInt = 8
    """Questions answered at a time."""
    limit: NonNegativeInt = 0
    """Use only the first this many questions; 0 uses all."""


class Recipe(Section):
    """One file that serves every command."""

    run_dir: str = "runs/ril"
    """Folder that holds everything this recipe makes."""
    cache_dir: str = ""
    """Response cache; "" means `responses` inside run_dir. Recipes may share one."""
    seed: NonNegativeInt = 0
    """Everything random follows from it."""
    data: Data = Field(default_factory=Data)
    """Questions."""
    student: Student = Field(default_factory=Student)
    """The model to lift."""
    teachers: list[Teacher] = Field(default_factory=list)
    """Where teacher responses come from."""
    collect: Collect = Field(default_factory=Collect)
    """Response collection."""
    judge: Judge = Field(default_factory=Judge)
    """The LLM judge."""
    sft: SFT = Field(default_factory=SFT)
    """Supervised warm start."""
    discriminator: Discriminator = Field(default_factory=Discriminator)
    """The discriminator."""
    rewards: Rewards = Field(default_factory=Rewards)
    """What responses earn."""
    train: Train = Field(default_factory=Train)
    """The RIL loop."""
    eval: Evaluation = Field(default_factory=Evaluation)
    """Evaluation."""

    # Derived values, in one place so that no two rooms disagree about them.

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir).expanduser().resolve()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser().resolve() if self.cache_dir else self.run_path / "responses"

    @property
    def sft_student_path(self) -> Path:
        """Where `ril sft` leaves its model: the student every later stage starts from when sft.enabled."""
        return self.run_path / "sft" / "student"

    @property
    def start_student(self) -> str:
        """Checkpoint the loop and the discriminator start from."""
        return str(self.sft_student_path) if self.sft.enabled else self.student.model

    @property
    def collected_student(self) -> str:
        """Checkpoint whose responses are collected: the SFT student, unless SFT itself learns from the cache."""
        return self.student.model if self.sft.on != "answers" else self.start_student

    @property
    def discriminator_path(self) -> Path:
        """Where `ril discriminator` leaves the pre-trained discriminator."""
        return self.run_path / "discriminator" / "discriminator"

    @property
    def teacher_names(self) -> list[str]:
        """Teachers the loop uses, in the recipe's order."""
        return [t.name for t in self.teachers if not self.train.teachers or t.name in self.train.teachers]

    @property
    def uses_discriminator(self) -> bool:
        """Whether the loop has a discriminator: RL-only algorithms have none."""
        return self.discriminator.mode != "none" and self.train.algorithm in ("ril", "gail")

    @property
    def uses_replay(self) -> bool:
        """Whether the loop's discriminator is reminded of earlier groups."""
        return self.uses_discriminator and self.discriminator.mode == "updated" and self.discriminator.replay > 0

    @property
    def teacher_responses_per_question(self) -> int:
        """Teacher responses drawn for each group (training the discriminator, and in the update if so set)."""
        if self.train.algorithm in ("dr_grpo", "grpo") or not self.teacher_names:
            return 0
        wanted = self.train.num_teacher_responses
        wanted = self.train.num_generations if wanted is None else wanted
        return wanted * len(self.teacher_names) if self.train.per_teacher else wanted

    @property
    def answer_kind(self) -> Literal["judge", "rules", "rules_then_judge", "none"]:
        """Answer reward in force: GAIL has none."""
        return "none" if self.train.algorithm == "gail" else self.rewards.answer.kind


for _model in (Data, Student, Recipe):
    _model.model_rebuild()

__all__ = [
    "SFT", "AnswerReward", "Collect", "Data", "Discriminator", "Endpoint", "Evaluation", "Judge", "Lora", "ModuleGroup",
    "Optimiser", "Pretraining", "Recipe", "RewardFunction", "Rewards", "Rollouts", "Sampling", "Section", "Selection",
    "Similarity", "Student", "Teacher", "Train",
]  # fmt: skip
