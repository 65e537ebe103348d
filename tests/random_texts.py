"""Random texts on which tokenizers may differ: white space, scripts, marks, digits, cut words."""

import unicodedata
from random import Random

WORDS = (
    "The quick brown fox jumps over the lazy dog.",
    "It's what they'LL say: I'd've thought so, WE'RE fine",
    "Größe, Straße, naïve café, Čeština, Łódź, İstanbul, Tiếng Việt",
    "нещо на Български, Ελληνικά ΚΕΦΑΛΑΊΑ",
    "日本語のテキスト。カタカナ 我想在apple工作1314151天～ 한국어",
    "नमस्ते दुनिया, বাংলা, ภาษาไทย, שלום, مرحبا ١٢٣",
    "cafe\u0301 u\u0308ber \u1100\u1161\u11a8 ｆｕｌｌ　ｗｉｄｔｈ１２３！ ﬁ ½ ² ⅷ ℃",
    "🚀 🦙 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪 ✅ 🏽",
    "3 33 333 3333 33333 3.14 1,000,000 -17 0x1F",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # why\n",
    "if (a && b || !c) {\r\n\tx += 1;\r\n}\r\n",
    "https://example.org/a%20b?q=1&r=[2]#x E = mc^2, ∑∫≤≠→",
    "!!!!!! ... --- ''' (()) $$ @@ ~~ <|x|> ▁▁a Ġ <0x0A>",
)
SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\n \n", "\r\n", "\r", "\v\f", "\u00a0", "\u3000")
MIXED = " \t\n\r\u0085\u00a0\u2028\u3000'aAéÉzZ1٣न\u093e\u0301-./ſK<|>▁中\0\x1c\u200d"
# Python's and llama.cpp's tables may differ in the categories of newer characters.
ASSIGNED = [c for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]


def random_text(rng: Random, tokens: list[str]) -> str:
    """Return a text of words, white space, single characters and tokens."""
    parts = []
    for _ in range(rng.randrange(1, 9)):
        kind = rng.randrange(6)
        if kind == 0 and tokens:
            parts.append(rng.choice(tokens))
        elif kind <= 2:
            words = rng.choice(WORDS)
            begin = rng.randrange(len(words))
            parts.append(words[begin : begin + rng.randrange(1, 20)])
        elif kind == 3:
            parts += [chr(rng.choice(ASSIGNED)) for _ in range(rng.randrange(1, 5))]
        elif kind == 4:
            parts += rng.choices(MIXED, k=rng.randrange(1, 10))
        else:
            parts.append(rng.choice(SPACES))
    return "".join(parts)
