"""Settings of what is learnt, and from what: warm start, discriminator, rewards, the loop, evaluation.

Field docstrings are the command line's help.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from openril.recipe.sources import (
    ModuleGroup,
    NonNegative,
    NonNegativeInt,
    OptimizerConfig,
    Positive,
    PositiveInt,
    SamplingConfig,
    Section,
    Share,
    vision_tower,
)


class SFTConfig(Section):
    """Supervised warm start, also of teachers; and the imitation baselines on cached text."""

    enabled: bool = True
    """Run this stage in `ril run`; off starts from student.model as it is."""
    targets: Literal["answers", "teacher_responses", "judged_responses"] = "answers"
    """What the model learns to say: the data's own answers; all cached teacher text (sequence-level distillation); or
    cached responses judged right (rejection sampling)."""
    sources: list[str] = Field(default_factory=list)
    """For cached text: names of teachers, or `student`; empty means every teacher."""
    responses_per_question: NonNegativeInt = 0
    """For cached text: at most this many responses per question and source; 0 uses all."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimizer steps; 0 follows `epochs`."""
    batch_size: PositiveInt = 128
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 4
    """Examples per forward pass on one device."""
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="linear", final_learning_rate=1e-6)
    )
    """Paper: 1e-5, linear to 1e-6."""
    save_every: NonNegativeInt = 500
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class PretrainingConfig(Section):
    """Discriminator pre-training on the response cache."""

    enabled: bool = True
    """Off: the loop starts with a discriminator that has learnt nothing."""
    epochs: Positive = 1.0
    """Passes over the questions."""
    questions_per_step: PositiveInt = 16
    """Questions per optimizer step, over all processes."""
    responses_per_question: NonNegativeInt = 0
    """Responses of each side per question and step; 0 uses all N."""
    held_out_share: Share = 0.1
    """Share of questions kept for measuring the discriminator."""
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="linear", final_learning_rate=1e-6)
    )
    """Paper: 1e-5, linear to 1e-6."""
    save_every: NonNegativeInt = 200
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class DiscriminatorConfig(Section):
    """The discriminator: the student's architecture and weights with a scalar head (paper, section 3)."""

    mode: Literal["updated", "fixed", "none"] = "updated"
    """Trained in the loop (paper), frozen after pre-training, or left out (paper, Table 5a)."""
    inputs: Literal["response", "question", "image"] = "response"
    """What the prompt shows: the response alone (paper), with the question, or with question and images."""
    loss: Literal["bce", "bradley_terry"] = "bce"
    """Eq. 1 (paper), or pairs of a teacher's and a student's response to the same question (GAD, arXiv 2511.10643)."""
    init: str = ""
    """Checkpoint to start from instead of the SFT student."""
    freeze: list[ModuleGroup] = Field(default_factory=vision_tower)
    """Parts that do not train."""
    max_response_tokens: PositiveInt = 1024
    """Longer responses keep their first and last halves of this many tokens."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward pass on one device; what responses share counts once."""
    pretraining: PretrainingConfig = Field(default_factory=PretrainingConfig)
    """Training on the cache before the loop."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """In the loop (paper: 1e-6 constant)."""
    replay: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """In the loop, this share of its update is about groups of earlier steps: the student as it was, against the same
    teachers. All of the step's own groups stay in it, so a share of 0.5 doubles the update's cost. 0 is the paper's."""
    replay_steps: PositiveInt = 50
    """Earlier steps that `replay` draws from; their student responses are kept in memory and in checkpoints."""
    match_length: bool = False
    """Compare beginnings of equal length: student and teacher responses are paired by length and cut to the same number
    of tokens, in training and in scoring, so that length tells it nothing."""
    at_chance_accuracy: Share = 0.55
    """Warn when accuracy stays below this: the similarity reward is noise."""
    saturated_accuracy: Share = 0.98
    """Warn when accuracy stays above this: the similarity reward is constant."""
    health_window: PositiveInt = 20
    """Steps over which those accuracies are averaged."""


class SimilarityConfig(Section):
    """Similarity reward from the discriminator."""

    kind: Literal["binary", "continuous", "levels"] = "binary"
    """1 if student_prob < 0.5 (paper); 1 - student_prob; or that rounded to `levels` steps (paper, Fig. 6)."""
    levels: Annotated[int, Field(ge=2)] = 11
    """Number of values of the level variant, 0 and 1 included."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class AnswerRewardConfig(Section):
    """Answer reward."""

    kind: Literal["judge", "rules", "rules_then_judge", "none"] = "judge"
    """The LLM judge (paper); answer rules (the paper's "answer parsing"); rules, and the judge where they find no answer
    to compare; or nothing."""
    rule: str = "auto"
    """Rule for questions that name none: auto, exact, choice, number, relaxed_number, boolean, contains."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class RewardFunctionConfig(Section):
    """A reward of your own, with TRL's signature (prompts, completions, **columns) -> list[float | None]."""

    function: str = ""
    """Where it is: `package.module:name` or `path/to/file.py:name`."""
    form: Literal["text", "messages"] = "text"
    """What prompts and completions are: plain strings, or lists of chat messages as TRL gives for chat data."""
    weight: float = 1.0
    """Factor in the sum; 0 logs only."""


class RewardsConfig(Section):
    """What a response earns: the weighted sum of these."""

    similarity: SimilarityConfig = Field(default_factory=SimilarityConfig)
    """From the discriminator."""
    answer: AnswerRewardConfig = Field(default_factory=AnswerRewardConfig)
    """From the judge or from rules."""
    functions: list[RewardFunctionConfig] = Field(default_factory=list)
    """Your own."""


class SamplerConfig(Section):
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


class TrainConfig(Section):
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
    """Questions per optimizer step, over all processes (paper: 144 responses of 4 each)."""
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
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How the student's samples are drawn."""
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    """What draws them."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
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


class EvaluationConfig(Section):
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
