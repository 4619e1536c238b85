"""Lines of text that tokenizers disagree about: real ones out of this repository, and seeded mixtures.

Used by the tests of tokenizers. The lines are the same in every run of one version of the repository.
"""

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "äöüßÄÖÜéèêçñøåœłşğı",
    "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗ",
    "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔάέήίόύώ",
    "的一是不了人我在有他这中大来上国日本語中文简体繁體",
    "ひらがなカタカナー々〆ヵ",
    "한국어조선말가나다라마바사",
    "العربيةمرحبابكمفيالعالم٠١٢٣٤٥",
    "עבריתשלוםעולם",
    "ภาษาไทยสวัสดีชาวโลก๐๑๒๓",
    "हिन्दीनमस्तेदुनिया०१२३क़",
    "বাংলাஅஆதமிழ்తెలుగుಕನ್ನಡമലയാളം",
    "ქართულიՀայերենአማርኛខ្មែរမြန်မာ",
    "ＦＵＬＬｗｉｄｔｈ０１２３",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢𝒮𝒸𝓇𝒾𝓅𝓉𝟘𝟙𝟚",
)
_MARKS = "\u0301\u0308\u0327\u0323\u20dd\u0e34\u093f\u064b\u05b4"
_DIGITS = "0123456789²³¼½Ⅷ①٣৪〇"
_EMOJI = ("😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "🤷🏿‍♂️", "1️⃣", "🧑🏻‍💻", "☃", "🫠", "™️")
_BLANKS = (" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u2028", "\u2029", "\u3000", "\u200b",
           "\u2009", "\u202f", "\x0b", "\x0c", "\x85", "\ufeff", " \n ", "\n\t", "    ", " " * 7, " " * 17)  # fmt: skip
_SYMBOLS = tuple('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~§°±×÷€£¥¿¡«»–—…•†‰′″※→⇒∀∑√∞≈█▁▂░♫。，、！？「」（）：；·')
_APOSTROPHES = ("'", "'", "'", "’", "‘", "ʼ", "`", "´", "＇")
_ENDINGS = ("s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "vE", "M", "LL", "D", "ſ", "x", "n't", "")
_CONTROLS = tuple(map(chr, (*range(9), *range(14, 32), 127, 128, 0x9F, 0xAD, 0xE000, 0xFFFD, 0xFFFE, 0x378, 0x10FFFF)))
_CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # größer\n",
    "if (a[i] != NULL && b->c == 0x1F) {\n\t\tfree(p);\n\t}\n",
    "SELECT * FROM t WHERE id='42' AND name LIKE \"%o''neil%\";",
    "https://user:pw@example.com:8080/a/b_c.html?x=1&y=%20z#frag",
    "C:\\Users\\Me\\file.TXT\r\n",
    '{"k": [1, 2.5e-10, null], "ü": "\\u00fc\\n"}',
    "<div class='x'>&nbsp;</div><!-- -->\n\n\n",
    "camelCaseHTTPServer2XMLParser_v1.2.3-rc4",
    "1,234,567.89 12345678901234567890 3.14159e+00 0b1010 007",
    "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-old\n+new\n",
    "x=\"\"\"\n'''```py\n$$\\frac{a}{b}$$",
)


def mixed_lines(count: int, special_tokens: Sequence[str] = (), *, seed: int = 0) -> list[str]:
    """Half real, half made; the first few are short strings that are trouble by themselves."""
    choice = random.Random(seed)
    lines = [
        "",
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "\t",
        "\0",
        "a",
        " a",
        "a ",
        "'",
        "'s",
        "'S",
        "é",
        "e\u0301",
        "\u00a0",
        "▁",
        "▁▁a",
    ]
    lines += special_tokens[:40]
    lines += [f" {token}\n{token} x{token}{token}" for token in special_tokens[:40]]
    lines += [
        character * length for character in " \n\t-=#.!a0ä中😀\r" for length in (2, 3, 5, 8, 15, 16, 17, 31, 40, 300)
    ]
    real = _real_lines()
    lines += choice.sample(real, min(len(real), (count - len(lines)) // 2))
    makers = (_words, _words, _blanks, _symbols, _characters, _code, _broken)
    while len(lines) < count:
        parts = [choice.choice(makers)(choice) for _ in range(choice.randint(1, 6))]
        if special_tokens and choice.random() < 0.3:
            parts.insert(choice.randrange(len(parts) + 1), choice.choice(special_tokens))
        lines.append("".join(parts))
    return lines


def _real_lines() -> list[str]:
    """Single lines, and paragraphs of six."""
    lines: list[str] = []
    for pattern in ("README.md", "docs/*.md", "lmx/**/*.py", "lmx/*.pyx", "lmx/bench/*.txt", "tests/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8").splitlines(keepends=True)
            lines += [line for line in text if line.strip()]
            lines += ["".join(text[start : start + 6]) for start in range(0, len(text), 6)]
    return lines


def _words(choice: random.Random) -> str:
    alphabet = choice.choice(_ALPHABETS)
    words = []
    for _ in range(choice.randint(1, 5)):
        characters = _DIGITS if choice.random() < 0.15 else alphabet
        word = "".join(choice.choices(characters, k=choice.randint(1, 9)))
        if choice.random() < 0.2:
            word += choice.choice(_MARKS)
        if choice.random() < 0.3:
            word += choice.choice(_APOSTROPHES) + choice.choice(_ENDINGS)
        if choice.random() < 0.2:
            word += "".join(choice.choices(_DIGITS, k=choice.randint(1, 8)))
        words.append(word)
    return choice.choice((" ", " ", "", "\n", "_", "-")).join(words)


def _blanks(choice: random.Random) -> str:
    return "".join(choice.choices(_BLANKS, k=choice.randint(1, 3)))


def _symbols(choice: random.Random) -> str:
    return choice.choice(("", " ")) + "".join(choice.choices((*_SYMBOLS, *_EMOJI), k=choice.randint(1, 5)))


def _characters(choice: random.Random) -> str:
    """Any character of Unicode 3.2, which every tokenizer's tables know, and some that are none."""
    characters = list(choice.choices(_CONTROLS, k=choice.randint(0, 2)))
    while len(characters) < 6:
        character = chr(choice.randrange(choice.choice((0x300, 0x3000, 0x20000))))
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs"):
            characters.append(character)
    return "".join(characters)


def _code(choice: random.Random) -> str:
    return choice.choice(_CODE)


def _broken(choice: random.Random) -> str:
    """Broken UTF-8, as a decoder in front of a JSON parser hands it on."""
    data = bytearray("größer 中文 😀 end".encode())
    for _ in range(choice.randint(1, 4)):
        data[choice.randrange(len(data))] = choice.randrange(256)
    return data[choice.randrange(4) :].decode(errors="replace")
