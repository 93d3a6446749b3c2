"""The page's files: what they may load, and that no name reaches further than they do."""

import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from maxstack.serve import page

FILES = page.files()
SCRIPTS = {name: content.decode() for name, content in FILES.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page.router())
    with TestClient(app) as client:
        yield client


def test_every_file_is_served_under_the_policy(client):
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert not [part for part in policy.values() if "unsafe" in part or "*" in part or "http" in part]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")


def test_what_is_known_is_not_sent_again(client):
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["..%2f__init__.py", "%2e%2e/__init__.py", "__init__.py", "main.js%00", "x" * 5000]
)
def test_no_other_file_is_served(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert len(answer.content) < 300


def test_nothing_comes_from_elsewhere():
    for name, content in FILES.items():
        addresses = re.findall(r"""["'(](?:https?:)?//[^"')\s]+""", content.decode())
        assert [a for a in addresses if "www.w3.org" not in a] == [], name
    html = FILES["index.html"].decode()
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]+)"', html)
    assert {path.removeprefix("page/") for path in loaded} <= FILES.keys()
    assert "style=" not in html
    assert not re.search(r"\son\w+=", html)


def test_every_import_finds_its_file():
    for name, script in SCRIPTS.items():
        for path in re.findall(r'from "\./([^"]+)"', script):
            assert path in FILES, f"{name} imports {path}"


def test_no_script_makes_markup_or_code_of_text():
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    )
    assert {name: found for name, script in SCRIPTS.items() if (found := forbidden.findall(script))} == {}
