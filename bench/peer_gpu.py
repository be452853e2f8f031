"""peer_gpu.py: cases on PyTorch (diffusers, PEFT) on a GPU, in a process of its own; compare_gpu.py starts it.

The argument is a JSON object: model (of gpu_families.py), cases (a list of name, kind, batch, size, rank,
precision, checkpointing), mode (eager, compile or blocks), repeats; or --versions, which prints them and ends.
Lines of JSON are printed. The first has the seconds from BENCH_START (the parent's monotonic clock when it
started this process) to when imports are done and the card is open. Then each case has one: the times of
`repeats` runs after some to warm up, the seconds to make the model and run it once, the most memory that
PyTorch's allocator gave out, and the memory of the card in use when the case ends, the context included (all
that the allocator ever held for it; nothing else may run on the card).

The models have the true shapes and random values, made on the GPU. fp16 and bf16 are done as the training
scripts of diffusers do them: frozen weights in that type, the adapter in float32 under autocast, fp16 with
a gradient scaler; evaluations are in that type throughout. compile is torch.compile of the U-Net (or of
the autoencoder's part), with its default settings; blocks compiles the transformer blocks alone, one for all of
a kind: diffusers' compile_repeated_blocks where the model names them.

With a folder as gate the process waits after a case's first run until it has its turn (peer_gate.py): cases
that take minutes to compile do so side by side and are timed one by one.
"""
import contextlib
import json
import os
import sys
import time

import torch

import gpu_families
import peer_gate

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compile_blocks(model):
    """Each transformer block by itself, as diffusers does it where a model names its blocks."""
    if model._repeated_blocks:
        model.compile_repeated_blocks()
        return
    for part in model.modules():
        if isinstance(part, torch.nn.ModuleList) and type(part[0]).__name__ in (model._no_split_modules or ()):
            for block in part:
                block.compile()


class Run:
    """One case: its model, inputs and one call of what is timed."""

    def __init__(self, model, case, mode):
        self.case, self.dtype = case, TYPES[case["precision"]]
        self.is_step = case["kind"] == "step"
        torch.backends.cuda.enable_cudnn_sdp(
            not (self.is_step and model in gpu_families.STEPS_WITHOUT_CUDNN_ATTENTION))
        self.model = gpu_families.make(model, case["kind"], self.dtype)
        if self.is_step:
            self.adapt()
        torch.manual_seed(7)
        if case["kind"].startswith("vae"):
            self.call, self.inputs = self.autoencoder()
        else:
            self.call, self.inputs = self.model, self.denoiser_inputs(model)
        if self.is_step:
            self.noise = torch.randn_like(next(iter(self.inputs.values())), dtype=torch.float32)
        if mode == "compile":
            self.call = torch.compile(self.call)
        if mode == "blocks":
            compile_blocks(self.model)

    def autoencoder(self):
        """The half of it that is timed, and its input."""
        batch, size = self.case["batch"], self.case["size"]
        if self.case["kind"] == "vae_encode":
            return (lambda picture: (self.model.encode(picture).latent_dist.mode(),),
                    {"picture": self.random(batch, 3, size, size)})
        return (lambda picture: self.model.decode(picture, return_dict=False),
                {"picture": self.random(batch, 4, size // 8, size // 8)})

    def denoiser_inputs(self, model):
        inputs = gpu_families.INPUTS[model](self.model.config, self.case["batch"], self.case["size"], self.random)
        return {**inputs, "return_dict": False}

    def random(self, *shape):
        return torch.randn(*shape, device="cuda").to(self.dtype)

    def adapt(self):
        from peft import LoraConfig
        self.model.add_adapter(LoraConfig(r=self.case["rank"], lora_alpha=self.case["rank"],
                                          init_lora_weights="gaussian", target_modules=list(gpu_families.ATTENTION)))
        if self.case["checkpointing"]:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)

    def step(self):
        autocast = torch.autocast("cuda", self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()
        with autocast:
            out = self.call(**self.inputs)[0]
        loss = torch.nn.functional.mse_loss(out.float(), self.noise)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def evaluate(self):
        with torch.inference_mode():
            return self.call(**self.inputs)[0]

    def timed(self):
        torch.cuda.synchronize()
        start = time.monotonic()
        self.step() if self.is_step else self.evaluate()
        torch.cuda.synchronize()
        return time.monotonic() - start


def measure(spec, case):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    run = Run(spec["model"], case, spec["mode"])
    run.timed()
    first = time.monotonic() - start
    if spec.get("gate"):
        torch.cuda.empty_cache()
        peer_gate.wait(spec["gate"], peer_gate.name(case, spec["mode"]))
    for _ in range(3):
        run.timed()
    times = [run.timed() for _ in range(spec["repeats"])]
    free, total = torch.cuda.mem_get_info()  # what the allocator holds stays held: this is the peak
    return {"times": times, "first": first, "allocated": torch.cuda.max_memory_allocated(), "used": total - free}


def say(**line):
    print(json.dumps(line), flush=True)


def run_cases(spec):
    started = float(os.environ.get("BENCH_START", time.monotonic()))
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401 (only the first case would import them)
    from peft import LoraConfig  # noqa: F401
    torch.zeros(1, device="cuda")
    say(ready=time.monotonic() - started, gpu=torch.cuda.get_device_name())
    for case in spec["cases"]:
        try:
            say(case=case["name"], mode=spec["mode"], **measure(spec, case))
        except Exception as error:  # the others are still of use
            say(case=case["name"], mode=spec["mode"], failed=repr(error)[:400])


def versions():
    import diffusers
    import peft
    import transformers
    return (f"torch {torch.__version__} diffusers {diffusers.__version__} peft {peft.__version__} "
            f"transformers {transformers.__version__} cuDNN {torch.backends.cudnn.version()}")


if __name__ == "__main__":
    if sys.argv[1] == "--versions":
        print(versions())
    else:
        run_cases(json.loads(sys.argv[1]))
