"""Makes tests/golden/models.safetensors: tiny U-Nets and autoencoders of diffusers, each with another
mix of the switches that their configs have, random weights (exact in float16), and what they compute.

    python tools/golden/models.py

tests/golden/sdxl.safetensors holds SDXL's U-Net in the same way (its added conditions: pooled text, sizes).

Keys are CASE.weights.NAME, CASE.in.NAME and CASE.out.NAME (images as NHWC); metadata maps each case to
its class and config. Needs torch, diffusers and safetensors.
"""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

UNET = dict(
    sample_size=8, block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2,
    cross_attention_dim=12, attention_head_dim=2,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)
UNETS = {
    "plain": ({}, (8, 6)),
    "odd_sizes": (dict(block_out_channels=[4, 4, 8],
                       down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                       up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]), (7, 5)),
    "lists": (dict(use_linear_projection=True, attention_head_dim=[2, 4], layers_per_block=[2, 1],
                   transformer_layers_per_block=[2, 1], only_cross_attention=[True, False],
                   down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                   up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]), (4, 8)),
    "time_and_kernels": (dict(flip_sin_to_cos=False, freq_shift=1, time_embedding_dim=20, norm_eps=1e-3,
                              conv_in_kernel=5, conv_out_kernel=1, mid_block_scale_factor=1.5), (6, 6)),
    "no_middle": (dict(mid_block_type=None, downsample_padding=0), (8, 4)),
    "plain_middle": (dict(mid_block_type="UNetMidBlock2D", upcast_attention=True), (4, 4)),
}
SDXL = dict(
    UNET, addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=43,
    use_linear_projection=True, attention_head_dim=[1, 2], transformer_layers_per_block=[1, 3],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
)
VAE = dict(
    block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, sample_size=16,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
)
VAES = {
    "vae": {},
    "vae_bare": dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
                     layers_per_block=2),
}


def nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


def random_weights(model):
    """No weight keeps a value that would hide a mistake, such as a bias of zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else 0.7 / p[0].numel() ** 0.5))
            if p.ndim == 1:
                p.add_(0.5)
            p.copy_(p.half())
    return model.eval()


def make_sdxl(keep):
    torch.manual_seed(2)
    model = random_weights(UNet2DConditionModel(**SDXL))
    x, t, context = torch.randn(2, 4, 6, 8), torch.tensor([17.0, 950.0]), torch.randn(2, 5, 12)
    pooled = torch.randn(2, 7)
    sizes = torch.tensor([[64.0, 48.0, 0.0, 3.0, 64.0, 48.0], [100.0, 80.0, 9.0, 0.0, 48.0, 64.0]])
    with torch.no_grad():
        out = model(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    keep("sdxl", model, dict(latent=nhwc(x), time=t, context=context, pooled=pooled, extra=sizes),
         dict(out=nhwc(out)))


def main():
    torch.manual_seed(1)
    tensors, configs = {}, {}

    def keep(case, model, inputs, outputs):
        configs[case] = json.dumps(dict(model.config, _class_name=type(model).__name__))
        for kind, values in (("weights", model.state_dict()), ("in", inputs), ("out", outputs)):
            for name, value in values.items():
                value = value.detach().contiguous()
                tensors[f"{case}.{kind}.{name}"] = value.half() if kind == "weights" else value

    for case, (changes, (height, width)) in UNETS.items():
        model = random_weights(UNet2DConditionModel(**{**UNET, **changes}))
        x, t, context = torch.randn(2, 4, height, width), torch.tensor([801.0, 3.0]), torch.randn(2, 5, 12)
        with torch.no_grad():
            out = model(x, t, context).sample
        keep(case, model, dict(latent=nhwc(x), time=t, context=context), dict(out=nhwc(out)))
    for case, changes in VAES.items():
        model = random_weights(AutoencoderKL(**{**VAE, **changes}))
        z, image = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 8, 6)
        with torch.no_grad():
            decoded, moments = model.decode(z).sample, model.encode(image).latent_dist.parameters
        keep(case, model, dict(z=nhwc(z), image=nhwc(image)), dict(decoded=nhwc(decoded), moments=nhwc(moments)))
    save_file(tensors, "tests/golden/models.safetensors", metadata=configs)
    tensors.clear()
    configs.clear()
    make_sdxl(keep)
    save_file(tensors, "tests/golden/sdxl.safetensors", metadata=configs)


main()
