/* kohya_blocks.c: what sd-scripts' networks for SD 3, FLUX.1 and Lumina put adapters on: every
 * linear layer of the blocks, modulation included, of all blocks or of those that network_args
 * name. */
#include "dialects/rules.h"

#include <stdlib.h>

/* Kinds of blocks: how their modules' paths begin, the values of train_blocks that ask for them
 * (besides "all", which stands for its absence), and the argument that lists numbers of blocks. */
static const struct group {
    uint32_t scripts;
    const char *start, *values, *numbers;
} groups[] = {
    {SD3_NETWORK, "*.transformer_blocks.", "", "train_block_indices"},
    {FLUX_NETWORK, "*.transformer_blocks.", "double", "train_double_block_indices"},
    {FLUX_NETWORK, "*.single_transformer_blocks.", "single", "train_single_block_indices"},
    {LUMINA_NETWORK, "*.layers.", "transformer", NULL},
    {LUMINA_NETWORK, "*.noise_refiner.", "noise_refiner,refiners", NULL},
    {LUMINA_NETWORK, "*.context_refiner.", "context_refiner,refiners", NULL},
    {LUMINA_NETWORK, "*.norm_out.", "", NULL},
};

/* "0,2,5-8" as patterns that begin with a text; "all" and "none" are words of the peer's. */
static vel_status add_numbers(vel_line *l, const char *key, const char *list, const char *start,
                              vel_text *out)
{
    enum { MOST = 1000 };
    if (strcmp(list, "all") == 0)
        vel_text_addf(out, ",%s*", start);
    if (!*list || strcmp(list, "all") == 0 || strcmp(list, "none") == 0)
        return VEL_OK;
    vel_span item;
    for (const char *rest = list; vel_next_part(&rest, ",", &item);) {
        char *end;
        long first = strtol(item.s, &end, 10), last = first;
        bool number = end != item.s;
        end += strspn(end, " ");
        if (number && *end == '-')
            last = strtol(end + 1, &end, 10);
        end += strspn(end, " ");
        if (!number || end != item.s + item.n || first < 0 || last < first || last >= MOST)
            return vel_fail(l->ctx, VEL_BAD_VALUE,
                            "%s: --network_args %s=%s: numbers of blocks such as 0,2,5-8, all or "
                            "none are meant",
                            l->script->name, key, list);
        for (long i = first; i <= last; i++)
            vel_text_addf(out, ",%s%ld.*", start, i);
    }
    return VEL_OK;
}

static vel_status add_group(vel_line *l, const struct group *g, const char *blocks, vel_text *out)
{
    const char *list = g->numbers ? vel_rule_pair(l, "network_args", g->numbers) : NULL;
    if (strcmp(blocks, "all") != 0 && !vel_list_has(g->values, blocks))
        return VEL_OK;
    return add_numbers(l, g->numbers, list ? list : "all", g->start, out);
}

vel_status vel_kohya_blocks(vel_line *l)
{
    const char *blocks = vel_rule_pair(l, "network_args", "train_blocks");
    bool known = !blocks || strcmp(blocks, "all") == 0;
    vel_text t;
    vel_text_init(&t, l->ctx);
    vel_status st = VEL_OK;
    for (int i = 0; i < VEL_COUNT(groups) && !st; i++) {
        bool ours = groups[i].scripts & l->script->bit;
        if (!ours && groups[i].numbers && vel_rule_pair(l, "network_args", groups[i].numbers))
            st = vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --network_args %s: is another model's",
                          l->script->name, groups[i].numbers);
        if (!ours || st)
            continue;
        known = known || vel_list_has(groups[i].values, blocks);
        st = add_group(l, &groups[i], blocks ? blocks : "all", &t);
    }
    if (!st && t.failed)
        st = VEL_NO_MEMORY;
    if (!st && !known)
        st = vel_fail(l->ctx, VEL_BAD_VALUE,
                      "%s: --network_args train_blocks=%s: there are no such blocks",
                      l->script->name, blocks);
    if (!st && !t.s)
        st = vel_fail(l->ctx, VEL_BAD_VALUE, "%s: --network_args leave no block to train",
                      l->script->name);
    if (!st)
        st = vel_line_set(l, "network_args", "targets", "%s", t.s + 1);
    vel_text_finish(&t);
    return st;
}
