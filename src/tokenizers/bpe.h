/* bpe.h: what the files of this folder share; private to it. Two ways lead from a text to ids:
 *
 *   CLIP:  text --(added words cut out)--> pieces --bpe_normal.c--> normal text --(added words
 *   again)--> bpe.c: words of the splitting pattern --bpe_merge.c--> ids
 *   T5, Gemma:  the same, with the steps of way.c for normal text and words, and unigram.c or
 *   bpe_merge.c for ids
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
    BPE_USUAL_LENGTH = 77,    /* of all of CLIP's text encoders */
    BPE_AROUND = 4            /* ids put before a text, and behind it */
};

typedef enum bpe_kind { BPE_CLIP, BPE_PLAIN, BPE_UNIGRAM } bpe_kind;

typedef struct bpe_merge {
    int32_t left, right; /* left -1: an empty slot */
    int32_t rank, id;
} bpe_merge;

/* Of a piece; its hash is kept, so that another's text is hardly ever read. */
typedef struct bpe_place {
    uint32_t hash;
    int32_t next_id; /* the piece's id + 1; 0: an empty slot */
} bpe_place;

/* A word recognised in running text before anything is split. */
typedef struct bpe_added {
    const char *text; /* as it is looked for: normalised when normal is set */
    const char *name; /* as it was written */
    size_t n_text;
    int32_t id, n_ids; /* stands for id, id + 1, ... id + n_ids - 1 */
    bool normal;       /* looked for in normalised text, so in any case of letters */
    bool strip[2];     /* takes the white space before, behind it with it */
} bpe_added;

/* ---- way.c: what stands between a text and its model, other than CLIP's ---------------------- */

typedef enum way_kind {
    WAY_NFC, /* normalisers: a text becomes another */
    WAY_NFKC,
    WAY_LOWER,
    WAY_CHARSMAP, /* sentencepiece's table */
    WAY_REPLACE,  /* from becomes to */
    WAY_BLANKS,   /* two blanks and more become to */
    WAY_SPACES,   /* a run of white space becomes to */
    WAY_STRIP,    /* white space at the ends goes */
    WAY_PREPEND,
    WAY_WORDS,     /* splitters: at white space, which goes */
    WAY_METASPACE, /* blanks become from, one is put in front; then before each of them */
    WAY_SPLIT      /* at from */
} way_kind;
typedef enum way_mode { /* of WAY_SPLIT: what becomes of from */
                        WAY_REMOVED,
                        WAY_ISOLATED,
                        WAY_WITH_PREVIOUS,
                        WAY_WITH_NEXT
} way_mode;
typedef enum way_front { WAY_ALWAYS, WAY_FIRST, WAY_NEVER } way_front; /* of WAY_METASPACE */

typedef struct way_step {
    way_kind kind;
    const char *from, *to; /* in the tokenizer's arena; from is never empty */
    int mode;              /* way_mode, way_front */
    bool split;            /* of WAY_METASPACE */
    bool left, right;      /* of WAY_STRIP */
} way_step;

enum { WAY_STEPS = 8 };
/* sentencepiece's precompiled_charsmap: a double array of bytes' transitions, and the texts that
 * its leaves point to. */
typedef struct way_charsmap {
    uint32_t *units;
    size_t n_units;
    char *texts; /* ends with a NUL that is not counted */
    size_t n_texts;
} way_charsmap;
typedef struct vel_way {
    way_step normal[WAY_STEPS], split[WAY_STEPS];
    int n_normal, n_split;
    way_charsmap map;
} vel_way;

struct vel_tokenizer {
    vel_ctx *ctx;
    vel_arena *arena;    /* pieces and words */
    const char **pieces; /* by id; NULL where the vocabulary has a hole */
    int32_t n_pieces;
    int32_t n_words;  /* pieces that are not NULL */
    bpe_place *words; /* open addressing by hash of the piece */
    uint32_t words_mask;
    bpe_merge *merges; /* open addressing by (left, right) */
    uint32_t merges_mask;
    size_t longest;        /* bytes of the longest piece */
    int32_t bytes[2][256]; /* id of a byte alone; [1]: of a byte that ends a word */
    bpe_added *added;
    int n_added;
    bool added_start[2][256];       /* first bytes of added words, not normal and normal */
    int32_t bos, eos, pad, unknown; /* -1: none, but for CLIP */
    int max_length;
    bpe_kind kind;
    int32_t before[BPE_AROUND], after[BPE_AROUND]; /* ids put around a text */
    int n_before, n_after;
    vel_way way;           /* not CLIP's */
    int32_t byte_ids[256]; /* of "<0x00>" and so on; -1 where there is none */
    bool byte_fallback, fuse_unknown, whole_words;
    double *scores, worst; /* unigram's: by id; the lowest */
    int32_t *order;        /* unigram's n_order ids by the bytes of their pieces */
    int32_t n_order;
};

/* ---- bpe_unicode.c --------------------------------------------------------------------------- */

typedef enum bpe_class { BPE_OTHER, BPE_SPACE, BPE_LETTER, BPE_NUMBER } bpe_class;
bpe_class vel_bpe_class(int32_t c);
int32_t vel_bpe_lower(int32_t c);           /* U+0130 has two: the caller adds U+0307 */
bool vel_bpe_unknown_mark(int32_t c);       /* newer than the reference's NFC: never reordered */
bool vel_bpe_unknown_compatible(int32_t c); /* newer than its NFKC: stays as it is */

/* ---- bpe_normal.c ---------------------------------------------------------------------------- */

typedef struct bpe_text {
    vel_ctx *ctx;
    char *s;          /* not NUL-terminated */
    uint32_t *origin; /* per byte: offset in the caller's text */
    size_t n;
} bpe_text;
/* Appends the normal form of n bytes of valid UTF-8 at offset first of the caller's text. */
vel_status vel_bpe_normalise(bpe_text *out, const char *s, size_t n, uint32_t first);
/* The same with the normal form alone: NFC, or NFKC where compatible. */
vel_status vel_bpe_normal_form(bpe_text *out, const char *s, size_t n, uint32_t first,
                               bool compatible);
/* Appends bytes that all come from one place. */
vel_status vel_bpe_text_add(bpe_text *t, const char *s, size_t n, uint32_t from);
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
    int n;
    struct bpe_symbol *symbols; /* of the word at hand */
    struct bpe_candidate *heap; /* three a byte */
} bpe_ids;
vel_status vel_bpe_push(bpe_ids *out, int32_t id, uint32_t at);
/* Appends the ids of one word of n bytes, origin[i] being where byte i came from. */
vel_status vel_bpe_word(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                        bpe_ids *out);
/* The same for BPE_PLAIN, whose first pieces are characters. */
vel_status vel_bpe_plain_word(const vel_tokenizer *t, const char *s, size_t n,
                              const uint32_t *origin, bpe_ids *out);
void vel_bpe_ids_finish(bpe_ids *ids); /* leaves id, the caller's */

/* ---- way.c, charsmap.c, unigram.c, sentencepiece.c ------------------------------------------- */

/* Appends the normal form of n bytes at offset first of the caller's text. */
vel_status vel_way_normalise(const vel_tokenizer *t, bpe_text *out, const char *s, size_t n,
                             uint32_t first);
/* Ids of a stretch of normal text. */
vel_status vel_way_ids(const vel_tokenizer *t, const char *s, const uint32_t *origin, size_t n,
                       bpe_ids *out);
/* From tokenizer.json's "normalizer" and "pre_tokenizer" (either may be absent). */
vel_status vel_way_read(vel_tokenizer *t, const char *path, json_t *normalizer, json_t *splitter);
/* Those that transformers gives to its classes T5Tokenizer and GemmaTokenizer, whatever the file
 * says; T5's charsmap is read before. */
void vel_way_t5(vel_way *w);
void vel_way_gemma(vel_way *w);

/* bytes: the field's content; checked, and copied into the tokenizer's arena. */
vel_status vel_charsmap_read(vel_tokenizer *t, const char *path, const char *bytes, size_t n);
/* From base64, as tokenizer.json has it. */
vel_status vel_charsmap_decode(vel_tokenizer *t, const char *path, const char *text);
vel_status vel_charsmap_apply(const way_charsmap *m, const char *s, size_t n, bpe_text *out);

/* One piece with its score; then once all are there. unknown: -1 or an id. */
vel_status vel_unigram_piece(vel_tokenizer *t, const char *path, const char *piece, double score);
vel_status vel_unigram_finish(vel_tokenizer *t, const char *path, int64_t unknown);
vel_status vel_unigram_read(vel_tokenizer *t, const char *path, json_t *model);
vel_status vel_unigram_word(const vel_tokenizer *t, const char *s, size_t n, const uint32_t *origin,
                            bpe_ids *out);

/* A piece of a sentencepiece model that is looked for in running text. */
typedef struct spm_token {
    const char *text;
    bool special;
} spm_token;
typedef struct spm_tokens {
    spm_token *items; /* the caller frees them; texts are the tokenizer's */
    int n;
} spm_tokens;
vel_status vel_spm_read(vel_tokenizer *t, const char *path, spm_tokens *out);

/* ---- bpe_vocab.c ----------------------------------------------------------------------------- */

vel_status vel_bpe_load(vel_tokenizer *t, const char *folder);

/* ---- bpe.c ----------------------------------------------------------------------------------- */

/* Makes name stand for n_ids ids from id on; a word known before is redefined. */
vel_status vel_bpe_add(vel_tokenizer *t, const char *name, int32_t id, int32_t n_ids, bool normal,
                       const bool strip[2]);

#endif
