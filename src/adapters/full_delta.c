/* full_delta.c: a whole change of a weight, as LyCORIS' "full" files hold it. Read, not trained:
 * full fine-tuning trains the weights themselves. */
#include "adapters/adapters.h"

static vel_ref delta(vel_graph *g, const vel_adapter_site *s, const vel_ref *leaf)
{
    return leaf[VEL_LEAF_DIFF].id ? leaf[VEL_LEAF_DIFF] : vel_fill(g, s->weight, 0);
}

const vel_adapter_kind vel_adapter_full = {.name = "full", .delta = delta};
