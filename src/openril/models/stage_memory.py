"""Estimate the memory that one process of each stage needs.

Without ``train.shard`` every process holds everything, so no part is divided by the number of processes. With it, weights,
gradients and optimizer states are divided, and what a pass gathers is added. Parts that do not exist at the same time are
not added: the phases of a stage follow each other, and the largest decides. What ``train.offload`` parks is on the device
in those phases alone that use it. The formulas are in docs/configuration.md and docs/sharding.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from openril.models.memory_estimate import ADAMW_BYTES, GIB, Shape, Tower
from openril.models.packing import LOGITS_BYTES
from openril.recipe.schema import Recipe

CONTEXT_BYTES = GIB
"""An assumption: what the CUDA context, workspaces of libraries and the communication of processes take of a device."""
_OWN_PROMPT = 256  # tokens of the discriminator's prompt without question and images
_SFT_TILE = (4096, 2**15)  # tokens and words for which TRL computes float32 logits at a time
_LOGITS_OF_A_DRAW = 6  # float32, penalized, sorted, its indices, probabilities, and their sums
_OPTIMIZER_CHUNK = 2**24  # values for which CompensatedAdamW has float32 copies at a time
# Groups of linear layers, which freezing.round_products stores in the type of autocast if they are frozen.
_PRODUCTS = ("attention", "mlp_gate", "mlp_up", "mlp_down", "lm_head", "vision_tower", "projector")
_VISION = ("vision_tower", "projector")
_LAYER = (
    "attention",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "layer_norms",
)  # the units of sharding; the last norm is in the root
_GATHERED_LAYERS = 3  # a layer that runs, and the next one: as it arrives and as its weights are cut from that
_REDUCED_LAYERS = 2  # of which gradients are on their way at a time
_USERS = {
    "student": ("sampling", "student update", "student reduction", "student step"),
    "reference": ("student update", "student reduction", "student step"),
    "discriminator": ("discriminator update", "discriminator reduction", "discriminator step", "discriminator scores"),
}
"""The phases in which a model is on the device with ``train.offload: swap``."""
# Bytes that a layer saves of a token for the backward pass, for each unit of its hidden, query, key-value and intermediate
# size: inputs of norms and matrices, rotated queries and keys, outputs of attention and gates. True: LoRA trains alone.
_SAVED: dict[tuple[str, bool], tuple[int, int, int, int]] = {
    ("float32", False): (24, 16, 16, 16),
    ("float32", True): (16, 12, 12, 16),
    ("bfloat16", False): (26, 10, 10, 8),
    ("bfloat16", True): (18, 8, 8, 8),
    ("pure_bf16", False): (16, 10, 10, 8),
    ("pure_bf16", True): (28, 12, 8, 10),
}


@dataclass(frozen=True)
class Memory:
    """What one process of a stage needs, in bytes by name."""

    stage: str
    held: dict[str, int]
    """On the device during all of the stage."""
    phases: dict[str, dict[str, int]]
    """On the device in addition, by phase."""
    host: dict[str, int] = field(default_factory=dict)
    """In main memory at most, wherever the models are."""
    parked: tuple[str, ...] = ()
    """Parts that wait in main memory in other phases."""

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Everything that is on the device in that phase."""
        return self.held | self.phases[self.phase]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_memory(
    recipe: Recipe,
    shape: Shape,
    prompt_tokens: float,
    image_tokens: float = 0,
    processes: int = 1,
    judge: int = 0,
    discriminator: Shape | None = None,
) -> list[Memory]:
    """Estimate the memory of sft, discriminator and train, as far as the recipe has these stages.

    Args:
        prompt_tokens: Tokens of the longest question, image tokens included.
        image_tokens: Image tokens of the question that has most.
        processes: Their number. Each has a share of the questions of a step, and with train.shard of the models.
        judge: Parameters of a judge that runs in the training process.
        discriminator: Shape of discriminator.init; by default the student's.
    """
    sizes = _Sizes(recipe, shape, int(prompt_tokens), int(image_tokens), processes)
    other = _Sizes(recipe, discriminator or shape, int(prompt_tokens), int(image_tokens), processes)
    stages = [sizes.sft()] if recipe.sft.enabled else []
    if recipe.uses_discriminator and recipe.discriminator.pretraining.enabled:
        held, phases = other.discriminator(pretraining=True)
        stages.append(sizes.offloaded("discriminator", held, phases, sizes.vision_caches(0)))
    return [*stages, sizes.train(judge, other.discriminator() if recipe.uses_discriminator else ({}, {}))]


class _Sizes:
    def __init__(self, recipe: Recipe, shape: Shape, prompt: int, image: int, processes: int) -> None:
        self.recipe, self.shape, self.prompt, self.image, self.processes = recipe, shape, prompt, image, processes
        self.precision = recipe.train.precision
        # Weights of student and discriminator, frozen ones too, are held in one type.
        self.width = 2 if self.precision == "pure_bf16" else 4
        self.compute = 4 if self.precision == "float32" else 2
        self.sharded = recipe.train.shard and processes > 1
        self.share = processes if self.sharded else 1

    def offloaded(
        self, stage: str, held: dict[str, int], phases: dict[str, dict[str, int]], host: dict[str, int]
    ) -> Memory:
        """Move what ``train.offload`` parks from what is always held to the phases that use it."""
        mode = self.recipe.train.offload
        parked = {}
        for name, size in held.items():
            model, _, part = name.partition(": ")
            if mode != "none" and part == "AdamW states":
                users: tuple[str, ...] = (f"{model} step",)
            elif mode == "swap" and stage == "train" and model in _USERS:
                users = _USERS[model]
            else:
                continue
            parked[name] = size
            for user in users:
                if user in phases:
                    phases[user][name] = size
        host |= {"parked by train.offload": sum(parked.values())} if parked else {}
        return Memory(stage, {k: n for k, n in held.items() if k not in parked}, phases, host, tuple(parked))

    def sft(self) -> Memory:
        recipe, words = self.recipe, self.shape.vocabulary
        held, phases = self._student()
        rows = min(recipe.sft.micro_batch_size, max(1, recipe.sft.batch_size // self.processes))
        tokens = rows * (self.prompt + recipe.train.max_completion_length)
        phases["student update"] |= self._activations(self.shape.text, tokens, lora=recipe.student.lora.enabled)
        phases["student update"]["logits"] = 3 * 4 * min(tokens, _SFT_TILE[0]) * min(words, _SFT_TILE[1])
        phases["student update"] |= self._vision(recipe.student.freeze, rows * self.image, rows * self.image)
        return Memory("sft", held, phases)  # which train.offload does not change

    def train(self, judge: int, discriminator: tuple[dict[str, int], dict[str, dict[str, int]]]) -> Memory:
        recipe, train = self.recipe, self.recipe.train
        held, student = self._student()
        if train.beta and not recipe.student.lora.enabled:
            held["reference: weights"] = self._weights(self.shape.parameters, list(self.shape.parameters))
        if judge:
            held["judge: weights"] = 2 * judge
        groups = max(1, train.questions_per_step // self.processes)
        update = student["student update"]
        phases: dict[str, dict[str, int]] = {}
        if recipe.student.sampler.engine == "transformers":
            phases["sampling"] = {k: n for k, n in update.items() if k.endswith("autocast")} | self._sampling(groups)
        elif self.sharded:  # servers get the weights one by one
            words = self.shape.text.hidden * self.shape.vocabulary
            phases["sampling"] = {"student: one gathered matrix": self.width * words}
        held, phases = held | discriminator[0], phases | discriminator[1]
        members = train.num_generations
        members += recipe.teacher_responses_per_question if train.teacher_responses_in_update else 0
        length = train.max_completion_length
        tokens = self._micro_batch(train.max_tokens_per_micro_batch, self.prompt, members, length, groups)
        update |= self._activations(self.shape.text, tokens, lora=recipe.student.lora.enabled)
        if train.packed:  # in pieces, each with its gradient
            update["logits"] = 3 * min(tokens * self.shape.vocabulary * 4, LOGITS_BYTES)
        else:  # those of all responses with their gradient, and one piece in float32
            share = length / (self.prompt + length)
            update["logits"] = int(tokens * share) * self.shape.vocabulary * 2 * self.compute + 3 * LOGITS_BYTES
        images = tokens * self.image // (self.prompt + (members if train.packed else 1) * length)
        update |= self._vision(recipe.student.freeze, max(images, self.image), self.image)
        # The reference has a separate cache if the student's tower trains, and then the student has none.
        return self.offloaded("train", held, phases | student, self.vision_caches(1))

    def discriminator(self, pretraining: bool = False) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Return what the discriminator holds, and its phases. It is the student without its LM head."""
        recipe, d, train, parameters = self.recipe, self.recipe.discriminator, self.recipe.train, self.shape.parameters
        if pretraining:
            groups = d.pretraining.questions_per_step
            students = d.pretraining.responses_per_question or recipe.collect.num_responses
            teachers = d.pretraining.responses_per_question or students * len(recipe.teacher_names)
            length = recipe.collect.max_completion_length
        else:
            groups = math.ceil(train.questions_per_step / (1 - d.replay))
            students, teachers = train.num_generations, recipe.teacher_responses_per_question
            length = max(train.max_completion_length, recipe.collect.max_completion_length)
        members = 2 * max(students, teachers) if d.match_length else students + teachers
        length = min(length, d.max_response_tokens) + 16  # the end of the prompt follows a response
        image = self.image if d.inputs == "image" else 0
        head = _OWN_PROMPT + (0 if d.inputs == "response" else self.prompt - self.image + image)
        trains = d.mode == "updated" or pretraining
        tokens = self._micro_batch(
            d.max_tokens_per_micro_batch,
            head,
            members,
            length,
            max(1, groups // self.processes),
            whole=trains and d.loss == "bradley_terry",
        )
        body = {g: n for g, n in parameters.items() if g != "lm_head"}
        activations = self._activations(self.shape.text, tokens, trains=trains)
        if not trains:
            scores = self._gathered("discriminator", body, list(body)) | activations
            return {"discriminator: weights": self._weights(body, list(body))}, {"discriminator scores": scores}
        frozen: list[str] = [g for g in d.freeze if g != "lm_head"]
        frozen += [] if d.inputs == "image" else _VISION
        held, phases = self._trained("discriminator", body, frozen)
        phases["discriminator update"] |= activations
        phases["discriminator update"] |= self._vision(frozen, max(image, tokens * image // (head + length)), image)
        return held, phases

    def vision_caches(self, of_student: int) -> dict[str, int]:
        of_discriminator = self.recipe.uses_discriminator and self.recipe.discriminator.inputs == "image"
        caches = of_student + int(of_discriminator)
        return {"train.vision_cache_gib": int(caches * self.recipe.train.vision_cache_gib * GIB)} if caches else {}

    def _student(self) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        lora, text, parameters = self.recipe.student.lora, self.shape.text, self.shape.parameters
        if not lora.enabled:
            return self._trained("student", parameters, self.shape.frozen(self.recipe.student.freeze))
        sizes = dict.fromkeys(("q_proj", "o_proj"), text.hidden + text.query)
        sizes |= dict.fromkeys(("k_proj", "v_proj"), text.hidden + text.key_value)
        size = sum(sizes.get(n, text.hidden + text.intermediate) for n in lora.target_modules)
        return self._trained("student", parameters, list(parameters), adapters=text.layers * lora.r * size)

    def _trained(
        self, name: str, groups: dict[str, int], frozen: list[str], adapters: int = 0
    ) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Return what a model that trains always holds, and what its update needs before its activations.

        Gradients are dropped after every step, except with several processes that are not sharded. There they are views
        into DDP's buckets (gradient_as_bucket_view): they count once, and are never dropped. peft keeps adapters in float32.

        Args:
            groups: Parameters by module group. frozen: The groups that do not train.
        """
        text, tied = self.shape.text, "lm_head" not in self.shape.parameters
        trained = {g: n for g, n in groups.items() if g not in frozen}
        trainable = sum(trained.values())
        saved = (
            self.shape.stored == "bfloat16"
        )  # frozen values of other checkpoints are not rounded, because they are saved
        held = {f"{name}: weights": self._weights(groups, frozen, rounds=saved) + 4 * adapters // self.share}
        averages = 4 if name == "discriminator" and self.recipe.discriminator.ema_decay else 0
        held[f"{name}: AdamW states"] = (ADAMW_BYTES + averages) * (trainable + adapters) // self.share
        gradients = {f"{name}: gradients": (trainable * self.width + 4 * adapters) // self.share}
        # Tied embeddings are the LM head's matrix too, except in the discriminator, which has none.
        looked_up = 0 if tied and name != "discriminator" else groups.get("word_embeddings", 0)
        trained_words = trained.get("word_embeddings", 0)
        update: dict[str, int] = {}
        if self.precision == "bfloat16" and not self.sharded:
            # Autocast keeps copies of the matrices that train. Copies of frozen ones are saved for the backward pass, which
            # checkpointing does for one layer at a time.
            copied = trainable + adapters - min(trained_words, looked_up)
            others = sum(
                n
                for g, n in groups.items()
                if g in frozen and g != "vision_tower" and not (saved and self._rounds(g))
            ) - (looked_up if not trained_words else 0)  # fmt: skip
            others = max(0, others) // (text.layers if self.recipe.student.gradient_checkpointing else 1)
            update[f"{name}: bfloat16 copies of autocast"] = 2 * copied
            update |= {f"{name}: bfloat16 copies of frozen weights": 2 * others} if others else {}
        # Of the largest matrix: a gradient and its next term, before they are added to what is accumulated.
        largest = min(trainable, max(trained_words, trained.get("lm_head", 0), text.hidden * text.intermediate))
        update |= {f"{name}: largest gradient": 2 * self.width * largest} if largest else {}
        always, then = (gradients, {}) if self.processes > 1 and not self.sharded else ({}, gradients)
        phases = {f"{name} update": then | update}
        if self.sharded:
            update = self._gathered(name, groups, frozen)
            root, layer = self._unit(trained, frozen)
            layer += adapters // text.layers
            reduced = 4 if self.precision == "bfloat16" else self.compute
            phases[f"{name} update"] = then | update
            gradients_of, moving = f"{name}: gradients of gathered weights", f"{name}: gradients that are reduced"
            phases[f"{name} update"] |= {
                gradients_of: self.compute * (root + largest + _REDUCED_LAYERS * layer),
                moving: reduced * _REDUCED_LAYERS * layer,
            }
            # The root unit's weights are freed before its gradients are copied, reduced, and become this process's part.
            part = max(self.compute * root, reduced * root // self.share)
            phases[f"{name} reduction"] = {**then, gradients_of: part, moving: reduced * root}
        if self.precision == "pure_bf16" or self.recipe.train.offload != "none":
            copies = 28 * min(largest, _OPTIMIZER_CHUNK) if self.precision == "pure_bf16" else 0
            phases[f"{name} step"] = then | ({"float32 copies": copies} if copies else {})
        return held | always, phases

    def _unit(self, groups: dict[str, int], frozen: list[str]) -> tuple[int, int]:
        """Return the parameters of the root unit and of a layer. A frozen vision side is in none."""
        layers = sum(n for g, n in groups.items() if g in _LAYER)
        vision = sum(n for g, n in groups.items() if g in _VISION and g in frozen)
        return sum(groups.values()) - layers - vision, layers // self.shape.text.layers

    def _gathered(self, name: str, groups: dict[str, int], frozen: list[str]) -> dict[str, int]:
        """Return the weights that a pass gathers at a time: the root unit and a few layers."""
        root, layer = self._unit(groups, frozen)
        size = self.compute * (root + _GATHERED_LAYERS * layer)
        return {f"{name}: gathered weights": size} if self.sharded else {}

    def _rounds(self, group: str) -> bool:
        return self.precision == "bfloat16" and group in _PRODUCTS

    def _weights(self, groups: dict[str, int], frozen: list[str], *, rounds: bool = True) -> int:
        """Return the bytes of a model's weights in one process. rounds: Whether autocast's products are stored rounded."""
        total = 0
        for group, n in groups.items():
            size = n * (2 if rounds and group in frozen and self._rounds(group) else self.width)
            total += size if group in frozen and group in _VISION else size // self.share
        return total

    def _sampling(self, groups: int) -> dict[str, int]:
        train, text = self.recipe.train, self.shape.text
        questions = min(train.questions_per_sampling_batch, groups)
        own = train.num_generations * train.max_completion_length
        own = max(own, self.recipe.eval.max_completion_length if train.eval_every else 0)
        own = max(own, self.recipe.eval.suite_max_tokens if train.eval_suite else 0)
        kept = questions * (self.prompt + own)
        matrix = 0  # that is not stored rounded; without gradients autocast does not keep its copy
        gathered = {}
        if self.sharded:  # whole during sampling, and the root unit once more as it arrives
            parameters = self.shape.parameters
            frozen = list(parameters) if self.recipe.student.lora.enabled else self.recipe.student.freeze
            root, layer = self._unit(parameters, [*frozen])
            gathered = {"student: gathered weights": self.compute * (2 * root + text.layers * layer)}
        elif self.precision == "bfloat16":
            rounded = self.recipe.student.lora.enabled and self.shape.stored == "bfloat16"
            tied = "lm_head" not in self.shape.parameters
            vocabulary = self.shape.vocabulary if tied or not rounded else 0
            matrix = text.hidden * max(vocabulary, 0 if rounded else text.intermediate)
        return {
            **gathered,
            "bfloat16 copy of one matrix": 2 * matrix,
            "KV cache": kept * 2 * text.key_value * text.layers * self.compute,
            **self._activations(text, questions * self.prompt, trains=False),
            "logits": questions * train.num_generations * self.shape.vocabulary * 4 * _LOGITS_OF_A_DRAW,
        }

    def _micro_batch(
        self, budget: int, head: int, members: int, length: int, groups: int, *, whole: bool = True
    ) -> int:
        """Return the most tokens of a micro-batch: its budget, unless all groups have fewer or one has more.

        whole: groups are not divided.
        """
        packed = self.recipe.train.packed
        group = head + members * length if packed else members * (head + length)
        return max(group if whole else head + length, min(budget, groups * group))

    def _activations(self, tower: Tower, tokens: int, *, trains: bool = True, lora: bool = False) -> dict[str, int]:
        """Return the bytes of a pass: what the layers save, and what exists inside one layer and around the layers."""
        hidden, query, key_value, intermediate = _SAVED[self.precision, lora]
        layer = hidden * tower.hidden + query * tower.query + key_value * tower.key_value
        layer += intermediate * tower.intermediate
        saved = layer * tower.layers if trains else layer
        if trains and self.recipe.student.gradient_checkpointing:  # the layers' inputs, and one layer that runs again
            saved = layer + tower.layers * tower.hidden * self.width
        inside = 20 * tower.hidden + 12 * tower.query + 12 * tower.intermediate
        return {"activations": tokens * (saved + inside)}

    def _vision(self, frozen: Sequence[str], tokens: int, at_once: int) -> dict[str, int]:
        """Return the part of the vision tower. tokens: image tokens of a micro-batch; at_once: those of one pass."""
        tower = self.shape.vision
        if tower is None or not tokens:
            return {}
        trains = "vision_tower" not in frozen and not self.recipe.student.lora.enabled
        patches = self.shape.patches * (tokens if trains else at_once)
        return {"activations of the vision tower": self._activations(tower, patches, trains=trains)["activations"]}
