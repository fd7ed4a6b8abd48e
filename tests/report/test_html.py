from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from openril.report.html import page_script, page_style, render_page
from support.report_documents import HOSTILE, hostile_document, make_document


def embedded(page: str) -> str:
    return re.search(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)[1]


@pytest.mark.parametrize("kind", HOSTILE)
def test_document_comes_back_from_the_page_as_it_went_in(kind):
    document = hostile_document(kind)
    page = render_page(document).encode("utf-8").decode("utf-8")
    assert json.loads(embedded(page)) == document
    assert page.count("<script") == 2 and page.count("</script") == 2


def test_policy_allows_the_inline_script_and_style_by_their_hashes_alone():
    page = render_page(make_document(steps=2))
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    script, style = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (page_script(), page_style())
    )
    directives = dict(part.strip().split(" ", 1) for part in policy.replace("&#39;", "'").split(";"))
    assert directives == {
        "default-src": "'none'", "img-src": "data:", "script-src": f"'sha256-{script}'",
        "style-src": f"'sha256-{style}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert f"<script>{page_script()}</script>" in page and f"<style>{page_style()}</style>" in page


def test_numbers_that_json_cannot_hold_are_refused():
    document = make_document(steps=2)
    document["runs"][0]["metrics"]["train/kl"][0] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        render_page(document)


def test_served_page_holds_no_inline_code():
    page = render_page({}, mode="served")
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    assert '<script src="/page.js" defer>' in page and '<link rel="stylesheet" href="/page.css">' in page
    assert "<style" not in page and "style=" not in page and "onclick" not in page
