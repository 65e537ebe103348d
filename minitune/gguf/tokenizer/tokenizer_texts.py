"""The fixed texts on which the tokenizer in a file and the tokenizer that trained are compared."""

FIXED_TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "The order of twelve blue lamps goes to Lisbon on Friday.",
    "  two spaces   three    four        eight",
    "a                                   b",
    "\ttab\t\ttwo \t mixed\t ",
    "\n\na line\n\n\nthree lines \n \n  indented\n",
    "carriage\r\nreturns\r\n\r\nalone\rand\r\r",
    "\v\f\x85\u2028\u2029",
    "no\u00a0break\u00a0\u00a0space and\u3000ideographic\u3000\u3000space",
    "zero\u200bwidth\u200d\ufeff\u00ad",
    "ｆｕｌｌ　ｗｉｄｔｈ　ＡＢＣ１２３！",
    "ﬁ ﬂ ½ ² ⅷ Ⅻ ℃ Ω ™ …",
    "cafe\u0301 u\u0308ber A\u030a n\u0303",
    "\u1100\u1161\u11a8 \u0300\u0301 x\u0323\u0307",
    "Größe Straße naïve façade Ærøskøbing",
    "ÉCOLE École éCOLE ŁÓDŹ Łódź ΚΕΦΑΛΑΊΑ Ελλάδα Москва МОСКВА",
    "1 12 123 1234 12345 123456 1234567 1,234.56 -7 +3 0x1F 1e-5 10:45",
    "١٢٣٤ २०२४ １２３４ ²³ ³4",
    "a1b2 3rd x86_64 v1.2.3",
    "it's we'll they've I'm you're he'd don't",
    "IT'S WE'LL THEY'VE I'M YOU'RE HE'D DON'T it'S WE'll",
    "'tis 'quoted' ''twice'' O'Neil rock'n'roll",
    "camelCase PascalCase HTTPServer snake_case SCREAMING_CASE iPhone",
    "!?... --- ___ *** ((())) [[x]] {{y}} $$ @@ ## %% ^^ && || ~~ ``",
    "a.b,c;d:e!f?g/h\\i\n/path/to/file\n//\n",
    "def area(width, height):\n    return width * height  # in m\n\n\tif x != y:\n\t\tpass\n",
    "for (int i = 0; i < n; ++i) {\r\n\ta[i] += 1;\r\n}\r\n",
    '{"item": "lamp", "count": [1, 2, 3], "ok": true}',
    '<div class="a-b">&nbsp;text</div><br/><!-- x -->',
    "https://example.org/a%20b/?q=1&r=[2]#part me@example.org",
    "E = mc^2, \\frac{a}{b} ≠ ∑∫√ → ⇒ €5 £6 ¥7",
    "🦙🚀 ✅ 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☺️",
    "我想在apple工作1314151天～。你好，世界！",
    "日本語のテキスト。カタカナ・ひらがな ー々",
    "한국어 텍스트, 조선말",
    "नमस्ते दुनिया, यह एक परीक्षण है",
    "ภาษาไทยไม่มีช่องว่าง น้ำ",
    "مرحبا بالعالم، السَّلامُ عليكم",
    "שלום עולם Привет, мир! Γειά σου",
    "Cửa Việt, Tiếng Việt có dấu",
    "▁ ▁▁a a▁b Ġ Ċ <0x0A> <x> [PAD0] <|x|>",
    "\0\x01\x1b[0m\x7f",
)

# Plain texts that llama.cpp and training put the same special tokens around.
BEGINNINGS = ("", "a", " a", "\n", "The lamp")

SYSTEM = {"role": "system", "content": "You answer briefly.\nIn one line."}
TURNS = (
    {"role": "user", "content": " What's 12 + 345?\n"},
    {"role": "assistant", "content": "It's 357.  Anything else?"},
    {"role": "user", "content": "No, thanks 🦙"},
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "the city"}},
                "required": ["city"],
            },
        },
    }
]
# (messages, add_generation_prompt, tools). Templates may refuse some of them.
CONVERSATIONS = tuple(
    (list(messages), prompt, tools)
    for messages in ((SYSTEM, *TURNS), TURNS)
    for prompt in (False, True)
    for tools in (None, TOOLS)
)


def text_around(token: str) -> str:
    """Return a text with a token before and behind words, white space and itself."""
    return f"{token}a lamp{token}b {token} c\n{token}\n{token}{token}  {token}  d{token}"


def text_with(piece: str, other: str) -> str:
    """Return a text with a piece of the vocabulary as a word and glued to another piece."""
    return f"{piece} {piece}{other.strip()}"
