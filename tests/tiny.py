"""Tiny random Llama checkpoint folders for the tests: made offline, from a seed, in a fraction of a second.

    make_tiny_model(folder)                                 64 wide, 2 layers, 4 query and 2 key/value heads, tied
    make_tiny_model(folder, tokenizer="spm", tie=False)     with a SentencePiece tokenizer.model

The weights are drawn so that activations keep their size from layer to layer and logits spread by several units:
a greedy choice is then seldom a near tie. The tokenizer has fewer tokens than the embedding has rows, as many models
have; its pad token is its eos token.
"""

import io
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The order of twelve blue lamps goes to Lisbon on Friday, and the invoice follows by letter.",
    "She didn't say that they'd arrive before 10:45; we'll wait until 11:30 at gate 27.",
    "A table for four at eight o'clock, near the window, under the name of Okafor.",
    "def area(width, height):\n    return width * height  # in square metres\n",
    "Grüße aus Köln! Прошу прислать счёт. 明日の朝、駅で会いましょう。 Ça coûte 1 234,50 €.",
    '{"item": "lamp", "count": 12, "city": "Lisbon"}',
]

TEXTS = [  # what a tokenizer may stumble over
    *CORPUS,
    "  two spaces, a tab\tand\n\n\nnewlines   \n end ",
    "we'll they'RE 'tis 3 33 333 3333 3.14 ½ ١٢٣",
    "emoji 🦙🦙 ✅ ﷽ e\u0301 \u200d zero width, ------====== \"\"\"'''",
    "ｆｕｌｌ　ｗｉｄｔｈ \u00a0nbsp Ωmega ßtraße ĲSSEL",
]


def make_tiny_model(
    folder: str | Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 128,
    vocab: int = 512,
    tie: bool = True,
    rope_scaling: dict | None = None,
    attention_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str = "bpe",
    shards: int = 1,
    positions: int = 256,
    seed: int = 0,
) -> Path:
    """Write config.json, *.safetensors and a tokenizer into `folder` and return it.

    tokenizer: "bpe" (byte-level, SmolLM2's pre-tokenizer), "llama3" (byte-level, Llama 3's, adds a BOS) or "spm".
    shards: more than one writes model-0000i-of-0000n.safetensors and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    K = head_dim or hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": attention_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope_scaling,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tiny_shapes(
        hidden, layers, heads, kv_heads, K, ffn, vocab, tie, attention_bias
    ).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(("layernorm.weight", "norm.weight")):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.5 * values
        elif name.startswith("model.embed_tokens"):
            values = (
                0.25 * values
            )  # small beside what the layers add, else a tied model repeats its last token
        else:
            values = (4 if name.startswith("lm_head") else 1.5) * shape[-1] ** -0.5 * values
        tensors[name] = values.to(dtype)
    _write_tensors(folder, tensors, shards)
    write_tokenizer(folder, tokenizer)
    return folder


def tiny_shapes(
    hidden, layers, heads, kv_heads, K, ffn, vocab, tie, attention_bias
) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes, in the order in which the tensors are used."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        rows = {"q_proj": heads * K, "k_proj": kv_heads * K, "v_proj": kv_heads * K}
        for name, n in rows.items():
            shapes[f"{prefix}self_attn.{name}.weight"] = (n, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads * K)
        if attention_bias:
            for name, n in {**rows, "o_proj": hidden}.items():
                shapes[f"{prefix}self_attn.{name}.bias"] = (n,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not tie:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_tokenizer(folder: Path, kind: str = "bpe") -> None:
    """Write the tokenizer files of one kind: "bpe", "llama3" or "spm"."""
    special = dict(
        zip(
            ("unk_token", "bos_token", "eos_token", "pad_token"),
            (*SPECIAL, SPECIAL[2]),
            strict=True,
        )
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": CHATML}
    if kind == "spm":
        special = {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
        }
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
        }
        config["chat_template"] = CHATML.replace("<|im_end|>", "</s>").replace(
            "<|im_start|>", "## "
        )
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    elif kind in ("bpe", "llama3"):
        (folder / "tokenizer.json").write_text(_byte_level_bpe(kind), encoding="utf-8")
    else:
        raise ValueError(f"tokenizer {kind!r}: choose bpe, llama3 or spm")
    _write_json(folder / "tokenizer_config.json", config)


@cache
def _byte_level_bpe(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
    if kind == "bpe":
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "llama3":
        template = processors.TemplateProcessing(
            single=f"{SPECIAL[1]} $A",
            pair=f"{SPECIAL[1]} $A {SPECIAL[1]}:1 $B:1",
            special_tokens=[(SPECIAL[1], 1)],
        )
        tokenizer.post_processor = template
    return tokenizer.to_str()


@cache
def sentencepiece_model() -> bytes:
    """A BPE SentencePiece model with byte fallback: ids 0 <unk>, 1 <s>, 2 </s>, then 256 bytes, then pieces."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw_adapter(model, b: float, seed: int = 0) -> None:
    """Values as after training: A as large as it begins, B normal with deviation `b`, not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.trainable_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator)
                * (b if "lora_B" in name else p.shape[1] ** -0.5)
            )
