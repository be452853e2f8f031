/* parts.h: what the files of data/ share and nobody else sees: the inside of a dataset, captions,
 * lists of pictures (metadata.jsonl, metadata.csv), buckets. */
#ifndef VEL_DATA_PARTS_H
#define VEL_DATA_PARTS_H

#include "data/data.h"

/* ---- captions (captions.c) ------------------------------------------------------------------- */

typedef struct vel_caption {
    const char *text; /* in the arena; NULL when there is no caption file, "" when it is empty */
    const char *extension; /* of the file it came from */
    int n_lines;           /* with words in them; the first one is used */
} vel_caption;

/* The text of a caption file from its bytes: the first line with words, or all of them, each ended
 * by a line break but the last. path is for messages. VEL_BAD_FILE when it is no UTF-8, with the
 * offset of the first bad byte. */
vel_status vel_caption_parse(vel_ctx *ctx, const char *path, const char *bytes, size_t n,
                             bool all_lines, vel_arena *a, vel_caption *out);
/* Looks for the side-car of a picture; out->text stays NULL when there is none. */
vel_status vel_caption_find(vel_ctx *ctx, const vel_data_options *o, const char *picture,
                            bool all_lines, vel_arena *a, vel_caption *out);
/* The i-th ending that is looked for, without its dot; NULL past the end. */
const char *vel_caption_ending(const vel_data_options *o, int i);
/* Fails, naming the offset, unless the bytes are UTF-8 without NUL. */
vel_status vel_check_utf8(vel_ctx *ctx, const char *path, const char *bytes, size_t n);
/* Bytes of a leading byte order mark: 3 or 0. */
size_t vel_bom_bytes(const char *bytes, size_t n);

/* ---- lists of pictures (metadata.c) ---------------------------------------------------------- */

typedef struct vel_listed {
    const char *file;    /* inside the folder of the list; in the arena */
    const char *caption; /* NULL when the row has none */
    int line;
} vel_listed;

/* metadata.jsonl, or metadata.csv when path ends so; *rows is vel_free'd by the caller. */
vel_status vel_metadata_parse(vel_ctx *ctx, const char *path, const char *bytes, size_t n,
                              const vel_data_options *o, vel_arena *a, vel_listed **rows,
                              int *n_rows);

/* ---- buckets (buckets.c) --------------------------------------------------------------------- */

typedef struct vel_size {
    int width, height;
} vel_size;

typedef struct vel_bucket_table {
    vel_size *size; /* sorted by width, then height; in the arena; none with no_upscale */
    int n;
    bool no_upscale;
    int step;
    int64_t max_area;
} vel_bucket_table;

/* Checks the sizes among the options and lists the buckets there may be. */
vel_status vel_bucket_table_make(vel_ctx *ctx, const vel_data_options *o, vel_arena *a,
                                 vel_bucket_table *out);
/* The bucket of a picture, and the size to which it is scaled before the bucket is cut out of it.
 * A bucket of width 0: the picture is smaller than the smallest bucket. */
void vel_bucket_choose(const vel_bucket_table *table, vel_size picture, vel_size *bucket,
                       vel_size *scaled);
int vel_size_compare(vel_size a, vel_size b); /* by width, then height */

/* ---- pictures shown in another way each time (augment.c) ------------------------------------- */

/* Hues turned by so many steps of 2 degrees; values to the power of gamma; in place, [pixels, 3].
 */
void vel_colors_turn(uint8_t *rgb, int64_t pixels, double by);
void vel_colors_gamma(uint8_t *rgb, int64_t pixels, double gamma);
/* --color_aug: u in 0..1 say whether, which of the two, and by how much. */
void vel_colors_shift(uint8_t *rgb, int64_t pixels, const double u[3]);

typedef struct vel_face {
    int x, y, width, height; /* of its middle, in the picture's pixels */
} vel_face;
/* NAME_x_y_width_height.ending: the length of the path up to the numbers; 0: there are none. */
size_t vel_face_in_name(const char *path, vel_face *out);

typedef struct vel_face_crop {
    vel_size source, bucket;
    vel_face face;
    double range[2]; /* the bucket's smaller side is from range[0] to range[1] times the face */
    bool random_crop;
} vel_face_crop;
/* To which size the picture is scaled, and where the bucket begins in it; u in 0..1. */
void vel_face_window(const vel_face_crop *c, const double u[5], vel_size *scaled, int *x, int *y);

/* ---- the inside of a dataset (dataset.c; read by dataset_describe.c and epoch.c) ------------- */

typedef struct vel_dataset_inner {
    vel_dataset shown;        /* first: a vel_dataset * of ours is a vel_dataset_inner * */
    vel_arena *arena;         /* every string of the dataset */
    vel_bucket_table *tables; /* [subsets; at least one]; in the arena */
    vel_data_how *hows;       /* as many; in the arena */
    int subset;               /* whose pictures are being listed */
    bool reg;                 /* and whether they are of the class */
    int from_ending[2];       /* captions by vel_caption_ending */
    int empty_captions;       /* a file or row is there, but no word in it */
    int cut_captions;         /* files with further lines, which are not read */
    bool class_captions;      /* the folder's words stand in for captions that are missing */
} vel_dataset_inner;

/* ---- regularisation (regular.c) -------------------------------------------------------------- */

/* Of kohya's: how often each picture of the class is shown, and what of them is left out. After the
 * held-out pictures are chosen. */
vel_status vel_regular_settle(vel_dataset_inner *d);
/* Notes that a file is passed over, and why (dataset.c). */
vel_status vel_dataset_skip(vel_dataset_inner *d, const char *path, const char *why);

static inline const vel_dataset_inner *vel_dataset_inside(const vel_dataset *d)
{
    return (const vel_dataset_inner *)d;
}
static inline const vel_bucket_table *vel_sample_table(const vel_dataset *d, const vel_sample *s)
{
    return &vel_dataset_inside(d)->tables[s->subset];
}
/* Which of kohya's data sets; batches are of one. */
static inline int vel_sample_dataset(const vel_dataset *d, const vel_sample *s)
{
    return d->options.n_subsets ? d->options.subsets[s->subset].dataset : 0;
}
static inline vel_size vel_sample_bucket(const vel_sample *s)
{
    return (vel_size){s->width, s->height};
}

#endif
