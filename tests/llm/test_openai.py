"""The OpenAI-compatible backend against a real server on the loopback interface."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.errors import BackendConfigError, BackendError, ConfigError, RequestRefusedError
from agentic_r_plugin.llm import openai
from agentic_r_plugin.llm.base import Continuation, Request, Sampling
from agentic_r_plugin.llm.openai import OpenAIBackend
from tests.data.scripted import CharCodec
from tests.llm.loopback import CUT, Answer, chat, serve

CODEC = CharCodec()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_FIRST_PAUSE_S", 0.01)


def backend(url: str, **settings) -> OpenAIBackend:
    made = OpenAIBackend(url, "the-model", **{"timeout_s": 5.0, **settings})
    made._codec = CODEC  # one id a character; a real tokenizer is used below
    return made


def request(text: str, max_tokens: int = 50) -> Request:
    return Request(prompt_ids=tuple(CODEC.encode(text)), max_tokens=max_tokens)


def completion(text: str, **fields) -> tuple[int, dict]:
    return 200, {"choices": [{"text": text, **fields}], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}


def test_prompts_are_sent_as_token_ids_and_continuations_come_back_in_order():
    def answer(path: str, body: dict) -> tuple[int, dict]:
        prompt = CODEC.decode(body["prompt"])
        time.sleep(0.2 if prompt == "a" else 0.0)
        return completion(f"{prompt}!")

    with serve(answer) as server:
        done = backend(server.url).generate([request(letter) for letter in "abc"], Sampling(stop=("</s>",)))
    assert [CODEC.decode(one.token_ids) for one in done] == ["a!", "b!", "c!"]
    assert [(one.prompt_tokens, one.cached_tokens) for one in done] == [(1, 2)] * 3
    path, body, _ = server.requests[0]
    assert path == "/v1/completions"
    assert body | {"prompt": None} == {
        "model": "the-model", "prompt": None, "max_tokens": 50, "temperature": 0.0, "top_p": 1.0, "stop": ["</s>"],
        "include_stop_str_in_output": True, "no_stop_trim": True, "skip_special_tokens": False,
        "return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # fmt: skip


def test_half_a_character_that_a_server_sends_becomes_the_replacement_character():
    with serve(lambda path, body: completion("caf\ud83d \U0001f600")) as server:
        (done,) = backend(server.url).generate([request("a")], Sampling())
    assert CODEC.decode(done.token_ids) == "caf\ufffd \U0001f600"


def test_token_ids_of_the_server_are_taken_as_they_are():
    with serve(lambda path, body: completion("xyz", token_ids=[7, 8])) as server:
        (done,) = backend(server.url).generate([request("a")], Sampling())
    assert done.token_ids == (7, 8)


STOP = Sampling(stop=("</search>", "</answer>"))


@pytest.mark.parametrize("text", ["<search> q ", "<search> q </search>"])
@pytest.mark.parametrize("name", ["stop_reason", "matched_stop"])
def test_a_stop_string_that_vllm_or_sglang_left_out_is_put_back(name: str, text: str):
    with serve(lambda path, body: completion(text, finish_reason="stop", **{name: "</search>"})) as server:
        (done,) = backend(server.url).generate([request("a")], STOP)
    assert CODEC.decode(done.token_ids) == "<search> q </search>"


@pytest.mark.parametrize(
    "reported",
    [
        {"finish_reason": "stop", "stop_reason": None},
        {"finish_reason": "stop", "matched_stop": 151645},
        {"finish_reason": "length"},
    ],
)
def test_a_text_that_no_stop_string_ended_stays_as_it_is(reported: dict):
    with serve(lambda path, body: completion("I give up.", **reported)) as server:
        (done,) = backend(server.url).generate([request("a")], STOP)
    assert CODEC.decode(done.token_ids) == "I give up."


def test_a_server_that_may_have_dropped_the_stop_string_is_refused_and_one_that_keeps_it_is_not():
    texts = iter(["<search> q </search>", "<search> q "])
    with serve(lambda path, body: completion(next(texts), finish_reason="stop")) as server:
        made = backend(server.url)
        (done,) = made.generate([request("a")], STOP)
        assert CODEC.decode(done.token_ids) == "<search> q </search>"
        with pytest.raises(BackendError, match=r"keeps stop strings.*found neither in .*<search> q '"):
            made.generate([request("a")], STOP)


def test_a_server_on_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serve(lambda path, body: chat("near")) as server:
        assert backend(server.url, max_retries=0).chat(["hello"], max_tokens=5) == ["near"]


def test_no_continuation_is_longer_than_was_asked_for():
    with serve(lambda path, body: completion("long text")) as server:
        (done,) = backend(server.url).generate([request("a", max_tokens=4)], Sampling())
    assert CODEC.decode(done.token_ids) == "long"


def test_sampling_sends_a_seed_that_depends_on_the_prompt_alone():
    with serve(lambda path, body: completion("x")) as server:
        made = backend(server.url)
        sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=1)
        made.generate([request("a"), request("b")], sampling)
        made.generate([request("b")], sampling)
    seeds = {CODEC.decode(body["prompt"]): body["seed"] for _, body, _ in server.requests[:2]}
    assert server.requests[2][1]["seed"] == seeds["b"] != seeds["a"]
    assert (server.requests[0][1]["temperature"], server.requests[0][1]["top_k"]) == (0.7, 5)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(status: int):
    answers = iter([(status, "busy"), (status, "busy", {"Retry-After": "0"}), chat("fine")])
    with serve(lambda path, body: next(answers)) as server:
        assert backend(server.url).chat(["hello"], max_tokens=5) == ["fine"]
    assert len(server.requests) == 3


def test_a_failure_that_stays_is_an_error_that_says_what_the_server_said():
    with (
        serve(lambda path, body: (503, "out of memory")) as server,
        pytest.raises(BackendError, match=r"HTTP 503: out of memory \(tried 3 times\)"),
    ):
        backend(server.url, max_retries=2).chat(["hello"], max_tokens=5)


def test_a_refused_request_is_not_tried_again():
    with (
        serve(lambda path, body: (404, "no such model")) as server,
        pytest.raises(BackendError, match=r"/v1/chat/completions: HTTP 404: no such model"),
    ):
        backend(server.url).chat(["hello"], max_tokens=5)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_message_or_a_prompt_that_is_refused_is_so_alone(status: int):
    def answer(path: str, body: dict) -> Answer:
        prompt = CODEC.decode(body["prompt"]) if "prompt" in body else body["messages"][0]["content"]
        if prompt == "long":
            return status, "context is 8 tokens"
        return completion("fine") if "prompt" in body else chat("fine")

    with serve(answer) as server:
        first, second, third = backend(server.url).chat(["a", "long", "b"], max_tokens=5)
        assert (first, third) == ("fine", "fine") and isinstance(second, RequestRefusedError)
        assert str(second).endswith(f"/v1/chat/completions: HTTP {status}: context is 8 tokens")
        assert len(server.requests) == 3
        first, second, third = backend(server.url).generate([request(text) for text in ("a", "long", "b")], Sampling())
        assert [CODEC.decode(one.token_ids) for one in (first, third)] == ["fine", "fine"]
        assert isinstance(second, RequestRefusedError) and "context is 8 tokens" in str(second)


def test_a_server_that_does_not_answer_in_time_is_an_error():
    def slow(path: str, body: dict) -> tuple[int, dict]:
        time.sleep(0.5)
        return completion("late")

    with serve(slow) as server, pytest.raises(BackendError, match=r"ReadTimeout.*tried 2 times"):
        backend(server.url, timeout_s=0.1, max_retries=1).chat(["hello"], max_tokens=5)


def test_no_server_at_all_is_an_error_that_names_the_address():
    with serve(lambda path, body: chat("x")) as server:
        gone = server.url
    with pytest.raises(BackendError, match=r"127\.0\.0\.1.*ConnectError"):
        backend(gone, max_retries=0).chat(["hello"], max_tokens=5)


MISSHAPEN = ["not json", "", [], {}, {"choices": []}, {"choices": [{"message": {}}]}, {"choices": [{"message": 1}]}]


@pytest.mark.parametrize("content", MISSHAPEN)
def test_an_answer_of_another_form_is_asked_for_again_and_then_an_error(content):
    with (
        serve(lambda path, body: (200, content)) as server,
        pytest.raises(BackendError, match=r"expected .*tried 2 times"),
    ):
        backend(server.url, max_retries=1).chat(["hello"], max_tokens=5)
    assert len(server.requests) == 2


def test_an_answer_that_is_cut_off_is_asked_for_again():
    answers = iter([CUT, CUT, chat("whole")])
    with serve(lambda path, body: next(answers)) as server:
        made = backend(server.url)
        assert made.chat(["hello"], max_tokens=5) == ["whole"]
    assert (len(server.requests), made.usage.requests, made.usage.retried) == (3, 1, 2)


def test_a_message_without_text_is_an_empty_reply_and_not_asked_again():
    """As reasoning models give it when they are cut before they answer."""
    with serve(lambda path, body: (200, {"choices": [{"message": {"content": None}}]})) as server:
        assert backend(server.url).chat(["hello"], max_tokens=5) == [""]
    assert len(server.requests) == 1


def test_an_answer_that_cannot_be_read_was_paid_for_too():
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    answers = iter([(200, {"choices": [], "usage": usage}), (200, chat("x")[1] | {"usage": usage})])
    with serve(lambda path, body: next(answers)) as server:
        made = backend(server.url)
        assert made.chat(["hello"], max_tokens=5) == ["x"]
    found = made.usage
    assert (found.prompt_tokens, found.generated_tokens, found.requests, found.retried) == (14, 6, 1, 1)


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
def test_cached_tokens_that_the_server_does_not_report_are_unknown(details):
    answer = {"choices": [{"text": "x", "finish_reason": "length"}], "usage": {"prompt_tokens": 1, **details}}
    with serve(lambda path, body: (200, answer)) as server:
        made = backend(server.url)
        [done] = made.generate([request("a")], Sampling())
    assert done.cached_tokens is None
    assert (made.usage.prompt_tokens, made.usage.cached_tokens, made.usage.cache_unknown_tokens) == (1, 0, 1)


def test_tokens_are_counted_and_paid_for():
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 400}}
    prices = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_generated_tokens": 10.0}
    with serve(lambda path, body: (200, chat("x")[1] | {"usage": usage})) as server:
        spec = LLMSpec(backend="openai", url=server.url, model="m", options=prices)
        for cached, expected in ((None, 2100e-6 * 3), (0.5, (600 * 2 + 400 * 0.5 + 10 * 10) / 1e6 * 3)):
            extra = {} if cached is None else {"usd_per_million_cached_tokens": cached}
            with open_llm(replace(spec, options=prices | extra)) as made:
                made.chat(["a", "b", "c"], max_tokens=5)
                assert (made.usage.prompt_tokens, made.usage.cached_tokens) == (3000, 1200)
                assert (made.usage.generated_tokens, made.usage.usd) == (30, pytest.approx(expected))
        with (
            pytest.raises(ConfigError, match="openai has no option 'price'"),
            open_llm(replace(spec, options={"price": 1})),
        ):
            pass


def test_requests_are_kept_below_the_rate_also_when_they_are_concurrent():
    with serve(lambda path, body: chat("x")) as server:
        made = backend(server.url, requests_per_minute=60 * 50)
        started = time.monotonic()
        made.chat([str(number) for number in range(11)], max_tokens=5)
    assert time.monotonic() - started >= 10 / 50


def test_the_key_is_read_from_the_named_environment_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "secret")
    spec = LLMSpec(backend="openai", model="m", api_key_env="MY_KEY")
    with serve(lambda path, body: chat("hi")) as server:
        with open_llm(LLMSpec(**{**vars(spec), "url": server.url})) as made:
            assert made.chat(["hello"], max_tokens=5) == ["hi"]
        assert server.requests[0][2]["Authorization"] == "Bearer secret"


# --- Replies ----------------------------------------------------------------------------------------------------------


def message(content, finish: str = "stop", **fields) -> tuple[int, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": content, **fields}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("answer", "text", "cut"),
    [
        (message("fine"), "fine", False),
        (message("fi", "length"), "fi", True),
        (message(None, "length", reasoning_content="I think"), "", True),
        (message(None, reasoning_content="I think"), "", False),
        ((200, {"choices": [{"message": {"reasoning": "so"}, "finish_reason": "length"}]}), "", True),
        (message([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]), "fine", False),
        (
            message(
                [{"type": "thinking", "thinking": [{"type": "text", "text": "[9]"}]}, {"type": "text", "text": "x"}]
            ),
            "x",
            False,
        ),
    ],
)
def test_a_reply_is_the_messages_text_and_says_whether_it_was_cut(answer: Answer, text: str, cut: bool):
    with serve(lambda path, body: answer) as server:
        (reply,) = backend(server.url).chat(["hello"], max_tokens=5)
    assert reply == text and reply.cut is cut


@pytest.mark.parametrize("answer", [message(None, refusal="I will not"), message("par", "content_filter")])
def test_a_reply_that_the_model_or_a_filter_declines_is_a_refusal(answer: Answer):
    with serve(lambda path, body: answer) as server:
        (reply,) = backend(server.url).chat(["hello"], max_tokens=5)
    assert isinstance(reply, RequestRefusedError) and len(server.requests) == 1


def test_a_continuation_says_whether_it_was_cut():
    reasons = iter(["length", "stop"])
    with serve(lambda path, body: completion("x", finish_reason=next(reasons))) as server:
        made = backend(server.url)
        assert [made.generate([request("a")], Sampling())[0].cut for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("reason", "cut"),
    [*((name, False) for name in ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP", "tool_calls", None)),
     *((name, True) for name in ("model_length", "MAX_TOKENS", "insufficient_system_resource", "recitation"))],
)  # fmt: skip
def test_only_the_finish_reasons_of_a_complete_text_are_whole(reason: str | None, cut: bool):
    with serve(
        lambda path, body: message("x", reason) if "messages" in body else completion("x", finish_reason=reason)
    ) as server:
        made = backend(server.url)
        assert made.chat(["hello"], max_tokens=5)[0].cut is cut
        assert made.generate([request("a")], Sampling())[0].cut is cut


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_failed_generation_is_asked_for_again_and_is_no_end_of_sequence(reason: str):
    answers = iter([completion("", finish_reason=reason), completion("x", finish_reason="stop")])
    with serve(lambda path, body: next(answers)) as server:
        (done,) = backend(server.url).generate([request("a")], Sampling())
    assert CODEC.decode(done.token_ids) == "x" and len(server.requests) == 2
    with (
        serve(lambda path, body: completion("", finish_reason=reason)) as server,
        pytest.raises(BackendError, match=rf"expected a whole generation.*{reason}.*tried 2 times"),
    ):
        backend(server.url, max_retries=1).generate([request("a")], Sampling())


@pytest.mark.parametrize("reason", ["model_length", "content_filter"])
def test_a_continuation_that_is_cut_before_its_first_token_is_a_refusal_and_no_end_of_sequence(reason: str):
    with serve(lambda path, body: completion("", finish_reason=reason)) as server:
        (done,) = backend(server.url).generate([request("a")], Sampling())
    assert isinstance(done, RequestRefusedError) and reason in str(done)


def test_a_message_whose_thoughts_used_all_tokens_is_an_empty_cut_reply():
    choice = {"finish_reason": "length", "message": {"role": "assistant"}}
    with serve(lambda path, body: (200, {"choices": [choice]})) as server:
        (reply,) = backend(server.url).chat(["hello"], max_tokens=5)
    assert reply == "" and reply.cut and len(server.requests) == 1


def test_an_error_with_status_200_goes_through_the_rules_of_refusals():
    def answer(path: str, body: dict) -> Answer:
        reported = {
            "long": {"code": 400, "message": "maximum context length is 8 tokens"},
            "long too": {"message": "prompt is too long", "code": "context_length_exceeded"},
        }.get(body["messages"][0]["content"])
        return (200, {"error": reported}) if reported else chat("fine")

    with serve(answer) as server:
        first, second, third = backend(server.url).chat(["long", "a", "long too"], max_tokens=5)
    assert second == "fine" and len(server.requests) == 3
    assert isinstance(first, RequestRefusedError) and "HTTP 400" in str(first) and "maximum context" in str(first)
    assert isinstance(third, RequestRefusedError)
    with (
        serve(lambda path, body: (200, {"error": {"code": 401, "message": "No auth credentials found"}})) as server,
        pytest.raises(BackendConfigError, match=r"llm\.api_key_env"),
    ):
        backend(server.url).chat(["a"], max_tokens=5)
    answers = iter([(200, {"error": {"code": 502, "message": "Provider returned error"}}), chat("fine")])
    with serve(lambda path, body: next(answers)) as server:
        assert backend(server.url).chat(["a"], max_tokens=5) == ["fine"]


def test_a_failed_look_at_the_model_list_is_repeated_and_an_answer_is_kept(monkeypatch: pytest.MonkeyPatch):
    statuses = iter([503, 429, 200])
    looks = []
    models = [{"id": "m", "owned_by": "vllm"}]
    with serve(lambda path, body: chat("x"), models=models) as server:
        made = backend(server.url)
        get = made._client.get

        def look(*arguments, **settings):
            looks.append(1)
            if len(looks) == 1:
                raise httpx.ConnectError("refused")
            response = get(*arguments, **settings)
            response.status_code = next(statuses)
            return response

        monkeypatch.setattr(made._client, "get", look)
        for _ in range(5):
            made.chat(["hello"], max_tokens=5)
    assert ["top_k" in body for _, body, _ in server.requests] == [False, False, False, True, True]
    assert len(looks) == 4


# --- Further fields of the body ---------------------------------------------------------------------------------------


def asked_with(options: dict, **served) -> dict:
    """The body that a chat with these options sends."""
    with serve(lambda path, body: chat("x"), **served) as server:
        with open_llm(LLMSpec(backend="openai", url=server.url, model="m", options=options)) as made:
            made.chat(["hello"], max_tokens=7)
        body = server.requests[-1][1]
    assert body.pop("messages") == [{"role": "user", "content": "hello"}]
    return body


def test_further_fields_of_the_body_are_sent_as_they_are():
    fields = {
        "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    known = {"model": "m", "max_tokens": 7, "temperature": 0.0}
    assert asked_with({**fields, "extra_body": {"new_field": 1}}) == known | fields | {"new_field": 1}
    assert asked_with({"temperature": None, "max_completion_tokens": True}) == {
        "model": "m",
        "max_completion_tokens": 7,
    }
    assert asked_with({"max_completion_tokens": 99, "temperature": 0.6})["max_completion_tokens"] == 99
    assert asked_with({"temperature": 0.6})["temperature"] == 0.6


def test_an_agents_continuation_keeps_its_length_and_takes_the_fields():
    with serve(lambda path, body: completion("x")) as server:
        options = {"max_completion_tokens": 3, "repetition_penalty": 1.1, "seed": None}
        with open_llm(LLMSpec(backend="openai", url=server.url, model="m", options=options)) as made:
            made._codec = CODEC
            made.generate([request("a", max_tokens=9)], Sampling(temperature=1.0, seed=1))
    body = server.requests[-1][1]
    assert (body["max_tokens"], body["repetition_penalty"]) == (9, 1.1)
    assert not {"max_completion_tokens", "seed"} & body.keys()


def test_a_field_that_is_unknown_or_not_for_options_is_an_error_that_says_where_it_belongs():
    spec = LLMSpec(backend="openai", url="http://127.0.0.1:1/v1", model="m")
    for options, said in (
        (
            {"chat_template_kwarg": {}},
            r"extra_body for others \(llm\.options\.extra_body\.chat_template_kwarg=\.\.\.\)",
        ),
        ({"extra_body": {"model": "n"}}, r"'model' is no option; it is set by llm\.model"),
    ):
        with pytest.raises(ConfigError, match=said), open_llm(replace(spec, options=options)):
            pass


@pytest.mark.parametrize(("owner", "sent"), [("vllm", True), ("sglang", True), ("openai", False), (None, False)])
def test_neutral_sampling_is_sent_in_chats_where_the_server_is_vllm_or_sglang(owner: str | None, sent: bool):
    body = asked_with({}, models=None if owner is None else [{"id": "m", "owned_by": owner}])
    neutral = {
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # fmt: skip
    assert body == {"model": "m", "max_tokens": 7, "temperature": 0.0} | (neutral if sent else {})


# --- Refusals ---------------------------------------------------------------------------------------------------------


def error(message: str, **fields) -> dict:
    return {"error": {"message": message, **fields}}


FORM = [
    (400, error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter"),
     r"llm\.options\.max_completion_tokens=true"),
    (400, error("'temperature' does not support 0.0 with this model. Only the default (1) value is supported.",
                param="temperature", code="unsupported_value"), r"llm\.options\.temperature=null"),
    (400, error("Unrecognized request argument supplied: reasoning_effort"), r"change llm\.options\.reasoning_effort"),
    (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "reasoning_effort"],
                       "msg": "Extra inputs are not permitted", "input": "low"}]}, r"llm\.options\.reasoning_effort"),
    (400, {"object": "error", "message": "reasoning_effort must be one of low, medium, high", "code": 400},
     r"llm\.options\.reasoning_effort"),
    (404, error("The model `m` does not exist.", code="model_not_found"), r"llm\.model='m'"),
    (404, {"detail": "Not Found"}, r"llm\.url \(with /v1\)"),
    (404, error('model "m" not found, try pulling it first', type="api_error"), r"llm\.model='m'"),
    (401, error("Incorrect API key provided: s3cr****."), r"a key was sent; llm\.api_key_env .* \(MY_KEY\)"),
    (403, error("Country, region, or territory not supported"), r"MY_KEY"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "way_out"), FORM)
def test_a_refusal_of_the_requests_form_is_an_error_at_the_first_answer_that_names_the_option(
    status: int, body: dict, way_out: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    options = {"reasoning_effort": "low"}
    with serve(lambda path, _: (status, body)) as server:
        spec = LLMSpec(
            backend="openai", url=server.url, model="m", options=options, api_key_env="MY_KEY", concurrency=1
        )
        with open_llm(spec) as made, pytest.raises(BackendConfigError, match=way_out) as raised:
            made.chat(["a", "b", "c"], max_tokens=5)
    assert len(server.requests) == 1 and isinstance(raised.value, ConfigError)
    assert "s3cret-key" not in str(raised.value)


PROMPT = [
    (400, error("This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens.",
                code="context_length_exceeded", param="messages")),
    (400, {"object": "error", "message": "'max_tokens' or 'max_completion_tokens' is too large: 500. This model's "
           "maximum context length is 4096 tokens and your request has 4000 input tokens", "type": "BadRequestError",
           "param": "max_tokens", "code": 400}),
    (400, {"object": "error", "message": "max_tokens must be at least 1, got -56.", "code": 400}),
    (400, {"object": "error", "message": "The input (5000 tokens) is longer than the model's context length (4096 "
           "tokens).", "type": "BadRequestError", "code": 400}),
    (400, error("the request exceeds the available context size", type="exceed_context_size_error", code=400)),
    (400, error("The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                code="content_filter", param="prompt", innererror={"code": "ResponsibleAIPolicyViolation"})),
    (403, error("Your input was flagged by moderation")),
    (413, "Payload Too Large"),
    (400, "Bad Request"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), PROMPT)
def test_a_refusal_of_one_prompt_is_that_prompts_alone(status: int, body: dict | str):
    def answer(path: str, asked: dict) -> Answer:
        return (status, body) if asked["messages"][0]["content"] == "bad" else chat("fine")

    with serve(answer) as server:
        first, second, third = backend(server.url).chat(["a", "bad", "b"], max_tokens=5)
    assert (first, third) == ("fine", "fine") and isinstance(second, RequestRefusedError)
    assert len(server.requests) == 3


TOO_LONG = [
    (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4744 `inputs` "
           "tokens and 500 `max_new_tokens`", "error_type": "validation"}),
    (422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 1350"}),
    (400, error("The model does not support the input length 5000")),
    (400, error("Input text contains unsupported characters")),
    (429, error("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000.",
                type="tokens", code="rate_limit_exceeded")),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), TOO_LONG)
def test_a_prompt_that_is_too_long_is_not_taken_for_a_wrong_form(status: int, body: dict):
    with serve(lambda path, _: (status, body)) as server:
        (only,) = backend(server.url).chat(["long"], max_tokens=5)
    assert isinstance(only, RequestRefusedError) and f"HTTP {status}" in str(only) and len(server.requests) == 1


def test_a_context_overflow_sent_as_500_is_the_prompts_after_the_retries():
    """llama.cpp sends it also if requests that share the context fill it together, so it may pass."""

    def answer(path: str, body: dict) -> Answer:
        if body["messages"][0]["content"] == "long":
            return 500, error("Context size has been exceeded.", code=500, type="server_error")
        return chat("fine")

    with serve(answer) as server:
        first, second = backend(server.url, max_retries=1).chat(["long", "a"], max_tokens=5)
    assert isinstance(first, RequestRefusedError) and second == "fine" and len(server.requests) == 3


@pytest.mark.parametrize("said", ["context deadline exceeded", "Rate limit exceeded: too many tokens"])
@pytest.mark.parametrize("status", [429, 500])
def test_an_overloaded_server_does_not_refuse_a_prompt(status: int, said: str):
    with serve(lambda path, body: (status, error(said))) as server, pytest.raises(BackendError) as raised:
        backend(server.url, max_retries=1).chat(["a"], max_tokens=5)
    assert not isinstance(raised.value, RequestRefusedError) and len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 422])
def test_once_a_form_was_accepted_its_refusal_is_one_prompts_alone(status: int):
    def answer(path: str, body: dict) -> Answer:
        odd = body["messages"][0]["content"] == "odd"
        return (status, error("Unsupported value in template")) if odd else chat("fine")

    with serve(answer) as server:
        made = backend(server.url, concurrency=1)
        first, second, third = made.chat(["a", "odd", "b"], max_tokens=5)
        assert (first, third) == ("fine", "fine") and isinstance(second, RequestRefusedError)
        with pytest.raises(BackendConfigError):  # another form
            made.chat(["odd"], max_tokens=5, temperature=0.5, seed=1)


def test_a_404_in_the_middle_of_a_run_is_tried_again():
    answers = iter([chat("a"), (404, "no route"), chat("b")])
    with serve(lambda path, body: next(answers)) as server:
        assert backend(server.url, concurrency=1).chat(["a", "b"], max_tokens=5) == ["a", "b"]
    assert len(server.requests) == 3


def test_refusals_without_a_reason_are_of_the_form_where_no_request_was_ever_taken():
    with serve(lambda path, body: (400, "Bad Request")) as server:
        made = backend(server.url)
        few = made.chat([str(number) for number in range(7)], max_tokens=5)
        assert all(isinstance(one, RequestRefusedError) for one in few)
        with pytest.raises(BackendConfigError, match=r"None of the first 8 requests was taken.*llm\.options"):
            made.chat(["more"], max_tokens=5)
    healthy = True
    with serve(lambda path, body: chat("x") if healthy else (400, "Bad Request")) as server:
        made = backend(server.url)
        made.chat(["good"], max_tokens=5)
        healthy = False
        assert len(made.chat([str(number) for number in range(30)], max_tokens=5)) == 30


@pytest.mark.parametrize("status", [501, 505])
def test_what_no_retry_can_mend_is_not_tried_again(status: int):
    with serve(lambda path, body: (status, "no")) as server, pytest.raises(BackendError, match=f"HTTP {status}: no"):
        backend(server.url, max_retries=3).chat(["hello"], max_tokens=5)
    assert len(server.requests) == 1


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_white_space_around_a_key_is_taken_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret-1234\r\n")
    with serve(lambda path, body: chat("hi")) as server:
        with open_llm(LLMSpec(backend="openai", model="m", url=server.url)) as made:
            made.chat(["hello"], max_tokens=5)
        assert server.requests[0][2]["Authorization"] == "Bearer sk-secret-1234"


@pytest.mark.parametrize("echoed", ["key sk-secret-1234 is wrong", '{"error": {"message": "Bearer sk-secret-1234"}}'])
@pytest.mark.parametrize("status", [400, 401, 402, 429])
def test_a_key_that_the_server_sends_back_is_not_shown(monkeypatch: pytest.MonkeyPatch, echoed: str, status: int):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    with serve(lambda path, body: (status, echoed)) as server:
        spec = LLMSpec(backend="openai", model="m", url=server.url, max_retries=0)
        try:
            (found,) = OpenAIBackend.from_spec(spec).chat(["hello"], max_tokens=5)
        except BackendError as raised:
            found = raised
    assert "***" in str(found) and "sk-secret" not in str(found)


KEY = "sk-secret-1234"


@pytest.mark.parametrize(
    "content",
    [f"{'x' * 370}{KEY}", f"<html>{KEY}</html>", [KEY], {"choices": [], "said": KEY},
     {"choices": [{"message": {"x": KEY}}]}, {"choices": [{"message": {"content": None, "refusal": f"no {KEY}"}}]},
     {"choices": [{"text": KEY, "finish_reason": "error"}]}],
)  # fmt: skip
def test_a_key_in_an_answer_with_status_200_is_not_shown_nor_a_part_of_it(content):
    with serve(lambda path, body: (200, content)) as server:
        made = backend(server.url, max_retries=0, api_key=KEY)
        for ask in (lambda: made.chat(["hello"], max_tokens=5), lambda: made.generate([request("a")], Sampling())):
            try:
                (found,) = ask()
            except BackendError as raised:
                found = raised
            assert isinstance(found, BackendError) and "***" in str(found) and "sk-" not in str(found)


def test_a_key_in_a_text_without_its_stop_string_is_not_shown():
    with (
        serve(lambda path, body: completion(f"<search> {KEY}", finish_reason="stop")) as server,
        pytest.raises(BackendError, match=r"<search> \*\*\*") as raised,
    ):
        backend(server.url, api_key=KEY).generate([request("a")], STOP)
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize("name", ["num_ctx", "keep_alive", "think"])
def test_a_field_that_ollama_ignores_is_no_option_and_the_error_names_the_way_out(name: str):
    spec = LLMSpec(backend="openai", url="http://127.0.0.1:1/v1", model="m", options={name: 1})
    way_out = {
        "num_ctx": "OLLAMA_CONTEXT_LENGTH.*Modelfile",
        "keep_alive": "OLLAMA_KEEP_ALIVE",
        "think": "reasoning_effort",
    }
    with pytest.raises(ConfigError, match=rf"llm\.options\.{name}: .*{way_out[name]}"):
        OpenAIBackend.from_spec(spec)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "https://x.openai.azure.com/openai/deployments/d?api-version=2024-06-01",
            r"https://x\.openai\.azure\.com/openai/v1",
        ),
        (
            "https://x.openai.azure.com/openai/deployments/d/",
            r"https://x\.openai\.azure\.com/openai/v1, and the deployment",
        ),
        ("http://[::1/v1", "base URL"),
        ("http://127.0.0.1:port/v1", "base URL"),
        ("127.0.0.1:8000/v1", "base URL"),
        ("localhost:8000/v1", "base URL"),
        ("http://127.0.0.1:8000/v1?version=1", "without a query"),
    ],
)
def test_an_address_that_no_request_can_be_sent_to_is_an_error_of_the_settings(url: str, said: str):
    with pytest.raises(ConfigError, match=rf"llm\.url=.*{said}"):
        OpenAIBackend(url, "m")


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match=r"llm\.url .* llm\.model"):
        OpenAIBackend("", "m")
    with pytest.raises(ConfigError, match=r"llm\.tokenizer"):
        OpenAIBackend("http://127.0.0.1:1/v1", "m").generate([request("a")], Sampling())


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Iterator[Path]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"])
    raw.train_from_iterator(["some words"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(tmp_path / "t")
    yield tmp_path / "t"


def test_a_model_that_writes_nothing_wrote_its_end_of_sequence_token(tokenizer_dir: Path):
    with serve(lambda path, body: completion("")) as server:
        made = OpenAIBackend(server.url, "m", tokenizer=tokenizer_dir)
        (done,) = made.generate([request("a")], Sampling())
        assert made.codec.decode(done.token_ids) == "<|end|>"


def test_the_likelihood_of_a_text_is_read_from_the_echo_of_the_prompt():
    def answer(path: str, body: dict) -> Answer:
        given = [None, *(-float(token) for token in body["prompt"][1:]), -0.5]  # one token is generated
        return completion("x", logprobs={"token_logprobs": given})

    asked = [Continuation(prompt_ids=(1, 2, 3), token_ids=(4, 5)), Continuation(prompt_ids=(6,), token_ids=(7,))]
    with serve(answer) as server:
        llm = backend(server.url)
        assert [found.logprobs for found in llm.likelihoods(asked)] == [(-4.0, -5.0), (-7.0,)]
        bodies = [body for _, body, _ in server.requests]
    assert sorted(body["prompt"] for body in bodies) == [[1, 2, 3, 4, 5], [6, 7]]
    assert all((body["echo"], body["logprobs"], body["max_tokens"]) == (True, 1, 1) for body in bodies)
    for missing in (None, {"token_logprobs": [-0.5]}, {"token_logprobs": [None] * 6}):
        with (
            serve(lambda path, body, missing=missing: completion("x", logprobs=missing)) as server,
            pytest.raises(BackendError, match="expected log-probabilities of the 5 prompt tokens"),
        ):
            backend(server.url).likelihoods(asked[:1])
