"""Secrets: where they are read, and that no error, manifest or log of ours ever shows one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.backends import LLMSpec, SearchSpec, open_llm, open_search
from agentic_r_plugin.cli import main
from agentic_r_plugin.config import save_config
from agentic_r_plugin.credentials import authorization, read_secret, redacted
from agentic_r_plugin.errors import ConfigError, SearchError
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig, check_inputs
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.service.server import ServeConfig
from tests.llm.loopback import chat, serve

SECRET = "sk-5ecret-1234"


@pytest.mark.parametrize("value", [SECRET, f" {SECRET}", f"{SECRET}\n", f"\t{SECRET}\r\n"])
def test_a_secret_is_read_without_the_white_space_around_it(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("KEY", value)
    assert read_secret("KEY", "setting") == SECRET


@pytest.mark.parametrize("value", [f"{SECRET}\nX", f"{SECRET}\x07", f"{SECRET}é", f"\ufeff{SECRET}", f"{SECRET}–1"])
def test_what_no_header_can_hold_is_an_error_that_names_the_variable_and_not_its_value(
    monkeypatch: pytest.MonkeyPatch, value: str
):
    monkeypatch.setenv("KEY", value)
    with pytest.raises(ConfigError, match=r"llm\.api_key_env: the value of environment variable KEY holds") as raised:
        read_secret("KEY", "llm.api_key_env")
    assert "5ecret" not in str(raised.value)


@pytest.mark.parametrize(("value", "said"), [(None, "KEY is not set"), ("", "KEY is empty"), (" \n", "KEY is empty")])
def test_a_variable_without_a_secret_is_an_error_unless_it_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
):
    monkeypatch.delenv("KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("KEY", value)
    with pytest.raises(ConfigError, match=said):
        read_secret("KEY", "setting")
    assert read_secret("KEY", "setting", required=False) is None
    assert read_secret("", "setting") is None


@pytest.mark.parametrize("given", [SECRET, "hf_5ecretAbcdef", "5ecret"])
def test_a_secret_given_in_place_of_its_variables_name_is_not_shown(given: str):
    for opened in (
        lambda: open_llm(LLMSpec(backend="openai", url="http://127.0.0.1:1/v1", model="m", api_key_env=given)),
        lambda: open_search(SearchSpec(backend="service", url="http://x", options={"token_env": given})),
    ):
        with pytest.raises(ConfigError, match="may be the secret itself") as raised, opened():
            pass
        assert "5ecret" not in str(raised.value)


def test_basic_authorization_is_sent_as_it_is():
    assert authorization("Basic YTpi") == {"Authorization": "Basic YTpi"}
    assert authorization("abc") == {"Authorization": "Bearer abc"} and authorization(None) == {}


def test_passwords_in_addresses_and_values_of_keys_are_redacted():
    assert redacted("GET http://ann:pw@host:80/v1 failed") == "GET http://***@host:80/v1 failed"
    assert redacted("http://h/v1?api_key=abc&n=3") == "http://h/v1?api_key=***&n=3"
    assert redacted("Authorization: Bearer abcdefgh") == "Authorization: Bearer ***"
    assert redacted('{"api_key": "abc", "n": 1}') == '{"api_key": "***", "n": 1}'
    assert redacted("max_tokens=16, 3 tokens: fine") == "max_tokens=16, 3 tokens: fine"
    assert redacted("it said abc", "abc", None) == "it said ***"


def evaluation(**given) -> EvaluateConfig:
    values = {"agents": {"a": "b"}, "searches": {"s": "i"}} | given
    return EvaluateConfig(out="o", data_dir="d", benchmarks=["x"], cells=["a:s"], **values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LLMSpec(url=f"http://ann:{SECRET}@127.0.0.1:1/v1"),
        lambda: LLMSpec(url=f"http://127.0.0.1:1/v1?api_key={SECRET}"),
        lambda: LLMSpec(options={"extra_body": {"api_key": SECRET}}),
        lambda: SearchSpec(url=f"http://ann:{SECRET}@127.0.0.1:1"),
        lambda: SearchSpec(options={"token": SECRET}),
        lambda: RetrievalClient(f"http://ann:{SECRET}@127.0.0.1:1"),
        lambda: LLMSpec(api_key_env=SECRET),
        lambda: LLMSpec(api_key_env="hf_5ecretAbcdef"),
        lambda: SearchSpec(options={"token_env": SECRET}),
        lambda: ServeConfig(token_env=SECRET),
        lambda: TrainAgentConfig(
            model="m", questions="q", retrieval_url="http://x", out="o", retrieval_token_env=SECRET
        ),
        lambda: TrainAgentConfig(model="m", questions="q", retrieval_url=f"http://ann:{SECRET}@x", out="o"),
        lambda: check_inputs(evaluation(agents={"a": "b", "unused": f"http://ann:{SECRET}@127.0.0.1:1/v1"})),
        lambda: check_inputs(evaluation(searches={"s": "i", "unused": f"http://ann:{SECRET}@127.0.0.1:1"})),
    ],
)
def test_settings_are_written_to_files_and_take_no_secret(make):
    with pytest.raises(ConfigError, match="environment variable") as raised:
        make()
    assert "5ecret" not in str(raised.value)


def test_options_that_only_look_like_secrets_are_taken():
    LLMSpec(url="http://127.0.0.1:1/v1", options={"max_completion_tokens": 5, "prompt_cache_key": "run-1"})
    SearchSpec(options={"token_env": "SEARCH_TOKEN"})


def test_a_variable_that_is_set_may_have_any_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("my_key", SECRET)
    assert LLMSpec(api_key_env="my_key").api_key_env == "my_key"


def test_no_configuration_with_a_secret_is_saved(tmp_path: Path):
    for given in ({"token_env": SECRET}, {"url": f"http://ann:{SECRET}@x"}):
        with pytest.raises(ConfigError, match=r"IterateConfig\.serve\.") as raised:
            save_config(IterateConfig(out="o", agent="a", retriever="r", serve=given), tmp_path / "config.yaml")
        assert "5ecret" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "override",
    [f"llm.api_key={SECRET}", f"llm.url=http://ann:{SECRET}@127.0.0.1:1/v1", f"llm.options.api_key={SECRET}",
     f"llm.api_key_env={SECRET}"],
)  # fmt: skip
def test_a_command_shows_no_secret_and_writes_none(tmp_path: Path, override: str, capsys: pytest.CaptureFixture):
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "contents": "T\\nx"}\n')
    query = {
        "schema": "candidates/1", "id": "q", "turn": 1, "question": "Q", "golden_answers": ["x"], "query": "a",
        "history": [], "prefix": "", "passages": [{"id": "0", "score": 1.0}],
    }  # fmt: skip
    (tmp_path / "c.jsonl").write_text(json.dumps(query) + "\n")
    with serve(lambda path, body: chat("[1]")) as server:
        llm = ["llm.backend=openai", f"llm.url={server.url}", "llm.model=m"]
        files = ["--candidates", str(tmp_path / "c.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl")]
        arguments = ["relevance", *files, "--out", str(tmp_path / "o.jsonl"), "--scorer", "listwise_judge", *llm]
        assert main([*arguments, override]) == 1
        assert main([*arguments, override, "--debug"]) == 1
    said = capsys.readouterr()
    assert "5ecret" not in said.out + said.err
    assert not any("5ecret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "content",
    [f"<html>{SECRET}</html>", f"{'x' * 75}{SECRET}", {"error": f"no {SECRET}"}, {"result": f"{'x' * 230}{SECRET}"},
     {"result": [[{"document": {"id": SECRET}}]]}],
)  # fmt: skip
def test_a_token_in_an_answer_with_status_200_is_not_shown_nor_a_part_of_it(content):
    with serve(lambda path, body: (200, content)) as server:
        client = RetrievalClient(server.url, token=SECRET, retries=0)
        for ask in (lambda: client.search([SearchRequest(query="a")], 1), lambda: client.reload("index")):
            with pytest.raises(SearchError, match=r"malformed|answered with an error") as raised:
                ask()
            assert "sk-" not in str(raised.value) and raised.value.__cause__ is None


@pytest.mark.parametrize("content", ["<html>", "[]", '{"fingerprint": 3}', "{}"])
def test_a_reload_that_answers_with_another_page_is_an_error_of_ours(content: str):
    with (
        serve(lambda path, body: (200, content)) as server,
        pytest.raises(SearchError, match=r"/reload: malformed answer: expected"),
    ):
        RetrievalClient(server.url).reload("index")


def test_a_token_that_a_reload_sends_back_is_not_shown():
    with (
        serve(lambda path, body: (400, f"{'x' * 190} {SECRET}")) as server,
        pytest.raises(SearchError, match=r"HTTP 400: x+ \*\*\*") as raised,
    ):
        RetrievalClient(server.url, token=SECRET).reload("index")
    assert "sk-" not in str(raised.value)


def test_a_token_that_a_service_sends_back_is_not_shown():
    with (
        serve(lambda path, body: (400, {"error": {"type": "bad", "message": f"no {SECRET}"}})) as server,
        pytest.raises(SearchError, match=r"bad: no \*\*\*"),
    ):
        RetrievalClient(server.url, token=SECRET, retries=0).search([SearchRequest(query="a")], 1)
