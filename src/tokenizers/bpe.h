/* bpe.h: what the files of this folder share about CLIP's byte-pair encoding; private to it.
 *
 *   text --(added words cut out)--> pieces --bpe_normal.c--> normal text --(added words again)-->
 *   bpe.c: words of the splitting pattern --bpe_merge.c--> ids
 *
 * Invariant: every id below n_pieces has at most one piece, every piece one id, and each produced
 * id carries the offset in the caller's text where it begins. */
#ifndef VEL_BPE_H
#define VEL_BPE_H

#include "tokenizers/tokenizers.h"

enum {
    BPE_MAX_IDS = 1 << 20,    /* a vocabulary with larger ids is taken for damaged */
    BPE_MAX_TEXT = 1 << 26,   /* bytes of one text: offsets are kept as uint32_t */
    BPE_FILE_LIMIT = 1 << 26, /* bytes of merges.txt */
    BPE_MAX_ADDED = 8192,     /* special and learned words */
    BPE_USUAL_LENGTH = 77     /* of all of CLIP's text encoders */
};

typedef struct bpe_merge {
    int32_t left, right; /* left -1: an empty slot */
    int32_t rank, id;
} bpe_merge;

/* A word recognised in running text before anything is split. */
typedef struct bpe_added {
    const char *text; /* as it is looked for: normalised when normal is set */
    const char *name; /* as it was written */
    size_t n_text;
    int32_t id, n_ids; /* stands for id, id + 1, ... id + n_ids - 1 */
    bool normal;       /* looked for in normalised text, so in any case of letters */
} bpe_added;

struct vel_tokenizer {
    vel_ctx *ctx;
    vel_arena *arena;    /* pieces and words */
    const char **pieces; /* by id; NULL where the vocabulary has a hole */
    int32_t n_pieces, room_pieces;
    int32_t n_words; /* pieces that are not NULL */
    int32_t *words;  /* open addressing: id + 1 by hash of the piece; 0 is empty */
    uint32_t words_mask;
    bpe_merge *merges; /* open addressing by (left, right) */
    uint32_t merges_mask;
    size_t longest;        /* bytes of the longest piece */
    int32_t bytes[2][256]; /* id of a byte alone; [1]: of a byte that ends a word */
    bpe_added *added;
    int n_added, room_added;
    bool added_start[2][256]; /* first bytes of added words, not normal and normal */
    int32_t bos, eos, pad, unknown;
    int max_length;
};

/* ---- bpe_unicode.c --------------------------------------------------------------------------- */

typedef enum bpe_class { BPE_OTHER, BPE_SPACE, BPE_LETTER, BPE_NUMBER } bpe_class;
bpe_class vel_bpe_class(int32_t c);
int32_t vel_bpe_lower(int32_t c);     /* U+0130 has two: the caller adds U+0307 */
bool vel_bpe_unknown_mark(int32_t c); /* newer than the reference's NFC: never reordered */

/* ---- bpe_normal.c ---------------------------------------------------------------------------- */

typedef struct bpe_text {
    vel_ctx *ctx;
    char *s;          /* not NUL-terminated */
    uint32_t *origin; /* per byte: offset in the caller's text */
    size_t n, room;
} bpe_text;
/* Appends the normal form of n bytes of valid UTF-8 at offset first of the caller's text. */
vel_status vel_bpe_normalise(bpe_text *out, const char *s, size_t n, uint32_t first);
void vel_bpe_text_finish(bpe_text *t);

/* ---- bpe_merge.c ----------------------------------------------------------------------------- */

/* The id of a piece; -1 when there is none. */
int32_t vel_bpe_find(const vel_tokenizer *t, const char *piece, size_t n);
/* Names id; it must be free and the piece new. */
vel_status vel_bpe_set_piece(vel_tokenizer *t, int32_t id, const char *piece);
vel_status vel_bpe_reserve_merges(vel_tokenizer *t, size_t n);
void vel_bpe_set_merge(vel_tokenizer *t, bpe_merge m); /* a pair's last rank counts */
/* The ids of single bytes, once the vocabulary is read. */
void vel_bpe_index_bytes(vel_tokenizer *t);

typedef struct bpe_ids {
    vel_ctx *ctx;
    int32_t *id;
    uint32_t *at; /* offset in the caller's text where id[i] begins */
    int n, room;
    struct bpe_symbol *symbols; /* room for room_word bytes */
    struct bpe_candidate *heap; /* three a byte */
    size_t room_word;
} bpe_ids;
vel_status vel_bpe_push(bpe_ids *out, int32_t id, uint32_t at);
/* Appends the ids of one word of n bytes, origin[i] being where byte i came from. */
vel_status vel_bpe_word(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                        bpe_ids *out);
void vel_bpe_ids_finish(bpe_ids *ids); /* leaves id, the caller's */

/* ---- bpe_vocab.c ----------------------------------------------------------------------------- */

vel_status vel_bpe_load(vel_tokenizer *t, const char *folder);

/* ---- bpe.c ----------------------------------------------------------------------------------- */

/* Makes name stand for n_ids ids from id on; a word known before is redefined. */
vel_status vel_bpe_add(vel_tokenizer *t, const char *name, int32_t id, int32_t n_ids, bool normal);

#endif
