/* cast.c: mixed precision as a pass. The types column of ops.def says what each op wants ('c' the
 * compute type, 'f' float32, 'i' int32, 't' as the first input, 'a' anything) and gives; where a
 * value is wanted in another type a cast node is put in, once per value and type. Frozen weights
 * become leaves of the wanted type instead, since files are converted at load anyway. */
#include "passes/copy.h"

typedef struct caster {
    vel_copier c;
    vel_dtype compute;
    vel_ref *as_f32,
        *as_compute; /* [dst node] first output in the other type, made at first want */
    int32_t room;
} caster;

/* The letter for input i, or for output i when after_arrow. */
static char type_letter(const char *types, int i, bool after_arrow)
{
    if (after_arrow)
        types = strchr(types, '>') + 1;
    for (; *types && *types != '>'; types++) {
        if (*types == '?')
            continue;
        if (i-- == 0)
            return *types;
    }
    return 'a';
}

static vel_dtype wanted_type(const caster *k, char letter, vel_dtype now, vel_dtype first)
{
    switch (letter) {
    case 'c':
        return k->compute;
    case 'f':
        return VEL_F32;
    case 'i':
        return VEL_I32;
    case 't':
        return first;
    default:
        return now;
    }
}

/* r of dst in the type, through a cast node if need be. */
static vel_ref in_type(caster *k, vel_ref r, vel_dtype want)
{
    vel_graph *dst = k->c.dst;
    vel_type now = vel_type_of(dst, r);
    if (!r.id || now.dtype == want || now.dtype == VEL_I32)
        return r;
    const vel_node *n = vel_at(dst, r);
    vel_ref *cached =
        r.out == 0 && r.id < k->room ? &(want == VEL_F32 ? k->as_f32 : k->as_compute)[r.id] : NULL;
    if (cached && cached->id)
        return *cached;
    vel_ref made;
    if (n->op == VEL_OP_weight) {
        vel_node leaf = *n;
        leaf.out[0].dtype = want;
        made = vel_copy_node(dst, &leaf, NULL);
    } else {
        vel_graph_place(dst, n->path, n->layer, n->backward);
        made = vel_cast(dst, r, want);
        vel_graph_place(dst, NULL, 0, false);
    }
    if (cached)
        *cached = made;
    return made;
}

static void cast_node(caster *k, int32_t id)
{
    vel_node n = *vel_node_at(k->c.src, id);
    const char *types = vel_op_types(n.op);
    vel_ref in[VEL_MAX_IN] = {{0}};
    vel_dtype first = VEL_F32;
    for (int i = 0; i < n.n_in; i++) {
        vel_ref r = vel_copier_ref(&k->c, n.in[i]);
        vel_dtype now = vel_type_of(k->c.dst, r).dtype;
        if (i == 0 && type_letter(types, 0, false) == 't')
            first = now;
        in[i] = in_type(k, r, wanted_type(k, type_letter(types, i, false), now, first));
    }
    if (!vel_op_is_leaf(n.op) && n.op != VEL_OP_cast)
        for (int i = 0; i < n.n_out; i++)
            if (n.out[i].dtype != VEL_I32)
                n.out[i].dtype = wanted_type(k, type_letter(types, i, true), n.out[i].dtype, first);
    /* A cast of the model's own, to float32, says "in full precision"; one to another type is ours.
     */
    k->c.map[id] = vel_copy_node(k->c.dst, &n, in);
}

vel_status vel_pass_cast(const vel_graph *g, vel_dtype compute, vel_graph **out)
{
    caster k = {.compute = compute};
    VEL_TRY(vel_copier_begin(&k.c, g));
    vel_arena *arena = vel_graph_arena(k.c.dst);
    k.room = 3 * vel_graph_size(g) + 64;
    k.as_f32 = vel_arena_alloc(arena, (size_t)k.room * sizeof *k.as_f32);
    k.as_compute = vel_arena_alloc(arena, (size_t)k.room * sizeof *k.as_compute);
    if (!k.as_f32 || !k.as_compute) {
        vel_graph_destroy(k.c.dst);
        return VEL_NO_MEMORY;
    }
    for (int32_t id = 1; id < vel_graph_size(g); id++)
        cast_node(&k, id);
    return vel_copier_end(&k.c, out);
}
