"""make_shapes.py: a diffusers folder with the true shapes of a larger model and random values, for benchmarks.

    python tools/make_shapes.py build/sana --family sana

SDXL, SD 3 and 3.5, FLUX.1, Sana and Lumina-Image 2.0: denoiser and autoencoder as float16; of the text
encoders only their configurations, which say how wide their states are, so `velatura bench step`, `unet` and
the autoencoder's run, and prompts do not. With --texts FOLDER the text encoders have weights too, and their
tokenizers are those of the tiny model in that folder (tests/golden/families/NAME/model), so the model can be
trained and drawn with. Matrices are normal with a deviation of one by the root of their
inputs, norms 1, biases 0: activations stay finite and nothing is learnt. Values are a block that repeats,
written as it is made, so a folder needs no more memory than its largest tensor. Needs torch and diffusers, and
transformers for --texts.
"""
import argparse
import json
import os
import shutil
import struct

import numpy as np

CLIP_L = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": 768,
          "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
          "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768, "vocab_size": 49408}
CLIP_G = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": 1280,
          "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
          "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 1280, "vocab_size": 49408}
CLIP_PLAIN = {**CLIP_L, "architectures": ["CLIPTextModel"]}
T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240,
      "num_layers": 24, "num_heads": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
      "is_gated_act": True, "dense_act_fn": "gelu_new", "layer_norm_epsilon": 1e-6,
      "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
GEMMA = {"architectures": ["Gemma2Model"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
         "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
         "max_position_embeddings": 8192, "rope_theta": 10000.0, "vocab_size": 256000}

KL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
      "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KL_4 = {**KL, "latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024}
KL_SD3 = {**KL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024,
          "use_quant_conv": False, "use_post_quant_conv": False}
KL_FLUX = {**KL_SD3, "scaling_factor": 0.3611, "shift_factor": 0.1159}
LATE = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC = {"latent_channels": 32, "encoder_block_types": LATE, "decoder_block_types": LATE,
      "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3,) * 6,
      "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407}

SD3 = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
       "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
SDXL = {"sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "layers_per_block": 2,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
         "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}

# pipeline, scheduler, {part: (class of diffusers, its settings)}, configurations of text encoders
THREE_TEXTS = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5}
FAMILIES = {
    "sdxl": ("StableDiffusionXLPipeline", EULER,
             {"unet": ("UNet2DConditionModel", SDXL), "vae": ("AutoencoderKL", KL_4)},
             {"text_encoder": CLIP_PLAIN, "text_encoder_2": CLIP_G}),
    "sd3": ("StableDiffusion3Pipeline", FLOW,
            {"transformer": ("SD3Transformer2DModel", SD3), "vae": ("AutoencoderKL", KL_SD3)}, THREE_TEXTS),
    "sd35-medium": ("StableDiffusion3Pipeline", FLOW,
                    {"transformer": ("SD3Transformer2DModel",
                                     {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                                      "dual_attention_layers": tuple(range(13))}),
                     "vae": ("AutoencoderKL", KL_SD3)}, THREE_TEXTS),
    "sd35-large": ("StableDiffusion3Pipeline", FLOW,
                   {"transformer": ("SD3Transformer2DModel",
                                    {**SD3, "num_layers": 38, "num_attention_heads": 38,
                                     "caption_projection_dim": 2432, "qk_norm": "rms_norm"}),
                    "vae": ("AutoencoderKL", KL_SD3)}, THREE_TEXTS),
    "flux-dev": ("FluxPipeline", {**FLOW, "use_dynamic_shifting": True},
                 {"transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
                  "vae": ("AutoencoderKL", KL_FLUX)}, {"text_encoder": CLIP_PLAIN, "text_encoder_2": T5}),
    "sana": ("SanaPipeline", {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
                              "use_flow_sigmas": True, "flow_shift": 3.0},
             {"transformer": ("SanaTransformer2DModel", {}), "vae": ("AutoencoderDC", DC)}, {"text_encoder": GEMMA}),
    "lumina2": ("Lumina2Pipeline", {**FLOW, "shift": 6.0},
                {"transformer": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
                 "vae": ("AutoencoderKL", KL_FLUX)}, {"text_encoder": GEMMA}),
}
BLOCK = 1 << 22  # values that repeat


def write_json(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def deviation(name, shape):
    """0: a constant. Tables of scales and places are small, as trained ones are."""
    if len(shape) < 2:
        return 0
    if name.endswith(("scale_shift_table", "pos_embed")):
        return 0.02
    return float(np.prod(shape[1:])) ** -0.5


def write_values(path, shapes, seed):
    """A safetensors file, tensor by tensor."""
    block = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (name, shape) in enumerate(shapes.items()):
            count, by = int(np.prod(shape, dtype=np.int64)), deviation(name, shape)
            if by == 0:
                file.write(np.full(count, 0 if name.endswith("bias") else 1, np.float16).tobytes())
                continue
            values = (np.roll(block, 7919 * i) * by).astype(np.float16)
            for _ in range(count // BLOCK):
                file.write(values.tobytes())
            file.write(values[: count % BLOCK].tobytes())


def write_text(path, config, seed):
    import torch
    import transformers
    name = config["architectures"][0]
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, name)(kind)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    write_values(path, shapes, seed)
    print(f"{name}: {sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values()):,} values", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", metavar="FOLDER")
    args = parser.parse_args()
    import diffusers
    import torch
    pipeline, scheduler, parts, texts = FAMILIES[args.family]
    index = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]]}
    for part, (name, settings) in parts.items():
        with torch.device("meta"):
            model = getattr(diffusers, name)(**settings)
        folder = os.path.join(args.folder, part)
        model.save_config(folder)
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        write_values(os.path.join(folder, "diffusion_pytorch_model.safetensors"), shapes, args.seed)
        index[part] = ["diffusers", name]
        print(f"{part}: {sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values()):,} values", flush=True)
    for part, config in texts.items():
        write_json(os.path.join(args.folder, part, "config.json"), config)
        if args.texts:
            write_text(os.path.join(args.folder, part, "model.safetensors"), config, args.seed)
            tokenizer = "tokenizer" + part[len("text_encoder"):]
            shutil.copytree(os.path.join(args.texts, tokenizer), os.path.join(args.folder, tokenizer),
                            dirs_exist_ok=True, copy_function=shutil.copyfile)
        index[part] = ["transformers", config["architectures"][0]]
        index["tokenizer" + part[len("text_encoder"):]] = ["transformers", "PreTrainedTokenizerFast"]
    write_json(os.path.join(args.folder, "scheduler", "scheduler_config.json"), scheduler)
    write_json(os.path.join(args.folder, "model_index.json"), index)


if __name__ == "__main__":
    main()
