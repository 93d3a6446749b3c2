"""The page in a real Chromium: what a person does there, with mouse, keyboard and phone."""

import json
from pathlib import Path

import pytest

from tests.serve.page.browser import ALT, CHROMIUM, SHIFT, chromium
from tests.serve.page.scripted import Scripted, serving

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install the package `chromium` to test the page"
)
IDLE = "!document.querySelector('#send').hidden"
LONG = " ".join(f"word{i}" for i in range(400))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server():
    script = Scripted()
    with serving(script.app) as script.url:
        yield script


@pytest.fixture
def script(server):
    server.__dict__.update(Scripted().__dict__ | {"url": server.url})
    return server


@pytest.fixture
def page(browser, script):
    page = browser.page(script.url)
    page.until("document.querySelector('#model').value")
    yield page
    assert page.faults() == []


def ask(page, text: str) -> None:
    """Write and send, and wait for the whole answer."""
    page.run("document.querySelector('#input').focus()")
    page.write(text)
    page.press("Enter")
    page.until(f"{IDLE} && document.querySelector('.message.assistant:last-child .figures').textContent")


def answers(page) -> list[str]:
    return page.run(
        "[...document.querySelectorAll('.message.assistant .body')].map((e) => e.innerText.trim())"
    )


def questions(page) -> list[str]:
    return page.run("[...document.querySelectorAll('.message.user .body')].map((e) => e.innerText)")


def test_a_message_is_sent_and_its_answer_streams_in(page, script):
    script.answers["Hi"] = LONG
    script.gap_s = 0.002
    page.write("Hi")
    page.press("Enter")
    page.until("document.querySelector('.message.assistant .body').innerText.length > 20")
    assert not page.run(IDLE)  # a part is there before the end
    page.until(IDLE)
    assert answers(page) == [LONG]
    assert script.asked[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert script.asked[0]["model"] == "scripted-1b"
    assert "tokens/s" in page.text(".figures")
    ask(page, "And?")
    assert [m["role"] for m in script.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_stop_keeps_what_came_and_the_server_hears_of_it(page, script):
    script.answers["Hi"] = LONG
    script.gap_s = 0.02
    page.write("Hi")
    page.press("Enter")
    page.until("document.querySelector('.message.assistant .body').innerText.length > 20")
    page.click("#stop")
    page.until(IDLE)
    [kept] = answers(page)
    assert LONG.startswith(kept)
    assert 20 < len(kept) < len(LONG)
    assert "stopped" in page.text(".figures")
    for _ in range(200):
        if script.left:
            break
        page.run("new Promise((done) => setTimeout(done, 20))")
    assert script.left == 1


def test_an_answer_can_be_asked_for_again_and_a_message_edited(page, script):
    ask(page, "one")
    ask(page, "two")
    script.answers["two"] = "better"
    page.click(".message.assistant:last-child [title^='Answer again']")
    page.until(f"{IDLE} && document.querySelector('#messages').innerText.includes('better')")
    assert answers(page) == ["You said: one", "better"]
    page.click(".message.user [title^='Edit']")
    page.run("document.querySelector('.edit textarea').select()")
    page.write("three")
    page.press("Enter")
    page.until(f"{IDLE} && document.querySelector('#messages').innerText.includes('You said: three')")
    assert questions(page) == ["three"]
    assert answers(page) == ["You said: three"]


def test_a_reload_keeps_conversations_and_each_can_be_opened_and_deleted(page, script):
    ask(page, "first talk")
    page.press("n", ALT)
    page.until("!document.querySelector('.message')")
    ask(page, "second talk")
    page.reload()
    page.until("document.querySelector('.message.assistant')")
    titles = "[...document.querySelectorAll('#conversations .open')].map((e) => e.innerText)"
    assert page.run(titles) == ["second talk", "first talk"]
    assert answers(page) == ["You said: second talk"]
    page.click("#conversations li:nth-child(2) .open")
    page.until("document.querySelector('.message.user .body').innerText === 'first talk'")
    page.hover("#conversations li:nth-child(2)")
    page.click("#conversations li:nth-child(2) .icon")
    page.until("document.querySelector('#conversations .open').innerText.startsWith('Undo')")
    page.press("Enter")  # it has the focus
    page.until("document.querySelectorAll('#conversations .open').length === 2")
    page.until("document.querySelector('.message.user .body').innerText === 'first talk'")


def test_conversations_go_out_and_come_in_again(page, script):
    ask(page, "keep me")
    page.run("""(() => { window.files = []; URL.createObjectURL = (blob) => { files.push(blob); return 'blob:x'; };
        HTMLAnchorElement.prototype.click = () => {}; })()""")
    page.click("#export")
    text = page.run("files[0].text()")
    assert json.loads(text)["conversations"][0]["messages"][0]["text"] == "keep me"
    page.click("#delete-all")
    page.until("document.querySelector('#ask').open")
    page.click("#ask-yes")
    page.until("!document.querySelector('#conversations .open') && !document.querySelector('.message')")
    give = """((text) => { const data = new DataTransfer(); data.items.add(new File([text], 'a.json'));
        const input = document.querySelector('#import-file'); input.files = data.files;
        input.dispatchEvent(new Event('change')); })"""
    page.run(f"{give}({json.dumps(text)})")
    page.until("document.querySelector('#conversations .open')?.innerText === 'keep me'")
    page.run(f"{give}({json.dumps('{}')})")
    page.until("document.querySelector('#notice').innerText.includes('was not imported')")


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_probabilities_show_on_hover_and_by_the_arrow_keys(page, script, at_a_time):
    script.at_a_time = at_a_time
    ask(page, "Hi")
    assert page.run("[...document.querySelectorAll('.token')].map((e) => e.textContent)") == [
        "You",
        " said:",
        " Hi",
    ]
    page.hover(".token[data-i='1']")
    page.until("!document.querySelector('#tip').hidden")
    assert page.run("[...document.querySelectorAll('#tip td')].map((e) => e.innerText).filter(Boolean)") == [
        "·said:", "35 %", "·other", "32 %", "⏎", "22 %",
    ]  # fmt: skip
    page.hover("header")
    page.until("document.querySelector('#tip').hidden")
    page.run("document.querySelector('.message.assistant .body').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.text(".token.at").strip() == "said:"
    assert page.text("#said") == "·said:, 35 %"
    assert script.asked[0]["top_logprobs"] == 5


def test_reasoning_is_folded_and_not_sent_back(page, script):
    script.thoughts = "Let me think."
    ask(page, "Hi")
    assert page.run("document.querySelector('.reasoning').open") is False
    page.click(".reasoning summary")
    assert "Let me think." in page.text(".reasoning")
    ask(page, "more")
    assert "think" not in json.dumps(script.asked[1]["messages"])


ATTACKS = (
    "<img src=x onerror=window.hurt=1>",
    "<script>window.hurt=1</script>",
    "[click](javascript:window.hurt=1)",
    "[click](data:text/html,<script>window.hurt=1</script>)",
    "![x](http://evil.invalid/a.png)",
    "```html\n<svg onload=window.hurt=1>\n```",
    "**<iframe srcdoc='<script>parent.hurt=1</script>'></iframe>**",
    "| <b onclick=window.hurt=1>a</b> | b |\n|---|---|\n| <a href=javascript:hurt=1>c</a> | d |",
)


def test_what_a_model_writes_stays_text(page, script):
    script.answers["attack"] = "\n\n".join(ATTACKS)
    script.thoughts = ATTACKS[0]
    ask(page, "attack")
    ask(page, ATTACKS[0])
    page.run("document.querySelectorAll('#messages a').forEach((a) => a.click())")
    assert page.run("window.hurt") is None
    inside = "document.querySelectorAll('#messages {}').length"
    assert page.run(inside.format(":is(img, script, iframe, b, [onclick], [onerror])")) == 0
    assert page.run(inside.format("a:not([href^=http])")) == 0
    assert "<img src=x onerror=window.hurt=1>" in answers(page)[0]
    assert questions(page)[1] == ATTACKS[0]
    # The last line of defence, should somebody write such a line some day: the browser itself refuses.
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>x</b>'")
    page.browser.events.clear()  # it has complained


def test_markdown_becomes_elements(page, script):
    script.answers["md"] = (
        "# Title\n\n"
        "Some **bold**, *lean*, `code` and a [link](https://example.org).\n\n- one\n- two\n  1. deep\n\n> said"
        "\n\n```py\nx = '**not bold**'\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nsnake_case_name and 2 * 3 * 4"
    )
    ask(page, "md")
    shape = "[...document.querySelector('.body .text').querySelectorAll('*')].filter((e) => !e.matches('span, button'))"
    names = page.run(f"{shape}.map((e) => e.localName).join(' ')")
    assert names == (
        "h1 p strong em code a ul li li ol li blockquote p div div pre code div table thead tr th th tbody tr td td p"
    )
    assert "x = '**not bold**'" in page.text(".code pre")
    assert page.text(".body .text > :last-child") == "snake_case_name and 2 * 3 * 4"
    assert page.run("document.querySelector('.text a').rel").startswith("noopener noreferrer")


def test_light_and_dark_follow_the_system_until_one_chooses(page, script):
    paper = "getComputedStyle(document.body).backgroundColor"
    page.scheme("light")
    light = page.run(paper)
    page.scheme("dark")
    dark = page.run(paper)
    assert light != dark
    page.press("t", ALT)
    assert page.run(paper) == light
    page.reload()
    assert page.run(paper) == light
    page.click("#theme")
    assert page.run(paper) == dark


@pytest.mark.parametrize("width", [360, 820, 1200])
def test_nothing_scrolls_sideways(browser, script, width):
    page = browser.page(script.url, width, 740, touch=width == 360)
    script.answers["wide"] = (
        f"{'wide' * 60} `{'c' * 200}`\n\n```\n{'x' * 300}\n```\n\n| {'a' * 90} | {'b' * 90} |\n|---|---|\n| 1 | 2 |"
    )
    ask(page, "wide")
    ask(page, "y" * 300)
    everything = "[document.scrollingElement, ...document.querySelectorAll('*')]"
    besides = "'.hidden, svg, pre, .table, .open, select, #side, #settings'"  # what may scroll, or cuts off
    fits = (
        f"{everything}.filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.closest({besides})"
        " && !['hidden', 'clip'].includes(getComputedStyle(e).overflowX)).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(fits) == []


def test_a_phone_has_its_list_and_settings_in_drawers(browser, script):
    page = browser.page(script.url, 360, 740, touch=True)
    ask(page, "Hi")
    assert page.run("document.querySelector('#side').inert") is True
    page.click("#side-open")
    page.until("document.querySelector('#side').getBoundingClientRect().x === 0")
    page.click("#new")
    page.until("document.querySelector('#side').inert && !document.querySelector('.message')")
    page.click("#settings-open")
    page.until("document.querySelector('#settings').getBoundingClientRect().right <= 360")
    page.run("document.querySelector('#system').focus()")
    page.write("Be brief.")
    page.click("#settings-close")
    page.until("getComputedStyle(document.querySelector('#settings')).visibility === 'hidden'")
    ask(page, "again")
    assert script.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_long_name_pushes_nothing_off_a_phone(browser, script):
    page = browser.page(script.url, 360, 740, touch=True)
    page.until("document.querySelector('#model').options.length === 2")
    page.run("document.querySelector('#model').selectedIndex = 1")
    right = "Math.max(...[...document.querySelectorAll('header button')].map((e) => e.getBoundingClientRect().right))"
    assert page.run(right) <= 360


def test_all_of_it_works_by_keyboard(page, script):
    seen = []
    for _ in range(30):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id"))
    for wanted in (
        "new",
        "export",
        "import",
        "delete-all",
        "model",
        "help-open",
        "theme",
        "settings-open",
        "input",
        "send",
    ):
        assert wanted in seen, wanted
    assert "temperature" not in " ".join(seen)  # what is not shown is not reached
    page.run("document.activeElement.blur()")
    page.press("/")
    page.write("line one")
    page.press("Enter", SHIFT)
    page.write("line two")
    page.press("Enter")
    page.until(f"{IDLE} && document.querySelector('.figures').textContent")
    assert script.asked[0]["messages"][0]["content"] == "line one\nline two"
    assert page.run("document.querySelector('#said').textContent") == "Answer: You said: line one\nline two"
    page.press("r", ALT)
    page.until(IDLE)
    assert len(script.asked) == 2
    page.press("e", ALT)
    page.run("document.activeElement.select()")
    page.write("edited")
    page.press("Enter")
    page.until(f"{IDLE} && document.querySelector('#messages').innerText.includes('You said: edited')")
    page.press("s", ALT)
    page.until("document.activeElement.id === 'settings-close'")
    page.press("Escape")
    page.until("document.querySelector('#settings').inert && document.activeElement.id === 'settings-open'")
    page.press("?")
    page.until("document.querySelector('#help').open")
    page.press("Escape")
    page.until("!document.querySelector('#help').open")
    script.answers["long"] = LONG
    script.gap_s = 0.02
    page.press("/")
    page.write("long")
    page.press("Enter")
    page.until("document.querySelectorAll('.message.assistant').length === 2")
    page.until("document.querySelector('.message.assistant:last-child .body').innerText.length > 10")
    page.press("Escape")
    page.until(IDLE)
    assert "stopped" in page.text(".message.assistant:last-child .figures")


def test_settings_are_sent_once_they_are_touched(page, script):
    ask(page, "Hi")
    assert {"temperature", "top_p", "top_k", "seed", "max_tokens"} & script.asked[0].keys() == set()
    page.press("s", ALT)
    page.run("document.querySelector('#set-temperature').focus()")
    page.write("0.3")
    page.run("document.querySelector('#set-seed').focus()")
    page.write("7")
    page.press("s", ALT)
    ask(page, "again")
    assert (script.asked[1]["temperature"], script.asked[1]["seed"]) == (0.3, 7)
    page.reload()
    page.until("document.querySelector('#model').value")
    ask(page, "more")
    assert script.asked[2]["temperature"] == 0.3


def test_a_key_is_asked_for_and_used(browser, script):
    script.key = "sesame"
    page = browser.page(script.url)
    page.until("document.activeElement.id === 'key'")
    assert "API key" in page.text("#notice")
    page.write("sesame")
    page.press("Enter")
    page.until("document.querySelector('#model').value === 'scripted-1b'")
    assert page.run("document.querySelector('#notice').hidden")
    ask(page, "Hi")
    assert answers(page) == ["You said: Hi"]
    # Unless one says so it is gone with the tab.
    assert page.run("JSON.stringify({...localStorage}).includes('sesame')") is False


@pytest.mark.parametrize(
    ("status", "message", "shown"),
    [(429, "full", "Try again in 7 s"), (400, "too long: 9 tokens", "too long: 9 tokens")],
)
def test_an_error_says_what_and_offers_another_try(browser, script, status, message, shown):
    page = browser.page(script.url)
    script.fails = (status, message)
    page.write("Hi")
    page.press("Enter")
    page.until("document.querySelector('.failure:not([hidden])')?.innerText")
    assert shown in page.text(".failure")
    script.fails = None
    page.click(".failure button")
    page.until(f"{IDLE} && document.querySelector('.figures').textContent")
    assert answers(page) == ["You said: Hi"]
    assert len(script.asked[-1]["messages"]) == 1


def test_a_server_that_has_gone_is_said_so(browser, script):
    own = Scripted()
    with serving(own.app) as url:
        page = browser.page(url)
        page.until("document.querySelector('#model').value")
    page.write("Hi")
    page.press("Enter")
    page.until("document.querySelector('.failure:not([hidden])')?.innerText.includes('cannot be reached')")


def test_code_is_copied(page, script):
    script.answers["code"] = "```\na = 1\nb = 2\n```"
    ask(page, "code")
    page.run(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => { window.copied = t; }}})"
    )
    page.click(".code button")
    page.until("window.copied")
    assert page.run("window.copied") == "a = 1\nb = 2"


def test_two_browsers_do_not_see_each_other(browser, script, page):
    ask(page, "mine")
    other = browser.page(script.url)
    assert other.run("document.querySelectorAll('#conversations li').length") == 0


def test_every_picture_of_the_docs_is_small():
    for file in (Path(__file__).parents[3] / "docs" / "images").glob("page-*.png"):
        assert file.stat().st_size < 200_000, file
