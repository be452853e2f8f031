"""Reference values for texts of more than 77 tokens and for weighted ones:
tests/golden/long_prompts.safetensors, from transformers' tokenizers and text encoders.

    python tools/golden/long_prompts.py

What is done with them is stated here anew, from how sd-scripts treats them (v0.10.1:
TokenizeStrategy, SdTextEncodingStrategy and SdxlTextEncodingStrategy for training, gen_img.py for
drawing), and tools/golden/long_prompts.py --peer FOLDER compares ids, weights and states with
those classes and functions of a checkout of it.

Readings: "train2" two pieces, stitched; "weigh1" and "weigh2" one and two pieces with weights;
"draw2" two pieces that keep their ends, with weights and the mean restored; of SDXL (pad "!" in
the second tokenizer, as the published model has it) as well. States are kept at every 48th value.
"""
import json, sys

import numpy as np, torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

SD, SDXL = "models/emoji-sd", "tests/golden/families/sdxl/model"
INNER, KEPT = 75, 48
WORDS = "a red fox under old trees beside the quiet river at dawn , painted in thin glazes of colour ".split()
TEXTS = ["a (red:1.3) fox",
         " ".join(WORDS[i % 18] for i in range(100)),
         " ".join(["fox"] * 75),
         " ".join(["fox"] * 74) + " tree tree",
         "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))). \\(plain\\) [" +
         " ".join(WORDS[i % 7] for i in range(90)) + "] ((" + " ".join(WORDS[:12]),
         " ".join(WORDS[i % 5] for i in range(170)) + " (end:1.5)"]


def stretches(text):
    """Texts with their weights: brackets multiply what they enclose, innermost first."""
    parts, round_, square, i = [], [], [], 0

    def close(at, by):
        for p in parts[at:]:
            p[1] *= by

    while i < len(text):
        c, used = text[i], 1
        if c == "\\":
            used = 2 if text[i + 1:i + 2] in list("()[]\\") else 1
            parts.append([text[i + 1:i + used], 1.0])
        elif c == "(":
            round_.append(len(parts))
        elif c == "[":
            square.append(len(parts))
        elif c == "]" and square:
            close(square.pop(), 1 / 1.1)
        elif c == ")" and round_:
            close(round_.pop(), 1.1)
        else:
            end = text.find(")", i)
            number = text[i + 1:end]
            if c == ":" and end > i + 1 and round_ and not set(number[1:]) - set("0123456789.") \
                    and number[0] in "+-.0123456789" and number.strip("+-."):
                close(round_.pop(), float(number))
                used = end + 1 - i
            else:
                parts.append([c, 1.0])
        i += used
    for at in round_:
        close(at, 1.1)
    for at in square:
        close(at, 1 / 1.1)
    joined = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return joined or [["", 1.0]]


def tokens(tokenizer, text, weighted, room):
    ids, weights = [], []
    for part, weight in stretches(text) if weighted else [[text, 1.0]]:
        new = tokenizer(part).input_ids[1:-1]
        ids += new
        weights += [weight] * len(new)
    return ids[:room], weights[:room]


def pieces(tokenizer, text, weighted, n):
    """[n, 77] ids and weights: all between begin and the last place, cut into stretches of 75."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids, weights = tokens(tokenizer, text, weighted, INNER * n)
    ids = ids + [end] + [pad] * (INNER * n - len(ids))
    weights = weights + [1.0] * (INNER * n + 1 - len(weights))
    out, heavy = [], []
    for at in range(0, INNER * n, INNER):
        row = [begin] + ids[at:at + INNER] + [ids[-1]]
        if n > 1 and pad != end:
            row[-1] = end if row[-2] not in (end, pad) else row[-1]
            row[1] = end if row[1] == pad else row[1]
        out.append(row)
        heavy.append([1.0] + weights[at:at + INNER] + [1.0])
    return torch.tensor(out), torch.tensor(heavy)


def stitch(states, n):
    middle = [states[:, 77 * i + 1:77 * i + 76] for i in range(n)]
    return torch.cat([states[:, :1]] + middle + [states[:, -1:]], 1) if n > 1 else states


def states_of(tokenizer, encoder, layer, texts, n, weighted, draw):
    """layer 0: the last one through the final norm; else hidden_states[layer]."""
    ids, heavy, states, pooled = [], [], [], []
    for text in texts:
        i, w = pieces(tokenizer, text, weighted, n)
        with torch.no_grad():
            got = encoder(i, output_hidden_states=True)
        x = (got.hidden_states[layer] if layer else got.last_hidden_state).reshape(1, 77 * n, -1)
        y = x * w.reshape(1, -1, 1) if weighted else x
        if draw and weighted:
            y = y * (x.mean() / y.mean())
        if layer and hasattr(encoder, "text_projection"):
            first = int((i[0] == tokenizer.eos_token_id).nonzero()[0])
            with torch.no_grad():
                pooled.append(encoder.text_projection(got.last_hidden_state[0, first]))
        states.append(y if draw else stitch(y, n))
        ids.append(i.reshape(-1))
        heavy.append(w.reshape(-1))
    return torch.stack(ids).int(), torch.stack(heavy), torch.cat(states), pooled


def sides():
    yield ("sd", CLIPTokenizerFast.from_pretrained(f"{SD}/tokenizer"),
           CLIPTextModel.from_pretrained(f"{SD}/text_encoder", torch_dtype=torch.float32), 0)
    yield ("sdxl", CLIPTokenizerFast.from_pretrained(f"{SDXL}/tokenizer"),
           CLIPTextModel.from_pretrained(f"{SDXL}/text_encoder", torch_dtype=torch.float32), -2)
    yield ("sdxl_2", CLIPTokenizerFast.from_pretrained(f"{SDXL}/tokenizer_2", pad_token="!"),
           CLIPTextModelWithProjection.from_pretrained(f"{SDXL}/text_encoder_2",
                                                       torch_dtype=torch.float32), -2)


READINGS = {"train2": (2, False, False), "weigh1": (1, True, False), "weigh2": (2, True, False),
            "draw2": (2, True, True)}


def made():
    for name, tokenizer, encoder, layer in sides():
        encoder.eval()
        for reading, (n, weighted, draw) in READINGS.items():
            yield f"{name}.{reading}", states_of(tokenizer, encoder, layer, TEXTS, n, weighted, draw)


def main():
    out = {}
    for key, (ids, weights, states, pooled) in made():
        if "draw" not in key: # as "weigh2"
            out[f"{key}.ids"] = ids
            out[f"{key}.weights"] = weights
        out[f"{key}.states"] = states[..., ::KEPT].contiguous()
        if pooled:
            out[f"{key}.pooled"] = torch.stack(pooled)
    save_file(out, "tests/golden/long_prompts.safetensors", {"texts": json.dumps(TEXTS)})


def against(folder):
    """The trainers' readings by the peer's own classes."""
    sys.path.insert(0, folder)
    from library.strategy_base import TokenizeStrategy
    from library.strategy_sd import SdTextEncodingStrategy
    from library.strategy_sdxl import SdxlTextEncodingStrategy

    class Side(TokenizeStrategy):
        pass

    tokens, all_ = Side(), {name: (t, e.eval(), l) for name, t, e, l in sides()}
    ours, worst = dict(made()), 0.0
    for reading, (n, weighted, draw) in READINGS.items():
        if draw:
            continue
        given = {name: [tokens._get_input_ids(t, x, INNER * n + 2, weighted) for x in TEXTS]
                 for name, (t, _, _) in all_.items()}
        ids = {k: torch.stack([g[0] if weighted else g for g in v]) for k, v in given.items()}
        weights = {k: torch.stack([g[1] for g in v]) for k, v in given.items()} if weighted else None
        for name in all_:
            key = f"{name}.{reading}"
            assert torch.equal(ids[name].reshape(len(TEXTS), -1).int(), ours[key][0]), key
            if weighted:
                assert torch.equal(weights[name].reshape(len(TEXTS), -1).float(), ours[key][1]), key
        with torch.no_grad():
            for names, strategy in ((["sd"], SdTextEncodingStrategy()),
                                    (["sdxl", "sdxl_2"], SdxlTextEncodingStrategy())):
                tokens.tokenizer = tokens.tokenizer1 = all_[names[0]][0]
                tokens.tokenizer2 = all_[names[-1]][0]
                models = [all_[k][1] for k in names]
                if names[0] == "sdxl":
                    whole = all_["sdxl"][1]  # the peer asks for layer 11 of 12: here 1 of 2
                    models[0] = lambda i, **kw: {"hidden_states": [None] * 11 +
                                                 [whole(i, **kw).hidden_states[-2]]}
                    models[0].device = whole.device
                how = [ids[k] for k in names]
                got = (strategy.encode_tokens_with_weights(tokens, models, how, [weights[k] for k in names])
                       if weighted else strategy.encode_tokens(tokens, models, how))
                for k, x in zip(names, got):
                    worst = max(worst, float((x - ours[f"{k}.{reading}"][2]).abs().max()))
                if len(got) == 3:
                    pooled = torch.stack(ours[f"sdxl_2.{reading}"][3])
                    worst = max(worst, float((got[2] - pooled).abs().max()))
    print(f"ids and weights equal; states differ by {worst:.2g} at most")


def drawn_against(folder):
    """The drawing programs' reading by the functions of gen_img.py."""
    import ast, logging, pathlib, re, types, typing
    wanted = {"re_attention", "parse_prompt_attention", "get_prompts_with_weights", "pad_tokens_and_weights",
              "get_unweighted_text_embeddings", "get_weighted_text_embeddings"}
    pooled = lambda encoder, last, ids, end: encoder.text_projection(
        last[torch.arange(len(ids)), (ids == end).int().argmax(1)])
    names = {**vars(typing), "re": re, "torch": torch, "CLIPTokenizer": CLIPTokenizerFast,
             "CLIPTextModel": CLIPTextModel, "logger": logging.getLogger("peer"),
             "train_util": types.SimpleNamespace(pool_workaround=pooled)}
    for node in ast.parse(pathlib.Path(folder, "gen_img.py").read_text()).body:
        target = getattr(node, "targets", [node])[0]
        if getattr(target, "id", getattr(target, "name", None)) in wanted:
            exec(compile(ast.Module([node], []), "gen_img.py", "exec"), names)
    worst = 0.0
    for name, tokenizer, encoder, layer in sides():
        encoder.eval()
        if not hasattr(encoder, "text_model"):  # of newer versions of transformers
            object.__setattr__(encoder, "text_model", encoder)
        ours = states_of(tokenizer, encoder, layer, TEXTS, 2, True, True)
        for i, text in enumerate(TEXTS):  # a long negative prompt makes all of them long
            with torch.no_grad():
                got = names["get_weighted_text_embeddings"](
                    name != "sd", tokenizer, encoder, text, uncond_prompt="fox " * 100, token_replacer=list,
                    max_embeddings_multiples=2, clip_skip=1 if name == "sd" else 2)
            worst = max(worst, float((got[0][0] - ours[2][i]).abs().max()))
            if ours[3]:
                worst = max(worst, float((got[1][0] - ours[3][i]).abs().max()))
    print(f"drawing: states differ by {worst:.2g} at most")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        against(sys.argv[2])
        drawn_against(sys.argv[2])
    else:
        main()
