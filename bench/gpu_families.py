"""gpu_families.py: what compare_gpu.py times of each model, and how diffusers' denoisers take their inputs.

A family has its cases in CASES and, in INPUTS, a function that gives the inputs of its denoiser by their names.
The shapes are those of this program's `bench`: a latent of the picture's size, all words of the text
seen, guidance where the model takes it.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools"))

DEVICE = "cuda"  # families_cpu.py sets another
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def case(name, kind, batch, size, precision="bf16", rank=0, checkpointing=False, goal=0, peak_goal=0.6,
         fit=None):
    """fit: ours stays within so much memory (--fit), the other side is as without it."""
    return {"name": name, "kind": kind, "batch": batch, "size": size, "precision": precision, "rank": rank,
            "checkpointing": checkpointing, "goal": goal, "peak_goal": peak_goal, "fit": fit}


CASES = {
    "sd15": [
        case("sd15 step bf16", "step", 1, 512, "bf16", 32, goal=7),
        case("sd15 step fp16", "step", 1, 512, "fp16", 32, goal=7),
        case("sd15 step fp16 checkpointing", "step", 1, 512, "fp16", 32, True, goal=7),
        case("sd15 step fp16 checkpointing, fit 1.7 GiB", "step", 1, 512, "fp16", 32, True, goal=7, fit="1.7GiB"),
        case("sd15 step batch 4", "step", 4, 512, "bf16", 32, goal=3),
        case("sd15 unet", "unet", 2, 512, goal=5),
        case("sd15 vae_decode", "vae_decode", 1, 512),
        case("sd15 vae_encode", "vae_encode", 1, 512),
    ],
    "sdxl": [
        case("sdxl step", "step", 1, 1024, "bf16", 32, goal=5),
        case("sdxl step checkpointing", "step", 1, 1024, "bf16", 32, True, goal=5),
        case("sdxl step checkpointing, fit 4.5 GiB", "step", 1, 1024, "bf16", 32, True, goal=5, fit="4.5GiB"),
        case("sdxl step batch 4 checkpointing", "step", 4, 1024, "bf16", 32, True),
        case("sdxl unet", "unet", 2, 1024),
        case("sdxl vae_decode", "vae_decode", 1, 1024),
    ],
    "sd3": [
        case("sd3 step", "step", 1, 1024, "bf16", 16, goal=2),
        case("sd3 step checkpointing", "step", 1, 1024, "bf16", 16, True, goal=2),
        case("sd3 step checkpointing, fit 3.4 GiB", "step", 1, 1024, "bf16", 16, True, goal=2, fit="3.42GiB"),
        case("sd3 unet", "unet", 2, 1024, goal=2),
    ],
    "sana": [
        case("sana step", "step", 1, 1024, "bf16", 16, goal=6),
        case("sana step, fit 4.65 GiB", "step", 1, 1024, "bf16", 16, goal=6, fit="4.65GiB"),
        case("sana step batch 4", "step", 4, 1024, "bf16", 16),
        case("sana unet", "unet", 2, 1024, goal=6),
    ],
    "flux-dev": [
        case("flux step 512 checkpointing", "step", 1, 512, "bf16", 16, True, goal=1.4),
        case("flux step 512 checkpointing, fit 14.6 GiB", "step", 1, 512, "bf16", 16, True, goal=1.4, fit="14.6GiB"),
        case("flux step 1024 checkpointing", "step", 1, 1024, "bf16", 16, True, goal=1.4),
        case("flux unet 512", "unet", 1, 512, goal=1.4),
        case("flux unet 1024", "unet", 1, 1024, goal=1.4),
    ],
    "sd35-medium": [
        case("sd35 step", "step", 1, 1024, "bf16", 16, goal=2),
        case("sd35 unet", "unet", 2, 1024, goal=2),
    ],
    "lumina2": [
        case("lumina step checkpointing", "step", 1, 1024, "bf16", 16, True),
        case("lumina unet", "unet", 2, 1024),
    ],
}


# ---- inputs: (config of the denoiser, pictures, pixels on a side, random values of a shape) -> {name: tensor} ----


def times(n):
    import torch
    return torch.tensor([(100 + 200 * i) % 1000 for i in range(n)], device=DEVICE)


def sd_inputs(config, n, size, random):
    return {"sample": random(n, 4, size // 8, size // 8), "timestep": times(n),
            "encoder_hidden_states": random(n, 77, config.cross_attention_dim)}


def sdxl_inputs(config, n, size, random):
    import torch
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    ids = torch.tensor([[size, size, 0, 0, size, size]] * n).to(DEVICE, random(1).dtype)
    return {**sd_inputs(config, n, size, random),
            "added_cond_kwargs": {"text_embeds": random(n, pooled), "time_ids": ids}}


def sd3_inputs(config, n, size, random):
    return {"hidden_states": random(n, config.in_channels, size // 8, size // 8), "timestep": times(n),
            "encoder_hidden_states": random(n, 77 + 256, config.joint_attention_dim),
            "pooled_projections": random(n, config.pooled_projection_dim)}


def flux_inputs(config, n, size, random):
    import torch
    side, words = size // 16, 512
    places = torch.zeros(side, side, 3, device=DEVICE)
    places[..., 1] = torch.arange(side, device=DEVICE)[:, None]
    places[..., 2] = torch.arange(side, device=DEVICE)[None]
    return {"hidden_states": random(n, side * side, config.in_channels), "timestep": times(n) / 1000,
            "encoder_hidden_states": random(n, words, config.joint_attention_dim),
            "pooled_projections": random(n, config.pooled_projection_dim),
            "guidance": torch.ones(n, device=DEVICE) if config.guidance_embeds else None,
            "img_ids": places.reshape(side * side, 3), "txt_ids": torch.zeros(words, 3, device=DEVICE)}


def sana_inputs(config, n, size, random):
    import torch
    return {"hidden_states": random(n, config.in_channels, size // 32, size // 32), "timestep": times(n),
            "encoder_hidden_states": random(n, 300, config.caption_channels),
            "encoder_attention_mask": torch.ones(n, 300, dtype=torch.int64, device=DEVICE)}


def lumina_inputs(config, n, size, random):
    import torch
    return {"hidden_states": random(n, config.in_channels, size // 8, size // 8), "timestep": times(n) / 1000,
            "encoder_hidden_states": random(n, 256, config.cap_feat_dim),
            "encoder_attention_mask": torch.ones(n, 256, dtype=torch.bool, device=DEVICE)}


INPUTS = {"sd15": sd_inputs, "sdxl": sdxl_inputs, "sd3": sd3_inputs, "sd35-medium": sd3_inputs,
          "flux-dev": flux_inputs, "sana": sana_inputs, "lumina2": lumina_inputs}
SMALL = ("sd15", "sdxl")  # made by make_sd15.py, the others by make_shapes.py

# PyTorch 2.11 ends with an illegal memory access in these models' steps, but for FlashAttention
STEPS_WITHOUT_CUDNN_ATTENTION = ("flux-dev",)


def folder_command(python, tools, folder, model):
    """What makes the model's folder for this program."""
    if model in SMALL:
        return [python, os.path.join(tools, "make_sd15.py"), folder, "--family", model, "--device", "cuda"]
    return [python, os.path.join(tools, "make_shapes.py"), folder, "--family", model]


def make(model, kind, dtype):
    """The denoiser or the autoencoder of diffusers on the card, with random values of the type."""
    import torch
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 12 billion values are not made in float32 first
    try:
        with torch.device(DEVICE):
            return maker(model, kind)().to(dtype).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def maker(model, kind):
    if model in SMALL:
        import make_sd15
        return make_sd15.make_vae if kind.startswith("vae") else make_sd15.FAMILIES[model]["unet"]
    import diffusers
    import make_shapes
    parts = make_shapes.FAMILIES[model][2]
    name, settings = parts["vae"] if kind.startswith("vae") else parts["transformer"]
    return lambda: getattr(diffusers, name)(**settings)
