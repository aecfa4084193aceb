"""Rollout by another engine (vLLM, SGLang) over HTTP: OpenAI's /v1/completions with token ids in and out.

Such an engine computes with kernels of its own, so its probabilities differ from the trainer's, and tokens are weighed
by truncated importance sampling. What is trained on has to be what was drawn: token ids and log-probabilities are the
engine's, text is never tokenised again, and an answer that lacks either, or contradicts the request, is an error.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from eightfold.generate.requests import Completion, Request, sample_seed
from eightfold.train.rl.options import require, require_choice

LEAST_LOG_PROB = -9999.0  # vLLM writes it for minus infinity, which JSON does not have
ROUNDED_UP = 1e-3  # a log-probability of about 0 may be rounded to above it
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


@dataclass(frozen=True)
class ReloadOptions:
    """How the engine receives the policy: it is written to ``folder`` (default: "engine" in the run's output), which
    the engine must see under the same path, in ``format`` "bf16" or "fp8" (as `eightfold export`), before the run's
    first rollout and then every ``every`` steps; each of ``calls``, a path of the engine and the JSON that is posted
    there, then follows in order, "{folder}" in a text standing for the folder."""

    calls: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"/update_weights_from_disk": {"model_path": "{folder}"}}
    )
    every: int = 1
    format: Literal["bf16", "fp8"] = "bf16"
    folder: str | None = None

    def __post_init__(self):
        strange = [path for path in self.calls if not path.startswith("/")]
        require(bool(self.calls) and not strange, "calls", "one path or more, each from /", strange or self.calls)
        require(self.every >= 1, "every", "1 or more", self.every)
        require_choice("format", self.format, ("bf16", "fp8"))


@dataclass(frozen=True)
class EngineOptions:
    """An engine at ``url`` (http://host:port) that serves ``model``.

    api_key_variable: environment variable with the key, if it asks for one. timeout: seconds that it may be silent.
    concurrency: requests under way at once. samples_per_request: completions of a prompt that one request asks for
    (default: all; 1 where the engine would draw them all from one seed). log_probs_at_temperature: whether its
    log-probabilities are those at the request's temperature (SGLang; vLLM with --logprobs-mode processed_logprobs),
    without which only temperature 1 can be used. reload: without it the engine keeps the weights it was started with.
    """

    url: str
    model: str
    api_key_variable: str | None = None
    timeout: float = 600.0
    concurrency: int = 64
    samples_per_request: int | None = None
    log_probs_at_temperature: bool = False
    reload: ReloadOptions | None = None

    def __post_init__(self):
        parts = urlsplit(self.url)
        plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        require(bool(plain), "url", "http://host:port or https://host:port", self.url)
        require(not parts.path.rstrip("/").endswith("/v1"), "url", "the address without /v1", self.url)
        require(self.timeout > 0, "timeout", "more than 0 seconds", self.timeout)
        require(self.concurrency >= 1, "concurrency", "1 or more", self.concurrency)
        many = self.samples_per_request
        require(many is None or many >= 1, "samples_per_request", "1 or more", many)


class RemoteRollout:
    """`generate` as `generate.rollout.Rollout` has it. Completions depend on the engine: on its batches too."""

    def __init__(self, options: EngineOptions, vocabulary: int, tokenizer: Any = None) -> None:
        """vocabulary: token ids lie below it. tokenizer: needed for strings to stop at; only its `decode` is used."""
        self.options, self.vocabulary, self.tokenizer = options, vocabulary, tokenizer
        self._headers = {"Content-Type": "application/json"}
        name = options.api_key_variable
        if name is not None:
            if not os.environ.get(name):
                raise ValueError(f"api_key_variable: the environment variable {name} is not set")
            self._headers["Authorization"] = f"Bearer {os.environ[name]}"

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, in order. ValueError with one line for the first request that failed."""
        pieces = [piece for request in requests for piece in self._pieces(request)]
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="eightfold-engine")
        try:
            found = [pool.submit(self._complete, *piece) for piece in pieces]
            answers = iter([each.result() for each in found])
        finally:
            pool.shutdown(cancel_futures=True)
        return [[each for _ in self._pieces(request) for each in next(answers)] for request in requests]

    def reload(self, folder: Path) -> None:
        """Posts the calls by which the engine reads the weights in ``folder``."""
        for path, body in self.options.reload.calls.items():
            answer = self._post(path, _filled(body, str(folder.resolve())))
            if isinstance(answer, dict) and answer.get("success") is False:  # SGLang's way to say so
                raise ValueError(f"{self._place(path)}: weights were not loaded: {_short(answer.get('message'))}")

    # ---- one request ----

    def _pieces(self, request: Request) -> list[tuple[Request, int, int]]:
        """(request, first sample, samples) of each HTTP request."""
        many = self.options.samples_per_request or request.samples
        return [(request, first, min(many, request.samples - first)) for first in range(0, request.samples, many)]

    def _complete(self, request: Request, first: int, samples: int) -> list[Completion]:
        body = {
            "model": self.options.model,
            "prompt": list(request.prompt),
            "n": samples,
            "seed": _engine_seed(sample_seed(request.seed, first)),
            "max_tokens": request.max_tokens,
            "temperature": request.options.temperature,
            "top_p": request.options.top_p,
            "top_k": request.options.top_k or -1,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(request.stop_ids),
            # An engine's defaults may be the model's generation_config.json: what is not said here could be anything.
            **NEUTRAL,
        }
        if request.stop:
            body |= {"stop": list(request.stop)}
        answer = self._post("/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._wrong("expected a list of choices", answer)
        if len(choices) != samples:
            raise self._wrong(f"expected {samples} choices (n), got {len(choices)}")
        choices = sorted(choices, key=lambda choice: choice.get("index") or 0)
        return [self._completion(request, choice) for choice in choices]

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        details = choice.get("logprobs") if isinstance(choice.get("logprobs"), dict) else {}
        tokens, log_probs = self._tokens(choice, details), details.get("token_logprobs")
        if not isinstance(log_probs, list) or len(log_probs) != len(tokens):
            got = len(log_probs) if isinstance(log_probs, list) else "none"
            raise self._wrong(f"expected logprobs.token_logprobs of {len(tokens)} tokens, got {got}")
        for value in log_probs:
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not LEAST_LOG_PROB < value <= ROUNDED_UP:
                raise self._wrong(f"expected finite log-probabilities, got {value!r}")
        if not 1 <= len(tokens) <= request.max_tokens:
            raise self._wrong(f"expected 1 to max_tokens={request.max_tokens} tokens, got {len(tokens)}")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(request.prompt):
            raise self._wrong(f"it answers another prompt: {_short(echoed)} for {_short(list(request.prompt))}")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            raise self._wrong(f"expected finish_reason stop or length, got {finish!r}")
        if finish == "stop" and not self._stops(request, tokens):
            raise self._wrong(f"a completion stopped, but its last token, {tokens[-1]}, is none to stop at")
        return Completion(tokens, [float(value) for value in log_probs], finish)

    def _tokens(self, choice: dict[str, Any], details: dict[str, Any]) -> list[int]:
        """The token ids drawn: the choice's own list, or what "token_id:N" in place of text says."""
        listed, named = choice.get("token_ids"), details.get("tokens")
        if listed is None and isinstance(named, list):
            found = [re.fullmatch(r"token_id:(\d+)", str(text)) for text in named]
            listed = [int(match[1]) for match in found] if all(found) else None
        if not isinstance(listed, list) or not all(type(token) is int for token in listed):
            raise self._wrong(
                "it returns no token ids (choices.token_ids, or token_id:N in logprobs.tokens): needed is an engine "
                "that knows return_token_ids or return_tokens_as_token_ids"
            )
        for token in listed:
            if not 0 <= token < self.vocabulary:
                raise self._wrong(f"expected token ids of 0 to {self.vocabulary - 1}, got {token}: another model?")
        return listed

    def _stops(self, request: Request, tokens: list[int]) -> bool:
        if tokens[-1] in request.stop_ids:
            return True
        return bool(request.stop) and any(text in self.tokenizer.decode(tokens) for text in request.stop)

    # ---- HTTP ----

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers; None where the answer is empty."""
        parts = urlsplit(self.options.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.options.timeout)
        try:
            connection.request("POST", parts.path.rstrip("/") + path, json.dumps(body), self._headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
        except TimeoutError:
            raise ValueError(f"{self._place(path)}: no answer for {self.options.timeout:g} s (timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ValueError(f"{self._place(path)}: {reason}") from None
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise ValueError(f"{self._place(path)}: HTTP {status}: {_short(text) or 'no reason given'}")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            if path == "/v1/completions":
                raise self._wrong("expected JSON", text) from None
            return None  # of a reload only the status counts

    def _place(self, path: str) -> str:
        return f"rollout.engine {self.options.url.rstrip('/')}{path}"

    def _wrong(self, message: str, answer: Any = None) -> ValueError:
        shown = "" if answer is None else f", got {_short(answer)}"
        return ValueError(f"{self._place('/v1/completions')}: {message}{shown}")


def _engine_seed(seed: int) -> int:
    """31 bits that every engine takes; seeds side by side give numbers far apart, as engines count n on from theirs."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") >> 1


def _filled(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, folder) for each in value]
    return value.replace("{folder}", folder) if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= 200 else text[:197] + "..."
