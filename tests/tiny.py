"""Tiny random Llama model folders for the tests, made offline from a seed in under a second.

    make_tiny_model(folder)                              D 64, 2 layers, H 4, G 2, a tied head
    make_tiny_model(folder, tokenizer="spm", tie=False)  with a SentencePiece tokenizer.model

The weights are drawn so that activations keep their size from layer to layer, and so that logits
spread by several units: a greedy choice is then seldom a near tie. As in many models, the tokenizer
has fewer tokens than the embedding has rows, and the pad token is the eos token.
"""

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
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
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
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

TEXTS = [  # on which a tokenizer may stumble
    *CORPUS,
    "  two spaces, a tab\tand\n\n\nnewlines   \n end ",
    "we'll they'RE 'tis 3 33 333 3333 3.14 ½ ١٢٣",
    "emoji 🦙🦙 ✅ ﷽ e\u0301 \u200d zero width, ------====== \"\"\"'''",
    "ｆｕｌｌ　ｗｉｄｔｈ \u00a0nbsp Ωmega ßtraße ĲSSEL",
]

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


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
    """Write config.json, *.safetensors and a tokenizer into `folder`, and return `folder`.

    tokenizer: "bpe" (byte-level, with SmolLM2's pre-tokenizer), "llama3" (byte-level, with Llama
        3's pre-tokenizer, adds a BOS) or "spm" (SentencePiece).
    shards: number of weight files; more than one come with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = TINY_CONFIG | {
        "attention_bias": attention_bias,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tie,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    K = head_dim or hidden // heads
    shapes = tiny_shapes(hidden, layers, heads, kv_heads, K, ffn, vocab, tie, attention_bias)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: draw(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    _write_tensors(folder, tensors, shards)
    write_tokenizer(folder, tokenizer)
    return folder


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return random values of the tensor `name`, in float32."""
    values = torch.randn(shape, generator=generator)
    if name.endswith(("layernorm.weight", "norm.weight")):
        return 1 + 0.2 * values
    if name.endswith(".bias"):
        return 0.5 * values
    if name.startswith("model.embed_tokens"):
        # Small beside the layers' output: otherwise a tied model repeats its last token.
        return 0.25 * values
    return (4 if name.startswith("lm_head") else 1.5) * shape[-1] ** -0.5 * values


def tiny_shapes(
    hidden, layers, heads, kv_heads, K, ffn, vocab, tie, attention_bias
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each tensor, in the order in which the model uses them."""
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
    unk, bos, eos = SPECIAL
    special = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": eos}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": CHATML}
    if kind == "spm":
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "add_bos_token": True,
            "add_eos_token": False,
            "chat_template": CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "## "),
        }
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
def sentencepiece_model(**changes: str | bool) -> bytes:
    """Return a BPE SentencePiece model with byte fallback.

    Its ids are 0 <unk>, 1 <s>, 2 </s>, then 256 bytes, then the pieces.

    changes: settings of the trainer.
    """
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        vocab_size=400,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **(settings | changes),
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
    """Fill the adapter as if it were trained: A as large as at the start, and B no longer zero.

    b: standard deviation of B, whose values are normal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.trainable_parameters():
            deviation = b if "lora_B" in name else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * deviation)
