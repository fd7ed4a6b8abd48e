"""Open lmms-eval's tasks on the hub's data or on a local mirror, and turn their prompts into questions.

Only the worker process imports this module, because lmms-eval's modules read environment variables when they are
imported and the data sets' loader is replaced here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from openril.errors import DataError
from openril.evaluation.suite.benchmarks import Benchmark
from openril.recipe.validation import nearest
from openril.records import IMAGE_MARKER, ImageSource, Question

MODEL_NAME = "openril"
"""The name that lmms-eval looks up for model-specific prompts. It has none for it, so prompts are the default ones."""
THINKING = ("think", "thinking", "thought", "analysis", "reasoning")


@dataclass(frozen=True)
class Source:
    """Where data sets come from. mirror: a folder with one folder a benchmark, or None for the hub and its cache."""

    mirror: Path | None = None


@dataclass
class OpenTask:
    """One lmms-eval task with its questions.

    task: the lmms-eval object. numbers: rows of its data set that are asked.
    """

    benchmark: Benchmark
    name: str
    task: Any
    docs: Any
    numbers: list[int]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the data set, which changes with its content."""
        return str(getattr(self.docs, "_fingerprint", len(self.docs)))

    @property
    def version(self) -> str:
        """The task's version, or "" if it states none."""
        stated = self.task.config.metadata or {}
        return str((stated[0] if isinstance(stated, list) else stated).get("version", ""))

    @property
    def max_new_tokens(self) -> int:
        """The task's own limit of an answer in tokens, or 0 if it has none."""
        return int((self.task.config.generation_kwargs or {}).get("max_new_tokens") or 0)

    def finish(self, text: str) -> str:
        """Cut an answer at the task's stop strings."""
        until = (self.task.config.generation_kwargs or {}).get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text

    def question(self, number: int) -> Question:
        """Return the question in row ``number``."""
        messages = self.task.doc_to_messages(self.docs[number])
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise DataError(f"{self.name}: expected one message of the user, got {len(messages)}.")
        text, images = "", []
        for part in messages[0]["content"]:
            if part["type"] == "text":
                # A literal marker in the text would move an image there; lmms-eval's own models send it as text.
                text += part["text"].replace(IMAGE_MARKER, " ")
            elif part["type"] == "image":
                text += IMAGE_MARKER
                images.append(ImageSource(data=_png(part["url"])))
            else:
                raise DataError(f"{self.name}: expected text and images, got {part['type']!r} in question {number}.")
        return Question(id=f"{self.name}/{number}", question=text, images=tuple(images), origin=f"{self.name}:{number}")


class LazyQuestions(Sequence[Question]):
    """Questions that are built when they are read, because the images of a benchmark may need gigabytes."""

    def __init__(self, task: OpenTask, numbers: Sequence[int]) -> None:
        self.task = task
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self.task.question(n) for n in self.numbers[index]]
        return self.task.question(self.numbers[index])


def open_tasks(benchmark: Benchmark, source: Source, limit: int = 0) -> list[OpenTask]:
    """Return the tasks of a benchmark with their data.

    Args:
        limit: Use only the first questions of each task, at most this many; 0 uses all.

    Raises:
        DataError: If lmms-eval has no such task, or its data are not here.
    """
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(
        "ERROR", include_path=_folders(benchmark), include_defaults=not _folders(benchmark), model_name=MODEL_NAME
    )
    opened = []
    for name in benchmark.tasks:
        if name not in manager.all_subtasks:
            groups = ", ".join(n for n in manager.all_tasks if n.startswith(name) and n != name)
            near = nearest(name, manager.all_subtasks)
            hint = f"Did you mean {near}?" if near else "`lmms-eval tasks list` lists them."
            hint = f"Name tasks, not groups: {groups[:300]}." if groups else hint
            raise DataError(f"--tasks: expected the name of an lmms-eval task, got {name!r}. {hint}")
        with _data_from(source, benchmark, name):
            task = manager.load_task_or_group([name], "chat")[name]
        task.set_config(key="num_fewshot", value=0)
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        numbers = list(range(len(docs)))
        if benchmark.images_only:
            numbers = [n for n, kind in enumerate(docs["data_type"]) if kind == "image"]
        opened.append(OpenTask(benchmark, name, task, docs, numbers[:limit] if limit else numbers))
    return opened


def strip_thinking(text: str) -> str:
    """Remove thinking text. An opening tag that is never closed removes all that follows it, since no answer came."""
    for tag in THINKING:
        start, end = f"<{tag}>", f"</{tag}>"
        while start in text and (close := text.find(end, text.find(start))) >= 0:
            text = text[: text.find(start)] + text[close + len(end) :]
        if end in text and start not in text:  # a template that opens the tag in the prompt
            text = text.rsplit(end, 1)[1]
        text = text.split(start)[0]
    return text.strip()


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _folders(benchmark: Benchmark) -> list[str] | None:
    """Return lmms-eval's folder of a benchmark, so that its two thousand other tasks are not read; None: not known."""
    import lmms_eval.tasks

    names = [benchmark.task, *(benchmark.task.rsplit("_", n)[0] for n in (1, 2))]
    root = Path(lmms_eval.tasks.__file__).parent
    found = [str(root / name) for name in names if (root / name).is_dir()]
    return found[:1] or None


class _data_from:
    """Load data sets from a mirror inside the block, and say plainly what is missing."""

    def __init__(self, source: Source, benchmark: Benchmark, task: str) -> None:
        self.source, self.benchmark, self.task = source, benchmark, task

    def __enter__(self) -> None:
        import datasets
        from lmms_eval.api.task import ConfigurableTask

        self.datasets, self.loader = datasets, datasets.load_dataset
        self.tasks, self.download = ConfigurableTask, ConfigurableTask.download
        # Without lmms-eval's retries: data that are missing stay missing.
        ConfigurableTask.download = getattr(self.download, "__wrapped__", self.download)
        datasets.load_dataset = self.load

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        if self.source.mirror is None:
            try:
                return self.loader(path=path, name=name, **options)
            except Exception as e:  # of many kinds: offline, gated, damaged
                raise DataError(
                    f"{self.benchmark.task}: the data set {path} is not available: {type(e).__name__}: {str(e)[:300]}. "
                    "Allow the download with --download, or set eval.suite_data to a folder that has it."
                ) from e
        folder = find_mirror(self.source.mirror, self.benchmark, path, name)
        return read_mirror(self.datasets, self.loader, folder)

    def __exit__(self, *_: object) -> None:
        self.datasets.load_dataset = self.loader
        self.tasks.download = self.download


def find_mirror(mirror: Path, benchmark: Benchmark, repository: str, configuration: str | None) -> Path:
    """Return the folder of a data set in a mirror: named after the task or after its repository, with a folder inside for
    a configuration if there are several."""
    names = list(dict.fromkeys([benchmark.task, repository.rsplit("/", 1)[-1]]))
    for name in names:
        folder = mirror / name
        if configuration and (folder / configuration).is_dir():
            return folder / configuration
        if folder.is_dir():
            return folder
    raise DataError(
        f"eval.suite_data: expected the data of {benchmark.task} in {' or '.join(str(mirror / n) for n in names)}, got no "
        "such folder. Copy it there, as written by save_to_disk or as Parquet files."
    )


def read_mirror(datasets: Any, load_dataset: Any, folder: Path) -> Any:
    """Return the DatasetDict in a folder."""
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    splits = {}
    for part in sorted(folder.iterdir()):
        if (part / "state.json").is_file():
            splits[part.name] = datasets.load_from_disk(str(part))
    if splits:
        return datasets.DatasetDict(splits)
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        files.setdefault(file.stem.split("-")[0], []).append(str(file))
    if not files:
        raise DataError(f"eval.suite_data: expected Parquet files or a folder of save_to_disk in {folder}, found none.")
    return load_dataset("parquet", data_files=files)
