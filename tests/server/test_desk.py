"""The desk in a real browser, on the real server and the bundled model: dropped, read, asked, shown, kept, deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import CHATML, with_template
from desk import Server, Watched, browser, serving, until
from document_files import write_pdf

from pi_gguf.bundled import novels
from pi_gguf.bundled.passkey import INTRODUCTION, QUESTION, key_sentence

KEY = "31418"
SAID = f"The pass key is {KEY}. Remember it."
FILES = Path(__file__).parents[2] / "pi_gguf" / "server" / "desk"

LATE_LISTS = """() => {
  const real = window.fetch;
  window.fetch = async (path, options) => {
    const answer = await real(path, options);
    if (path !== "v1/documents" || options?.method === "POST") return answer;
    const listed = await answer.text();
    await new Promise((done) => setTimeout(done, 1500));
    return new Response(listed, { headers: answer.headers });
  };
}"""
"""Lists of documents arrive when streams have told more."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def server(tiny_gguf, tmp_path_factory) -> Iterator[Server]:
    options = ("--form", "plain", "--n-ctx", "8192", "--no-flash-attn")
    with serving(tiny_gguf, *options, cache=tmp_path_factory.mktemp("desk") / "cache") as one:
        yield one


@pytest.fixture
def desk(chromium, server) -> Iterator[Watched]:
    """A page on a server without documents."""
    for entry in server.ask("v1/documents")["data"]:
        server.ask(f"v1/documents/{entry['id']}", "DELETE")
    watched = Watched(chromium, server)
    yield watched
    watched.check()
    watched.context.close()


def prose(characters: int, key: str = KEY) -> str:
    """Lines of a novel with a key in the middle."""
    text = next(iter(novels("heldout").values()))[30_000 : 30_000 + characters]
    at = text.index("\n", characters // 2) + 1
    return INTRODUCTION + text[:at] + key_sentence(key) + text[at:]


@pytest.fixture(scope="module")
def pdf(tmp_path_factory) -> Path:
    lines = [line.encode("ascii", "ignore").decode() for line in prose(12_000).splitlines() if line.strip()]
    pages = [lines[i : i + 40] for i in range(0, len(lines), 40)]
    return write_pdf(tmp_path_factory.mktemp("pdf") / "The Rover.pdf", pages)


def file(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


def add(page: Any, given: Any, *, read: bool = True) -> None:
    """Give a document, and wait until it is read."""
    page.set_input_files("#file", given)
    until(page, "document.querySelector('#documents [aria-current]') && !document.querySelector('.pending')")
    if read:
        page.locator("#documents [aria-current] .state.kept").wait_for(state="attached", timeout=120_000)


def drop(page: Any, path: Path) -> None:
    """Drop a file on the page, as from a folder beside it."""
    page.evaluate(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "application/pdf" }));
            const options = { dataTransfer: data, bubbles: true, cancelable: true };
            for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, options));
        }""",
        [path.name, list(path.read_bytes())],
    )
    page.locator("#documents .document").wait_for()


def ask(page: Any, question: str = QUESTION, *, done: bool = True) -> Any:
    """Ask, and return the turn on the page."""
    turn = page.locator(".turn").nth(page.locator(".turn").count())
    page.fill("#question", question)
    page.press("#question", "Enter")
    turn.wait_for()
    if done:
        turn.locator(".tools").wait_for(timeout=60_000)
    return turn


def bind(page: Any, *parts: str, **more: Any) -> None:
    """Have the model answer in these words from now on: it is the model that writes, bound by a grammar."""
    words = " ".join(part if part.startswith("[") else json.dumps(part, ensure_ascii=False) for part in parts)

    def amend(route: Any) -> None:
        asked = {**route.request.post_data_json, "grammar": f"root ::= {words}", **more}
        route.continue_(post_data=json.dumps(asked))

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", amend)


# From a dropped file to an answer


def test_a_pdf_is_dropped_read_asked_and_asked_again_after_a_reload_and_deleted(desk, pdf, never_a_hang):
    page = desk.page
    page.get_by_text("Drop a book and ask.").wait_for()
    assert page.locator("#question").is_disabled(), "a model without a chat template answers about documents only"
    assert page.get_attribute("#question", "placeholder") == "Drop a document to ask about it"
    page.evaluate(LATE_LISTS)
    drop(page, pdf)
    page.locator("#documents .state.kept").wait_for()
    (entry,) = desk.server.ask("v1/documents")["data"]
    assert page.inner_text("h1") == "The Rover.pdf" and page.url.endswith(f"#{entry['id']}")
    tokens = f"{entry['tokens']:,}"
    assert tokens in page.inner_text("#fit") and f"{entry['room']:,} of 8,192 left" in page.inner_text("#fit")
    assert "never measured" in page.inner_text(".trust")
    steps = [int(one[1]) for said in desk.told() if (one := re.match(r"Reading, (\d+) %", said))]
    assert steps == sorted(steps) and any(0 < step < 100 for step in steps), desk.told()
    begun = next(i for i, said in enumerate(desk.told()) if said.startswith("Reading, "))
    assert not [said for said in desk.told()[begun:] if said.lower().startswith("waits")], desk.told()
    assert any(re.match(rf"Reading: [\d,]+ of {tokens} tokens", said) for said in desk.told())

    turn = ask(page)
    assert KEY in turn.locator(".prose").inner_text()
    known = int(re.search(r"([\d,]+) known before", turn.locator(".tools").inner_text())[1].replace(",", ""))
    assert known >= 0.9 * entry["tokens"]
    before = turn.locator(".prose").inner_text()

    page.reload()
    page.locator(".turn .tools").wait_for()
    assert page.inner_text("h1") == "The Rover.pdf" and page.inner_text(".turn .prose") == before
    again = ask(page)
    read, known = re.search(r"([\d,]+) read, ([\d,]+) known before", again.locator(".tools").inner_text()).groups()
    assert int(read) < 64 and int(known.replace(",", "")) >= 0.9 * entry["tokens"], "it is not read again"
    assert again.locator(".prose").inner_text() == before

    page.get_by_role("button", name="Delete The Rover.pdf").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert len(desk.server.ask("v1/documents")["data"]) == 1
    page.get_by_role("button", name="Delete The Rover.pdf").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("Drop a book and ask.").wait_for()
    assert desk.server.ask("v1/documents")["data"] == []
    assert page.locator(".turn").count() == 0 and "#" not in page.url
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('desk.chat'))") == []


def test_quotations_are_marked_listed_and_lead_to_their_passage(desk, pdf):
    page = desk.page
    add(page, str(pdf))
    bind(
        page, f'It is said: "{SAID}" Or *nearly*: ',
        f'"The pass key was {KEY}; remember it."\n\nBut not: "The captain sold seven parrots in Lisbon."',
    )  # fmt: skip
    turn = ask(page)
    marks = turn.locator(".prose mark")
    assert [mark.get_attribute("class") for mark in marks.all()] == ["exact", "near", "none"]
    assert marks.first.inner_text() == SAID
    found = turn.locator(".quotes li")
    assert [one.locator(".found").inner_text() for one in found.all()] == [
        "word for word",
        "near",
        "not in the document",
    ]
    assert "Page" in found.first.inner_text() and found.nth(2).get_by_role("button").count() == 0

    marks.first.click()
    panel = page.get_by_role("complementary")
    assert panel.locator("mark").inner_text().split() == SAID.split()
    assert panel.get_by_role("heading").inner_text() in found.first.inner_text()
    assert panel.locator(".text").inner_text().count("\n") >= 1 and len(panel.locator(".text").inner_text()) > 1000
    before = len(panel.locator(".text").inner_text())
    panel.get_by_role("button", name="Text before it").click()
    until(page, "(before) => document.querySelector('.text').innerText.length > before + 1000", before)
    assert panel.locator("mark").inner_text().split() == SAID.split()
    page.keyboard.press("Escape")
    assert panel.is_hidden() and page.evaluate("document.activeElement.textContent") == SAID, "the focus is back"

    found.nth(1).get_by_role("button").click()
    assert "The answer says" in panel.inner_text() and KEY in panel.locator("mark").inner_text()
    panel.get_by_role("button", name="Close").click()
    marks.first.focus()
    page.keyboard.press("Enter")
    assert panel.locator("mark").inner_text().split() == SAID.split()
    page.reload()
    page.locator(".turn .tools").wait_for()
    assert page.locator(".turn .prose mark").count() == 3


def test_where_it_looked_is_shown_and_leads_to_the_passage(desk):
    page = desk.page
    add(page, file("prose.txt", prose(6000)))
    turn = ask(page)
    turn.get_by_role("button", name="Where it looked").click()
    strip = turn.get_by_role("slider")
    strip.wait_for()
    said = strip.get_attribute("aria-valuetext")
    assert re.match(r"\d+ % of its attention", said) and int(said.split()[0]) > 30
    strip.press("Enter")
    panel = page.get_by_role("complementary")
    assert KEY in panel.locator("mark").inner_text()
    strip.press("Home")
    assert strip.get_attribute("aria-valuenow") == "1"
    strip.press("ArrowRight")
    assert strip.get_attribute("aria-valuenow") == "2"
    assert strip.get_attribute("aria-valuemax") == str(len(turn.locator(".column").all()))
    turn.locator(".first button").first.click()
    assert KEY in panel.locator("mark").inner_text()


def test_answers_are_copied_saved_and_cleared(desk):
    page = desk.page
    desk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    add(page, file("The *Rover*.txt", prose(3000)))
    bind(page, f'# It\n\nis **so**: "{SAID}"')
    turn = ask(page, "What\nis it?")
    assert turn.locator("h3").inner_text() == "It" and turn.locator("strong").inner_text() == "so"
    turn.get_by_role("button", name="Copy").click()
    turn.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == f'# It\n\nis **so**: "{SAID}"'
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the answers").click()
    assert saved.value.suggested_filename.endswith(" - answers.md")
    text = Path(saved.value.path()).read_text()
    assert "# The \\*Rover\\*.txt" in text and "## What is it?" in text and f'is **so**: "{SAID}"' in text
    assert f'- "{SAID}" (word for word, characters ' in text
    page.get_by_role("button", name="Clear the answers").click()
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0
    page.reload()
    page.locator("#documents .document").wait_for()
    assert page.locator(".turn").count() == 0 and page.inner_text("h1") == "The *Rover*.txt"


# The keyboard, the end of an answer


def test_everything_is_done_with_keys(desk):
    page = desk.page
    add(page, file("prose.txt", prose(3000)))
    page.locator("#theme").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("/j?")
    assert page.input_value("#question") == "one\n/j?", "letters are letters where one writes"
    page.fill("#question", "")
    bind(page, "Yes.")
    for question in ("first", "second", "third"):
        ask(page, question)
    focused = "document.activeElement.querySelector('h2')?.textContent"
    page.locator("#theme").focus()
    seen = []
    for key in "jjjjkkk":
        page.keyboard.press(key)
        seen.append(page.evaluate(focused))
    assert seen == ["first", "second", "third", "third", "second", "first", "first"]
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    assert "next answer" in dialog.inner_text()
    dialog.get_by_role("checkbox").uncheck()
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    page.locator("#theme").focus()
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "theme", "letters can be turned off"
    page.keyboard.press("Enter")
    assert page.get_attribute("html", "data-theme") == "light"
    page.reload()
    assert page.get_attribute("html", "data-theme") == "light", "the appearance is kept"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_is_stopped_and_what_was_written_stays(desk, how):
    page = desk.page
    add(page, file("prose.txt", prose(3000)))
    bind(page, *["[a-z ]{2000}"] * 8, max_tokens=6900)  # writes for seconds, so that there is time to stop it
    turn = ask(page, "Go on", done=False)
    until(page, "document.querySelector('.turn .prose').textContent.length > 10")
    assert turn.get_attribute("aria-busy") == "true"
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").press("Enter")  # a mouse waits for a frame, which may be late
    turn.locator(".tools").wait_for()
    assert "Stopped." in turn.locator(".tools").inner_text()
    assert 10 < len(turn.locator(".prose").inner_text()) < 16_000
    page.unroute("**/v1/chat/completions")
    assert KEY in ask(page).locator(".prose").inner_text(), "the next is answered"


def test_an_answer_is_rendered_while_it_grows_and_requests_do_not_pile_up(desk):
    page, open_now, most, count = desk.page, set(), [0], [0]

    def begun(request: Any) -> None:
        if request.url.endswith("/v1/render"):
            open_now.add(request)
            count[0] += 1
            most[0] = max(most[0], len(open_now))

    add(page, file("prose.txt", prose(3000)))
    page.on("request", begun)
    page.on("requestfinished", lambda request: open_now.discard(request))
    bind(page, "- **a** ", *["[a-z]"] * 150)
    turn = ask(page, "Go on")
    assert turn.locator("li strong").inner_text() == "a"
    assert most[0] == 1 and count[0] < 150


# What cannot be


def test_a_document_that_is_too_long_is_refused_with_both_numbers(desk):
    page = desk.page
    page.set_input_files("#file", file("long.txt", prose(60_000)))
    notice = page.get_by_role("alert").filter(has_text="long.txt")
    notice.wait_for()
    text = notice.inner_text()
    tokens = int(re.search(r"([\d,]{5,}) tokens", text)[1].replace(",", ""))
    assert tokens > 8192 and "8,192" in text and "Split it into" in text
    assert desk.server.ask("v1/documents")["data"] == []
    notice.get_by_role("button", name="Dismiss").click()
    assert notice.count() == 0


def test_what_is_no_document_is_refused(desk):
    page = desk.page
    page.set_input_files("#file", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.4 broken"})
    page.get_by_role("alert").filter(has_text="a.pdf").wait_for()
    page.set_input_files("#file", file("empty.txt", " \n"))
    page.get_by_role("alert").filter(has_text="empty.txt").wait_for()
    assert desk.server.ask("v1/documents")["data"] == []


HOSTILE = (
    "<script>alert(1)</script><img src=http://example.org/x.png onerror=alert(1)>"
    "![x](http://example.org/y.png) [link](javascript:alert(1)) <style>@import 'http://example.org/z.css'</style>"
)


def test_a_hostile_document_and_its_name_are_text(desk):
    page = desk.page
    name = "<img src=x onerror=alert(1)>.txt"
    add(page, file(name, f"{prose(2000)}\n\n{HOSTILE}\n\n{key_sentence(KEY)}"))
    assert page.inner_text("h1") == name and page.inner_text("#documents .file") == name
    bind(page, f'"{HOSTILE.partition("!")[0]}"')
    turn = ask(page, HOSTILE)
    assert turn.get_by_role("heading").first.inner_text() == HOSTILE
    turn.get_by_role("button", name="word for word").click()
    mark = page.get_by_role("complementary").locator("mark")
    assert mark.inner_text() == HOSTILE.partition("!")[0]
    page.get_by_role("button", name=f"Delete {name}").click()
    assert name in page.get_by_role("dialog").inner_text()
    assert page.locator("#desk img").count() == 1 and page.locator("#desk style, #desk script").count() == 0


def test_a_hostile_answer_is_text_and_nothing_leaves_the_page(desk):
    page = desk.page
    add(page, file("prose.txt", prose(2000)))
    bind(page, HOSTILE, " <a href=http://example.org id=question class=send>x</a> [out](http://example.org/?q=1)")
    body = ask(page, "a").locator(".prose")
    assert "<script>alert(1)</script>" in body.inner_text() and "[image: x]" in body.inner_text()
    assert body.locator("img, script, style, [id], [class]:not(.host), [onerror]").count() == 0
    (link,) = body.locator("a").all()
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    assert link.inner_text() == "out (example.org)", "where it leads is said"
    page.reload()
    page.locator(".turn .tools").wait_for()
    assert page.locator(".prose img").count() == 0


def test_the_policy_would_refuse_what_got_through(chromium, server):
    """The page's own net, tried without the sanitizer."""
    watched = Watched(chromium, server)
    watched.page.evaluate(
        """() => {
            const image = document.createElement("img");
            image.src = "http://example.org/x.png";
            const inline = document.createElement("div");
            inline.innerHTML = "<img src=x onerror='violations.push(\\"ran\\")'><p style='color: red'>";
            document.body.append(image, inline);
            fetch("http://example.org/").catch(() => {});
            const script = document.createElement("script");
            script.textContent = "violations.push('ran')";
            document.body.append(script);
        }"""
    )
    until(watched.page, "violations.length >= 5")
    kinds = {one.split()[0] for one in watched.page.evaluate("violations")}
    assert kinds == {"img-src", "script-src-attr", "style-src-attr", "connect-src", "script-src-elem"}
    watched.context.close()


def test_what_a_browser_kept_is_not_trusted(desk):
    page = desk.page
    add(page, file("prose.txt", prose(2000)))
    kept = {"turns": [
        {"question": HOSTILE, "answer": HOSTILE, "quotes": [{"text": "a", "found": "exact", "start": "x"}]},
        {"question": 1}, None, {"question": "fine", "answer": "**fine**", "quotes": 3},
    ]}  # fmt: skip
    identity = page.url.partition("#")[2]
    page.evaluate("([key, text]) => localStorage.setItem(key, text)", [f"desk.chat.{identity}", json.dumps(kept)])
    page.reload()
    page.locator(".turn .tools").nth(1).wait_for()
    assert page.locator(".turn").count() == 2 and page.locator(".turn strong").inner_text() == "fine"
    assert page.locator(".turn img, .turn script").count() == 0
    page.evaluate("localStorage.setItem('desk.chat.' + location.hash.slice(1), '{')")
    page.reload()
    page.locator("#fit").wait_for()
    assert page.locator(".turn").count() == 0


# The server: gone, locked, another model


def test_a_server_that_is_gone_is_said_and_it_goes_on_when_it_is_back(chromium, tiny_gguf, tmp_path):
    with serving(tiny_gguf, "--form", "plain", "--n-ctx", "2048", cache=tmp_path / "cache") as server:
        watched = Watched(chromium, server)
        page = watched.page
        add(page, file("prose.txt", prose(2000)))
        bind(page, "Yes.")
        ask(page, "first")
        server.stop()
        turn = ask(page, "Is it there?", done=False)
        page.locator("#offline").get_by_text("does not answer").wait_for()
        turn.get_by_role("alert").wait_for()
        until(page, "document.querySelector('#question').value === 'Is it there?'")
        assert page.locator(".turn").first.locator(".prose").inner_text() == "Yes.", "what is there stays"
        page.set_input_files("#file", file("b.txt", "b"))
        page.get_by_role("alert").filter(has_text="b.txt").wait_for()
        server.start()
        page.locator("#offline").wait_for(state="hidden")
        assert ask(page, "And now?").locator(".prose").inner_text() == "Yes."
        watched.check()
        watched.context.close()


@pytest.fixture(scope="module")
def locked(tiny_gguf, tmp_path_factory) -> Iterator[Server]:
    """A server with a key, whose model has a chat template and flash attention."""
    folder = tmp_path_factory.mktemp("locked")
    path = with_template(tiny_gguf, folder / "chat.gguf", CHATML)
    options = ("--api-key", "open sesame", "--flash-attn", "--n-ctx", "2048")
    with serving(path, *options, cache=folder / "cache") as one:
        yield one


def unlocked(chromium: Any, locked: Server) -> Watched:
    watched = Watched(chromium, locked)
    watched.page.get_by_role("dialog").get_by_label("Key").fill("open sesame")
    watched.page.keyboard.press("Enter")
    watched.page.get_by_role("dialog").wait_for(state="hidden")
    return watched


def test_a_key_is_asked_for_and_kept_for_the_tab_only(chromium, locked):
    watched = Watched(chromium, locked)
    page, dialog = watched.page, watched.page.get_by_role("dialog")
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    dialog.get_by_text("That is not its key.").wait_for()
    dialog.get_by_label("Key").fill("open sesame")
    dialog.get_by_role("button", name="Use it").click()
    page.get_by_text("Drop a book and ask.").wait_for()
    assert "sesame" not in page.evaluate("JSON.stringify({ ...localStorage }) + document.documentElement.outerHTML")
    page.reload()
    page.get_by_text("Drop a book and ask.").wait_for()
    assert dialog.is_hidden()
    other = watched.context.new_page()
    other.goto(locked.url)
    other.get_by_role("dialog").get_by_label("Key").wait_for()
    watched.check()
    watched.context.close()


def test_without_a_document_one_chats_and_flash_attention_is_said(chromium, locked):
    watched = unlocked(chromium, locked)
    page, sent = watched.page, []
    page.on("request", lambda request: "chat" in request.url and sent.append(request.post_data_json))
    bind(page, "Good day.")
    ask(page, "Hello")
    assert page.get_by_role("button", name="Where it looked").count() == 0
    ask(page, "And?")
    assert [len(asked["messages"]) for asked in sent] == [1, 3] and "document" not in sent[0]
    add(page, file("prose.txt", prose(2000)))
    assert page.locator(".turn").count() == 0
    turn = ask(page, "Who?")
    turn.get_by_role("button", name="Where it looked").click()
    turn.get_by_role("alert").filter(has_text="flash attention").wait_for()
    page.get_by_role("button", name="Ask without a document").click()
    assert page.locator(".turn").count() == 2
    watched.check()
    watched.context.close()


def test_answers_above_are_sent_when_wanted_only(chromium, locked):
    watched = unlocked(chromium, locked)
    page, sent = watched.page, []
    page.on("request", lambda request: "chat" in request.url and sent.append(request.post_data_json))
    add(page, file("prose.txt", prose(3000)))
    assert page.locator("#above").is_disabled()
    bind(page, "It is red.")
    ask(page, "What is it?")
    ask(page, "And then?")
    page.check("#above")
    ask(page, "Why?")
    assert [[one["content"] for one in asked["messages"]] for asked in sent] == [
        ["What is it?"],
        ["And then?"],
        ["What is it?", "It is red.", "And then?", "It is red.", "Why?"],
    ]
    assert page.locator(".turn").nth(2).locator(".prose").inner_text() == "It is red."
    watched.check()
    watched.context.close()


# For everybody


def violations(page: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    until(page, "document.getAnimations().every((one) => one.playState !== 'running' || one.animationName)")
    found = Axe().run(page).response
    assert len(found["passes"]) > 8, "it looked"
    return [f"{one['id']}: {node['html'][:120]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (640, 400), (360, 740)], ids=["desktop", "200 %", "phone"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(chromium, server, scheme, size):
    width, height = size
    watched = Watched(chromium, server, color_scheme=scheme, viewport={"width": width, "height": height})
    page, small = watched.page, width < 760
    name = f"a-rather-long-name-without-any-space-{width}-{scheme}.txt"

    def clean(state: str) -> None:
        boxes = "[...document.querySelectorAll('#scroll, .passage, #library')]"
        assert violations(page) == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        assert page.evaluate(f"{boxes}.every((one) => one.scrollWidth <= one.clientWidth)"), state

    page.locator("#empty .large").wait_for()
    clean("empty")
    add(page, file(name, prose(3000)))
    clean("read")
    bind(
        page, f'## It\n\n"{SAID}"\n\n> The pass key was {KEY}; remember it.\n\n"The captain sold seven parrots."\n\n'
        "|a|b|\n|-|-|\n|1|2|\n\n```\n" + "code " * 40 + "\n```\n\n[x](http://example.org)"
    )  # fmt: skip
    turn = ask(page, "What is it?")
    clean("answered")
    turn.get_by_role("button", name="Where it looked").click()
    turn.get_by_role("slider").wait_for()
    clean("looked")
    turn.locator(".quotes button").first.click()
    page.get_by_role("complementary").locator("mark").wait_for()
    clean("passage")
    page.keyboard.press("Escape")
    page.locator("#theme").focus()
    page.keyboard.press("?")
    clean("keys")
    page.keyboard.press("Escape")
    if small:
        assert page.locator("#library").is_hidden()
        page.get_by_role("button", name="Open the library").click()
        clean("library")
    page.get_by_role("button", name=f"Delete {name}").click()
    clean("delete")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.set_input_files("#file", file("long.txt", prose(60_000)))
    page.locator(".notice").wait_for()
    if small:
        page.keyboard.press("Escape")
        page.locator("#library").wait_for(state="hidden")
        assert page.locator("#open-library").evaluate("e => e === document.activeElement")
    clean("too long")
    watched.check()
    watched.context.close()


def test_what_happens_is_said_to_who_does_not_see_it(desk):
    page = desk.page
    add(page, file("prose.txt", prose(3000)))
    until(page, "told.includes('prose.txt was read.')")
    bind(page, "It is **red**.")
    ask(page, "What is it?")
    until(page, "told.includes('Answer: It is **red**.')")
    assert page.get_attribute("#status", "aria-live") == "polite"


def test_motion_is_left_out_where_it_is_not_wanted(chromium, server):
    watched = Watched(chromium, server, reduced_motion="reduce", viewport={"width": 360, "height": 740})
    watched.page.get_by_role("button", name="Open the library").click()
    assert watched.page.evaluate("document.getAnimations().length") == 0
    watched.context.close()


def test_the_page_is_light_and_all_of_it_is_its_own(chromium, server):
    watched = Watched(chromium, server)
    watched.page.wait_for_load_state("networkidle")
    bodies = {request.url: len(request.response().body()) for request in watched.requests}
    assert sum(bodies.values()) < 200_000 and len(bodies) >= len(list(FILES.iterdir()))
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 100_000
    for path in FILES.iterdir():
        elsewhere = set(re.findall(r"https?://[\w.]+", path.read_text())) - {"http://www.w3.org"}
        assert elsewhere == set(), path.name
        if path.suffix == ".js" and path.name != "dom.js":
            assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(", path.read_text())
    assert (FILES / "dom.js").read_text().count("innerHTML") == 1
    watched.check()
    watched.context.close()
