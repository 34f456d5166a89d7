"""Stands in for vLLM's server where there is none: the same routes over a real socket, and a model of one line.

The prompt's last token t is followed by t + 1, t + 2 and so on; with an adapter, by steps of that adapter's rank.
Prompts of certain first tokens make it fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

VOCABULARY = 405
FAIL, DIE, SLOW = 11, 12, 13
"""First tokens of prompts with which it fails in the middle, kills itself, and takes its time."""


def logprobs(rank: int) -> list[float]:
    """Of every token, whatever the prompt; the rank is the adapter's, 0 is the base."""
    logits = [-abs(token - 20 - rank) for token in range(VOCABULARY)]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


class Server:
    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.ranks = {"base": 0}
        self.running = 0
        self.calls: list[str] = []

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "max_model_len": 128} for name in self.ranks]})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1\n'
        )

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
        if config["r"] > self.max_rank:
            text = f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
            return web.json_response({"error": {"message": text}}, status=400)
        if config["r"] == 7:
            return web.json_response({"error": {"message": "seven is no rank"}}, status=400)
        self.ranks[body["lora_name"]] = 0 if body["lora_name"] == "zero" else config["r"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        del self.ranks[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    async def openapi(self, _: web.Request) -> web.Response:
        """As vLLM writes it: a body is one schema, or one of several."""
        keys = {
            "Chat": "model messages stream stream_options n max_tokens max_completion_tokens logit_bias cache_salt "
            "request_id user tools chat_template_kwargs kv_transfer_params",
            "Completion": "model prompt stream max_tokens min_tokens n",
            "Texts": "model input dimensions", "Messages": "model messages",
        }  # fmt: skip
        ref = {name: {"$ref": f"#/components/schemas/{name}"} for name in keys}
        bodies = {
            "/v1/chat/completions": ref["Chat"], "/v1/completions": ref["Completion"],
            "/v1/embeddings": {"anyOf": [ref["Texts"], ref["Messages"]]}, "/v1/load_lora_adapter": ref["Texts"],
        }  # fmt: skip
        paths = {
            path: {"post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}}
            for path, schema in bodies.items()
        }
        schemas = {name: {"properties": {key: {} for key in text.split()}} for name, text in keys.items()}
        return web.json_response({"paths": paths, "components": {"schemas": schemas}})

    async def embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        usage = {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0}
        return web.json_response({"object": "list", "model": body["model"], "seen": body, "usage": usage})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer with what was asked; the system's message FAIL is refused, and SLOW takes its time."""
        body = await request.json()
        if body["model"] not in self.ranks:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if body["messages"][0]["content"] == "FAIL":
            return web.json_response({"error": {"message": "that is no chat"}}, status=400)
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
        head = {"object": "chat.completion", "model": body["model"], "seen": body}
        if not body.get("stream"):
            return web.json_response(head | {"choices": [{"message": {"content": "hi"}}], "usage": usage})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        self.running += 1
        try:
            for number in range(1, 5):
                chunk = head | {"choices": [{"index": 0, "delta": {"content": "hi"}}]}
                if body["stream_options"].get("continuous_usage_stats"):
                    chunk["usage"] = usage | {"completion_tokens": number}
                await answer.write(f"data: {json.dumps(chunk)}\n\n".encode())
                await asyncio.sleep(5 if body["messages"][0]["content"] == "SLOW" and number == 2 else 0)
            await answer.write(f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n".encode())
            await answer.write(b"data: [DONE]\n\n")
        finally:
            self.running -= 1
        return answer

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] not in self.ranks:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if body["prompt"][0] == FAIL:
            return web.json_response({"error": {"message": "that is no prompt"}}, status=400)
        rank = self.ranks[body["model"]]
        top = sorted(enumerate(logprobs(rank)), key=lambda pair: -pair[1])
        if not body.get("stream"):
            named = {f"token_id:{token}": logprob for token, logprob in top[: body["logprobs"]]}
            return web.json_response({"choices": [{"logprobs": {"top_logprobs": [named]}}]})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        self.running += 1
        try:
            await self.stream(body, rank, answer, top)
        finally:
            self.running -= 1
        return answer

    async def stream(self, body: dict[str, Any], rank: int, answer: web.StreamResponse, top: list[Any]) -> None:
        for number in range(1, body["max_tokens"] + 1):
            token = body["prompt"][-1] + number * (rank or 1)
            stops = token in body["stop_token_ids"]
            last = stops or number == body["max_tokens"]
            choice: dict[str, Any] = {"token_ids": [token], "logprobs": None}
            choice["finish_reason"] = None if not last else "stop" if stops else "length"
            if body.get("logprobs") is not None:
                named = {f"token_id:{t}": logprob for t, logprob in top[: max(1, body["logprobs"])]}
                choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [named]}
            await answer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            await asyncio.sleep(0.05 if body["prompt"][0] == SLOW else 0)
            if body["prompt"][0] == DIE:
                os._exit(3)
            if last:
                break
        usage = {"prompt_tokens_details": {"cached_tokens": 2}}
        await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())


def main() -> None:
    options = argparse.ArgumentParser()
    for name in ("uds", "start"):
        options.add_argument(f"--{name}")
    options.add_argument("--max-lora-rank", type=int)
    given, _ = options.parse_known_args()
    print("options:", *sys.argv[1:], f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", flush=True)
    if given.start == "fail":
        sys.exit("ValueError: this model is not for me")
    server, app = Server(given.max_lora_rank), web.Application()
    app.add_routes([
        web.get("/health", server.health), web.get("/v1/models", server.models), web.get("/metrics", server.metrics),
        web.post("/v1/completions", server.complete), web.post("/v1/load_lora_adapter", server.load),
        web.post("/v1/unload_lora_adapter", server.unload), web.get("/openapi.json", server.openapi),
        web.post("/v1/chat/completions", server.chat), web.post("/v1/embeddings", server.embed),
    ])  # fmt: skip
    web.run_app(app, path=given.uds, print=None)


if __name__ == "__main__":
    main()
