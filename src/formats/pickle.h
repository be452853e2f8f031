/* pickle.h: files written by torch.save (.ckpt, .pt, .bin), read without executing anything.
 * Private to the formats: everything else sees a vel_safetensors.
 *
 * A pickle is a program for a stack machine that can name and call any function of the machine it
 * is loaded on. Here the program builds plain values and nothing else: every opcode and every name
 * that torch.save does not need for tensors in dictionaries is refused. */
#ifndef VEL_FORMATS_PICKLE_H
#define VEL_FORMATS_PICKLE_H

#include "formats/formats.h"

typedef enum pickle_kind {
    PICKLE_NONE,
    PICKLE_BOOL,
    PICKLE_INT,
    PICKLE_FLOAT,
    PICKLE_TEXT,
    PICKLE_OTHER, /* understood and of no use: bytes, large integers, inert objects */
    PICKLE_TUPLE,
    PICKLE_LIST,
    PICKLE_DICT, /* items: key, value, key, value ... */
    PICKLE_NAME, /* a name of the allow-list */
    PICKLE_STORAGE,
    PICKLE_TENSOR
} pickle_kind;

typedef struct pickle_value pickle_value;
typedef struct pickle_items {
    pickle_value **at;
    int n, room;
} pickle_items;

typedef struct pickle_storage {
    const char *key;
    vel_file_type type; /* U8 for an untyped one */
    bool untyped;
    int64_t count;             /* values */
    int64_t view_first;        /* of the key's storage; -1: all of it */
    const uint8_t *data;       /* set by the container once it is known */
    struct pickle_value *next; /* all storages, for the container */
} pickle_storage;

typedef struct pickle_tensor {
    pickle_value *storage;
    vel_file_type type;
    int64_t first; /* in values of type */
    int rank;
    int64_t dim[8], stride[8];
} pickle_tensor;

struct pickle_value {
    pickle_kind kind;
    bool is_object; /* a dictionary that takes a BUILD's state as entries */
    bool visited;
    union {
        int64_t integer;
        double real;
        const char *text;
        pickle_items items;
        const struct pickle_name *name;
        pickle_storage *storage;
        pickle_tensor *tensor;
    } u;
};

typedef struct pickle_run {
    vel_ctx *ctx;
    vel_arena *arena;
    const char *path;
    pickle_value *storages; /* list by u.storage->next */
    int64_t n_values;
} pickle_run;

/* Runs one pickle at bytes[0..n); *used is its length. *out is in the arena. */
vel_status vel_pickle_run(pickle_run *r, const uint8_t *bytes, size_t n, size_t *used,
                          pickle_value **out);

/* Is it a zip archive or a pickle by its first bytes? */
bool vel_pickle_sniff(const uint8_t *bytes, size_t n);
/* Every tensor of a file written by torch.save is given to add; texts and numbers beside them go to
 * metadata. Tensors are views of bytes, or copies in the arena where they lie scattered. */
typedef vel_status (*vel_pickle_add)(void *user, const vel_file_tensor *t);
vel_status vel_pickle_read(vel_ctx *ctx, vel_arena *arena, const char *path, const uint8_t *bytes,
                           size_t n, vel_pickle_add add, void *user, json_t *metadata);

#endif
