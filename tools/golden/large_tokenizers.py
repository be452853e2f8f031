"""Tokenizers as large as Gemma's (256,000 pieces), T5's (32,100) and CLIP's (49,408), trained on what text a
machine has, and compared with transformers on 10,000 lines of mixed Unicode, from each form of their files.

    large_tokenizers.py FOLDER --text DIR... [--ids build/release/tokenizer-ids]

FOLDER gets gemma_model, gemma_json, gemma_lines (merges as "a b", as older files have them), t5_model, t5_json,
clip_pair and clip_json, which are kept (hundreds of megabytes with the corpus) and trained anew where they are
missing. --text: folders with translations (*.mo), sources and pages (plain or *.gz). Without --ids nothing is
compared. Needs transformers, tokenizers, sentencepiece and protobuf; minutes, and 3 GiB of memory.
"""
import argparse
import gettext
import glob
import gzip
import json
import os
import random
import subprocess
import sys
import time
import unicodedata

import sentencepiece
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

MEGABYTE = 1_000_000
SPACE = "\u2581"
TAGS = [f"<{end}{tag}>" for end in ("", "/") for tag in
        "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u sub sup code".split()]
# in the order of Gemma's own: control words, runs of line ends and of blanks, tags; then come bytes and pieces
GEMMA_WORDS = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)), "<start_of_turn>",
               "<end_of_turn>", *("\n" * i for i in range(1, 32)), *(SPACE * i for i in range(2, 32)), *TAGS]
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def texts_of(path):
    if path.endswith(".mo"):
        with open(path, "rb") as f:
            yield from (v for v in gettext.GNUTranslations(f)._catalog.values() if isinstance(v, str))
    else:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            yield f.read()


def write_corpus(path, folders, size):
    """Lines of all folders in equal shares, and each character with its name."""
    rng = random.Random(1)
    with open(path, "w", encoding="utf-8") as out:
        for folder in folders:
            files = sorted(glob.glob(os.path.join(folder, "**", "*"), recursive=True))
            rng.shuffle(files)
            left = size // len(folders)
            for name in files:
                if left <= 0:
                    break
                try:
                    lines = [s for text in texts_of(name) for s in text.splitlines() if 4 <= len(s) <= 2000]
                except (OSError, ValueError, EOFError, LookupError):  # a folder, or no text
                    continue
                left -= sum(len(s.encode()) + 1 for s in lines)
                out.writelines(s + "\n" for s in lines)
        out.writelines(f"{chr(c)} {unicodedata.name(chr(c), '')}\n" for c in range(32, 0x20000)
                       if unicodedata.name(chr(c), ""))


def put_config(folder, **settings):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(settings, f)


def train_pieces(corpus, folder, name, **how):
    sentencepiece.SentencePieceTrainer.train(input=corpus, model_prefix=os.path.join(folder, "made"), pad_id=0,
                                             eos_id=1, num_threads=2, minloglevel=2, **how)
    os.replace(os.path.join(folder, "made.model"), os.path.join(folder, name))
    os.remove(os.path.join(folder, "made.vocab"))


def make_gemma(corpus, root):
    model, whole, lines = (os.path.join(root, "gemma_" + s) for s in ("model", "json", "lines"))
    put_config(model, tokenizer_class="GemmaTokenizer", add_bos_token=True, add_eos_token=False)
    train_pieces(corpus, model, "tokenizer.model", model_type="bpe", vocab_size=256_000, bos_id=2, unk_id=3,
                 bos_piece="<bos>", eos_piece="<eos>", normalization_rule_name="identity", byte_fallback=True,
                 split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
                 allow_whitespace_only_pieces=True, user_defined_symbols=GEMMA_WORDS, character_coverage=0.9999,
                 max_sentence_length=8192)
    transformers.GemmaTokenizer.from_pretrained(model).save_pretrained(whole)
    put_config(lines, **json.load(open(os.path.join(whole, "tokenizer_config.json"), encoding="utf-8")))
    with open(os.path.join(whole, "tokenizer.json"), encoding="utf-8") as f:
        content = json.load(f)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    with open(os.path.join(lines, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(content, f, ensure_ascii=False, indent=1)


def make_t5(corpus, root):
    model, whole = (os.path.join(root, "t5_" + s) for s in ("model", "json"))
    put_config(model, tokenizer_class="T5Tokenizer", extra_ids=100, model_max_length=512)
    train_pieces(corpus, model, "spiece.model", model_type="unigram", vocab_size=32_000, bos_id=-1, unk_id=2,
                 normalization_rule_name="nmt_nfkc", input_sentence_size=400_000)
    transformers.T5Tokenizer.from_pretrained(model).save_pretrained(whole)


def clip_alphabet():
    """GPT-2's characters for bytes in the order of their bytes' table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def make_clip(corpus, root):
    pair, whole = (os.path.join(root, "clip_" + s) for s in ("pair", "json"))
    t = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                         normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with open(corpus, encoding="utf-8") as f:
        t.train_from_iterator((s for i, s in enumerate(f) if i % 3 == 0), trainers.BpeTrainer(
            vocab_size=49_408, end_of_word_suffix="</w>", initial_alphabet=clip_alphabet(), show_progress=False))
    vocab = {w: i for i, w in enumerate([*clip_alphabet(), *(c + "</w>" for c in clip_alphabet())])}
    merges = []
    for left, right in json.loads(t.to_str())["model"]["merges"]:
        if len(vocab) < 49_406 and left in vocab and right in vocab:
            merges.append(f"{left} {right}\n")
            vocab.setdefault(left + right, len(vocab))
    for word in ("<|startoftext|>", "<|endoftext|>"):
        vocab[word] = len(vocab)
    put_config(pair, tokenizer_class="CLIPTokenizer", model_max_length=77)
    with open(os.path.join(pair, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump(vocab, f, ensure_ascii=False)
    with open(os.path.join(pair, "merges.txt"), "w", encoding="utf-8") as f:
        f.writelines(["#version: 0.2\n", *merges])
    transformers.CLIPTokenizer.from_pretrained(pair).save_pretrained(whole)


KINDS = {"gemma": (make_gemma, ["gemma_model", "gemma_json", "gemma_lines"]),
         "t5": (make_t5, ["t5_model", "t5_json"]), "clip": (make_clip, ["clip_pair", "clip_json"])}


def describe(folder):
    said = []
    for name in sorted(os.listdir(folder)):
        if name != "tokenizer_config.json":
            said.append(f"{name} {os.path.getsize(os.path.join(folder, name)):,} bytes")
        if name == "tokenizer.json":
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                model = json.load(f)["model"]
            said.append(f"{len(model['vocab']):,} pieces")
            said += [f"{len(model['merges']):,} merges"] if "merges" in model else []
    return ", ".join(said)


def load_seconds(ids, folder):
    """The whole of a process that reads the tokenizer and one line; the least of three."""
    best = float("inf")
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([ids, folder], input=b"a photo of a cat\n", stdout=subprocess.DEVNULL, check=True)
        best = min(best, time.monotonic() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--size", type=int, default=100, help="megabytes of text")
    parser.add_argument("--ids")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    corpus = os.path.join(options.folder, "corpus.txt")
    compare = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer.py"), "--compare"]
    good = True
    for kind, (make, names) in KINDS.items():
        if not os.path.isdir(os.path.join(options.folder, names[-1])):
            if not os.path.exists(corpus):
                write_corpus(corpus, options.text, options.size * MEGABYTE)
            make(corpus, options.folder)
        for folder in (os.path.join(options.folder, name) for name in names):
            print(f"{os.path.basename(folder)}: {describe(folder)}", flush=True)
            if options.ids:
                other = [] if kind == "clip" else ["--other"]
                good &= subprocess.run([*compare, options.ids, "--model", folder, *other]).returncode == 0
                print(f"  {load_seconds(options.ids, folder):.2f} s to load", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
