"""Settings of what goes in: questions, the student, teachers, judge, and how responses are drawn and collected.

Field docstrings are the command line's help.
"""

from __future__ import annotations

import json
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


def vision_tower() -> list[ModuleGroup]:
    return ["vision_tower"]


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)


class SamplingConfig(Section):
    """How responses are drawn. The paper's values (its Appendix lists temperature, top-p, top-k and penalty)."""

    temperature: NonNegative = 1.0
    """Softmax temperature; 0 means greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Keep the smallest set of tokens whose probabilities sum to this."""
    top_k: NonNegativeInt = 50
    """Keep this many most likely tokens; 0 keeps all."""
    repetition_penalty: Positive = 1.05
    """Divide the scores of tokens already seen (prompt included) by this; 1 is off."""


class OptimizerConfig(Section):
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


class DataConfig(Section):
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
    selection: SelectionConfig = Field(default_factory=lambda: SelectionConfig())
    """Which training questions the loop uses."""


class SelectionConfig(Section):
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


class StudentConfig(Section):
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
    freeze: list[ModuleGroup] = Field(default_factory=vision_tower)
    """Parts that do not train."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig())
    """Low-rank adapters instead of full training."""


class LoraConfig(Section):
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


class EndpointConfig(Section):
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


class TeacherConfig(EndpointConfig):
    """One teacher."""

    name: str = ""
    """Short unique name; it labels responses in the cache and in every report."""
    system_prompt: str = ""
    """System message for this teacher."""
    send_vllm_fields: bool = True
    """Send top_k and repetition_penalty, which vLLM and SGLang take. Off for APIs that know only OpenAI's fields."""


class CollectConfig(Section):
    """Response collection (paper: N = 16 responses a question from each teacher and from the student)."""

    num_responses: PositiveInt = 16
    """N, responses per question and source. Of a cache that holds more, the first N are used."""
    student: bool = True
    """Collect from the student too: the discriminator's pre-training needs its responses."""
    max_completion_length: PositiveInt = 512
    """Longest response in tokens."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How teacher and student responses are drawn."""
    judge_responses: bool = False
    """Judge the collected responses at once, for instance for rejection sampling."""
    questions_per_batch: PositiveInt = 8
    """Questions a local model answers at a time."""
    shard_size: PositiveInt = 8192
    """Responses a full Parquet shard holds. It does not matter for kills: every finished response is on disk at once."""


class JudgeConfig(EndpointConfig):
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


for _model in (DataConfig, StudentConfig):
    _model.model_rebuild()
