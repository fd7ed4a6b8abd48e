"""The peer: an unchanged GRPOTrainer of TRL, run by its own ``train()``, one optimizer step for each command.

A callback stops the trainer at the beginning of every step until the next command arrives. The parts of a step are timed
around TRL's own methods. Only for ``update``, given token ids replace TRL's generation; everything after it (image
processing for the passes, padding, reference, loss, backward, optimizer) is TRL's.

These settings favor it: no logging, evaluation, saving or gradient checkpointing, its default fused AdamW, its fused LM
head (logits at response positions only), no pass for pi_old (one step per generation), and one list of suppressed
special tokens, as in ours.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from openril.benchmarking.contender import BETA, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, SAMPLING, Contender
from openril.benchmarking.measuring import give_back
from openril.benchmarking.shapes import QUESTIONS
from openril.benchmarking.worker import Command, Measurement, Spec, next_command
from openril.hf import GRPOConfig, GRPOTrainer, TrainerCallback, submodule
from openril.models.freezing import freeze
from openril.models.loading import load_model, load_processor
from openril.models.prompts import special_token_ids
from openril.rewards.rules import score


def serve(pipe: Pipe, spec: Spec) -> None:
    """Set up, then measure until there are no more commands (``Finished``)."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    TRLStep(spec, pipe).trainer.train()
    raise RuntimeError("TRL's training ended before the last command")


def config(spec: Spec) -> dict[str, Any]:
    """Return the arguments of GRPOConfig, which the results repeat."""
    shape = spec.shape
    rows = spec.micro_batch_rows or shape.rows
    assert shape.rows % rows == 0, (shape.rows, rows)
    return {
        "use_cpu": spec.device == "cpu",
        "bf16": spec.precision == "bfloat16",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": shape.rows // rows,
        "num_generations": shape.group_size,
        "max_completion_length": shape.response_tokens,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": BETA,
        "epsilon": EPSILON,
        "num_iterations": 1,
        "use_bias_correction_kl": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        **SAMPLING,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1_000_000,
    }


class TRLStep(Contender):
    """A GRPOTrainer that executes the commands of a pipe, one step at a time."""

    def __init__(self, spec: Spec, pipe: Pipe) -> None:
        super().__init__(spec)
        self.pipe = pipe
        self.command: Command | None = None
        self._started = self.watch.mark()
        self._announced = False
        self._owed: Measurement | None = None
        dtype = torch.bfloat16 if spec.precision == "pure_bf16" else torch.float32
        # The model is passed as an object, so that the same parts are frozen before TRL builds its optimizer.
        model: Any = load_model(str(spec.checkpoint), what="TRL's model", dtype=dtype)
        freeze(model, ["vision_tower"])
        processor = load_processor(str(spec.checkpoint), what="TRL's model")
        self.banned = sorted(special_token_ids(processor.tokenizer))
        self.config = config(spec)
        steps = len(spec.pictures) // QUESTIONS
        questions = [q for call in range(steps) for q in self.questions(call)]
        dataset = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": q.question}],
                    "images": [Image.open(str(q.images[0].path))],
                    "answer": q.answer,
                }
                for q in questions
            ]
        )
        self._rule_question = questions[0]
        trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=self._reward,
            args=GRPOConfig(
                output_dir=str(spec.folder / "trl"),
                # Without an end-of-turn token every response has the full length.
                generation_kwargs={"suppress_tokens": self.banned},
                **self.config,
            ),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[_Gate(self)],
        )
        self.trainer, self.dataset = trainer, dataset
        self._generate = trainer._generate
        trainer._generate = self._generate_or_give
        self.watch.watch("sampling", trainer, "_generate")
        self.watch.watch("rewards", trainer, "_calculate_rewards")
        self.watch.watch("forward_backward", trainer, "compute_loss")
        self.watch.watch("forward_backward", trainer.accelerator, "backward")
        self.watch.watch("reference", trainer.ref_model, "forward")

    def _reward(self, completions: list[Any], **_: Any) -> list[float | None]:
        """Score completions by the same rule as our rewards."""
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [score("contains", self._rule_question, text) or 0.0 for text in texts]

    # ---- called by the callback -------------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        """Reply with the previous step's measurement, wait for a command, and return when it needs a trainer step.

        The reply is not sent at the end of that step, because the trainer's work between steps (it loads the next batch)
        would then run while another contender is measured.
        """
        if not self._announced:
            self._announced = True
            self.watch.watch("optimizer", getattr(optimizer, "optimizer", optimizer), "step")
            self.pipe.send(self._about(optimizer))
        if self._owed is not None:
            self.pipe.send(self._owed)
            self._owed = None
        while (command := next_command(self.pipe)).part == "sampling":
            self.pipe.send(self._sampling(command.call))
        self.command, self.watch.seconds = command, {}
        if command.part == "memory":
            self.memory.start()
        self._started = self.watch.mark()

    def end(self) -> None:
        """Stop the clock of the current command."""
        assert self.command is not None
        seconds, cpu_seconds = self.watch.since(self._started)
        part = self.command.part
        peak, held = (self.memory.peak(), self.memory.held) if part == "memory" else (None, None)
        parts = dict(self.watch.seconds)
        sampling, rewards = parts.pop("sampling"), parts.pop("rewards")
        update = seconds - sampling - rewards
        parts["prepare"] = update - sum(parts.values())
        if part == "update":
            # The processor time of the replaced generation cannot be separated, so its share of the seconds is taken off.
            seconds, cpu_seconds = update, cpu_seconds * update / seconds
        else:
            inner = {f"update/{k}": v for k, v in parts.items()}
            parts = {"sampling": sampling, "rewards": rewards, "update": update, **inner}
        tokens = self.shape.rows * self.shape.response_tokens
        self._owed = Measurement(seconds, parts, tokens, cpu_seconds, peak, held)
        if part == "memory":
            give_back()

    def _about(self, optimizer: Any) -> dict[str, Any]:
        ids, _, _ = self.trainer._tokenize_prompts(self._prompts(0)[:1])
        optim = str(self.trainer.args.optim)
        settings = {**self.config, "optim": optim, "suppress_tokens": self.banned}
        return self.describe(len(ids[0]), self.trainer.model, optimizer, **settings)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _prompts(self, call: int) -> list[Any]:
        """Return the messages that TRL's own step passes to its generation: each question group_size times."""
        prepare = submodule("trl.data_utils").prepare_multimodal_messages
        first = (call * QUESTIONS) % len(self.dataset)
        rows = [self.dataset[(first + j) % len(self.dataset)] for j in range(QUESTIONS)]
        return [prepare(r["prompt"], images=r["images"]) for r in rows for _ in range(self.shape.group_size)]

    def _sampling(self, call: int) -> Measurement:
        prompts = self._prompts(call)
        self.trainer.model.train()  # as in a step: the trainer's method reads its settings from this
        started = self.watch.mark()
        _, ids, *_ = self._generate(prompts)
        seconds, cpu_seconds = self.watch.since(started)
        self.check([len(i) for i in ids])
        return Measurement(seconds, {}, self.shape.rows * self.shape.response_tokens, cpu_seconds)

    def _generate_or_give(self, prompts: list[Any]) -> Any:
        """Run TRL's generation, or return the given responses in its format for ``update``."""
        assert self.command is not None
        if self.command.part != "update":
            out = self._generate(prompts)
            self.check([len(i) for i in out[1]])
            return out
        prompt_ids, images, _ = self.trainer._tokenize_prompts(prompts)
        rows, call = self.shape.group_size, self.command.call
        ids = [row for j in range(QUESTIONS) for row in self.completions(call, j, rows)]
        texts = self.trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return prompt_ids, ids, None, completions, None, {}, images, []


class _Gate(TrainerCallback):
    """Run TRL's loop one step at a time."""

    def __init__(self, step: TRLStep) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.step.begin(optimizer)

    def on_step_end(self, args, state, control, **_):
        self.step.end()
