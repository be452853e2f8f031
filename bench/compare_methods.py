"""compare_methods.py: a training step by method, here and in PyTorch, on one machine, in turn.

    python bench/compare_methods.py [--model models/emoji-sd] [--batch 4] [--size 256] [--repeats 5]
                                    [--methods adapter,adapter+text,textual_inversion,full]

Each step is forward, backward, clipping and AdamW. PyTorch runs under autocast to bfloat16 with float32
weights that are trained, which is how the example scripts of diffusers run; adapters are PEFT's (rank 16,
attention; of the text encoder too with "+text"); for textual inversion the table of embeddings has a
gradient and all rows but the new one are put back, as in textual_inversion.py. Prints medians in
milliseconds, what a method costs beside an adapter on the denoiser, and the ratio of the two programs.
Needs torch, diffusers, transformers and peft from PyPI beside the built program.
"""
import argparse
import re
import statistics
import subprocess
import time

PROGRAM = "build/release/velatura"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def ours(args, method):
    name, _, text = method.partition("+")
    words = [PROGRAM, "bench", "step", "--model", args.model, "--method", name, "--rank", "16", "--batch",
             str(args.batch), "--width", str(args.size), "--height", str(args.size), "--repeats",
             str(args.repeats)] + (["--train_text_encoder"] if text else [])
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"step: median ([\d.]+) ms", said).group(1))


def peers(args, method):
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    name, _, with_text = method.partition("+")
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder", dtype=torch.float32)
    text.requires_grad_(False)
    if name != "full":
        unet.requires_grad_(False)
    if name == "adapter":
        unet = get_peft_model(unet, LoraConfig(r=16, lora_alpha=16,
                                               target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if with_text:
        text = get_peft_model(text, LoraConfig(r=16, lora_alpha=16, target_modules=TEXT_TARGETS))
    table = text.get_input_embeddings().weight
    if name == "textual_inversion":
        table.requires_grad_(True)
        before, keep = table.data.clone(), torch.ones(table.shape[0], dtype=torch.bool)
        keep[5] = False
    unet.train()
    trained = [p for m in (unet, text) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    side = args.size // 8
    latent, noise = torch.randn(2, args.batch, 4, side, side)
    ids = torch.randint(6, 400, (args.batch, 77))
    ids[:, 3] = 5
    when = torch.randint(0, 1000, (args.batch,))
    in_step = name == "textual_inversion" or with_text
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = text(ids).last_hidden_state

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            context = text(ids).last_hidden_state if in_step else states
            out = unet(latent, when, context).sample
        torch.nn.functional.mse_loss(out.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if name == "textual_inversion":
            with torch.no_grad():
                table[keep] = before[keep]

    times = []
    for _ in range(args.repeats + 1):
        start = time.monotonic()
        step()
        times.append(1e3 * (time.monotonic() - start))
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/emoji-sd")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", default="adapter,adapter+text,textual_inversion,full")
    args = parser.parse_args()
    first = None
    print(f"{'method':20} {'velatura':>9} {'PyTorch':>9} {'ratio':>6}   beside an adapter: ours, theirs")
    for method in args.methods.split(","):
        a, b = ours(args, method), peers(args, method)
        first = first or (a, b)
        print(f"{method:20} {a:9.1f} {b:9.1f} {b / a:6.2f}   {a / first[0]:.2f}, {b / first[1]:.2f}",
              flush=True)


if __name__ == "__main__":
    main()
