"""Checks that encoding and decoding yi-nano's tokenizer gives back any text, and prints a few facts about it.

The one exception, which SentencePiece tokenizers share (Yi's too): U+2581, the sign that stands for a space, comes back as a
space.
"""

import random
import sys
from pathlib import Path

from tokenizers import Tokenizer

ODD_TEXTS = ["", " ", "  ", "   leading", "trailing   ", "\n", "\n\n \n", "\t\ttabs\t", "\r\n", "a  b   c", "In the beginning",
             "牀前明月光，疑是地上霜。", "龘䨻𪚥𠮷", "👩‍👩‍👧‍👦 🏳️‍🌈 é é ñ", "مرحبا עברית ไทย हिन्दी", "\x00\x01\x7f", "<0x41>", "<0xE4>",
             "<|im_start|>user\nhi<|im_end|>\n", "<unk>", "<|startoftext|> x <|endoftext|>", "\ufeffBOM \u200b\u00a0\u3000",
             "def f(x):\n    return {'a': [1, 2.5e-3]}\n", "\U0010ffff", "\ufffd", "<|im_end", "##word", "Ġ", "ﷺ", "x" * 5000]


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "models/yi-nano/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    rng = random.Random(1)
    ranges = [(0, 0x80), (0, 0x300), (0x2570, 0x2600), (0x3000, 0x9fff), (0xe000, 0x10ffff)]
    random_texts = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40))) for _ in range(20000)]
    for text in ODD_TEXTS + [t.replace("\u2581", "") for t in random_texts]:
        ids = tokenizer.encode(text).ids
        back = tokenizer.decode(ids, skip_special_tokens=False)
        assert back == text, (text, back, ids)
    vocab = tokenizer.get_vocab()
    hanzi = sum(1 for piece in vocab if len(piece) == 1 and "\u4e00" <= piece <= "\u9fff")
    print(f"{len(ODD_TEXTS) + len(random_texts)} texts came back; {len(vocab)} pieces, {hanzi} of them single hanzi")
    for text in ["In the beginning God created the heaven and the earth.", "白日依山盡，黃河入海流。", "<|im_start|>user\nhi<|im_end|>\n"]:
        print(tokenizer.encode(text).tokens)


if __name__ == "__main__":
    main()
