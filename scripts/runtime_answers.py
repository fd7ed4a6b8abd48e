"""Compare the greedy answers of a checkpoint converted to OpenVINO or MLX with those that ``ril eval`` wrote.

    python scripts/runtime_answers.py openvino MODEL QUESTIONS.jsonl RUN_DIR/eval/final.jsonl --number 50

Run it in the environment of the runtime; it imports nothing of openril. It asks the first questions without options, whose
prompt is the question alone, and prints how many answers are equal to the letter.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Answer = Callable[[str, list[Path]], str]
MAX_TOKENS = 64


def openvino(folder: str) -> Answer:
    from optimum.intel import OVModelForVisualCausalLM
    from transformers import AutoProcessor

    model, processor = OVModelForVisualCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def answer(question: str, images: list[Path]) -> str:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], images=[Image.open(path) for path in images], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return str(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])

    return answer


def mlx(folder: str) -> Answer:
    from mlx_vlm import generate, load

    model, processor = load(folder)

    def answer(question: str, images: list[Path]) -> str:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        out = generate(model, processor, prompt, [str(path) for path in images], max_tokens=MAX_TOKENS, temperature=0.0)
        return str(out.text)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=["openvino", "mlx"])
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--number", type=int, default=50)
    args = parser.parse_args()
    answer = {"openvino": openvino, "mlx": mlx}[args.runtime](args.model)
    rows = map(json.loads, args.evaluation.read_text(encoding="utf-8").splitlines())
    known = {row["question_id"]: row["text"] for row in rows if "question_id" in row}
    asked = [
        r for r in map(json.loads, args.questions.read_text(encoding="utf-8").splitlines()) if not r.get("choices")
    ]
    asked = asked[: args.number]
    same = 0
    for row in asked:
        found = answer(row["question"], [args.questions.parent / name for name in row["images"]])
        equal = found.strip() == known[row["id"]].strip()
        same += equal
        if not equal:
            print(f"{row['id']}: {found!r} instead of {known[row['id']]!r}")
    print(f"{same} of {len(asked)} answers are the same")


if __name__ == "__main__":
    main()
