"""An OpenAI-compatible server in a thread, whose engine is eightfold's own Rollout: what tests use as a foreign one."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from eightfold.generate.requests import Request, RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models.loading import load_decoder


class Engine:
    """``style``: how token ids are returned, "vllm" (token_id:N in logprobs.tokens), "ids" (choices.token_ids) or
    "text" (not at all). ``spoil``: changes the answer of a completion in place. ``status``, ``delay``: of answers."""

    def __init__(self, folder, precision, style):
        self.precision, self.style = precision, style
        self.spoil, self.status, self.delay = None, 200, 0.0
        self.bodies, self.reloads, self.keys = [], [], []
        self._lock = threading.Lock()
        self._load(folder)

    def answer(self, path, body):
        time.sleep(self.delay)
        with self._lock:
            if path == "/v1/completions":
                self.bodies.append(body)
                answer = {"object": "text_completion", "choices": self._choices(body)}
                if self.spoil is not None:
                    self.spoil(answer)
                return answer
            self.reloads.append((path, body))
            if "model_path" in body:
                if not Path(body["model_path"], "config.json").exists():
                    return {"success": False, "message": "no such model"}
                self._load(body["model_path"])
            return {"success": True, "message": "loaded"}

    def _load(self, folder):
        model, self.tokenizer = load_decoder(folder, self.precision, torch.float32)
        self._rollout = Rollout(model, RolloutOptions(pages=64, page_size=16), self.tokenizer)

    def _choices(self, body):
        options = SamplingOptions(body["temperature"], max(0, body["top_k"]), body["top_p"])
        stops = frozenset(body["stop_token_ids"])
        drawn = Request(
            body["prompt"], body["max_tokens"], options, body["seed"], body["n"], stops, tuple(body.get("stop", ()))
        )
        return [self._choice(i, found, body) for i, found in enumerate(self._rollout.generate([drawn])[0])]

    def _choice(self, index, found, body):
        names = [self.tokenizer.decode([token]) for token in found.tokens]
        if self.style == "vllm" and body["return_tokens_as_token_ids"]:
            names = [f"token_id:{token}" for token in found.tokens]
        choice = {"index": index, "text": self.tokenizer.decode(found.tokens), "finish_reason": found.finish}
        choice["logprobs"] = {"tokens": names, "token_logprobs": found.log_probs}
        if self.style == "ids" and body["return_token_ids"]:
            choice |= {"token_ids": found.tokens, "prompt_token_ids": body["prompt"]}
        return choice


@contextlib.contextmanager
def serving(folder, precision="fp8", style="vllm"):
    """(url, Engine) while the context lasts."""
    engine = Engine(folder, precision, style)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            engine.keys.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(engine.answer(self.path, body)).encode() if engine.status == 200 else b"out of memory"
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(engine.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # closing waits for them: no socket outlives a test
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
