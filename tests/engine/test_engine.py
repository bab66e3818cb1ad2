"""Continuous batching: each text is what it is alone, what is common is read once, and nothing stops the others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import pi_gguf
from pi_gguf import bundled
from pi_gguf.engine.engine import BESIDE, Engine, _shares
from pi_gguf.engine.jobs import Choice, Ended, Job, PromptScored, QueueFull, Read, Written
from pi_gguf.errors import OptionError, ResourceError, TextError
from pi_gguf.runtime.model import Model
from pi_gguf.runtime.sampling import Sampling
from pi_gguf.runtime.session import TooLong
from pi_gguf.runtime.states import States

NOVEL = next(iter(bundled.novels("train").values()))
TEXTS = [NOVEL[start : start + 700] for start in range(0, 8000, 1000)]
WINDOW = 2048


@pytest.fixture(scope="module")
def model(tiny_gguf) -> Iterator[Model]:
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=4 + BESIDE) as model:
        yield model


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    with Engine(model) as engine:
        yield engine
    assert all(sequence.ids == [] for sequence in model.sequences) and model.users == []


async def events(engine: Engine, job: Job) -> list:
    return [event async for event in engine.run(job)]


def done(engine: Engine, *jobs: Job) -> list[list]:
    async def all_of_them() -> list[list]:
        return await asyncio.gather(*(events(engine, job) for job in jobs))

    return asyncio.run(all_of_them())


def emptied(engine: Engine) -> None:
    engine.call(lambda: [engine._drop_idle(set()) for _ in range(8)]).result()
    assert engine.figures().cache_used == 0


def text(told: list) -> str:
    return "".join(event.text for event in told if isinstance(event, Written))


def job(model: Model, prompt: str, limit: int = 24, **options: object) -> Job:
    return Job(model.tokenize(prompt), limit, **options)


@pytest.fixture(scope="module")
def alone(tiny_gguf) -> list[str]:
    """What the model writes after each text, by `Model.complete`."""
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16") as model:
        return ["".join(model.complete(prompt, max_tokens=24)) for prompt in TEXTS]


def test_many_at_once_write_what_each_writes_alone(engine, model, alone):
    told = done(engine, *(job(model, prompt) for prompt in TEXTS))
    assert [text(one) for one in told] == alone
    for one, prompt in zip(told, TEXTS, strict=True):
        assert isinstance(one[-1], Ended) and one[-1].prompt == len(model.tokenize(prompt))
        assert one[-1].why in ("length", "stop") and one[-1].written <= 24
    figures = engine.figures()
    assert figures.requests == len(TEXTS) and figures.busy == figures.waiting == 0
    assert figures.written_tokens == sum(one[-1].written for one in told)


def test_they_share_batches(engine, model):
    """Four texts of 24 tokens take about the batches of one, not of four."""
    done(engine, job(model, TEXTS[0]))
    before = engine.figures().batches
    done(engine, *(job(model, prompt) for prompt in TEXTS[1:5]))
    assert engine.figures().batches - before < 24 + 4 * 3


def test_what_is_common_is_read_once_and_stored_once(engine, model):
    common = model.tokenize(NOVEL[:4000])
    jobs = [Job([*common, 40 + i, 50], 8) for i in range(4)]
    first = done(engine, jobs[0])[0]
    before = engine.figures().batches
    others = done(engine, *jobs[1:])
    assert engine.figures().batches - before < 8 + 3, "there is room for all three at a time"
    assert first[-1].known == 0
    assert all(one[-1].known == len(common) for one in others)
    assert engine.figures().cache_used < len(common) + 100
    assert engine.figures().read_tokens == len(jobs[0].ids) + sum(len(j.ids) - len(common) for j in jobs[1:])


def test_a_copied_prefix_gives_what_a_fresh_reading_gives(engine, model):
    common = model.tokenize(NOVEL[:3000])
    jobs = [Job([*common, *model.tokenize(f" {word}", add_special=False)], 16) for word in ("The", "She", "It", "He")]
    fresh = []
    for one in jobs:
        emptied(engine)
        fresh.append(text(done(engine, one)[0]))
    emptied(engine)
    done(engine, jobs[0])
    assert [text(told) for told in done(engine, *jobs)] == fresh


def test_an_answer_goes_on_while_a_long_prompt_is_read(engine, model):
    """Between two tokens lies one batch, and no more of a long prompt than fits into it."""
    order: list[str] = []

    async def both() -> None:
        async def write() -> None:
            async for event in engine.run(job(model, "Once upon", 60)):
                if isinstance(event, Written):
                    order.append("w")

        async def read() -> None:
            while not order:
                await asyncio.sleep(0)
            async for event in engine.run(job(model, NOVEL[:6000], 1)):
                if isinstance(event, Read) and event.read:
                    order.append("r")

        await asyncio.gather(write(), read())

    asyncio.run(both())
    together = "".join(order)
    assert together.count("r") >= 3
    assert "rrr" not in together, together


def test_a_short_question_does_not_wait_for_a_long_one(engine, model):
    """What is shortest to read comes first; of each batch a quarter is kept for the first that came."""
    long, short = job(model, NOVEL[:5500], 4), job(model, TEXTS[1][:60], 4)
    order: list[str] = []

    async def note(name: str, one: Job) -> None:
        async for event in engine.run(one):
            if isinstance(event, Read) and event.read:
                order.append(f"{name} {event.read}")
            elif isinstance(event, Ended):
                order.append(name)

    async def both() -> None:
        task = asyncio.create_task(note("long", long))
        while not order:
            await asyncio.sleep(0)
        await asyncio.gather(task, note("short", short))

    asyncio.run(both())
    read = [name.startswith("short ") for name in order].index(True)
    assert read < order.index(f"long {len(long.ids)}"), order


def test_shares_of_a_batch():
    class Fake:
        def __init__(self, left, admitted, background=False):
            self.ids, self.done, self.admitted = [0] * left, 0, admitted
            self.job = Job([1], 1, background=background)

    a, b, c, d = Fake(1, 3), Fake(1000, 1), Fake(30, 2), Fake(500, 0, True)
    assert dict(_shares([d, b, c, a], 101)) == {a: 1, c: 30, b: 70, d: 0}
    assert dict(_shares([b, Fake(2000, 4)], 100))[b] == 100
    e = Fake(400, 5)
    assert dict(_shares([b, e], 100)) == {e: 75, b: 25}
    assert dict(_shares([d], 64)) == {d: 64}
    assert _shares([], 64) == []


def test_an_error_while_a_job_gets_its_place_is_that_jobs_alone(model, tmp_path):
    """As of a folder of states that cannot be looked through."""

    class Broken(States):
        def longest(self, *_):
            raise MemoryError("no room to look")

    with Engine(model, states=Broken(tmp_path)) as engine:

        async def all_of_them() -> list:
            jobs = [job(model, TEXTS[0], 30), job(model, TEXTS[1], 4, kept=True), job(model, TEXTS[2], 4)]
            return await asyncio.gather(*(events(engine, one) for one in jobs), return_exceptions=True)

        first, broken, last = asyncio.run(all_of_them())
        assert isinstance(broken, MemoryError)
        assert isinstance(first[-1], Ended) and isinstance(last[-1], Ended)
        assert engine.figures().failed == 1


def test_a_scored_prompt_that_is_put_back_is_scored_from_its_start(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=2 + BESIDE) as model, Engine(model) as engine:
        bias = Sampling(logit_bias={model.info.metadata["tokenizer.ggml.eos_token_id"]: -np.inf})
        ids = model.tokenize(NOVEL[:5500])
        expected = [c.logprob for c in scored_of(done(engine, Job(ids, 1, prompt_top=0))[0]) if c]

        put = []

        def put_back() -> None:
            """Between any two batches: a prompt of which a part was scored waits again, once."""
            put.extend(work for work in engine._busy() if work.job.prompt_top is not None and work.done)
            for work in put:
                engine._wait_again(work)
            if not put:
                engine.call(put_back)

        async def both() -> list:
            writing = asyncio.create_task(events(engine, Job(model.tokenize("Once upon"), 300, bias)))
            while not engine.figures().written_tokens:
                await asyncio.sleep(0)
            scoring = asyncio.create_task(events(engine, Job(ids, 1, prompt_top=0)))
            engine.call(put_back)
            return await asyncio.gather(writing, scoring)

        _, told = asyncio.run(both())
        assert len(put) == 1
        found = [c.logprob for c in scored_of(told) if c]
        np.testing.assert_allclose(found, expected, atol=5e-3)  # batches of other sizes round otherwise


@contextlib.contextmanager
def held_up(engine: Engine) -> Iterator[None]:
    """What is asked meanwhile begins together behind this."""
    gate = threading.Event()
    engine.call(gate.wait)
    try:
        yield
    finally:
        gate.set()


async def together(engine: Engine, **jobs: Job) -> list[tuple[str, type]]:
    """Ask for all before the first begins; return whose events came, and which."""
    told: list[tuple[str, type]] = []

    async def note(name: str, one: Job) -> None:
        async for event in engine.run(one):
            told.append((name, type(event)))

    with held_up(engine):
        tasks = [asyncio.create_task(note(name, one)) for name, one in jobs.items()]
        while engine.figures().requests < len(tasks):
            await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return told


def test_what_waits_in_the_background_stops_nobody_behind_it(engine, model):
    long, other = model.tokenize(NOVEL[:5500]), model.tokenize(NOVEL[20000:25500])
    told = asyncio.run(together(engine, first=Job(long, 0, background=True), second=Job(other, 0, background=True),
                                asked=job(model, TEXTS[0], 2)))  # fmt: skip
    ends = [name for name, kind in told if kind is Ended]
    assert ends == ["asked", "first", "second"]


def test_no_more_are_worked_on_than_there_are_slots(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=1 + BESIDE) as model, Engine(model) as engine:
        assert engine.slots == engine.figures().slots == 1
        told = asyncio.run(together(engine, a=job(model, TEXTS[0], 8), b=job(model, TEXTS[1], 8)))
        assert [name for name, _ in told].index("b") > told.index(("a", Ended))


def test_leaving_while_it_waits_is_counted_and_nothing_is_read(engine, model):
    async def leave() -> None:
        with held_up(engine):
            task = asyncio.create_task(events(engine, job(model, TEXTS[0])))
            while not engine.figures().waiting:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait({task})

    asyncio.run(leave())
    engine.call(lambda: None).result()
    assert engine.figures().cancelled == 1 and engine.figures().read_tokens == engine.figures().waiting == 0


def test_an_end_token_ends_a_text(engine, model):
    end = model.info.metadata["tokenizer.ggml.eos_token_id"]
    (told,) = done(engine, job(model, TEXTS[0], 9, sampling=Sampling(logit_bias={end: 1000.0})))
    assert (told[-1].why, told[-1].written, text(told)) == ("stop", 0, "")


def test_what_is_idle_gives_way_to_a_text_that_grows(engine, model):
    engine._patience = 10**9
    held = model.tokenize(NOVEL[:4600])
    done(engine, Job(held, 0))
    bias = Sampling(logit_bias={model.info.metadata["tokenizer.ggml.eos_token_id"]: -np.inf})
    (told,) = done(engine, Job(model.tokenize(TEXTS[7]), WINDOW - len(held) - 50, bias))
    assert told[-1].why == "length" and engine.figures().preempted == 0
    assert engine.known(held) <= 1


def scored_of(told: list) -> tuple[Choice | None, ...]:
    (scored,) = [event for event in told if isinstance(event, PromptScored)]
    return scored.choices


def test_leaving_frees_the_place_and_the_others_go_on(engine, model, alone):
    async def leave() -> None:
        stream = engine.run(job(model, TEXTS[1], 500))
        async for event in stream:
            if isinstance(event, Written):
                break
        await stream.aclose()

    async def all_of_it() -> list[str]:
        kept, *_ = await asyncio.gather(events(engine, job(model, TEXTS[0])), leave(), leave(), leave())
        return kept

    assert text(asyncio.run(all_of_it())) == alone[0]
    engine.call(lambda: None).result()
    assert engine.figures().cancelled == 3 and engine.figures().busy == 0
    assert text(done(engine, job(model, TEXTS[2]))[0]) == alone[2]


def test_a_cancelled_task_frees_the_place(engine, model):
    async def cancel() -> None:
        task = asyncio.create_task(events(engine, job(model, TEXTS[0], 1000)))
        while engine.figures().written_tokens < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    engine.call(lambda: None).result()
    assert engine.figures().busy == 0 and engine.figures().cancelled == 1


def test_a_full_queue_says_when_to_come_again(model):
    with Engine(model, queue=2) as engine:

        async def many() -> list:
            return await asyncio.gather(
                *(events(engine, job(model, prompt, 40)) for prompt in TEXTS), return_exceptions=True
            )

        refused = [told for told in asyncio.run(many()) if isinstance(told, QueueFull)]
        assert refused and all(one.retry_after >= 1 for one in refused)


def test_what_does_not_fit_is_refused_with_both_numbers(engine, model):
    long = Job([5] * 2000, 49)
    with pytest.raises(TooLong, match="2000 tokens and 49 to write do not fit the window of 2048 tokens") as caught:
        done(engine, long)
    assert (caught.value.tokens, caught.value.writing, caught.value.window) == (2000, 49, WINDOW)
    with pytest.raises(TextError):
        done(engine, Job([], 4))
    with pytest.raises(OptionError):
        done(engine, Job([1], 4, Sampling(logit_bias={10**6: 1.0})))
    assert engine.figures().busy == engine.figures().waiting == 0


def test_jobs_that_do_not_fit_together_take_turns(engine, model):
    """Four of 800 tokens need 3200 places, the cache has 2048: each still gives what it gives alone."""
    prompts = [NOVEL[start : start + 3000] for start in range(0, 20000, 5000)]
    jobs = [job(model, prompt, 16) for prompt in prompts]
    assert sum(len(one.ids) for one in jobs) > WINDOW > max(len(one.ids) for one in jobs)
    one_by_one = [text(done(engine, one)[0]) for one in jobs]
    assert [text(told) for told in done(engine, *jobs)] == one_by_one


def test_a_cache_that_overflows_lets_the_youngest_wait_and_loses_nothing(engine, model):
    """Answers grow beyond what was promised them: one is put back and goes on later, with the same text."""
    jobs = [Job(model.tokenize(NOVEL[start : start + 1200]), 900) for start in (0, 5000, 9000)]
    biased = [Job(one.ids, 900, Sampling(logit_bias={model.info.metadata["tokenizer.ggml.eos_token_id"]: -np.inf}))
              for one in jobs]  # fmt: skip
    alone = [text(done(engine, one)[0]) for one in biased]
    assert engine.figures().preempted == 0
    order: list[int] = []

    async def noted(number: int) -> list:
        told = await events(engine, biased[number])
        order.append(number)
        return told

    async def all_of_them() -> list[list]:
        return await asyncio.gather(*map(noted, range(3)))

    told = asyncio.run(all_of_them())
    assert engine.figures().preempted > 0
    assert order[0] == 0, "it is never the first that has to wait"
    assert [one[-1].why for one in told] == ["length"] * 3
    same = [sum(a == b for a, b in zip(text(one), other, strict=False)) for one, other in zip(told, alone, strict=True)]
    assert [text(one)[:200] for one in told] == [other[:200] for other in alone], same


def test_what_nobody_uses_is_dropped_when_it_has_cost_what_it_could_save(engine, model):
    """Each token looks at all that the cache holds; what is used again stays."""
    held = model.tokenize(TEXTS[0])
    done(engine, Job(held, 1))
    patience = engine._patience
    assert patience == round(model.reading_cost(0, 1) / (20 * model.attention_cost())) > 8
    bias = Sampling(logit_bias={model.info.metadata["tokenizer.ggml.eos_token_id"]: -np.inf})
    done(engine, Job(model.tokenize(TEXTS[1]), patience - 2, bias))
    assert engine.known(held) == len(held)
    done(engine, Job(model.tokenize(TEXTS[2]), 8, bias))
    assert engine.known(held) == 1 < engine.known(model.tokenize(TEXTS[1])), "the begin token alone is common"


def test_background_waits_for_all_others(engine, model):
    """A document is read when nothing else is to be done; what it has read stays while it waits."""
    order = []

    async def both() -> None:
        async def background() -> list:
            return await events(engine, Job(model.tokenize(NOVEL[:6500]), 0, background=True))

        async def others() -> None:
            while not engine.figures().read_tokens:
                await asyncio.sleep(0)
            await asyncio.gather(*(events(engine, job(model, prompt, 4)) for prompt in TEXTS[:6]))
            order.append("others")

        async def first() -> None:
            told = await background()
            order.append("background")
            assert told[-1].written == 0 and told[-1].why == "length"

        await asyncio.gather(first(), others())

    asyncio.run(both())
    assert sorted(order) == ["background", "others"]
    assert engine.known(model.tokenize(NOVEL[:6500])) == len(model.tokenize(NOVEL[:6500]))


def test_a_job_in_the_background_takes_nobodys_slot(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=1 + BESIDE) as model, Engine(model) as engine:

        async def both() -> list[str]:
            ended: list[str] = []

            async def note(name: str, one: Job) -> None:
                await events(engine, one)
                ended.append(name)

            async def later() -> None:
                while not engine.figures().read_tokens:
                    await asyncio.sleep(0)
                await note("asked", job(model, TEXTS[0], 2))

            await asyncio.gather(note("document", Job(model.tokenize(NOVEL[:6500]), 0, background=True)), later())
            return ended

        assert asyncio.run(both()) == ["asked", "document"]
        assert engine.figures().preempted == 0


def test_log_probabilities_are_those_of_a_plain_reading(engine, model, tiny_gguf):
    ids = model.tokenize(TEXTS[0])
    done(engine, Job(ids, 1))  # what is known already is scored, too
    (told,) = done(engine, Job(ids, 3, top=2, prompt_top=1))
    (scored,) = [event for event in told if isinstance(event, PromptScored)]
    written: list[Choice] = [choice for event in told if isinstance(event, Written) for choice in event.choices]
    whole = [*ids, *(choice.token for choice in written)]
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16") as plain:
        expected, first = plain.score(whole, len(whole) - 1)
    found = [choice.logprob for choice in [*scored.choices[1:], *written] if choice]
    np.testing.assert_allclose(found, expected, atol=5e-3)  # batches of other sizes round otherwise
    assert scored.choices[0] is None and len(scored.choices) == len(ids)
    assert [c.top[0][0] == c.token for c in scored.choices[1:] if c] == list(first[: len(ids) - 1])
    assert all(len(c.top) == 2 and c.top[0][2] >= c.top[1][2] and c.top[0][0] == c.token for c in written)
    assert written[0].piece == model.session.piece(written[0].token)


def test_stop_strings_seeds_and_grammars_are_each_texts_own(engine, model):
    jobs = [
        job(model, TEXTS[0], 40, sampling=Sampling(stop=["e"])),
        job(model, TEXTS[1], 40, sampling=Sampling(temperature=1.5, seed=7)),
        job(model, TEXTS[1], 40, sampling=Sampling(temperature=1.5, seed=8)),
        job(model, TEXTS[2], 40, sampling=Sampling(grammar='root ::= " yes" | " no"')),
    ]
    stopped, seven, eight, grammar = (text(told) for told in done(engine, *jobs))
    assert "e" not in stopped
    assert seven != eight
    assert grammar in (" yes", " no")
    assert text(done(engine, jobs[1])[0]) == seven


def test_what_was_read_is_saved_and_brought_back(model, tmp_path):
    """Also where the sequence has gone on with an answer, and the one that copies is emptied again."""
    ids = model.tokenize(NOVEL[:5000])
    states = States(tmp_path / "documents")
    asked = Job([*ids, *model.tokenize(" So", add_special=False)], 12, kept=True)
    with Engine(model, states=states) as engine:
        done(engine, Job(ids, 0))
        size = len(engine.call(lambda: engine.saved(ids)).result()[1])
        emptied(engine)
        fresh = done(engine, asked)[0]
        known, state = engine.call(lambda: engine.saved(ids)).result()
        assert len(state) == size, "and nothing of the answer"
        assert known == len(ids) and engine._spare.ids == []
        assert states.keep(model.identity, ids, len(state), lambda into: np.copyto(into, state) or len(state),
                           document="novel", model="m")  # fmt: skip
    with Engine(model, states=states) as again:
        told = done(again, asked)[0]
        assert told[-1].known == len(ids) and text(told) == text(fresh)
        assert again.figures().read_tokens == len(asked.ids) - len(ids)
    with Engine(model, states=states) as not_asked:
        assert done(not_asked, Job(asked.ids, 1))[0][-1].known == 0


def test_a_model_that_is_closed_ends_its_engine_first(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=WINDOW, type_k="f16", sequences=1 + BESIDE) as model, Engine(model) as engine:

        async def close_in_between() -> list:
            task = asyncio.create_task(events(engine, job(model, TEXTS[0], 1000)))
            while not engine.figures().written_tokens:
                await asyncio.sleep(0)
            await asyncio.to_thread(model.close)
            return await task

        assert asyncio.run(close_in_between())[-1].why == "cancelled"
        assert not engine._thread.is_alive()
        with pytest.raises(ResourceError, match="the server ends"):
            done(engine, Job([1, 2, 3], 4))


def test_closing_ends_what_goes_on(model):
    engine = Engine(model)

    async def close_in_between() -> list:
        task = asyncio.create_task(events(engine, job(model, TEXTS[0], 1000)))
        while not engine.figures().written_tokens:
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        return await task

    told = asyncio.run(close_in_between())
    assert told[-1].why == "cancelled"
    assert not engine._thread.is_alive()


def test_the_model_is_the_engines_while_it_runs(engine, model):
    stop = threading.Event()
    stop.set()
    assert list(model.complete("Once", max_tokens=2, cancelled=stop.is_set)) == []


def test_needs_a_model_of_several_sequences(tiny_gguf):
    with pi_gguf.open(tiny_gguf, n_ctx=64) as model, pytest.raises(OptionError, match="3 sequences"):
        Engine(model)
