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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from openril.benchmarking.clock import Clock, Elapsed, Stopwatch
from openril.benchmarking.contender import (
    BETA,
    EPSILON,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    SAMPLING,
    Command,
    Connection,
    Measurement,
    Spec,
    exactly,
)
from openril.benchmarking.memory import PeakMemory, give_back
from openril.benchmarking.questions import fixed_completions, questions_of
from openril.benchmarking.shapes import QUESTIONS
from openril.hf import TrainerCallback
from openril.models.freezing import freeze
from openril.models.loading import load_model, load_processor
from openril.models.prompts import special_token_ids
from openril.rewards.rules import score


def serve(spec: Spec, connection: Connection) -> None:
    """Set up, then measure until there are no more commands (``Finished``)."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    step = TRLStep(spec, connection)
    step.trainer.train()
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


class TRLStep:
    """A GRPOTrainer that executes the commands of a connection, one step at a time."""

    def __init__(self, spec: Spec, connection: Connection) -> None:
        from datasets import Dataset
        from PIL import Image

        from openril.hf import GRPOConfig, GRPOTrainer

        self.spec, self.shape, self.connection = spec, spec.shape, connection
        self.clock = Clock(spec.device)
        self.watch = Stopwatch(self.clock)
        self.memory = PeakMemory(spec.device)
        self.command: Command | None = None
        self._timing = ExitStack()
        self._elapsed = Elapsed()
        self._announced = False
        self._owed: Measurement | None = None
        dtype = torch.bfloat16 if spec.precision == "pure_bf16" else torch.float32
        # The model is passed as an object, so that the same parts are frozen before TRL builds its optimizer.
        model: Any = load_model(spec.checkpoint, what="TRL's model", dtype=dtype)
        freeze(model, ["vision_tower"])
        processor = load_processor(spec.checkpoint, what="TRL's model")
        self.banned = sorted(special_token_ids(processor.tokenizer))
        self.config = config(spec)
        steps = len(spec.pictures) // QUESTIONS
        questions = [q for call in range(steps) for q in questions_of(spec.picture_paths, call)]
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
        reward: Any = self._reward
        trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(Path(spec.folder) / "trl"),
                # Without an end-of-turn token every response has the full length.
                generation_kwargs={"suppress_tokens": self.banned},
                **self.config,
            ),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[_Gate(self)],
        )
        self.trainer = trainer
        self.dataset = dataset
        self._generate = trainer._generate
        trainer._generate = self.watch.wrap("sampling", self._generate_or_give)
        trainer._calculate_rewards = self.watch.wrap("rewards", trainer._calculate_rewards)
        trainer.compute_loss = self.watch.wrap("forward_backward", trainer.compute_loss)
        trainer.accelerator.backward = self.watch.wrap("forward_backward", trainer.accelerator.backward)
        self.watch.watch_module("reference", trainer.ref_model)

    def _reward(self, completions: list[Any], **_: Any) -> list[float]:
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
            self.watch.watch_optimizer("optimizer", optimizer)
            self.connection.ready(self._about(optimizer))
        if self._owed is not None:
            self.connection.reply(self._owed)
            self._owed = None
        while True:
            self.command = self.connection.next()
            if self.command.part != "sampling":
                break
            self.connection.reply(self._sampling(self.command.call))
        self.watch.reset()
        if self.command.part == "memory":
            self.memory.start()
        self._elapsed = self._timing.enter_context(self.clock.elapsed())

    def end(self) -> None:
        """Stop the clock of the current command."""
        assert self.command is not None
        self._timing.close()
        seconds, cpu_seconds = self._elapsed.seconds, self._elapsed.cpu_seconds
        part = self.command.part
        peak = self.memory.peak() if part == "memory" else None
        parts = dict(self.watch.seconds)
        sampling, rewards = parts.pop("sampling"), parts.pop("rewards")
        update = seconds - sampling - rewards
        inner = parts | {"prepare": update - sum(parts.values())}
        tokens = self.shape.rows * self.shape.response_tokens
        if part == "update":
            # The processor time of the replaced generation cannot be separated, so its share of the seconds is taken off.
            measurement = Measurement(update, inner, tokens, cpu_seconds * update / seconds)
        else:
            in_step = {"sampling": sampling, "rewards": rewards, "update": update}
            in_step |= {f"update/{k}": v for k, v in inner.items()}
            held = self.memory.held if part == "memory" else None
            measurement = Measurement(seconds, in_step, tokens, cpu_seconds, peak, held)
        if part == "memory":
            give_back()
        self._owed = measurement

    def _about(self, optimizer: Any) -> dict[str, Any]:
        trainable = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        ids, _, _ = self.trainer._tokenize_prompts(self._prompts(0)[:1])
        return {
            "prompt_tokens": len(ids[0]),
            "trainable_parameters": trainable,
            "threads": torch.get_num_threads(),
            "memory_source": self.memory.source,
            "settings": {
                **self.config,
                "precision": self.spec.precision,
                "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
                "optim": str(self.trainer.args.optim),
                "suppress_tokens": self.banned,
            },
        }

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _prompts(self, call: int) -> list[Any]:
        """Return the messages that TRL's own step passes to its generation: each question group_size times."""
        from openril.hf import submodule

        prepare_multimodal_messages = submodule("trl.data_utils").prepare_multimodal_messages

        first = (call * QUESTIONS) % len(self.dataset)
        rows = [self.dataset[(first + j) % len(self.dataset)] for j in range(QUESTIONS)]
        return [
            prepare_multimodal_messages(row["prompt"], images=row["images"])
            for row in rows
            for _ in range(self.shape.group_size)
        ]

    def _sampling(self, call: int) -> Measurement:
        prompts = self._prompts(call)
        self.trainer.model.train()  # as in a step: the trainer's method reads its settings from this
        with self.clock.elapsed() as elapsed:
            _, ids, *_ = self._generate(prompts)
        exactly([len(i) for i in ids], self.shape.response_tokens, "TRL")
        return Measurement(elapsed.seconds, {}, self.shape.rows * self.shape.response_tokens, elapsed.cpu_seconds)

    def _generate_or_give(self, prompts: list[Any]) -> Any:
        """Run TRL's generation, or return the given responses in its format for ``update``."""
        assert self.command is not None
        if self.command.part != "update":
            out = self._generate(prompts)
            exactly([len(i) for i in out[1]], self.shape.response_tokens, "TRL")
            return out
        prompt_ids, images, _ = self.trainer._tokenize_prompts(prompts)
        shape = self.shape
        ids = [
            row
            for j in range(QUESTIONS)
            for row in fixed_completions(
                QUESTIONS * self.command.call + j,
                shape.group_size,
                shape.response_tokens,
                shape.size.vocab,
                self.banned,
            )
        ]
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
