"""Nothing that models, data or file names contribute runs in the page, leaves it, or breaks its layout."""

from __future__ import annotations

import pytest

from support.report_documents import HOSTILE, hostile_document, make_document

TABS = ("overview", "groups", "discriminator", "audit", "teachers")
LOOK = r"""() => ({
    tab: document.querySelector("main").dataset.tab,
    overflow: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    // The page has one script, and nothing else may hold code.
    unsafe: document.querySelectorAll(
        "script:not(#document), [onerror], [onload], [onfocus], iframe, object, animate, a[href^=javascript]").length - 1,
    controls: /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufeff]/.test(document.body.innerText),
    unisolated: [...document.querySelectorAll("bdi, .text")]
        .filter((e) => !getComputedStyle(e).unicodeBidi.includes("isolate")).length,
    cards: document.querySelectorAll(".card[data-group]").length,
})"""


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_in_every_field_neither_runs_nor_breaks_the_layout(kind, open_report):
    watched = open_report(hostile_document(kind))
    for width in (1280, 390):
        watched.page.set_viewport_size({"width": width, "height": 900})
        for tab in TABS:
            watched.show(f"tab={tab}")
            good = {"tab": tab, "overflow": 0, "unsafe": 0, "controls": False, "unisolated": 0}
            assert watched.page.evaluate(LOOK) == {**good, "cards": 12 if tab == "groups" else 0}, width
    assert watched.problems() == []


def test_hostile_text_is_shown_as_text(open_report):
    watched = open_report(hostile_document("script"), "#tab=groups")
    assert HOSTILE["script"] in watched.page.locator(".card .asked").first.inner_text()
    assert HOSTILE["script"] in watched.page.title()
    watched = open_report(hostile_document("characters"), "#tab=groups")
    text = watched.page.locator(".card .asked").first.inner_text()
    assert "⟨U+202E⟩gnihton" in text and "a␀b␛[31m␇⟨U+007F⟩" in text and "half ⟨U+D83D⟩ and ⟨U+DC00⟩" in text


def test_hostile_addresses_are_ignored(open_report):
    watched = open_report(
        make_document(runs=2), "#tab=__proto__&sort=constructor&flags=toString,cut&run=x&step_min=-1e9"
    )
    assert watched.page.evaluate("document.querySelector('main').dataset.tab") == "overview"
    watched.show("tab=groups&group=%22%5D%3Cscript%3E&sort=__proto__&run=99999&shown=999999999")
    assert watched.cards() == []
    watched.show("tab=groups&q=" + "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    assert watched.page.input_value("#search") == "<img src=x onerror=alert(1)>"
    assert watched.problems() == []


def test_long_responses_are_shortened_searched_and_shown_whole(open_report):
    document = make_document(steps=3)
    document["groups"][0]["members"][0]["text"] = "word " * 200_000 + "needle"
    document["groups"][1]["members"][0]["text"] = "W" * 1_000_000
    watched = open_report(document, "#tab=groups", width=390)
    assert watched.page.evaluate("document.querySelector('#g-0-1-1 .text').textContent.length") < 1000
    for group in ("0-1-0", "0-1-1"):
        watched.page.locator(f"#g-{group}").get_by_role("button", name="Show all 1,000,").click()
        assert (
            watched.page.evaluate(f"document.querySelector('#g-{group} .text.whole').textContent.length") >= 1_000_000
        )
        assert watched.page.evaluate(f"document.querySelector('#g-{group} .whole').clientHeight") < 900
    assert watched.overflow() <= 0
    watched.show("tab=groups&q=NEEDLE")
    assert watched.cards() == ["0-1-0"]
    assert watched.page.locator("mark").all_inner_texts() == ["needle"]
    assert watched.problems() == []


def test_policy_blocks_scripts_and_connections_that_get_into_the_page(open_report):
    watched = open_report(make_document(steps=2))
    watched.page.evaluate("""() => {
        document.body.insertAdjacentHTML("beforeend", '<img src="data:x" onerror="window.hacked = 1">');
        document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hacked = 1" }));
        document.body.append(Object.assign(document.createElement("img"), { src: "https://example.com/x.png" }));
        return fetch("https://example.com/").catch(() => null);
    }""")
    watched.page.wait_for_function("window.violations.length >= 4")
    found = watched.page.evaluate("window.violations")
    assert {entry.split()[0] for entry in found} == {"script-src-attr", "script-src-elem", "img-src", "connect-src"}
    assert not watched.page.evaluate("window.hacked")
