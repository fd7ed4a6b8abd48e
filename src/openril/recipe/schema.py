"""The schema of a recipe: every setting with its default and its meaning.

Defaults are the paper's (arXiv 2510.19307) unless a docstring says otherwise. The docstring under a field is its text in
``--help`` and in docs/recipe_reference.md. This module does not import torch, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

ModuleGroup = Literal[
    "vision_tower", "projector", "word_embeddings", "attention", "mlp_gate", "mlp_up", "mlp_down", "layer_norms", "lm_head"
]  # fmt: skip
"""Parts of a vision-language model that can be frozen (the paper's Table 5c lists those of the language model)."""

BenchmarkName = Literal[
    "ai2d", "chartqa", "mathvista_testmini_format", "mmbench_en_dev", "mmbench_cn_dev", "mmvet", "mmvetv2", "mmmu_val",
    "mmmu_pro", "mmstar", "blink", "seedbench", "seedbench_2_plus", "realworldqa",
]  # fmt: skip
"""The paper's fourteen benchmarks, as lmms-eval names them."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


def vision_tower() -> list[ModuleGroup]:
    return ["vision_tower"]


class Section(BaseModel):
    """Base class of all sections: unknown keys are refused, and assignments are validated."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)


class SamplingConfig(Section):
    """How responses are sampled. The defaults are the values of the paper's appendix."""

    temperature: NonNegative = 1.0
    """Softmax temperature; 0 means greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Keep the smallest set of tokens whose probabilities sum to this value."""
    top_k: NonNegativeInt = 50
    """Keep this many of the most likely tokens; 0 keeps all."""
    repetition_penalty: Positive = 1.05
    """Divide the scores of tokens that were already seen (prompt included) by this value; 1 turns it off."""


class OptimizerConfig(Section):
    """AdamW and its learning rate schedule."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warmup; linear and cosine end at `final_learning_rate`."""
    final_learning_rate: NonNegative = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Exponential decay rates of AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global norm of the gradient to this value; 0 turns clipping off."""


def _decaying_optimizer() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-5, schedule="linear", final_learning_rate=1e-6)


class SelectionConfig(Section):
    """Selection of the questions for the loop (paper, section 4: log-probability sampling and overlong filtering)."""

    enabled: bool = False
    """Select questions before the loop; off uses every training question."""
    num_questions: PositiveInt = 40_000
    """Number of questions to keep."""
    reference: str = ""
    """Checkpoint of a larger model to compare log-probabilities with (as NVILA does); "" uses the student alone."""
    drop_overlong: bool = True
    """Leave out questions whose cached student responses were mostly cut at the length limit (as DAPO does)."""
    max_overlong_share: Share = 0.5
    """Leave out a question if a larger share of its student responses was cut."""
    provisional_share: Annotated[float, Field(ge=1.0)] = 1.25
    """With `drop_overlong`, collect the student's responses for this many times `num_questions`, so that enough remain."""


class DataConfig(Section):
    """Questions."""

    train: list[str] = Field(default_factory=list)
    """Question files (.jsonl, .json, .csv, .tsv, .parquet), `datasets` folders or hub names. With `data.selection`, SFT
    uses all of them and the other stages the selected ones."""
    validation: list[str] = Field(default_factory=list)
    """Held-out questions for the evaluation score during training and for `ril eval`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of your data, by field of a question, for instance {question: query, answer: reward_model.ground_truth,
    answer_index: label}. "" reads no column for a field."""
    split: str = "train"
    """Split of a hub data set or `datasets` folder in `data.train`."""
    validation_split: str = "validation"
    """Split of a hub data set or `datasets` folder in `data.validation`."""
    limit: NonNegativeInt = 0
    """Use only the first questions of `data.train`, at most this many; 0 uses all."""
    max_prompt_length: PositiveInt = 4096
    """Maximum length of a prompt in tokens, image tokens included. Every stage leaves longer questions out and lists them
    in `left_out.jsonl`; none is truncated."""
    max_image_pixels: PositiveInt = 50_000_000
    """Maximum size of an image in pixels. Larger images are refused as possible decompression bombs."""
    allow_urls: bool = False
    """Fetch images by http(s). If off, a question file cannot make this machine send requests."""
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    """Selection of the training questions that the loop uses."""


class LoraConfig(Section):
    """Low-rank adapters (peft). The reference model is then the base model without them and needs no extra memory."""

    enabled: bool = False
    """Train adapters only."""
    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Numerator of the scale: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the input of the adapters in the warm start. The loop runs without dropout."""
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers of the language model that get adapters."""


class SamplerConfig(Section):
    """The engine that samples the student: in the loop, in `ril collect`, and in `ril eval`."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """The process itself, or vLLM servers. They receive the new weights before every step of the loop, the checkpoint that
    `ril collect` samples, and every checkpoint that `ril eval` scores."""
    base_urls: list[str] = Field(default_factory=list)
    """vllm: servers of the student, started with VLLM_SERVER_DEV_MODE=1 (for instance http://127.0.0.1:8000/v1)."""
    model: str = "student"
    """vllm: name under which the servers know the model."""
    sync: Literal["file", "adapter", "nccl", "ipc"] = "file"
    """vllm: how servers get new weights. file: they load a folder. adapter (with `student.lora`): the loop writes its
    adapter alone. nccl, ipc: from GPU to GPU, through vLLM's weight-transfer endpoints; for servers on other GPUs, or on
    the same ones."""
    weights_dir: str = ""
    """vllm: folder through which the weights are passed, which the servers must see under the same path. One run at a time
    holds it. "" means `rollout_weights` inside run_dir; checkpoint folders are then read where they are."""
    api_key_env: str = ""
    """vllm: name of the environment variable that holds the servers' API key; "" sends none."""
    concurrency: PositiveInt = 64
    """vllm: number of questions in flight over all servers. Each request asks for all samples of a question."""
    timeout: Positive = 600.0
    """vllm: maximum duration of a request or of a weight sync in seconds."""
    max_logprob_difference: Positive = 0.1
    """vllm: a weight sync fails if server and trainer differ by more than this on a probe (mean over its tokens, nats)."""

    @property
    def endpoint(self) -> EndpointConfig:
        """The servers as a client addresses them."""
        shared = {"base_urls", "model", "api_key_env", "concurrency", "timeout"}
        return EndpointConfig(**self.model_dump(include=shared))


class StudentConfig(Section):
    """The model to train."""

    model: str = ""
    """Checkpoint folder or hub name of a vision-language model (`AutoModelForImageTextToText`)."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the final checkpoint. Training keeps float32 weights unless `train.precision` is pure_bf16."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Use it only for publishers you trust."""
    attn_implementation: str = "sdpa"
    """Attention implementation of transformers: sdpa, flash_attention_2 or eager."""
    min_pixels: NonNegativeInt = 0
    """Smallest image area the processor resizes to; 0 keeps the processor's own value."""
    max_pixels: NonNegativeInt = 0
    """Largest image area the processor resizes to; 0 keeps the processor's own value."""
    system_prompt: str = ""
    """System message of every prompt; "" leaves it to the chat template."""
    freeze: list[ModuleGroup] = Field(default_factory=vision_tower)
    """Parts of the model that are not trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Low-rank adapters instead of full training."""
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    """The engine that samples the student."""


RequestField = Literal["temperature", "top_p", "seed", "top_k", "repetition_penalty"]
OMITTABLE: tuple[str, ...] = get_args(RequestField)


class EndpointConfig(Section):
    """An OpenAI-compatible server or a local checkpoint. Set exactly one of `base_urls` and `model_path`."""

    base_urls: list[str] = Field(default_factory=list)
    """One or more servers of the same model (for instance http://127.0.0.1:8000/v1); requests are spread over them."""
    model: str = ""
    """Name under which the servers know the model."""
    model_path: str = ""
    """Local checkpoint that is run with transformers in this process."""
    revision: str | None = None
    """Revision of the model. It is recorded with every response and used to load a local checkpoint."""
    api_key_env: str = ""
    """Name of the environment variable that holds the API key; "" sends none. Keys are never written anywhere."""
    concurrency: PositiveInt = 32
    """Number of requests in flight over all servers."""
    timeout: Positive = 120.0
    """Maximum duration of a request in seconds."""
    max_retries: NonNegativeInt = 5
    """Number of retries of a failed request, with exponential backoff."""
    extra_body: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Additional fields of the request, for instance {chat_template_kwargs: {enable_thinking: false}}. Nested fields are
    stored as JSON text, and are written as JSON text on the command line."""
    length_field: str = "max_tokens"
    """Name of the request field that limits the length of an answer. Reasoning models of OpenAI expect
    max_completion_tokens. Empty sends no limit."""
    omit: list[RequestField] = Field(default_factory=list)
    """Request fields that are not sent, for servers that refuse them, for instance [seed] or [temperature, top_p]."""
    trust_remote_code: bool = False
    """Run code that comes with a local checkpoint. Use it only for publishers you trust."""

    @field_validator("extra_body", mode="before")
    @classmethod
    def _nested_fields_as_json(cls, value: Any) -> Any:
        # Command-line options have no nested types; the client parses the text again.
        if not isinstance(value, dict):
            return value
        return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for k, v in value.items()}


class TeacherConfig(EndpointConfig):
    """One teacher."""

    name: str = ""
    """Short unique name. It labels responses in the cache and in every report."""
    system_prompt: str = ""
    """System message for this teacher."""
    send_vllm_fields: bool = True
    """Send top_k and repetition_penalty, which vLLM and SGLang accept. Turn it off for APIs that refuse them."""


class CollectConfig(Section):
    """Response collection (paper: N = 16 responses per question from each teacher and from the student)."""

    num_responses: PositiveInt = 16
    """N, the number of responses per question and source. If the cache holds more, the first N are used."""
    student: bool = True
    """Collect from the student too: pre-training of the discriminator needs its responses."""
    student_after_sft: bool = False
    """With a warm start on cached text (`sft.targets`): collect the student's responses after it, from the student that it
    trained, so that the discriminator learns to tell that one. Off collects them before, from `student.model`."""
    max_completion_length: PositiveInt = 512
    """Maximum length of a response in tokens."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How teacher and student responses are sampled."""
    judge_responses: bool = False
    """Judge the collected responses at once, for instance for rejection sampling."""
    max_refused_share: Share = 0.1
    """Largest share of a source's responses that its server may refuse, for instance by a content filter. They are kept
    as refusals, empty and marked. Above the share the stage stops and names the questions. One question may always be
    refused."""
    questions_per_batch: PositiveInt = 8
    """Number of questions a local model answers at a time."""
    shard_size: PositiveInt = 8192
    """Number of responses in a full Parquet shard. Finished responses are on disk at once, whatever this value."""


class JudgeConfig(EndpointConfig):
    """The judge that compares a response with the ground truth (paper: Qwen2.5-32B-Instruct, text only)."""

    max_tokens: PositiveInt = 256
    """Maximum length of a verdict with its explanation, in tokens."""
    temperature: NonNegative = 0.0
    """Sampling temperature of the judge."""
    bad_verdict_retries: NonNegativeInt = 2
    """Number of times the judge is asked again after an unreadable verdict, before the verdict counts as unknown."""
    max_unknown_share: Share = 0.25
    """Stop the run if a larger share of a step's verdicts is unknown."""
    max_response_chars: PositiveInt = 8000
    """Maximum length of a response in the judge's prompt, in characters. Longer ones are cut in the middle, visibly."""
    batch_size: PositiveInt = 1
    """Number of prompts a local judge (`model_path`) answers at once. Above 1 it must be a text model at temperature 0."""


class SFTConfig(Section):
    """Supervised fine-tuning: the warm start of students and teachers, and the imitation baselines on cached text."""

    enabled: bool = True
    """Run this stage in `ril run`; off starts from `student.model` as it is."""
    targets: Literal["answers", "teacher_responses", "judged_responses"] = "answers"
    """Text to train on: the answers of the data, all cached teacher responses (sequence-level distillation), or the
    cached responses that were judged right (rejection sampling)."""
    sources: list[str] = Field(default_factory=list)
    """Sources of cached responses: names of teachers, or `student`. Empty means every teacher."""
    responses_per_question: NonNegativeInt = 0
    """Maximum number of cached responses per question and source; 0 uses all."""
    epochs: Positive = 1.0
    """Number of passes over the data."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimizer steps; 0 follows `epochs`."""
    batch_size: PositiveInt = 128
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 4
    """Examples per forward pass on one device."""
    optimizer: OptimizerConfig = Field(default_factory=_decaying_optimizer)
    """Optimizer of this stage (paper: 1e-5, linear to 1e-6)."""
    save_every: NonNegativeInt = 500
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class PretrainingConfig(Section):
    """Pre-training of the discriminator on the response cache."""

    enabled: bool = True
    """Run this stage; off starts the loop with an untrained discriminator."""
    epochs: Positive = 1.0
    """Number of passes over the questions."""
    questions_per_step: PositiveInt = 16
    """Questions per optimizer step, over all processes."""
    responses_per_question: NonNegativeInt = 0
    """Number of student responses, and of teacher responses, per question and step; 0 uses all N."""
    held_out_share: Share = 0.1
    """Share of the questions that is held out to measure the discriminator."""
    optimizer: OptimizerConfig = Field(default_factory=_decaying_optimizer)
    """Optimizer of pre-training (paper: 1e-5, linear to 1e-6)."""
    save_every: NonNegativeInt = 200
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""


class DiscriminatorConfig(Section):
    """The discriminator: the student's architecture and weights with a scalar head (paper, section 3)."""

    mode: Literal["updated", "fixed", "none"] = "updated"
    """Train it in the loop (paper), freeze it after pre-training, or leave it out (paper, Table 5d)."""
    inputs: Literal["response", "question", "image"] = "response"
    """Contents of its prompt: the response alone (paper), with the question, or with the question and its images."""
    loss: Literal["bce", "bradley_terry"] = "bce"
    """Eq. 1 (paper), or pairs of a teacher and a student response to the same question (GAD, arXiv 2511.10643)."""
    init: str = ""
    """Checkpoint to start from; "" starts from the SFT student."""
    freeze: list[ModuleGroup] = Field(default_factory=vision_tower)
    """Parts of the model that are not trained."""
    max_response_tokens: PositiveInt = 1024
    """Maximum length of a response in tokens. Of longer ones only the first and last halves of this length are used."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward pass on one device. Tokens that responses share count once."""
    pretraining: PretrainingConfig = Field(default_factory=PretrainingConfig)
    """Training on the response cache before the loop."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer in the loop (paper: 1e-6, constant)."""
    replay: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """Share of each update in the loop that comes from groups of earlier steps, with their student responses. The groups
    of the current step are all kept, so a share of 0.5 doubles the cost of the update. The paper has no replay (0)."""
    replay_steps: PositiveInt = 50
    """Number of earlier steps that `replay` samples from. Their responses are kept in memory and in checkpoints."""
    num_iterations: Annotated[int | None, Field(ge=1)] = None
    """Updates per batch of questions in the loop; unset means `train.num_iterations` (paper)."""
    update_below: Annotated[float | None, Field(gt=0.5, le=1.0)] = None
    """Update it in the loop only while its balanced accuracy on the new groups, measured before, is below this value;
    unset always updates (paper). It costs one more pass a step."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the loss that has the labels exchanged, so that logits stay bounded."""
    gradient_penalty: NonNegative = 0.0
    """Weight of the penalty on the gradient of the logit by the embeddings of the response (half its squared norm)."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Score with an exponential moving average of the weights of the loop's updates, which keeps this share of itself at
    each; 0 scores with the weights themselves (paper)."""
    match_length: bool = False
    """Compare beginnings of equal length: student and teacher responses are paired by length and cut to the same number
    of tokens, in training and in scoring, so that their length carries no information."""
    at_chance_accuracy: Share = 0.55
    """Warn if the accuracy stays below this value: the similarity reward is then noise."""
    saturated_accuracy: Share = 0.98
    """Warn if the accuracy stays above this value: the similarity reward is then constant."""
    health_window: PositiveInt = 20
    """Number of steps over which the accuracy is averaged for these warnings."""


class GateConfig(Section):
    """Weight of the similarity reward by the discriminator's balanced accuracy on new groups, before it learns from them."""

    enabled: bool = False
    """Multiply the weight by a factor between 0 and 1; off keeps the weight (paper)."""
    closed_below: Share = 0.55
    """The factor is 0 up to this accuracy, and rises linearly above it."""
    open_above: Share = 0.7
    """The factor is 1 from this accuracy on."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    """The accuracy is a moving average over steps, which keeps this share of itself at each."""


class SimilarityConfig(Section):
    """Similarity reward from the discriminator."""

    kind: Literal["binary", "continuous", "levels", "raw"] = "binary"
    """1 if student_prob < 0.5, else 0 (paper); 1 - student_prob; the latter rounded to `levels` values (Fig. 6); or the
    logit of 1 - student_prob, which is the discriminator's raw score (GAD, arXiv 2511.10643)."""
    levels: Annotated[int, Field(ge=2)] = 11
    """Number of values of the kind `levels`, 0 and 1 included."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the reward."""
    gate: GateConfig = Field(default_factory=GateConfig)
    """Lower the weight while the discriminator tells student and teachers apart badly."""


class AnswerRewardConfig(Section):
    """Answer reward."""

    kind: Literal["judge", "rules", "rules_then_judge", "none"] = "judge"
    """The LLM judge (paper); answer rules (the paper's "answer parsing"); rules, and the judge where the rules find no
    answer to compare; or no answer reward."""
    rule: str = "auto"
    """Rule for questions that name none: auto, exact, choice, number, relaxed_number, boolean or contains."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the reward."""
    without_truth: Literal["refuse", "leave_out"] = "refuse"
    """Questions that have no ground truth: refuse them, or leave the answer reward out of their groups, which the other
    rewards then decide alone. `train.teacher_draw: judged_right` lets such a question draw from all cached responses."""


class RewardFunctionConfig(Section):
    """A user's reward function with TRL's signature `(prompts, completions, **columns) -> list[float | None]`."""

    function: str = ""
    """Location of the function: `package.module:name` or `path/to/file.py:name`."""
    form: Literal["text", "messages"] = "text"
    """Type of prompts and completions: plain strings, or lists of chat messages as TRL passes them for chat data."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 only logs the reward."""


class RewardsConfig(Section):
    """The reward of a response: the weighted sum of these rewards."""

    similarity: SimilarityConfig = Field(default_factory=SimilarityConfig)
    """Similarity reward from the discriminator."""
    answer: AnswerRewardConfig = Field(default_factory=AnswerRewardConfig)
    """Answer reward from the judge or from rules."""
    functions: list[RewardFunctionConfig] = Field(default_factory=list)
    """Your own reward functions."""
    combine: Literal["sum", "right_only", "per_reward"] = "sum"
    """sum: the weighted sum (paper). right_only: similarity counts only in right responses, R = a + a s. per_reward: the
    advantage is the weighted sum of each reward's own, divided by its standard deviation in the group (GDPO)."""


RetryForm = Literal["compare", "again", "plain"]


class RetryConfig(Section):
    """Questions about answers: what the student is asked after its samples failed a question (ZPPO, arXiv 2606.18216)."""

    questions_per_step: NonNegativeInt = 0
    """Number of such questions in each step, over all processes, in addition to those of the data; 0 asks none (paper)."""
    forms: Annotated[list[RetryForm], Field(min_length=1)] = ["compare", "again", "plain"]
    """Forms in which a question comes again, in turn. compare: a right answer of a teacher and a wrong one of the student,
    without names and in seeded order: which is right, and why? again: the student's wrong answers, and the request to solve
    the question in another way. plain: the question itself. compare is left out where no teacher is right."""
    failed_below: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """A question is remembered if a smaller share of its samples is right. It leaves as solved when a group that was not
    shown a right answer reaches the share."""
    max_tries: PositiveInt = 9
    """A question leaves as given up after it was asked again this many times."""
    buffer_size: PositiveInt = 256
    """Number of questions that are remembered; the oldest makes way for a new one."""
    max_answers: PositiveInt = 4
    """Number of wrong answers that are remembered of a question, the newest first."""


class TrainConfig(Section):
    """The RIL loop (Algorithm 2)."""

    algorithm: Literal["ril", "dr_grpo", "grpo", "gail"] = "ril"
    """ril: both rewards, teacher responses in the group, Dr.GRPO. dr_grpo and grpo: student samples and the answer reward
    alone (Algorithm 1). gail: the similarity reward alone."""
    num_generations: NonNegativeInt = 4
    """G, the number of student samples per question. With 0 the student does not sample and learns from teacher responses
    alone, for instance from the right ones with `teacher_draw: judged_right` and `baseline: none`."""
    num_teacher_responses: int | None = None
    """Number of teacher responses per question over all teachers; unset means G (0 in dr_grpo and grpo)."""
    per_teacher: bool = False
    """Count num_teacher_responses for each teacher instead of over all teachers."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers whose cached responses are used; empty uses all teachers of the recipe."""
    teacher_draw: Literal["any", "judged_right"] = "any"
    """Cached responses that a group draws from: all, balanced over the teachers (paper), or those that were judged right,
    pooled, so that a teacher gives more where more of its responses are right. A question that has none draws from all.
    Needs `collect.judge_responses`, or answer rules."""
    teacher_responses_below: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    """Give a group teacher responses only if a smaller share of its student samples is right; unset gives them to all
    (paper). 0.01: where every sample failed. An unknown verdict counts as neither, and a group that has no known one gets
    them. The discriminator learns from all of them. Needs an answer reward."""
    teacher_advantages: Literal["signed", "positive"] = "signed"
    """Advantages of teacher responses: as they are (paper), or negative ones set to 0, so that no text that the student
    did not write is pushed down."""
    teacher_weight: Literal["ratio", "shaped"] = "ratio"
    """Factor on the advantage of a teacher's token: pi_theta / pi_old with the clip (paper), or pi_theta / (pi_theta + 0.1)
    without a clip (LUFFY)."""
    baseline: Literal["group", "students", "none"] = "group"
    """Responses whose mean reward is subtracted: all of the group (paper), or the student's samples alone. none: nothing is
    subtracted, so that with an answer reward right responses are imitated and none is pushed down (RAFT)."""
    negative_scale: NonNegative = 1.0
    """Factor on the negative advantages of the student's samples. 0.5 keeps the entropy of a run without KL term from
    growing; 0 learns from what is better than the baseline alone."""
    teacher_responses_in_update: bool = True
    """Include teacher responses in the group of Eq. 2 (paper). If off, they only train the discriminator."""
    num_iterations: PositiveInt = 1
    """mu, the number of updates of the discriminator and of the student per batch of questions."""
    epsilon: Positive = 0.2
    """Clip range of the probability ratio."""
    clip_teacher_upper: bool = True
    """Clip the ratio of teacher responses at 1 + epsilon too (paper). Off: a teacher response with a positive advantage
    pulls however far the student has already moved towards it. Matters for num_iterations > 1."""
    beta: NonNegative = 0.01
    """Weight of the KL term (k3 estimator) to the SFT student."""
    kl_rows: Literal["all", "student"] = "all"
    """Responses with a KL term: all members of the group (paper), or the student's samples alone, for which k3 estimates
    the KL divergence."""
    questions_per_step: PositiveInt = 36
    """Questions per optimizer step, over all processes (paper: 144 responses, 4 per question)."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward pass on one device. The prompt of a group counts once. A longer group runs alone."""
    packed: bool = True
    """Run the prompt of a group once for all its responses. Off repeats it for each response: slower, same numbers."""
    shard: bool = False
    """Shard weights, gradients and optimizer states of student, reference and discriminator over the processes (ZeRO-3),
    in `ril sft`, `ril discriminator` and `ril train`. One process alone ignores it."""
    offload: Literal["none", "optimizer", "swap"] = "none"
    """What waits in host memory while it is not used: nothing; the optimizers' states; or these and the models that are
    not in use, so that student and discriminator take turns on the device (paper). Same numbers, slower steps."""
    vision_cache_gib: NonNegative = 2.0
    """Host memory in GiB for outputs of the frozen vision part, which later passes and epochs reuse."""
    questions_per_sampling_batch: PositiveInt = 8
    """Number of questions the sampler answers at a time on one device."""
    max_steps: NonNegativeInt = 0
    """Stop after this many steps; 0 follows `epochs`."""
    epochs: Positive = 1.0
    """Number of passes over the questions."""
    max_completion_length: PositiveInt = 512
    """Maximum length of a sample in tokens; also the constant in the denominator of Dr.GRPO."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How the student's responses are sampled."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer of the student (paper: AdamW, 1e-6, constant)."""
    precision: Literal["float32", "bfloat16", "pure_bf16"] = "bfloat16"
    """float32; bfloat16 autocast over float32 weights; or bfloat16 weights, of which AdamW keeps what rounding takes
    from them (least memory)."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints; 0 saves only at the end and on interrupts."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are removed."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on `data.validation`; 0 turns them off."""
    eval_suite: list[BenchmarkName] = Field(default_factory=list)
    """Benchmarks, by the names of lmms-eval's tasks, that are evaluated every `eval_every` steps too. `eval.limit` and
    `eval.suite_max_tokens` keep this short."""
    log_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers to log to, in addition to the files in the run folder."""
    log_groups_every: NonNegativeInt = 0
    """Steps between tables of the first four groups of a step, with their pictures, in the trackers; 0 turns them off."""
    log_rollouts_every: PositiveInt = 1
    """Steps between files with every response in `rollouts/`."""
    retry: RetryConfig = Field(default_factory=RetryConfig)
    """Questions about answers to questions that the student failed."""
    report_every: NonNegativeInt = 0
    """Steps between rewrites of `report.html` during training; 0 writes it at the end only."""


class EvaluationConfig(Section):
    """`ril eval`: greedy answers, scored by the same rules and judge as in training."""

    score: Literal["rules", "judge", "rules_then_judge"] = "rules"
    """How an answer is scored."""
    rule: str = "auto"
    """Rule for questions that name none."""
    max_completion_length: PositiveInt = 512
    """Maximum length of an answer in tokens."""
    questions_per_batch: PositiveInt = 8
    """Number of questions answered at a time."""
    limit: NonNegativeInt = 0
    """Use only the first questions, at most this many; 0 uses all."""
    suite_data: str = ""
    """Folder with a copy of the benchmarks' data sets, one folder each; "" uses the hub's cache."""
    suite_max_tokens: NonNegativeInt = 0
    """Maximum length of a benchmark's answer in tokens; 0 keeps the limit of each lmms-eval task."""


ExportFormat = Literal["", "gguf", "internvl-original", "compressed-tensors"]


class ExportConfig(Section):
    """`ril run` exports the trained student as its last stage if `to` is set. `ril export` has flags of the same names."""

    to: ExportFormat = ""
    """Format of the runtime that will run the student; "" exports nothing."""
    type: list[str] = Field(default_factory=list)
    """Types of the weights; [] takes the format's default. gguf writes several; the other formats write one."""
    out: str = ""
    """Folder that is written; "" means `export/` and the name of the format inside run_dir."""
    check: bool = True
    """Compare the export with the student on `data.validation`. A run whose export fails the comparison fails."""
    questions: PositiveInt = 100
    """Number of questions of the comparison."""
    max_kl: NonNegative = 0.0
    """Largest mean KL that passes, in nats, for types that have no limit of their own; 0 only reports it."""
    threads: NonNegativeInt = 0
    """CPU threads of the runtime in the comparison; 0 uses all cores."""
    resize_images: bool = False
    """gguf: compare on pictures in the sizes of the model's own grid, which applications must then send too."""
    python: str = ""
    """compressed-tensors: interpreter of an environment with llm-compressor."""


class Recipe(Section):
    """All settings of a run. One recipe file serves every command."""

    run_dir: str = "runs/ril"
    """Folder for everything that the commands produce with this recipe."""
    cache_dir: str = ""
    """Folder of the response cache; "" means `responses` inside run_dir. Several recipes may share one cache."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Questions."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The model to train."""
    teachers: list[TeacherConfig] = Field(default_factory=list)
    """The teacher models."""
    collect: CollectConfig = Field(default_factory=CollectConfig)
    """Response collection."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """The LLM judge."""
    sft: SFTConfig = Field(default_factory=SFTConfig)
    """Supervised warm start."""
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    """The discriminator."""
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    """Rewards."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The RIL loop."""
    eval: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Evaluation."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Export to another runtime."""

    # Values that follow from several settings are defined here, so that all packages agree on them.

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir).expanduser().resolve()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser().resolve() if self.cache_dir else self.run_path / "responses"

    @property
    def sft_student_path(self) -> Path:
        """The model that `ril sft` writes. Later stages start from it if sft.enabled."""
        return self.run_path / "sft" / "student"

    @property
    def start_student(self) -> str:
        """Checkpoint from which the loop and the discriminator start."""
        return str(self.sft_student_path) if self.sft.enabled else self.student.model

    @property
    def collected_student(self) -> str:
        """Checkpoint that selects questions and whose responses are collected: the SFT student, unless SFT itself trains
        on the cache and does not come first (`collect.student_after_sft`)."""
        after = self.sft.targets == "answers" or self.collect.student_after_sft
        return self.start_student if after else self.student.model

    @property
    def discriminator_path(self) -> Path:
        """The pre-trained discriminator that `ril discriminator` writes."""
        return self.run_path / "discriminator" / "discriminator"

    @property
    def teacher_names(self) -> list[str]:
        """Names of the teachers that the loop uses, in the order of the recipe."""
        return [t.name for t in self.teachers if not self.train.teachers or t.name in self.train.teachers]

    @property
    def uses_discriminator(self) -> bool:
        """Whether the loop has a discriminator. The algorithms dr_grpo and grpo have none."""
        return self.discriminator.mode != "none" and self.train.algorithm in ("ril", "gail")

    @property
    def uses_replay(self) -> bool:
        """Whether the discriminator is also trained on groups of earlier steps."""
        return self.uses_discriminator and self.discriminator.mode == "updated" and self.discriminator.replay > 0

    @property
    def shows_teacher_answers(self) -> bool:
        """Whether prompts of the loop show right answers of the teachers."""
        return self.train.retry.questions_per_step > 0 and "compare" in self.train.retry.forms

    @property
    def uses_gate(self) -> bool:
        """Whether the weight of the similarity reward follows the discriminator's accuracy."""
        return self.uses_discriminator and self.rewards.similarity.gate.enabled

    @property
    def teacher_responses_per_question(self) -> int:
        """Number of teacher responses in each group, whether or not they take part in the student's update."""
        if self.train.algorithm in ("dr_grpo", "grpo") or not self.teacher_names:
            return 0
        count = self.train.num_teacher_responses
        count = self.train.num_generations if count is None else count
        return count * len(self.teacher_names) if self.train.per_teacher else count

    @property
    def answer_kind(self) -> Literal["judge", "rules", "rules_then_judge", "none"]:
        """The answer reward that is used: GAIL has none."""
        return "none" if self.train.algorithm == "gail" else self.rewards.answer.kind


Sampling = SamplingConfig
"""The name under which ``openril.Sampling`` is public."""
