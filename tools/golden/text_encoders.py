"""Makes tests/golden/text_encoders.safetensors: tiny T5 1.1 and Gemma-2 models of transformers with random
weights (exact in float16), and what they compute, in float64 throughout: the places where transformers goes to
float32 by itself (Gemma-2's softmax, norms and angles) are kept from it, since their rounding alone would
make gradients differ by 2e-5.

    python tools/golden/text_encoders.py

Keys are CASE.weights.NAME, CASE.in.ids, CASE.in.mask, CASE.out.last (through the final norm), CASE.out.inner
(hidden_states[-2]), and CASE.grad.NAME of sum(last * CASE.in.seed) for some weights; metadata maps each case
to its config. Needs torch, transformers and safetensors.
"""

import json

import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

T5 = dict(d_model=8, d_kv=3, d_ff=12, num_layers=2, num_heads=2, vocab_size=40, feed_forward_proj="gated-gelu",
          dropout_rate=0.0, architectures=["T5EncoderModel"], attn_implementation="eager")
GEMMA = dict(hidden_size=12, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
             intermediate_size=16, vocab_size=40, attn_logit_softcapping=2.0, query_pre_attn_scalar=5,
             sliding_window=4, max_position_embeddings=64, attention_dropout=0.0,
             architectures=["Gemma2Model"], attn_implementation="eager")
CASES = {  # class, changes of the config, tokens, real tokens of the second text (None: no mask)
    "t5": (T5, {}, 19, None),
    "t5_far": (T5, dict(num_layers=1), 200, None),
    "t5_masked": (T5, dict(relative_attention_num_buckets=10, relative_attention_max_distance=9), 14, 5),
    "gemma": (GEMMA, {}, 11, None),
    "gemma_masked": (GEMMA, dict(attn_logit_softcapping=None, rms_norm_eps=1e-3), 15, 6),
    "gemma_layers": (GEMMA, dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"],
                                 rope_parameters=dict(rope_type="default", rope_theta=100.0),
                                 num_key_value_heads=1, hidden_activation="silu"), 9, 8),
}
WITH_GRADIENT = ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                 "encoder.block.0.layer.0.SelfAttention.k.weight", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
                 "encoder.block.0.layer.1.layer_norm.weight", "shared.weight", "embed_tokens.weight",
                 "layers.0.self_attn.k_proj.weight", "layers.1.self_attn.q_proj.weight",
                 "layers.0.input_layernorm.weight", "layers.2.mlp.gate_proj.weight"]


def random_weights(model):
    """No weight keeps a value that would hide a mistake, such as a gain of one."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else 1.2 / p.shape[-1] ** 0.5))
            p.copy_(p.half())
    return model.eval()


def stay_in_float64():
    plain = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda x, dim, dtype=None: plain(x, dim=dim)
    torch.Tensor.float = torch.Tensor.double


def single(x):
    return x.detach().to(torch.float32)


def main():
    stay_in_float64()
    torch.manual_seed(3)
    tensors, configs = {}, {}
    for case, (settings, changes, length, real) in CASES.items():
        t5 = settings is T5
        model = random_weights(T5EncoderModel(T5Config(**{**settings, **changes})) if t5 else
                               Gemma2Model(Gemma2Config(**{**settings, **changes})))
        configs[case] = json.dumps(model.config.to_dict())
        model = model.double()
        n = 1 if length > 100 else 2
        ids = torch.randint(40, (n, length))
        mask = torch.ones(n, length)
        if real is not None:
            mask[1, real:] = 0
        states = model(input_ids=ids, attention_mask=None if real is None else mask.long(),
                       output_hidden_states=True)
        last, inner = states.last_hidden_state, states.hidden_states[-2]
        seed = torch.randn(last.shape)
        wanted = {k: p for k, p in model.named_parameters() if k in WITH_GRADIENT}
        grads = torch.autograd.grad((last * seed).sum(), list(wanted.values()))
        tensors.update({f"{case}.weights.{k}": p.detach().half() for k, p in model.state_dict().items()
                        if k != "encoder.embed_tokens.weight"})
        tensors.update({f"{case}.in.ids": ids.int(), f"{case}.in.seed": seed, f"{case}.out.last": single(last)})
        if real is not None:
            tensors[f"{case}.in.mask"] = mask
        if not t5:
            tensors[f"{case}.out.inner"] = single(inner)
        tensors.update({f"{case}.grad.{k}": single(g) for k, g in zip(wanted, grads)})
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, "tests/golden/text_encoders.safetensors",
              metadata=configs)


main()
