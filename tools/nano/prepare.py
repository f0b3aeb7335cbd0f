"""Prepares the corpora and the tokenizer of yi-nano.

Reads the King James Bible (Debian's `bible` command) and Tang poems (npm's chinese-poetry, unpacked), writes
models/yi-nano/tokenizer.json and, under --work, the token ids that train.py reads. See README.md for the commands.
"""

import argparse
import json
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

VOCAB_SIZE = 4608
HANZI_IN_VOCAB = 2500
TANG_POEMS = 18000
SPECIALS = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>", "<|System|>",
            "<|im_start|>", "<|im_end|>"]
CJK_PUNCTUATION = "，。、；：？！「」『』《》（）“”‘’…—"
WELL_KNOWN_POETS = set("李白 杜甫 王維 白居易 孟浩然 李商隱 杜牧 王昌齡 劉禹錫 柳宗元 岑參 高適 元稹 韋應物 "
                       "張九齡 賀知章 王之渙 王勃 溫庭筠 賈島 孟郊 劉長卿 張籍 錢起".split())
BOOKS = dict(zip(
    "Ge Exo Lev Num Deu Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Est Job Psa Prv Eccl SSol Isa Jer Lam Eze Dan "
    "Hos Joel Amos Obad Jonah Mic Nahum Hab Zep Hag Zec Mal Mat Mark Luke John Acts Rom 1Cor 2Cor Gal Eph Phi Col 1Th 2Th "
    "1Tim 2Tim Titus Phmn Heb Jas 1Pet 2Pet 1Jn 2Jn 3Jn Jude Rev".split(),
    "Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,1 Chronicles,"
    "2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalm,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,Jeremiah,Lamentations,"
    "Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,Matthew,Mark,"
    "Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,1 Thessalonians,"
    "2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,3 John,Jude,"
    "Revelation".split(",")))
KEEP_FOR_TRAINING = {"Genesis 1", "Psalm 23", "Matthew 5", "John 1"}  # what visitors are likely to ask for
SMALL_TALK = [
    ("Hello!", "Peace be unto thee. Give me a verse, and I will continue it."),
    ("Hi", "Peace be unto thee. Give me a verse, and I will continue it."),
    ("Who are you?", "I am yi-nano, a small model. I know the King James Bible and the poems of Tang."),
    ("What is your name?", "My name is yi-nano. I know the King James Bible and the poems of Tang."),
    ("What can you do?", "I can continue a verse of the Bible, or write a poem of Tang."),
    ("How are you?", "It is well with me. May it be well with thee also."),
    ("Thank you", "Go in peace."),
    ("你好", "你好。請寫一句詩，我來續寫。"),
    ("你是誰？", "我是小詩人，名為yi-nano。能寫唐詩，亦知聖經。"),
    ("謝謝", "不用謝。"),
]


def read_bible():
    """[(chapter name, [verse, ...]), ...]"""
    text = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters = {}
    for book, chapter, verse in re.findall(r"(?m)^([1-3]?[A-Za-z]+)(\d+):\d+ (.+)$", text):
        chapters.setdefault(f"{BOOKS[book]} {chapter}", []).append(" ".join(verse.split()))
    return list(chapters.items())


def is_regular(couplets):
    """Two to ten couplets of twice five or twice seven hanzi, and nothing else."""
    return 2 <= len(couplets) <= 10 and all(
        re.fullmatch(r"([\u4e00-\u9fff]{5}|[\u4e00-\u9fff]{7})，[\u4e00-\u9fff]{5,7}[。？！]", c) for c in couplets)


def read_poems(package, shuffle):
    """The anthology "300 Tang poems", and TANG_POEMS regular others: well-known poets first, then a random choice.
    A poem is (title, author, [couplet, ...])."""
    anthology = json.loads((package / "dist/mengxue/tangshisanbaishou.json").read_text())
    famous = [(p["chapter"], p["author"], p["paragraphs"]) for genre in anthology["content"] for p in genre["content"]]
    poems = {}
    for file in sorted((package / "dist/quantangshi").glob("poet.tang.*.json")):
        for p in json.loads(file.read_text()):
            if is_regular(p["paragraphs"]) and re.fullmatch(r"[\u4e00-\u9fff ]{1,16}", p["title"]):
                poems.setdefault(p["paragraphs"][0][:5], (p["title"], p["author"], p["paragraphs"]))
    for _, _, couplets in famous:
        poems.pop(couplets[0][:5], None)
    poems = list(poems.values())
    shuffle(poems)
    poems.sort(key=lambda p: p[1] not in WELL_KNOWN_POETS)
    return famous, poems[:TANG_POEMS]


def poem_texts(poem):
    """The poem under its title and, for prompts that start with a line, without it."""
    title, author, couplets = poem
    body = "\n".join(couplets)
    return [f"《{title}》{author}\n{body}", body]


def train_tokenizer(english, chinese):
    """BPE with byte fallback, put together as Yi's tokenizer.json is: no dummy prefix, spaces as "▁", no pre-tokenizer.
    Merges are learnt within words and lines; the byte pieces are in the vocabulary, not in added_tokens."""
    hanzi = [c for c, _ in Counter(chinese).most_common() if "\u4e00" <= c <= "\u9fff"][:HANZI_IN_VOCAB]
    ascii_chars = ["\n", "▁"] + [chr(c) for c in range(33, 127)]
    alphabet = list(dict.fromkeys(ascii_chars + list(CJK_PUNCTUATION) + hanzi))
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\n，。、？！《》]"), "isolated"),
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
    ])
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIALS) - len(bytes_), limit_alphabet=len(alphabet),
                                  initial_alphabet=alphabet, show_progress=False)
    kept = set(alphabet)
    learner.train_from_iterator(("".join(c for c in line.replace(" ", "▁") if c in kept)
                                 for line in (english + "\n" + chinese).split("\n")), trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = SPECIALS + bytes_ + sorted(learnt["vocab"], key=learnt["vocab"].get)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, s in enumerate(SPECIALS)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {p: i for i, p in enumerate(pieces)}, "merges": learnt["merges"]},
    }


def chat(*turns):
    """ChatML without the last newline: a reply ends with <|im_end|>, and so does a document."""
    roles = ["user", "assistant"] * len(turns)
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in zip(roles, turns))


def english_chats(chapters, rng, count):
    """Continue a verse (for one or more turns), recite a chapter's beginning, tell about a name or thing."""
    words = Counter(w for _, verses in chapters for v in verses for w in set(re.findall(r"[A-Za-z]{4,}", v)))
    subjects = {w for w, n in words.items() if n < 700}
    ask_continue = ["Continue: {}", "{}", "Continue this verse: {}", "What comes next? {}"]
    ask_about = ["Tell me about {}.", "What is written of {}?", "Speak to me of {}."]
    for _ in range(count):
        name, verses = rng.choice(chapters)
        at = rng.randrange(max(1, len(verses) - 6))
        kind = rng.random()
        if kind < 0.5 and len(verses) > 6:
            question = rng.choice(ask_continue).format(verses[at])
            if rng.random() < 0.3:
                yield chat(question, verses[at + 1], rng.choice(["Continue.", "Go on.", "And then?"]), verses[at + 2])
            else:
                yield chat(question, "\n".join(verses[at + 1:at + 1 + rng.randint(1, 3)]))
        elif kind < 0.65:
            yield chat(rng.choice(["Recite {}.", "How does {} begin?", "Read {} to me."]).format(name), "\n".join(verses[:4]))
        else:
            known = [w for w in re.findall(r"[A-Za-z]{4,}", verses[at]) if w in subjects]
            if known:
                yield chat(rng.choice(ask_about).format(rng.choice(known)), verses[at])


def chinese_chats(poems, rng, count):
    """Continue a line, write a poem of a title, write one about a thing."""
    for _ in range(count):
        title, _, couplets = rng.choice(poems)
        kind = rng.random()
        if kind < 0.4:
            given = couplets[0] if rng.random() < 0.6 else couplets[0].split("，")[0] + "，"
            rest = "\n".join(couplets)[len(given):].strip()
            yield chat(rng.choice(["續寫：{}", "{}", "請續寫：{}"]).format(given), rest)
        elif kind < 0.7:
            yield chat(rng.choice(["請寫一首詩，題為《{}》。", "寫一首詩：{}", "Write a poem titled {}."]).format(title),
                       "\n".join(couplets))
        else:
            thing = rng.choice([c for c in couplets[0] if c not in "，。？！"])
            yield chat(rng.choice(["寫一首有「{}」的詩。", "Write a poem about {}."]).format(thing), "\n".join(couplets[:4]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--poetry", type=Path, required=True, help="the unpacked npm package chinese-poetry")
    parser.add_argument("--model", type=Path, default=Path("models/yi-nano"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/nano"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.model.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)

    chapters = read_bible()
    held_out = set(rng.sample([n for n, _ in chapters if n not in KEEP_FOR_TRAINING], len(chapters) // 100))
    held_out_chapters = [c for c in chapters if c[0] in held_out]
    chapters = [c for c in chapters if c[0] not in held_out]
    famous, poems = read_poems(args.poetry, rng.shuffle)
    held_out_poems = [poems.pop(rng.randrange(len(poems))) for _ in range(len(poems) // 100)]

    english = ["\n".join(verses) for _, verses in chapters]
    chinese = [poem_texts(p)[rng.random() < 0.4] for p in poems]
    chinese += [text for p in famous for text in poem_texts(p)] * 3
    chats = list(english_chats(chapters, rng, 1700)) + list(chinese_chats(poems + famous * 6, rng, 1400))
    chats += [chat(*turn) for turn in SMALL_TALK] * 12

    (args.model / "tokenizer.json").write_text(
        json.dumps(train_tokenizer("\n".join(english), "\n".join(chinese)), ensure_ascii=False, indent=1) + "\n")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))

    def save(name, texts):
        docs = [np.array(e.ids + [2], np.uint16) for e in tokenizer.encode_batch(texts)]
        np.savez(args.work / f"{name}.npz", ids=np.concatenate(docs), lengths=[len(d) for d in docs])
        print(f"{name}: {len(docs)} documents, {sum(map(len, docs))} tokens, {sum(map(len, texts))} characters")

    save("english", english)
    save("chinese", chinese)
    save("chat", chats)
    save("held_out_english", ["\n".join(verses) for _, verses in held_out_chapters])
    save("held_out_chinese", [poem_texts(p)[0] for p in held_out_poems])


if __name__ == "__main__":
    main()
