"""Run by test_stage_memory.py under torchrun: measures steps of sharded runs, and writes what each process found.

usage: sharded_memory.py FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from openril.models.memory_estimate import shape_of_model
from openril.models.stage_memory import stage_memory
from openril.storage import write_json
from openril.training.distributed import leave_process_group, release_memory
from support.loop import make_trainer, tiny_recipe
from support.memory import estimated, measured_step

CASES: dict[str, dict[str, Any]] = {
    "full": {"train__precision": "bfloat16"},
    "lora": {"train__precision": "pure_bf16", "student__lora": {"enabled": True}},
}


def main(folder: Path) -> None:
    for case, changes in CASES.items():
        recipe = tiny_recipe(
            folder / case,
            folder / "medium",
            train__shard=True,
            train__questions_per_step=4,
            train__max_completion_length=8,
            train__max_tokens_per_micro_batch=1,  # each group alone, so that gradients are accumulated
            collect={"max_completion_length": 8},
            discriminator__max_tokens_per_micro_batch=1,
            discriminator__loss="bradley_terry",
            **changes,
        )
        trainer = make_trainer(recipe, folder / "data", count=4)
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        found, peaks = measured_step(trainer)
        shape = replace(shape_of_model(trainer.policy.unwrapped.model), stored="bfloat16")
        [memory] = stage_memory(recipe, shape, trainer.policy.encoder.longest, 8, processes)
        gradients = {k: n for phase in memory.phases.values() for k, n in phase.items() if k.endswith(": gradients")}
        row = {"found": found, "held": memory.held | gradients, "peaks": peaks}
        row |= {"estimated": {p: estimated(memory, p) for p in peaks}}
        # gloo copies what it gathers and reduces, and frees the copies late. NCCL makes none.
        copies = {p: processes * gradients.get(p.replace(" update", ": gradients"), 0) for p in peaks}
        row["of gloo"] = copies | {"sampling": memory.phases["sampling"]["student: gathered weights"] // 2}
        write_json(folder / f"{case}-{rank}.json", row)
        trainer.accelerator.wait_for_everyone()
        del trainer
        release_memory()
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
