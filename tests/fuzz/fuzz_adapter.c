/* fuzz_adapter.c: adapter files and files of learned words on hostile bytes, against a few modules
 * of a model. What is accepted is complete: every leaf has its values. */
#define _GNU_SOURCE /* memfd_create */
#include <stdlib.h>

#include "formats/adapter_file.h"
#include "fuzz_tensors.h"

#define TO_Q "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
static const vel_known_module known[] = {
    {TO_Q, 2, {8, 6, 1, 1}, "input_blocks.1.1.transformer_blocks.0.attn1.to_q"},
    {"unet.conv_in", 4, {8, 4, 3, 3}, "input_blocks.0.0"},
    {"unet.norm", 1, {8, 1, 1, 1}, NULL},
    {"text_encoder.text_model.encoder.layers.0.mlp.fc1", 2, {8, 4, 1, 1}, NULL},
};

/* One file for each kind of leaves; values are whatever follows the header. */
#define T(name, type, shape, from, to)                                                             \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":[" shape "],\"data_offsets\":[" #from "," #to  \
    "]}"
#define Q "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
static const char *const headers[] = {
    "{" T(Q ".alpha", "F32", "", 0, 4) "," T(Q ".lora_down.weight", "F32", "2,6", 4, 52) "," T(
        Q ".lora_up.weight", "F32", "8,2", 52, 116) "," T(Q ".dora_scale", "F32", "8,1", 116,
                                                          148) "}",
    "{" T(Q ".hada_w1_a", "F16", "8,2", 0, 32) "," T(Q ".hada_w1_b", "F16", "2,6", 32, 56) "," T(
        Q ".hada_w2_a", "F16", "8,2", 56, 88) "," T(Q ".hada_w2_b", "F16", "2,6", 88, 112) "}",
    "{" T("lora_unet_conv_in.lokr_w1", "F32", "2,2", 0,
          16) "," T("lora_unet_conv_in.lokr_w2", "F32", "4,2,3,3", 16,
                    304) "," T("lora_unet_norm.w_norm", "F32", "8", 304, 336) "}",
    "{\"__metadata__\":{\"lora_adapter_metadata\":\"{\\\"unet.r\\\": 2}\"}," T(
        TO_Q ".lora_A.weight", "F32", "2,6", 0, 48) "," T(TO_Q ".lora_B.weight", "F32", "8,2", 48,
                                                          112) "," T("bundle_emb.sks.clip_l", "F32",
                                                                     "1,4", 112, 128) "}",
};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    static uint8_t file[4096];
    if (i >= VEL_COUNT(headers))
        return NULL;
    size_t length = strlen(headers[i]);
    memset(file, 0, sizeof file);
    file[0] = (uint8_t)length;
    file[1] = (uint8_t)(length >> 8);
    memcpy(file + 8, headers[i], length);
    const char *last = strrchr(headers[i], ','); /* ",148]}}": where the data end */
    *n = 8 + length + (size_t)atoi(last + 1);
    return file;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    vel_ctx *ctx = vel_ctx_create("cpu");
    fuzz_file f;
    vel_adapter_file *a = NULL;
    vel_word *words = NULL;
    int n_words = 0;
    if (ctx && fuzz_file_open(&f, bytes, n)) {
        vel_status status = vel_adapter_file_read(ctx, f.path, known, VEL_COUNT(known), &a);
        if (status && !*vel_ctx_error(ctx))
            __builtin_trap(); /* a refusal says why */
        for (int m = 0; !status && m < a->n; m++)
            for (int leaf = 0; leaf < VEL_ADAPTER_LEAVES; leaf++) {
                const vel_adapter_tensor *t = &a->modules[m].leaf[leaf];
                int64_t count = vel_adapter_tensor_count(t);
                if ((t->v == NULL) != (count == 0) || (t->v && !vel_all_finite(t->v, count)))
                    __builtin_trap();
            }
        vel_adapter_file_destroy(a);
        if (vel_words_read(ctx, f.path, false, &words, &n_words) == VEL_OK)
            vel_words_free(ctx, words, n_words);
    }
    fuzz_file_close(&f);
    fuzz_end(ctx);
    return 0;
}
