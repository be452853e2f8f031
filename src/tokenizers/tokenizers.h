/* tokenizers.h: from text to ids, exactly as the reference does. Vocabularies are read from the
 * model folder. Knows no graph. */
#ifndef VEL_TOKENIZERS_H
#define VEL_TOKENIZERS_H

#include "base/base.h"
#include "formats/formats.h"

typedef struct vel_tokenizer vel_tokenizer;

/* From tokenizer.json where it is there, else vocab.json + merges.txt, else spiece.model or
 * tokenizer.model (+ tokenizer_config.json, special_tokens_map.json, added_tokens.json):
 *   CLIP's byte-pair encoding (transformers' CLIPTokenizer: NFC, white space collapsed, lower case,
 *   its splitting pattern, byte-level BPE with </w>);
 *   Unigram as T5's, and BPE with byte fallback as Gemma's, with the normaliser, splitter and
 *   template that tokenizer.json states. What a file asks for and is not known is refused by name.
 */
vel_status vel_tokenizer_open(vel_ctx *ctx, const char *folder, vel_tokenizer **out);
void vel_tokenizer_close(vel_tokenizer *t);
int vel_tokenizer_size(const vel_tokenizer *t);
int vel_tokenizer_max_length(const vel_tokenizer *t); /* model_max_length: 77 */
int32_t vel_tokenizer_bos(const vel_tokenizer *t);    /* -1: none; CLIP has all three */
int32_t vel_tokenizer_eos(const vel_tokenizer *t);
int32_t vel_tokenizer_pad(const vel_tokenizer *t);

/* Ids of text without begin, end and padding; *ids is owned (vel_free). The text need not be valid
 * UTF-8: VEL_BAD_VALUE with the offset when it is not. */
vel_status vel_tokenizer_ids(vel_tokenizer *t, const char *text, int32_t **ids, int *n);
/* begin + ids + end (what of the two there is: T5 has no begin, Gemma no end), cut to length,
 * padded to length on the right. *n_cut tokens did not fit; *cut_at is the byte offset in text
 * where the cut part starts (either may be NULL). */
vel_status vel_tokenizer_encode(vel_tokenizer *t, const char *text, int length, int32_t *ids,
                                int *n_cut, size_t *cut_at);
/* Without blanks around it and in lower case, as Python's strip and lower; *out is owned.
 * VEL_BAD_VALUE: not valid UTF-8. */
vel_status vel_text_lower(vel_ctx *ctx, const char *text, char **out);
/* A stretch of a text that has one weight, without the brackets that gave it (weights.c). */
typedef struct vel_weighted_text {
    char *text;
    double weight;
} vel_weighted_text;
/* The stretches of text in their order, at least one; as sd-scripts reads weighted captions.
 * VEL_BAD_VALUE: a megabyte and more, or hundreds of open brackets. */
vel_status vel_text_weights(vel_ctx *ctx, const char *text, vel_weighted_text **out, int *n);
void vel_weighted_texts_free(vel_ctx *ctx, vel_weighted_text *list, int n); /* NULL is fine */
/* The text of one id, for reports; borrowed; NULL when out of range. */
const char *vel_tokenizer_piece(const vel_tokenizer *t, int32_t id);
/* An added word W beside which there are W_1, W_2, ... with the next ids stands for all of them
 * from here on: so do pipelines of diffusers read a prompt (TextualInversionLoaderMixin). */
void vel_tokenizer_join_numbered(vel_tokenizer *t);
/* Adds a new word as one or several new ids (textual inversion): returns the first id, or -1. */
int32_t vel_tokenizer_add_word(vel_tokenizer *t, const char *word, int n_ids);

#endif
