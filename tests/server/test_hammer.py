"""Many clients at once, well-meaning and not: every answer right, nothing left over, nothing lost by a kill.

What is right is computed by a model opened here, a token at a time.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest
from serving import SECONDS, Serving, chunks

import pi_gguf
from pi_gguf import bundled

pytest.importorskip("starlette", reason="needs pi-gguf[serve]")

CLIENTS = 8
SLOTS = 4
WINDOW = 2048
LONGEST = 48
"""Tokens of an answer, at most."""

TIE = 0.05
"""Log-probabilities that are nearer than this may change places when other texts share a batch."""

TEXT = next(iter(bundled.novels("heldout").values()))
KEY = "open sesame"


# What is right


@dataclass
class Alone:
    """A prompt, and what the model writes after it.

    Args:
        pieces: the bytes of each token; the last is missing where it is the end token.
        leads: by how much each token's log-probability is above the next, that of the end token too.
        ends: whether an end token came.
    """

    prompt: str
    tokens: int
    pieces: list[bytes] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    ends: bool = False

    def text(self, tokens: int) -> str:
        return b"".join(self.pieces[:tokens]).decode(errors="ignore")

    def verdict(self, text: str, tokens: int, limit: int) -> str:
        """Say whether an answer is this one, `same`, or goes another way where another token was as good, `tie`."""
        expected = min(limit, len(self.pieces))
        if (text, tokens) == (self.text(expected), expected):
            return "same"
        mine = self.text(expected)
        common = next(
            (i for i, (a, b) in enumerate(zip(mine, text, strict=False)) if a != b), min(len(mine), len(text))
        )
        at = next((i for i in range(len(self.pieces)) if len(self.text(i + 1)) > common), len(self.leads) - 1)
        return "tie" if min(self.leads[max(0, at - 2) : at + 1]) < TIE else "wrong"


def prompts() -> list[str]:
    """Return texts of a word to most of the window; three beginnings, each shared by several."""
    return [
        TEXT[start : start + length] for start in (3000, 90_000, 200_000) for length in (9, 60, 400, 1500, 3000, 5000)
    ]


def write_alone(path: Any) -> list[Alone]:
    """Return what a model writes after each prompt, a token at a time."""
    found = []
    with pi_gguf.open(path, n_ctx=WINDOW) as model:
        for prompt in prompts():
            ids = model.tokenize(prompt)
            one = Alone(prompt, len(ids))
            while len(one.pieces) < LONGEST:
                (row,) = np.concatenate(list(model.logits_chunks(ids, 1)))
                second, first = np.sort(row)[-2:]
                one.leads.append(float(first - second))
                token = int(row.argmax())
                if model.is_end(token):
                    one.ends = True
                    break
                one.pieces.append(model.session.piece(token))
                ids.append(token)
            found.append(one)
    return found


@pytest.fixture(scope="module")
def alone(tiny_gguf):
    return write_alone(tiny_gguf)


# Clients


class Hammer:
    """Clients that send one request after another, of a kind drawn for each.

    Args:
        served: what they ask.
        alone: prompts and what is right.
    """

    def __init__(self, served: Serving, alone: list[Alone]) -> None:
        self._served, self._alone = served, alone
        self.endings: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.sent = 0
        self._kinds: list[tuple[int, Callable[[random.Random], str]]] = [
            (6, self.whole), (6, self.streamed), (2, self.drawn), (2, self.document), (2, self.leaves_at_once),
            (3, self.leaves_in_the_stream), (1, self.no_json), (1, self.no_prompt), (1, self.says_it_is_large),
            (1, self.is_large), (1, self.wrong_key), (1, self.wrong_host), (1, self.wrong_model), (1, self.too_long),
        ]  # fmt: skip

    def run(self, seconds: float, least: int, seed: int) -> None:
        """Let all clients ask for so long, and until so many requests were sent."""
        end = time.monotonic() + seconds
        before, counting = self.sent, threading.Lock()

        def client(number: int) -> None:
            rng = random.Random(100 * seed + number)
            while time.monotonic() < end or self.sent - before < least:
                (_, kind), *_ = rng.choices(self._kinds, [weight for weight, _ in self._kinds])
                try:
                    ending = kind(rng)
                except Exception as error:
                    ending = "error"
                    self.wrong.append(f"{kind.__name__}: {error!r}")
                with counting:
                    self.endings[f"{kind.__name__}: {ending}"] += 1
                    self.sent += 1

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 4 * SECONDS)
        assert not any(thread.is_alive() for thread in threads), f"a client hangs; so far {self.endings}"

    def _body(self, rng: random.Random, **more: Any) -> tuple[Alone, dict[str, Any]]:
        one = rng.choice(self._alone)
        limit = rng.randint(1, LONGEST)
        return one, {"model": self._served.name, "prompt": one.prompt, "max_tokens": limit, "temperature": 0, **more}

    def _completed(self, body: dict[str, Any]) -> bytes | None:
        """Return an answer that was accepted; None where the queue was full."""
        status, headers, data = self._served.ask("POST", "/v1/completions", body)
        if status == 429:
            assert int({name.lower(): value for name, value in headers.items()}["retry-after"]) >= 1
            return None
        assert status == 200, (status, data)
        return data

    def _compare(self, one: Alone, body: dict[str, Any], text: str, usage: dict[str, Any], why: str) -> str:
        assert usage["prompt_tokens"] == one.tokens
        verdict = one.verdict(text, usage["completion_tokens"], body["max_tokens"])
        if verdict == "same":
            assert why == ("stop" if one.ends and len(one.pieces) < body["max_tokens"] else "length")
        if verdict == "wrong":
            mine = one.text(body["max_tokens"])
            self.wrong.append(f"after {one.prompt[:40]!r} of {one.tokens} tokens: {text!r} is not {mine!r}")
        return verdict

    def whole(self, rng: random.Random) -> str:
        one, body = self._body(rng)
        data = self._completed(body)
        if data is None:
            return "full"
        answer = json.loads(data)
        (choice,) = answer["choices"]
        return self._compare(one, body, choice["text"], answer["usage"], choice["finish_reason"])

    def streamed(self, rng: random.Random) -> str:
        one, body = self._body(rng, stream=True, stream_options={"include_usage": True})
        data = self._completed(body)
        if data is None:
            return "full"
        parts = chunks(data)
        choices = [choice for part in parts for choice in part["choices"]]
        (usage,) = [part["usage"] for part in parts if part.get("usage")]
        (why,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        return self._compare(one, body, "".join(choice["text"] for choice in choices), usage, why)

    def drawn(self, rng: random.Random) -> str:
        _, body = self._body(rng, temperature=1.0, seed=rng.randrange(1000), stop=["."], logprobs=2)
        data = self._completed(body)
        assert data is None or "." not in json.loads(data)["choices"][0]["text"]
        return "full" if data is None else "answered"

    def document(self, rng: random.Random) -> str:
        start = rng.randrange(len(TEXT) - 3000)
        status, entry = self._served.upload(f"part {start}.txt", TEXT[start : start + 2000].encode())
        assert status in (200, 201), entry
        status, _, data = self._served.ask("DELETE", f"/v1/documents/{entry['id']}")
        assert (status, json.loads(data)["deleted"]) == (200, True)
        return "deleted"

    def leaves_at_once(self, rng: random.Random) -> str:
        _, body = self._body(rng, stream=rng.random() < 0.5)
        self._served.open("/v1/completions", json.dumps(body).encode()).close()
        return "left"

    def leaves_in_the_stream(self, rng: random.Random) -> str:
        one, body = self._body(rng, stream=True)
        body["max_tokens"] = WINDOW - one.tokens
        with self._served.open("/v1/completions", json.dumps(body).encode()) as connection:
            seen = b""
            while seen.count(b"data: ") < rng.randint(1, 20) and (part := connection.recv(4096)):
                seen += part
        status = seen.split(None, 2)[1]
        assert status in (b"200", b"429"), seen[:500]
        return "left"

    def no_json(self, rng: random.Random) -> str:
        body = rng.choice([b"{", b"", b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b"{" * 5000, b"null"])
        return self._refused(400, body)

    def no_prompt(self, rng: random.Random) -> str:
        _, body = self._body(rng)
        name, value = rng.choice([("prompt", 7), ("prompt", None), ("max_tokens", "many"), ("max_tokens", -1),
                                  ("temperature", -1), ("n", 2), ("top_p", 7), ("stop", 3)])  # fmt: skip
        return self._refused(400, json.dumps({**body, name: value}).encode())

    def wrong_model(self, rng: random.Random) -> str:
        _, body = self._body(rng, model="gpt-5")
        return self._refused(404, json.dumps(body).encode())

    def wrong_key(self, rng: random.Random) -> str:
        _, body = self._body(rng)
        key = rng.choice(["Bearer no", "Bearer ", "", f"Basic {KEY}", KEY, f"Bearer {KEY} "[:-2]])
        return self._refused(401, json.dumps(body).encode(), Authorization=key)

    def wrong_host(self, rng: random.Random) -> str:
        _, body = self._body(rng)
        return self._refused(403, json.dumps(body).encode(), Host="evil.example")

    def too_long(self, rng: random.Random) -> str:
        _, body = self._body(rng)
        body["prompt"] = TEXT[: 20 * WINDOW]
        status, _, data = self._served.ask("POST", "/v1/completions", body)
        error = json.loads(data)["error"]
        assert (status, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", WINDOW)
        assert error["n_prompt_tokens"] > WINDOW
        return "400"

    def _refused(self, expected: int, body: bytes, **headers: str) -> str:
        status, _, data = self._served.ask("POST", "/v1/completions", body, **headers)
        assert status == expected and json.loads(data)["error"]["message"], (status, data, body[:200])
        return str(status)

    def says_it_is_large(self, rng: random.Random) -> str:
        """Announce a large body, and send nothing of it."""
        with self._served.open("/v1/completions", b"", Content_Length=str(9 * 2**20)) as connection:
            assert connection.recv(4096).split(None, 2)[1] == b"413"
        return "413"

    def is_large(self, rng: random.Random) -> str:
        """Send a large body without saying how large it is; the server need not listen to its end."""
        part, seen = b"10000\r\n" + b" " * 2**16 + b"\r\n", b""
        with self._served.open("/v1/completions", b"", Transfer_Encoding="chunked") as connection:
            try:
                for _ in range(9 * 2**4):
                    connection.sendall(part)
                connection.sendall(b"0\r\n\r\n")
                seen = connection.recv(4096)
            except ConnectionError:
                return "closed"
        assert seen.split(None, 2)[1] == b"413", seen
        return "413"


# Tests


@pytest.fixture
def served(tiny_gguf, tmp_path) -> Iterator[Serving]:
    with Serving(tiny_gguf, "--n-ctx", WINDOW, "--slots", SLOTS, cache=tmp_path, key=KEY) as server:
        yield server


def wait_until_free(served: Serving) -> dict[str, float]:
    """Return the figures when nobody is served any more."""
    end = time.monotonic() + SECONDS
    while (now := served.figures())["busy"] or now["waiting"]:
        assert time.monotonic() < end, now
        time.sleep(0.1)
    return now


def test_what_is_written_alone_is_right(served, alone):
    hammer = Hammer(served, alone)
    verdicts = Counter()
    for one in alone:
        body = {"model": served.name, "prompt": one.prompt, "max_tokens": LONGEST, "temperature": 0}
        answer = served.json("POST", "/v1/completions", body)
        (choice,) = answer["choices"]
        verdicts[hammer._compare(one, body, choice["text"], answer["usage"], choice["finish_reason"])] += 1
    assert hammer.wrong == [] and verdicts["same"] >= len(alone) - 2, verdicts


@pytest.mark.parametrize(("seconds", "least"), [(5, 60), pytest.param(60, 200, marks=pytest.mark.slow)])
def test_many_clients_get_the_answers_that_each_gets_alone(served, alone, seconds, least):
    hammer = Hammer(served, alone)
    process = psutil.Process(served.pid)
    hammer.run(seconds / 2, least // 2, 1)
    wait_until_free(served)
    warm = process.memory_info().rss
    hammer.run(seconds, least, 2)
    figures = wait_until_free(served)
    grown = process.memory_info().rss - warm
    print(f"{hammer.sent} requests, {grown / 2**20:.1f} MiB more than {warm / 2**20:.0f}", hammer.endings, figures)
    assert hammer.wrong == []
    endings = Counter(ending.rpartition(": ")[2] for ending in hammer.endings.elements())
    assert hammer.sent >= 1.5 * least and endings["same"] > 0.3 * hammer.sent
    assert endings["tie"] <= 0.1 * endings["same"], "more than rounding"
    assert grown < 32 * 2**20
    assert figures["cancelled_total"] > 0 and figures["failed_total"] == 0
    assert process.num_threads() < 64 and len(process.net_connections()) < 8
    everything = {"model": served.name, "prompt": TEXT[:5500], "max_tokens": 1, "temperature": 0}
    tokens = served.json("POST", "/v1/completions", everything)["usage"]["prompt_tokens"]
    assert tokens > 0.8 * WINDOW, "so all of the cache can be had again"


def kept(served: Serving, document: str) -> dict[str, Any]:
    """Return a document's entry when it was read."""
    end = time.monotonic() + SECONDS
    while (entry := served.json("GET", f"/v1/documents/{document}"))["status"] in ("waiting", "reading"):
        assert time.monotonic() < end, entry
        time.sleep(0.05)
    return dict(entry)


def test_a_kill_loses_no_finished_document(tiny_gguf, tmp_path):
    with Serving(tiny_gguf, "--n-ctx", WINDOW, "--slots", SLOTS, cache=tmp_path) as served:
        question = {
            "model": served.name, "messages": [{"role": "user", "content": "Who is it about?"}], "max_tokens": 8,
        }  # fmt: skip
        status, finished = served.upload("finished.txt", TEXT[:4000].encode())
        assert status == 201 and kept(served, finished["id"])["status"] == "kept"
        before = served.json("POST", "/v1/chat/completions", {**question, "document": finished["id"]})
        _, begun = served.upload("begun.txt", TEXT[20_000:24_500].encode())
        served.kill()
        served.start()
        names = {entry["id"]: entry for entry in served.json("GET", "/v1/documents")["data"]}
        assert set(names) == {finished["id"], begun["id"]}
        assert names[finished["id"]]["status"] == "kept" and names[finished["id"]]["name"] == "finished.txt"
        after = served.json("POST", "/v1/chat/completions", {**question, "document": finished["id"]})
        assert after["choices"][0]["message"]["content"] == before["choices"][0]["message"]["content"]
        known = after["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert known > 0.9 * finished["tokens"], "and nothing of it was read again"
        text = served.json("GET", f"/v1/documents/{begun['id']}/text?start=0&end=4500")["text"]
        assert text == TEXT[20_000:24_500]
        served.json("POST", f"/v1/documents/{begun['id']}/read")
        assert kept(served, begun["id"])["status"] == "kept"
