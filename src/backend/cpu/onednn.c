/* onednn.c: oneDNN as the CPU backend's engine: the device, programs of primitives, packed weights.
 *
 * What is computed is said in onednn_ops.c; what differs between oneDNN 2 and 3 in
 * onednn_compat.h. Working memory is the caller's (scratchpad mode "user"), so a plan's memory is
 * exact, and nothing is allocated in a run. oneDNN works with as many threads as OpenMP gives when
 * a kernel is prepared, so the number of threads is set before and stays. */
#include "backend/cpu/onednn.h"
#include "backend/cpu/kernels.h"

enum { SCRATCH_ALIGNMENT = 64 };

/* ---- the device ---- */

vel_status vel_onednn_open(vel_device *d)
{
    dn_device *dn = vel_alloc(d->ctx, sizeof *dn);
    if (!dn)
        return VEL_NO_MEMORY;
    d->onednn = dn;
    dnnl_status_t s = dnnl_engine_create(&dn->engine, dnnl_cpu, 0);
    if (!s)
        s = dnnl_stream_create(&dn->stream, dn->engine, dnnl_stream_default_flags);
    if (s) {
        vel_onednn_close(d);
        return vel_fail(d->ctx, VEL_UNSUPPORTED, "oneDNN %s: no CPU engine (status %d)",
                        vel_onednn_version(), (int)s);
    }
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa();
    dn->too_old = isa == dnnl_cpu_isa_sse41 || isa == dnnl_cpu_isa_avx;
    return VEL_OK;
}

void vel_onednn_close(vel_device *d)
{
    dn_device *dn = dn_of(d);
    if (!dn)
        return;
    while (dn->forms) {
        dn_form *f = dn->forms;
        dn->forms = f->next;
        dn_desc_free(&f->desc);
        vel_free(d->ctx, f->name);
        vel_free(d->ctx, f);
    }
    if (dn->stream)
        dnnl_stream_destroy(dn->stream);
    if (dn->engine)
        dnnl_engine_destroy(dn->engine);
    vel_free(d->ctx, dn);
    d->onednn = NULL;
}

#define TEXT_OF(x) #x
#define VERSION_TEXT(a, b, c) TEXT_OF(a) "." TEXT_OF(b) "." TEXT_OF(c)

const char *vel_onednn_version(void) /* that this was built with */
{
    return VERSION_TEXT(DNNL_VERSION_MAJOR, DNNL_VERSION_MINOR, DNNL_VERSION_PATCH);
}

bool vel_dn_type(vel_dtype t, dnnl_data_type_t *out)
{
    *out = t == VEL_BF16 ? dnnl_bf16 : dnnl_f32;
    return t == VEL_BF16 || t == VEL_F32;
}

const char *vel_dn_impl_name(const_dnnl_primitive_desc_t pd)
{
    const char *name = NULL;
    dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&name);
    return name ? name : "";
}

bool vel_dn_is_reference(const_dnnl_primitive_desc_t pd)
{
    return strstr(vel_dn_impl_name(pd), "ref") != NULL;
}

/* ---- making programs ---- */

dn_program *vel_dn_begin(vel_device *d)
{
    dn_program *p = vel_alloc(d->ctx, sizeof *p);
    if (!p)
        return NULL;
    p->d = d;
    p->residual = -1;
    return p;
}

void vel_dn_check(dn_program *p, dnnl_status_t s)
{
    if (s && !p->status)
        p->status = s == dnnl_out_of_memory ? VEL_NO_MEMORY : VEL_UNSUPPORTED;
}

static int add_slot(dn_program *p, dn_view_t desc, enum dn_where where, int index, size_t offset)
{
    if (!p->status && p->n_slots == DN_MAX_SLOTS)
        p->status = VEL_BUG;
    if (p->status)
        return 0;
    dn_slot *s = &p->slots[p->n_slots];
    *s = (dn_slot){.where = where, .index = index, .offset = offset};
    dnnl_status_t made =
        dnnl_memory_create(&s->memory, desc, dn_of(p->d)->engine, DNNL_MEMORY_NONE);
    if (made) {
        vel_dn_check(p, made);
        return 0;
    }
    return p->n_slots++;
}

int vel_dn_input(dn_program *p, dn_view_t desc, int input)
{
    return add_slot(p, desc, DN_IN, input, 0);
}

int vel_dn_output(dn_program *p, dn_view_t desc)
{
    return add_slot(p, desc, DN_OUT, 0, 0);
}

static size_t aligned(size_t bytes)
{
    return (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
}

int vel_dn_buffer(dn_program *p, dn_view_t desc)
{
    int slot = add_slot(p, desc, DN_BUFFER, 0, p->buffers);
    if (!p->status)
        p->buffers += aligned(dnnl_memory_desc_get_size(desc));
    return slot;
}

void vel_dn_step(dn_program *p, enum dn_when when, dnnl_primitive_desc_t pd, const dn_arg *args,
                 int n)
{
    if (!p->status && (p->n_steps == DN_MAX_STEPS || n >= DN_MAX_ARGS))
        p->status = VEL_BUG;
    if (!p->status) {
        dn_step *s = &p->steps[p->n_steps];
        *s = (dn_step){.when = when};
        dnnl_status_t made = dnnl_primitive_create(&s->primitive, pd);
        vel_dn_check(p, made);
        p->n_steps += !made;
        for (int i = 0; i < n && !made; i++)
            s->args[s->n_args++] = (dnnl_exec_arg_t){args[i].name, p->slots[args[i].slot].memory};
        dn_view_t pad = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        size_t bytes = made ? 0 : dnnl_memory_desc_get_size(pad);
        if (bytes) {
            int slot = add_slot(p, pad, DN_PAD, 0, 0);
            s->args[s->n_args++] = (dnnl_exec_arg_t){DNNL_ARG_SCRATCHPAD, p->slots[slot].memory};
            p->pad = VEL_MAX(p->pad, bytes);
        }
    }
    dnnl_primitive_desc_destroy(pd);
}

void vel_dn_reorder(dn_program *p, enum dn_when when, dn_view_t from, int from_slot, dn_view_t to,
                    int to_slot)
{
    if (p->status)
        return;
    dnnl_engine_t e = dn_of(p->d)->engine;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_status_t s = dnnl_primitive_attr_create(&attr);
    if (!s)
        s = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    if (!s)
        s = dnnl_reorder_primitive_desc_create(&pd, from, e, to, e, attr);
    if (attr)
        dnnl_primitive_attr_destroy(attr);
    vel_dn_check(p, s);
    if (s)
        return;
    vel_dn_step(p, when, pd, (dn_arg[]){{DNNL_ARG_FROM, from_slot}, {DNNL_ARG_TO, to_slot}}, 2);
}

void vel_dn_discard(dn_program *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->n_steps; i++)
        dnnl_primitive_destroy(p->steps[i].primitive);
    for (int i = 0; i < p->n_slots; i++)
        dnnl_memory_destroy(p->slots[i].memory);
    vel_free(p->d->ctx, p);
}

vel_status vel_dn_end(dn_program *p, vel_kernel *k)
{
    if (p->status) {
        vel_status status = p->status;
        vel_dn_discard(p);
        return status;
    }
    k->name = p->name;
    k->scratch = p->buffers + p->pad;
    k->inplace = p->residual;
    k->state = p;
    if (p->form) { /* one with a name */
        k->layout[p->form_input] = p->form->name;
        k->packed_bytes[p->form_input] = dnnl_memory_desc_get_size(dn_view(&p->form->desc));
    }
    return VEL_OK;
}

void vel_dn_release(vel_device *d, vel_kernel *k)
{
    (void)d;
    vel_dn_discard(k->state);
    k->state = NULL;
}

/* ---- running ---- */

static void *slot_at(const dn_program *p, const dn_slot *s, const vel_launch *l)
{
    switch (s->where) {
    case DN_IN:
        return l->in[s->index];
    case DN_OUT:
        return l->out[s->index];
    case DN_BUFFER:
        return (char *)l->scratch + s->offset;
    case DN_PAD:
        return (char *)l->scratch + p->buffers;
    }
    return NULL;
}

vel_status vel_dn_run(vel_device *d, const vel_launch *l)
{
    const dn_program *p = l->kernel->state;
    dnnl_stream_t stream = dn_of(d)->stream;
    dnnl_status_t s = dnnl_success;
    for (int i = 0; i < p->n_slots && !s; i++)
        s = dnnl_memory_set_data_handle(p->slots[i].memory, slot_at(p, &p->slots[i], l));
    if (p->turn.outputs)
        vel_cpu_own_table(d)->turn_weight(l->in[p->form_input], p->turn.outputs, p->turn.inputs,
                                          p->turn.taps, slot_at(p, &p->slots[p->turn.slot], l),
                                          d->threads);
    bool aliased = p->residual >= 0 && l->in[p->residual] == l->out[0];
    for (int i = 0; i < p->n_steps && !s; i++) {
        const dn_step *step = &p->steps[i];
        if (step->when != (aliased ? DN_APART : DN_ALIASED))
            s = dnnl_primitive_execute(step->primitive, stream, step->n_args, step->args);
    }
    if (!s)
        s = dnnl_stream_wait(stream);
    return s ? vel_fail(d->ctx, VEL_BUG, "%s: oneDNN failed with status %d", p->name, (int)s)
             : VEL_OK;
}

/* ---- packed weights ---- */

const dn_form *vel_dn_find_form(vel_device *d, const dn_form_key *key)
{
    const dn_form *f = dn_of(d)->forms;
    while (f && memcmp(&f->key, key, sizeof *key))
        f = f->next;
    return f;
}

dnnl_status_t vel_dn_plain_form(dn_desc *out, const dn_form_key *key, vel_dtype dtype)
{
    dnnl_data_type_t type;
    if (!vel_dn_type(dtype, &type))
        return dnnl_unimplemented;
    if (key->kind == 4)
        return dn_desc_tag(out, 4, key->dim, type, dnnl_oihw);
    return dn_desc_tag(out, 2, (dnnl_dims_t){key->dim[1], key->dim[0]}, type, dnnl_ba);
}

/* The name says all that decides the bytes: type, padded sizes, strides and blocks of the weight's
 * own axes in order. A product's form counts its axes [in, out], so they are turned round. */
static char *form_name(vel_ctx *ctx, const dn_form_key *key, dn_view_t desc)
{
    dn_blocking b;
    if (!dn_blocking_of(desc, &b))
        return NULL;
    vel_text t;
    vel_text_init(&t, ctx);
    vel_text_addf(&t, "%s", vel_dtype_name((vel_dtype)key->dtype));
    for (int i = 0; i < b.ndims; i++) {
        int axis = key->kind == 2 ? 1 - i : i;
        vel_text_addf(&t, "%c%" PRId64 "/%" PRId64, i ? 'x' : ' ', (int64_t)b.padded[axis],
                      (int64_t)b.stride[axis]);
    }
    for (int i = 0; i < b.inner; i++) {
        int axis = key->kind == 2 ? 1 - (int)b.inner_axis[i] : (int)b.inner_axis[i];
        vel_text_addf(&t, "%c%" PRId64 "%c", i ? '.' : ' ', (int64_t)b.inner_size[i], 'a' + axis);
    }
    if (t.failed) {
        vel_text_finish(&t);
        return NULL;
    }
    return t.s;
}

const dn_form *vel_dn_add_form(vel_device *d, const dn_form_key *key, dn_view_t desc)
{
    dn_form *f = vel_alloc(d->ctx, sizeof *f);
    dn_desc plain = {0};
    if (!f || vel_dn_plain_form(&plain, key, (vel_dtype)key->dtype) || dn_desc_copy(&f->desc, desc))
        goto failed;
    f->key = *key;
    if (!dnnl_memory_desc_equal(desc, dn_view(&plain))) {
        f->name = form_name(d->ctx, key, desc);
        if (!f->name)
            goto failed;
    }
    dn_desc_free(&plain);
    f->next = dn_of(d)->forms;
    dn_of(d)->forms = f;
    return f;
failed:
    dn_desc_free(&plain);
    if (f)
        dn_desc_free(&f->desc);
    vel_free(d->ctx, f);
    return NULL;
}

vel_status vel_dn_pack(vel_device *d, const vel_kernel *k, const vel_node *n,
                       const vel_type *in_type, int input, const void *plain, void *packed)
{
    const dn_program *p = k->state;
    dnnl_engine_t e = dn_of(d)->engine;
    dn_desc from = {0};
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t reorder = NULL;
    dnnl_memory_t memory[2] = {NULL};
    dn_view_t to = dn_view(&p->form->desc);
    dnnl_status_t s = vel_dn_plain_form(&from, &p->form->key, in_type[input].dtype);
    if (!s)
        s = dnnl_reorder_primitive_desc_create(&pd, dn_view(&from), e, to, e, NULL);
    if (!s)
        s = dnnl_primitive_create(&reorder, pd);
    if (!s)
        s = dnnl_memory_create(&memory[0], dn_view(&from), e, (void *)(uintptr_t)plain);
    if (!s)
        s = dnnl_memory_create(&memory[1], to, e, packed);
    if (!s)
        s = dnnl_primitive_execute(
            reorder, dn_of(d)->stream, 2,
            (dnnl_exec_arg_t[]){{DNNL_ARG_FROM, memory[0]}, {DNNL_ARG_TO, memory[1]}});
    if (!s)
        s = dnnl_stream_wait(dn_of(d)->stream);
    for (int i = 0; i < 2; i++)
        if (memory[i])
            dnnl_memory_destroy(memory[i]);
    if (reorder)
        dnnl_primitive_destroy(reorder);
    if (pd)
        dnnl_primitive_desc_destroy(pd);
    if (s)
        vel_fail(d->ctx, VEL_BUG, "%s: oneDNN cannot pack this %s weight (status %d)",
                 n->path ? n->path : "", vel_dtype_name(in_type[input].dtype), (int)s);
    dn_desc_free(&from);
    return s ? VEL_BUG : VEL_OK;
}
