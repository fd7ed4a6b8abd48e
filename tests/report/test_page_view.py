"""The page in a browser: filters, order, search, links, keyboard, curves, audit."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from openril.report.html import SERVED_POLICY, page_script, page_style, render_page
from openril.report.statistics import read_ticks
from support.report_documents import make_document


def expected(document: dict[str, Any], query: str) -> list[str]:
    """The ids of the groups of a query in order: a second statement of the meaning in docs/report.md."""
    q = {key: value[0] for key, value in parse_qs(query).items()}
    text = q.get("q", "").strip().lower()

    def meets(g: dict[str, Any]) -> bool:
        texts = [g["question"], g["question_id"], *g["truths"], *(m["text"] for m in g["members"])]
        return (
            g["run"] == int(q.get("run", g["run"]))
            and int(q.get("step_min", 0)) <= g["step"] <= int(q.get("step_max", 10**9))
            and g["skill"] == q.get("skill", g["skill"])
            and g["question_id"] == q.get("question", g["question_id"])
            and ("source" not in q or any(m["source"] == q["source"] for m in g["members"]))
            and set(q.get("flags", "").split(",")) - {""} <= set(g["flags"])
            and any(text in t.lower() for t in texts)
        )

    def place(g: dict[str, Any]) -> tuple[int, int, int]:
        run, step, position = map(int, g["id"].split("-"))
        return step, run, position

    keys = {
        "step": place,
        "-step": lambda g: (-g["step"], place(g)),
        "longest": lambda g: (-g["longest"], place(g)),
        "-spread": lambda g: (
            min(m["reward"] for m in g["members"]) - max(m["reward"] for m in g["members"]),
            place(g),
        ),
        "advantage": lambda g: (-max(abs(m["advantage"]) for m in g["members"]), place(g)),
    }
    return [g["id"] for g in sorted(filter(meets, document["groups"]), key=keys[q.get("sort", "step")])]


QUERIES = (
    "sort=-step", "sort=longest", "sort=-spread", "sort=advantage", "run=1", "step_min=2&step_max=3", "skill=charts",
    "source=teacher_b", "flags=all_right", "flags=all_wrong,cut", "question=q3", "q=ANSWER IS 7", "q=zzz",
    "run=0&skill=spatial&step_min=2&sort=longest&q=cars",
)  # fmt: skip


def test_filters_and_orders_mean_what_the_documentation_says(open_report):
    document = make_document(runs=2, steps=5)
    document["groups"][3]["members"][2]["source"] = "teacher_a"
    document["groups"][4]["flags"] = ["all_wrong", "cut"]
    watched = open_report(document, "#tab=groups")
    assert watched.cards() == expected(document, "")[:20]
    for query in QUERIES:
        watched.show(f"tab=groups&{query}")
        assert watched.cards() == expected(document, query), query
    assert watched.cards() and watched.problems() == []


def test_controls_set_the_filters_and_the_address_leads_back_to_the_view(open_report):
    document = make_document(runs=2, steps=8)
    document["groups"][2]["members"][0]["text"] = "a Needle in it"
    watched = open_report(document, "#tab=groups")
    page = watched.page
    page.get_by_role("button", name="Show 12 more").click()
    watched.settle()
    assert watched.cards() == expected(document, "")

    page.get_by_label("Skill or benchmark").select_option("charts")
    page.get_by_label("Order").select_option("-step")
    page.get_by_label("From step").fill("2")
    page.keyboard.press("Enter")
    watched.settle()
    first = watched.cards()
    assert first == expected(document, "skill=charts&step_min=2&sort=-step")[:20]

    other = open_report(document, f"#{urlsplit(page.url).fragment}")
    assert other.cards() == first
    assert other.page.get_by_label("Skill or benchmark").input_value() == "charts"

    page.get_by_role("button", name="All wrong").click()
    watched.settle()
    assert page.get_by_role("button", name="All wrong").get_attribute("aria-pressed") == "true"
    page.go_back()
    watched.settle()
    assert watched.cards() == first

    page.get_by_role("button", name="Reset filters").click()
    page.keyboard.press("/")
    page.keyboard.type("needle")
    page.wait_for_url("**q=needle**")
    watched.settle()
    assert watched.cards() == [document["groups"][2]["id"]]
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == "needle"
    assert watched.problems() == [] == other.problems()


def test_keyboard_moves_between_groups_and_its_link_leads_to_the_group(open_report):
    document = make_document(steps=14)
    watched = open_report(document, "#tab=groups&sort=longest")
    order = expected(document, "sort=longest")
    for _ in range(3):
        watched.page.keyboard.press("j")
    watched.page.keyboard.press("k")
    assert watched.page.evaluate("document.activeElement.dataset.group") == order[1]
    assert f"group={order[1]}" in watched.page.url

    linked = open_report(document, f"#tab=groups&sort=longest&group={order[25]}")
    assert linked.cards() == [order[25], *order[:20]]
    assert linked.page.locator(".card.current").get_attribute("data-group") == order[25]

    watched.page.keyboard.press("?")
    assert watched.page.get_by_role("dialog").get_by_role("heading").inner_text() == "Keyboard"
    watched.page.keyboard.press("Escape")
    watched.page.keyboard.press("4")
    assert watched.page.evaluate("document.querySelector('main').dataset.tab") == "audit"
    assert watched.problems() == [] == linked.problems()


def test_picture_opens_in_full_size_and_escape_leads_back(open_report):
    watched = open_report(make_document(steps=2), "#tab=groups")
    thumb = watched.page.get_by_role("button", name="Picture 1 of 1: cars-0.png").first
    thumb.click()
    assert (
        watched.page.get_by_role("dialog").locator("img").evaluate("(i) => i.decode().then(() => i.naturalWidth)")
        == 400
    )
    watched.page.keyboard.press("Escape")
    assert watched.page.get_by_role("dialog").count() == 0
    assert thumb.evaluate("(node) => node === document.activeElement")


def test_card_shows_the_advantage_on_its_side_of_zero_and_marks_the_source_by_letter_and_shape(open_report):
    document = make_document(steps=1, per_step=1)
    for m, value in zip(document["groups"][0]["members"], (-1.5, 0.0, 0.5, 1.0), strict=True):
        m["advantage"] = value
    watched = open_report(document, "#tab=groups")
    bars = watched.page.eval_on_selector_all(".adv .fill", "bars => bars.map((b) => [b.style.left, b.style.width])")
    # The scale of this group is 2, the next power of two above 1.5: 1.5 is three quarters of the left half.
    assert bars == [["12.5%", "37.5%"], ["50%", "0%"], ["50%", "12.5%"], ["50%", "25%"]]
    assert watched.page.locator(".adv .value").all_inner_texts() == ["−1.5", "0", "+0.5", "+1"]
    marks = watched.page.locator(".who .mark")
    assert marks.all_text_contents() == ["S", "S", "A", "B"]
    assert len(set(marks.locator("path").evaluate_all("paths => paths.map((p) => p.getAttribute('d'))"))) == 3


def test_same_question_is_shown_in_both_runs_next_to_each_other(open_report):
    document = make_document(runs=2, steps=8)
    watched = open_report(document, "#tab=groups")
    watched.page.get_by_role("button", name="In all runs").first.click()
    watched.settle()
    question = document["groups"][0]["question_id"]
    for run in (0, 1):
        column = watched.page.locator(".sides > section").nth(run)
        ids = column.locator(".card").evaluate_all("cards => cards.map((c) => c.dataset.group)")
        assert ids == expected(document, f"run={run}&question={question}") != []
    boxes = [watched.page.locator(".sides > section").nth(run).bounding_box() for run in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def test_curves_show_values_under_the_pointer_and_by_keyboard_within_a_range(open_report):
    document = make_document(runs=2, steps=20)
    curve = document["runs"][0]["metrics"]["reward/student_similarity"]
    watched = open_report(document, "#from=5&to=15&smooth=0")
    chart = watched.page.get_by_role("img", name="Similarity reward")
    chart.focus()
    watched.page.keyboard.press("Home")
    watched.page.keyboard.press("ArrowRight")
    figure = watched.page.locator("figure", has=chart)
    assert figure.locator(".at").inner_text() == "step 6"
    assert float(figure.locator(".legend b").first.inner_text()) == round(curve[5], 3)
    box = chart.bounding_box()
    watched.page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 20)
    assert figure.locator(".at").inner_text() == "step 15"
    # The other charts show the same step.
    assert watched.page.locator("figure .at").all_inner_texts()[:4] == ["step 15"] * 4
    assert "Steps 5 to 15" in chart.get_attribute("aria-label")
    assert "discriminator.enabled" in watched.page.locator("main").inner_text()
    assert "−10 [−20, −1]" in watched.page.locator("main").inner_text()


def test_audit_keeps_counts_and_exports_the_ticks(open_report):
    document = make_document(steps=6)
    watched = open_report(document, "#tab=audit")
    page = watched.page
    for key in "yyny":
        page.keyboard.press(key)
        watched.settle()
    # 3 of 4: Wilson's interval at 95 % is 30.06 to 95.44 %.
    assert page.locator("#agreement").inner_text() == "75\u2009% [30.1, 95.4]"
    page.get_by_role("button", name="The verdict is wrong").click()  # of the disagreement, which is no random sample
    assert page.locator("#agreement").inner_text() == "75\u2009% [30.1, 95.4]"
    page.reload()
    watched.settle()
    assert page.locator("#agreement").inner_text() == "75\u2009% [30.1, 95.4]"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export the ticks").click()
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    audit = document["runs"][0]["audit"]
    assert [row["member"] for row in rows] == [*audit["sample"], audit["disagreements"][0]["member"]]
    assert [row["tick"] for row in rows] == ["right", "right", "wrong", "right", "wrong"]
    assert [row["part"] for row in rows] == ["sample"] * 4 + ["disagreements"]
    group, position = audit["sample"][2].split("/")
    member = next(g for g in document["groups"] if g["id"] == group)["members"][int(position)]
    assert {k: rows[2][k] for k in ("source", "index", "verdict")} == {
        k: member[k] for k in ("source", "index", "verdict")
    }
    assert rows[2] | {"schema": "openril.audit/1", "run": "ril", "step": 2, "seed": 0} == rows[2]
    assert len(read_ticks(download.value.path())["ril"]) == 5
    assert watched.problems() == []


def test_document_can_be_downloaded_from_the_page(open_report):
    document = make_document(steps=2)
    watched = open_report(document)
    with watched.page.expect_download() as download:
        watched.page.get_by_role("button", name="JSON").click()
    assert json.loads(download.value.path().read_text()) == document


def test_names_labels_and_focus_order_are_there_for_keyboard_and_screen_reader(open_report):
    watched = open_report(make_document(runs=2, steps=3), "#tab=groups")
    unnamed = """[...document.querySelectorAll("button, a, input, select, [role=img], [role=region], dialog")].filter((e) =>
        !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length || e.getAttribute("aria-labelledby")
          || e.querySelector("img[alt]"))).map((e) => e.outerHTML)"""
    for tab in ("overview", "groups", "discriminator", "audit", "teachers"):
        watched.show(f"tab={tab}")
        assert watched.page.evaluate(unnamed) == [], tab
        assert watched.page.locator("h1").count() == 1
        assert watched.page.locator("img:not([alt])").count() == 0
        assert (
            watched.page.locator("[tabindex]").evaluate_all("nodes => nodes.filter((n) => n.tabIndex > 0).length") == 0
        )
        assert watched.page.locator("#tabs [aria-current=page]").count() == 1
    order = []
    watched.page.evaluate("document.activeElement.blur()")
    for _ in range(9):
        watched.page.keyboard.press("Tab")
        order.append(watched.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    tabs = ["Overview", "Groups", "Discriminator", "Judge audit", "Teachers"]
    assert order == ["Skip to the content", "download", "theme", "help-open", *tabs]


def test_themes_differ_and_print_is_light(open_report):
    watched = open_report(make_document(steps=2), color_scheme="dark")
    paper = "getComputedStyle(document.querySelector('.panel')).backgroundColor"
    dark = watched.page.evaluate(paper)
    watched.page.get_by_role("button", name="Theme").click()
    assert watched.page.evaluate(paper) == "rgb(255, 255, 255)" != dark
    watched.page.get_by_role("button", name="Theme").click()
    assert watched.page.evaluate(paper) == dark
    watched.page.emulate_media(media="print")
    assert watched.page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not watched.page.locator("#theme").is_visible()


def test_served_page_asks_the_server_and_follows_a_run_that_grows(browser):
    document = make_document(steps=14)
    asked, steps, problems = [], [14], {}

    def answer(route):
        url = urlsplit(route.request.url)
        if url.path == "/":
            headers = {"Content-Security-Policy": SERVED_POLICY}
            return route.fulfill(
                body=render_page({}, "served"), content_type="text/html; charset=utf-8", headers=headers
            )
        if url.path in ("/page.js", "/page.css"):
            script = url.path.endswith("js")
            kind = "text/javascript; charset=utf-8" if script else "text/css; charset=utf-8"
            return route.fulfill(body=page_script() if script else page_style(), content_type=kind)
        if url.path == "/api/report":
            return route.fulfill(json={k: v for k, v in document.items() if k not in ("groups", "images")})
        if url.path == "/api/version":
            return route.fulfill(
                json={"steps": steps[0], "total_steps": 15, "indexing": steps[0] < 15, "problems": problems}
            )
        if url.path == "/api/groups":
            asked.append(url.query)
            q = {key: int(value[0]) for key, value in parse_qs(url.query).items() if key in ("offset", "limit")}
            ids = expected(document, url.query)
            found = {g["id"]: g for g in document["groups"]}
            page = [found[i] for i in ids[q["offset"] : q["offset"] + q["limit"]]]
            return route.fulfill(json={"total": len(ids), "offset": q["offset"], "groups": page})
        return route.fulfill(status=404)

    context = browser.new_context()
    try:
        page = context.new_page()
        page.clock.install()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "404" not in m.text else None)
        page.route("http://view.test/**", answer)
        page.goto("http://view.test/#tab=groups&skill=charts&flags=all_wrong&q=Cars&sort=-step")
        page.locator(".found b").wait_for()
        assert parse_qs(asked[0]) == {
            "skill": ["charts"], "flags": ["all_wrong"], "q": ["Cars"], "sort": ["-step"], "offset": ["0"], "limit": ["20"],
        }  # fmt: skip
        shown = page.eval_on_selector_all(".card", "cards => cards.map((c) => c.dataset.group)")
        assert shown == expected(document, urlsplit(page.url).fragment)[:20]
        assert page.locator(".thumb img, .missing").count() == len(shown)

        page.get_by_text("Reading the run: 14 of 15 steps.").wait_for()
        document["runs"][0]["steps"] = steps[0] = 15
        problems["<b>run</b>"] = "line 3 cannot be read"
        page.clock.run_for(1_500)
        page.get_by_role("button", name="Show them").click()
        page.get_by_text("15 steps").wait_for()
        page.clock.run_for(6_000)
        page.get_by_text("<b>run</b>: line 3 cannot be read").wait_for()
        assert errors == []
    finally:
        context.close()
