"""Small copies of the fourteen benchmarks in their official schemas, with pictures drawn on the spot.

``write_benchmarks(folder)`` makes a mirror for ``eval.suite_data``. Columns, types and encodings are those of the data
sets that lmms-eval reads: options as Python text (MMMU), choices as columns A to D with the text "nan" for missing ones
(MMBench), circular copies with index + 1,000,000, several images (MMMU, BLINK, MM-Vet-v2), lists of images (SEED).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COUNT = 12
COLORS = ("red", "green", "blue", "yellow")
LETTERS = "ABCD"
BLINK = {
    "Art_Style": 2, "Counting": 1, "Forensic_Detection": 4, "Functional_Correspondence": 2, "IQ_Test": 1, "Jigsaw": 3,
    "Multi-view_Reasoning": 2, "Object_Localization": 1, "Relative_Depth": 1, "Relative_Reflectance": 1,
    "Semantic_Correspondence": 2, "Spatial_Relation": 1, "Visual_Correspondence": 2, "Visual_Similarity": 3,
}  # fmt: skip
"""Configurations of BLINK and the number of their images."""


def picture(number: int, size: int = 40) -> Image.Image:
    """Return a picture with one square in one of four colors."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 30, 30), fill=COLORS[number % 4])
    return image


def _rows(make: Any, count: int = COUNT) -> list[dict[str, Any]]:
    return [make(n) for n in range(count)]


def ai2d(n: int) -> dict[str, Any]:
    return {
        "question": f"Which color is square {n}?",
        "options": list(COLORS),
        "answer": str(n % 4),
        "image": picture(n),
    }


def chartqa(n: int) -> dict[str, Any]:
    kind = "human_test" if n % 2 else "augmented_test"
    return {"type": kind, "question": f"What is value {n}?", "answer": str(10 * n + 1), "image": picture(n)}


def mathvista(n: int) -> dict[str, Any]:
    several = n % 3 == 0
    answer_type = "text" if several else "integer" if n % 3 == 1 else "float"
    return {
        "pid": str(n + 1),
        "question": f"How many squares are in figure {n}?",
        "image": f"images/{n + 1}.jpg",
        "decoded_image": picture(n),
        "choices": list(COLORS) if several else None,
        "unit": None,
        "precision": 1.0 if answer_type == "float" else None,
        "answer": COLORS[n % 4] if several else str(n) if answer_type == "integer" else f"{n}.5",
        "question_type": "multi_choice" if several else "free_form",
        "answer_type": answer_type,
        "metadata": {
            "category": "general-vqa", "context": "synthetic scene", "grade": "daily life", "img_height": 40,
            "img_width": 40, "language": "english", "skills": ["numeric commonsense"], "source": "CLEVR-Math",
            "split": "testmini", "task": "visual question answering",
        },
        "query": f"Hint: answer.\nQuestion: How many squares are in figure {n}?",
    }  # fmt: skip


def mmbench(index: int, shift: int) -> dict[str, Any]:
    """One copy of a question. Question 3 has two choices; the others have four."""
    choices = list(COLORS)[: 2 if index == 3 else 4]
    turned = [choices[(i + shift) % len(choices)] for i in range(len(choices))]
    answer = LETTERS[turned.index(COLORS[index % len(choices)])]
    return {
        "index": index + 1_000_000 * shift,
        "question": f"Which color is square {index}?",
        "hint": "nan",
        "answer": answer,
        **{c: turned[i] if i < len(turned) else "nan" for i, c in enumerate(LETTERS)},
        "category": "attribute_recognition",
        "image": picture(index),
        "source": "drawn",
        "L2-category": "finegrained_perception",
        "comment": "nan",
        "split": "dev",
    }


def mmbench_rows() -> list[dict[str, Any]]:
    return [mmbench(i, s) for i in range(COUNT) for s in range(2 if i == 3 else 4)]


def mmvet(n: int) -> dict[str, Any]:
    return {
        "question_id": f"v1_{n}",
        "image": picture(n),
        "question": f"What is x in equation {n}?",
        "answer": "-1<AND>-5" if n % 2 else "red<OR>crimson",
        "image_source": "drawn",
        "capability": "rec,ocr" if n % 2 else "math",
        "imagesource": "drawn",
    }


def mmvetv2(n: int) -> dict[str, Any]:
    several = n % 3 == 0
    images = {f"image_{i}": picture(n + i) if i < (2 if several else 1) else None for i in range(17)}
    first = "<IMG><image_0><IMG>"
    text = f"{first}Compare {n} with<IMG><image_1><IMG>." if several else f"{first}Name the color of {n}."
    return {
        "id": f"v2_{n}",
        "question": text,
        "answer": COLORS[n % 4],
        "capability": ["rec", "seq"] if several else ["rec"],
        "added_in": "v2",
        **images,
    }


def mmmu(n: int) -> dict[str, Any]:
    several, two = n % 4 != 3, n % 5 == 0
    subject = ("Art", "Math")[n % 2]
    text = f"<image 1> Which color has square {n}?" + (" Compare <image 2>." if two else "")
    return {
        "id": f"validation_{subject}_{n}",
        "question": text,
        "options": str(list(COLORS)) if several else "[]",
        "explanation": "",
        **{f"image_{i}": picture(n + i) if i <= (2 if two else 1) else None for i in range(1, 8)},
        "img_type": "['Drawings']",
        "answer": LETTERS[n % 4] if several else "42",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if several else "open",
        "subfield": "Color",
    }


def mmmu_pro_standard(n: int) -> dict[str, Any]:
    options = [*COLORS, *(f"color {i}" for i in range(4, 10))]
    return {
        "id": f"test_Art_{n}",
        "question": f"<image 1> Which color has square {n}?",
        "options": str(options),
        "explanation": "",
        **{f"image_{i}": picture(n) if i == 1 else None for i in range(1, 8)},
        "img_type": "['Drawings']",
        "answer": LETTERS[n % 4],
        "topic_difficulty": "Easy",
        "subject": "Art" if n % 2 else "Math",
    }


def mmmu_pro_vision(n: int) -> dict[str, Any]:
    options = [*COLORS, *(f"color {i}" for i in range(4, 10))]
    return {
        "id": f"test_Art_{n}",
        "image": picture(n),
        "options": str(options),
        "answer": LETTERS[n % 4],
        "subject": "Art" if n % 2 else "Math",
    }


def mmstar(n: int) -> dict[str, Any]:
    category, l2 = (("math", "geometry"), ("coarse perception", "image emotion"), ("math", "statistical reasoning"))[
        0 if n < 6 else 1 if n < 10 else 2
    ]
    options = ", ".join(f"{c}: {color}" for c, color in zip(LETTERS, COLORS, strict=True))
    return {
        "index": n,
        "question": f"Which color has square {n}?\nOptions: {options}",
        "image": picture(n),
        "answer": LETTERS[n % 4],
        "category": category,
        "l2_category": l2,
        "meta_info": {"source": "drawn", "split": "val", "image_path": f"{n}.jpg"},
    }


def blink(configuration: str, images: int, n: int) -> dict[str, Any]:
    choices = ["the first", "the second"] if images > 1 else list(COLORS)
    listed = "\n".join(f"({LETTERS[i]}) {c}" for i, c in enumerate(choices))
    return {
        "idx": f"val_{configuration}_{n}",
        "question": f"Which one is {n}?",
        "sub_task": configuration,
        **{f"image_{i}": picture(n + i) if i <= images else None for i in range(1, 5)},
        "choices": choices,
        "answer": f"({LETTERS[n % len(choices)]})",
        "prompt": f"Which one is {n}?\nSelect from the following choices.\n{listed}",
        "explanation": "",
    }


def seedbench(n: int) -> dict[str, Any]:
    """Every fourth question is about a video of three frames."""
    video = n % 4 == 3
    return {
        "answer": LETTERS[n % 4],
        **{f"choice_{c}": color for c, color in zip("abcd", COLORS, strict=True)},
        "data_id": f"{n}.jpg",
        "data_type": "video" if video else "image",
        "question": f"Which color has square {n}?",
        "question_id": str(n),
        "question_type_id": 1,
        "image": [picture(n + i) for i in range(3 if video else 1)],
        "segment": [0, 1] if video else None,
    }


def seedbench_2_plus(n: int) -> dict[str, Any]:
    return {
        "question_id": str(n),
        "question": f"Which color has square {n}?",
        **{f"choice_{c}": color for c, color in zip(LETTERS, COLORS, strict=True)},
        "answer": LETTERS[n % 4],
        "data_id": f"{n}.png",
        "question_image_type": ("chart", "map", "web")[n % 3],
        "question_image_subtype": str(n % 3),
        "image": picture(n),
    }


def realworldqa(n: int) -> dict[str, Any]:
    asks = "\nPlease answer directly with only the letter of the correct option and nothing else."
    listed = "\n".join(f"{c}. {color}" for c, color in zip(LETTERS, COLORS, strict=True))
    if n % 4 == 3:
        return {"image": picture(n), "question": f"How many squares are in {n}?", "answer": str(n), "image_path": ""}
    return {
        "image": picture(n),
        "question": f"Which color has square {n}?\n{listed}{asks}",
        "answer": LETTERS[n % 4],
        "image_path": f"{n}.webp",
    }


def write_benchmarks(folder: Path) -> Path:
    """Write all fourteen, some with ``save_to_disk`` and some as Parquet, and return the folder."""
    many = int(COUNT * 4 / 3)
    _save(folder / "ai2d", "test", _rows(ai2d))
    _parquet(folder / "ChartQA" / "data", "test", _rows(chartqa))
    _save(folder / "mathvista_testmini_format", "testmini", _rows(mathvista))
    _parquet(folder / "MMBench" / "en", "dev", mmbench_rows())
    _parquet(folder / "MMBench" / "cn", "dev", mmbench_rows())
    _save(folder / "mmvet", "test", _rows(mmvet))
    _save(folder / "mmvetv2", "test", _rows(mmvetv2))
    _save(folder / "mmmu_val", "validation", _rows(mmmu, 14))
    _parquet(folder / "mmmu_pro" / "standard (10 options)", "test", _rows(mmmu_pro_standard))
    _parquet(folder / "mmmu_pro" / "vision", "test", _rows(mmmu_pro_vision))
    _parquet(folder / "mmstar", "val", _rows(mmstar))
    for configuration, images in BLINK.items():
        rows = [blink(configuration, images, n) for n in range(2)]
        _parquet(folder / "blink" / configuration, "val", rows)
    _save(folder / "seedbench", "test", _rows(seedbench, many))
    _parquet(folder / "SEED-Bench-2-Plus" / "data", "test", _rows(seedbench_2_plus))
    _parquet(folder / "RealWorldQA" / "data", "test", _rows(realworldqa))
    return folder


def write_hub_cache(home: Path) -> None:
    """Write AI2D as `datasets` keeps it in HF_HOME after a download."""
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter

    folder = home / "datasets" / "lmms-lab-encoder___ai2d" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    data = _dataset(_rows(ai2d))
    with ArrowWriter(path=str(folder / "ai2d-test.arrow"), features=data.features) as writer:
        writer.write_table(data.data.table)
    splits = SplitDict({"test": SplitInfo("test", num_examples=len(data), dataset_name="ai2d")})
    names = {"builder_name": "parquet", "dataset_name": "ai2d", "config_name": "default", "version": "0.0.0"}
    DatasetInfo(features=data.features, splits=splits, **names).write_to_directory(str(folder))


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, List
    from datasets import Image as ImageColumn

    data = {key: [row[key] for row in rows] for key in rows[0]}
    dataset = Dataset.from_dict(data)
    for name, values in data.items():
        if name.startswith(("image_", "image")) and name not in ("image_source", "image_path", "imagesource"):
            first = next((v for v in values if v is not None), None)
            if first is None:
                dataset = dataset.cast_column(name, ImageColumn())
            elif isinstance(first, list):
                dataset = dataset.cast_column(name, List(ImageColumn()))
    return dataset


def _save(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    from datasets import DatasetDict

    DatasetDict({split: _dataset(rows)}).save_to_disk(str(folder))


def _parquet(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _dataset(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
