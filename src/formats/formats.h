/* formats.h: files that the ecosystem shares: tensors (safetensors, GGUF, torch.save's; read
 * mapped, written whole), learned words, JSON, TOML, images; and regular expressions that files
 * state. Every file is hostile until parsed: bounds are checked, sizes capped, and a refusal names
 * the file, the value and the remedy. Knows no graph. */
#ifndef VEL_FORMATS_H
#define VEL_FORMATS_H

#include <jansson.h>

#include "base/base.h"

/* ---- safetensors (safetensors.c) ------------------------------------------------------------- */

typedef enum vel_file_type {
    VEL_FILE_F64,
    VEL_FILE_F32,
    VEL_FILE_F16,
    VEL_FILE_BF16,
    VEL_FILE_I64,
    VEL_FILE_I32,
    VEL_FILE_I16,
    VEL_FILE_I8,
    VEL_FILE_U8,
    VEL_FILE_BOOL,
    VEL_FILE_F8_E4M3,
    VEL_FILE_F8_E5M2,
    VEL_FILE_Q8_0, /* ggml's blocks (gguf.c), read only */
    VEL_FILE_Q4_0,
    VEL_FILE_Q5_0,
    VEL_FILE_Q4_K,
    VEL_FILE_Q5_K,
    VEL_FILE_Q6_K,
    VEL_FILE_TYPES
} vel_file_type;
int vel_file_type_bytes(vel_file_type t); /* of a value; 0 where values come in blocks */
/* So many values lie together in so many bytes; 1 and the type's bytes where there are no blocks.
 */
typedef struct vel_file_block_size {
    int values, bytes;
} vel_file_block_size;
vel_file_block_size vel_file_block(vel_file_type t);
int64_t vel_file_bytes(vel_file_type t, int64_t count); /* of whole blocks */
/* Elements of a shape; false when its bytes do not fit into 63 bits. */
bool vel_file_count(int rank, const int64_t *dim, int bytes_each, int64_t *count);
const char *vel_file_type_name(vel_file_type t); /* as in the header: "F16" */

/* Where a view's values lie in its data: single files keep some tensors in another order. */
typedef enum vel_file_order {
    VEL_ORDER_PLAIN,
    VEL_ORDER_HALVES,    /* the second half of the rows comes first */
    VEL_ORDER_TRANSPOSED /* data is [dim 1, dim 0] */
} vel_file_order;

typedef struct vel_file_tensor {
    const char *name;
    vel_file_type type;
    int rank; /* 0 for a scalar */
    int64_t dim[8];
    int64_t count;       /* elements */
    const uint8_t *data; /* in the mapping; may be unaligned */
    bool copied;         /* data is in memory instead, put in order from where it lay scattered */
    float scale; /* values are data times this (ComfyUI's scaled 8-bit floats); 0 stands for 1 */
    vel_file_order order;
} vel_file_tensor;

/* An open file of tensors: safetensors, GGUF, or one that torch.save wrote (.ckpt, .pt, .bin),
 * which is told by its content; texts and numbers of the latter are its metadata. */
typedef struct vel_safetensors vel_safetensors;
vel_status vel_safetensors_open(vel_ctx *ctx, const char *path, vel_safetensors **out);
/* A model part in a folder: PREFIX.safetensors, PREFIX.VARIANT.safetensors (variant may be NULL),
 * or shards through PREFIX[.VARIANT].safetensors.index.json, then the same with .bin; tries each of
 * the n stems in turn ("diffusion_pytorch_model", "model", "pytorch_model"). The error lists what
 * was looked for. */
vel_status vel_safetensors_open_part(vel_ctx *ctx, const char *folder, const char *const *stems,
                                     int n, const char *variant, vel_safetensors **out);
/* A file whose tensors are views of others' bytes, which outlive it; names are copied. path: for
 * messages. */
vel_status vel_safetensors_of(vel_ctx *ctx, const char *path, const vel_file_tensor *tensors, int n,
                              vel_safetensors **out);
void vel_safetensors_close(vel_safetensors *sf);
int vel_safetensors_count(const vel_safetensors *sf);
const vel_file_tensor *vel_safetensors_at(const vel_safetensors *sf, int i); /* sorted by name */
const vel_file_tensor *vel_safetensors_find(const vel_safetensors *sf, const char *name);
const char *vel_safetensors_meta(const vel_safetensors *sf, const char *key); /* NULL if absent */
const json_t *
vel_safetensors_metadata(const vel_safetensors *sf); /* object; may be empty; borrowed */
const char *vel_safetensors_path(const vel_safetensors *sf);
/* Converts n elements from the first-th on to float (I32, I64, F64 too); checks bounds. */
void vel_file_tensor_floats(const vel_file_tensor *t, int64_t first, int64_t n, float *out);

typedef struct vel_save_tensor {
    const char *name;
    vel_file_type type; /* F32, F16, BF16 convert from f32 data; other types are copied */
    int rank;
    int64_t dim[8];
    const void *data; /* float * for F32, F16, BF16; else raw bytes of the type */
    bool raw;         /* data holds bytes of the type, whichever it is; in a mapping */
    /* Instead of data, for F32, F16, BF16: fill or read. A value that is made or converted and is
     * not finite, or too large for the type, is VEL_DIVERGED. */
    vel_status (*fill)(void *user, float *out); /* makes all values */
    /* Values first .. first+n-1; one thread asks for all pieces of a tensor, in order. */
    void (*read)(void *user, int64_t first, int64_t n, float *out);
    vel_status (*add)(void *user, int64_t first, int64_t n, float *values); /* to what was read */
    void *user;
    /* read and add may be called from several threads, for several tensors at a time, as fill
     * always may; else the thread that saves does so, for one after the other. */
    bool read_anywhere;
    bool may_stop; /* when the context is interrupted: VEL_INTERRUPTED, and no file */
} vel_save_tensor;
/* Written whole or not at all. metadata: object of strings, may be NULL. Tensors are stored in
 * safetensors' own order (by descending type size, then name), so that files compare equal with the
 * Python writer's. */
vel_status vel_safetensors_save(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors,
                                int n, const json_t *metadata);
/* How many threads call fill at most; omp_get_thread_num() of each is less. */
int vel_save_threads(void);
/* The same tensors as torch.save writes a dictionary of them, whole or not at all: F32, F16 and
 * BF16 with data alone, below 1 GiB. */
vel_status vel_pickle_save(vel_ctx *ctx, const char *path, const vel_save_tensor *tensors, int n);

/* ---- learned words (words.c) ----------------------------------------------------------------- */

typedef struct vel_word {
    char *name;
    int n, width;  /* vectors, and values in each */
    float *values; /* [n, width] */
    /* Which text encoder's they are, where a file says so or has to: "clip_l" or "clip_g" of SDXL
     * and SD 3, "t5" of SD 3 and FLUX.1; NULL: the only one's. A word has one entry for each. */
    const char *encoder;
} vel_word;
/* A file of any dialect, a pickle too. bundled: only the words beside an adapter's tensors, of
 * which there may be none. vel_words_free. */
vel_status vel_words_read(vel_ctx *ctx, const char *path, bool bundled, vel_word **out, int *n);
void vel_words_free(vel_ctx *ctx, vel_word *words, int n);
/* All words of a text encoder as one entry, "A B", behind each other; of vel_words_read's kind. */
vel_status vel_words_join(vel_ctx *ctx, vel_word *words, int *n);
/* What vel_word.encoder is for the name of a text encoder in a file; NULL: it is none. */
const char *vel_words_encoder(const char *name);
const char *vel_words_clip(int k); /* of a model's CLIP encoder k: 0, 1; NULL past them */
#define vel_words_t5 "t5"
/* Whether entry i is the first of its word; how many words the n entries are. */
bool vel_words_is_first(const vel_word *words, int i);
int vel_words_names(const vel_word *words, int n);
/* form: "diffusers" (which A1111 and ComfyUI read too, by the file's name) or "kohya", which is for
 * one word. A path that ends in .bin or .pt becomes a pickle, which has no metadata, and so is for
 * words of one text encoder. */
vel_status vel_words_write(vel_ctx *ctx, const char *path, const vel_word *words, int n,
                           const char *form, vel_file_type type, const json_t *metadata);
/* A word's key beside an adapter's tensors, in the arena. */
char *vel_words_bundle_key(vel_arena *a, const vel_word *word);
vel_save_tensor vel_words_tensor(const vel_word *word, const char *key, vel_file_type type);
/* Is the tensor a word's in a file of an adapter? "bundle_emb.WORD.string_to_param.*" */
bool vel_words_is_bundled(const char *key);

/* What is wrong with a file that should be something else, when it looks like what failed downloads
 * leave: a pointer of git-lfs, a web page, a hub's refusal. NULL: it does not. Static. */
const char *vel_download_problem(const uint8_t *bytes, size_t n);

/* ---- JSON (json.c, over jansson) ------------------------------------------------------------- */

/* At most 64 MiB, depth-limited; the error names file, line and what is wrong. json_decref. */
vel_status vel_json_load(vel_ctx *ctx, const char *path, json_t **out);
vel_status vel_json_save(vel_ctx *ctx, const char *path,
                         const json_t *value); /* atomic, indented */
double vel_json_number(const json_t *object, const char *key, double otherwise);
int64_t vel_json_int(const json_t *object, const char *key, int64_t otherwise);
bool vel_json_bool(const json_t *object, const char *key, bool otherwise);
const char *vel_json_string(const json_t *object, const char *key, const char *otherwise);

/* ---- TOML (toml.c) --------------------------------------------------------------------------- */

/* A table as a JSON object; the error names file and line. name: for messages. json_decref. */
vel_status vel_toml_parse(vel_ctx *ctx, const char *name, const char *bytes, size_t n,
                          json_t **out);
vel_status vel_toml_load(vel_ctx *ctx, const char *path, json_t **out); /* at most 1 MiB */
void vel_toml_add_text(vel_text *out, const char *value);               /* quoted */

/* ---- images (images.c, over libvips) --------------------------------------------------------- */

typedef struct vel_picture_info {
    int width, height; /* after EXIF orientation */
    bool has_alpha;
    const char *format; /* "png", "jpeg", "webp", ... as sniffed from the bytes */
} vel_picture_info;
/* Recognises by content, not by name. VEL_BAD_FILE when it is no image that can be read. */
vel_status vel_picture_probe(vel_ctx *ctx, const char *path, vel_picture_info *out);

typedef struct vel_picture_load {
    int width, height;     /* wanted size: scaled to cover it, then cropped; 0: as it is */
    double crop_x, crop_y; /* 0..1 where the crop lies in what is left over; 0.5 centre */
    bool flip;
    uint8_t background[3]; /* what transparent pixels are laid over; white is usual */
    bool strict_peer;      /* without EXIF orientation and colour profile, as kohya does; and as
                            * there alpha is dropped, whatever colour lies under it */
    bool alpha;            /* the alpha channel as grey instead of the colours; white where none */
    const char *filter;    /* NULL is "lanczos"; lanczos, nearest, bilinear, bicubic, area, box */
} vel_picture_load;
/* Any format libvips reads; EXIF orientation applied, ICC profile to sRGB, 16 bit and grey to 8-bit
 * RGB, alpha over background. Refuses more than 2^28 pixels. vel_image_finish(out). */
vel_status vel_picture_read(vel_ctx *ctx, const char *path, const vel_picture_load *how,
                            vel_image *out);
/* The last call of a thread that read pictures beside the one which called into the library. */
void vel_picture_thread_ends(void);
/* PNG (with text entries: pairs key, value; n_text pairs), JPEG or WebP by the path's ending; whole
 * or not at all. */
vel_status vel_picture_write(vel_ctx *ctx, const char *path, const vel_image *image,
                             const char *const *text, int n_text);
/* PNG bytes in memory (for reports); *bytes vel_free. */
vel_status vel_picture_png(vel_ctx *ctx, const vel_image *image, uint8_t **bytes, size_t *n);
/* JPEG bytes in memory; quality 1..100. */
vel_status vel_picture_jpeg(vel_ctx *ctx, const vel_image *image, int quality, uint8_t **bytes,
                            size_t *n);
/* The text entry of a PNG; NULL when absent; owned. */
char *vel_picture_png_text(vel_ctx *ctx, const char *path, const char *key);
vel_status vel_image_create(vel_ctx *ctx, int width, int height, int channels,
                            vel_image *out); /* white */
/* By Lanczos; vel_picture_resample by any filter of vel_picture_load (NULL: Lanczos). Pillow's
 * Image.resize, bit for bit, but for "area", which weighs by overlap as OpenCV's INTER_AREA does.
 */
vel_status vel_picture_resize(vel_ctx *ctx, const vel_image *in, int width, int height,
                              vel_image *out);
vel_status vel_picture_resample(vel_ctx *ctx, const vel_image *in, int width, int height,
                                const char *filter, vel_image *out);
void vel_image_paste(vel_image *dst, const vel_image *src, int x, int y);
/* Draws UTF-8 text (wrapped to width, black on what is there) through libvips' pango text; size is
 * in pixels. vel_image_text_height: the height this text would use. */
vel_status vel_image_text(vel_ctx *ctx, vel_image *dst, int x, int y, int width, int size,
                          const char *text);
vel_status vel_image_text_height(vel_ctx *ctx, int width, int size, const char *text, int *height);

/* ---- regular expressions (pattern.c) --------------------------------------------------------- */

typedef struct vel_pattern vel_pattern;
/* VEL_BAD_VALUE with the place where the text is no regular expression (PCRE2's). */
vel_status vel_pattern_create(vel_ctx *ctx, const char *text, vel_pattern **out);
void vel_pattern_destroy(vel_pattern *p);
/* Is it found anywhere in the subject? Within bounded effort: what takes more is not. */
bool vel_pattern_finds(const vel_pattern *p, const char *subject);
/* The same of a text that is asked for once; what is no regular expression is found nowhere. */
bool vel_pattern_once(const char *text, const char *subject);

#endif
