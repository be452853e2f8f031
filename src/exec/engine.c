/* engine.c: a device with what outlives plans: packed weights, trainable values, the arena. */
#include "exec/engine.h"

#include "base/quantise.h"

vel_status vel_engine_create(vel_ctx *ctx, const char *device, vel_engine **out)
{
    vel_engine *e = vel_alloc(ctx, sizeof *e);
    if (!e)
        return VEL_NO_MEMORY;
    e->ctx = ctx;
    vel_status st = vel_backend_find(ctx, device, &e->backend, &e->device);
    if (st) {
        vel_engine_destroy(e);
        return st;
    }
    *out = e;
    return VEL_OK;
}

static void free_shadows(vel_engine *e)
{
    for (int type = 0; type < VEL_I32; type++) {
        e->backend->free(e->device, e->shadow[type]);
        e->shadow[type] = NULL;
    }
}

static void free_weight(vel_engine *e, weight_entry *w)
{
    if (w->host)
        e->backend->free_host(e->device, w->data);
    else if (w->pool)
        vel_pool_give(e, w->pool);
    else if (!w->mapped)
        e->backend->free(e->device, w->data);
    vel_free(e->ctx, w->path);
    vel_free(e->ctx, w);
}

void vel_engine_destroy(vel_engine *e)
{
    if (!e)
        return;
    vel_engine_drop_weights(e, "");
    if (e->device) {
        vel_engine_end_loading(e);
        vel_engine_free_optimizer(e);
        float *vectors[] = {e->value, e->grad, e->sum, e->average};
        for (int i = 0; i < VEL_COUNT(vectors); i++)
            e->backend->free(e->device, vectors[i]);
        free_shadows(e);
        e->backend->free(e->device, e->arena);
        e->backend->close(e->device);
    }
    for (int i = 0; i < e->n_trainables; i++)
        vel_free(e->ctx, (char *)e->trainables[i].path);
    vel_free(e->ctx, e->trainables);
    vel_free(e->ctx, e);
}

vel_ctx *vel_engine_ctx(vel_engine *e)
{
    return e->ctx;
}

int64_t vel_engine_in_use(vel_engine *e)
{
    return e->backend->in_use ? e->backend->in_use(e->device) : 0;
}

bool vel_engine_can_stream(const vel_engine *e)
{
    return e->backend->fetch;
}

void vel_engine_stream(vel_engine *e, int share)
{
    e->streamed = share;
}

const char *vel_engine_describe(vel_engine *e)
{
    return e->backend->describe(e->device);
}

const char *vel_engine_backend(vel_engine *e)
{
    return e->backend->name;
}

vel_dtype vel_engine_best_compute(vel_engine *e)
{
    return e->backend->best_compute(e->device);
}

bool vel_engine_computes(vel_engine *e, vel_dtype t)
{
    return e->backend->computes ? e->backend->computes(e->device, t)
                                : t == vel_engine_best_compute(e);
}

/* ---- frozen weights -------------------------------------------------------------------------- */

vel_status vel_engine_add_source(vel_engine *e, vel_source_fn find, void *user)
{
    if (e->n_sources == MAX_SOURCES)
        return vel_fail(e->ctx, VEL_BUG, "more than %d sources of weights", MAX_SOURCES);
    e->sources[e->n_sources++] = (source){find, user};
    return VEL_OK;
}

void vel_engine_remove_source(vel_engine *e, vel_source_fn find, void *user)
{
    for (int i = 0; i < e->n_sources; i++)
        if (e->sources[i].find == find && e->sources[i].user == user) {
            e->sources[i] = e->sources[--e->n_sources];
            return;
        }
}

void vel_engine_drop_weights(vel_engine *e, const char *prefix)
{
    for (int b = 0; b < WEIGHT_BUCKETS; b++)
        for (weight_entry **at = &e->weights[b]; *at;) {
            weight_entry *w = *at;
            if (!vel_has_prefix(w->path, prefix)) {
                at = &w->next;
                continue;
            }
            *at = w->next;
            e->weight_bytes -= w->host ? 0 : (int64_t)w->bytes;
            free_weight(e, w);
        }
}

int64_t vel_engine_weight_bytes(const vel_engine *e)
{
    return e->weight_bytes;
}

static vel_status find_source(vel_engine *e, const vel_node *leaf, vel_source_tensor *t)
{
    char have[96], want[96];
    const char *looked = NULL;
    for (int i = 0; i < e->n_sources; i++) {
        memset(t, 0, sizeof *t);
        if (!e->sources[i].find(e->sources[i].user, leaf->path, t)) {
            looked = t->file ? t->file : looked;
            continue;
        }
        /* A 1x1 convolution may be stored as a matrix, and the other way round. */
        bool same = vel_shape_count(t->shape) == vel_shape_count(leaf->out[0].shape) &&
                    t->shape.rank > 0 && t->shape.dim[0] == leaf->out[0].shape.dim[0];
        if (same)
            return VEL_OK;
        return vel_fail(e->ctx, VEL_BAD_FILE, "%s: tensor '%s' has shape %s, the model needs %s",
                        t->file ? t->file : "weights", leaf->path, vel_shape_text(t->shape, have),
                        vel_shape_text(leaf->out[0].shape, want));
    }
    return vel_fail(
        e->ctx, VEL_BAD_FILE,
        "%s: has no tensor '%s' %s: the file is incomplete, or the config.json beside it "
        "belongs to another model",
        looked ? looked : "the model's files", leaf->path,
        vel_shape_text(leaf->out[0].shape, want));
}

vel_dtype vel_engine_stored(const vel_engine *e, const vel_node *leaf)
{
    vel_source_tensor t = {0};
    for (int i = 0; i < e->n_sources; i++, memset(&t, 0, sizeof t))
        if (e->sources[i].find(e->sources[i].user, leaf->path, &t))
            return t.data && (t.dtype == VEL_F16 || t.dtype == VEL_BF16) ? t.dtype : VEL_F32;
    return VEL_F32;
}

static void store_plain(vel_dtype type, const float *from, void *to, int64_t at, int64_t n)
{
    if (type == VEL_F32)
        memcpy((float *)to + at, from, (size_t)n * sizeof *from);
    else if (type == VEL_BF16)
        vel_floats_bf16(from, (vel_bf16 *)to + at, n);
    else
        for (int64_t i = 0; i < n; i++)
            ((vel_f16 *)to)[at + i] = vel_f32_f16(from[i]);
}

/* Row-major values in the leaf's type, in host memory that the caller frees. */
static vel_status read_plain(vel_engine *e, const vel_node *leaf, const vel_source_tensor *t,
                             void **out)
{
    enum { CHUNK = 4096 };
    int64_t n = vel_shape_count(leaf->out[0].shape), chunks = (n + CHUNK - 1) / CHUNK, bad = chunks;
    vel_dtype type = leaf->out[0].dtype;
    void *plain = vel_alloc(e->ctx, (size_t)n * (size_t)vel_dtype_bytes(type));
    if (!plain)
        return VEL_NO_MEMORY;
    *out = plain;
#pragma omp parallel for schedule(static) reduction(min : bad) if (chunks > 8)
    for (int64_t c = 0; c < chunks; c++) {
        float values[CHUNK];
        int64_t at = c * CHUNK, some = VEL_MIN(n - at, CHUNK);
        t->read(t->user, at, some, values);
        if (!vel_all_finite(values, some))
            bad = VEL_MIN(bad, c);
        store_plain(type, values, plain, at, some);
    }
    if (t->data) /* from here on the packed form is read */
        vel_map_forget(t->data, (size_t)n * (size_t)vel_dtype_bytes(t->dtype));
    if (bad == chunks)
        return VEL_OK;
    float values[CHUNK];
    int64_t at = bad * CHUNK, i = 0;
    t->read(t->user, at, VEL_MIN(n - at, CHUNK), values);
    while (isfinite(values[i]))
        i++;
    return vel_fail(e->ctx, VEL_BAD_FILE,
                    "%s: tensor '%s' holds %f at element %" PRId64 ": the file is damaged", t->file,
                    leaf->path, (double)values[i], at + i);
}

static bool same_layout(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

static weight_entry **weight_bucket(vel_engine *e, const char *path)
{
    return &e->weights[vel_hash64(path, strlen(path), 0) % WEIGHT_BUCKETS];
}

void vel_engine_end_loading(vel_engine *e)
{
    if (e->packing)
        e->backend->free(e->device, e->packing);
    e->packing = NULL;
    e->packing_bytes = 0;
    vel_pools_close(e);
}

/* Where a weight is packed: its place on the device, or room that the next one uses again. */
static vel_status room_for(vel_engine *e, weight_entry *w)
{
    if (!w->host) {
        w->data = vel_pool_take(e, w->path, w->bytes, &w->pool);
        return w->data ? VEL_OK : e->backend->alloc(e->device, w->bytes, &w->data);
    }
    VEL_TRY(e->backend->alloc_host(e->device, w->bytes, &w->data));
    if (w->bytes <= e->packing_bytes)
        return VEL_OK;
    e->backend->free(e->device, e->packing);
    e->packing = NULL;
    e->packing_bytes = 0;
    size_t bytes = VEL_MAX(w->bytes, VEL_PACKING_ROOM);
    VEL_TRY(e->backend->alloc(e->device, bytes, &e->packing));
    e->packing_bytes = bytes;
    return VEL_OK;
}

vel_status vel_engine_quantise(vel_engine *e, const char *name)
{
    int kind = vel_quant_find(name);
    if (kind < 0)
        return vel_fail(e->ctx, VEL_BAD_VALUE, "base_quant: '%s' is not one of %s", name,
                        VEL_QUANTS);
    e->quant = kind;
    return VEL_OK;
}

int vel_engine_quant(const vel_engine *e)
{
    return e->quant;
}

static weight_entry *find_weight(vel_engine *e, const char *path, vel_dtype dtype,
                                 const char *layout)
{
    for (weight_entry *w = *weight_bucket(e, path); w; w = w->next)
        if (strcmp(w->path, path) == 0 && w->dtype == dtype && same_layout(w->layout, layout))
            return w;
    return NULL;
}

bool vel_engine_has_weight(vel_engine *e, const weight_use *use)
{
    return find_weight(e, use->path, use->dtype, *use->layout ? use->layout : NULL);
}

/* Host memory onto the device, as a new entry. */
static vel_status keep_plain(vel_engine *e, const char *path, vel_dtype dtype, const void *from,
                             size_t bytes)
{
    weight_entry *w = vel_alloc(e->ctx, sizeof *w), **bucket = weight_bucket(e, path);
    if (!w)
        return VEL_NO_MEMORY;
    *w = (weight_entry){.path = vel_strdup(e->ctx, path), .dtype = dtype, .bytes = bytes};
    w->host = vel_engine_streams(e, path, (int64_t)bytes);
    vel_status st = w->path ? room_for(e, w) : VEL_NO_MEMORY;
    if (st) {
        free_weight(e, w);
        return st;
    }
    if (w->host)
        memcpy(w->data, from, bytes);
    else
        e->backend->write(e->device, w->data, from, bytes);
    w->next = *bucket;
    *bucket = w;
    e->weight_bytes += w->host ? 0 : (int64_t)bytes;
    return VEL_OK;
}

/* Codes and scales of the weight at path, which is read and coded for both. */
static vel_status load_coded(vel_engine *e, char *path, int kind)
{
    vel_source_tensor t = {0};
    vel_node whole = {.op = VEL_OP_weight, .n_out = 1, .path = path};
    bool found = false;
    for (int i = 0; i < e->n_sources && !found; i++) {
        memset(&t, 0, sizeof t);
        found = e->sources[i].find(e->sources[i].user, path, &t);
    }
    whole.out[0] = (vel_type){VEL_F32, found ? t.shape : VEL_SHAPE(1)};
    VEL_TRY(find_source(e, &whole, &t));
    int64_t rows = t.shape.dim[0], columns = vel_shape_count(t.shape) / rows;
    size_t code_bytes = 4 * (size_t)vel_quant_words((vel_quant)kind, rows, columns);
    size_t scale_bytes = 4 * (size_t)vel_quant_scales((vel_quant)kind, rows, columns);
    void *plain = NULL;
    uint8_t *codes = vel_alloc(e->ctx, code_bytes + scale_bytes);
    vel_status st = codes ? read_plain(e, &whole, &t, &plain) : VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = vel_quantise(e->ctx, (vel_quant)kind, plain, rows, columns, codes,
                          (float *)(codes + code_bytes));
    vel_free(e->ctx, plain);
    char *names[2] = {vel_strf(e->ctx, "%s:%s.codes", path, vel_quant_name(kind)),
                      vel_strf(e->ctx, "%s:%s.scales", path, vel_quant_name(kind))};
    if (st == VEL_OK && !(names[0] && names[1]))
        st = VEL_NO_MEMORY;
    if (st == VEL_OK)
        st = keep_plain(e, names[0], VEL_I32, codes, code_bytes);
    if (st == VEL_OK)
        st = keep_plain(e, names[1], VEL_F32, codes + code_bytes, scale_bytes);
    vel_free(e->ctx, names[0]);
    vel_free(e->ctx, names[1]);
    vel_free(e->ctx, codes);
    return st;
}

static vel_status coded_weight(vel_engine *e, const vel_node *leaf, size_t base, int kind,
                               void **data)
{
    weight_entry *w = find_weight(e, leaf->path, leaf->out[0].dtype, NULL);
    if (!w) {
        char *path = vel_strndup(e->ctx, leaf->path, base);
        if (!path)
            return VEL_NO_MEMORY;
        vel_status st = load_coded(e, path, kind);
        vel_free(e->ctx, path);
        VEL_TRY(st);
        w = find_weight(e, leaf->path, leaf->out[0].dtype, NULL);
    }
    size_t bytes = 4 * (size_t)vel_shape_count(leaf->out[0].shape);
    if (!w || w->bytes != bytes)
        return vel_fail(e->ctx, VEL_BAD_FILE, "tensor '%.*s' has another size than the model's",
                        (int)base, leaf->path);
    *data = w->data;
    return VEL_OK;
}

/* Puts w's values, plain, where it has its room: as they are, or packed as kernel k wants input i
 * of reader. What stays with the host is packed by the device on its way. */
static vel_status place_weight(vel_engine *e, const weight_entry *w, const void *plain,
                               const vel_kernel *k, const vel_node *reader, const vel_type *in_type,
                               int i)
{
    void *to = w->host ? e->packing : w->data;
    if (w->layout)
        VEL_TRY(e->backend->pack(e->device, k, reader, in_type, i, plain, to));
    else if (!w->host)
        e->backend->write(e->device, to, plain, w->bytes);
    if (w->host && w->layout)
        e->backend->read(e->device, w->data, to, w->bytes);
    else if (w->host)
        memcpy(w->data, plain, w->bytes);
    return VEL_OK;
}

vel_status vel_engine_weight(vel_engine *e, const vel_node *leaf, const vel_kernel *k,
                             const vel_node *reader, const vel_type *in_type, int i, void **data)
{
    const char *layout = k ? k->layout[i] : NULL;
    weight_entry **bucket = weight_bucket(e, leaf->path);
    size_t base;
    int kind;
    bool scales;
    if (vel_quant_leaf(leaf->path, &base, &kind, &scales))
        return coded_weight(e, leaf, base, kind, data);
    weight_entry *known = find_weight(e, leaf->path, leaf->out[0].dtype, layout);
    if (known) {
        *data = known->data;
        return VEL_OK;
    }
    vel_source_tensor t;
    VEL_TRY(find_source(e, leaf, &t));
    size_t plain_bytes =
        (size_t)vel_shape_count(leaf->out[0].shape) * (size_t)vel_dtype_bytes(leaf->out[0].dtype);
    size_t bytes = layout ? k->packed_bytes[i] : plain_bytes;
    weight_entry *w = vel_alloc(e->ctx, sizeof *w);
    void *plain = NULL;
    if (!w)
        return VEL_NO_MEMORY;
    *w = (weight_entry){.dtype = leaf->out[0].dtype, .layout = layout, .bytes = bytes};
    w->path = vel_strdup(e->ctx, leaf->path);
    vel_status st = w->path ? read_plain(e, leaf, &t, &plain) : VEL_NO_MEMORY;
    w->host = vel_engine_streams(e, leaf->path, (int64_t)bytes);
    if (st == VEL_OK)
        st = room_for(e, w);
    if (st == VEL_OK)
        st = place_weight(e, w, plain, k, reader, in_type, i);
    vel_free(e->ctx, plain);
    if (st) {
        free_weight(e, w);
        return st;
    }
    w->next = *bucket;
    *bucket = w;
    e->weight_bytes += w->host ? 0 : (int64_t)bytes;
    *data = w->data;
    return VEL_OK;
}

/* ---- trainable values ------------------------------------------------------------------------ */

const vel_trainable *vel_engine_find_trainable(const vel_engine *e, const char *path)
{
    for (int i = 0; i < e->n_trainables; i++)
        if (strcmp(e->trainables[i].path, path) == 0)
            return &e->trainables[i];
    return NULL;
}

/* Room for count values in the flat vectors; what is there is kept. */
static vel_status grow_vectors(vel_engine *e, int64_t count)
{
    float **vectors[] = {&e->value, &e->grad, &e->sum, &e->average};
    for (int i = 0; i < VEL_COUNT(vectors); i++) {
        if (i >= 2 && !*vectors[i])
            continue; /* not in use yet */
        void *grown;
        VEL_TRY(e->backend->alloc(e->device, (size_t)count * sizeof(float), &grown));
        if (*vectors[i]) {
            size_t old = (size_t)e->trainable_count * sizeof(float);
            void *host = vel_alloc(e->ctx, old);
            if (!host) {
                e->backend->free(e->device, grown);
                return VEL_NO_MEMORY;
            }
            e->backend->read(e->device, host, *vectors[i], old);
            e->backend->write(e->device, grown, host, old);
            vel_free(e->ctx, host);
            e->backend->free(e->device, *vectors[i]);
        }
        *vectors[i] = grown;
    }
    e->trainable_room = count;
    free_shadows(e);
    return VEL_OK;
}

vel_status vel_engine_need_shadow(vel_engine *e, vel_dtype type)
{
    return e->shadow[type]
               ? VEL_OK
               : e->backend->alloc(e->device,
                                   (size_t)e->trainable_room * (size_t)vel_dtype_bytes(type),
                                   &e->shadow[type]);
}

vel_status vel_engine_add_trainables(vel_engine *e, const vel_graph *g)
{
    int64_t total = e->trainable_count;
    int first = e->n_trainables;
    for (int32_t id = 1; id < vel_graph_size(g); id++) {
        const vel_node *n = vel_node_at(g, id);
        if (n->op != VEL_OP_param || vel_engine_find_trainable(e, n->path))
            continue;
        VEL_TRY(vel_grow(e->ctx, &e->trainables, (size_t)e->n_trainables + 1));
        int64_t count = vel_shape_count(n->out[0].shape);
        char *path = vel_strdup(e->ctx, n->path);
        if (!path)
            return VEL_NO_MEMORY;
        e->trainables[e->n_trainables++] = (vel_trainable){path, n->out[0].shape, total, count};
        total += (count + 31) / 32 * 32; /* each starts on a cache line, in 16 bits too */
    }
    if (e->n_trainables == first)
        return VEL_OK;
    VEL_TRY(grow_vectors(e, total));
    e->trainable_count = total;
    return VEL_OK;
}

int vel_engine_trainables(const vel_engine *e)
{
    return e->n_trainables;
}

const vel_trainable *vel_engine_trainable_at(const vel_engine *e, int i)
{
    return &e->trainables[i];
}

int64_t vel_engine_trainable_count(const vel_engine *e)
{
    int64_t n = 0;
    for (int i = 0; i < e->n_trainables; i++)
        n += e->trainables[i].count;
    return n;
}

static float **vector_of(vel_engine *e, char which)
{
    switch (which) {
    case 'v':
        return &e->value;
    case 'g':
        return &e->grad;
    case 'a':
        return &e->average;
    default:
        return &e->sum;
    }
}

static vel_status need_vector(vel_engine *e, float **vector)
{
    return *vector ? VEL_OK
                   : e->backend->alloc(e->device, (size_t)e->trainable_room * sizeof(float),
                                       (void **)vector);
}

void vel_engine_read_trainables(vel_engine *e, char which, int64_t first, int64_t n, float *out)
{
    float *vector = *vector_of(e, which);
    if (vector)
        e->backend->read(e->device, out, vector + first, (size_t)n * sizeof *out);
    else
        memset(out, 0, (size_t)n * sizeof *out);
}

void vel_engine_write_trainables(vel_engine *e, char which, int64_t first, int64_t n,
                                 const float *in)
{
    float **vector = vector_of(e, which);
    e->changes++;
    if (need_vector(e, vector) == VEL_OK)
        e->backend->write(e->device, *vector + first, in, (size_t)n * sizeof *in);
}

vel_status vel_engine_load_trainable(vel_engine *e, int i)
{
    const vel_trainable *t = &e->trainables[i];
    vel_node leaf = {.op = VEL_OP_param, .n_out = 1, .path = t->path};
    leaf.out[0] = (vel_type){VEL_F32, t->shape};
    vel_source_tensor from;
    void *plain = NULL;
    e->changes++;
    VEL_TRY(find_source(e, &leaf, &from));
    vel_status st = read_plain(e, &leaf, &from, &plain);
    if (st == VEL_OK)
        e->backend->write(e->device, e->value + t->offset, plain, (size_t)t->count * sizeof(float));
    vel_free(e->ctx, plain);
    return st;
}

vel_status vel_engine_average(vel_engine *e, double decay)
{
    if (!e->average) {
        VEL_TRY(need_vector(e, &e->average));
        decay = 0;
    }
    e->backend->add(e->device, e->average, e->value, (float)(1 - decay), (float)decay,
                    e->trainable_count);
    return VEL_OK;
}

bool vel_engine_has_average(const vel_engine *e)
{
    return e->average;
}

vel_status vel_engine_accumulate(vel_engine *e, bool first)
{
    VEL_TRY(need_vector(e, &e->sum));
    e->backend->add(e->device, e->sum, e->grad, 1, first ? 0 : 1, e->trainable_count);
    return VEL_OK;
}

vel_status vel_engine_take_accumulated(vel_engine *e, int n_runs)
{
    VEL_TRY(need_vector(e, &e->sum));
    e->backend->add(e->device, e->grad, e->sum, 1.0f / (float)n_runs, 0, e->trainable_count);
    return VEL_OK;
}

double vel_engine_gradient_norm(vel_engine *e)
{
    return sqrt(e->backend->sum_squares(e->device, e->grad, e->trainable_count));
}

/* ---- arena ----------------------------------------------------------------------------------- */

int64_t vel_engine_arena_bytes(const vel_engine *e)
{
    return e->arena_bytes;
}

void vel_engine_rest(vel_engine *e)
{
    if (!e->backend->in_use)
        return; /* the host's memory is had again at less than its price */
    e->backend->free(e->device, e->arena);
    e->arena = NULL;
    e->arena_bytes = 0;
}

void vel_engine_keep_recordings(vel_engine *e, int most)
{
    e->most_recordings = most;
}

int64_t vel_engine_overhead(vel_engine *e)
{
    return e->backend->overhead ? e->backend->overhead(e->device, 0, false) : 0;
}

vel_status vel_engine_reserve(vel_engine *e, int64_t arena_bytes)
{
    if (arena_bytes <= e->arena_bytes)
        return VEL_OK;
    e->backend->free(e->device, e->arena);
    e->arena = NULL;
    e->arena_bytes = 0;
    VEL_TRY(e->backend->alloc(e->device, (size_t)arena_bytes, &e->arena));
    e->arena_bytes = arena_bytes;
    return VEL_OK;
}
