"""Golden values of tiled decoding: tests/golden/tiles.safetensors, which tests/test_tiles.c reads.

The embedded model's autoencoder decodes a latent that is larger than a tile of 8 x 8, whole and in tiles.

usage: tiles.py [OUTPUT]
"""
import os
import sys

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

torch.manual_seed(31)
vae = AutoencoderKL.from_pretrained("models/emoji-sd/vae", torch_dtype=torch.float32)
z = torch.randn(1, vae.config.latent_channels, 14, 11)  # the last row of tiles is 2 latents high
with torch.no_grad():
    whole = vae.decode(z).sample
    vae.enable_tiling()
    vae.tile_latent_min_size = 8
    vae.tile_sample_min_size = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    tiled = vae.decode(z).sample
path = sys.argv[1] if len(sys.argv) > 1 else "tests/golden/tiles.safetensors"
save_file({"z": z, "tiled": tiled.contiguous(), "difference": (tiled - whole).abs().max()[None]}, path,
          {"made_by": "tools/golden/tiles.py"})
os.chmod(path, 0o644)
