"""Special tokens in text from data and models are taken out, whatever they are hidden in."""

from __future__ import annotations

import random
from typing import ClassVar

import pytest
from tokenizers import AddedToken

from openril.data.sanitize import has_special, remove_tags, special_tokens, strip_disguised_tags, strip_special

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


def test_tags_are_deleted_until_none_is_left() -> None:
    assert remove_tags("a</Response>b< question >c<response x>", ["response", "question"]) == "abc<response x>"
    assert remove_tags("x</resp</response>onse>y", ["response"]) == "xy"


def test_disguised_tags_are_replaced_by_a_space() -> None:
    for tag in ("<note>", "< / NOTE >", "＜note＞", "&lt;note&gt;", "<n\u200bote>", '<note id="x">', "<no<note>te>"):
        assert strip_disguised_tags(f"a{tag}b", {"note"}) == "a b", tag
    assert strip_disguised_tags(" x < y and <other> ", {"note"}) == "x < y and <other>"


def test_special_tokens_are_those_of_the_tokenizer_and_those_added_later() -> None:
    class Tokenizer:
        all_special_tokens: ClassVar = ["</s>"]
        added_tokens_decoder: ClassVar = {
            1: AddedToken("<turn>", special=True),
            2: AddedToken("<box>", special=False),
            3: AddedToken("</s>", special=True),
        }

    assert special_tokens(Tokenizer()) == ["</s>", "<turn>"]
