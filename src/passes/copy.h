/* copy.h: what passes share: making a new graph from an old one, node by node. */
#ifndef VEL_PASSES_COPY_H
#define VEL_PASSES_COPY_H

#include "passes/passes.h"

typedef struct vel_copier {
    const vel_graph *src;
    vel_graph *dst;
    vel_ref *map; /* [node] of src: the ref in dst of its first output; {0} not copied */
} vel_copier;

/* New graph and an empty map. */
vel_status vel_copier_begin(vel_copier *c, const vel_graph *src);
/* What r became. */
vel_ref vel_copier_ref(const vel_copier *c, vel_ref r);
/* Copies a node with its inputs mapped and notes it in the map. */
vel_ref vel_copier_node(vel_copier *c, int32_t id);
/* Outputs over, checks, hands the graph out; destroys it on failure. */
vel_status vel_copier_end(vel_copier *c, vel_graph **out);
/* How often each node is read (by nodes and outputs); in the graph's arena; NULL without memory. */
int32_t *vel_count_uses(const vel_graph *g, vel_arena *a);

#endif
