/* data.h: from a folder of pictures to batches: layouts recognised, captions found, buckets by
 * aspect ratio, an order that is a function of (seed, epoch). Decoding, caching and encoding are
 * driven by train/; here is what to load and in which order. */
#ifndef VEL_DATA_H
#define VEL_DATA_H

#include "base/base.h"
#include "formats/formats.h"

/* How the words beside a picture become the caption that is learned (caption_rules.c); names as in
 * kohya's sd-scripts. Texts may be NULL. */
typedef struct vel_caption_rules {
    const char *prefix, *suffix;
    const char *trigger;   /* stands for "[trigger]", and is put first where a caption lacks it */
    const char *swap;      /* "TOK=<s0>,A=<s1>": each first becomes its second, anywhere */
    const char *style;     /* "tags"; "text": left whole; "auto": tags where parts are short */
    const char *separator; /* of tags; NULL: "," */
    const char *secondary_separator; /* becomes the separator after all else */
    const char *keep_separator;      /* "|||": what is before the first, after the second, stays */
    bool shuffle, wildcard;          /* wildcard: {a|b}, and one of several lines */
    int keep_tokens;                 /* tags at the beginning that stay */
    double tag_dropout;
    int dropout_every;  /* every n-th epoch has no captions; 0 never */
    int warmup_min;     /* token warm-up: tags that are seen at first ... */
    double warmup_step; /* ... and the step, or share of all, from which all are */
} vel_caption_rules;
/* Does a caption differ from one time to the next? */
bool vel_caption_varies(const vel_caption_rules *r);
vel_status vel_caption_check(vel_ctx *ctx, const vel_caption_rules *r);
/* Whether a caption has a word that vel_caption_rules.swap (NULL: none) makes another. */
bool vel_caption_has_swapped(const char *swap, const char *caption);
/* The caption as it is learned this time: random from (seed, stream); warm: 0..1, the share of the
 * token warm-up that is over. *out is vel_free'd by the caller. */
vel_status vel_caption_use(vel_ctx *ctx, const vel_caption_rules *r, const char *caption,
                           uint64_t seed, uint64_t stream, double warm, char **out);

/* How pictures are shown, and what they count. Texts may be NULL. */
typedef struct vel_data_how {
    vel_caption_rules captions;
    double caption_dropout;
    bool flip, random_crop; /* mirrored at random; else cut from the middle */
    bool color_aug;         /* colours a little off */
    double face_range[2];   /* cut around the face that the file's name tells of, the frame from so
                               many to so many times as large; 0, 0: not */
    const char *filter;     /* of scaling; NULL: Lanczos */
    bool alpha_mask;        /* each place's loss is weighted by the pictures' alpha channel, or */
    const char *masks;      /* by the pictures in this folder */
    double weight;          /* of the loss; 0: 1 */
    bool preserve;          /* what is learned is what the model says without being changed */
} vel_data_how;

/* "MIN,MAX" of face_crop_aug_range, 0 < MIN <= MAX; NULL or "": 0, 0. */
vel_status vel_face_range_parse(vel_ctx *ctx, const char *text, double range[2]);

/* One of several folders that are learned from together. Texts may be NULL. */
typedef struct vel_data_subset {
    const char *folder;
    const char *list; /* kohya's JSON: {"picture": {"caption": "..", "tags": ".."}} */
    const char *class_words, *caption_extension; /* stand-in caption; NULL: the options' */
    int repeats;
    bool reg;                /* pictures of the class: see regular.c */
    int dataset;             /* batches are of one of them */
    int width, height;       /* 0: the options' */
    int batch;               /* 0: the run's */
    double validation_split; /* below 0: the options' */
    bool buckets, no_upscale;
    int bucket_min, bucket_max, bucket_step; /* step 0: the options' buckets */
    vel_data_how how;
} vel_data_subset;

typedef struct vel_data_options {
    const char *folder;             /* with subsets: what messages name */
    const vel_data_subset *subsets; /* instead of what folder's layout says */
    int n_subsets;
    const char *reg_folder; /* pictures of the class, in N_name folders as in kohya's; or NULL */
    double reg_weight;      /* of their loss */
    const char *instance_prompt;   /* one caption for all; NULL: captions from files */
    const char *caption_extension; /* NULL: .caption, then .txt */
    const char *caption_column;    /* of metadata.jsonl; NULL: "text" */
    const char *image_column;      /* NULL: "file_name" */
    int width, height;             /* resolution */
    bool buckets;                  /* aspect-ratio buckets of equal area; else fixed size */
    int bucket_min, bucket_max, bucket_step; /* 256, 1024, 64; step a multiple of 8 */
    bool no_upscale;
    int repeats;             /* of a flat folder; N_name folders carry their own */
    int most_pictures;       /* the first so many; 0: all */
    double validation_split; /* share held out, chosen by hash of the file name */
    bool strict_peer;
    int size_multiple; /* pixels per latent: 8 */
    vel_data_how how;  /* without subsets, each of which has its own */
} vel_data_options;

typedef struct vel_sample {
    char *image; /* path */
    char *caption;
    int repeats;
    int source_width, source_height;
    int width, height; /* of its bucket */
    int subset;        /* of the options */
    bool held_out;     /* for validation */
    bool reg;          /* of the class */
    double weight;     /* of its loss: that of its subset, and of the class */
} vel_sample;

/* kohya's --dataset_config (dataset_config.c): the subsets, and what it says of the whole run.
 * Texts live in a. otherwise: what holds where the file says nothing, or where it says the same of
 * all subsets, which then is a setting of the run; NULL: only the settings are of interest. */
typedef struct vel_dataset_config {
    vel_data_subset *subsets;
    int n_subsets;
    struct {
        const char *name, *value;
    } setting[64];
    int n_settings;
} vel_dataset_config;
vel_status vel_dataset_config_read(vel_ctx *ctx, const char *path, const vel_data_subset *otherwise,
                                   vel_arena *a, vel_dataset_config *out);

typedef struct vel_skipped {
    char *path, *why;
} vel_skipped;

typedef struct vel_dataset {
    vel_ctx *ctx;
    char layout[64];     /* "flat folder with side-car captions", "kohya N_name folders", ... */
    vel_sample *samples; /* training and held-out */
    int n;
    int n_train, n_held_out; /* n_reg of n_train are of the class */
    int n_reg;
    vel_skipped *skipped; /* pictures that cannot be read, stray files */
    int n_skipped;
    int missing_captions;
    vel_data_options options;
    int least_items; /* an epoch has at least so many: the pictures are shown again from the first
                      * on (diffusers' DreamBooth, where the class has more pictures) */
} vel_dataset;

/* How a sample is shown. */
const vel_data_how *vel_sample_how(const vel_dataset *d, int index);

/* Finds, probes (not decodes) and sorts into buckets. No readable picture at all is VEL_BAD_FILE.
 */
vel_status vel_dataset_open(vel_ctx *ctx, const vel_data_options *o, vel_dataset **out);
void vel_dataset_close(vel_dataset *d);
/* What was found, as a newcomer reads it: layout, counts, three real captions, skipped files, the
 * bucket table. */
void vel_dataset_describe(const vel_dataset *d, vel_text *out);

/* An epoch's batches: each of one bucket, samples repeated as asked, shuffled by (seed, epoch). The
 * last batch of a bucket may be short (kohya) unless fill, which then draws again. */
typedef struct vel_epoch {
    int32_t *sample; /* [n_items] index into samples */
    int32_t *begin;  /* [n_batches + 1] */
    int n_batches;
    vel_ctx *ctx;
} vel_epoch;
vel_status vel_epoch_create(const vel_dataset *d, int batch, uint64_t seed, int64_t epoch,
                            bool fill, vel_epoch **out);
void vel_epoch_destroy(vel_epoch *e);

/* By what a sample is scaled: the filter (NULL: what is usual); under strict_peer without one
 * kohya's, which shrinks by area. For vel_picture_load. */
const char *vel_sample_filter(const vel_sample *s, const char *filter, bool strict_peer);
/* In what follows `showing` is any number: what is random of how a picture is shown (crop, flip,
 * colours) comes from (seed, showing, index), so it tells one time from another. */

/* Is a sample the same each time, but for being mirrored? */
bool vel_sample_stays(const vel_dataset *d, int index);
/* Pixels of a sample in its bucket; out: [height, width, 3] in -1..1. */
vel_status vel_sample_pixels(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                             float *out);
/* Where what is shown begins in the picture at the size to which it is scaled. */
void vel_sample_crop(const vel_dataset *d, int index, uint64_t seed, int64_t showing, int *left,
                     int *top);
/* The weight of each place of the sample as vel_sample_pixels shows it, 0..1, [height / down, width
 * / down], means over down x down pixels. folder: of masks, pictures with the sample's name (red
 * channel); NULL: the sample's own alpha channel, 1 where it has none. */
vel_status vel_sample_mask(const vel_dataset *d, int index, uint64_t seed, int64_t showing,
                           const char *folder, int down, float *out);
/* Of the bytes of a file: a part of cache keys, and how duplicates are found. */
vel_status vel_content_hash(vel_ctx *ctx, const char *path, uint64_t *out);
/* 0, 1: which of the variants (flip) is shown; for caches that hold both. */
int vel_sample_flipped(const vel_dataset *d, int index, uint64_t seed, int64_t showing);

/* A cache on disk under content hashes: key is any bytes (file content hash, encoder hash, size,
 * crop, flip); values are float32. NULL folder: RAM only. */
typedef struct vel_cache vel_cache;
vel_status vel_cache_open(vel_ctx *ctx, const char *folder, vel_cache **out);
void vel_cache_close(vel_cache *c);
/* Borrowed until close; NULL when absent (or damaged: then it is made anew). */
const float *vel_cache_find(vel_cache *c, const char *key, int64_t count);
vel_status vel_cache_put(vel_cache *c, const char *key, const float *values, int64_t count);

#endif
