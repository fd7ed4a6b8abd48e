"""Models for the demo that are built in a second: random students and teachers, and a judge that accepts every response."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from openril.hf import AutoModelForCausalLM, AutoTokenizer
from openril.storage import write_json
from openril.testing.tiny_models import build_tiny_model
from playground.judge.model import build_judge
from playground.world import corpus

REPLY = "yes. <answer>1</answer>"


def tiny_playground(folder: Path) -> Path:
    """Write a Qwen2.5-VL student, teachers and judge in the layout of `make playground`."""
    texts = corpus(140)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "max_pixels": 84 * 84, "tile_size": 84, "max_tiles": 1}
    build_tiny_model(folder / "student_qwen" / "sft", "qwen2_5_vl", texts=texts, **sizes)
    build_tiny_model(folder / "teacher_a", "qwen2_5_vl", texts=texts, seed=1, **sizes)
    build_tiny_model(folder / "teacher_b", "internvl", texts=texts, tokenizer="unigram", seed=2, **sizes)
    approving_judge(folder / "judge", texts)
    write_json(folder / "judge" / "agreement.json", {"agreement": 0.5, "num_verdicts": 2, "by_skill": {}})
    return folder


def approving_judge(folder: Path, texts: list[str]) -> None:
    """Write a judge whose next token depends only on the last one: after the prompt it writes ``REPLY`` and ends."""
    folder.mkdir(parents=True)
    build_judge(folder, [*texts, *[REPLY] * 50], hidden_size=64, num_layers=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    chain = [tokenizer(prompt)["input_ids"][-1], *tokenizer(REPLY)["input_ids"], tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain) <= 64, chain
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "output_linear.weight")):
                weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_()
        head.zero_()
        for place, (token, follower) in enumerate(pairwise(chain)):
            embeddings[token, place] = 1.0
            head[follower, place] = 1.0
    model.save_pretrained(folder)
