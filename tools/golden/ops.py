"""Golden values of the ops: tests/golden/ops.safetensors, which tests/test_ops_golden.c reads.

Every case runs PyTorch's or diffusers' own function in float64 (the truth) on random inputs that are
float32 values. Keys: CASE/in0 ... the inputs in the order of src/graph/ops.def, CASE/out0 ... the outputs,
CASE/seed the weights of output 0 in the sum whose gradients are CASE/grad0 ... Images are NHWC here as
in the graph. What a case's settings are stands here and in the test's table.

CASE/bf16 and CASE/f16 are PyTorch's own errors in these types: inputs and seed are rounded to the type, the
truth is computed from them in float64, and the same function runs in the type on the CPU; the relative
root-mean-square error of output 0 comes first, then those of the gradients, in the order of their inputs.

usage: ops.py [OUTPUT]
"""
import math
import os
import sys

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_timestep_embedding
from safetensors.torch import save_file
from transformers.activations import QuickGELUActivation
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

torch.manual_seed(20)
tensors = {}


def values(*shape):
    return torch.randn(*shape, dtype=torch.float32).double()


def case(name, function, inputs, wanted, by_products=None):
    """wanted: the inputs that get gradients; by_products(*inputs): further outputs, without gradient."""
    inputs = [x.float().double() if x is not None and x.is_floating_point() else x for x in inputs]
    leaves = [x.clone().requires_grad_(i in wanted) if x is not None else None for i, x in enumerate(inputs)]
    out = function(*leaves)
    for i, x in enumerate(inputs):
        if x is not None:
            tensors[f"{name}/in{i}"] = x.float() if x.is_floating_point() else x.int()
    tensors[f"{name}/out0"] = out.detach()
    for i, x in enumerate(by_products(*inputs) if by_products else []):
        tensors[f"{name}/out{i + 1}"] = x
    seed = values(*out.shape) if wanted else None
    with torch.random.fork_rng():  # functions that make a module draw its weights
        own_errors(name, function, inputs, wanted, seed)
    if wanted:
        tensors[f"{name}/seed"] = seed.float()
        grads = torch.autograd.grad((out * seed).sum(), [leaves[i] for i in wanted])
        tensors.update({f"{name}/grad{i}": grad for i, grad in zip(wanted, grads)})


def results(function, inputs, wanted, seed):
    """Output 0 and its gradients, as float64."""
    leaves = [x.clone().requires_grad_(i in wanted) if x is not None else None for i, x in enumerate(inputs)]
    out = function(*leaves)
    grads = torch.autograd.grad((out * seed.to(out.dtype)).sum(), [leaves[i] for i in wanted]) if wanted else []
    return [x.detach().double() for x in (out, *grads)]


def own_errors(name, function, inputs, wanted, seed):
    for key, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        rounded = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
        exact = [x.double() if x is not None and x.is_floating_point() else x for x in rounded]
        seed_rounded = seed.to(dtype) if seed is not None else None
        truth = results(function, exact, wanted, seed_rounded.double() if wanted else None)
        got = results(function, rounded, wanted, seed_rounded)
        tensors[f"{name}/{key}"] = torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, truth)])


def nhwc(x):
    return x.movedim(1, -1)


def nchw(x):
    return x.movedim(-1, 1)


def norm_stats(x, axes, eps):
    scale = (x.var(axes, unbiased=False) + eps).rsqrt()
    return torch.stack([x.mean(axes), scale], -1)


def rms_stats(x, eps):
    return (x.flatten(0, -2).square().mean(-1) + eps).rsqrt()


def group_norm(groups, eps, act):
    return lambda x, w, b: nhwc(act(F.group_norm(nchw(x), groups, w, b, eps)))


def group_stats(groups, eps):
    return lambda x, w, b: [norm_stats(nchw(x).reshape(len(x), groups, -1), -1, eps)]


def heads_apart(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attention(heads, causal):
    def run(q, k, v, mask):
        q, k, v = (heads_apart(x, heads) for x in (q, k, v))
        mask = mask[:, None, None, :] if mask is not None else None
        if mask is not None and causal:
            mask = mask + torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1)
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)

    def log_sums(q, k, v, mask):
        scores = heads_apart(q, heads) @ heads_apart(k, heads).mT / math.sqrt(q.shape[2] / heads)
        if mask is not None:
            scores = scores + mask[:, None, None, :]
        if causal:
            scores = scores + torch.full(scores.shape[2:], -math.inf, dtype=q.dtype).triu(1)
        return [scores.logsumexp(-1)]

    return run, log_sums


def linear_attention(heads):  # as diffusers' SanaLinearAttnProcessor2_0: sums in float32 or more
    def run(q, k, v):
        narrow, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, k, v = F.relu(heads_apart(q, heads)), F.relu(heads_apart(k, heads)), heads_apart(v, heads)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        out = q @ (k.transpose(2, 3) @ v) / (q @ k.sum(2, keepdim=True).transpose(2, 3) + 1e-15)
        return out.transpose(1, 2).flatten(2).to(narrow)
    return run


def geglu(x):
    module = GEGLU(x.shape[-1] // 2, x.shape[-1] // 2).to(x.dtype)
    module.proj = torch.nn.Identity()
    return module(x)


def conv2d(stride, pad):  # pad: top, bottom, left, right
    def run(x, w, b):
        return nhwc(F.conv2d(F.pad(nchw(x), (pad[2], pad[3], pad[0], pad[1])), w, b, stride))
    return run


def mse(pred, target, weight):
    own = F.mse_loss(pred, target, reduction="none").mean(tuple(range(1, pred.dim())))
    return (own * weight).mean()[None]


def own_mse(pred, target, weight):
    return [F.mse_loss(pred, target, reduction="none").flatten(1).mean(1)]


def timesteps(name, t, *settings):  # diffusers computes these in float32
    tensors[f"{name}/in0"] = t.clone()
    tensors[f"{name}/out0"] = get_timestep_embedding(t, *settings)


def rope_neighbours(heads):
    def run(x, table):
        """As FLUX and Lumina turn them; the table says each angle once, diffusers twice."""
        cos, sin = (part.repeat_interleave(2, -1) for part in table[0].chunk(2, -1))
        return apply_rotary_emb(x.unflatten(-1, (heads, -1)), (cos, sin), sequence_dim=1).flatten(2)
    return run


def rope_halves(heads):
    def run(x, table):
        cos, sin = (torch.cat([part, part], -1) for part in table.chunk(2, -1))
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return apply_rotary_pos_emb(x, x, cos, sin)[0].transpose(1, 2).flatten(2)
    return run


def rope_table(places, width):
    cos, sin = get_1d_rotary_pos_embed(width, places, use_real=True, repeat_interleave_real=True,
                                       freqs_dtype=torch.float64)
    return torch.cat([cos[:, ::2], sin[:, ::2]], -1).double()


def main():
    identity = torch.nn.Identity()
    acts = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "quick_gelu": QuickGELUActivation(), "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": F.relu}
    for name, act in acts.items():
        case(name, act, [3 * values(5, 7)], [0])
    case("group_norm_silu", group_norm(4, 1e-5, F.silu), [values(2, 5, 3, 12), values(12), values(12)],
         [0, 1, 2], group_stats(4, 1e-5))
    case("group_norm", group_norm(3, 1e-6, identity), [2 * values(2, 7, 6) + 1, values(6), values(6)],
         [0, 1, 2], group_stats(3, 1e-6))
    case("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
         [values(2, 5, 12) - 2, values(12), values(12)], [0, 1, 2],
         lambda x, w, b: [norm_stats(x.flatten(0, 1), -1, 1e-5)])
    case("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [values(2, 5, 12) - 1, values(12)], [0, 1],
         lambda x, w: [rms_stats(x, 1e-6)])
    case("rms_norm_one_plus", lambda x, w: F.rms_norm(x, w.shape, 1 + w, 1e-5), [3 * values(3, 7), values(7)],
         [0, 1], lambda x, w: [rms_stats(x, 1e-5)])
    case("rms_norm_plain", lambda x, w: F.rms_norm(x, x.shape[-1:], None, 1e-6), [values(2, 3, 10), None], [0],
         lambda x, w: [rms_stats(x, 1e-6)])
    case("softmax", lambda x: F.softmax(x, -1), [4 * values(3, 2, 9)], [0])
    mask = torch.tensor([[0, 0, -math.inf, 1.5, 0, -0.25, -10000], [0, -math.inf, -1, 0, 0, 0, 0.5]]).double()
    for name, heads, causal, inputs in [
            ("attention", 2, False, [values(2, 5, 6), values(2, 7, 6), values(2, 7, 6), None]),
            ("attention_causal", 2, True, [values(2, 9, 10), values(2, 9, 10), values(2, 9, 10), None]),
            ("attention_masked", 3, False, [values(2, 4, 12), values(2, 7, 12), values(2, 7, 12), mask]),
            ("attention_causal_masked", 1, True, [values(2, 7, 4), values(2, 7, 4), values(2, 7, 4), mask])]:
        run, log_sums = attention(heads, causal)
        case(name, run, inputs, [0, 1, 2], log_sums)
    case("geglu", geglu, [2 * values(2, 3, 10)], [0])
    case("linear", lambda x, w, b: F.linear(x, w, b), [values(2, 3, 5), values(4, 5), values(4)], [0, 1, 2])
    case("linear_gelu_residual", lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
         [values(2, 3, 5), values(4, 5), values(4), values(2, 3, 4)], [0, 1, 2, 3])
    weight = [values(4, 3, 3, 3), values(4)]
    case("conv2d", conv2d(1, (1, 1, 1, 1)), [values(2, 5, 7, 3), *weight], [0, 1, 2])
    case("conv2d_stride", conv2d(2, (1, 1, 1, 1)), [values(1, 5, 6, 3), *weight], [0, 1, 2])
    case("conv2d_down", conv2d(2, (0, 1, 0, 1)), [values(1, 6, 4, 3), *weight], [0, 1, 2])
    case("conv2d_point", conv2d(1, (0, 0, 0, 0)), [values(1, 3, 5, 6), values(4, 6, 1, 1), values(4)], [0, 1, 2])
    case("conv2d_uneven", conv2d(1, (2, 0, 0, 1)), [values(1, 4, 5, 2), values(3, 2, 3, 2), values(3)], [0, 1, 2])
    for factor in (2, 3):
        case(f"upsample_{factor}", lambda x: nhwc(F.interpolate(nchw(x), scale_factor=factor, mode="nearest")),
             [values(2, 3, 5, 2)], [0])
    case("mse", mse, [values(3, 4, 5, 2), values(3, 4, 5, 2), values(3).abs()], [0, 1, 2], own_mse)
    ids = torch.tensor([[3, 0, 3], [7, 1, 10]])
    case("embed", lambda table, i: F.embedding(i, table), [values(11, 5), ids], [0])
    t = torch.tensor([0.0, 1, 501, 999])
    timesteps("time_embed", t, 32, True, 0)  # as the U-Nets have it
    timesteps("time_embed_default", t, 10)
    table = rope_table(torch.tensor([0.0, 1, 2, 40, 300]), 6)
    case("rope_neighbours", rope_neighbours(2), [values(2, 5, 12), table[None]], [0])
    tables = torch.stack([table, rope_table(torch.arange(5.0), 6)])
    case("rope_halves", rope_halves(2), [values(2, 5, 12), tables], [0])
    def depthwise(x, w, b=None):
        pad = (w.shape[2] // 2, w.shape[3] // 2)
        return nhwc(F.conv2d(nchw(x), w, b, padding=pad, groups=x.shape[-1]))
    case("depthwise", depthwise, [values(2, 4, 5, 3), values(3, 1, 3, 3), values(3)], [0, 1, 2])
    case("depthwise_wide", depthwise, [values(1, 3, 6, 4), values(4, 1, 5, 3)], [0, 1])
    case("linear_geglu", lambda x, w, b: geglu(F.linear(x, w, b)), [values(3, 7, 24), values(32, 24), values(32)], [])
    def modulated(x, w, scale, shift):  # AdaLayerNormZero's, with the weight that Sana's and FLUX's leave out
        y = F.layer_norm(x, x.shape[-1:], w, None, 1e-6) * (1 + scale[:, None])
        return y + shift[:, None]
    case("modulated_norm", modulated, [values(2, 5, 12) - 1, None, values(2, 12), values(2, 12)], [0, 2, 3],
         lambda x, w, scale, shift: [norm_stats(x.flatten(0, 1), -1, 1e-6)])
    case("modulated_norm_weighed", modulated, [values(3, 4, 16), values(16), values(3, 16), values(3, 16)],
         [0, 1, 2, 3], lambda x, w, scale, shift: [norm_stats(x.flatten(0, 1), -1, 1e-6)])
    case("modulated_rms_norm", lambda x, w, scale: F.rms_norm(x, w.shape, w, 1e-5) * (1 + scale[:, None]),
         [2 * values(2, 5, 12), values(12), values(2, 12)], [0, 1, 2],
         lambda x, w, scale: [torch.stack([0 * x[..., 0].flatten(), rms_stats(x, 1e-5)], -1)])
    case("gated_add", lambda x, gate, y: x + gate[:, None] * y, [values(2, 5, 12), values(2, 12), values(2, 5, 12)],
         [0, 1, 2])
    def depthwise_glu(x, w, b):
        value, gate = depthwise(F.silu(x), w, b).chunk(2, dim=-1)
        return value * F.silu(gate)
    case("depthwise_glu", depthwise_glu, [values(2, 4, 6, 8), values(8, 1, 3, 3), values(8)], [0, 1, 2])
    case("linear_attention", linear_attention(2), [values(2, 5, 16), values(2, 7, 16), values(2, 7, 16)], [0, 1, 2])
    def head_norm(heads):
        def run(x, w, table):
            y = F.rms_norm(x.unflatten(-1, (heads, -1)), w.shape, w, 1e-6).flatten(2)
            return y if table is None else rope_neighbours(heads)(y, table)
        return run, lambda x, w, table: [rms_stats(x.unflatten(-1, (heads, -1)), 1e-6)]
    case("head_norm", head_norm(2)[0], [values(2, 5, 16), values(8), None], [0, 1], head_norm(2)[1])
    table = rope_table(torch.tensor([0.0, 1, 2, 40, 300]), 8)
    case("head_norm_rope", head_norm(3)[0], [values(2, 5, 24), values(8), table[None]], [0, 1], head_norm(3)[1])
    path = sys.argv[1] if len(sys.argv) > 1 else "tests/golden/ops.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path,
              {"made_by": "tools/golden/ops.py", "torch": torch.__version__})
    os.chmod(path, 0o644)


main()
