"""llama.cpp with one model loaded, through xllamacpp."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor

CONTEXT = 256  # tokens
FORCED_TOKEN = 20


class LlamaCpp:
    """A llama.cpp server in this process. Tests that make one are skipped without xllamacpp.

    path: the model's GGUF file.
    adapter: the GGUF file of a LoRA adapter.
    """

    def __init__(self, path: Path, adapter: Path | None = None):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        # Flash attention and a float16 cache, the defaults, move logits of a tiny model by 0.03.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.n_ctx = CONTEXT
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.check_tensors = True
        params.warmup = False
        params.verbosity = -1
        self.server = xllamacpp.Server(params)
        # A server that is deleted before its loop has begun waits for the loop for ever. A request
        # ends after the loop has begun.
        self.server.handle_completions({"prompt": [FORCED_TOKEN], "max_tokens": 1})

    def next_log_probabilities(self, ids: list[int], vocab: int) -> Tensor:
        """Return the log probability (vocab,) of every token after the prompt `ids`."""
        values = self.likeliest(ids, vocab)
        return torch.tensor([values[id] for id in range(vocab)])

    def likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        """Return token -> log probability of the likeliest tokens after the prompt `ids`."""
        # The reply has no entry for a token that ends inside a character, so a bias forces a whole
        # one to come next. The reported probabilities are those without the bias.
        request = {
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": count,
            "logit_bias": [[FORCED_TOKEN, 1000]],
        }
        reply = self.server.handle_completions(request)
        step = reply["choices"][0]["logprobs"]["content"][0]
        return {token["id"]: token["logprob"] for token in step["top_logprobs"]}

    def answer(self, ids: list[int], tokens: int) -> str:
        """Return the text of a greedy continuation of `ids`."""
        request = {"prompt": ids, "max_tokens": tokens, "temperature": 0}
        return self.server.handle_completions(request)["choices"][0]["text"]

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of a text, with special tokens parsed."""
        content = {"content": text, "add_special": add_special, "parse_special": True}
        address = self.server.listening_address + "/tokenize"
        request = urllib.request.Request(address, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())["tokens"]
