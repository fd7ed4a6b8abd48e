"""The server of `ril view`: what it answers, and whom it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from openril.report.html import SERVED_POLICY
from openril.report.rollouts import FLAGS
from openril.report.serving.index import RunIndex
from openril.report.serving.server import Source, make_app, refusal
from support.synthetic_run import write_run

HASH = "0" * 32
HOST = "127.0.0.1:8642"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    run = tmp_path_factory.mktemp("run")
    write_run(run, 3, groups=5, members=4, words=5)
    path = run / "rollouts" / "step_000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = "</script><script>alert(1)</script>\u202e\x00"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    index = RunIndex([run], None)
    index.refresh()

    def picture(name: str, size: str) -> tuple[bytes, str] | None:
        return (size.encode(), "image/webp") if name == HASH else None

    source = Source(index, lambda: {"runs": []}, lambda: 3, picture)
    yield TestClient(make_app(source), base_url=f"http://{HOST}", raise_server_exceptions=False)
    index.close()


def test_the_page_and_its_parts(client: TestClient):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "/page.js" in page.text
    assert client.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/page.css").headers["content-type"].startswith("text/css")
    assert client.get("/api/report").json() == {"runs": []}
    about = {"steps": 3, "total_steps": 3, "groups": 15, "indexing": False, "problems": {}, "report": 3}
    assert client.get("/api/version").json() == about


def test_groups_are_answered_page_by_page(client: TestClient):
    everything = client.get("/api/groups").json()
    assert everything["total"] == len(everything["groups"]) == 15
    pages = [client.get(f"/api/groups?offset={n}&limit=4").json() for n in (0, 4, 8, 12, 16)]
    assert [g for page in pages for g in page["groups"]] == everything["groups"]
    assert {page["total"] for page in pages} == {15} and [page["offset"] for page in pages] == [0, 4, 8, 12, 16]
    found = client.get(
        "/api/groups", params={"q": "<SCRIPT>alert", "step_min": 2, "step_max": 2, "run": 0, "limit": 0}
    ).json()
    assert (found["total"], found["groups"]) == (1, [])
    (group,) = client.get("/api/groups", params={"q": "<SCRIPT>alert", "sort": "-step"}).json()["groups"]
    assert group["id"] == "0-2-0" and group["members"][0]["text"] == "</script><script>alert(1)</script>\u202e\x00"
    flags = {f for g in everything["groups"] for f in g["flags"]}
    for flag in FLAGS:
        assert (client.get(f"/api/groups?flags={flag}").json()["total"] > 0) == (flag in flags)


@pytest.mark.parametrize(
    "query", ["flgs=cut", "flags=cut,none", "sort=random", "run=-1", "step_min=1.5", "limit=x", "run=" + "9" * 30]
)
def test_a_query_that_cannot_be_meant_is_refused_by_name(client: TestClient, query: str):
    answer = client.get(f"/api/groups?{query}")
    assert answer.status_code == 400 and answer.json()["error"].startswith(f"{query.split('=')[0]}: expected")


def test_pictures_are_named_by_hash_alone(client: TestClient):
    answer = client.get(f"/api/image/{HASH}?size=full")
    assert (answer.content, answer.headers["content-type"]) == (b"full", "image/webp")
    assert client.get(f"/api/image/{HASH}").content == b"thumb"
    assert client.get(f"/api/image/{'1' * 32}").status_code == 404
    for name in ("..%2f..%2fetc%2fpasswd", "recipe.yaml", "0" * 31, HASH + ".webp", HASH.replace("0", "A")):
        assert client.get(f"/api/image/{name}").status_code in (400, 404)
    assert client.get(f"/api/image/{HASH}?size=huge").status_code == 400


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/api/groups", "/api/groups?sort=x", "/nothing", f"/api/image/{HASH}"]
)
@pytest.mark.parametrize("host", [HOST, "evil.example"])
def test_every_answer_has_the_headers(client: TestClient, path: str, host: str):
    headers = client.get(path, headers={"host": host}).headers
    assert headers["content-security-policy"] == SERVED_POLICY
    assert headers["x-content-type-options"] == "nosniff" and headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers


def test_only_get_is_answered(client: TestClient):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        assert client.request(method, "/api/groups").status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": HOST}, None),
        ({"host": "localhost:9000"}, None),  # the other end of a tunnel
        ({"host": "[::1]:8642"}, None),
        ({"host": "LOCALHOST"}, None),
        ({}, 403),
        ({"host": ""}, 403),
        ({"host": "evil.example:8642"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example:8642"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"host": "evil.example@127.0.0.1"}, 403),
        ({"host": "192.168.0.7:8642"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": HOST, "origin": f"http://{HOST}"}, None),
        ({"host": HOST, "origin": f"https://{HOST}"}, 403),
        ({"host": HOST, "origin": "http://localhost:3000"}, 403),
        ({"host": HOST, "origin": "null"}, 403),
        ({"host": HOST, "origin": "http://evil.example"}, 403),
        ({"host": HOST, "sec-fetch-site": "same-origin"}, None),
        ({"host": HOST, "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, None),
        ({"host": HOST, "sec-fetch-site": "same-site"}, 403),  # another program's page on this machine
        ({"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
    ],
)
def test_foreign_names_and_sites_are_refused(headers: dict[str, str], status: int | None):
    refused = refusal("GET", "/api/groups", headers)
    assert (refused and refused[0]) == status


def test_a_link_from_elsewhere_leads_to_the_page_alone():
    followed = {"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert refusal("GET", "/", followed) is None
    assert refusal("GET", "/", followed | {"sec-fetch-mode": "no-cors"}) is not None
