"""make_sd15.py: a diffusers folder with the true shapes of Stable Diffusion 1.5 and random values.

    python tools/make_sd15.py build/sd15
    python tools/make_sd15.py build/sdxl --family sdxl --device cuda

For benchmarks and memory tests where the real checkpoint is not at hand. The classes of diffusers and
transformers initialise the values (their defaults, one seed), so activations stay finite; everything is
kept as float16, about 2 GB. With --family sdxl it is SDXL's U-Net and autoencoder (5.3 GB), without text
encoders: for `velatura bench`. The vocabulary is made up: 256 bytes, 256 bytes that end a word, 48,894
merges of letters and the two special tokens: CLIP's 49,408 ids, none with its meaning. Needs torch,
diffusers and transformers; the program itself does not.
"""
import argparse
import itertools
import json
import os
import string

VOCABULARY = 49408

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def byte_letters():
    """GPT-2's 256 letters for 256 bytes, printable ones first, as in CLIP's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def made_up_merges(count):
    """Pairs of letters, then triples, then quadruples, each also as the end of a word."""
    letters = string.ascii_lowercase
    merges = []
    for length in (2, 3, 4):
        words = ["".join(w) for w in itertools.product(letters, repeat=length)]
        for end in ("", "</w>"):
            merges += [(w[:-1], w[-1] + end) for w in words[: count - len(merges)]]
    return merges[:count]


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


def write_tokenizer(folder):
    os.makedirs(folder, exist_ok=True)
    letters = byte_letters()
    merges = made_up_merges(VOCABULARY - 2 * len(letters) - 2)
    words = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if len(set(words)) != VOCABULARY:
        raise SystemExit(f"{len(set(words))} words, not {VOCABULARY}")
    write_json(os.path.join(folder, "vocab.json"), {w: i for i, w in enumerate(words)})
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(os.path.join(folder, "special_tokens_map.json"), SPECIAL)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
                "add_prefix_space": False, "errors": "replace", **SPECIAL}
    write_json(os.path.join(folder, "tokenizer_config.json"), settings)


def make_unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)


def make_sdxl_unet():
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10), layers_per_block=2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def make_vae():
    from diffusers import AutoencoderKL
    return AutoencoderKL(sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                         latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
                         down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4)


def make_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
        projection_dim=768, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1))


FAMILIES = {
    "sd15": {"unet": make_unet, "vae": make_vae, "text_encoder": make_text_encoder},
    "sdxl": {"unet": make_sdxl_unet, "vae": make_vae},
}
U_NET_VALUES = {"sd15": 859520964, "sdxl": 2567463684}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--family", choices=list(FAMILIES), default="sd15")
    parser.add_argument("--device", default="cpu", help="where values are made; a GPU is faster [cpu]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch
    for name, make in FAMILIES[args.family].items():
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = make()
        values = sum(p.numel() for p in model.parameters())
        if name == "unet" and values != U_NET_VALUES[args.family]:
            raise SystemExit(f"the U-Net has {values} values, not {U_NET_VALUES[args.family]}")
        model.half().save_pretrained(os.path.join(args.folder, name), max_shard_size="10GB")
        print(f"{name}: {values:,} values", flush=True)
    index = dict(MODEL_INDEX)
    if args.family == "sdxl":
        index["_class_name"] = "StableDiffusionXLPipeline"
    else:
        write_tokenizer(os.path.join(args.folder, "tokenizer"))
    os.makedirs(os.path.join(args.folder, "scheduler"), exist_ok=True)
    write_json(os.path.join(args.folder, "scheduler", "scheduler_config.json"), SCHEDULER)
    write_json(os.path.join(args.folder, "model_index.json"), index)


if __name__ == "__main__":
    main()
