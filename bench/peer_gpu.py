"""peer_gpu.py: cases on PyTorch (diffusers, PEFT) on a GPU, in a process of its own; compare_gpu.py starts it.

The argument is a JSON object: model (of gpu_families.py), cases (a list of name, kind, batch, size, rank,
precision, checkpointing), modes (of eager, compile, blocks), repeats. Every case is run in every mode, eager
first, and one line of JSON is printed for each: the times of `repeats` runs after some to warm up, the
seconds from BENCH_START (the parent's monotonic clock when it started this process) to the end of the
case's first run, the most memory that PyTorch's allocator gave out, and the memory of the card in use
when the case ends, the context included (all that the allocator ever held for it; nothing else may run
on the card).

The models have the true shapes and random values, made on the GPU. fp16 and bf16 are done as the training
scripts of diffusers do them: frozen weights in that type, the adapter in float32 under autocast, fp16 with
a gradient scaler; evaluations are in that type throughout. compile is torch.compile of the U-Net (or of
the autoencoder's part), with its default settings; blocks compiles the transformer blocks alone, one for all of
a kind: diffusers' compile_repeated_blocks where the model names them.

--serve instead of the object: imports are done once, without touching the card, and printed with the versions;
then each line of input is such an object, for a process of its own that has the imports already (a fork), and
{"ended": its exit status} is printed behind its lines.

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
        self.is_step, kind = case["kind"] == "step", case["kind"]
        torch.backends.cuda.enable_cudnn_sdp(
            not (self.is_step and model in gpu_families.STEPS_WITHOUT_CUDNN_ATTENTION))
        self.model = gpu_families.make(model, kind, self.dtype)
        if self.is_step:
            self.adapt()
        torch.manual_seed(7)
        if kind.startswith("vae"):
            side, channels = (case["size"], 3) if kind == "vae_encode" else (case["size"] // 8, 4)
            self.inputs = {"picture": self.random(case["batch"], channels, side, side)}
        else:
            self.inputs = gpu_families.INPUTS[model](self.model.config, case["batch"], case["size"], self.random)
            self.noise = torch.randn_like(next(iter(self.inputs.values())), dtype=torch.float32)
            self.inputs["return_dict"] = False
        self.call = self.pick()
        if mode == "compile":
            self.call = torch.compile(self.call)
        if mode == "blocks":
            compile_blocks(self.model)

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

    def pick(self):
        if self.case["kind"] == "vae_encode":
            return lambda picture: (self.model.encode(picture).latent_dist.mode(),)
        if self.case["kind"] == "vae_decode":
            return lambda picture: self.model.decode(picture, return_dict=False)
        return self.model

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


def measure(model, case, mode, spec):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = time.monotonic()
    run = Run(model, case, mode)
    run.timed()
    first = time.monotonic()
    if spec.get("gate"):
        torch.cuda.empty_cache()
        peer_gate.wait(spec["gate"], peer_gate.name(case, mode))
    for _ in range(3):
        run.timed()
    times = [run.timed() for _ in range(spec["repeats"])]
    free, total = torch.cuda.mem_get_info()  # what the allocator holds stays held: this is the peak
    return {"case": case["name"], "mode": mode, "times": times, "first": first - before,
            "allocated": torch.cuda.max_memory_allocated(), "used": total - free}


def run(spec, started):
    """Every case in every mode, a line for each."""
    torch.zeros(1, device="cuda")
    print(json.dumps({"ready": time.monotonic() - started, "gpu": torch.cuda.get_device_name()}), flush=True)
    for mode in spec["modes"]:
        for case in spec["cases"]:
            try:
                print(json.dumps(measure(spec["model"], case, mode, spec)), flush=True)
            except Exception as error:  # the others are still of use
                print(json.dumps({"case": case["name"], "mode": mode, "failed": repr(error)[:400]}), flush=True)
            if mode != "eager":
                torch._dynamo.reset()


def versions():
    import diffusers
    import peft
    import transformers
    return (f"torch {torch.__version__} diffusers {diffusers.__version__} peft {peft.__version__} "
            f"transformers {transformers.__version__} cuDNN {torch.backends.cudnn.version()}")


def serve(started):
    """A process for each line. It counts as started when the imports would have begun."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401 (imports are lazy)
    from peft import LoraConfig  # noqa: F401
    about = versions()
    imports = time.monotonic() - started
    print(json.dumps({"imports": imports, "versions": about}), flush=True)
    for line in sys.stdin:
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(json.loads(line), begun - imports)
                status = 0
            except BaseException as error:
                print(repr(error)[:400], file=sys.stderr)
            sys.stdout.flush()
            os._exit(status)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


def main():
    started = float(os.environ.get("BENCH_START", time.monotonic()))
    if sys.argv[1] == "--serve":
        serve(started)
    else:
        run(json.loads(sys.argv[1]), started)


if __name__ == "__main__":
    main()
