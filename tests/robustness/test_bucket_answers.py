"""Answers of a store that are not what they say: the right data or an error (goal S2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.buckets import Patience, new_key, storage_of
from support.goals import COUNT, record

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.storage import Listing, Prefix, Range, Request, Storage
from tensorstore_fmt.storage.remote import open_remote
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.s3_proxy import Act, Exchange, S3Proxy, serve_s3_proxy
from tensorstore_fmt.testing.servers import Reply, S3Server, serve_http

DATA = bytes(range(100, 140))
N = len(DATA)
REQUESTS: list[Request[Any]] = [
    Range("a", 2, 18),
    Range("a", 0, N),
    Prefix("a", 16),
    Prefix("a", 99),
]
NONSENSE = (
    "",
    "bytes",
    "bytes 2-17",
    "bytes=2-17/40",
    "2-17/40",
    "bytes -2-17/40",
    "bytes 2-17/4O",
    "bytes 17-2/40",
    "bytes 2-17/40, bytes 0-1/40",
    "bytes */40",
)
EVERY = COUNT >= 3  # all n; else some


def forms(step: int) -> Iterator[tuple[str, Act]]:
    """Give all forms of wrong answers; of those with a number every so many."""
    for n in range(0, N + 1, step):
        yield f"cut after {n}", faults.cut(n)
        yield f"reset after {n}", faults.reset(after=n)
        yield f"{n} bytes", faults.shorter(n)
        yield f"{n + 1} bytes more", faults.longer(bytes(n + 1))
        yield f"from {n}", faults.content_range(f"bytes {n}-{n + 15}/{N}")
        yield f"to {n}", faults.content_range(f"bytes 2-{n}/{N}")
        yield f"prefix to {n}", faults.content_range(f"bytes 0-{n}/{N}")
        yield f"of {n}", faults.content_range(f"bytes 2-17/{n}")
        yield f"to {n} of *", faults.content_range(f"bytes 0-{n}/*")
        yield (
            f"shorter and said so, {n}",
            both(faults.shorter(n), faults.content_range(f"bytes 0-{n - 1}/*")),
        )
    for text in NONSENSE:
        yield f"range {text!r}", faults.content_range(text)
    yield "no range", faults.content_range(None)
    yield "200 with all", faults.whole()
    yield "200 with the range", faults.plain()
    yield "another etag", faults.etag()
    yield "gzip", faults.gzipped()
    yield "called gzip", faults.gzipped(packs=False)
    yield "204", answer(204)
    yield "200 without a body", answer(200)
    yield "206 without a body", answer(206)
    yield "a page of a proxy", answer(200, b"<html><body>Please log in</body></html>")
    yield "a redirect", answer(301)
    yield "404 of a proxy", answer(502, b"no route")


def both(*acts: Act) -> Act:
    def act(exchange: Exchange) -> None:
        for each in acts:
            each(exchange)

    return act


def answer(status: int, body: bytes = b"") -> Act:
    def act(exchange: Exchange) -> None:
        exchange.reply = Reply(status, body, {})

    return act


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3) as running:
        yield running


def verdict(request: Request[Any], result: object, form: str) -> str:
    """Say what came of a request: right data, a typed error, or what is wrong."""
    if isinstance(result, FileNotFoundError | TruncatedError) or not isinstance(
        result, OSError | bytes | tuple
    ):
        return f"wrong: {result!r}"
    if isinstance(result, OSError):
        return "error"
    if isinstance(request, Range):
        return "right" if result == DATA[request.start : request.stop] else f"wrong: {result!r}"
    assert isinstance(request, Prefix)
    data, nbytes = result  # type: ignore[misc]
    is_right = data == DATA[: request.nbytes] and nbytes in (N, None)
    return "right" if is_right else f"wrong: {result!r}"


def carry_out(
    proxy: S3Proxy, storage: Storage, goal: str, wrong_for: Callable[[str, Request[Any]], bool]
) -> None:
    met: Counter[str] = Counter()
    wrong = []
    for form, act in forms(1 if EVERY else 13):
        for times in (1, None):  # once; and every time
            for request in REQUESTS:
                with proxy.during(act, ops=["GET"], times=times) as rule:
                    (result,) = storage.fetch_settled([request])
                said = verdict(request, result, form)
                assert rule.done, "no answer was spoilt"
                met[said.partition(":")[0]] += 1
                if said.startswith("wrong") and not wrong_for(form, request):
                    wrong.append(f"{form}, {request}: {said}")
    # An answer that is right in all it says, but is not the file's: the format's checksums tell.
    met["of another file"] = met.pop("wrong", 0) - len(wrong)
    record(goal, met.total() + len(wrong), **met, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} of {met.total()}; the first:\n" + "\n".join(wrong[:9])
    assert met["right"] > met["error"] / 4, "hardly anything was tried again"


def is_undetectable(form: str, request: Request[Any]) -> bool:
    """Whether head and body agree on a lie, which only checksums of the format can notice."""
    if form == "200 without a body" or form.startswith("a page"):
        return isinstance(request, Prefix)  # a file of that length, says the answer
    return form == "200 with the range" and isinstance(request, Prefix)


def test_every_form_of_answer_from_a_bucket(proxy: S3Proxy) -> None:
    with storage_of(proxy, new_key("answers"), Patience(0.15)) as storage:
        storage.publish("a", [DATA])
        carry_out(proxy, storage, "S2 forms of answers, S3", is_undetectable)


def test_every_form_of_answer_from_a_web_server(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    patience = Patience(0.15)
    with (
        serve_http(tmp_path) as server,
        serve_s3_proxy(replace(s3, endpoint_url=server.url)) as proxy,
        open_remote(proxy.endpoint_url, {}, writable=False, retry=patience.policy) as storage,
    ):
        carry_out(proxy, storage, "S2 forms of answers, HTTP", is_undetectable)


def test_a_listing_is_never_shorter(proxy: S3Proxy) -> None:
    names = [f"index/{i:03d}" for i in range(7)]
    met: Counter[str] = Counter()
    wrong = []
    with storage_of(proxy, new_key("answers"), Patience(0.15)) as storage:
        for name in names:
            storage.publish(name, [DATA])
        (right,) = storage.fetch([Listing("index")])
        assert [f"index/{info.base}" for info in right] == names
        length = next(each.sent_nbytes for each in reversed(proxy.log) if each.op == "LIST")
        acts: list[tuple[str, Act]] = [
            ("empty", answer(200)),
            ("204", answer(204)),
            ("foreign XML", answer(200, b"<ListBucketResult/>")),
            ("HTML", answer(200, b"<html></html>")),
            ("error as 200", answer(200, faults.error_reply(200, "InternalError").body)),
            ("gzip", faults.gzipped()),
        ]
        for n in range(0, length, 1 if EVERY else 97):
            acts += [
                (f"cut {n}", faults.cut(n)),
                (f"{n} bytes", faults.shorter(n)),
                (f"reset {n}", faults.reset(after=n)),
            ]
        for form, act in acts:
            for pages in (1000, 3):
                with proxy.during(faults.pages(pages)), proxy.during(act, ops=["LIST"]):
                    (result,) = storage.fetch_settled([Listing("index")])
                is_error = isinstance(result, OSError) and not isinstance(result, FileNotFoundError)
                met["error" if is_error else "right" if result == right else "wrong"] += 1
                if not is_error and result != right:
                    wrong.append(f"{form}, pages of {pages}: {result!r}")
    record("S2 forms of listings", met.total(), **met)
    assert not wrong, f"{len(wrong)}; the first:\n" + "\n".join(wrong[:5])
    assert met["error"]
