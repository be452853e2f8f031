/* scaler.c: when the loss scale grows and shrinks. */
#include "train/scaler.h"

enum { GROWTH_INTERVAL = 2000 };

double vel_scaler_factor(const vel_loss_scaler *s)
{
    return s->scale > 0 ? s->scale : 1;
}

bool vel_scaler_step(vel_loss_scaler *s, bool finite)
{
    if (!finite) {
        s->scale *= 0.5;
        s->good = 0;
        s->skips++;
    } else if (++s->good == GROWTH_INTERVAL) {
        s->scale *= 2;
        s->good = 0;
    }
    return finite;
}
