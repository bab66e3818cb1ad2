"""Texts that are tokenized with both libraries, in two kinds.

Prose is what people write: sentences of many languages, code, numbers, emoji. llama.cpp must tokenize it as Hugging
Face does, or a file is of no use. Special texts tell tokenizers apart: they begin with white space or are nothing else,
hold control characters, or mix scripts and signs at random. Where some of these differ, a file is of use, and it is
said. Texts with a model's own added tokens are special too (`token_check`).

All are in composed form (NFC), as llama.cpp composes nothing.
"""

from __future__ import annotations

import random
import unicodedata

PROSE = (
    "Hello, world! It's 12:30 on 2024-02-29, and pi is 3.14159.",
    "line one\nline two\n\n\nline five\r\n\ttabbed\tonce",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n",
    "for (int i = 0; i < n; ++i) { *p++ ^= 0xFF; }\t// <b>&amp;</b>\n\n#include <map>\n",
    '{"key": [null, true, -1.5e+10], "path": "C:\\\\dir\\n"}\n\n\n    SELECT * FROM t WHERE a <> \'b\';',
    "Größe, façade, naïve, Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย",
    "ქართული Հայերեն አማርኛ বাংলা தமிழ் తెలుగు ភាសាខ្មែរ မြန်မာ සිංහල བོད་",
    "camelCase HTTPServer ÉCOLE écoleÉtÉ iOSÄpfel straßeÜBER ИванПетров ΑΒγΔ ǅ ª",
    "السَّلَامُ עִבְרִית ไม่เป็นไร हिन्दी में लिखा",
    "日本語の文章、中文文本，한국어 문장。",
    "你好\u3000世界\u3000\u3000「引用」――２０２４年１２月！",
    "emoji 🙂🚀👩‍👩‍👧❤️🇩🇪👍🏽 and math ∑∫√≠ and box ┌─┐ €£¥ ½²Ⅳ",
    "don't won't I'll we've THEY'RE o'clock 'quoted' \"double\" it’s",
    "1 22 333 4444 55555 1234567890 1,234,567.89 ٣٤٥ १२३४ 007",
    "a",
    "a \n b\t\n  c   \n\n    d\u00a0e\u2003f",
    "ALLCAPS camelCase snake_case kebab-case https://example.org/a?b=c&d=%20",
    "!!! ... --- === ((( ))) [[[ ]]] <<< >>> *** ### $$$ @@@ ~~~ ``` ''' \"\"\"",
)

_EDGES = (
    "  leading, inner   and trailing spaces  ",
    " ",
    "\n",
    "   ",
    "\n\n \t \n",
    "\x00\x01\x7f\u200b\u2028\ufeffcontrol and invisible",
)

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "0123456789", "éèüöäßñçøåÉÜÖÀ",
    "αβγδεζηΑΒΓΔ", "абвгдежзАБВГДЕ", "אבגדהוזחט", "ابتثجحخدَُِّ", "कखगघािीुू", "กขคงุูิี่", "日本語文章漢字",
    "ひらがなカタナ", "한국어문장", "๑๒٣٤५६½²³", "!\"#$%&()*+,-./:;<=>?@[]^_`{|}~", "“”‘’…—。，、！？", "∑∫√≠±×÷€£©",
    "🙂🚀👩❤🇩🇪", "\n\r\t \u00a0\u3000", "\x00\x01\x0b\x1f\x7f\u200b\u2029\ufeff",
)  # fmt: skip


def special_texts(n_random: int = 40, seed: int = 0) -> list[str]:
    """Return the special texts: written ones, then random mixtures of scripts, digits, white space, signs and bytes."""
    source = random.Random(seed)
    return [*_EDGES, *(unicodedata.normalize("NFC", _mixture(source)) for _ in range(n_random))]


def sample_texts(n_random: int = 40, seed: int = 0) -> list[str]:
    """Return texts of both kinds."""
    return [*PROSE, *special_texts(n_random, seed)]


def _mixture(source: random.Random) -> str:
    parts = []
    for _ in range(source.randint(3, 12)):
        alphabet = source.choice(_ALPHABETS)
        # No letter twice in a row: SentencePiece and llama.cpp break a tie between two readings of it by rounding.
        parts.append("".join(source.sample(alphabet, source.randint(1, min(5, len(alphabet))))))
        if source.random() < 0.4:
            parts.append(source.choice((" ", " ", "  ", "   ", "'s ", "'LL ", "\n")))
    if source.random() < 0.25:
        parts.append("x" + source.randbytes(12).decode("utf-8", "replace"))
    return "".join(parts)
