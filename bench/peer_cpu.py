"""peer_cpu.py: one case on PyTorch (diffusers, PEFT), in a process of its own; compare_cpu.py starts it.

The argument is a JSON object: model, kind (step, unet, text, vae_encode, vae_decode), batch, size, rank,
checkpointing, threads, repeats, settings (a list of [precision, channels_last]). One setting is timed
repeats times after one run to warm up; of several, each is probed and the slow ones are left early.
Prints JSON: for each setting its times, and the seconds from BENCH_START (the parent's monotonic clock
when it started this process) to the end of the first run.

Precisions: f32; autocast (f32 weights, bf16 products); bf16 (bf16 weights, adapter in f32, autocast, as
the training scripts of diffusers do); pure (bf16 throughout, adapter too).
"""
import contextlib
import json
import os
import sys
import time

import torch

SLOW = 1.5  # a setting whose first run takes this many times the best is not probed further


def load(case):
    dtype = torch.float32 if case["settings"][0][0] in ("f32", "autocast") else torch.bfloat16
    kind = case["kind"]
    if kind == "text":
        from transformers import CLIPTextModel
        return CLIPTextModel.from_pretrained(case["model"], subfolder="text_encoder", dtype=dtype)
    if kind.startswith("vae"):
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(case["model"], subfolder="vae", torch_dtype=dtype)
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel.from_pretrained(case["model"], subfolder="unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    if kind == "step":
        from peft import LoraConfig
        unet.add_adapter(LoraConfig(r=case["rank"], lora_alpha=case["rank"], init_lora_weights="gaussian",
                                    target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        if case["checkpointing"]:
            unet.enable_gradient_checkpointing()
        unet.train()
    return unet


class Run:
    """Inputs of the case and one call of what is timed."""

    def __init__(self, case, model, precision, channels_last):
        self.case, self.model = case, model
        self.autocast = precision in ("autocast", "bf16")
        self.dtype = torch.float32 if precision in ("f32", "autocast") else torch.bfloat16
        form = torch.channels_last if channels_last else torch.contiguous_format
        model.to(dtype=self.dtype, memory_format=form)
        n, size, down = case["batch"], case["size"], 8
        torch.manual_seed(7)
        channels = 3 if case["kind"] == "vae_encode" else 4
        side = size if case["kind"] == "vae_encode" else size // down
        self.picture = torch.randn(n, channels, side, side).to(dtype=self.dtype, memory_format=form)
        self.noise = torch.randn(n, channels, side, side).to(memory_format=form)
        self.time = torch.tensor([(100 + 200 * i) % 1000 for i in range(n)])
        if case["kind"] in ("step", "unet"):
            self.states = torch.randn(n, 77, model.config.cross_attention_dim, dtype=self.dtype)
            self.more = self.size_and_crop(n, size) if model.config.addition_embed_type == "text_time" else {}
        if case["kind"] == "text":
            self.ids = torch.randint(0, model.config.vocab_size, (n, 77))
        if case["kind"] == "step":
            self.trained = [p for p in model.parameters() if p.requires_grad]
            if precision != "pure":
                for p in self.trained:
                    p.data = p.data.float()
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def size_and_crop(self, n, size):
        ids = torch.tensor([[size, size, 0, 0, size, size]] * n)
        return {"added_cond_kwargs": {"text_embeds": torch.randn(n, 1280, dtype=self.dtype),
                                      "time_ids": ids.to(self.dtype)}}

    def products(self):
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def step(self):
        with self.products():
            out = self.model(self.picture, self.time, self.states, return_dict=False, **self.more)[0]
        loss = torch.nn.functional.mse_loss(out.float(), self.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def evaluate(self):
        with torch.inference_mode(), self.products():
            kind, model = self.case["kind"], self.model
            if kind == "unet":
                return model(self.picture, self.time, self.states, return_dict=False, **self.more)[0]
            if kind == "text":
                return model(self.ids).last_hidden_state
            if kind == "vae_encode":
                return model.encode(self.picture).latent_dist.mode()
            return model.decode(self.picture, return_dict=False)[0]

    def timed(self):
        start = time.monotonic()
        self.step() if self.case["kind"] == "step" else self.evaluate()
        return time.monotonic() - start


def main():
    started = float(os.environ.get("BENCH_START", time.monotonic()))
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    model = load(case)
    best, results, first = float("inf"), [], None
    for precision, channels_last in case["settings"]:
        run = Run(case, model, precision, channels_last)
        warm_up = run.timed()
        first = first or time.monotonic() - started
        slow = warm_up > SLOW * best + 0.2
        times = [warm_up] if slow else [run.timed() for _ in range(case["repeats"])]
        best = min(best, *times)
        results.append({"setting": [precision, channels_last], "times": times})
    print(json.dumps({"first": first, "results": results}))


if __name__ == "__main__":
    main()
