/* scaler.h: loss scaling for float16, whose smallest normal number is 6e-5: the loss, and with it
 * every gradient, is multiplied by a factor that grows until a gradient overflows (Micikevicius et
 * al. 2018; torch.amp.GradScaler's rules). */
#ifndef VEL_SCALER_H
#define VEL_SCALER_H

#include "base/base.h"

typedef struct vel_loss_scaler {
    double scale;  /* 0: off */
    int64_t good;  /* steps since it changed */
    int64_t skips; /* in all */
} vel_loss_scaler;

/* What the loss is multiplied by: 1 when off. */
double vel_scaler_factor(const vel_loss_scaler *s);
/* After a step's gradient is known: true when the step may be taken; false when it must be skipped,
 * the scale then is halved. After 2000 good steps it doubles. */
bool vel_scaler_step(vel_loss_scaler *s, bool finite);

#endif
