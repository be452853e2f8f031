/* norm_delta.c: changes of a norm's weight and bias, as LyCORIS' files hold them beside adapters. A
 * norm is no product: the rewrite adds w_norm and b_norm to what the node reads. Read, not trained.
 */
#include "adapters/adapters.h"

const vel_adapter_kind vel_adapter_norm = {.name = "norm"};
