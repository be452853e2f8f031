/* adapter_hub.h: shared by the parts of `velatura adapter`; private to src/. */
#ifndef VEL_ADAPTER_HUB_H
#define VEL_ADAPTER_HUB_H

#include "low_rank.h"
#include "params.h"

typedef struct vel_hub {
    vel_ctx *ctx;
    const vel_adapter_options *o;
    vel_model *m;         /* its modules, and its weights where DoRA asks for them */
    bool known_only;      /* m is of known sizes: it has no weights */
    vel_engine **engines; /* one for each thread of a parallel region; made when first needed */
    int n_engines;
    const vel_known_module *known;
    int n_known;
    vel_text *out;
} vel_hub;

/* "style.safetensors:0.8,other.safetensors": files with strengths. */
typedef struct vel_hub_list {
    struct vel_hub_entry {
        char *path;
        double weight;
        vel_adapter_file *file;
    } at[16];
    int n;
} vel_hub_list;
vel_status vel_hub_list_read(vel_hub *h, const char *text, vel_hub_list *list);
void vel_hub_list_finish(vel_hub *h, vel_hub_list *list);

/* The calling thread's engine; borrowed. */
vel_status vel_hub_engine(vel_hub *h, vel_engine **out);
/* strength (W' - W) of a module, in the weight's shape; callers may be several threads. base: W, or
 * NULL: read from the model where it is needed. */
vel_status vel_hub_change_into(vel_hub *h, const vel_adapter_module *m, const float *base,
                               double strength, float *out);
/* The same in memory of its own; *out is owned. */
vel_status vel_hub_change(vel_hub *h, const vel_adapter_module *m, const float *base,
                          double strength, float **out);
int64_t vel_hub_count(const vel_adapter_module *m); /* values of the weight */
/* Is the change a product of two thin matrices? */
bool vel_hub_is_product(const vel_adapter_module *m);
/* The model weight that a path with ".weight" or ".bias" names, as float32; *out is owned. */
vel_status vel_hub_weight(vel_hub *h, vel_model *m, const char *path, const char *leaf, float **out,
                          int64_t *n);
/* Writes f as the settings say. */
vel_status vel_hub_write(vel_hub *h, const vel_adapter_file *f, const char *path,
                         const json_t *metadata);
/* An empty adapter that modules are put into; vel_adapter_file_destroy. */
vel_status vel_hub_new_file(vel_hub *h, int room, vel_adapter_file **out);

vel_status vel_hub_convert(vel_hub *h);
vel_status vel_hub_verify(vel_hub *h);
vel_status vel_hub_merge(vel_hub *h); /* into the model */
vel_status vel_hub_join(vel_hub *h);  /* into one adapter */
vel_status vel_hub_extract(vel_hub *h);
vel_status vel_hub_resize(vel_hub *h);
vel_status vel_hub_bake(vel_hub *h);
vel_status vel_hub_embedding(vel_hub *h);

#endif
