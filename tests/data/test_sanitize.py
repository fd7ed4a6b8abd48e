"""Special tokens in text from data and models are taken out, whatever they are hidden in."""

from __future__ import annotations

import random

import pytest

from openril.data.sanitize import has_special, strip_special

TOKENS = [
    "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|eot_id|>", "<image>", "<IMG_CONTEXT>",
    "<img>", "</img>", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<image_soft_token>",
    "<unused99>", "<fake_token_around_image>", "<row_1_col_2>", "<global-img>",
    "[IMG]", "<\uFF5CUser\uFF5C>", "<bos>", "<pad>",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_every_kind_of_token_goes(token: str) -> None:
    assert strip_special(f"a{token}b") == "a b"


def test_nesting_does_not_rebuild_a_token() -> None:
    for token in TOKENS:
        for cut in range(1, len(token)):
            text = token[:cut] + token + token[cut:]
            assert token not in strip_special(text), text


def test_extra_tokens_and_their_nesting() -> None:
    assert strip_special("x</response>y", extra=["</response>"]) == "x y"
    assert "</response>" not in strip_special("</resp</RESPONSE>onse>", extra=["</response>"])


def test_extra_with_a_space_cannot_be_built_from_the_space_left_behind() -> None:
    assert "a b" not in strip_special("a<s>b", extra=["a b"])


def test_twice_is_once() -> None:
    rng = random.Random(0)
    pieces = [*TOKENS, "<|", "|>", "<", ">", "|", "im_", "end", "[", "INST]", " ", "x"]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        once = strip_special(text, extra=["x x"])
        assert strip_special(once, extra=["x x"]) == once
        assert not any(t.lower() in once.lower() for t in TOKENS)


@pytest.mark.parametrize(
    "text", ["a < b and b > a", "if x|y: f(<|)", "x<y>z", "<b>bold</b>", "日本語 🙂 [1]", "<answer>"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert strip_special(text) == text and not has_special(text)


def test_markers_stay_where_they_are_wanted() -> None:
    assert strip_special("<image> and <|im_end|> <image>", keep_markers=True) == "<image> and   <image>"


def test_long_hostile_text_is_quick() -> None:
    strip_special("<|" * 50_000 + "|>" * 50_000)
