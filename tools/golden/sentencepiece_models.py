"""Makes tests/golden/tokenizers/{t5,gemma}_spm: small sentencepiece models of the kinds that T5 and Gemma
have, trained on a few made-up lines, with a table of rules for characters (T5). tokenizer.py --golden adds
lines.json to them. Needs the sentencepiece package.

    python tools/golden/sentencepiece_models.py
"""
import json
import os
import random
import tempfile

import sentencepiece

WORDS = ("a the photo of in style cat dog face grinning with open mouth red blue apple sky portrait best "
         "quality Zürich café naïve 8k 1girl don't state-of-the-art x264 мир кот 日本 猫").split()
# from, to: hexadecimal code points; some of NFKC, white space, nothing, and a pair
RULES = ["FF21\t41", "FF42\t62", "FB01\t66 69", "2460\t31", "A0\t20", "3000\t20", "9\t20", "200B\t", "AD\t",
         "65 301\tE9", "41 30A\tC5", "212B\tC5", "2026\t2E 2E 2E", "BD\t31 2044 32", "FF76 FF9E\t30AC", "FF76\t30AB"]


def train(folder, model, kind, size, rules, **more):
    random.seed(4)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, table = os.path.join(scratch, "corpus"), os.path.join(scratch, "rules")
        with open(corpus, "w", encoding="utf-8") as f:
            f.writelines(" ".join(random.choices(WORDS, k=9)) + "\n" for _ in range(400))
        if rules:
            with open(table, "w", encoding="utf-8") as f:
                f.write("\n".join(rules) + "\n")
            more["normalization_rule_tsv"] = table
        sentencepiece.SentencePieceTrainer.train(
            input=corpus, model_prefix=os.path.join(scratch, "made"), model_type=kind, vocab_size=size,
            minloglevel=2, num_threads=1, **more)
        os.replace(os.path.join(scratch, "made.model"), os.path.join(folder, model))


def main():
    folder = "tests/golden/tokenizers/"
    train(folder + "t5_spm", "spiece.model", "unigram", 80, RULES, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    train(folder + "gemma_spm", "tokenizer.model", "bpe", 400, None, normalization_rule_name="identity", pad_id=0,
          eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>", byte_fallback=True,
          add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
          user_defined_symbols=["<mask>", "<start_of_turn>", "\u2581\u2581"])
    for name, settings in (("t5_spm", {"tokenizer_class": "T5Tokenizer"}),
                           ("gemma_spm", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True,
                                          "add_eos_token": False})):
        with open(folder + name + "/tokenizer_config.json", "w", encoding="utf-8") as f:
            json.dump(settings, f)


main()
